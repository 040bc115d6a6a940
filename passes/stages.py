"""The stages of a compilation: one table with their order, what each requires of a graph, and what it ensures.

    optimized = run(graph, arranged([Recognize(), MergeOps(), Precision("bf16")]))
    derived = run(optimized, [DeriveStep()]).product(DerivedStep)
    optimized.log                     # one record per pass, in a form that parses back

    stage      result                                                       docs
    recognize  ops that are written in primitives become ops                passes.md
    gradient   a loss and its gradients, as another graph                   training.md
    quantize   weights are stored in quantized form                         quantization.md
    shard      the program of one rank                                      sharding.md
    merge      several ops become one op, which one kernel computes         passes.md
    precision  products have operands of another dtype                      passes.md
    overlap    collectives that gather weights start early                  sharding.md
    step       entries that compute one token after another, over states    generation.md
    budget     a graph whose runs fit into a memory limit                   memory.md
    lower      the ops of a backend, and a place in memory for each value   adding-a-backend.md

Compilation, training, ranks and sessions select rows of this table; `arranged` puts them in order. A stage whose result
was lost is repeated: a gradient is written in primitives, so `recognize` follows it as well. If ranks share the work,
`precision` comes directly before `shard`, so that they communicate fewer bytes. An impossible order is refused before
anything runs.

A stage is either a list of passes, which the pass manager runs, or a transform that returns another graph. Backends add
passes of their own to `lower` by `StagedBackend.pipeline`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import Hint, PassError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.types import bf16
from treadle.ir.wording.named_values import value_hint
from treadle.passes.framework.facts import (
    FULL_PRECISION,
    LEGAL,
    PORTABLE,
    RECOGNIZED,
    STATELESS,
    UNLIMITED,
    UNMERGED,
    UNPLANNED,
    UNSHARDED,
    Facts,
    facts_after,
    initial_facts,
    refuse_misplaced,
)
from treadle.passes.framework.manager import Optimized, Pass, PassManager, hyphenated
from treadle.passes.pipelines import MERGING, RECOGNITION, Pipeline
from treadle.passes.products.narrow_attention import NarrowAttention
from treadle.passes.products.narrow_products import NarrowProducts
from treadle.passes.products.patches_as_products import PatchesAsProducts
from treadle.passes.quantization.planning import SCHEMES
from treadle.passes.quantization.quantize import QuantizeWeights
from treadle.passes.sharding.gather_ahead import GatherAhead

if TYPE_CHECKING:
    from treadle.ir.types import DType
    from treadle.passes.budget.fitted_pipeline import MemoryLimit, PlansMemory
    from treadle.passes.sharding.plan import ShardingPlan

COMPUTED = ("f32", "bf16")
"""The dtypes of `Precision`."""

QUANTIZED = tuple(SCHEMES)
"""The schemes of `Quantize`."""


@dataclass(frozen=True)
class CompileStage:
    """A row of the table. Its fields are its options."""

    row: ClassVar[str] = ""
    """The name, if it differs from the class's name in lower case."""

    advice: ClassVar[str] = ""
    """The hint if a pass in its place ended a fact that the stage requires: see `...facts.refuse_misplaced`."""

    requires: ClassVar[Facts] = frozenset()
    """Facts that must hold before the stage; see `treadle.passes.framework.facts`."""

    ensures: ClassVar[Facts] = frozenset()
    """Facts that hold after the stage."""

    ends: ClassVar[Facts] = frozenset()
    """Facts that no longer hold after the stage."""

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return self.row or hyphenated(type(self).__name__)


@dataclass(frozen=True)
class PassStage(CompileStage):
    """A stage that is a list of passes."""

    def passes(self) -> Sequence[Pass]:
        """Return the passes, in their order."""
        raise NotImplementedError

    def without(self, names: Collection[str]) -> Custom:
        """Return the stage without the passes of these names."""
        return Custom(tuple([each for each in self.passes() if each.name not in names]), of=self)


@dataclass(frozen=True)
class TransformStage(CompileStage):
    """A stage that returns another graph."""

    def transformed(self, graph: Graph) -> tuple[Graph, Mapping[type[Any], Any]]:
        """Return the graph after the stage, and what was made in addition to it, by type."""
        raise NotImplementedError


