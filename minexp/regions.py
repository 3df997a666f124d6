"""Shape figures of binary masks, in numpy alone: connected components and the share along the border."""

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
BORDER = 0.04  # the outer band, as a share of each side


def components(mask: Mask) -> int:
    """Number of 8-connected regions of a mask [H,W]."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    edges = np.diff(padded, axis=1)
    rows, first = np.nonzero(edges == 1)
    _, last = np.nonzero(edges == -1)  # exclusive
    starts, ends = first.tolist(), last.tolist()  # a loop reads lists faster
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    bounds = np.searchsorted(rows, np.arange(mask.shape[0] + 1)).tolist()
    count = len(parent)
    for row in range(1, mask.shape[0]):
        above, here = bounds[row - 1], bounds[row]
        last_above, last_here = here, bounds[row + 1]
        while above < last_above and here < last_here:
            # diagonal neighbours touch: runs [s, e) meet when s1 <= e2 and s2 <= e1
            if starts[above] <= ends[here] and starts[here] <= ends[above]:
                a, b = root(above), root(here)
                if a != b:
                    parent[a] = b
                    count -= 1
            if ends[above] < ends[here]:
                above += 1
            else:
                here += 1
    return count


def border_share(mask: Mask) -> float:
    """Share of a mask's pixels in the outer 4 % band along each side; 0 for an empty mask."""
    total = int(mask.sum())
    if total == 0:
        return 0.0
    height, width = mask.shape
    dy, dx = max(1, round(BORDER * height)), max(1, round(BORDER * width))
    return 1.0 - int(mask[dy : height - dy, dx : width - dx].sum()) / total
