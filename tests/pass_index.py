"""The text of docs/pipelines.md: the stages, and every pass with its options, from the classes. `make golden` writes
it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, get_type_hints

from treadle.passes.capabilities import Capabilities
from treadle.passes.framework.facts import FACTS, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.option_text import value_text
from treadle.passes.framework.pass_text import pass_classes, type_text
from treadle.passes.stages import STAGES, CompileStage

HEAD = """\
# Pipelines

The stages of a compilation, and every pass with its options. `make golden` generates this page from the classes.

    treadle inspect gpt2 --passes "fold-constants, canonicalize, fuse-linear"
    treadle inspect gpt2 --passes "legalize{backend=tvm}, plan-storage{backend=tvm,strided=true}"
    treadle compile gpt2 --without fuse-gelu --without merge-projections -o gpt2.treadle

In Python, `treadle.compile(model, passes="...")` takes the same text. `--passes` replaces the stages `recognize` and
`merge`; the passes of other stages follow, so only `inspect` takes passes of a backend. The log of a compiled model
(`exe.log`) prints each pass in this form:

    pipeline  := pass ("," pass)*
    pass      := name [ "{" fields "}" ]
    fields    := name "=" value ("," name "=" value)*
    value     := true | false | none | number | word | "text" | "[" [ value ("," value)* ] "]" | "{" [ fields ] "}"

A word is a dtype (`bf16`), the name of a backend (`tvm`), or a string, as the option requires.
"""


def pass_index() -> str:
    """Return the text of the page."""
    return "\n".join([HEAD, *_stages(), *_facts(), *_passes()])


STAGES_HEAD = """\
## Stages

In the order in which they run. A stage whose result a later stage has undone is repeated: a gradient is written in
primitives, so `recognize` follows it too. `passes/stages.py` is the table in code.

| stage | result | needs | afterwards | no longer |
|---|---|---|---|---|"""

FACTS_HEAD = """
## Facts

A pass or a stage is refused, before anything runs, if it needs a fact that does not hold.

| fact | meaning | holds at first |
|---|---|---|"""

PASSES_HEAD = """
## Passes

There is a section for each folder of `passes/`. The options of a pass follow its name, with their defaults.

*No rewrite*: the pass changes only when and where values are computed. It is checked by comparing the outputs as
expressions before and after. Other passes can be certified (docs/passes.md).
"""


def _stages() -> Iterator[str]:
    yield STAGES_HEAD
    for kind in STAGES:
        yield f"| `{kind.row or kind.__name__.lower()}` | {_first(kind)} | {_declared(kind)} |"


def _facts() -> Iterator[str]:
    yield FACTS_HEAD
    for fact in FACTS:
        yield f"| {fact} | {fact.meaning} | {'yes' if fact.initial else 'no'} |"


def _passes() -> Iterator[str]:
    yield PASSES_HEAD
    folders: dict[str, list[type[Pass]]] = {}
    for kind in pass_classes().values():
        folders.setdefault(kind.__module__.split(".")[2], []).append(kind)
    for folder, kinds in sorted(folders.items()):
        yield f"### {folder}\n"
        yield "| pass | effect | needs | afterwards | no longer |"
        yield "|---|---|---|---|---|"
        for kind in kinds:
            mark = "" if kind.rewrites else " *no rewrite*"
            name = kind.__new__(kind).name
            yield f"| `{name}`{_options(kind)}{mark} | {_first(kind)} | {_declared(kind)} |"
        yield ""


def _declared(kind: type[Pass] | type[CompileStage]) -> str:
    return " | ".join([_names(kind.requires), _names(kind.ensures), _names(kind.ends)])


def _options(kind: type[Pass]) -> str:
    types = get_type_hints(kind)
    made = [_option(f, types[f.name]) for f in dataclasses.fields(kind)]
    return f" {', '.join(made)}" if made else ""


def _option(field: dataclasses.Field[Any], type: Any) -> str:
    if field.default is dataclasses.MISSING:
        return f"`{field.name}` ({type_text(type)}, required)"
    if type is Capabilities:
        return f"`{field.name}` ({type_text(type)})"
    return f"`{field.name}={value_text(field.default)}`"


def _first(kind: type[Pass] | type[CompileStage]) -> str:
    """Return the first paragraph of the class's docstring on one line."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()).replace("|", "\\|")


def _names(facts: Facts) -> str:
    return ", ".join(str(fact) for fact in FACTS if fact in facts)