# -- the rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recognize(PassStage):
    """Replace groups of primitives by the ops that they compute, such as softmax or attention.

    differentiated  True if the graph will be differentiated: rewrites then keep its gradients
    """

    requires: ClassVar[Facts] = frozenset({PORTABLE, UNPLANNED})
    ensures: ClassVar[Facts] = frozenset({RECOGNIZED})
    differentiated: bool = False

    def passes(self) -> Sequence[Pass]:
        return RECOGNITION


@dataclass(frozen=True)
class Gradient(TransformStage):
    """The graph with the gradients of weights, which become inputs: see `treadle.ir.transforms.gradients`.

    loss       the output to differentiate, a scalar
    weights    names of the weights
    recompute  True if blocks save only their arguments, and are recomputed for their gradients
    """

    requires: ClassVar[Facts] = frozenset({RECOGNIZED, UNMERGED, UNSHARDED, FULL_PRECISION, STATELESS, PORTABLE})
    ends: ClassVar[Facts] = frozenset({RECOGNIZED})
    loss: str
    weights: tuple[str, ...]
    recompute: bool = False

    def transformed(self, graph: Graph) -> tuple[Graph, Mapping[type[Any], Any]]:
        from treadle.ir.transforms.gradients import gradient_graph

        return gradient_graph(graph, self.loss, self.weights, recompute=self.recompute), {}


@dataclass(frozen=True)
class Quantize(PassStage):
    """Store weights in quantized form. They are quantized before ranks split them, so the scales do not depend on the
    mesh.

    Raises UsageError for an unknown scheme.
    """

    requires: ClassVar[Facts] = frozenset({PORTABLE, FULL_PRECISION, UNSHARDED, UNPLANNED})
    scheme: str

    def passes(self) -> Sequence[Pass]:
        return (QuantizeWeights(self.scheme),)


@dataclass(frozen=True)
class Shard(TransformStage):
    """The program of one rank, by a plan for the recognized graph.

    plan  the plan over a mesh; rank: the number of the rank in it
    """

    requires: ClassVar[Facts] = frozenset({RECOGNIZED, UNMERGED, UNSHARDED, STATELESS, PORTABLE})
    ends: ClassVar[Facts] = frozenset({UNSHARDED})
    plan: ShardingPlan = field(repr=False)
    rank: int

    def transformed(self, graph: Graph) -> tuple[Graph, Mapping[type[Any], Any]]:
        from treadle.passes.sharding.rank_programs import rank_program

        if graph is not self.plan.graph:
            raise PassError("the plan is for another graph", received=repr(graph))
        return rank_program(self.plan, self.rank), {}


@dataclass(frozen=True)
class MergeOps(PassStage):
    """Merge several ops into one op, which one kernel computes."""

    row: ClassVar[str] = "merge"
    requires: ClassVar[Facts] = frozenset({RECOGNIZED, PORTABLE, UNPLANNED})
    ends: ClassVar[Facts] = frozenset({UNMERGED})

    def passes(self) -> Sequence[Pass]:
        return MERGING


@dataclass(frozen=True)
class Precision(PassStage):
    """Cast the operands of float32 products to another dtype.

    dtype     "f32": no casts. "bf16": products with weights and attention have bf16 operands and f32 sums
    computed  True if "bf16" applies to products of any two matrices: in training, weights are inputs, and gradients are
              computed matrices

    Raises UsageError for another dtype.
    """

    requires: ClassVar[Facts] = frozenset({PORTABLE, FULL_PRECISION, UNPLANNED})
    ends: ClassVar[Facts] = frozenset({FULL_PRECISION})
    dtype: str
    computed: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTED:
            hint = value_hint("dtype", self.dtype, COMPUTED, alone=self.computed)
            raise UsageError(f"unknown computation dtype {str(self.dtype)[:40]!r}", hint=hint)

    def passes(self) -> Sequence[Pass]:
        if self.dtype == "f32":
            return ()
        return (PatchesAsProducts(), NarrowProducts(bf16, computed=self.computed), NarrowAttention(bf16))


@dataclass(frozen=True)
class Overlap(PassStage):
    """Start collectives that gather weights before they are needed: the last pass of a rank's program."""

    requires: ClassVar[Facts] = frozenset({PORTABLE, UNPLANNED})

    def passes(self) -> Sequence[Pass]:
        return (GatherAhead(),)


