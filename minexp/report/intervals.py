"""Means and shares with their 95 % intervals."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` images; low and high bound its 95 % interval, None where one image gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_of(
    values: npt.NDArray[np.floating], *, bounds: tuple[float, float] | None = None
) -> Estimate | None:
    """Mean of the finite values with its normal 95 % interval, kept within ``bounds``; None without values."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not len(finite):
        return None
    mean = float(finite.mean())
    if len(finite) == 1:
        return Estimate(mean, None, None, 1)
    half = _Z * float(finite.std(ddof=1)) / math.sqrt(len(finite))
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, len(finite))


def share_of(hits: int, n: int) -> Estimate | None:
    """A proportion with its Wilson 95 % interval (Wilson 1927); None of nothing."""
    if n == 0:
        return None
    p, zz = hits / n, _Z * _Z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = _Z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), n)
