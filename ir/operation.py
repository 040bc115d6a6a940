"""Ops: one class per op, which defines all of its properties.

    @op("rms_norm", axes="... [d], d -> ... [d]", dtypes="f, f -> f", linear="")
    class RMSNorm(Composite):
        \"\"\"y = x / sqrt(mean(x^2 over d) + eps) * weight        (Zhang & Sennrich 2019)\"\"\"
        x = Operand()
        weight = Operand()
        eps: float = 1e-6                                     # annotated fields are attributes

        def body(self, b, x, weight): ...                     # in primitives: cost, sharding, refusals come from here
        def reference(self, x, weight): ...                   # NumPy; THE meaning
        def gradient(self, b, grads, inputs, outputs): ...    # builds IR; a composite's default differentiates its body
        samples = [S("f32[2,3,8]", "f32[8]"), ...]
        errors = [(S("f32[2,8]", "f32[7]"), "axis d sizes disagree"), ...]

An instance is the op with its attributes, frozen and hashable; a `Node` applies it to values. A **primitive** has one
axis rule and names the operands it is linear in. A **composite** has, in addition, a body of primitives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from treadle.ir.attribute_values import as_tuple, coerced, evaluated, has_size, in_words, substituted
from treadle.ir.axes import Application, AxisDim, Role, Rule
from treadle.ir.encodings.encoding import Encoding
from treadle.ir.errors import GraphError, RuleError
from treadle.ir.rules.axis_rule_text import parse_rule
from treadle.ir.rules.block_rules import encoded_type, moved_encoding, unread_blocks
from treadle.ir.rules.dtype_rules import infer_dtypes
from treadle.ir.samples import Sample
from treadle.ir.sizing.sizes import Size, SizeLike
from treadle.ir.types import DType, Type, f64

if TYPE_CHECKING:
    from treadle.ir.builder import Builder, Expr
    from treadle.ir.graph import Value
    from treadle.ir.layouts import Layout
    from treadle.ir.stepping import Held, Kept, Stepping
    from treadle.ir.storage.views import View
Array = np.ndarray[Any, Any]
Grads = Sequence[Any]
"""One entry per operand or result: an Expr, or None if it is absent or has no gradient."""
X = TypeVar("X")
Demand = tuple[Size, str]
"""A size that must not be negative, and the error message if it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """A declaration of an op's operand. Operands are ordered as declared. A variadic operand is the last and takes one
    or more values, or, if it is optional, any number.
    """

    optional: bool = False
    variadic: bool = False


