"""Lowering rules of products: linear, matmul and einsum, with the elementwise ops of their epilogue.

All of them are sums of products over letters: for example, `... k, n k -> ... n` is a linear. Two operands in float32
become a matrix product,

    c[batch..., m, n] = epilogue(sum_k x[batch..., m, k] y[batch..., n, k])

Each letter is assigned a role, and letters with the same role are merged into one dimension: in a view, or in a copy if
the strides do not allow a view. The operand that has the result's innermost letter becomes y. It is packed into panels,
unless it is a parameter that is already stored in panels.

A weight in bf16 pairs or in blocks is multiplied in that form. If the CPU has instructions for pairs, two computed bf16
matrices are packed into pairs at each call. Other float16 and bfloat16 operands are widened first; float64 and integers
are summed element by element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from treadle.backends.tvm.kernels.contraction import Contraction
from treadle.backends.tvm.kernels.encoded.block_words import word_form
from treadle.backends.tvm.kernels.encoded.unpacking import packed_form
from treadle.backends.tvm.kernels.matmul import panel_width
from treadle.backends.tvm.kernels.narrow.tile_product import WIDTH as TILE_WIDTH
from treadle.backends.tvm.kernels.pointwise import Chain, Instruction
from treadle.backends.tvm.lowering.chains import chain_of, inputs_of
from treadle.backends.tvm.lowering.encoded_rules import form_of, laid_out, rows_of
from treadle.backends.tvm.lowering.lettered_views import LetteredView
from treadle.backends.tvm.lowering.matrix_product import Finish, MatrixProduct, rounded_rows
from treadle.backends.tvm.lowering.product_sides import narrow_sides
from treadle.backends.tvm.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node, Value
from treadle.ir.layouts import panels
from treadle.ir.ops.blocks import EncodedLinear
from treadle.ir.ops.elementwise import Cast
from treadle.ir.ops.products import Linear
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.storage.views import View
from treadle.ir.types import DType, bf16, f32
from treadle.passes.lowering.read_blocks import unpacking
from treadle.passes.memory.storage_plan import How

# -- rules ---------------------------------------------------------------------------------------------------


def _product(w: RoutineWriter, node: Node) -> None:
    """Lower a product, and the group of elementwise ops that forms its epilogue."""
    made = w.groups[node].product or node
    equation = Equation.of(made)
    dtype = made.result.type.dtype
    with_bias = isinstance(made.op, (Linear, EncodedLinear))
    bias = made.operands[2] if with_bias else None
    factors = [v for v in made.operands[:2] if v is not None] if with_bias else made.inputs
    if dtype is f32:
        finish = _finish(w, node, made, equation)
        to = w.view(node.result)
        if _is_next_left_side(w, node, made):
            w.rounded[to.storage] = None  # the product writes the tiles of this storage
        if bias is not None:
            biased = LetteredView.of(w.view(bias), equation.result[-1:])
            finish = Finish(_with_bias(finish.chain), (biased, *finish.extras))
        _sum(w, node, equation, factors, equation.of_result(to), finish)
        return
    to = w.view(node.result)
    exact = dtype.is_int or dtype.name == "f64"
    if exact and bias is None:
        _contract(w, node, equation, [w.view(v) for v in factors], equation.of_result(to))
        return
    total = w.scratch(dtype if exact else f32, to.shape, "sums")
    if exact:
        _contract(w, node, equation, [w.view(v) for v in factors], equation.of_result(total))
    else:
        _sum(w, node, equation, factors, equation.of_result(total), Finish())
    w.pointwise(_narrowing(total.dtype, dtype, bias), [total, *([w.view(bias)] if bias is not None else [])], to, node)


def _narrowing(held: DType, dtype: DType, bias: Value | None) -> Chain:
    """Return a chain that computes (sum + bias) and converts it to dtype."""
    inputs = (held.name, dtype.name) if bias is not None else (held.name,)
    made: list[Instruction] = []
    at = 0
    if bias is not None:
        other = 1
        if held is not dtype:
            made.append(Instruction("cast", (1,), held.name))
            other = len(inputs)
        made.append(Instruction("add", (0, other), held.name))
        at = len(inputs) + len(made) - 1
    if held is not dtype:
        made.append(Instruction("cast", (at,), dtype.name))
    return Chain(inputs, tuple(made))


def _finish(w: RoutineWriter, node: Node, made: Node, equation: Equation) -> Finish:
    part = w.groups[node]
    if part.product is None:
        return Finish()
    others = [v for v in inputs_of(part) if v is not made.result]
    shape = made.result.type.shape
    extras = [equation.of_result(w.view(v).broadcast(shape)) for v in others]
    return Finish(chain_of(part, [made.result, *others]), tuple(extras))


def _with_bias(chain: Chain | None) -> Chain:
    """Return the chain with sum + bias in place of the sum. The bias is the chain's second input."""
    add = Instruction("add", (0, 1), "f32")
    if chain is None:
        return Chain(("f32", "f32"), (add,))
    inputs = ("f32", "f32", *chain.inputs[1:])
    old = len(chain.inputs)

    def moved(place: int) -> int:
        return len(inputs) if place == 0 else place + 1 if place < old else place + 2

    rest = [replace(i, operands=tuple(moved(p) for p in i.operands)) for i in chain.instructions]
    return Chain(inputs, (add, *rest))


