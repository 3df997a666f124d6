"""Means and shares with their 95 % intervals."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..intervals import Z95, wilson


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
    half = Z95 * float(finite.std(ddof=1)) / math.sqrt(len(finite))
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, len(finite))


def share_of(hits: int, n: int) -> Estimate | None:
    """A proportion with its Wilson 95 % interval (Wilson 1927); None of nothing."""
    if n == 0:
        return None
    return Estimate(hits / n, *wilson(hits, n), n)
