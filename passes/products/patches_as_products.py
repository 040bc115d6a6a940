"""Convolutions over patches as products, so that passes on products with weights apply to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.builder import Builder
from treadle.ir.composites import inline
from treadle.ir.graph import Value
from treadle.ir.ops.convolution import Conv
from treadle.passes.framework.facts import BEFORE_LOWERING, FULL_PRECISION, Facts
from treadle.passes.framework.rewriting import Refusal, Rewriting, Site, SiteRewrite


@dataclass(frozen=True)
class PatchesAsProducts(SiteRewrite[Site]):
    """conv(x, w, bias)   -->   linear(rearrange(x), rearrange(w), bias), rearranged, if windows do not overlap

    Each window becomes a row of a matrix, as for the patches of ViT, DeiT, CLIP, SigLIP and DINOv2.

    Refuses: windows that overlap, whose elements would be copied several times; windows of one element; groups.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING | {FULL_PRECISION}

    def sites(self, work: Rewriting) -> Iterator[Site]:
        for node in work.walk():
            if not isinstance(node.op, Conv):
                continue
            weight = node.operands[1]
            assert weight is not None
            if node.op.takes_patches(weight.type.shape):
                yield Site(node)
            else:
                work.refuse(self.name, Refusal("its windows are not patches: they overlap, or have one element", node))

    def build(self, b: Builder, site: Site) -> Sequence[Value]:
        assert isinstance(site.root.op, Conv)
        return inline(b, site.root.op, site.root.operands, lowered=True)
