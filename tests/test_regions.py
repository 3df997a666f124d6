"""Components and border share against plain loops."""

import numpy as np
import pytest

from minexp.regions import border_share, components


def flood(mask: np.ndarray) -> int:
    """8-connected regions by flood fill."""
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    count = 0
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            r, c = stack.pop()
            for step in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                near = (r + step[0], c + step[1])
                if near in left:
                    left.remove(near)
                    stack.append(near)
    return count


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.8])
def test_components_of_random_masks(share: float) -> None:
    rng = np.random.default_rng(int(share * 100))
    for _ in range(60):
        mask = rng.random(rng.integers(1, 14, 2)) < share
        assert components(mask) == flood(mask)


def test_components_of_known_masks() -> None:
    assert components(np.zeros((5, 5), bool)) == 0
    assert components(np.ones((5, 5), bool)) == 1
    assert components(np.eye(6, dtype=bool)) == 1  # diagonal neighbours touch
    assert components(np.arange(25).reshape(5, 5) % 2 == 0) == 1
    comb = np.zeros((6, 7), bool)
    comb[:, ::2] = True
    assert components(comb) == 4
    comb[-1] = True  # joined at the very end
    assert components(comb) == 1
    columns = np.zeros((3, 8), bool)
    columns[:, [0, 7]] = True  # the end of a row is no neighbour of the next row's start
    assert components(columns) == 2


def test_border_share() -> None:
    mask = np.zeros((100, 50), bool)
    assert border_share(mask) == 0.0
    mask[4:96, 2:48] = True  # all but the outer 4 % of each side
    assert border_share(mask) == 0.0
    mask[3, 10:20] = True
    assert border_share(mask) == pytest.approx(10 / (92 * 46 + 10))
    whole = np.ones((100, 50), bool)
    assert border_share(whole) == pytest.approx(1 - 92 * 46 / 5000)
    assert border_share(np.ones((1, 1), bool)) == 1.0
    tiny = np.zeros((8, 8), bool)
    tiny[0, 3] = tiny[4, 4] = True
    assert border_share(tiny) == 0.5  # the band is never thinner than a pixel