@dataclass(frozen=True)
class DeriveStep(TransformStage):
    """Entries that compute one token after another, over states: see `treadle.passes.stepping.derivation`. The stage
    makes a `DerivedStep`.

    cache     the dtype in which caches store keys and values; None: the dtype in the model
    sampling  the tokens that are returned in place of logits; see `derive_step`
    """

    row: ClassVar[str] = "step"
    requires: ClassVar[Facts] = frozenset({STATELESS, UNLIMITED, PORTABLE})
    ends: ClassVar[Facts] = frozenset({STATELESS})
    cache: str | DType | None = None
    sampling: str | None = None

    def transformed(self, graph: Graph) -> tuple[Graph, Mapping[type[Any], Any]]:
        from treadle.passes.stepping.derivation import DerivedStep, derive_step

        derived = derive_step(graph, cache=self.cache, sampling=self.sampling)
        return derived.graph, {DerivedStep: derived}


@dataclass(frozen=True)
class Budget(TransformStage):
    """A graph whose runs fit into a memory limit after `lower`: see `treadle.passes.budget.fitted_pipeline`. The stage
    makes a `MemoryFit`.

    limit    the limit, and the sizes up to which it holds
    backend  the backend that the graph is lowered for; target: the hardware
    donated  inputs of the last entry that callers donate
    """

    requires: ClassVar[Facts] = frozenset({STATELESS, UNLIMITED, PORTABLE, UNPLANNED})
    ends: ClassVar[Facts] = frozenset({UNLIMITED})
    limit: MemoryLimit
    backend: PlansMemory = field(repr=False)
    target: Target
    donated: tuple[str, ...] = ()

    def transformed(self, graph: Graph) -> tuple[Graph, Mapping[type[Any], Any]]:
        from treadle.passes.budget.fitted_pipeline import fit_within
        from treadle.passes.budget.memory_fit import MemoryFit

        chosen, fit = fit_within(self.backend, graph, self.target, self.limit, self.donated)
        return chosen, {MemoryFit: fit}


@dataclass(frozen=True)
class Lower(PassStage):
    """The passes of a backend: see `StagedBackend.pipeline`."""

    advice: ClassVar[str] = "a pipeline without {}: the backend's passes follow by themselves"
    requires: ClassVar[Facts] = frozenset({PORTABLE, UNPLANNED})
    ensures: ClassVar[Facts] = frozenset({LEGAL})
    ends: ClassVar[Facts] = frozenset({PORTABLE})
    pipeline: tuple[Pass, ...]

    def passes(self) -> Sequence[Pass]:
        return self.pipeline


@dataclass(frozen=True)
class Custom(PassStage):
    """A user's passes, in place of the stages `recognize` and `merge`, or of one stage.

    pipeline  the passes
    of        the stage that they replace; None: both
    """

    requires: ClassVar[Facts] = frozenset({PORTABLE, UNPLANNED})
    ensures: ClassVar[Facts] = frozenset({RECOGNIZED})
    pipeline: tuple[Pass, ...]
    of: PassStage | None = None

    def passes(self) -> Sequence[Pass]:
        return self.pipeline

    def without(self, names: Collection[str]) -> Custom:
        return replace(super().without(names), of=self.of)


STAGES: tuple[type[CompileStage], ...] = (
    Recognize,
    Gradient,
    Quantize,
    Shard,
    MergeOps,
    Precision,
    Overlap,
    DeriveStep,
    Budget,
    Lower,
)
"""The stages in their order."""


# -- pipelines of stages -----------------------------------------------------------------------------------------------


def arranged(stages: Iterable[CompileStage], facts: Facts) -> tuple[CompileStage, ...]:
    """Return stages in the order of the table. A stage is repeated before another one that requires a fact which a
    stage between them ended.

    facts  the facts that hold for the graph before the first stage

    Raises UsageError for a requirement that no order fulfils.
    """
    chosen = list(stages)
    sharded = any(isinstance(each, Shard) for each in chosen)
    ordered = sorted(chosen, key=lambda each: _position(each, sharded))
    made: list[CompileStage] = []
    held = facts
    for stage in ordered:
        for fact in sorted(stage.requires - held, key=str):
            again = next((each for each in made if fact in each.ensures), None)
            if again is not None:
                made.append(again)
                held = (held - _ends(again)) | again.ensures
        made.append(stage)
        held = (held - _ends(stage)) | stage.ensures
    check_order(made, facts)
    return tuple(made)


