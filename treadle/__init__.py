"""Treadle, a compiler for transformers: the public API.

    import treadle as t

    @t.model
    def tiny(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 1000, dim: int = 64) -> t.Tensor: ...

    exe = t.compile(tiny, backend="numpy")
    exe(tokens=ids)

This module exports the functions and types of the DSL (see `treadle.frontends.language`) and the errors, which are all
subclasses of `TreadleError`. `compile`, `Trainer`, `fetch_model`, `from_torch`, `Graph` and `Target` are imported when
they are first used.
"""

from treadle.interrupted_loading import end_on_interrupt as _end_on_interrupt

_end_on_interrupt()

from importlib import import_module as _import_module  # noqa: E402
from inspect import ismodule as _ismodule  # noqa: E402
from pathlib import Path as _Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402
from typing import Any as _Any  # noqa: E402

__version__ = "0.1.0"

# In a checkout, subpackages such as `treadle.ir` are folders next to the folder of this file. In an installed package,
# they are inside it, and there is no pyproject.toml above.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

from treadle.frontends import language as _language  # noqa: E402
from treadle.frontends.call_errors import UnknownNameError as _UnknownNameError  # noqa: E402
from treadle.frontends.call_errors import unknown_word as _unknown_word  # noqa: E402
from treadle.frontends.language import *  # noqa: E402, F403
from treadle.ir.errors import BackendError as BackendError  # noqa: E402
from treadle.ir.errors import CheckpointError as CheckpointError  # noqa: E402
from treadle.ir.errors import FrontendError as FrontendError  # noqa: E402
from treadle.ir.errors import GraphError as GraphError  # noqa: E402
from treadle.ir.errors import ParseError as ParseError  # noqa: E402
from treadle.ir.errors import PassError as PassError  # noqa: E402
from treadle.ir.errors import RankError as RankError  # noqa: E402
from treadle.ir.errors import RuleError as RuleError  # noqa: E402
from treadle.ir.errors import SizeError as SizeError  # noqa: E402
from treadle.ir.errors import TreadleError as TreadleError  # noqa: E402
from treadle.ir.errors import UsageError as UsageError  # noqa: E402
from treadle.ir.errors import VerifyError as VerifyError  # noqa: E402
from treadle.runtime.distributed.rank_reports import report_uncaught_once as _report_uncaught_once  # noqa: E402

_report_uncaught_once()

if TYPE_CHECKING:
    from treadle.artifacts.loading import load_artifact as load_artifact
    from treadle.artifacts.loading import save as save
    from treadle.compiled import Compiled as Compiled
    from treadle.entry_functions import Trainer as Trainer
    from treadle.entry_functions import compile as compile
    from treadle.entry_functions import load as load
    from treadle.fetching import fetch_model as fetch_model
    from treadle.frontends.torch_export.importer import from_torch as from_torch
    from treadle.ir.analysis.following import follow as follow
    from treadle.ir.graph import Graph as Graph
    from treadle.ir.target import Target as Target
    from treadle.program.source import ModelSource as ModelSource
    from treadle.runtime.beams import Beams as Beams
    from treadle.runtime.sampling import Sampling as Sampling
    from treadle.runtime.token_rules import TokenRules as TokenRules
    from treadle.runtime.training.optimizers import SGD as SGD
    from treadle.runtime.training.optimizers import AdamW as AdamW
    from treadle.runtime.training.schedules import Schedule as Schedule
    from treadle.specializing import Specializing as Specializing

_LAZY = {
    "AdamW": "treadle.runtime.training.optimizers",
    "Beams": "treadle.runtime.beams",
    "Compiled": "treadle.compiled",
    "Graph": "treadle.ir.graph",
    "ModelSource": "treadle.program.source",
    "SGD": "treadle.runtime.training.optimizers",
    "Sampling": "treadle.runtime.sampling",
    "Schedule": "treadle.runtime.training.schedules",
    "Specializing": "treadle.specializing",
    "Target": "treadle.ir.target",
    "TokenRules": "treadle.runtime.token_rules",
    "Trainer": "treadle.training.trainer",
    "compile": "treadle.entry_functions",
    "fetch_model": "treadle.fetching",
    "follow": "treadle.ir.analysis.following",
    "from_torch": "treadle.frontends.torch_export.importer",
    "load": "treadle.loading",
    "load_artifact": "treadle.artifacts.loading",
    "save": "treadle.artifacts.loading",
}


if not TYPE_CHECKING:  # type checkers know all names, and report unknown names

    def __getattr__(name: str) -> _Any:
        if name in _LAZY:
            found = globals()[name] = getattr(_import_module(_LAZY[name]), name)
            return found
        try:
            return getattr(_language, name)
        except _UnknownNameError:  # the nearest names may be those of this module
            raise _unknown_word(name, __dir__()) from None


def __dir__() -> list[str]:
    return sorted({*[n for n, value in globals().items() if not _ismodule(value)], *_LAZY, *dir(_language)})
