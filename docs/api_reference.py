"""The API reference: HTML pages from the docstrings of public names. `make docs` writes them to build/docs.

    python docs/api_reference.py build/docs

pdoc renders the pages. This file selects what they show: `treadle` itself, and the modules of the objects that public
functions return. It turns the columns of docstrings into tables, and adds what follows from an op's class.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, before an installed package

import treadle
from treadle.frontends import language
from treadle.ir.attention.masking import Masks
from treadle.ir.op_registry import OPS
from treadle.ir.operation import Op
from treadle.ir.types import DType

MODULES = (
    "treadle.compiled",
    "treadle.tasks.loaded",
    "treadle.continuation",
    "treadle.sentence_embedding",
    "treadle.runtime.session",
    "treadle.runtime.generation",
    "treadle.training.texts",
    "treadle.explaining.fusion",
    "treadle.explaining.memory",
    "treadle.explaining.quantization",
    "treadle.exporting",
    "treadle.verifying",
    "treadle.ir.expressions",
    "treadle.ir.graph",
    "treadle.ir.builder",
    "treadle.ir.types",
    "treadle.passes.framework.manager",
    "treadle.passes.framework.rewrite",
    "treadle.passes.pipelines",
)
"""Modules with a page of their own, in addition to `treadle`."""

GROUPS = ("Compile, load, train and generate", "Declare a model", "Ops", "Dtypes", "Errors")

OP_ERRORS = "Raises GraphError for operands or attributes that the op does not take, and RuleError if axes disagree."

ALIASES = {
    "Activation": "A function from a tensor to a tensor of the same shape, such as `t.gelu`: the type of `act=`.",
    "Tensor": "A value of a model, with the builder of its graph. Operators (`+`, `@`, comparisons, slices) add ops; a "
    "number gets the dtype of the other operand. `treadle.ir.expressions.Expr` documents attributes such as the shape.",
    "TensorLike": "The operands of ops: a `Tensor`, or a Python number, which gets the dtype of the other operand.",
}
"""Descriptions of type aliases, which have no docstring of their own."""

TEMPLATE = """\
{% extends "default/module.html.jinja2" %}
{% block attribution %}
    <a class="attribution" href="https://pdoc.dev">built with pdoc</a>
{% endblock %}
"""


def public_value(name: str) -> object:
    """Return the value of a name of `treadle`. A word of the language comes before a module of the same name."""
    return getattr(language if name in dir(language) else treadle, name)


def public_names() -> list[str]:
    """Return the names of `treadle` that users import, sorted."""
    names = [name for name in dir(treadle) if not name.startswith("_") and name != "TYPE_CHECKING"]
    return [name for name in names if not isinstance(public_value(name), ModuleType)]


def group_of(name: str) -> str:
    """Return the group of `GROUPS` that lists a public name."""
    value = public_value(name)
    if isinstance(value, DType):
        return "Dtypes"
    if isinstance(value, type) and issubclass(value, treadle.TreadleError):
        return "Errors"
    if getattr(value, "__module__", "") == "treadle.frontends.operations":
        return "Ops"
    return "Declare a model" if name in vars(language) else GROUPS[0]


def description(name: str, docstring: str) -> str:
    """Return the text of an entry of `treadle` as Markdown: its docstring, and what follows from the value itself.

    name       a public name
    docstring  its docstring, "" if it has none
    """
    value = public_value(name)
    if isinstance(value, DType):
        return f'A dtype: {value.kind}, {8 * value.bytes} bits. `t.{name}["B S 64"]` is a type with these axes.'
    if isinstance(value, Masks):
        return "The mask under which position i sees the keys up to i. Combine masks with `&`."
    text = columns_as_tables(docstring or ALIASES.get(name, ""))
    if group_of(name) == "Ops":
        return f"{text}\n\n{_op_table(OPS[name])}\n\n{OP_ERRORS}"
    if group_of(name) == "Errors" and value is not treadle.TreadleError:
        return f"{text}\n\nThe arguments are the same as for `TreadleError`."
    return text


def _attribute_rows(cls: type[Op], docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the names and descriptions of an op's attributes that only its base classes describe."""
    from pdoc.doc_ast import walk_tree

    known: dict[str, str] = {}
    for base in cls.__mro__[1:-1]:
        for block in _blocks(inspect.getdoc(base) or ""):
            known = {name: text for names, text in _rows(block.splitlines()) for name in names.split(", ")} | known
        known = walk_tree(base).var_docstrings | known
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in known and not re.search(rf"\b{field.name}\b", docstring):
            yield f"**{field.name}**", _escaped(" ".join(known[field.name].split()))


