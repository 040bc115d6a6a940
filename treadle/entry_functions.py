"""Public entry functions with the options of `treadle.program.option_table`. Type checkers read the stub instead."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from treadle.compiling import compile_model
from treadle.ir.wording.checked_calls import with_checked_call
from treadle.program.entry_signatures import describe_options
from treadle.program.options import CompileOptions
from treadle.program.source import AnyModel

if TYPE_CHECKING:
    from treadle.compiled import Compiled


@with_checked_call()
def compile(model: AnyModel, **options: Any) -> Compiled:
    """Compile a model for a backend and a target. Call the result with arrays by name.

        exe = t.compile(tiny_gpt, backend="tvm", layers=6)
        logits = exe(tokens=np.array([[11, 7, 42]]))["logits"]

    model     a declaration, a graph, a module that `from_torch` imported, or a name: a folder with a checkpoint, an
              ONNX or GGUF file, `file.py:function`, a family of the zoo, a fetched model
    OPTIONS
    config    configuration of the declaration; for an ONNX file, sizes of axes, and values of inputs that determine
              shapes

    If an input of an ONNX file determines shapes and config does not give its value, the file is compiled at the first
    call with each new value: `treadle.specializing`.

    Raises UsageError for an invalid argument, FrontendError for a model that cannot be read or traced, CheckpointError
    for a damaged file or one that does not fit, PassError if a pass fails, BackendError for a backend that is not
    available or rejects the graph, or if no plan fits `memory`. All are TreadleError, as are errors in a model's own
    lines (GraphError, RuleError, SizeError).
    """
    return compile_model(model, CompileOptions.of("compile", options))


describe_options(compile, "compile")


_ELSEWHERE = {"Trainer": "treadle.training.trainer", "load": "treadle.loading"}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(name)
    return getattr(import_module(_ELSEWHERE[name]), name)
