"""The elementwise ops as methods of tensors, from their classes: elementwise.py as type checkers see it. Written by
`make golden`.
"""

from treadle.ir.expressions import Expr, ExprLike
from treadle.ir.wording.python_protocols import PythonProtocols

class ElementwiseMethods(PythonProtocols):
    def abs(self, *, name: str | None = None) -> Expr:
        """y = |x|; the gradient at 0 is 0"""

    def add(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x + y"""

    def cos(self, *, name: str | None = None) -> Expr:
        """y = cos x, x in radians"""

    def div(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x / y"""

    def equal(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = (x = y); false where either is NaN"""

    def erf(self, *, name: str | None = None) -> Expr:
        """y = 2/sqrt(pi) * integral from 0 to x of e^(-t^2) dt        (see treadle.ir.ops.error_function)"""

    def exp(self, *, name: str | None = None) -> Expr:
        """y = e^x"""

    def expm1(self, *, name: str | None = None) -> Expr:
        """y = e^x - 1, to full precision near 0, where e^x rounds to 1"""

    def floor(self, *, name: str | None = None) -> Expr:
        """y = the greatest integer that is not above x; no gradient flows"""

    def floor_divide(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = floor(x / y)"""

    def gelu(self, *, name: str | None = None) -> Expr:
        """y = x Phi(x) = x/2 (1 + erf(x / sqrt 2)), Phi the normal distribution        (Hendrycks & Gimpel 2016)"""

    def gelu_tanh(self, *, name: str | None = None) -> Expr:
        """y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        (Hendrycks & Gimpel 2016)"""

    def greater(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = (x > y); false where either is NaN"""

    def greater_equal(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = (x >= y); false where either is NaN"""

    def less(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = (x < y); false where either is NaN"""

    def less_equal(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = (x <= y); false where either is NaN"""

    def log(self, *, name: str | None = None) -> Expr:
        """y = ln x; -inf at 0, NaN below"""

    def log1p(self, *, name: str | None = None) -> Expr:
        """y = ln(1 + x), to full precision near 0, where 1 + x rounds to 1; -inf at -1, NaN below"""

    def logical_and(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x and y"""

    def logical_not(self, *, name: str | None = None) -> Expr:
        """y = not x"""

    def logical_or(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x or y"""

    def maximum(self, y: ExprLike, /, *, ties: str = "even", name: str | None = None) -> Expr:
        """z = max(x, y); a NaN in either gives NaN"""

    def minimum(self, y: ExprLike, /, *, ties: str = "even", name: str | None = None) -> Expr:
        """z = min(x, y); a NaN in either gives NaN"""

    def mod(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x - floor(x / y) y"""

    def mul(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x * y"""

    def neg(self, *, name: str | None = None) -> Expr:
        """y = -x"""

    def not_equal(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = (x != y); true where either is NaN"""

    def pow(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x^y: NaN for a negative x unless y is an integer"""

    def quick_gelu(self, *, name: str | None = None) -> Expr:
        """y = x sigmoid(1.702 x)        (Hendrycks & Gimpel 2016; the activation of CLIP, Radford et al. 2021)"""

    def reciprocal(self, *, name: str | None = None) -> Expr:
        """y = 1 / x"""

    def relu(self, *, name: str | None = None) -> Expr:
        """y = max(x, 0); the gradient at 0 is 0        (Nair & Hinton 2010)"""

    def round(self, *, name: str | None = None) -> Expr:
        """y = the integer nearest to x, the even one if two integers are equally near; no gradient flows"""

    def rsqrt(self, *, name: str | None = None) -> Expr:
        """y = x^(-1/2); inf at 0, NaN below"""

    def sigmoid(self, *, name: str | None = None) -> Expr:
        """y = 1 / (1 + e^(-x))"""

    def sign(self, *, name: str | None = None) -> Expr:
        """y = 1, 0 or -1 where x is positive, zero or negative; no gradient flows"""

    def silu(self, *, name: str | None = None) -> Expr:
        """y = x sigmoid(x)        (Hendrycks & Gimpel 2016; as swish, Ramachandran, Zoph & Le 2017)"""

    def sin(self, *, name: str | None = None) -> Expr:
        """y = sin x, x in radians"""

    def softplus(self, *, name: str | None = None) -> Expr:
        """y = ln(1 + e^x)        (Dugas et al. 2001)"""

    def sqrt(self, *, name: str | None = None) -> Expr:
        """y = x^(1/2); NaN below 0"""

    def stop_gradient(self, *, name: str | None = None) -> Expr:
        """y = x, and no gradient flows, as through tensor.detach() in PyTorch"""

    def sub(self, y: ExprLike, /, *, name: str | None = None) -> Expr:
        """z = x - y"""

    def tanh(self, *, name: str | None = None) -> Expr:
        """y = tanh x"""
