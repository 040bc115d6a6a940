"""Graphs, logs, executables and ops in a notebook: reprs, HTML, signatures."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
from html.parser import HTMLParser

import numpy as np
import pytest

import treadle as t
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph
from treadle.ir.op_registry import OPS
from treadle.ir.text.attributes import attribute_fields
from treadle.ir.wording.op_signatures import text_attribute


class Outline(HTMLParser):
    """The texts of HTML, with a check that every opened tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@t.model
def sample(x: t.f32["B 4"]):
    """Return a graph whose scope would break unescaped HTML."""
    with t.scope("<script>&"):
        return {"y": t.gelu(t.linear(x, 4, name="<b>"))}


@pytest.fixture(scope="module")
def exe() -> t.Compiled:
    return t.compile(sample)


def test_html_of_executables_graphs_and_logs(exe: t.Compiled) -> None:
    shown = [
        (exe, ["compiled sample on numpy", "input", "B, 4", str(exe.graph), exe.log.table(), exe.source]),
        (exe.graph, ["graph sample: ", str(exe.graph)]),
        (exe.log, ["fuse-activated-linear", "+1 activated_linear"]),
    ]
    for thing, texts in shown:
        html = Outline(thing._repr_html_())
        assert html.tags <= {"div", "code", "table", "tr", "th", "td", "details", "summary", "pre"}
        for text in texts:
            assert text in html.text
    assert "<script>&" in Outline(exe.graph._repr_html_()).text


def test_reprs_of_logs(exe: t.Compiled) -> None:
    assert repr(exe.log) == exe.log.table()
    (record,) = [r for r in exe.log if r.name == "fuse-activated-linear"]
    assert repr(record).startswith("<pass fuse-activated-linear: 2 -> 1 op, ")
    assert repr(record).endswith(" ms, 1 match>")
    assert "\n" not in repr(exe.optimized)


def test_pickling_says_how_to_save(exe: t.Compiled) -> None:
    with pytest.raises(t.UsageError, match="a compiled model cannot be pickled") as caught:
        pickle.dumps(exe)
    assert str(caught.value.hint).startswith('exe.save("model.treadle"), and treadle.load_artifact("model.treadle")')
    assert str(caught.value.source).startswith("tests/test_notebook.py:")


def test_a_copy_of_an_executable_is_itself(exe: t.Compiled) -> None:
    assert copy.copy(exe) is exe
    assert copy.deepcopy({"model": exe})["model"] is exe
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(copy.deepcopy(exe)(x=x)["y"], exe(x=x)["y"])


def test_a_copy_of_a_graph_is_another(exe: t.Compiled) -> None:
    other = copy.deepcopy(exe.graph)
    assert isinstance(other, Graph)
    assert other == exe.graph
    assert other is not exe.graph


def test_errors_are_exported() -> None:
    def subclasses(kind: type[TreadleError]) -> set[type[TreadleError]]:
        return {kind}.union(*map(subclasses, kind.__subclasses__()))

    kinds = {
        k.__name__ for k in subclasses(TreadleError) if k.__module__ in ("treadle.files.errors", "treadle.ir.errors")
    }
    assert {"UsageError", "BackendError", "CheckpointError", "PassError"} < kinds
    for name in kinds:
        assert inspect.isclass(getattr(t, name))
        assert name in dir(t)


def test_help_of_compile_is_readable() -> None:
    text = pydoc.plain(pydoc.render_doc(t.compile))
    assert "passes: 'Sequence[Pass] | str | None' = None" in text
    assert all(f"    {name}  " in text for name in inspect.signature(t.compile).parameters)
    assert all(name in text for name in ("UsageError", "FrontendError", "CheckpointError", "PassError", "BackendError"))


@pytest.mark.parametrize("name", [n for n in dir(t.ops) if OPS[n].__module__.startswith("treadle.ir.")])
def test_every_op_has_a_signature_and_a_docstring(name: str) -> None:
    function = getattr(t.ops, name)
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    positional = text_attribute(OPS[name]) is not None and inspect.Parameter.VAR_POSITIONAL not in kinds
    named = kinds.count(inspect.Parameter.KEYWORD_ONLY)
    assert named == len(attribute_fields(OPS[name])) + 1 - positional  # and name
    assert (inspect.getdoc(function) or "").strip()


def test_signature_of_an_op() -> None:
    text = pydoc.plain(pydoc.render_doc(t.softmax))
    assert "softmax(x: TensorLike, /, *, axis: int = -1, name: str | None = None) -> Tensor" in text
    assert "y = e^(x - m) / sum of" in text
    assert t.softmax is t.ops.softmax
    assert str(inspect.signature(t.top_k)).endswith(" -> tuple[Tensor, Tensor]")
    assert str(inspect.signature(t.concat)).startswith("(*parts: TensorLike, axis: int = -1,")
    assert "start: SizeLike = 0, stop: SizeLike | None = None" in str(inspect.signature(t.slice))


@pytest.mark.parametrize("name", sorted({"mlp", "linear", "attention", "self_attention", "cross_attention", "embed"}))
def test_layers_spell_their_options_out(name: str) -> None:
    parameters = inspect.signature(getattr(t, name)).parameters.values()
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.annotation is not p.empty for p in parameters)
