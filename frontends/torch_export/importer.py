"""PyTorch modules as graphs, through torch.export.

    model = from_torch(module, {"input_ids": ids}, dynamic={"input_ids": "B S"})
    exe = treadle.compile(model)

torch.export runs the module once and records the ATen operators that it used. Operators that match IR ops stay whole
(scaled_dot_product_attention, linear, layer_norm, rms_norm, gelu). PyTorch decomposes every unknown operator into core
operators; a core operator without a handler is refused. Sizes are symbols over the dimensions that `dynamic` names.
"""

from __future__ import annotations

import operator as python_operator
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import treadle.frontends.torch_export.tables  # noqa: F401  (registers the operators)
from treadle.frontends.recipes.stored_triangles import triangle_of
from treadle.frontends.torch_export.complex_numbers import Complex, dtype_of_parts, of_complex
from treadle.frontends.torch_export.guards import bounds_of
from treadle.frontends.torch_export.lines import scope_of, source_of
from treadle.frontends.torch_export.model import TorchModel, array_of, expect_dense
from treadle.frontends.torch_export.module_hints import dtype_hint, experts_hint, mutation_hint
from treadle.frontends.torch_export.operators import OPERATORS, TorchSite, our_dtype, unsupported
from treadle.frontends.torch_export.sizes import Symbols, Traced, UnknownSize
from treadle.frontends.torch_export.tracing import (
    Dynamic,
    check_example,
    check_module,
    decomposed,
    exported,
    name_symbols,
    named_arguments,
    open_dimensions,
)
from treadle.ir.builder import Builder, Expr
from treadle.ir.collector_pause import collection_paused
from treadle.ir.errors import FrontendError, RuleError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import Dim, DType, Type
from treadle.ir.wording.checked_calls import with_checked_call

if TYPE_CHECKING:
    import torch

_IN_PLACE = 16
"""Maximum number of elements of a float buffer that becomes a constant of the graph; larger buffers are weights."""
_IN_PLACE_WHOLE = 4096
"""The same limit for integers and bools, which hold positions and masks."""

_NO_EFFECT = {
    "_assert_tensor_metadata.default",
    "_assert_scalar.default",
    "_assert_async.msg",
    "sym_constrain_range.default",
    "sym_constrain_range_for_size.default",
}
"""Operators that check something and return nothing. Checks of sizes are also guards, which the graph's bounds
enforce.
"""


OLDEST = (2, 12)
"""The oldest version of PyTorch whose torch.export is supported: older ones export other operators, and guard sizes
that need no guard.
"""


_SPLIT = "operators that compute the same; or keep this part in PyTorch, before or after the compiled model"
_DYNAMIC = 'dynamic={"input_ids": "B S"}'
_ELSEWHERE = {
    "dynamic_axes": _DYNAMIC,
    "dynamic_shapes": _DYNAMIC,
    "dynamic_dims": _DYNAMIC,
    "args": "example=...",
    "example_inputs": "example=...",
}
_ELSEWHERE |= {"inputs": "example=...", "example_args": "example=...", "example_kwargs": "example=..."}
"""Options of from_torch by their names in torch.export and torch.onnx."""


@with_checked_call(_ELSEWHERE)
def from_torch(
    module: torch.nn.Module, example: tuple[Any, ...] | Mapping[str, Any], *, dynamic: Dynamic | None = None
) -> TorchModel:
    """Import a module, with a copy of its weights: a module that is trained further is imported again.

    example  arguments of the module's forward, as a tuple or a dict by name: tensors, whose values do not matter, and
             other arguments, which become constants of the graph
    dynamic  the dimensions that vary, by argument: {"input_ids": "B S"}, where a number or _ keeps a dimension,
             or {"input_ids": {1: "S"}}; without it, all sizes are fixed to the example's

    Raises UsageError for a PyTorch older than OLDEST, and for an example or names that do not fit; FrontendError (with
    the operator, the node and the module's line) for unsupported operators.
    """
    try:
        import torch
    except ImportError:
        raise UsageError("from_torch needs PyTorch", hint="pip install torch") from None
    if _version(torch.__version__) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UsageError(
            f"from_torch needs PyTorch {wanted} or newer",
            received=f"torch {torch.__version__}",
            hint=f"pip install 'torch>={wanted}'",
        )
    check_module(module)
    check_example(example)
    arguments = named_arguments(module, example)
    opened = open_dimensions(arguments, dynamic)
    program = exported(module, example, opened)
    try:
        return _imported(module, program, opened)
    except TreadleError as error:
        if isinstance(error.__cause__, RuleError):  # its hint has words of the DSL
            error.hint = dtype_hint(module, arguments)
        if error.hint is None and any(
            arguments[name].shape[axis] == 1 for name, axes in opened.items() for axis in axes if name in arguments
        ):
            error.hint = "an example in which the dimensions of dynamic= have a size of 2 or more"
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise FrontendError(
            "the program that torch.export returns for the module cannot be read",
            received=f"{type(error).__name__}: {error}"[:300],
        ) from error


