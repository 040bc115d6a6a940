"""Lowering rules of products: linear, matmul and einsum, with the chain that finishes them.

All of them are sums of products over letters: `... k, n k -> ... n` is a linear, and so on. Two operands in float32
become a matrix product,

    c[batch..., m, n] = epilogue(sum_k x[batch..., m, k] y[batch..., n, k])

by giving each letter its part and joining those of one part: in views, and in copies where strides cannot say it. The
side that holds the result's innermost letter is y; it is packed in panels, or is a parameter that lies in panels.
Float16 and bfloat16 are widened first; float64 and integers are summed element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.backends.kernels.contraction import Contraction
from treadle.backends.kernels.matmul import Matmul, Pack, panel_width
from treadle.backends.kernels.pointwise import Chain, Instruction
from treadle.backends.lowering.grouping import chain_of, inputs_of
from treadle.backends.lowering.program import Buffer, Panels, View
from treadle.backends.lowering.routine_writer import Keeps, RoutineWriter, Rule
from treadle.ir.graph import Node, Value
from treadle.ir.sizes import ONE, ZERO, Size, product
from treadle.ir.types import DType, f32

Letters = tuple[str, ...]


@dataclass(frozen=True)
class Term:
    """A view whose dimensions have letters. Dimensions of 1 have none, and are left out."""

    letters: Letters
    view: View

    @staticmethod
    def of(view: View, letters: Sequence[str | None]) -> Term:
        """A view, and the letter of each dimension; None for one of size 1."""
        kept = [axis for axis, letter in enumerate(letters) if letter is not None]
        shape, strides = tuple(view.shape[a] for a in kept), tuple(view.strides[a] for a in kept)
        return Term(tuple(str(letters[a]) for a in kept), replace(view, shape=shape, strides=strides))

    def stride(self, letter: str | None) -> Size:
        """How far apart elements of a letter lie; 0 where it has no such letter."""
        return self.view.strides[self.letters.index(letter)] if letter in self.letters else ZERO

    def over(self, order: Sequence[str], sizes: Mapping[str, Size]) -> View:
        """The view with the dimensions of these letters, repeated along those that it does not have."""
        shape = tuple(sizes[letter] for letter in order)
        return replace(self.view, shape=shape, strides=tuple(self.stride(letter) for letter in order))

    def joined(self, order: Sequence[str], sizes: Mapping[str, Size]) -> Size | None:
        """The stride of these letters as one dimension; None where there is none."""
        found = self.over(order, sizes).merged(0, len(order))
        return None if found is None else found.strides[0]

    def copied(self, w: RoutineWriter, order: Sequence[str], sizes: Mapping[str, Size]) -> Term:
        """A copy in which these letters lie in this order, without gaps."""
        return Term(tuple(order), w.copied(self.over(order, sizes)))


@dataclass(frozen=True)
class Finish:
    """What is done with a sum before it is stored: a chain whose first input it is, and the chain's other inputs."""

    chain: Chain | None = None
    extras: tuple[Term, ...] = ()


# -- rules ---------------------------------------------------------------------------------------------------


def _product(w: RoutineWriter, node: Node) -> None:
    """The rule of a product, and of the group of elementwise ops that finishes one."""
    part = w.groups.get(node)
    made = part.product if part is not None else node
    assert made is not None
    equation = Equation.of(made)
    dtype = made.result.type.dtype
    bias = made.operands[2] if made.op.name == "linear" else None
    factors = [v for v in made.operands[:2] if v is not None] if made.op.name == "linear" else made.inputs
    if dtype is f32:
        finish = _finish(w, node, made, equation)
        to = w.destination(node.result)
        if bias is not None:
            biased = Term.of(w.view(bias), equation.result[-1:])
            finish = Finish(_with_bias(finish.chain), (biased, *finish.extras))
        _sum(w, node, equation, factors, equation.of_result(to), finish)
        return
    to = w.destination(node.result)
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
    """(sum + bias) converted to dtype."""
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
    part = w.groups.get(node)
    if part is None:
        return Finish()
    others = [v for v in inputs_of(part) if v is not made.result]
    shape = made.result.type.shape
    extras = [equation.of_result(w.view(v).broadcast(shape)) for v in others]
    return Finish(chain_of(part, [made.result, *others]), tuple(extras))


def _with_bias(chain: Chain | None) -> Chain:
    """The chain with sum + bias in place of the sum; the bias is the second input."""
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
    """What an op sums: the letter of each dimension of its operands and its result, None for a dimension of 1."""

    operands: tuple[tuple[str | None, ...], ...]
    result: tuple[str | None, ...]
    sizes: Mapping[str, Size]

    @staticmethod
    def of(node: Node) -> Equation:
        applied = node.op.apply([None if v is None else v.type for v in node.operands])
        operands = [tuple(d.factors[0] if d.factors else None for d in dims) for dims in applied.operands if dims]
        result = tuple(d.factors[0] if d.factors else None for d in applied.results[0])
        sizes = {name: dim.size for name, dim in applied.dims.items()}
        return Equation(tuple(operands), result, sizes)

    def of_result(self, view: View) -> Term:
        """A view of the result's shape."""
        return Term.of(view, self.result)


