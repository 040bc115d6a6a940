"""Ops: a class that says everything about one operation, in one place.

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
axis rule and names the operands it is linear in. A **composite** has a body of primitives as well.
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
"""One entry an operand or result: an Expr, or None where it is absent or has no gradient."""
X = TypeVar("X")
Demand = tuple[Size, str]
"""A size that must not be negative, and what is wrong where it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """Declares an operand of an op, in order. A variadic one is last and takes one or more values, or, if it is
    optional, any number."""

    optional: bool = False
    variadic: bool = False


class Op:
    """Base of all ops. See `Primitive`, `Composite` and `op`."""

    name: ClassVar[str]
    operands: ClassVar[Mapping[str, Operand]] = {}
    arity: ClassVar[tuple[tuple[tuple[int, str], ...], int | None]] = ((), 0)
    """The positions and names of the operands that must be there, and the most there may be (None: any number)."""
    rule_text: ClassVar[str | None] = None
    dtype_text: ClassVar[str | None] = None
    linear_text: ClassVar[str] = ""
    flops: ClassVar[int] = 1
    accumulates: ClassVar[DType | None] = None
    """For an op that adds elements up: sums are held in this dtype at least, whatever the terms are, and rounded to the
    result's dtype once. The reference, the body, the gradient and every backend keep to it: f16 and bf16 cannot count
    past 2048 and 256. None: it adds up no elements."""
    step: ClassVar[str | None] = None
    """How an axis that it scans or generates goes on in a generation step ("carries the running sum"); None: not."""
    pairs: ClassVar[tuple[str, str] | None] = None
    """For self-attention: the factors of queries and keys, which one axis may be at once."""
    reads_slots: ClassVar[frozenset[str]] = frozenset()
    """The operands that it reads from a state at a step, by the slots of its rows, without a copy of them."""
    commutes: bool = False
    """Whether its two operands may change places: f(x, y) = f(y, x)."""
    updates: Mapping[int, int] = MappingProxyType({})
    """Which results are updates, of which operands: {0: 0} of an op whose result is its first operand, changed. Given a
    state, it changes the state, and nobody reads what was before; given any other value, it makes a new one."""
    moves_blocks: ClassVar[bool] = False
    """Whether it hands on the blocks of encoded operands, where it leaves the axis along which they lie as it is. Its
    reference then acts on held arrays as on others. An op that does not refuses what is encoded."""
    decodes: ClassVar[bool] = False
    """Whether its result is what its encoded operand means: of a weight, it is the weight to every pass."""
    callee: str | None = None
    meets_ranks: bool = False
    """Whether ranks of a mesh meet in it: each counts on all others to come, as often and in the same order. So it is
    never dropped, joined with another, or done once for all calls."""
    is_word: ClassVar[bool] = True
    """Whether a model may say it; calls and relayouts are put into graphs by tracing and by passes."""
    stops_gradient: ClassVar[bool] = False
    """True for an op through which no gradient flows: its results are constant between steps (floor, a comparison), or
    depend on no element of its operands (iota). Any other primitive defines `gradient`."""
    samples: ClassVar[Sequence[Sample]] = ()
    errors: ClassVar[Sequence[tuple[Sample, str]]] = ()

    def called_in(self, functions: Mapping[str, X]) -> X | None:
        """What a mapping by name has for the function that it calls; None where it calls none, or one not there."""
        return None if self.callee is None else functions.get(self.callee)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            try:
                made = coerced(str(field.type), value)
            except (TypeError, ValueError):
                raise GraphError(
                    f"{self.name}: {field.name} must be {in_words(str(field.type))}, is {value!r}",
                    hint=as_tuple(field.name, str(field.type), value),
                ) from None
            if made is not value:
                object.__setattr__(self, field.name, made)  # the dataclass is frozen

    # -- what an op may say beyond its class line --------------------------------------------------------------

    def axis_rule(self, ranks: Sequence[int | None]) -> str:
        """The axis rule as text; a pure function of the attributes and the operands' ranks (None: absent)."""
        if self.rule_text is None:
            raise GraphError(f"op {self.name} has no axis rule")
        return self.rule_text

    @property
    def keys_in_parts(self) -> tuple[str, str] | None:
        """Factors of queries and of keys, of an op that may be computed for parts of the keys one after the other
        (`on_keys`): ranks then have parts of both, and pass those of the keys around."""
        return None

    def multiples(self, types: Sequence[Type | None], found: Application) -> Mapping[str, int]:
        """Factors that it needs whole by its rule, and of which it works on parts that lie between blocks: of how many
        elements a block is."""
        return {}

    def dtypes(self) -> str:
        """The dtype rule, such as `"f, i -> f"`; see `treadle.ir.rules.dtype_rules`."""
        if self.dtype_text is None:
            raise GraphError(f"op {self.name} has no dtype rule")
        return self.dtype_text

    def check(self, types: Sequence[Type | None]) -> None:
        """Raise RuleError for what the rules cannot say (an attribute out of range, ...)."""

    def result_layout(self, index: int) -> Layout | None:
        """The layout in which the op leaves a result; None is row-major."""
        return None

    def encodings(self, types: Sequence[Type | None], found: Application) -> Sequence[Encoding | None]:
        """The encodings of its results, whose axes `found` tells. Raises RuleError for an encoded operand that it does
        not take."""
        if all(t is None or t.encoding is None for t in types):
            return (None,) * len(found.shapes)
        names = self.operand_names(len(types))
        if not self.moves_blocks:
            raise unread_blocks(self.name, names, types)
        moved = [i for i, n in enumerate(names) if types[i] is not None and names_operand(self.moved, n)]
        given = self.rule([None if t is None else t.rank for t in types]).given
        return [moved_encoding(self.name, names, types, found, moved, given)]

    def viewed(self, x: View, types: Sequence[Type | None]) -> View | None:
        """Its result as a view of where its one operand lies; None where no strides say it, or the op is no view."""
        return None

    def part_of(self, y: View, types: Sequence[Type | None], position: int) -> View | None:
        """Where an operand would lie as a part of the result, which lies in y; None where no strides say it.

        All of the operand's elements are elements of the result: written there, they need not be moved.
        """
        return None

    def repeats(self, types: Sequence[Type | None]) -> tuple[int, ...]:
        """The axes of its result along which all elements are alike, whatever the operands hold."""
        return ()

    def demands(self, types: Sequence[Type | None]) -> Sequence[Demand]:
        """What sizes must be for the op to be defined: S - 4 not negative, where an axis of size S is cut at 4.

        Asked after `check`. `infer` refuses a constant that is negative; one with symbols is looked at when their sizes
        are known, at each call.
        """
        return ()

    def reference(self, *operands: Any) -> Any:
        """The meaning, in NumPy: arrays in (None where absent), an array or a tuple of arrays out.

        Works in the operands' precision, float64 included; may allocate and be slow. Attributes that are sizes are
        constants by then.
        """
        raise GraphError(f"op {self.name} has no reference")

    def gradient(self, b: Builder, grads: Grads, inputs: Grads, outputs: Sequence[Expr]) -> Grads:
        """The gradient of a scalar with respect to each operand, given those of the results (None: zero).

        inputs and outputs are the op's own. Returns one entry per operand: an Expr of the operand's type, or None where
        no gradient flows. Raises GraphError, with the user's line, for an op that has none and does not say
        `stops_gradient`.
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
        """The factors along which the op reads the position itself: attention's s and t under a causal mask.

        What a mapped factor promises is then less: restricting it to a prefix commutes with the op, permuting it or
        taking another part of it need not.
        """
        return frozenset()

    @property
    def moved(self) -> frozenset[str]:
        """The operands of which it hands elements on, as they are: what it is linear in, if it does no arithmetic."""
        return frozenset().union(*self.linear) if self.flops == 0 else frozenset()

    def resized(self, sizes: Mapping[str, Size], types: Sequence[Type | None]) -> Op | None:
        """The op on a part of operands of these types, in which factors of its axis rule have other sizes.

        None: there is none, as by default where its attributes give one of these sizes.
        """
        given = self.rule([None if t is None else t.rank for t in types]).given
        return None if given.keys() & sizes.keys() else self

    def stepped(self, step: Stepping, operands: Sequence[Expr | Kept | None], held: Held) -> Any:
        """What the op is in a generation step, built with `step.b`: an Expr, or a tuple of them, as `body` gives.

        Asked of an op that scans or generates the tokens' axis, that reads positions of it other than its own, or that
        takes an operand in the state in which the prologue left it. A result may have one more dimension than it had,
        the rows of the step before all others, where it had none and now tells rows apart: positions.

        operands   those of the step: of the tokens that are added, or `Kept`
        held       for each the dimensions of it that are the tokens' axis

        None: it has no step, as by default.
        """
        return None

    def on_part(self, factor: str, start: Size) -> Op | None:
        """The op on a part of a mapped factor that begins at `start`, where it reads positions along that factor.

        None: it has no such form, as by default.
        """
        return None

    def flops_at(self, types: Sequence[Type | None], values: Mapping[str, int]) -> int | None:
        """Floating-point operations on operands of these types where each symbol has a value.

        None: count from the rule or the body. Another answer overrides that count, for an op whose work is not a
        product of its factors.
        """
        return None

    # -- what is derived from it -------------------------------------------------------------------------------

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
        """The attributes that have a default, with it."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}

    def operand_names(self, count: int) -> list[str]:
        """A name for each of `count` operands, no two alike; those of a variadic operand are numbered."""
        names = [n for n, o in self.operands.items() if not o.variadic]
        variadic = [n for n, o in self.operands.items() if o.variadic]
        if variadic:
            names += [f"{variadic[0]}{i}" for i in range(count - len(names))]
        return names

    @classmethod
    def arrange(cls, given: Sequence[Any]) -> list[Any]:
        """Pad absent optional operands with None and check the count. Raises GraphError."""
        operands = list(given)
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
        """The op with these attributes: one object for equal attributes, so that what is known of it is found fast.

        Raises TypeError for an unknown attribute, GraphError or RuleError for a wrong one.
        """
        if not attributes:
            return _interned(cls, (), ())  # type: ignore[arg-type]
        zeros = tuple([str(v) for v in attributes.values() if type(v) is float and v == 0.0])  # 0.0 equals -0.0
        try:
            return _interned(cls, tuple(attributes.items()), zeros)  # type: ignore[arg-type]  # a class has a hash
        except TypeError:  # an attribute given as a list, or an unknown one
            return cls(**attributes)

    def rule(self, ranks: Sequence[int | None]) -> Rule:
        """The parsed axis rule for operands of these ranks."""
        return parse_rule(self.axis_rule(ranks))

    def apply(self, types: Sequence[Type | None]) -> Application:
        """The axis rule matched against operand types, which is remembered. Raises RuleError."""
        key = tuple([None if t is None else t.text for t in types])  # labels tell equal types apart
        found = self._applied.get(key)
        if found is None:
            rule = self.rule([None if t is None else t.rank for t in types])
            found = self._applied[key] = rule.apply(types, self.operand_names(len(types)))
        return found

    @cached_property
    def _applied(self) -> dict[tuple[str | None, ...], Application]:
        return {}

    def infer(self, types: Sequence[Type | None]) -> tuple[Type, ...]:
        """The results' types. Raises RuleError, its text led by the op's name, where the operands do not fit."""
        key = tuple([None if t is None else t.text for t in types])  # labels tell equal types apart
        found = self._inferred.get(key)
        if found is None:
            found = self._inferred[key] = self._infer(types)
        return found

    def infer_for(self, operands: Sequence[Value | None]) -> tuple[Type, ...]:
        """What `infer` says for the operands' types; asked for every node that is built, so it looks there first."""
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

    # -- facts, which follow from the above; tests/test_op_facts.py holds each to what ops compute --------------------

    @property
    def only_moves(self) -> bool:
        """Whether every element of its results is an element of an operand, as it is, and none is filled in.

        Which one it is, sizes or other operands say (indices, the condition of `where`), never the element itself.
        """
        return bool(self.moved)

    @property
    def is_view(self) -> bool:
        """Whether it only moves the elements of its one operand, and sizes alone say where: rearrange, expand, slice.

        Its result may then lie where the operand does, if strides can say it.
        """
        return self.only_moves and len(self.operands) == 1 and self.arity[1] == 1

    @property
    def reads_positions(self) -> bool:
        """Whether results depend on where elements stand, and not on what they are alone: iota, a causal mask."""
        return bool(self.positional)

    def is_elementwise(self, ranks: Sequence[int | None]) -> bool:
        """Whether each element of its result is made of one element of each operand, by its axis rule."""
        return self.callee is None and self.rule(ranks).is_elementwise

    def is_contraction(self, ranks: Sequence[int | None]) -> bool:
        """Whether it is a product that sums over an axis of two operands: matmul, linear, an einsum of two.

        By its axis rule, in which a summed factor is in two operands and in no result, and by being linear in each of
        two operands, the other held fixed. (attention sums so, and is linear in its values alone.)
        """
        return len(self.linear) > 1 and self.rule(ranks).sums_products

    def is_multilinear(self, count: int) -> bool:
        """Whether it is linear in each of `count` operands, the others held fixed."""
        return all(any(names_operand(group, n) for group in self.linear) for n in self.operand_names(count))

    def in_place(self, types: Sequence[Type | None]) -> tuple[int, ...]:
        """The operands over which its result may be written while it is computed, by their positions.

        Of such a one, of the result's type, each element is read for the element at its own place alone: all factors of
        its dimensions are mapped, and they are the result's.
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
        """Groups of operands in which the op is linear together, the others held fixed."""
        return _operand_groups(self.linear_text)

    def sums_in(self, dtype: DType) -> DType:
        """What sums that are rounded to a dtype at last are held in: the more precise of it and `accumulates`."""
        least = self.accumulates
        return least if least is not None and dtype.is_float and dtype.bytes < least.bytes else dtype

    def at(self, values: Mapping[str, int]) -> Op:
        """The op with its symbolic sizes evaluated."""
        if not self._has_size:
            return self
        changed = {n: evaluated(v, values) for n, v in self.attributes.items() if has_size(v)}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    @cached_property
    def _has_size(self) -> bool:
        return any(map(has_size, self.attributes.values()))

    def substitute(self, values: Mapping[str, SizeLike]) -> Op:
        """The op with sizes put in the place of symbols in its attributes."""
        changed = {n: substituted(v, values) for n, v in self.attributes.items() if has_size(v)}
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[type-var]

    def in_float64(self) -> Op:
        """The op with f64 in place of every float dtype among its attributes: a cast to f16 then rounds nothing."""
        widened = self._widened
        return self if widened is None else widened

    @cached_property
    def _widened(self) -> Op | None:
        changed = {n: f64 for n, v in self.attributes.items() if isinstance(v, DType) and v.is_float}
        return dataclasses.replace(self, **changed) if changed else None  # type: ignore[type-var]

    def __str__(self) -> str:
        return self.name


class Primitive(Op):
    """An op with one axis rule, a reference and a gradient of its own."""


class Composite(Op):
    """An op with a body of primitives (or simpler composites), from which everything else can be derived."""

    def body(self, b: Builder, *operands: Any) -> Any:
        """Build the op's meaning from simpler ops: Exprs in (None where absent), an Expr or a tuple of them out."""
        raise GraphError(f"composite op {self.name} has no body")

    def lowering(self, b: Builder, *operands: Any) -> Any:
        """What a backend without a kernel for the op lowers: the body, or what is equal to it and runs faster."""
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
    """Whether operands of `Op.linear` or `Op.moved` hold the one of this name: a variadic one has a number."""
    return name in group or name.rstrip("0123456789") in group


@lru_cache(maxsize=8192)
def _interned(cls: type[Op], attributes: tuple[tuple[str, Any], ...], zeros: tuple[str, ...]) -> Op:
    return cls(**dict(attributes))