def _version(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: (2, 13) for `2.13.0+cpu`."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _imported(
    module: torch.nn.Module, program: torch.export.ExportedProgram, opened: Mapping[str, dict[int, str]]
) -> TorchModel:
    symbols, sizes = name_symbols(program, opened)
    if not _is_plain(program):
        env = symbols.env
        traced = None if env is None else Traced(len(env.guards), dict(env.var_to_range))
        program = decomposed(program, _kept())
        symbols, sizes = name_symbols(program, opened)
        symbols.traced = traced if symbols.env is env else None
    with collection_paused():
        return TorchImporter(module, program, symbols, sizes).run()


def _name(node: Any) -> str | None:
    """Return `add.Tensor` for an ATen operator, None for anything else."""
    schema = getattr(node.target, "_schema", None)
    return str(node.target).removeprefix("aten.") if schema is not None and schema.name.startswith("aten::") else None


def _is_plain(program: torch.export.ExportedProgram) -> bool:
    """Return True if a program writes into no tensor and uses only supported operators."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op != "call_function" or node.target is python_operator.getitem or _is_size(node):
            continue
        name = _name(node)
        if name is None or (name not in OPERATORS and name not in _NO_EFFECT):
            return False
    return True


def _kept() -> list[Any]:
    """Return PyTorch's own objects for the supported operators."""
    import torch

    found = []
    for full in OPERATORS:
        name, _, overload = full.partition(".")
        packet = getattr(torch.ops.aten, name, None)
        target = getattr(packet, overload, None)
        if target is not None:
            found.append(target)
    return found


def _dtype_of(name: str, tensor: Any) -> DType:
    try:
        return our_dtype(tensor.dtype)
    except FrontendError as error:
        error.within = f"{name}, an argument or a tensor of the module"
        raise


def _is_size(node: Any) -> bool:
    """Return True if a node computes a size or a condition on sizes, which its own record holds."""
    val = node.meta.get("val")
    return isinstance(val, int) or (hasattr(val, "node") and not hasattr(val, "dtype"))