def _contract(w: RoutineWriter, node: Node, equation: Equation, views: Sequence[View], to: Term) -> None:
    """The sum element by element, in the operands' own dtype."""
    terms = [Term.of(view, letters) for view, letters in zip(views, equation.operands, strict=False)]
    _contract_terms(w, node, terms, to, equation.sizes, f"{to.view.dtype} is summed element by element")


def _contract_terms(
    w: RoutineWriter, node: Node, terms: Sequence[Term], to: Term, sizes: Mapping[str, Size], note: str
) -> None:
    summed = list(dict.fromkeys(letter for t in terms for letter in t.letters if letter not in to.letters))
    order = [*to.letters, *summed]
    dtypes = tuple(t.view.dtype.name for t in terms)
    strides = [*[t.stride(letter) for t in terms for letter in order], *to.view.strides]
    kernel = Contraction(to.view.dtype.name, dtypes, len(to.letters), len(summed))
    w.step(kernel, [*[t.view for t in terms], to.view], [*[sizes[n] for n in order], *strides], node, note=note)


# -- in float32 ----------------------------------------------------------------------------------------------


def _sum(
    w: RoutineWriter, node: Node, equation: Equation, values: Sequence[Value], to: Term, finish: Finish
) -> None:
    """The sum in float32: a matrix product for each operand after the first."""
    sizes = equation.sizes
    if len(values) == 2:
        weight = _in_panels(w, node, values[1], equation)
        if weight is not None:
            x = Term.of(_widened(w, w.view(values[0])), equation.operands[0])
            _MatrixProduct(w, node, sizes, x, Term.of(weight, equation.operands[1]), to, finish, packed=True).emit()
            return
    terms = [Term.of(w.view(v), letters) for v, letters in zip(values, equation.operands, strict=False)]
    terms = [_without_lone(w, node, terms, i, to, sizes) for i in range(len(terms))]
    if len(terms) == 1:
        term = terms[0]
        chain = finish.chain or Chain((term.view.dtype.name,), ())
        operands = [t.over(to.letters, sizes) for t in (term, *finish.extras)]
        w.pointwise(_converted(chain, term.view.dtype), operands, to.view, node)
        return
    left = terms[0]
    for i, right in enumerate(terms[1:], start=1):
        last = i == len(terms) - 1
        if last:
            made, done = to, finish
        else:
            later = {letter for t in (*terms[i + 1 :], to) for letter in t.letters}
            kept = [n for n in dict.fromkeys((*left.letters, *right.letters)) if n in later]
            made, done = Term(tuple(kept), w.scratch(f32, [sizes[n] for n in kept], "product")), Finish()
        x, y = (replace(t, view=_widened(w, t.view)) for t in (left, right))
        _MatrixProduct(w, node, sizes, x, y, made, done).emit()
        left = made


def _converted(chain: Chain, dtype: DType) -> Chain:
    """A chain over float32 on a first input of another dtype."""
    if chain.inputs[0] == dtype.name:
        return chain
    old = len(chain.inputs)
    moved = [
        replace(i, operands=tuple(old if p == 0 else p + (p >= old) for p in i.operands)) for i in chain.instructions
    ]
    return Chain((dtype.name, *chain.inputs[1:]), (Instruction("cast", (0,), chain.inputs[0]), *moved))


def _without_lone(
    w: RoutineWriter, node: Node, terms: Sequence[Term], at: int, to: Term, sizes: Mapping[str, Size]
) -> Term:
    """A term summed over the letters that it alone has."""
    others = {letter for i, t in enumerate((*terms, to)) if i != at for letter in t.letters}
    kept = tuple(letter for letter in terms[at].letters if letter in others)
    if kept == terms[at].letters:
        return terms[at]
    made = Term(kept, w.scratch(f32, [sizes[n] for n in kept], "sums"))
    _contract_terms(w, node, [terms[at]], made, sizes, "letters of one operand are summed element by element")
    return made


def _widened(w: RoutineWriter, view: View) -> View:
    """A view in float32."""
    if view.dtype is f32:
        return view
    made = w.scratch(f32, view.shape, f"{view.buffer.name}_wide")
    w.pointwise(Chain((view.dtype.name,), (Instruction("cast", (0,), "f32"),)), [view], made, None)
    return made


