"""The Wilson score interval of a proportion."""

import math

Z95 = 1.959964  # 97.5 % quantile of the normal distribution


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of successes / n (Wilson 1927); (0, 1) for no draws."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, Z95 * Z95
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return max(0.0, middle - half), min(1.0, middle + half)