class Op:
    """Base of all ops. See `Primitive`, `Composite` and `op`."""

    name: ClassVar[str]
    operands: ClassVar[Mapping[str, Operand]] = {}
    arity: ClassVar[tuple[tuple[tuple[int, str], ...], int | None]] = ((), 0)
    """The positions and names of the required operands, and the largest number of operands (None: any number)."""
    rule_text: ClassVar[str | None] = None
    dtype_text: ClassVar[str | None] = None
    linear_text: ClassVar[str] = ""
    flops: ClassVar[int] = 1
    accumulates: ClassVar[DType | None] = None
    """For an op that sums elements: the narrowest dtype in which it accumulates, whatever the dtype of the elements.
    Sums are rounded to the result's dtype once, in the reference, the body, the gradient and every backend. The
    reason is that f16 and bf16 cannot count past 2048 and 256. None: the op does not sum elements.
    """
    step: ClassVar[str | None] = None
    """For an op that scans or generates an axis: a description of how a generation step continues that axis ("carries
    the running sum"). None if the op has no step form.
    """
    pairs: ClassVar[tuple[str, str] | None] = None
    """For self-attention: the factors of queries and keys, which may be located in the same axis."""
    reads_slots: ClassVar[frozenset[str]] = frozenset()
    """The operands that a generation step reads directly from a state, at the slots of the step's rows, without a
    copy.
    """
    commutes: bool = False
    """True if it is commutative: f(x, y) = f(y, x)."""
    updates: Mapping[int, int] = MappingProxyType({})
    """Results that are updates, and the updated operands: {0: 0} if the result is an updated version of the first
    operand. If the operand is a state, the op changes the state, and no node reads the old version. If the operand
    is any other value, the result is a new value.
    """
    moves_blocks: ClassVar[bool] = False
    """True if the op passes on the blocks of encoded operands, provided that it leaves the blocks' axis unchanged. The
    op's reference then works on arrays of blocks as well. Any other op refuses encoded operands.
    """
    decodes: ClassVar[bool] = False
    """True if its result is the decoded operand: a decoded weight is the weight for every pass."""
    callee: str | None = None
    meets_ranks: bool = False
    """True if ranks of a mesh communicate in the op: all ranks must run it, equally often and in the same order. So
    the op is never removed, merged with another, or run once for all calls.
    """
    is_word: ClassVar[bool] = True
    """True if a model may call the op. False for calls and relayouts, which tracing and passes add to graphs."""
    stops_gradient: ClassVar[bool] = False
    """True for an op through which no gradient flows: its results are piecewise constant (floor, a comparison), or
    depend on no element of its operands (iota). Any other primitive defines `gradient`.
    """
    samples: ClassVar[Sequence[Sample]] = ()
    errors: ClassVar[Sequence[tuple[Sample, str]]] = ()

    def called_in(self, functions: Mapping[str, X]) -> X | None:
        """Return the mapping's entry for the function that the op calls. Return None if the op calls no function, or a
        function that is not in the mapping.
        """
        return None if self.callee is None else functions.get(self.callee)

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        for field in fields:
            value = getattr(self, field.name)
            try:
                made = coerced(str(field.type), value)
            except (TypeError, ValueError):
                first = getattr(self, next(each.name for each in fields if each.type == field.type))
                count = len(first) if isinstance(first, tuple) else 0  # as many as the kernel of a pooling has
                raise GraphError(
                    f"{self.name}: {field.name} must be {in_words(str(field.type))}, is {value!r}",
                    hint=as_tuple(field.name, str(field.type), value, count),
                ) from None
            if made is not value:
                object.__setattr__(self, field.name, made)  # the dataclass is frozen

    # -- optional definitions beyond the class line ------------------------------------------------------------

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        """Return the axis rule as text: a pure function of the attributes and the operands' ranks (None for an absent
        operand).
        """
        if self.rule_text is None:
            raise GraphError(f"op {self.name} has no axis rule")
        return self.rule_text

    @property
    def keys_in_parts(self) -> tuple[str, str] | None:
        """Factors of queries and of keys, for an op that may be computed for one part of the keys after the other
        (`on_keys`). Ranks may then hold a part of the queries and a part of the keys each, and pass the parts of the
        keys around. None for any other op.
        """
        return None

    def multiples(self, types: Sequence[Type | None], application: Application) -> Mapping[str, int]:
        """Return the factors that the axis rule marks as whole, but that the op can process in parts that begin and end
        between blocks. Each is mapped to the number of elements in a block.
        """
        return {}

    def dtypes(self) -> str:
        """Return the dtype rule, such as `"f, i -> f"`; see `treadle.ir.rules.dtype_rules`."""
        if self.dtype_text is None:
            raise GraphError(f"op {self.name} has no dtype rule")
        return self.dtype_text

    def check(self, types: Sequence[Type | None]) -> None:
        """Raise RuleError for errors that the axis and dtype rules do not detect, such as an attribute out of range."""

    def result_layout(self, index: int) -> Layout | None:
        """Return the layout of a result; None is row-major."""
        return None

    def encodings(self, types: Sequence[Type | None], application: Application) -> Sequence[Encoding | None]:
        """Return the encoding of each result, None if it has none. Raises RuleError for an encoded operand that the op
        does not accept.
        """
        if all(t is None or t.encoding is None for t in types):
            return (None,) * len(application.shapes)
        names = self.operand_names(len(types))
        if not self.moves_blocks:
            raise unread_blocks(self.name, names, types)
        moved = [i for i, n in enumerate(names) if types[i] is not None and names_operand(self.moved_operands, n)]
        given = self.rule([None if t is None else t.rank for t in types]).known_sizes
        return [moved_encoding(self.name, names, types, application, moved, given)]

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        """Return the result as a view of the op's one operand. Return None if no strides express it, or if the op is
        not a view.
        """
        return None

    def part_of(self, y: View, types: Sequence[Type | None], position: int) -> View | None:
        """Return the view of the operand at `position` as a part of the result, which is stored in y. Return None if no
        strides express it.

        All of the operand's elements are elements of the result: if they are written there, they need not be moved.
        """
        return None

    def repeats(self, types: Sequence[Type | None]) -> tuple[int, ...]:
        """Return the axes of the result along which all elements are equal, whatever the operands hold."""
        return ()

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        """Return the sizes that must not be negative for the op to be defined, such as S - 4 if an axis of size S is
        split at 4.

        The method is called after `check`. `infer` refuses a negative constant. A symbolic size is checked at each
        call, when the sizes of its symbols are known.
        """
        return ()

    def reference(self, *operands: Any) -> Any:
        """Compute the op in NumPy, which defines its meaning. Operands are arrays, or None if absent. Return an array
        or a tuple of arrays.

        The reference works in the operands' precision, float64 included. It may allocate and be slow. Attributes that
        are sizes are constants here.
        """
        raise GraphError(f"op {self.name} has no reference")

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """Return the gradient of a scalar with respect to each operand, from the gradients of the results (None: zero).

        inputs and outputs are the operands and results of the op. Returns one entry per operand: an Expr of the
        operand's type, or None if no gradient flows to it. Raises GraphError, with the user's line, if the op neither
        defines `gradient` nor sets `stops_gradient`.
        """
        if self.stops_gradient:
            return [None] * len(inputs)
        raise GraphError(
            f"op {self.name} has no gradient: its class does not define `gradient`",
            source=b.place(),
            hint=f"define `gradient` in {type(self).__name__}, or `stops_gradient = True` if its result is constant "
            "between steps",
        )

    @property
    def positional(self) -> frozenset[str]:
        """The factors whose positions the op reads: attention's s and t under a causal mask.

        For such a factor, mapping guarantees less: restricting the factor to a prefix commutes with the op, but
        permuting it or taking another part of it need not.
        """
        return frozenset()

    @property
    def moved_operands(self) -> frozenset[str]:
        """The operands whose elements the op passes on unchanged: its linear operands, if it does no arithmetic."""
        return frozenset().union(*self.linear) if self.flops == 0 else frozenset()

    def resized(self, sizes: Mapping[str, Size], types: Sequence[Type | None]) -> Op | None:
        """Return the op for operands of these types, of which it computes a part: the factors in `sizes` have other
        sizes.

        Returns None if there is no such op, by default if one of these sizes is an attribute of the op.
        """
        given = self.rule([None if t is None else t.rank for t in types]).known_sizes
        return None if given.keys() & sizes.keys() else self

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], states: Held) -> Any:
        """Build the op's form in a generation step with `step.b`. Returns an Expr, or a tuple of Exprs, as `body` does.

        The method is called for an op that scans or generates the tokens' axis, that reads positions of it other than
        its own, or that has an operand in a state that the prologue computed. If a result's values now depend on the
        row, as positions do, the result has one more dimension than before: the rows of the step, in front of all
        others.

        operands   the operands in the step, which cover the added tokens, or `Kept`
        states     for each operand, its dimensions that are the tokens' axis

        Returns None if the op has no step form, as by default.
        """
        return None

    def on_part(self, factor: str, start: Size) -> Op | None:
        """Return the op for a part of a mapped factor that begins at `start`, if the op reads positions along that
        factor.

        Returns None if the op has no such form, as by default.
        """
        return None

    def flops_at(self, types: Sequence[Type | None], values: Mapping[str, int]) -> int | None:
        """Return the number of floating-point operations on operands of these types, for given values of symbols.

        Returns None if the operations should be counted from the rule or the body. Any other result overrides that
        count, for an op whose work is not a product of its factors.
        """
        return None

    # -- derived properties ------------------------------------------------------------------------------------

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes by name, in order."""
        return {name: getattr(self, name) for name in self._attribute_names()}

    @classmethod
    @cache
    def _attribute_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def attribute_defaults(cls) -> dict[str, Any]:
        """Return the default values of the attributes that have one, by name."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}

    def operand_names(self, count: int) -> list[str]:
        """Return a unique name for each of `count` operands; the names of a variadic operand are numbered."""
        names = [n for n, o in self.operands.items() if not o.variadic]
        variadic = [n for n, o in self.operands.items() if o.variadic]
        if variadic:
            names += [f"{variadic[0]}{i}" for i in range(count - len(names))]
        return names

    @classmethod
    def arrange(cls, arguments: Sequence[Any]) -> list[Any]:
        """Pad absent optional operands with None and return the operands. Raises GraphError if their number is
        wrong.
        """
        operands = list(arguments)
        required, most = cls.arity
        if len(operands) != most:
            fixed = len(cls.operands) if most is not None else len(cls.operands) - 1
            operands += [None] * (fixed - len(operands))
            if most is not None and len(operands) > most:
                raise GraphError(f"{cls.name} takes {most} operand{'s' * (most != 1)}, received {len(operands)}")
            if most is None and len(operands) == fixed and not list(cls.operands.values())[-1].optional:
                raise GraphError(f"{cls.name} takes one operand or more")
        for position, name in required:
            if operands[position] is None:
                raise GraphError(f"{cls.name}: operand {name} is missing")
        return operands

    @classmethod
    def make(cls, **attributes: Any) -> Op:
        """Return the op with these attributes. Equal attributes give the same object, so that its cached properties are
        found fast.

        Raises TypeError for an unknown attribute, GraphError or RuleError for a wrong value.
        """
        if not attributes:
            return _interned(cls, (), ())  # type: ignore[arg-type]
        zeros = tuple([str(v) for v in attributes.values() if type(v) is float and v == 0.0])  # since 0.0 == -0.0
        try:
            return _interned(cls, tuple(attributes.items()), zeros)  # type: ignore[arg-type]  # a class has a hash
        except TypeError:  # an attribute given as a list, or an unknown one
            return cls(**attributes)

    def rule(self, ranks: Sequence[int | None]) -> Rule:
        """Return the parsed axis rule for operands of these ranks."""
        return parse_rule(self.axis_rule(ranks))

    def apply(self, types: Sequence[Type | None]) -> Application:
        """Match the axis rule against operand types and return the application, which is cached. Raises RuleError if
        they do not match.
        """
        key = tuple([None if t is None else t.text for t in types])  # labels distinguish equal types
        found = self._applied.get(key)
        if found is None:
            rule = self.rule([None if t is None else t.rank for t in types])
            found = self._applied[key] = rule.apply(types, self.operand_names(len(types)))
        return found

    @cached_property
    def _applied(self) -> dict[tuple[str | None, ...], Application]:
        return {}

    def infer(self, types: Sequence[Type | None]) -> tuple[Type, ...]:
        """Return the results' types. Raises RuleError, prefixed with the op's name, if the operands do not match."""
        key = tuple([None if t is None else t.text for t in types])  # labels distinguish equal types
        found = self._inferred.get(key)
        if found is None:
            found = self._inferred[key] = self._infer(types)
        return found

    def infer_for(self, operands: Sequence[Value | None]) -> tuple[Type, ...]:
        """Return the result of `infer` for the operands' types. It is called for every node, so it looks in the cache
        before it calls `infer`.
        """
        found = self._inferred.get(tuple([None if v is None else v.type.text for v in operands]))
        return self.infer([None if v is None else v.type for v in operands]) if found is None else found

    @cached_property
    def _inferred(self) -> dict[tuple[str | None, ...], tuple[Type, ...]]:
        return {}

    def _infer(self, types: Sequence[Type | None]) -> tuple[Type, ...]:
        try:
            self.check(types)
            for size, otherwise in self.demands(types):
                if size.constant is not None and size.constant < 0:
                    raise RuleError(otherwise)
            names = self.operand_names(len(types))
            dtypes = infer_dtypes(self.dtypes(), [None if t is None else t.dtype for t in types], names)
            found = self.apply(types)
            encodings = self.encodings(types, found)
            made = [encoded_type(d, s, e) for d, s, e in zip(dtypes, found.shapes, encodings, strict=True)]
        except RuleError as error:
            received = ", ".join(
                f"{n}: {t}" for n, t in zip(self.operand_names(len(types)), types, strict=True) if t is not None
            )
            raise RuleError(
                f"{self.name}: {error.what}",
                received=error.received or received,
                within=error.within,
                hint=error.hint,
            ) from None
        return tuple(made)

    # -- facts that follow from the above; tests/test_op_facts.py verifies each against computed results ---------------

    @property
    def only_moves(self) -> bool:
        """True if every element of the results is an unchanged element of an operand, and none is filled in.

        Sizes or other operands (indices, the condition of `where`) only select which element it is.
        """
        return bool(self.moved_operands)

    @property
    def is_view(self) -> bool:
        """True if the op only moves the elements of its one operand, to locations that follow from sizes alone:
        rearrange, expand, slice.

        The result may then share the operand's memory, if strides can express it.
        """
        return self.only_moves and len(self.operands) == 1 and self.arity[1] == 1

    @property
    def reads_positions(self) -> bool:
        """True if results depend on the positions of elements, and not only on their values: iota, a causal mask."""
        return bool(self.positional)

    def lookahead(self, types: Sequence[Type | None]) -> Sequence[int | None] | None:
        """Return, for each operand, the lookahead along the op's attribute `axis`: the greatest n for which position i
        of the result may read position i + n of the operand, negative if it only reads earlier positions. None for an
        operand means that there is no such n. By default return None: the op does not move an axis of that name.
        """
        return None

    def is_elementwise(self, ranks: Sequence[int | None]) -> bool:
        """Return True if, by the axis rule, each element of the result depends on one element of each operand."""
        return self.callee is None and self.rule(ranks).is_elementwise

    def is_contraction(self, ranks: Sequence[int | None]) -> bool:
        """Return True if the op is a product that sums over an axis of two operands: matmul, linear, an einsum of two.

        By the axis rule, a summed factor is in two operands and in no result. The op is linear in each of these two
        operands if the other does not change. (attention has such a sum, but is linear in its values alone.)
        """
        return len(self.linear) > 1 and self.rule(ranks).sums_products

    def is_multilinear(self, count: int) -> bool:
        """Return True if the op is linear in each of `count` operands if the others do not change."""
        return all(any(names_operand(group, n) for group in self.linear) for n in self.operand_names(count))

    def in_place(self, types: Sequence[Type | None]) -> tuple[int, ...]:
        """Return the positions of the operands whose memory the result may overwrite while it is computed.

        Such an operand has the result's type. Each of its elements is read only for the result's element at the same
        position: all factors of its dimensions are mapped, and the result has the same factors.
        """
        (made, *others), found = self.infer(types), self.apply(types)
        if others:
            return ()

        def is_mapped(dim: AxisDim) -> bool:
            return dim.size is None and all(found.factors[name].role is Role.MAPPED for name in dim.factors)

        def fits(type: Type | None, dims: Sequence[AxisDim] | None) -> bool:
            alike = type is not None and (type.dtype, type.shape) == (made.dtype, made.shape)
            return alike and dims == found.results[0] and all(map(is_mapped, dims))

        return tuple(i for i, (t, dims) in enumerate(zip(types, found.operands, strict=True)) if fits(t, dims))

    @property
    def linear(self) -> tuple[frozenset[str], ...]:
        """Groups of operands. The op is linear in each group together if all other operands do not change."""
        return _operand_groups(self.linear_text)

    def sums_in(self, dtype: DType) -> DType:
        """Return the dtype in which sums that are rounded to `dtype` are accumulated: `dtype` or `accumulates`,
        whichever is more precise.
        """
        least = self.accumulates
        return least if least is not None and dtype.is_float and dtype.bytes < least.bytes else dtype

    def at(self, values: Mapping[str, int]) -> Op:
        """Return the op with its symbolic sizes evaluated."""
        if not self._has_size:
            return self
        changed = {n: evaluated(v, values) for n, v in self.attributes.items() if has_size(v)}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    @cached_property
    def _has_size(self) -> bool:
        return any(map(has_size, self.attributes.values()))

    def substitute(self, values: Mapping[str, SizeLike]) -> Op:
        """Return the op with symbols in its attributes replaced by sizes."""
        changed = {n: substituted(v, values) for n, v in self.attributes.items() if has_size(v)}
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[type-var]

    def in_float64(self) -> Op:
        """Return the op with f64 in place of every float dtype among its attributes. A cast to f16, for example, then
        does not round.
        """
        widened = self._widened
        return self if widened is None else widened

    @cached_property
    def _widened(self) -> Op | None:
        changed = {n: f64 for n, v in self.attributes.items() if isinstance(v, DType) and v.is_float}
        return dataclasses.replace(self, **changed) if changed else None  # type: ignore[type-var]

    def __str__(self) -> str:
        return self.name