def _in_panels(w: RoutineWriter, node: Node, value: Value, equation: Equation) -> View | None:
    """A parameter in the panels that a product reads, if the product is one that reads it so."""
    n = equation.result[-1] if equation.result else None
    if value.type.rank != 2 or n is None or n not in equation.operands[1]:
        return None
    transposed = equation.operands[1][1] == n
    return w.panels(value, Panels(panel_width(equation.sizes[n].constant, w.isa), transposed))


class _MatrixProduct:
    """One product of two terms as a step, with the copies that it needs.

    packed   whether y is a matrix in panels
    """

    def __init__(
        self,
        w: RoutineWriter,
        node: Node,
        sizes: Mapping[str, Size],
        x: Term,
        y: Term,
        to: Term,
        finish: Finish,
        packed: bool = False,
    ) -> None:
        self.w, self.node, self.sizes, self.packed = w, node, sizes, packed
        self.chain, self.extras = finish.chain, list(finish.extras)
        self.x, self.y, self.to, self.c = x, y, to, to
        self.column = self._column()
        if self.column in x.letters:
            self.x, self.y = y, x
        letters, own, other = to.letters, set(self.x.letters), set(self.y.letters)
        self.k = [n for n in self.x.letters if n in other and n not in letters]
        self.rows = [n for n in letters if n in own and n not in other]
        self.batch = [n for n in letters if n in other and n != self.column]

    def _column(self) -> str | None:
        """The letter of the columns: of one operand alone, and if possible with elements side by side in the result."""
        if self.packed:
            return next(n for n in reversed(self.to.letters) if n in self.y.letters)
        alone = [n for n in self.to.letters if (n in self.x.letters) != (n in self.y.letters)]
        near = [n for n in alone if self.to.stride(n) == ONE and self.sizes[n] != ONE]
        return (near or alone or [None])[-1]

    # -- parts -----------------------------------------------------------------------------------------------

    def emit(self) -> None:
        columns = [self.column] if self.column is not None else []
        if columns and self.to.stride(self.column) != ONE and self.sizes[columns[0]] != ONE:
            self._store_elsewhere()
        self._lay_out_k()
        if not self.batch:
            self._join_rows()
            groups: list[list[str]] = []
        else:
            groups = self._join_batch()
            if len(groups) > 2:
                groups = self._copy_all()
        self._step(groups)
        if self.c is not self.to:
            self.w.copy(self.c.over(self.to.letters, self.sizes), self.to.view, None)

    @property
    def _written(self) -> list[Term]:
        return [self.c, *self.extras]

    def _store_elsewhere(self) -> None:
        """Have the product written to memory of its own, and copied from there."""
        order = [n for n in self.to.letters if n != self.column] + ([self.column] if self.column is not None else [])
        order = [n for n in order if n in self.batch] + [n for n in order if n not in self.batch]
        made = self.w.scratch(self.to.view.dtype, [self.sizes[n] for n in order], "product")
        self.c = Term(tuple(order), made)

    def _lay_out_k(self) -> None:
        """Have x's summed letters side by side, and y's joined in the same order."""
        y_order = [n for n in self.y.letters if n in self.k]
        near = lambda order: self._is_one(self.x.joined(order, self.sizes), order)  # noqa: E731
        if near(self.k) and self.y.joined(self.k, self.sizes) is None and near(y_order):
            self.k = y_order
        if not near(self.k):
            if self.y.joined(self.k, self.sizes) is None:
                self.k = y_order
            held = [n for n in self.to.letters if n in self.x.letters and self.x.stride(n) != ZERO]
            held = [n for n in held if n not in self.rows] + [n for n in held if n in self.rows]
            self.x = self.x.copied(self.w, [*held, *self.k], self.sizes)
        if not self.packed and self.y.joined(self.k, self.sizes) is None:
            held = [n for n in self.to.letters if n in self.y.letters and n != self.column]
            held = [n for n in held if self.y.stride(n) != ZERO]
            columns = [self.column] if self.column is not None else []
            self.y = self.y.copied(self.w, [*held, *columns, *self.k], self.sizes)

    def _is_one(self, stride: Size | None, order: Sequence[str]) -> bool:
        return stride is not None and (stride == ONE or product(self.sizes[n] for n in order) == ONE)

    def _join_rows(self) -> None:
        """Have all rows at one distance, in copies of what has them not: y is the same for all of them."""
        if self.x.joined(self.rows, self.sizes) is None:
            self.x = self.x.copied(self.w, [*self.rows, *self.k], self.sizes)
        if self.c.joined(self.rows, self.sizes) is None:
            self._store_elsewhere()
        columns = [self.column] if self.column is not None else []
        for i, extra in enumerate(self.extras):
            if extra.joined(self.rows, self.sizes) is None or not self._in_line(extra):
                self.extras[i] = extra.copied(self.w, [*self.rows, *columns], self.sizes)

    def _in_line(self, extra: Term) -> bool:
        """Whether an extra has its columns side by side, or repeats one."""
        return extra.stride(self.column) in (ZERO, ONE) or self.sizes[str(self.column)] == ONE

    def _join_batch(self) -> list[list[str]]:
        """The letters of each batch dimension; rows that do not join are given to them."""
        columns = [self.column] if self.column is not None else []
        for i, extra in enumerate(self.extras):
            if not self._in_line(extra):
                self.extras[i] = extra.copied(self.w, [n for n in self.to.letters if n not in columns] + columns, self.sizes)
        start = 0
        while any(t.joined(self.rows[start:], self.sizes) is None for t in (self.x, *self._written)):
            start += 1
        outer = self.rows[:start]
        self.rows = self.rows[start:]
        self.batch = [n for n in self.to.letters if n in self.batch or n in outer]
        groups = [[n] for n in self.batch if self.sizes[n] != ONE]
        at = 0
        while at + 1 < len(groups):
            both = groups[at] + groups[at + 1]
            if all(t.joined(both, self.sizes) is not None for t in (self.x, self.y, *self._written)):
                groups[at : at + 2] = [both]
            else:
                at += 1
        return groups

    def _copy_all(self) -> list[list[str]]:
        """All terms in memory of their own, with every batch letter in one order."""
        columns = [self.column] if self.column is not None else []
        self.x = self.x.copied(self.w, [*self.batch, *self.rows, *self.k], self.sizes)
        self.y = self.y.copied(self.w, [*self.batch, *columns, *self.k], self.sizes)
        order = [*self.batch, *self.rows, *columns]
        if self.c.letters != tuple(order) or not self.c.view.is_contiguous:
            self.c = Term(tuple(order), self.w.scratch(self.to.view.dtype, [self.sizes[n] for n in order], "product"))
        self.extras = [extra.copied(self.w, order, self.sizes) for extra in self.extras]
        return [self.batch]

    # -- the step --------------------------------------------------------------------------------------------

    def _step(self, groups: list[list[str]]) -> None:
        w, sizes = self.w, self.sizes
        m, k = (product(sizes[n] for n in part) for part in (self.rows, self.k))
        n = sizes[self.column] if self.column is not None else ONE
        counts = [product(sizes[n] for n in group) for group in groups]
        counts = [ONE] * (2 - len(counts)) + counts

        def joined(term: Term, letters: Sequence[str]) -> Size:
            found = term.joined(letters, sizes)
            assert found is not None
            return found

        def batch(term: Term) -> list[Size]:
            return [ZERO] * (2 - len(groups)) + [joined(term, group) for group in groups]

        if self.packed:
            panels, width = self.y.view, panel_width(n.constant, w.isa)
            w_batch = [ZERO, ZERO]
        else:
            width = panel_width(n.constant, w.isa)
            panels, w_batch = self._pack(width, n, k, counts, batch(self.y), joined(self.y, self.k))
        how, rows = [], []
        for extra in self.extras:
            row = joined(extra, self.rows) if m != ONE else ZERO
            near = self.column is None or n == ONE or extra.stride(self.column) == ONE
            how.append(("n" if near else "1") if row == ZERO else "mn" if near else "m")
            rows += [row] if row != ZERO else []
        whole = n.constant is not None and n.constant % width == 0
        kernel = Matmul(width, self.chain, tuple(how), bool(groups), whole)
        given: list[Size] = [m, k, n]
        given += [joined(self.x, self.rows), *rows, joined(self.c, self.rows)]
        if groups:
            given += counts
            for strides in (batch(self.x), w_batch, *[batch(e) for e in self.extras], batch(self.c)):
                given += strides
        pointers = [self.x.view, panels, *[e.view for e in self.extras], self.c.view]
        w.step(kernel, pointers, given, self.node)

    def _pack(
        self, width: int, n: Size, k: Size, counts: list[Size], strides: list[Size], k_stride: Size
    ) -> tuple[View, list[Size]]:
        """y in panels, for each part of the batch over which it differs, and how far apart these lie."""
        layout = Panels(width)
        one = layout.elements((n, k))
        own = [count if stride != ZERO else ONE for count, stride in zip(counts, strides, strict=True)]
        view = self.y.view
        buffer = Buffer(self.w._new_name(f"{view.buffer.name}_panels"), f32, one * own[0] * own[1], "local")
        made = View.contiguous(buffer, (buffer.elements,))
        sizes = [n, k, self.y.stride(self.column), k_stride, *own, *strides]
        self.w.step(Pack(width), [view, made], sizes, self.node)
        apart = [one * own[1], one]
        return made, [a if stride != ZERO else ZERO for a, stride in zip(apart, strides, strict=True)]


_RULE: Callable[[RoutineWriter, Node], None] = _product
RULES: Mapping[str, Rule] = {name: _RULE for name in ("linear", "matmul", "einsum")}
KEEPS: Mapping[str, Keeps] = {}
