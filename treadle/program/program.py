"""A program: a model with its options, its graph, and what was done to the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from treadle.ir.errors import UsageError
from treadle.program.options import CompileOptions
from treadle.program.pickling import state_without_caches

if TYPE_CHECKING:
    from treadle.ir.graph import Graph
    from treadle.passes.framework.manager import Optimized
    from treadle.passes.framework.pass_log import PassLog
    from treadle.passes.stages import CompileStage
    from treadle.program.source import AnyModel, ModelSource, Resolved


@dataclass(frozen=True)
class Program:
    """A model and its options; after `declared`, its graph and weights; after `through`, the graph after stages, with
    the log. Each method returns another program.

        program = Program.of("folder", backend="tvm", dtype="bf16")     # the argument of every task's `open`
        program.optimize().graph

    model  a folder, a GGUF file, a fetched model's name, a declaration, or an opened model
    """

    model: AnyModel
    options: CompileOptions
    _resolved: Resolved | None = field(default=None, repr=False)
    _optimized: Optimized | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: AnyModel, entry: str = "load", /, **options: Any) -> Program:
        """Return a model with options of an entry function. Raises UsageError as `CompileOptions.of` does."""
        return cls(model, CompileOptions.of(entry, options))

    def __getstate__(self) -> dict[str, Any]:
        return state_without_caches(self)

    @cached_property
    def source(self) -> ModelSource:
        """The model, found at the first use. Raises UsageError if there is none."""
        return self.options.open(self.model)

    def but(self, **changes: Any) -> Program:
        """Return the same model with other options."""
        return Program(self.source, self.options.but(**changes))

    # -- the graph ---------------------------------------------------------------------------------------------

    def declared(self, *, deferred: bool = False, **config: Any) -> Program:
        """Return the program with the graph as declared.

        deferred  True if weights of a file are converted only when a part of them is read
        config    configuration in addition to the options' own

        Raises as `CompileOptions.resolve` does.
        """
        resolved = self.options.resolve(self.model, deferred=deferred, **config)
        return replace(self, _resolved=resolved, _optimized=None)

    def for_ranks(self) -> Program:
        """Return the program with one product for each slice of a product, such as a joined query, key and value: see
        `treadle.passes.sharding.divided_products`. Raises UsageError before `declared`.
        """
        resolved, options = self.resolved.for_ranks(), self.options
        if resolved.divided is not None and options.arrays is not None:
            options = options.but(weights=resolved.divided.of(options.arrays))
        return replace(self, options=options, _resolved=resolved)

    def through(self, *stages: CompileStage) -> Program:
        """Return the program after these stages. Raises as `treadle.passes.stages.run` does."""
        from treadle.passes.framework.pass_log import PassLog, PassRecord, count_ops
        from treadle.passes.stages import run

        made = run(self._optimized or self.graph, stages, certify=self.options.certify, target=self.options.where)
        if self._optimized is None and self.resolved.notes:
            ops = count_ops(self.graph)
            record = PassRecord("read-weights", "", ops, ops, notes=list(self.resolved.notes), graph=self.graph)
            made = replace(made, log=PassLog([record, *made.log]))
        return replace(self, _optimized=made)

    def optimize(self, *, before: type[CompileStage] | None = None, deferred: bool = False) -> Program:
        """Return the program as declared, after all stages of its options, or those before a row of the table.

        Raises as `CompileOptions.stages`, `declared` and `through` do.
        """
        from treadle.passes.stages import rows_before

        stages = self.options.stages()
        return self.declared(deferred=deferred).through(*(stages if before is None else rows_before(before, stages)))

    @property
    def graph(self) -> Graph:
        """The graph after the stages so far. Raises UsageError before `declared`."""
        return self.resolved.graph if self._optimized is None else self._optimized.graph

    @property
    def log(self) -> PassLog:
        """The log of the stages since the last transform; empty if there were none."""
        from treadle.passes.framework.pass_log import PassLog

        return PassLog(()) if self._optimized is None else self._optimized.log

    def weights(self) -> tuple[Mapping[str, Any], int | None]:
        """Return the weights of the graph by name, and the seed of drawn ones; see `weights_of`, whose errors it
        raises.
        """
        from treadle.program.weights import weights_of

        return weights_of(self.resolved, self.graph, self.options.arrays, self.options.seed)

    @property
    def resolved(self) -> Resolved:
        """The model as it was read: its graph, its weights (not yet read), and where they came from. Raises UsageError
        before `declared`.
        """
        if self._resolved is None:
            raise UsageError("the model has not been read", hint="program.declared()")
        return self._resolved

    @property
    def optimized(self) -> Optimized:
        """The graph after stages, with the log and what passes made. Raises UsageError before `through`."""
        if self._optimized is None:
            raise UsageError("no stage has run", hint="program.optimize()")
        return self._optimized