# -- letters -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Equation:
    """The letters of an op's sum, for each dimension of its operands and its result. A dimension of size 1 has None."""

    operands: tuple[tuple[str | None, ...], ...]
    result: tuple[str | None, ...]
    sizes: Mapping[str, Size]

    @staticmethod
    def of(node: Node) -> Equation:
        applied = node.op.apply([None if v is None else v.type for v in node.operands])
        operands = [
            tuple(d.factors[0] if d.factors else None for d in dims) for dims in applied.operands if dims is not None
        ]
        result = tuple(d.factors[0] if d.factors else None for d in applied.results[0])
        sizes = {name: dim.size for name, dim in applied.dims.items()}
        return Equation(tuple(operands), result, sizes)

    def of_result(self, view: View) -> LetteredView:
        """Return a lettered view with the shape of the result."""
        return LetteredView.of(view, self.result)


def _contract(w: RoutineWriter, node: Node, equation: Equation, views: Sequence[View], to: LetteredView) -> None:
    """Add a step that sums element by element, in the operands' own dtype."""
    terms = [LetteredView.of(view, letters) for view, letters in zip(views, equation.operands, strict=False)]
    _contract_terms(w, node, terms, to, equation.sizes, f"{to.view.dtype} is summed element by element")


def _contract_terms(
    w: RoutineWriter, node: Node, terms: Sequence[LetteredView], to: LetteredView, sizes: Mapping[str, Size], note: str
) -> None:
    summed = list(dict.fromkeys(letter for t in terms for letter in t.letters if letter not in to.letters))
    order = [*to.letters, *summed]
    dtypes = tuple(t.view.dtype.name for t in terms)
    strides = [*[t.stride(letter) for t in terms for letter in order], *to.view.strides]
    kernel = Contraction(to.view.dtype.name, dtypes, len(to.letters), len(summed))
    w.step(kernel, [*[t.view for t in terms], to.view], [*[sizes[n] for n in order], *strides], node, note=note)


# -- in float32 ----------------------------------------------------------------------------------------------


def _sum(
    w: RoutineWriter, node: Node, equation: Equation, values: Sequence[Value], to: LetteredView, finish: Finish
) -> None:
    """Add steps that sum in float32: one matrix product for each operand after the first."""
    product = _by_stored_form(w, node, equation, values, to, finish) if len(values) == 2 else None
    if product is not None:
        product.emit()
        return
    sizes = equation.sizes
    terms = [LetteredView.of(w.view(v), letters) for v, letters in zip(values, equation.operands, strict=False)]
    terms = [_without_lone(w, node, terms, i, to, sizes) for i in range(len(terms))]
    if len(terms) == 1:
        term = terms[0]
        chain = finish.chain or _narrowing(term.view.dtype, f32, None)
        operands = [t.over(to.letters, sizes) for t in (term, *finish.extras)]
        w.pointwise(chain, operands, to.view, node)
        return
    left = terms[0]
    for i, right in enumerate(terms[1:], start=1):
        last = i == len(terms) - 1
        if last:
            made, done = to, finish
        else:
            later = {letter for t in (*terms[i + 1 :], to) for letter in t.letters}
            kept = [n for n in dict.fromkeys((*left.letters, *right.letters)) if n in later]
            made, done = LetteredView(tuple(kept), w.scratch(f32, [sizes[n] for n in kept], "product")), Finish()
        x, y = (replace(t, view=_widened(w, t.view)) for t in (left, right))
        MatrixProduct(w, node, sizes, x, y, made, done).emit()
        left = made


