"""The error function in NumPy, to the last bits of float64.

    erf(x) = 2/sqrt(pi) * integral from 0 to x of exp(-t^2) dt

The rational approximations are by W. J. Cody, "Rational Chebyshev Approximations for the Error Function", Mathematics
of Computation 23 (1969), 631-637, with the coefficients of his CALERF routine: one for erf near zero, two for erfc
further out. Their relative errors are below 6e-19; float64's rounding remains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# erf(x) = x P(x^2) / Q(x^2) for |x| <= 0.46875, highest power first
_NEAR_P = (
    1.85777706184603153e-1,
    3.16112374387056560e00,
    1.13864154151050156e02,
    3.77485237685302021e02,
    3.20937758913846947e03,
)
_NEAR_Q = (
    1.0,
    2.36012909523441209e01,
    2.44024637934444173e02,
    1.28261652607737228e03,
    2.84423683343917062e03,
)

# erfc(x) = exp(-x^2) P(x) / Q(x) for 0.46875 <= x <= 4
_MIDDLE_P = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e00,
    6.61191906371416295e01,
    2.98635138197400131e02,
    8.81952221241769090e02,
    1.71204761263407058e03,
    2.05107837782607147e03,
    1.23033935479799725e03,
)
_MIDDLE_Q = (
    1.0,
    1.57449261107098347e01,
    1.17693950891312499e02,
    5.37181101862009858e02,
    1.62138957456669019e03,
    3.29079923573345963e03,
    4.36261909014324716e03,
    3.43936767414372164e03,
    1.23033935480374942e03,
)

# erfc(x) = exp(-x^2) / x * (1/sqrt(pi) - P(1/x^2) / (x^2 Q(1/x^2))) for x >= 4
_FAR_P = (
    1.63153871373020978e-2,
    3.05326634961232344e-1,
    3.60344899949804439e-1,
    1.25781726111229246e-1,
    1.60837851487422766e-2,
    6.58749161529837803e-4,
)
_FAR_Q = (
    1.0,
    2.56852019228982242e00,
    1.87295284992346725e00,
    5.27905102951428412e-1,
    6.05183413124413191e-2,
    2.33520497626869185e-3,
)

_NEAR_LIMIT, _MIDDLE_LIMIT = 0.46875, 4.0
_ONE_FROM = 6.0  # erfc(6) = 2e-17 is less than half a unit in the last place of 1


def erf(x: Array) -> Array:
    """Return erf of every element, in the dtype of x (computed in float64; relative error under 1e-15)."""
    wide = np.asarray(x, np.float64)
    size = np.minimum(np.abs(wide), _ONE_FROM)
    with np.errstate(all="ignore"):  # each formula is also evaluated outside its interval
        square = size * size
        inverse = 1.0 / square
        near = size * _ratio(_NEAR_P, _NEAR_Q, square)
        middle = _ratio(_MIDDLE_P, _MIDDLE_Q, size)
        far = (1.0 / math.sqrt(math.pi) - inverse * _ratio(_FAR_P, _FAR_Q, inverse)) / size
        tail = np.where(size <= _MIDDLE_LIMIT, middle, far)
        found = np.where(size <= _NEAR_LIMIT, near, 1.0 - np.exp(-square) * tail)
    return np.copysign(found, wide).astype(np.asarray(x).dtype)


def _ratio(numerator: Sequence[float], denominator: Sequence[float], x: Array) -> Array:
    return np.asarray(np.polyval(numerator, x) / np.polyval(denominator, x))
