"""Quantiles of Student's t distribution, so that an interval needs no SciPy.

The distribution function is half a regularised incomplete beta function, evaluated by its continued fraction
(Abramowitz and Stegun 26.5.8, by Lentz's method); the quantile is found by halving.
"""

from __future__ import annotations

import math

_PRECISION = 1e-15
_TINY = 1e-300


def t_quantile(probability: float, freedom: int) -> float:
    """The value that a Student's t variable of ``freedom`` degrees of freedom stays below with this probability.

    Args:
        probability: in (0, 1).
        freedom: at least 1.

    Raises:
        ValueError: one of them is out of its range.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"probability={probability!r} has to be in (0, 1) and freedom={freedom!r} at least 1")
    if probability == 0.5:
        return 0.0
    tail = min(probability, 1 - probability)
    low, high = 0.0, 1.0
    while _upper_tail(high, freedom) > tail:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if _upper_tail(middle, freedom) > tail:
            low = middle
        else:
            high = middle
    return high if probability > 0.5 else -high


def _upper_tail(t: float, freedom: int) -> float:
    """Probability of more than ``t``, which is at least 0."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function ``I_x(a, b)``."""
    if x <= 0 or x >= 1:
        return 1.0 if x >= 1 else 0.0
    # The fraction converges fast below the mean; above it, so does the one of the other tail.
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return math.exp(log_front) * fraction


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