def _by_stored_form(
    w: RoutineWriter, node: Node, equation: Equation, values: Sequence[Value], to: LetteredView, finish: Finish
) -> MatrixProduct | None:
    """Return the product of two operands if a kernel reads the form in which the second one is stored, else None."""
    fused = w.groups[node].product or node
    x, y = values

    def product(of_x: View, of_y: View, **forms: Any) -> MatrixProduct:
        one, other = map(LetteredView.of, (of_x, of_y), equation.operands)
        return MatrixProduct(w, node, equation.sizes, one, other, to, finish, **forms)

    if isinstance(fused.op, EncodedLinear):
        whole = form_of(fused.op)
        rows, laid = rows_of(w, node, x, whole), laid_out(w, y, whole)
        return product(w.view(x), laid, packed=True, form=whole, encoded=rows)
    if y.layout is not None and y.layout.kind == "pairs":
        return product(w.view(x), w.view(y), packed=True)
    if (unpacked := unpacking(y)) is not None:
        narrow = unpacked.result.type.dtype is bf16  # the kernel reads bf16 blocks directly
        left = w.view(x) if narrow else _widened(w, w.view(x))
        of = unpacked.op.attributes["of"]
        return product(left, w.view(unpacked.inputs[0]), packed=True, form=packed_form(of) or word_form(of))
    if (sides := narrow_sides(w, fused)) is not None:
        ready = sides[0].made(w, node), sides[1].made(w, node)
        return product(w.view(x), w.view(y), sides=ready)
    weight = _in_panels(w, y, equation)
    return None if weight is None else product(_widened(w, w.view(x)), weight, packed=True)


def _without_lone(
    w: RoutineWriter, node: Node, terms: Sequence[LetteredView], at: int, to: LetteredView, sizes: Mapping[str, Size]
) -> LetteredView:
    """Return a term summed over the letters that no other term has."""
    others = {letter for i, t in enumerate((*terms, to)) if i != at for letter in t.letters}
    kept = tuple(letter for letter in terms[at].letters if letter in others)
    if kept == terms[at].letters:
        return terms[at]
    made = LetteredView(kept, w.scratch(f32, [sizes[n] for n in kept], "sums"))
    _contract_terms(w, node, [terms[at]], made, sizes, "letters of one operand are summed element by element")
    return made


def _widened(w: RoutineWriter, view: View) -> View:
    """Return a view in float32: the view itself, or a converted copy."""
    if view.dtype is f32:
        return view
    made = w.scratch(f32, view.shape, f"{view.storage.name}_wide")
    w.pointwise(Chain((view.dtype.name,), (Instruction("cast", (0,), "f32"),)), [view], made, None)
    return made


def rounds_left_side(w: RoutineWriter, node: Node) -> bool:
    """Lower a cast to bf16 whose result is read only by products with weights in pairs: add a step that rounds into the
    form that these products read.

    Return False and add nothing for any other node, and for rows that are not equally spaced.
    """
    if not _rounds(node) or not _is_left_side_alone(w, node.result):
        return False
    x = w.view(node.inputs[0])
    rows = x.merged(0, x.rank - 1)
    if rows is None or (rows.strides[1] != ONE and rows.shape[1] != ONE):
        return False
    (m, k), storage = rows.shape, w.view(node.result).storage
    w.rounded[storage] = rounded_rows(w, x, m, k, rows.strides[0], node)
    return True


def _rounds(node: Node) -> bool:
    return isinstance(node.op, Cast) and node.op.to is bf16 and node.inputs[0].type.dtype is f32


def _is_next_left_side(w: RoutineWriter, node: Node, made: Node) -> bool:
    """Return True if `node`, a cast of the product `made`, is read only by products with weights in pairs.

    The product `made` then writes the tiles that they read.
    """
    columns = made.result.type.shape[-1].constant if made.result.type.rank else None
    fits = columns is not None and columns % TILE_WIDTH == 0 and w.isa.multiplies_tiles
    return fits and _rounds(node) and _in_pairs(made) and _is_left_side_alone(w, node.result)


def _is_left_side_alone(w: RoutineWriter, value: Value) -> bool:
    """Return True if a value with its own storage is used only as the left operand of products with weights
    in pairs.
    """
    uses, place = w.uses.get(value, []), w.place(value)
    own = place.how is How.OWN and place.view is not None and place.view.is_contiguous
    reads = all(at == 0 and reader.op.name in RULES and _in_pairs(reader) for reader, at in uses)
    return own and reads and value not in w.plan.function.outputs.values()


def _in_panels(w: RoutineWriter, value: Value, equation: Equation) -> View | None:
    """Return a parameter in the panels that a product reads, or None if the product does not read it in panels."""
    n = equation.result[-1] if equation.result else None
    if value.type.rank != 2 or n is None or n not in equation.operands[1]:
        return None
    transposed = equation.operands[1][1] == n
    return w.panels(value, panels(panel_width(equation.sizes[n].constant, w.isa), transposed))


def _in_pairs(node: Node) -> bool:
    """Return True if a product reads its right operand in pairs: a weight stored in pairs, or blocks unpacked
    to bf16.
    """
    weight = node.operands[1] if len(node.operands) > 1 else None
    if weight is not None and unpacking(weight) is not None:
        return weight.type.dtype is bf16
    return weight is not None and weight.layout is not None and weight.layout.kind == "pairs"


RULES: Mapping[str, Rule] = dict.fromkeys(("linear", "matmul", "einsum", "encoded_linear"), _product)
KEEPS: Mapping[str, Keeps] = {}
