"""Wrong uses of masks, sizes and stacks within models: typed errors with hints that work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest

import treadle as t
from tests.error_texts import raises_freely
from treadle.ir.errors import TreadleError


def traced(body: Callable[[t.Tensor], Any]) -> t.Tensor:
    """Trace a model with this body, and return its output for one input."""

    @t.model
    def tiny(x: Annotated[t.Tensor, t.f32["B S 8"]]) -> t.Tensor:
        return body(x)  # type: ignore[no-any-return]

    return t.compile(tiny, backend="numpy")(x=np.ones((1, 3, 8), np.float32))


def attended(x: t.Tensor, **masks: Any) -> t.Tensor:
    heads = t.rearrange(x, "b s (h=2 d) -> b h s d")
    return t.attention(heads, heads, heads, **masks)


WRONG: list[tuple[Callable[[t.Tensor], Any], str, str]] = [
    (lambda x: t.causal | t.window(4), "masks have no union", 't.boolean_mask(seen, "s t")'),
    (lambda x: t.causal ^ t.window(4), "masks have no difference", 't.boolean_mask(seen, "s t")'),
    (lambda x: t.causal - t.window(4), "masks have no difference", 't.boolean_mask(seen, "s t")'),
    (lambda x: ~t.causal, "masks have no complement", 't.boolean_mask(seen, "s t")'),
    (lambda x: True & t.causal, "masks intersect with masks only", ""),
    (lambda x: t.alibi(np.ones(2)) & t.causal, "biases add up, and do not intersect", "attention takes both"),
    (
        lambda x: attended(x, mask=np.tril(np.ones((3, 3)))),
        "masks intersect with masks only",
        'mask=t.causal for a lower triangle; t.boolean_mask(x, "s t")',
    ),
    (lambda x: attended(x, mask=x[:, :, 0]), "masks intersect with masks only", 't.boolean_mask(x != 0, "b t")'),
    (
        lambda x: attended(x, mask=t.boolean_mask(np.tril(np.ones((3, 3))), "s t")),
        "the mask has 3 positions, but the model takes any number of them, S",
        'mask=t.causal, or t.boolean_mask(seen, "s t")',
    ),
    (
        lambda x: t.boolean_mask(np.triu(np.full((3, 3), -np.inf), 1), "s t"),
        "a mask is true or false",
        'bias=t.tensor_bias(x, "s t"), where -inf masks a key',
    ),
    (lambda x: 1.0 + t.alibi(np.ones(2)), "biases add to biases only", ""),
    (lambda x: -t.alibi(np.ones(2)), "biases have no negative", 't.tensor_bias(x, "h s t")'),
    (lambda x: t.window("8"), "window: size must be an integer", "size=8"),  # type: ignore[arg-type]
    (lambda x: t.window(2.5), "window: size must be an integer", ""),  # type: ignore[arg-type]
    (lambda x: t.window(True), "window: size must be an integer", ""),
    (lambda x: t.t5_relative(np.ones((8, 2), np.float32), buckets="8"), "buckets must be an integer", "buckets=8"),  # type: ignore[arg-type]
    (lambda x: t.linear(x, "8", name="l"), "linear: out must be a size", "out=8"),
    (lambda x: t.embed(t.cast(x, to=t.i64), 4, " 8 ", name="e"), "embed: dim must be a size", "dim=8"),
    (lambda x: t.stack("h", 2).__enter__(), "stack 'h' is a loop", 'for i in t.stack("h", 2):'),  # type: ignore[attr-defined]
]


@pytest.mark.parametrize(("body", "what", "hint"), WRONG)
def test_a_wrong_use_is_a_typed_error_with_a_hint(body: Callable[[t.Tensor], Any], what: str, hint: str) -> None:
    with raises_freely(TreadleError, match=what) as caught:
        traced(body)
    assert str(caught.value.hint or "").startswith(hint)
    assert "test_mask_errors.py" in str(caught.value.source)


def test_a_stack_is_not_a_block() -> None:
    def body(x: t.Tensor) -> t.Tensor:
        with t.stack("h", 2):  # type: ignore[attr-defined]
            return x

    with raises_freely(t.FrontendError, match="stack 'h' is a loop"):
        traced(body)


def test_the_hints_work() -> None:
    """A union of masks as a boolean mask, and a size that is an expression."""

    def either(x: t.Tensor) -> t.Tensor:
        i = t.iota(size="S")
        return attended(x, mask=t.boolean_mask((i[:, None] >= i[None, :]) | (i[None, :] == 0), "s t"))

    assert traced(either)
    assert traced(lambda x: attended(x, mask=t.causal & t.window(8)))
    assert traced(lambda x: t.linear(x, "4*2", name="l"))
    assert traced(lambda x: [t.linear(x, 8, name="l") for _ in t.stack("h", 2)][-1])


@pytest.mark.parametrize("axes", ["B T 8", "B 3 8"])
def test_the_hint_for_a_union_of_masks_fits_every_model(axes: str) -> None:
    def compiled(union: Callable[[t.Tensor], Any]) -> None:
        def tiny(x: Any) -> t.Tensor:
            return t.self_attention(x, 2, mask=union(x), name="a")

        tiny.__annotations__["x"] = t.f32[axes]
        t.compile(t.model(tiny), backend="numpy")

    with raises_freely(TreadleError, match="masks have no union") as caught:
        compiled(lambda x: t.causal | t.window(4))
    mask, _, positions = str(caught.value.hint).partition(", with seen of positions: ")
    first, _, second = positions.partition(", seen = ")

    def followed(x: t.Tensor) -> Any:
        names: dict[str, Any] = {"t": t, "x": x}
        exec(f"{first}; seen = {second}", names)
        return eval(mask, names)

    compiled(followed)


@pytest.mark.parametrize("dtype", ["f32", "i64", "boolean"])
def test_the_hint_for_a_tensor_in_place_of_a_mask_or_a_bias(dtype: str) -> None:
    """Such as the attention_mask of Hugging Face, of integers."""

    def compiled(named: str, follow: bool) -> None:
        def tiny(h: Any, x: Any) -> t.Tensor:
            value = eval(calls[named], {"t": t, "x": x}) if follow else x
            return t.self_attention(h, 2, name="a", **{named: value})

        tiny.__annotations__.update(h=t.f32["B S 8"], x=getattr(t, dtype)["B S"])
        t.compile(t.model(tiny), backend="numpy")

    calls: dict[str, str] = {}
    for named in ("mask", "bias"):
        with raises_freely(TreadleError, match="with masks only|to biases only") as caught:
            compiled(named, follow=False)
        mask, bias = str(caught.value.hint).split(" as a mask, ")
        calls = {"mask": mask, "bias": bias.partition(" as a bias")[0]}
        compiled(named, follow=True)


def test_masks_and_biases_may_be_tensors_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    triangle = torch.tril(torch.ones(3, 3))

    def of(**masks: Any) -> np.ndarray[Any, Any]:
        @t.model
        def tiny(x: Annotated[t.Tensor, t.f32["B 3 8"]]) -> t.Tensor:
            return attended(x, **masks)

        x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)
        return t.compile(tiny, backend="numpy")(x=x)["output"]  # type: ignore[no-any-return]

    causal = of(mask=t.causal)
    np.testing.assert_allclose(of(mask=t.boolean_mask(triangle, "s t")), causal, atol=1e-6)
    np.testing.assert_allclose(of(mask=t.boolean_mask(triangle.bool(), "s t")), causal, atol=1e-6)
    added = torch.where(triangle > 0, 0.0, float("-inf"))
    np.testing.assert_allclose(of(bias=t.tensor_bias(added, "s t")), causal, atol=1e-6)
    slopes = of(bias=t.alibi([0.5, 0.25]))
    np.testing.assert_allclose(of(bias=t.alibi(torch.tensor([0.5, 0.25]))), slopes, atol=1e-6)
