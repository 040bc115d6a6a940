"""Complex tensors, each as two tensors: rotary positions in the form of Meta's Llama multiply by complex numbers.

    view_as_complex(x)      x[..., 0] + i x[..., 1]         a rotation by an angle: exp(i angle) = cos + i sin
    view_as_real(z)         the two parts, stacked

A graph has no complex dtype. Operators that move elements move both parts; products, sums and conjugates follow from
their definitions. All other operators of complex tensors are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle.frontends.torch_export.operators import OPERATORS, Made, TorchSite, operator
from treadle.ir.builder import Expr
from treadle.ir.sizing.sizes import ONE, Size
from treadle.ir.tensors.shapes import reshaped
from treadle.ir.types import DTYPES, DType

_PARTS = {"complex64": "f32", "complex128": "f64"}

_MOVES = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "view_copy", "flatten", "unflatten", "view_as", "reshape_as", "unsqueeze"),
        *("squeeze", "expand", "expand_as", "permute", "transpose", "t", "slice", "slice_copy", "select", "narrow"),
        *("index_select", "index", "cat", "repeat", "flip"),
    }
)
_OWN = frozenset({"view_as_real", "view_as_real_copy", "real", "imag"})
_SAME = frozenset({"clone", "alias", "detach", "contiguous", "_to_copy", "to", "lift_fresh_copy", "resolve_conj"})
_TERMS = frozenset({"add", "sub", "neg", "mul", "conj", "_conj", "_conj_physical", "conj_physical"})


@dataclass(frozen=True)
class Complex:
    """A complex tensor: its real and its imaginary part, of one dtype and shape."""

    real: Expr
    imag: Expr

    @property
    def dtype(self) -> DType:
        """The dtype of the parts."""
        return self.real.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape of the tensor."""
        return self.real.shape


def dtype_of_parts(dtype: Any) -> DType | None:
    """Return the dtype of the parts of a complex torch.dtype; None for any other dtype."""
    name = _PARTS.get(str(dtype).removeprefix("torch."))
    return None if name is None else DTYPES[name]


def of_complex(site: TorchSite, name: str) -> Made | None:
    """Return the result of an operator of complex tensors. Return None if no argument is complex, or if the operator's
    own handler takes complex tensors.
    """
    given = [x for each in site.arguments.values() for x in (each if isinstance(each, list) else [each])]
    kind = name.partition(".")[0]
    if kind in _SAME and dtype_of_parts(site.vals[0].dtype) is not None:
        return _as_complex(site, site.given("self"))
    if kind in _OWN or not any(isinstance(x, Complex) for x in given):
        return None
    if kind in _MOVES:
        parts = (OPERATORS[name](_Part(site, part)) for part in ("real", "imag"))
        return Complex(*parts)
    if kind not in _TERMS or site.given("alpha", 1) != 1:
        site.refuse("the operator takes no complex tensors", "its real and imaginary parts, by torch.view_as_real")
    x, y = (site.given(each) for each in ("self", "other"))
    if y is None:
        return Complex(-x.real if kind == "neg" else x.real, -x.imag)
    if kind == "mul" and not (isinstance(x, Complex) and isinstance(y, Complex)):
        z, factor = (x, y) if isinstance(x, Complex) else (y, x)
        by = site.as_operand(factor, z.dtype)  # a product with zero parts would turn infinity into NaN
        return Complex(z.real * by, z.imag * by)
    x, y = _as_complex(site, x), _as_complex(site, y)
    if kind == "mul":
        return Complex(x.real * y.real - x.imag * y.imag, x.real * y.imag + x.imag * y.real)
    return Complex(x.real + y.real, x.imag + y.imag) if kind == "add" else Complex(x.real - y.real, x.imag - y.imag)


def _as_complex(site: TorchSite, x: Any) -> Complex:
    """Return a complex tensor, or a real tensor or number as one."""
    if isinstance(x, Complex):
        return x
    dtype = dtype_of_parts(site.vals[0].dtype)
    assert dtype is not None
    real = site.as_operand(x, dtype)
    return Complex(real, real * 0)


class _Part(TorchSite):
    """A node whose complex arguments are replaced by one of their parts."""

    def __init__(self, site: TorchSite, part: str) -> None:
        def taken(x: Any) -> Any:
            if isinstance(x, list):
                return [taken(each) for each in x]
            return getattr(x, part) if isinstance(x, Complex) else x

        super().__init__(site.importer, site.node, {name: taken(x) for name, x in site.arguments.items()})

    def dtype(self, output: int = 0) -> DType:
        return dtype_of_parts(self.vals[output].dtype) or super().dtype(output)


@operator("view_as_complex.default", "view_as_complex_copy.default")
def _view_as_complex(site: TorchSite) -> Made:
    x = site.x("self")
    parts = (site.b.slice(x, axis=x.rank - 1, start=n, stop=n + 1) for n in (0, 1))
    return Complex(*(reshaped(site.b, part, x.shape[:-1])[0] for part in parts))


@operator("view_as_real.default", "view_as_real_copy.default")
def _view_as_real(site: TorchSite) -> Made:
    z = _z(site)
    parts = [reshaped(site.b, part, [*z.shape, ONE])[0] for part in (z.real, z.imag)]
    return site.b.concat(*parts, axis=len(z.shape))


@operator("real.default")
def _real(site: TorchSite) -> Made:
    return _z(site).real


@operator("imag.default")
def _imag(site: TorchSite) -> Made:
    return _z(site).imag


@operator("complex.default")
def _complex(site: TorchSite) -> Made:
    return Complex(site.x("real"), site.x("imag"))


@operator("polar.default")
def _polar(site: TorchSite) -> Made:
    r, angle = site.x("abs"), site.x("angle")
    return Complex(r * site.b.cos(angle), r * site.b.sin(angle))


def _z(site: TorchSite) -> Complex:
    z = site.given("self")
    if not isinstance(z, Complex):
        site.refuse("self must be a complex tensor")
    return z