class TorchImporter:
    """The state of one import."""

    def __init__(
        self,
        module: torch.nn.Module,
        program: torch.export.ExportedProgram,
        symbols: Symbols,
        sizes: Mapping[str, Size],
    ) -> None:
        self.module, self.program, self.symbols, self.sizes = module, program, symbols, sizes
        self.name = name = type(module).__name__
        self.graph = Graph(name if name.isidentifier() and name.isascii() else "module")
        self.b = Builder(self.graph)
        self.bounds: dict[str, Bounds] = bounds_of(symbols)
        self.values: dict[Any, Any] = {}
        self.weights: dict[str, Any] = {}
        self.learned: list[str] = []
        self.unused: list[str] = []
        self.known: dict[Any, Expr] = {}
        self.operators: Counter[str] = Counter()
        self.opaque: list[str] = []

    def at_least(self, name: str, lower: int) -> None:
        """Raise the lower bound of a symbol to at least this size."""
        self.bounds[name] = self.bounds.get(name, Bounds()).intersect(Bounds(lower))

    def run(self) -> TorchModel:
        inputs = self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                try:
                    self._node(node)
                except TreadleError as error:
                    error.hint = experts_hint(self.module, scope_of(node)) or error.hint
                    raise
            elif node.op not in ("placeholder", "output"):
                raise unsupported(node, f"a node of {node.op} is not supported")
        self.b.scope = ""
        self.b.outputs(**self._outputs())
        for symbol in self.graph.symbols:
            self.graph.symbols[symbol] = self.bounds.get(symbol, Bounds())
        weights = {name: self.weights[name] for name in self.graph.parameters}
        return TorchModel(
            self.name,
            self.graph,
            weights,
            inputs,
            dict(self.sizes),
            self.operators,
            tuple(self.opaque),
            tuple(name for name in self.learned if name in weights),
            tuple(self.unused),
        )

    # -- inputs and weights ------------------------------------------------------------------------------------

    def _inputs(self) -> tuple[str, ...]:
        specs = self.program.graph_signature.input_specs
        holders = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        inputs = []
        for node, spec in zip(holders, specs, strict=True):
            kind = spec.kind.name
            if kind == "USER_INPUT":
                val = node.meta.get("val")
                if not hasattr(val, "dtype"):
                    self.values[node] = self._plain(val)
                    continue
                type = Type(_dtype_of(node.name, val), tuple(Dim.of(self.symbols.size(n)) for n in val.shape))
                self.values[node] = self.b.input(node.name, type)
                inputs.append(node.name)
            elif kind == "TOKEN":  # it orders operators with side effects, which are refused
                self.values[node] = None
            elif kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                if node.users:
                    self.values[node] = self._weight(str(spec.target))
                else:
                    self.unused.append(str(spec.target))
            else:
                raise FrontendError(f"an argument of kind {kind.lower()} is not supported", received=node.name)
        return tuple(inputs)

    def _weight(self, name: str) -> Expr | Complex:
        """Return a tensor of the module. A complex tensor enters the graph as two tensors."""
        state = self.program.state_dict
        tensor: Any = state[name] if name in state else self.program.constants[name]
        if dtype_of_parts(tensor.dtype) is None:
            return self._stored(name, tensor)
        return Complex(*(self._stored(f"{name}.{part}", getattr(tensor, part)) for part in ("real", "imag")))

    def _stored(self, name: str, tensor: Any) -> Expr:
        """Return a dense tensor of the module; a tensor with several names enters the graph once."""
        expect_dense(name, tensor)
        dtype = _dtype_of(name, tensor)
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())) if tensor.numel() else name
        if key not in self.known:
            array = array_of(name, tensor)
            is_buffer = name not in self._parameters()
            if tensor.numel() <= (_IN_PLACE if dtype.is_float else _IN_PLACE_WHOLE) and is_buffer:
                self.known[key] = self.b.constant(array, dtype)
            elif is_buffer and dtype.numpy is not None and (triangle := triangle_of(array)) is not None:
                self.known[key] = triangle.build(self.b, dtype)
            else:
                self.known[key] = self.b.parameter(name, Type(dtype, tuple(map(Dim.of, tensor.shape))))
                self.weights[name] = array.copy()  # training the module further changes no imported model
                if not is_buffer and tensor.requires_grad:
                    self.learned.append(name)
        return self.known[key]

    def _parameters(self) -> set[str]:
        return {str(s.target) for s in self.program.graph_signature.input_specs if s.kind.name == "PARAMETER"}

    # -- nodes -------------------------------------------------------------------------------------------------

    def _plain(self, argument: Any) -> Any:
        """Convert a node's argument to the form that handlers take."""
        if hasattr(argument, "op") and hasattr(argument, "meta"):
            made = self.values[argument]
            if isinstance(made, UnknownSize):
                raise made
            return made
        if isinstance(argument, list | tuple):
            return [self._plain(x) for x in argument]
        return argument

    def _node(self, node: Any) -> None:
        self.b.scope, self.b.source = scope_of(node), source_of(node)
        try:
            self._import(node)
        except UnknownSize as error:
            raise unsupported(node, error.what, error.hint, error.received) from None
        except FrontendError as error:
            if error.within is None:
                error.within = f"{node.target}, node {node.name}"
                error.source = error.source or (str(self.b.source) if self.b.source else None)
            raise
        except TreadleError as error:
            raise unsupported(node, error.what, error.hint, error.received) from error
        except Exception as error:  # for any exception, the error names the node, not our code
            raise unsupported(node, "cannot be read", None, f"{type(error).__name__}: {error}"[:200]) from error

    def _import(self, node: Any) -> None:
        if node.target is python_operator.getitem:
            parent, index = node.args
            made = self.values[parent][index]
            if made is None and node.users:
                raise unsupported(parent, f"its result {index} is not supported")
            self.values[node] = made
            return
        name = _name(node)
        if name in _NO_EFFECT:
            return
        if _is_size(node):
            val = node.meta["val"]
            whole = isinstance(val, int) or type(val).__name__ == "SymInt"
            try:
                self.values[node] = self.symbols.size(val) if whole else None
            except (
                UnknownSize
            ) as error:  # this matters if the size is used; a size that only checks use is never needed
                self.values[node] = error
            return
        if name is None:
            raise unsupported(node, "the operator is not supported", _SPLIT)
        schema = node.target._schema.arguments
        arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        arguments |= {a.name: self._plain(x) for a, x in zip(schema, node.args, strict=False)}
        arguments |= {key: self._plain(x) for key, x in node.kwargs.items()}
        site = TorchSite(self, node, arguments)
        made = of_complex(site, name)
        if made is None:
            handler = OPERATORS.get(name)
            if handler is None:
                raise unsupported(node, "the operator is not supported", _SPLIT)
            made = handler(site)
        self.operators[name] += 1
        results = list(made) if isinstance(made, list | tuple) else [made]
        for position, result in enumerate(results):
            if result is not None:
                self._check(site, position, result)
        self.values[node] = results if isinstance(node.meta.get("val"), list | tuple) else results[0]

    def _check(self, site: TorchSite, position: int, made: Expr | Complex) -> None:
        """Check a result against the dtype and the shape that PyTorch found."""
        parts = dtype_of_parts(site.vals[position].dtype)
        dtype, shape = parts or site.dtype(position), site.shape(position)
        if isinstance(made, Complex) != (parts is not None):
            site.refuse(f"its result is {site.vals[position].dtype} in torch")
        if made.dtype is not dtype:
            site.refuse(f"its result is {made.dtype} here, {dtype} in torch")
        if made.shape != shape and not self._same(made.shape, shape):
            ours, theirs = (", ".join(map(str, s)) for s in (made.shape, shape))
            site.refuse(f"its result is [{ours}] here, [{theirs}] in torch")

    def _same(self, ours: tuple[Size, ...], theirs: tuple[Size, ...]) -> bool:
        """Return True if two shapes agree for some values of the symbols that are unlikely to agree by chance."""
        if len(ours) != len(theirs):
            return False
        names = sorted({s for size in (*ours, *theirs) for s in size.symbols})
        for step in (0, 1, 2, 7):
            values = {}
            for i, name in enumerate(names):
                bounds = self.bounds.get(name, Bounds())
                value = bounds.lower + 1 + step * (i + 3)
                values[name] = value if bounds.upper is None else min(value, bounds.upper)
            if any(a.evaluate(values) != b.evaluate(values) for a, b in zip(ours, theirs, strict=True)):
                return False
        return True

    # -- outputs -----------------------------------------------------------------------------------------------

    def _outputs(self) -> dict[str, Expr]:
        node = next(n for n in self.program.graph.nodes if n.op == "output")
        specs = self.program.graph_signature.output_specs
        found: dict[str, Expr] = {}
        names = self._output_names()
        at = 0
        for value, spec in zip(node.args[0], specs, strict=True):
            kind = spec.kind.name
            if kind != "USER_OUTPUT":
                raise FrontendError(
                    "the module changes an argument or a tensor that it holds",
                    received=f"{spec.target or spec.arg.name} ({kind.lower().replace('_', ' ')})",
                    hint=mutation_hint(self.module),
                )
            name, at = names[at], at + 1
            made = self._plain(value)
            if isinstance(made, Complex):
                raise FrontendError(
                    "the module returns a complex tensor, and a graph has none",
                    received=name,
                    hint="torch.view_as_real, which returns its two parts",
                )
            if isinstance(made, Expr):
                found[name] = made
        if not found:
            raise FrontendError("the module returns no tensor")
        return found

    def _output_names(self) -> list[str]:
        """Return a name for each result: the key or field that holds it, or `output`, numbered if there are several."""
        from torch.utils import _pytree as pytree

        spec = self.program.call_spec.out_spec
        assert spec is not None
        count = spec.num_leaves
        paths: list[tuple[Any, Any]]
        try:
            paths = pytree.tree_flatten_with_path(pytree.tree_unflatten([0] * count, spec))[0] if count else []
        except ValueError:  # a container that gives torch no names of its elements
            paths = [((i,), 0) for i in range(count)]
        names: list[str] = []
        for path, _ in paths:
            words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
            text = "_".join(words) or "output"
            text = "".join(c if c.isalnum() or c == "_" else "_" for c in text)
            names.append(f"output_{text}" if text[0].isdigit() else text)
        if count == 1 and names[0] == "output_0":
            names = ["output"]
        taken: dict[str, None] = {}
        for name in names:
            free = (n for k in range(1, count + 1) if (n := name if k == 1 else f"{name}_{k}") not in taken)
            taken[next(free)] = None
        return list(taken)