def check_order(stages: Sequence[CompileStage], facts: Facts) -> Facts:
    """Return the facts that hold after stages in this order. Raises UsageError for a stage, or a pass of one, that
    stands where its requirement does not hold.
    """
    for at, stage in enumerate(stages):
        before = [each for one in stages[:at] for each in (one.pipeline if isinstance(one, Custom) else [one])]
        refuse_misplaced(stage, facts, before, [*stages[at + 1 :], *_SUGGESTED])
        inside = facts_after(stage.passes(), facts) if isinstance(stage, PassStage) else facts
        facts = (inside - stage.ends) | stage.ensures
    return facts


def rows_before(kind: type[CompileStage], stages: Iterable[CompileStage]) -> tuple[CompileStage, ...]:
    """Return the stages that stand before a row of the table."""
    return tuple([each for each in stages if _position(each, kind is Shard) < STAGES.index(kind)])


def passes_of(stages: Iterable[CompileStage]) -> Pipeline:
    """Return the passes of the stages that are lists of passes."""
    return Pipeline(made for each in stages if isinstance(each, PassStage) for made in each.passes())


def left_out(stages: Sequence[CompileStage], names: Sequence[str]) -> tuple[CompileStage, ...]:
    """Return the stages without the passes of these names. Raises UsageError for a name that is not in them."""
    from treadle.passes.framework.pass_text import pass_classes

    known = [each.name for each in passes_of(stages)]
    for name in names:
        if name not in known:
            near = NearestNames(known).of(name)
            others = "one of " + ", ".join(dict.fromkeys(known)) if known else Hint("without=()", "leave out --without")
            if name in pass_classes():
                raise UsageError(f"{name} is not a pass of these stages, and backends need their own", hint=others)
            raise UsageError(f"the pipeline has no pass {printable(name)!r}", hint=f"{near[0]}?" if near else others)
    if not names:
        return tuple(stages)
    return tuple([each.without(names) if isinstance(each, PassStage) else each for each in stages])


def run(
    start: Graph | Optimized,
    stages: Sequence[CompileStage],
    *,
    certify: bool | None = None,
    target: Target | None = None,
    verified: bool = False,
    facts: Facts | None = None,
) -> Optimized:
    """Run stages in this order on a graph, or on the result of other stages. Return the result, with the log since the
    last transform.

    certify, target  as in `treadle.passes.framework.manager.PassManager`
    verified  True if a pass manager has just verified the graph
    facts     the facts that hold for the graph; None: the facts of the earlier stages, or facts that the graph shows

    Raises UsageError, before anything runs, for an order that is not possible, and as passes and transforms do.
    """
    graph = start if isinstance(start, Graph) else start.graph
    held = facts or (initial_facts(graph) if isinstance(start, Graph) else start.facts)
    check_order(stages, held)
    made: Optimized | None = None
    products: dict[type[Any], Any] = {}
    for is_passes, group in groupby(stages, lambda each: isinstance(each, PassStage)):
        each = list(group)
        if is_passes:
            manager = PassManager(
                passes_of(each),
                certify=certify,
                target=target,
                differentiated=any(isinstance(one, Recognize) and one.differentiated for one in each),
            )
            made = manager.run(graph, verified=verified, facts=held)
            graph = made.graph
        else:
            for transform in each:
                assert isinstance(transform, TransformStage)
                graph, found = transform.transformed(graph)
                products |= found
            made = None
        verified = is_passes
        held = check_order(each, held)  # has been checked, so nothing is refused
        for fact in sorted(held, key=str):
            if (reason := fact.refutes(graph)) is not None:
                raise PassError(f"after {each[-1].name}, the graph is not {fact}", received=reason)
    if made is None:
        made = PassManager((), certify=certify, target=target).run(graph, facts=held)
    return replace(made, products={**products, **made.products}, facts=held)


def _ends(stage: CompileStage) -> Facts:
    passes = stage.passes() if isinstance(stage, PassStage) else ()
    return stage.ends.union(*[each.ends for each in passes])


def _position(stage: CompileStage, sharded: bool) -> float:
    """Return the stage's position in the table. A user's passes stand where the stage stands that they replace.

    sharded  True if ranks share the work: `precision` then comes directly before `shard`
    """
    kind = type(stage)
    if isinstance(stage, Custom):
        kind = MergeOps if stage.of is None else type(stage.of)
    return STAGES.index(Shard) - 0.5 if sharded and kind is Precision else STAGES.index(kind)


_SUGGESTED = (Recognize(), MergeOps())
