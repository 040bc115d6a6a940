"""Attention terms in backends: a method of a visitor handles each kind; other kinds are handled by their bodies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from treadle.backends.registry import find_backend
from treadle.backends.torch.term_spelling import spelled_term
from treadle.ir.attention.attention_terms import (
    BooleanMask,
    Causal,
    MaskTerm,
    Padding,
    Segments,
    T5Relative,
    Term,
    Window,
)
from treadle.ir.attention.term_text import parse_term
from treadle.ir.attention.term_visitor import TermVisitor
from treadle.ir.builder import Builder
from treadle.ir.errors import GraphError
from treadle.ir.graph import Graph
from treadle.ir.interpreter import interpret
from treadle.ir.ops.attention import Attention
from treadle.ir.target import Target

KINDS = ["causal", "window(3)", "padding", "segments", "mask(b t)", "bias(h s t)", "t5_relative(8, 5)", "alibi"]


class Calls(TermVisitor[str, str]):
    """A visitor that records the called method and its arguments."""

    def causal(self, term: Term) -> str:
        return f"causal: {term}"

    def window(self, term: Window) -> str:
        return f"window: {term}"

    def padding(self, term: Term, lengths: str) -> str:
        return f"padding: {term} {lengths}"

    def segments(self, term: Term, of_queries: str, of_keys: str) -> str:
        return f"segments: {term} {of_queries} {of_keys}"

    def boolean_mask(self, term: Term, mask: str) -> str:
        return f"boolean_mask: {term} {mask}"

    def tensor_bias(self, term: Term, bias: str) -> str:
        return f"tensor_bias: {term} {bias}"

    def t5_relative(self, term: Term, table: str) -> str:
        return f"t5_relative: {term} {table}"

    def alibi(self, term: Term, slopes: str) -> str:
        return f"alibi: {term} {slopes}"


@dataclass(frozen=True, repr=False)
class Stripes(MaskTerm):
    """A kind of term that no visitor handles."""

    step: int = 2

    name = "stripes"


def test_each_kind_calls_its_own_method_with_its_operands() -> None:
    said = {text: parse_term(text).accept(Calls(), *(o.name for o in parse_term(text).operands)) for text in KINDS}
    assert said == {
        "causal": "causal: causal",
        "window(3)": "window: window(3)",
        "padding": "padding: padding lengths",
        "segments": "segments: segments query_segments key_segments",
        "mask(b t)": "boolean_mask: mask(b t) mask",
        "bias(h s t)": "tensor_bias: bias(h s t) bias",
        "t5_relative(8, 5)": "t5_relative: t5_relative(8, 5) table",
        "alibi": "alibi: alibi slopes",
    }


def test_a_visitor_that_lacks_a_kind_cannot_be_made() -> None:
    class Short(Calls):
        alibi: ClassVar[Any] = TermVisitor.alibi  # alibi of the base class is abstract

    with pytest.raises(TypeError, match=r"Short.*alibi"):
        Short()


def test_a_kind_without_a_case_is_refused_and_is_not_standard() -> None:
    with pytest.raises(GraphError) as caught:
        spelled_term(Stripes(3), [], "S", "T")
    assert str(caught.value).startswith("attention: _Spelled has no case for the term stripes")
    assert caught.value.received == "stripes(3)"
    assert "is_standard" in (caught.value.hint or "")
    assert not Stripes().is_standard
    assert not Attention(terms=(Causal(), Stripes())).has_standard_terms


def test_subclasses_of_standard_modules_run_their_own_code() -> None:
    """Visitors only handle the base kind, with the base's meaning, so the body of the derived kind must be used."""

    @dataclass(frozen=True, repr=False)
    class Before(Causal):
        """j < i"""

        def reference(self, i: Any, j: Any, *operands: Any) -> Any:
            return j < i

        def body(self, grid: Any, *operands: Any) -> Any:
            return grid.j < grid.i

    assert not Before().is_standard
    b = Builder(Graph("g"))
    x = b.input("x", "f32[1, 2, 4, 3]")
    b.outputs(y=b.attention(x, x, x, terms=(Before(),)))
    given = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 3)).astype(np.float32)}
    meant = interpret(b.graph, given, float64=True)["y"]
    assert not meant[0, 0, 0].any(), "the first query sees no key"
    for backend in ("numpy", "torch"):
        made = find_backend(backend).compile(b.graph, Target("cpu"), {})(**given)["y"]
        assert np.allclose(made, meant, rtol=0, atol=16 * 2**-23 * np.abs(meant).max()), backend


@pytest.mark.parametrize("text", KINDS)
def test_every_kind_that_text_names_is_standard(text: str) -> None:
    assert parse_term(text).is_standard
    assert Attention(terms=(parse_term(text),)).has_standard_terms


def given(term: Term) -> Iterator[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    match term:
        case Padding():
            yield np.array([0, 4])
        case Segments():
            yield rng.integers(0, 2, (2, 4))
            yield rng.integers(0, 2, (2, 5))
        case BooleanMask():
            yield rng.random((2, 5)) < 0.5
        case _:
            sizes = {"b": 2, "h": 3, "s": 4, "t": 5, "buckets8": 8}
            yield from (rng.standard_normal([sizes[a] for a in o.axes.split()]) for o in term.operands)


@pytest.mark.parametrize("text", KINDS)
def test_kernels_of_both_python_backends_mean_what_the_term_means(text: str) -> None:
    """NumPy's kernels call the reference. PyTorch's kernels are implemented separately, and are bitwise identical to
    the reference.
    """
    torch = pytest.importorskip("torch")
    import treadle.backends.numpy.kernels as of_numpy
    import treadle.backends.torch.kernels as of_torch

    term = parse_term(text)
    operands = dict(zip("xy", given(term), strict=False))
    meant = term.reference(np.arange(4)[:, None], np.arange(5), *operands.values())
    assert np.array_equal(of_numpy.term(text, 4, 5, *operands.values()), meant)
    tensors = {name: torch.from_numpy(x) for name, x in operands.items()}
    names = {"kernels": of_torch, "device": torch.device("cpu"), **tensors}
    made = eval(spelled_term(term, list(tensors), "4", "5"), names)
    whole = (2, 3, 4, 5)
    assert np.array_equal(np.broadcast_to(np.asarray(made), whole), np.broadcast_to(meant, whole))


def test_the_buckets_of_a_term_are_worked_out_once() -> None:
    term = T5Relative(8, 4, True)
    assert term.bucket_by_offset is term.bucket_by_offset
    assert term == T5Relative(8, 4, True) and hash(term) == hash(T5Relative(8, 4, True))
