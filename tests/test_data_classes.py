"""Data of the IR and of passes: nearly all of it never changes and is compared by content; what else there is."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import pytest

import treadle.ir
import treadle.passes
from treadle.ir.op_registry import op
from treadle.ir.source_lines import SourceLine


def _dataclasses() -> dict[str, Any]:
    found = {}
    for package in (treadle.ir, treadle.passes):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for each in vars(importlib.import_module(module.name)).values():
                own = isinstance(each, type) and each.__module__ == module.name
                if own and "__dataclass_params__" in vars(each):
                    found[f"{module.name.removeprefix('treadle.')}.{each.__qualname__}"] = each
    return found


def _fields(flag: str) -> set[str]:
    """The fields, each with its class, that say so."""
    return {
        f"{each.__name__}.{field.name}"
        for each in _dataclasses().values()
        for field in dataclasses.fields(each)
        if not getattr(field, flag) and field.name in vars(each).get("__annotations__", {})
    }


def _names(holds: Any) -> set[str]:
    return {each.__name__ for each in _dataclasses().values() if holds(each)}


CHANGING = """
    _Cut _Group _Origin _Product _Readers _Repetition _Tree ChainTerms PassRecord Reading Recorded RepeatedRegion
"""
"""What is filled in while something is looked for."""

THEMSELVES = """
    _Attention _Counting _Merged _Refined _Residual _Sum _Turned ChainStep ConstantTerm CutRegion EitherTerm Frame
    FunctionPlan FusionSite Host Hosting OpTerm Part Parted PlacedFrame RotaryTerm RotaryView Site Step StepCost Storage
    StoragePlan Table Variant Wildcard
"""
"""What is only equal to itself: two storages, or two places in a graph, may be alike."""

MANY = """
    Attribute AxisDim AxisFactor Bounds Cost Edge Event Factor Found Init LeadingDims Miss Operand OptionalType Place
    Quotient Range Share SourceLine Split SubAxis TermOperand
"""
"""Of which there are many, without a dictionary each."""

NOT_COMPARED = """
    Chunk.axis Chunk.source Chunk.told Event.given Event.made Factor.label Optimized.left Optimized.lowered
    Optimized.plan PassRecord.certifying PassRecord.lineage PassRecord.rules PassRecord.shown PassRecord.target
    PassRecord.touched Placement.seconds RearrangeForm.given RearrangeForm.names RearrangeForm.sizes
"""

NOT_SHOWN = """
    AssignLayouts.wants Event.given Event.made FitMemory.fit HoistWeights.reads_blocks Legalize.keeps Literal.data
    MultiplyBlocks.takes Optimized.left Optimized.log Optimized.lowered Optimized.plan PassRecord.certifying
    PassRecord.lineage PassRecord.rules PassRecord.shown PassRecord.target PassRecord.touched PipelineTimes.turns
    PlanStorage.grouped PlanStorage.over PlanStorage.parts PlanStorage.placed PlanStorage.workspaces
    ReadBlocks.multiplies ReadBlocks.wants ShardingPlan.graph
"""


def test_what_can_change() -> None:
    assert _names(lambda each: not each.__dataclass_params__.frozen) == {*CHANGING.split()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        SourceLine("a.py", 1).line = 2  # type: ignore[misc]


def test_type_checkers_are_told_the_same_of_ops() -> None:
    told = op.__dataclass_transform__  # type: ignore[attr-defined]
    assert told["kw_only_default"] and told["kwargs"] == {"frozen_default": True}


def test_what_is_compared_by_identity() -> None:
    assert _names(lambda each: not each.__dataclass_params__.eq) == {*THEMSELVES.split()}


def test_what_there_is_much_of() -> None:
    assert _names(lambda each: "__slots__" in vars(each)) == {*MANY.split()}


def test_fields_that_take_no_part() -> None:
    assert _fields("compare") == {*NOT_COMPARED.split()}
    assert _fields("repr") == {*NOT_SHOWN.split()}
