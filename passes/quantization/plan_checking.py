"""Check a quantization plan against its graph, independently of the planner: every call and every composite is inlined.

The planner follows calls and uses products' own rules. The checker sees only primitives, and follows the blocks of each
weight to every reader: a sum of products over the axis of the blocks, or an op that moves whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from treadle.ir.axes import Role
from treadle.ir.builder import describe_source
from treadle.ir.errors import PassError, RuleError
from treadle.ir.graph import Graph, Node, Value
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import ROWS, Encode
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import MixedProduct
from treadle.ir.transforms.balances import Balance
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import Type
from treadle.passes.lowering.legalize import legalized
from treadle.passes.quantization.quantization_plan import QuantizationPlan


def check_quantization(plan: QuantizationPlan, graph: Graph) -> None:
    """Raise PassError if a plan does not fit a graph, with the weight and the error.

    Every parameter is planned once, with its own type and a reason. An encoded parameter is a matrix of numbers, whose
    readers all sum over the axis of its blocks, or move whole rows of them. No parameter is encoded twice.
    """
    flat = inline_calls(graph)
    parameters = flat.parameters
    names = [weight.name for weight in plan.weights]
    if sorted(names) != sorted(parameters):
        wrong = sorted(set(names) ^ set(parameters)) or [n for n in names if names.count(n) > 1]
        raise _wrong(f"{wrong[0]} must be planned once, like every parameter", plan)
    for weight in plan.weights:
        if weight.type != parameters[weight.name].type:
            raise _wrong(f"{weight.name} is {parameters[weight.name].type}, but is planned as {weight.type}", plan)
        if not weight.reason:
            raise _wrong(f"{weight.name} has no reason", plan)
        if weight.encoding is not None and (weight.type.encoding is not None or weight.type.rank != 2):
            raise _wrong(f"{weight.name} is {weight.type}, not a matrix of numbers", plan)
    _check_activations(plan, graph)
    _check_balances(plan, flat)
    encoded = {weight.name: weight for weight in plan.weights if weight.encoding is not None}
    for entry in legalized(flat, _opens_all).later_entries:
        held: dict[Value, Type] = {}
        for name, value in entry.parameters.items():
            if (planned := encoded.get(name)) is not None and planned.encoding is not None:
                held[value] = planned.type.as_encoded(planned.encoding)
        for value in entry.results:
            if value in held:
                raise _wrong(f"{value.name} is an output, and must not be in blocks", plan)
        for node in entry.nodes:
            if any(v in held for v in node.inputs):
                _follow(node, held, plan)


def _check_activations(plan: QuantizationPlan, graph: Graph) -> None:
    """Check that every planned value exists, with its type and a reason; that each of its products reads it as the
    first operand; and that no product is planned twice.
    """
    seen: set[tuple[str, int]] = set()
    for each in plan.activations:
        what = f"{each.name} of {each.function}"
        function = graph.functions.get(each.function)
        if function is None or not each.products or not each.reason:
            raise _wrong(f"{what} has no {'function' if function is None else 'products, or no reason'}", plan)
        for place in each.products:
            node = function.nodes[place] if 0 <= place < len(function.nodes) else None
            x = node.operands[0] if node is not None and node.operands else None
            if x is None or x.name != each.name or x.type != each.type:
                raise _wrong(f"node {place} of {each.function} does not read {each.name}: {each.type} first", plan)
            if (each.function, place) in seen:
                raise _wrong(f"{what} is planned twice for node {place}", plan)
            seen.add((each.function, place))


def _check_balances(plan: QuantizationPlan, flat: Graph) -> None:
    """Check each balance: its weights are parameters in 8-bit rows, its norm's weights are parameters, the name of its
    vector is unused, and every reader of its weights multiplies them with the result of its norm.
    """
    of: dict[str, Balance] = {}
    eight = {w.name for w in plan.weights if w.encoding is not None and w.encoding.along(-1) == ROWS}
    for balance in plan.balances:
        if balance.vector in flat.parameters or balance.vector in {b.vector for b in plan.balances if b is not balance}:
            raise _wrong(f"{balance.vector} is already the name of another value", plan)
        for name in balance.weights:
            if name not in eight or name in of:
                raise _wrong(
                    f"{name} is smoothed by {balance.vector}, but is not in 8-bit rows, or is smoothed twice", plan
                )
            of[name] = balance
    for entry in flat.later_entries:
        weights = {value: name for name, value in entry.parameters.items()}
        for value in entry.results:
            if weights.get(value) in of:
                raise _wrong(f"{value.name} is an output, and must not be smoothed", plan)
        for node in entry.nodes:
            matrices = node.op.multiplies(len(node.operands)) if isinstance(node.op, MixedProduct) else ()
            for position, read in enumerate(node.operands):
                known = None if read is None else of.get(weights.get(read, ""))
                if (
                    read is not None
                    and known is not None
                    and (position not in matrices or not _gives(node.operands[0], known))
                ):
                    what = f"{weights[read]} is smoothed by {known.vector}, but {node.op.name} reads it"
                    raise _wrong(f"{what} without the result of {known.gain}", plan)


def _gives(x: Value | None, balance: Balance) -> bool:
    """Return True if a value is the result of a balance's norm, or consists of rows of the result."""
    while x is not None and x.node is not None and _keeps_channels(x.node):
        x = x.node.operands[0]
    node = None if x is None else x.node
    if node is None or x is not node.results[0] or "norm" not in node.op.name:
        return False
    named = dict(zip(node.op.operands, node.operands, strict=False))
    gain, shift = named.get("weight"), named.get("bias")
    return (gain is not None and gain.name, None if shift is None else shift.name) == (balance.gain, balance.shift)