def _op_table(cls: type[Op]) -> str:
    """Return the table of an op's operands, shapes and dtypes. If they depend on attributes, show those of a sample."""
    rule, dtypes, suffix = cls.rule_text, cls.dtype_text, ""
    if (rule is None or dtypes is None) and cls.samples:
        sample = cls.samples[0]
        op = cls.make(**sample.attributes)
        rule = rule or op.axis_rule([None if each is None else each.rank for each in sample.types])
        dtypes = dtypes or op.dtypes()
        suffix = f", for example for ({sample.text})"
    rows = {
        "operands": ", ".join(f"`{each}`" for each in cls.operands) or "none",
        "shapes": f"`{rule}`{'' if cls.rule_text else suffix} (docs/axis-rules.md)",
        "dtypes": f"`{dtypes}`{'' if cls.dtype_text else suffix}: f is a float, i an integer",
        "name": "the name of the result in the graph; None: the op's name",
    }
    return _table([*_attribute_rows(cls, cls.__doc__ or ""), *rows.items()])


_ROW = re.compile(r"(?P<names>[\w*\"-]+(?:\(\w*\))?(?:, [\w*\"-]+)*)  +(?P<text>(?!=|-->)\S.*)")


def columns_as_tables(docstring: str) -> str:
    """Return a docstring as Markdown: its columns as tables, its equations as code, its paragraphs as they are.

    x     the operand            | x | the operand, on       |
          on two lines    -->    |   | two lines             |
    """
    return "\n\n".join(map(_converted, _blocks(docstring)))


def _blocks(docstring: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", docstring.strip("\n"))


def _converted(block: str) -> str:
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return block
    rows = _rows(lines)
    if rows:
        return _table((f"**{_escaped(names)}**", _escaped(text)) for names, text in rows)
    if len(lines) > 1 and sum(" = " in line for line in lines) * 2 > len(lines):
        return "\n".join(f"    {line}" for line in lines)
    return _escaped(block)


def _rows(lines: list[str]) -> list[tuple[str, str]]:
    """Return the rows of a block of columns: names and text. Return none if the block is not written in columns."""
    rows: list[tuple[str, str]] = []
    for line in lines:
        match = _ROW.fullmatch(line.rstrip())
        if match:
            rows.append((match["names"], match["text"]))
        elif rows and line.startswith("  "):
            rows[-1] = rows[-1][0], f"{rows[-1][1]} {line.strip()}"
        else:
            return []
    return rows


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *body])


def _escaped(text: str) -> str:
    """Return text in which Markdown and HTML interpret no character outside of `code`."""
    parts = text.split("`")
    parts[::2] = [
        re.sub(r"([*\\[\]])", r"\\\1", part.replace("&", "&amp;").replace("<", "&lt;")) for part in parts[::2]
    ]
    return "`".join(parts)


def _entry(module: str, name: str, docstring: str) -> str:
    if module == "treadle" and "." not in name:
        return description(name, docstring)
    if name.endswith(".__init__") and not docstring:
        return "The arguments are described above."
    return columns_as_tables(docstring)


def overview() -> str:
    """Return the beginning of the page of `treadle`: an example, and the public names by group."""
    docstring = (treadle.__doc__ or "").partition("This module exports")[0]
    return docstring + "\n" + "\n".join(_group_lines())


def _group_lines() -> Iterator[str]:
    for group in GROUPS:
        links = ", ".join(f"[{name}](#{name})" for name in public_names() if group_of(name) == group)
        yield f"**{group}:** {links}\n"


def build(folder: Path) -> list[Path]:
    """Write the pages to a folder. Return their paths. Needs the extra `docs`; uses no network."""
    import pdoc.doc
    import pdoc.render

    warnings.filterwarnings("ignore", "(?s).*type annotation")  # such annotations are shown as text
    names, modules = public_names(), [import_module(name) for name in ("treadle", *MODULES)]
    vars(treadle).update({name: public_value(name) for name in names})  # pdoc reads only what is imported
    treadle.__all__ = sorted(names, key=lambda name: (GROUPS.index(group_of(name)), name))  # type: ignore[attr-defined]
    pages = {module.__name__: pdoc.doc.Module(module) for module in modules}
    for page in pages.values():
        vars(page).update(docstring=columns_as_tables(page.docstring), submodules=[])  # both are cached properties
        for member in page.flattened_own_members:
            for each in (member, *(member.own_members if isinstance(member, pdoc.doc.Class) else ())):
                vars(each)["docstring"] = _entry(page.modulename, each.qualname, each.docstring)
    vars(pages["treadle"])["docstring"] = overview()

    with tempfile.TemporaryDirectory() as templates:
        Path(templates, "module.html.jinja2").write_text(TEMPLATE, encoding="utf-8")
        pdoc.render.configure(template_directory=Path(templates), show_source=False, include_undocumented=False)
        written = {"index.html": pdoc.render.html_index(pages), "search.js": pdoc.render.search_index(pages)}
        for name, page in pages.items():
            written[f"{name.replace('.', '/')}.html"] = pdoc.render.html_module(page, pages)
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [folder / name for name in written]


if __name__ == "__main__":
    paths = build(Path(sys.argv[1]))
    print(f"{len(paths)} files, beginning with {paths[0]}")