class Primitive(Op):
    """An op with one axis rule, and its own reference and gradient."""


class Composite(Op):
    """An op with a body of primitives (or simpler composites), from which all other properties can be derived."""

    def body(self, b: Builder, *operands: Any) -> Any:
        """Build the op from simpler ops. Operands are Exprs, or None if absent. Return an Expr or a tuple of Exprs."""
        raise GraphError(f"composite op {self.name} has no body")

    def lowering(self, b: Builder, *operands: Any) -> Any:
        """Build the form that a backend without a kernel for the op lowers: the body, or an equivalent that runs
        faster.
        """
        return self.body(b, *operands)

    def reference(self, *operands: Any) -> Any:
        from treadle.ir.interpreter import interpret_body

        return interpret_body(self, operands)

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        from treadle.ir.transforms.differentiate import body_gradient

        return body_gradient(self, b, grads, inputs)


@lru_cache(maxsize=256)
def _operand_groups(text: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(group.split()) for group in text.split("|") if group.strip())


def names_operand(group: frozenset[str], name: str) -> bool:
    """Return True if a group of `Op.linear` or `Op.moved_operands` contains this operand name. The names of a variadic
    operand's values are numbered; the group contains the name without the number.
    """
    return name in group or name.rstrip("0123456789") in group


@lru_cache(maxsize=8192)
def _interned(cls: type[Op], attributes: tuple[tuple[str, Any], ...], zeros: tuple[str, ...]) -> Op:
    return cls(**dict(attributes))
