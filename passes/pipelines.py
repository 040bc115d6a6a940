"""Pipelines: flat lists of passes, each of which reads as a table of contents of a compilation."""

from __future__ import annotations

from treadle.passes.cleanup.canonicalize import Canonicalize
from treadle.passes.cleanup.common_subexpressions import CommonSubexpressions
from treadle.passes.cleanup.cut_sooner import CutSooner
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.cleanup.fold_constants import FoldConstants
from treadle.passes.framework.manager import Pass
from treadle.passes.fusion.attention.drop_roundings import DropRoundings
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
from treadle.passes.products.points_as_products import PointsAsProducts
from treadle.passes.products.split_products import SplitProducts


class Pipeline(tuple[Pass, ...]):
    """A flat list of passes. Its repr contains only the number of passes, since it is a default in signatures."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<pipeline of {len(self)} passes>"


RECOGNITION = Pipeline(
    (
        # normalize: one form for equal expressions, no duplicate work, and no unused nodes, which would prevent fusion
        FoldConstants(),
        Canonicalize(),
        CommonSubexpressions(),
        DeadCode(),
        # recognize functions written in primitives
        PointsAsProducts(),
        FuseNormalization(),
        FuseSoftmax(),
        FuseRotary(),
        RefineAttention(),
        DropRoundings(),
        FuseAttention(),
        FuseGelu(),
        SplitProducts(),
        FuseLinear(),
        FoldScale(),
        # compute only elements that are read
        CutSooner(),
    )
)
"""Passes that recognize ops in a graph. If the graph is sharded over a mesh, they run before sharding
(docs/sharding.md).
"""

MERGING = Pipeline(
    (
        # merge several ops into one op, which one kernel computes
        FuseGatedLinear(),
        FuseActivatedLinear(),
        FuseEmbeddingSum(),
        FuseResidualNorm(),
        MergeProjections(),
        # clean up
        CommonSubexpressions(),
        DeadCode(),
    )
)
"""Passes that merge ops that run as one."""

DEFAULT = Pipeline((*RECOGNITION, *MERGING))
"""The default pipeline, for every graph and every backend."""