def _keeps_channels(node: Node) -> bool:
    """Return True if a node rearranges elements of its first operand, but not along that operand's last axis."""
    if not node.op.only_moves or node.op.callee is not None:
        return False
    found = node.op.apply([None if v is None else v.type for v in node.operands])
    before, after = found.operands[0], found.results[0]
    return before is not None and before[-1:] == after[-1:] != () and after[-1].size is None


def check_encoded_products(graph: Graph, balances: Sequence[Balance] = ()) -> None:
    """Raise PassError if an encoded value has readers other than products with encoded weights.

    With every call and every composite inlined, an encoded value is decoded, and each reader of the result sums
    products over the axis of its blocks. The other factor was decoded as well, and at most moved. (`check_quantization`
    verified that blocks of weights are along the summed axis.) If a value is multiplied with a balance's vector before
    it is encoded, it must be multiplied with that balance's weights, and the weights with no other value.
    """
    vectors = {name: balance.vector for balance in balances for name in balance.weights}
    for entry in legalized(inline_calls(graph), _opens_all).later_entries:
        encoded = {node.result for node in entry.nodes if isinstance(node.op, Encode)}
        rounded = {node.result for node in entry.nodes if node.op.decodes and node.inputs[0] in encoded}
        decoded: set[Value] = set()
        for node in entry.nodes:
            if node.op.decodes or (node.op.only_moves and decoded.issuperset(node.inputs)):
                decoded.update(node.results)
            if not rounded.isdisjoint(node.inputs):
                _check_product(node, rounded, decoded)
                _check_vector(node, vectors, decoded)
            elif not node.op.only_moves and any(
                name in vectors for v in node.inputs if v in decoded for name in _parameters(v)
            ):
                raise PassError(f"the quantized graph is wrong: {node.op.name} reads smoothed weights")
        if any(v in rounded or v in encoded for v in entry.results):
            raise PassError("the quantized graph is wrong: quantized values are an output", received=graph.name)


def _check_product(node: Node, rounded: AbstractSet[Value], decoded: AbstractSet[Value]) -> None:
    found = node.op.apply([None if v is None else v.type for v in node.operands])
    dims, (x, *others) = found.operands[0] or (), node.operands
    last = {found.factors[name].role for name in dims[-1].factors} if dims else set()
    if not node.is_contraction or x not in rounded or last != {Role.REDUCED} or others[0] not in decoded:
        reader = f"{node.op.name}, {describe_source(node.source, node.scope) or 'of main'}"
        what = "a value quantized at every call is read by an op that does not multiply it with an encoded weight"
        raise PassError(f"the quantized graph is wrong: {what}", received=reader)


def _check_vector(node: Node, vectors: Mapping[str, str], decoded: AbstractSet[Value]) -> None:
    """Check that a product's operand was scaled by the smoothing vector of the product's weights."""
    x, *others = node.inputs
    encode = x.node.inputs[0].node if x.node is not None else None
    vector = None if encode is None or encode.operands[1] is None else encode.operands[1].name
    for name in [name for other in others if other in decoded for name in _parameters(other)]:
        if vectors.get(name) != vector:
            what = f"{name}, smoothed by {vectors.get(name)}, is multiplied with values that were scaled by {vector}"
            raise PassError(f"the quantized graph is wrong: {what}")


def _parameters(value: Value) -> list[str]:
    """Return the parameters from which a value is decoded or moved."""
    if value.node is None:
        return [value.name] if value.kind == "parameter" else []
    moves = value.node.op.decodes or value.node.op.only_moves
    return [name for each in value.node.inputs for name in _parameters(each)] if moves else []


def _opens_all(op: Op, types: Sequence[Type | None]) -> bool:
    return False


def _follow(node: Node, held: dict[Value, Type], plan: QuantizationPlan) -> None:
    """Check a node that reads blocks. If its result depends only on weights, add the result to `held`, with its
    encoding.
    """
    reader = f"{node.op.name}, {describe_source(node.source, node.scope) or 'of main'}"
    if isinstance(node.op, Cast):  # a cast of a decoded value
        held[node.result] = held[node.inputs[0]]
    elif node.op.moves_blocks:
        try:
            (made,) = node.op.infer([None if v is None else held.get(v, v.type) for v in node.operands])
        except RuleError as error:
            raise _wrong(f"{error.what} ({reader})", plan) from None
        if all(v in held for v in node.inputs):
            held[node.result] = made
    else:
        found = node.op.apply([None if v is None else v.type for v in node.operands])
        for value, dims in zip(node.operands, found.operands, strict=True):
            encoding = held[value].encoding if value is not None and value in held else None
            if encoding is None or dims is None:
                continue
            roles = {found.factors[name].role for name in dims[encoding.axis].factors}
            if roles != {Role.REDUCED} or not node.is_contraction:
                raise _wrong(f"{reader} does not sum over the axis of its blocks", plan)


def _wrong(what: str, plan: QuantizationPlan) -> PassError:
    return PassError(f"the quantization plan is wrong: {what}", received=f"{plan.model}, {plan.scheme}")
