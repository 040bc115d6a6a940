"""The meaning of `dtype=` and `quantize=`: the dtype of the computation, and the encoding of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
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
    dtype: str | None, passes: Sequence[Pass], widen: Widen, scheme: str | None = None, *, computed: bool = False
) -> tuple[tuple[Pass, ...], Widen]:
    """Return the passes, and the dtypes to widen, that compute a model in `dtype` with quantized weights.

    dtype     None: as declared. "f32": bf16 and f16 values become f32. "bf16": the same, and then products with weights
              and attention have bf16 operands and f32 sums
    scheme    one of `QUANTIZED`; None: weights are not quantized
    computed  True if "bf16" applies to the product of any two matrices, as in training, where weights are inputs and
              gradients are computed matrices

    Raises UsageError for an unknown dtype or scheme.
    """
    if scheme is not None:
        if scheme not in QUANTIZED:
            hint = "quantize " + " or ".join(QUANTIZED)
            raise UsageError(f"unknown quantization scheme {str(scheme)[:40]!r}", hint=hint)
        passes = (*passes, QuantizeWeights(scheme))
    if dtype is None:
        return tuple(passes), widen
    if dtype not in COMPUTED:
        raise UsageError(f"unknown computation dtype {str(dtype)[:40]!r}", hint="dtype " + " or ".join(COMPUTED))
    products = NarrowProducts(bf16, computed=computed)
    narrowing = (PatchesAsProducts(), products, NarrowAttention(bf16)) if dtype == "bf16" else ()
    given = [widen] if isinstance(widen, str) else list(widen)
    return (*passes, *narrowing), tuple(dict.fromkeys([*given, *WIDENED]))


def checked_passes(passes: object) -> tuple[Pass, ...]:
    """Return the pipeline as a tuple. Raises UsageError if `passes` is neither a sequence of passes nor a string, and
    ParseError for a string that is not a pipeline.
    """
    if isinstance(passes, str):
        from treadle.passes.framework.pass_text import parse_pipeline

        return parse_pipeline(passes)
    if isinstance(passes, Sequence) and all(isinstance(p, Pass) for p in passes):
        return tuple(passes)
    raise UsageError(
        "passes= must be a list of passes",
        received=f"{passes!r}"[:80],
        hint="leave it out for the default pipeline; [] compiles the graph as declared",
    )


def left_out(passes: Sequence[Pass], without: Sequence[str]) -> tuple[Pass, ...]:
    """Return the pipeline without the passes of these names. Raises UsageError for a name that the pipeline lacks."""
    known = [each.name for each in passes]
    for name in without:
        if name not in known:
            near = NearestNames(known).of(name)
            hint = f"{near[0]}?" if near else "one of " + ", ".join(dict.fromkeys(known))
            raise UsageError(f"the pipeline has no pass {printable(name)!r}", hint=hint)
    return tuple(each for each in passes if each.name not in without)
