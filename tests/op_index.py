"""The text of docs/ops.md: every op, described from its class. `make golden` writes it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from treadle.ir.op_registry import OPS
from treadle.ir.operation import Composite, Op
from treadle.ir.wording.op_signatures import op_signature

HEAD = """\
# Ops

All ops of the graph, in a section for each file of `ir/ops/`. `make golden` generates this page from the ops' classes.

- An op is called as `t.NAME` in a model, as `b.NAME` on a builder, as `p.NAME` in a pattern. `help(t.NAME)` prints
  the op's signature and its whole docstring.
- A name in italics is a composite: it has a body of simpler ops, which runs on a backend that has no kernel for the
  composite.
- docs/axis-rules.md explains the notation of axis rules. "by attributes": the rule follows from the op's attributes, or
  from the operands' ranks.
"""


def op_index() -> str:
    """Return the text of the page."""
    return HEAD + "".join(f"\n{section}" for section in _sections())


def _sections() -> Iterator[str]:
    files: dict[str, list[type[Op]]] = {}
    for _, cls in sorted(OPS.items()):
        if cls.__module__.startswith("treadle.ir.ops.") and cls.is_word:
            files.setdefault(cls.__module__, []).append(cls)
    for module, found in sorted(files.items()):
        lines = [f"## {module.rpartition('.')[2]}", "", _paragraph(importlib.import_module(module).__doc__), ""]
        lines += ["| op | axis rule | meaning |", "|---|---|---|", *map(_row, found)]
        yield "\n".join(lines) + "\n"


def _row(cls: type[Op]) -> str:
    name = f"*`{cls.name}`*" if issubclass(cls, Composite) else f"`{cls.name}`"
    given = [p.replace(annotation=p.empty) for p in op_signature(cls).parameters.values() if p.name != "name"]
    called = f"({', '.join(map(str, given))})"
    rule = f"`{cls.rule_text}`" if cls.rule_text else "by attributes"
    meaning = _paragraph(cls.__doc__).replace("|", "\\|")
    return f"| {name} `{called}` | {rule} | {meaning} |"


def _paragraph(text: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((text or "").partition("\n\n")[0].split())
