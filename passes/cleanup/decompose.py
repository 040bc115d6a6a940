"""Decompose: replace fused ops by their bodies, the reverse of the passes that fuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder
from treadle.ir.composites import inline
from treadle.ir.errors import UsageError
from treadle.ir.graph import Value
from treadle.ir.op_registry import find_op
from treadle.ir.operation import Composite
from treadle.passes.framework.facts import BEFORE_LOWERING, Facts
from treadle.passes.framework.rewriting import Rewriting, Site, SiteRewrite

FUSED = (
    *("attention", "rotary", "softmax", "layer_norm", "rms_norm", "gelu", "gelu_tanh", "silu", "quick_gelu"),
    *("activated_linear", "gated_linear"),
    *("add_layer_norm", "add_rms_norm", "embedding_sum"),
    *("attention_with_probabilities", "projections"),
)
"""The composites that passes of the default pipeline build."""


@dataclass(frozen=True)
class Decompose(SiteRewrite[Site]):
    """attention(q, k, v), layer_norm(x, w), ...   -->   their bodies

    ops    the composites to decompose, also if they occur in the body of another composite

    The fusing passes of the default pipeline undo this pass. Raises UsageError for an op without a body.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING

    ops: tuple[str, ...] = FUSED

    def __post_init__(self) -> None:
        for name in self.ops:
            if not issubclass(find_op(name), Composite):
                raise UsageError(f"{name} has no body, so it cannot be decomposed", hint="one of " + ", ".join(FUSED))

    def sites(self, work: Rewriting) -> Iterator[Site]:
        """Yield every node of one of these composites, also if it is in the body of another one."""
        for node in work.walk(into=True):
            if node.op.name in self.ops:
                yield Site(node)

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        assert isinstance(site.root.op, Composite)
        return inline(b, site.root.op, site.root.operands)
