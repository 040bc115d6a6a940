"""In which dtype a model computes, and in how many bits its weights are: what `dtype=` and `quantize=` mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from treadle.ir.errors import UsageError
from treadle.ir.transforms.widening import WIDENED
from treadle.ir.types import bf16
from treadle.passes.framework.manager import Pass
from treadle.passes.products.narrow_attention import NarrowAttention
from treadle.passes.products.narrow_products import NarrowProducts
from treadle.passes.products.patches_as_products import PatchesAsProducts
from treadle.passes.quantization.planning import SCHEMES
from treadle.passes.quantization.quantize import QuantizeWeights

COMPUTED = ("f32", "bf16")
"""The values of `dtype=`."""

QUANTIZED = tuple(SCHEMES)
"""The values of `quantize=`."""

Widen = str | Iterable[str]


def computing_in(
    dtype: str | None, passes: Sequence[Pass], widen: Widen, quantize: str | None = None, *, computed: bool = False
) -> tuple[tuple[Pass, ...], Widen]:
    """The passes and the dtypes to widen with which a model computes in `dtype`, its weights quantized.

    dtype     None: as it is declared. "f32": bf16 and f16 values are f32. "bf16": so as well, and then products with
              weights and attention are of bf16 numbers, summed in f32
    quantize  a scheme of `QUANTIZED`, or None
    computed  whether "bf16" is for products of any two matrices: weights in training are inputs, and gradients computed

    Raises UsageError for another name.
    """
    if quantize is not None:
        if quantize not in QUANTIZED:
            hint = "quantize " + " or ".join(QUANTIZED)
            raise UsageError(f"weights are not quantized in {str(quantize)[:40]!r}", hint=hint)
        passes = (*passes, QuantizeWeights(quantize))
    if dtype is None:
        return tuple(passes), widen
    if dtype not in COMPUTED:
        raise UsageError(f"a model does not compute in {str(dtype)[:40]!r}", hint="dtype " + " or ".join(COMPUTED))
    products = NarrowProducts(bf16, computed=computed)
    narrowing = (PatchesAsProducts(), products, NarrowAttention(bf16)) if dtype == "bf16" else ()
    given = [widen] if isinstance(widen, str) else list(widen)
    return (*passes, *narrowing), tuple(dict.fromkeys([*given, *WIDENED]))
