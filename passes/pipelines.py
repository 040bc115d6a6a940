"""Pipelines: flat lists of passes, which read as a table of contents of what happens to a graph."""

from __future__ import annotations

from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.cleanup.cut_sooner import CutSooner
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.fold_constants import FoldConstants
from treadle.passes.framework.manager import Pass
from treadle.passes.fusion.attention.fuse_attention import FuseAttention
from treadle.passes.fusion.attention.refine_attention import RefineAttention
from treadle.passes.fusion.fuse_embedding_sum import FuseEmbeddingSum
from treadle.passes.fusion.fuse_gelu import FuseGelu
from treadle.passes.fusion.fuse_normalization import FuseNormalization
from treadle.passes.fusion.fuse_residual_norm import FuseResidualNorm
from treadle.passes.fusion.fuse_rotary import FuseRotary
from treadle.passes.fusion.fuse_softmax import FuseSoftmax
from treadle.passes.products.fold_scale import FoldScale
from treadle.passes.products.fuse_activated_linear import FuseActivatedLinear
from treadle.passes.products.fuse_gated_linear import FuseGatedLinear
from treadle.passes.products.fuse_linear import FuseLinear
from treadle.passes.products.merge_projections import MergeProjections


class Pipeline(tuple[Pass, ...]):
    """A flat list of passes that shows, as a default in a signature for one, how many there are."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<pipeline of {len(self)} passes>"


RECOGNITION = Pipeline(
    (
        # one spelling for everything, no work done twice, and none that nobody reads: it would keep others from fusing
        FoldConstants(),
        Canonicalize(),
        CommonSubexpressions(),
        DeadCode(),
        # spelled-out functions as the ops that they are
        FuseNormalization(),
        FuseSoftmax(),
        FuseRotary(),
        RefineAttention(),
        FuseAttention(),
        FuseGelu(),
        FuseLinear(),
        FoldScale(),
        # nothing is computed that nobody reads
        CutSooner(),
    )
)
"""What says in ops what a graph means. Where it is split over a mesh, this comes before (docs/sharding.md)."""

MERGING = Pipeline(
    (
        # several ops as one, which a kernel computes at once
        FuseGatedLinear(),
        FuseActivatedLinear(),
        FuseEmbeddingSum(),
        FuseResidualNorm(),
        MergeProjections(),
        # what is left over
        CommonSubexpressions(),
        DeadCode(),
    )
)
"""What puts ops together that run as one."""

DEFAULT = Pipeline((*RECOGNITION, *MERGING))
"""For every graph and every backend."""
