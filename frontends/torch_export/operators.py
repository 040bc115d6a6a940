"""The table of ATen operators, and a handler's view of a node.

    @operator("gelu.default")
    def _gelu(site: Site) -> Made:
        tanh = site.text("approximate") == "tanh"
        return site.b.gelu_tanh(site.x("self")) if tanh else site.b.gelu(site.x("self"))

Arguments have the names of the operator's schema. A handler's result is checked against the shape and the dtype that
PyTorch itself found for the node, so that a wrong handler raises an error instead of returning wrong numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from treadle.frontends.torch_export.lines import scope_of, source_of
from treadle.frontends.torch_export.module_hints import training_hint
from treadle.ir.builder import Expr
from treadle.ir.errors import FrontendError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.sizing.sizes import Size
from treadle.ir.types import DTYPES, DType

if TYPE_CHECKING:
    from treadle.frontends.torch_export.importer import TorchImporter

Made: TypeAlias = Any
"""A handler's result: an Expr, or one for each output (None for an output that it does not compute)."""
Handler = Callable[["TorchSite"], Made]

OPERATORS: dict[str, Handler] = {}
"""Handlers by name and overload: "add.Tensor"."""

_DTYPES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
}


def operator(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler of operators."""

    def register(handler: Handler) -> Handler:
        for name in names:
            OPERATORS[name] = handler
        return handler

    return register


def our_dtype(dtype: Any) -> DType:
    """Return the IR dtype of a torch.dtype. Raises FrontendError if there is none."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise FrontendError(f"dtype {name} is not supported")
    return DTYPES[_DTYPES[name]]


def title(node: Any) -> str:
    """Return an operator's name for errors: `aten.add.Tensor`."""
    name = str(node.target)
    return str(getattr(node.target, "__name__", name) if name.startswith("<") else name)[:200]


class TorchSite:
    """One node during its import: its arguments by name, and the builder for its translation.

    b       the builder of the graph
    vals    the node's results in PyTorch: fake tensors with shape and dtype
    """

    def __init__(self, importer: TorchImporter, node: Any, arguments: Mapping[str, Any]) -> None:
        self.importer, self.b, self.node, self.arguments = importer, importer.b, node, arguments
        val = node.meta.get("val")
        self.vals: list[Any] = list(val) if isinstance(val, list | tuple) else [val]

    # -- arguments ---------------------------------------------------------------------------------------------

    def given(self, name: str, default: Any = None) -> Any:
        """Return an argument unconverted: an Expr, a Size, a number, a dtype, a list of these, or None."""
        found = self.arguments.get(name)
        return default if found is None else found

    def x(self, name: str) -> Expr:
        """Return a tensor argument."""
        found = self.given(name)
        if not isinstance(found, Expr):
            self.refuse(f"{name} must be a tensor")
        return found

    def maybe(self, name: str) -> Expr | None:
        """Return a tensor argument, or None if it is absent."""
        return None if self.given(name) is None else self.x(name)

    def tensors(self, name: str) -> list[Expr]:
        return list(self.given(name, []))

    def operand(self, name: str, dtype: DType) -> Expr:
        """Return an argument that is a tensor, a number or a size as a tensor of this dtype."""
        return self.as_operand(self.given(name), dtype)

    def as_operand(self, found: Any, dtype: DType) -> Expr:
        if isinstance(found, Expr):
            return found.cast(dtype)
        if isinstance(found, Size):
            whole = dtype if dtype.is_int else DTYPES["i64"]
            made = (
                self.b.constant(found.constant, whole)
                if found.constant is not None
                else self.b.size(value=found, dtype=whole)
            )
            return made.cast(dtype)
        if found is None:
            self.refuse(
                "a number that depends on data, or on sizes other than by integer arithmetic, is not supported",
                "leave its dimensions out of dynamic=, or keep a number from data a tensor",
            )
        if dtype.kind == "bool":
            return self.b.constant(bool(found), dtype)
        whole_number = dtype.is_int and math.isfinite(found)  # as torch fills a tensor of integers with 2.5
        return self.b.constant(int(found) if whole_number else found, dtype)

    def size(self, name: str, default: int | None = None) -> Size:
        return Size.of(self.given(name, default))

    def integer(self, name: str) -> int:
        number = self.size(name).constant
        if number is None:
            self.refuse(f"{name} must be a number, not {self.size(name)}")
        return number

    def integers(self, name: str) -> tuple[int, ...]:
        found = self.given(name, ())
        numbers = [Size.of(n).constant for n in (found if isinstance(found, list | tuple) else [found])]
        if any(n is None for n in numbers):
            self.refuse(f"{name} must be numbers")
        return tuple(n for n in numbers if n is not None)

    def real(self, name: str, default: float | None = None) -> float:
        found = self.given(name, default)
        if not isinstance(found, bool | int | float):
            self.refuse(f"{name} must be a number")
        return float(found)

    def flag(self, name: str) -> bool:
        return bool(self.given(name, False))

    def text(self, name: str) -> str:
        return str(self.given(name, ""))

    def axis(self, name: str, rank: int | None = None) -> int:
        """Return the position of an axis argument such as `dim`."""
        return self.position(self.integer(name), self.x("self").rank if rank is None else rank)

    def position(self, axis: int, rank: int) -> int:
        return axis % max(rank, 1)

    # -- torch's description of the results -----------------------------------------------------------------------

    def shape(self, output: int = 0) -> tuple[Size, ...]:
        """Return the shape of a result."""
        return tuple(self.importer.symbols.size(n) for n in self.vals[output].shape)

    def dtype(self, output: int = 0) -> DType:
        """Return the dtype of a result."""
        return our_dtype(self.vals[output].dtype)

    def promoted(self, *names: str) -> DType:
        """Return the dtype to which PyTorch promotes two arguments."""
        import torch

        given = [self._val(name) for name in names]
        return our_dtype(torch.result_type(*given))

    def _val(self, name: str) -> Any:
        schema = [a.name for a in self.node.target._schema.arguments]
        position = schema.index(name)
        found = self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name)
        val = getattr(found, "meta", {}).get("val", found)
        return int(val.node.hint) if hasattr(val, "node") and not hasattr(val, "dtype") else val

    def bounds(self, size: Size) -> Bounds:
        """Return the minimum and the maximum of a size."""
        return size.bounds(self.importer.bounds)

    def is_at_least(self, x: Size, y: Size) -> bool:
        """Return True if x >= y for all values of the symbols."""
        return self.importer.symbols.is_at_least(x, y)

    # -- refusals ----------------------------------------------------------------------------------------------

    def refuse(self, why: str, hint: str | None = None) -> NoReturn:
        """Raise FrontendError for an unsupported case."""
        raise unsupported(self.node, why, hint)

    def refuse_training(self, why: str, argument: str) -> NoReturn:
        """Raise FrontendError for an operator that runs as in training.

        argument  the argument of the call that makes it heed the module's mode
        """
        self.refuse(why, training_hint(self.importer.module, scope_of(self.node), argument))


def unsupported(node: Any, why: str, hint: str | None = None, received: str | None = None) -> FrontendError:
    """Return the error for an unsupported node."""
    at = source_of(node)
    return FrontendError(
        f"{title(node)}: {why}",
        received=received,
        within=f"node {node.name}",
        source=str(at) if at is not None else None,
        hint=hint,
    )
