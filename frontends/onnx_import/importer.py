"""ONNX files as graphs: every node becomes IR ops, or the import is refused with the node's name.

    graph, weights, notes = import_onnx("model.onnx")

Axes that the file names (dim_param) become symbols. Shape arithmetic is evaluated at import. If it needs the values of
an input, that input is a static argument, passed as `static={"k": 3}`. Weights become parameters under their names in
the file. They are views of the file if they are stored outside the ModelProto.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import treadle.frontends.onnx_import.rules.tables  # noqa: F401  (registers the operators)
from treadle.files.contained_files import PathLike
from treadle.files.limits import MORE, limit_hint
from treadle.files.shown_names import printable
from treadle.frontends.onnx_import.declared_axes import DeclaredAxes
from treadle.frontends.onnx_import.errors import UnsupportedOnnx
from treadle.frontends.onnx_import.file import Limits, OnnxFile, StoredTensor, captured, describe, live_nodes
from treadle.frontends.onnx_import.folding import evaluated
from treadle.frontends.onnx_import.inputs import declare_inputs
from treadle.frontends.onnx_import.notes import Imported, ImportNotes
from treadle.frontends.onnx_import.operators import OPERATORS, Decomposed, OnnxSite, Operator, unsupported
from treadle.frontends.onnx_import.results import as_known, is_small, keep_weights
from treadle.frontends.onnx_import.rules.elements import Element, carried, element
from treadle.frontends.onnx_import.scopes import Scope, domain_of, path_of
from treadle.frontends.onnx_import.specification import function_body, output_elements, schema_of, with_attributes
from treadle.frontends.onnx_import.values import Array, Known
from treadle.ir.builder import Builder, Expr
from treadle.ir.collector_pause import collection_paused
from treadle.ir.errors import FrontendError, Hint, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.naming import free_name
from treadle.ir.source_lines import SourceLine
from treadle.ir.types import Type

if TYPE_CHECKING:
    import onnx


_SAME_AXES = Hint(
    "names of axes that are equal, or their sizes: dims={...} of import_onnx, NAME=VALUE of compile",
    "--set NAME=VALUE, which replaces the name of an axis by another axis's name, or by a size",
)


def import_onnx(
    model: PathLike | onnx.ModelProto,
    *,
    static: Mapping[str, Any] | None = None,
    dims: Mapping[str, str | int] | None = None,
    bf16_in_f32: bool = False,
    folder: PathLike | None = None,
    limits: Limits = None,
) -> Imported:
    """Import a file, or a model in memory.

    static       values of inputs that determine shapes, axes or bounds; these are not inputs of the graph
    dims         for names of axes, a size, or another name if two axes are equal
    bf16_in_f32  carry bfloat16 in f32 and round every result, for backends without bfloat16
    folder       the folder of external data, for a model in memory
    limits       limits on the file's contents: `OnnxLimits`, or the limits that differ, by name

    Raises UnsupportedOnnx (with the operator, the node and the version) for an unsupported node, StaticArgumentNeeded
    for an input that must be static, FrontendError for a file that is damaged or breaks the specification,
    CheckpointError if it cannot be read.
    """
    file = OnnxFile.open(model, limits, folder)
    return import_opened(file, static=static, dims=dims, bf16_in_f32=bf16_in_f32)


def import_opened(
    file: OnnxFile,
    *,
    static: Mapping[str, Any] | None = None,
    dims: Mapping[str, str | int] | None = None,
    bf16_in_f32: bool = False,
) -> Imported:
    """Import an open file as `import_onnx` does. The file can be imported again with other values."""
    with collection_paused():
        try:
            return Importer(file, dict(static or {}), dict(dims or {}), bf16_in_f32).run()
        except RecursionError:
            raise FrontendError("the model nests too deep", within=file.shown) from None


def declared_inputs(
    file: OnnxFile, *, static: Mapping[str, Any] | None = None, dims: Mapping[str, str | int] | None = None
) -> Graph:
    """Return a graph without nodes that has the inputs an import would declare, including inputs that determine
    shapes.
    """
    importer = Importer(file, dict(static or {}), dict(dims or {}), False)
    importer.declare()
    return importer.graph


class Importer:
    """The state of one import."""

    def __init__(self, file: OnnxFile, static: dict[str, Any], dims: Mapping[str, Any], bf16_in_f32: bool) -> None:
        self.file, self.static, self.bf16_in_f32 = file, static, bf16_in_f32
        name = re.sub(r"\W+", "_", file.proto.graph.name or "", flags=re.ASCII).strip("_")
        self.graph = Graph(name or "onnx")
        self.b = Builder(self.graph)
        self.notes = ImportNotes(file.opsets, f"{file.proto.producer_name} {file.proto.producer_version}".strip()[:80])
        self.axes = DeclaredAxes(dims, file.shown, self.notes.symbols, self.graph.symbols)
        self.functions = {(f.domain if f.domain != "ai.onnx" else "", f.name): f for f in file.proto.functions}
        self.stored: dict[str, Known] = {}
        self.computed: dict[str, Callable[[], Array]] = {}
        """Weights that are computed from several tensors of the file, by name."""
        self.dequantized: dict[tuple[Any, ...], Any] = {}
        """Dequantized constants, and scales and zero points as weights, by the tensors that they are computed from."""
        self.unread: dict[str, str] = {}
        self.nodes = 0

    # -- the main graph ----------------------------------------------------------------------------------------

    def run(self) -> Imported:
        proto = self.file.proto.graph
        scope = self.declare()
        names = [v.name for v in proto.output]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise FrontendError(f"two outputs are named {printable(repeated[0])}", within=self.file.shown)
        self._run_nodes(proto.node, names, scope)
        outputs: dict[str, Expr] = {}
        for declared in proto.output:
            value = scope.find(declared.name)
            if value is None:
                raise FrontendError(f"no node computes the output {printable(declared.name)}", within=self.file.shown)
            outputs[declared.name] = value.expr(self.b)  # a node that breaks its specification is reported first
            declared_type = declared.type.tensor_type.elem_type
            if declared_type and declared_type != value.type.number:
                raise FrontendError(
                    f"the type of output {printable(declared.name)} differs from its declaration",
                    received=f"{value.type}, declared {declared_type}",
                    within=self.file.shown,
                )
            self.notes.outputs[declared.name] = value.type
        self.b.outputs(**outputs)
        weights = {}
        for name in self.graph.parameters:
            if name in self.computed:
                weights[name] = self.computed[name]()
                continue
            stored = self.stored[name].stored
            assert stored is not None
            weights[name] = stored.array()
        return Imported(self.graph, weights, self.notes)

    def declare(self) -> Scope:
        """Return the initial names of the main graph: weights and inputs."""
        self._check_opset(self.file.opsets)
        scope = Scope({}, self.file.opsets)
        self._initializers(self.file.proto.graph, scope)
        declare_inputs(self, self.file.proto.graph, scope)
        return scope

    def _check_opset(self, opsets: Mapping[str, int]) -> None:
        import onnx

        version, newest = opsets.get(""), onnx.defs.onnx_opset_version()
        if version is not None and not 1 <= version <= newest:
            raise UnsupportedOnnx(
                f"opset {version} is not supported",
                received=f"opsets to {newest}, with onnx {onnx.__version__}",
                within=self.file.shown,
                hint="install a newer onnx package",
            )

    def _initializers(self, proto: Any, scope: Scope) -> None:
        if proto.sparse_initializer:
            raise UnsupportedOnnx("sparse tensors are not supported", within=self.file.shown)
        held = self.file.held if scope.depth == 0 else {}
        for tensor in proto.initializer:
            if tensor.name in scope.values:
                raise FrontendError(f"two tensors are named {printable(tensor.name)}", within=self.file.shown)
            try:
                self.element(tensor.data_type)
            except UnsupportedOnnx as error:  # the error matters only if a node uses the tensor
                self.unread[tensor.name] = error.what
                continue
            scope.values[tensor.name] = self.tensor(tensor, tensor.name, scope, held.get(tensor.name))

    def tensor(self, proto: Any, name: str, scope: Scope, held: Array | None = None) -> Known:
        """Return a tensor of the file, under a unique weight name. `held` is its array, if it has already been read."""
        stored = self.file.tensor(proto, name, bf16_in_f32=self.bf16_in_f32, array=held)
        unique = self._weight_name(f"{scope.path}.{name}" if scope.path else name)
        made = self.stored[unique] = Known(stored.type, stored=stored, name=unique)
        return made

    def _weight_name(self, base: str) -> str:
        """Return the name, or a similar one that no other weight has."""
        return free_name(base, {*self.stored, *self.computed})

    def computed_weight(self, name: str, type: Type, read: Callable[[], Array]) -> Expr:
        """Return a weight that is computed from tensors of the file. `read` returns its elements, or its blocks."""
        unique = self._weight_name(name)
        self.computed[unique] = read
        return self.b.parameter(unique, type)

    def computed_tensor(self, name: str, numbers: Array, kind: Element) -> Known:
        """Return numbers that are computed from tensors of the file, as if the file had them."""
        unique = self._weight_name(name)
        tensor = StoredTensor(unique, kind, numbers.shape, None, self.file, carried(kind, numbers))
        made = self.stored[unique] = Known(kind, stored=tensor, name=unique)
        return made

    def summed_axis(self, name: str) -> int:
        """Return the axis over which the reader of a matrix sums; 1 if no node multiplies the matrix."""
        return self._summed.get(name, 1)

    @cached_property
    def _summed(self) -> dict[str, int]:
        """The summed axis of each right operand of a MatMul or Gemm of the main graph."""
        return {
            node.input[1]: int(any(a.name == "transB" and a.i for a in node.attribute))
            for node in self.file.proto.graph.node
            if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1
        }

    def element(self, number: int) -> Element:
        """Return the element type with this number in TensorProto.DataType."""
        return element(number, bf16_in_f32=self.bf16_in_f32)

    # -- nodes -------------------------------------------------------------------------------------------------

    def _run_nodes(self, nodes: Any, outputs: Sequence[str], scope: Scope) -> None:
        if scope.depth > self.file.limits.nesting:
            raise FrontendError("functions and branches nest too deep", within=self.file.shown)
        live = live_nodes(nodes, outputs, self.file.limits.nesting)
        if scope.depth == 0:
            object.__setattr__(self.notes, "dead", len(nodes) - len(live))
        used = {name for _, node in live for name in captured(node, self.file.limits.nesting)} | set(outputs)
        for index, node in live:
            self.nodes += 1
            if self.nodes > self.file.limits.nodes:
                raise FrontendError(
                    "the model has more nodes than the limit",
                    received=f"limit {self.file.limits.nodes}, functions inlined",
                    hint=limit_hint("nodes", MORE * self.file.limits.nodes),
                )
            wanted = [bool(name) and name in used for name in node.output]
            results = self._node(node, index, scope, wanted)
            for name, value, needed in zip(node.output, results, wanted, strict=False):
                if value is not None and name:
                    if name in scope.values:
                        raise FrontendError(
                            f"two values are named {printable(name)}", within=self._where(node, index, scope)
                        )
                    scope.values[name] = value
                elif needed:
                    raise FrontendError(
                        f"no node computes the output {printable(name)}", within=self._where(node, index, scope)
                    )

    def _where(self, node: Any, index: int, scope: Scope) -> str:
        opset = scope.opsets.get(domain_of(node))
        inside = f", in {printable(scope.path)}" if scope.depth else ""
        return f"{describe(node, index)}, opset {opset}{inside}, {self.file.shown}"

    def _node(self, node: Any, index: int, scope: Scope, wanted: Sequence[bool]) -> list[Known | None]:
        where = self._where(node, index, scope)
        try:
            return self._import(node, index, scope, wanted, where)
        except FrontendError as error:
            error.within = error.within or where
            raise
        except TreadleError as error:
            hint = error.hint
            if any(words in error.what for words in ("disagree", "elements, the shape", "it must be 1")):
                hint = _SAME_AXES
            received = error.received
            raise FrontendError(error.what, received=received, within=where, hint=hint) from error
        except RecursionError:
            raise
        except Exception as error:  # a damaged node may raise any error in a handler; callers get a typed one
            raise FrontendError(
                f"{printable(node.op_type)} cannot be read",
                received=f"{type(error).__name__}: {error}"[:200],
                within=where,
            ) from error

    def _import(self, node: Any, index: int, scope: Scope, wanted: Sequence[bool], where: str) -> list[Known | None]:
        inputs: list[Known | None] = []
        for name in node.input:
            value = scope.find(name) if name else None
            if name in self.unread and value is None:
                raise unsupported(node, None, where, f"{printable(name)}: {self.unread[name]}")
            if name and value is None:
                raise FrontendError(f"no node computes the value {printable(name)}", within=where)
            inputs.append(value)
        domain = domain_of(node)
        function = self.functions.get((domain, node.op_type))
        label = f"{domain}.{node.op_type}" if domain else node.op_type
        self.notes.operators[label] += 1
        self.b.scope = path_of(node, index, scope)
        line = index + 1 if scope.line is None else scope.line
        self.b.source = SourceLine(self.file.shown, line)
        if function is not None:
            return self._call(function, node, inputs, scope, line)
        version, schema = self._version(node, domain, scope, where)
        if domain == "" and node.op_type == "If":
            return self._branch(node, inputs, scope, line, where)
        found = OPERATORS.get((domain, node.op_type))
        if found is not None and found.first <= version <= found.latest:
            try:
                return self._handle(found, node, version, schema, inputs, wanted, where, scope)
            except Decomposed:
                pass
        body = function_body(schema, node, scope.opsets.get(domain, 1), inputs)
        if body is None:
            if found is None:
                raise unsupported(node, version, where, f"the operator (version {version}) is not supported")
            why = f"version {version} of the operator is not supported, or not in this case"
            raise unsupported(node, version, where, why)
        defaults = [a.default_value for a in schema.attributes.values() if a.default_value.name]
        return self._call(body, node, inputs, scope, line, defaults)

    def _version(self, node: Any, domain: str, scope: Scope, where: str) -> tuple[int, Any]:
        opset = scope.opsets.get(domain)
        if opset is None and domain == "" and (domain, node.op_type) not in OPERATORS:
            raise FrontendError("the model imports no opset of ONNX's own domain", within=where)
        schema = schema_of(node.op_type, opset or 1, domain)
        if schema is None:
            if (domain, node.op_type) in OPERATORS and OPERATORS[domain, node.op_type].latest == 1:
                return 1, None
            raise unsupported(node, None, where, "there is no such operator in this opset") from None
        if len(node.input) > schema.max_input or len(node.output) > schema.max_output:
            raise FrontendError("a node has more inputs or outputs than its operator allows", within=where)
        if len(node.input) < schema.min_input:
            raise FrontendError("a node has fewer inputs than its operator requires", within=where)
        return schema.since_version, schema

    def _handle(
        self,
        found: Operator,
        node: Any,
        version: int,
        schema: Any,
        inputs: list[Known | None],
        wanted: Sequence[bool],
        where: str,
        scope: Scope,
    ) -> list[Known | None]:
        kinds = output_elements(schema, node, inputs)

        def run(given: Sequence[Known | None], b: Builder) -> list[Known | None]:
            site = OnnxSite(self, b, node, version, given, where, wanted, scope)
            made = found.handler(site)
            results = list(made) if isinstance(made, list | tuple) else [made]
            if unread := site.unread():
                raise unsupported(node, version, where, f"attribute {printable(unread[0])} is not supported")
            return [as_known(b, x, kind, found) for x, kind in zip(results, kinds, strict=False)]

        site = OnnxSite(self, self.b, node, version, inputs, where, wanted, scope)
        weighs = found.weighs is not None and found.weighs(site)
        results = None if weighs else evaluated(site, found, kinds, run)
        if results is not None:
            self.notes.folded[node.op_type] += 1
            keep_weights(self.b, found, inputs, results, run)
            return results
        results = run(inputs, self.b)
        roots = frozenset().union(*(v.roots for v in inputs if v is not None))
        for value in results:
            if value is not None and roots and not value.roots and is_small(value):
                value.roots = roots
        return results

    # -- functions and branches --------------------------------------------------------------------------------

    def _call(
        self,
        function: Any,
        node: Any,
        inputs: Sequence[Known | None],
        scope: Scope,
        line: int,
        defaults: Sequence[Any] = (),
    ) -> list[Known | None]:
        """Inline a function's body. `defaults`, for attributes that the call omits, come from the function's
        specification.
        """
        opsets = dict(self.file.opsets)
        opsets.update({"" if o.domain == "ai.onnx" else o.domain: o.version for o in function.opset_import})
        self._check_opset(opsets)
        inner = Scope({}, opsets, path=self.b.scope, depth=scope.depth + 1, line=line)
        if len(inputs) > len(function.input):
            raise FrontendError(f"function {printable(function.name)} takes {len(function.input)} inputs")
        inner.values = {name: v for name, v in zip(function.input, inputs, strict=False) if v is not None}
        inner.absent = frozenset(function.input[len(inputs) :]) | {
            name for name, v in zip(function.input, inputs, strict=False) if v is None
        }
        given = {a.name: a for a in (*defaults, *function.attribute_proto, *node.attribute)}
        nodes = [with_attributes(n, given, inner.absent, self.file.limits.nesting) for n in function.node]
        needed = [name for name, outer in zip(function.output, node.output, strict=False) if outer]
        kept = self.b.scope, self.b.source
        self._run_nodes(nodes, needed, inner)
        self.b.scope, self.b.source = kept
        return [inner.values.get(name) for name in function.output[: len(node.output)]]

    def _branch(
        self, node: Any, inputs: Sequence[Known | None], scope: Scope, line: int, where: str
    ) -> list[Known | None]:
        """Inline the branch of an If that its condition selects."""
        site = OnnxSite(self, self.b, node, 1, inputs, where, (), scope)
        chosen = "then_branch" if bool(site.scalar(0)) else "else_branch"
        graph = next((a.g for a in node.attribute if a.name == chosen and a.HasField("g")), None)
        if graph is None or len(graph.output) < len(node.output):
            raise FrontendError(f"an If has an incomplete {chosen}", within=where)
        inner = Scope({}, scope.opsets, scope, self.b.scope, scope.depth + 1, line, scope.absent)
        self._initializers(graph, inner)
        kept = self.b.scope, self.b.source
        names = [v.name for v in graph.output]
        self._run_nodes(graph.node, names, inner)
        self.b.scope, self.b.source = kept
        return [inner.find(name) for name in names[: len(node.output)]]
