"""How a layer's output is laid out: which axis holds the channels, and where the image's grid is among its tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .errors import RequestError

Kind = Literal["channels_first", "channels_last", "tokens", "vector"]
Grid = tuple[int, int]
MAX_PREFIX = 16  # class, distillation and register tokens ahead of the image's own
_FEATURES_LAST = (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.MultiheadAttention)
_FEATURES_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Layout:
    """Where channels and positions are in one layer's output.

    kind: "channels_first" [B,C,h,w] or [B,C,N], "channels_last" [B,h,w,C], "tokens" [B,N,C], "vector" [B,C].
    grid: (h, w) of the image's positions in the traced pass, None where they form none. prefix: tokens ahead of
    them (class, distillation, registers).
    """

    kind: Kind
    grid: Grid | None = None
    prefix: int = 0

    def arrange(self, output: Tensor) -> Tensor:
        """The layer's output as [B,C,h,w], tokens as [B,C,N] with their prefix, a vector as [B,C]."""
        if self.kind == "channels_last":
            return output.permute(0, 3, 1, 2)
        return output.transpose(1, 2) if self.kind == "tokens" else output

    def spatial(self, feature: Tensor) -> Tensor:
        """An arranged feature as a map [B,C,h,w] of the image's own positions, without prefix tokens.

        RequestError where they form no grid.
        """
        if feature.ndim == 4:
            return feature
        if self.grid is None or feature.shape[2] != self.prefix + self.grid[0] * self.grid[1]:
            raise RequestError(
                f"a feature of {list(feature.shape)} has no grid of positions; tap another layer"
            )
        return feature[:, :, self.prefix :].unflatten(2, self.grid)


def certain_grids(outputs: Iterable[tuple[nn.Module, tuple[int, ...]]], size: Grid) -> set[Grid]:
    """Grids that convolutions and poolings gave, whose layout is known, and what halving makes of them.

    outputs: modules and the shapes they gave for images of size (H, W). Convolutions also run over tokens laid out
    in other ways: where some grids have the image's proportions, only those count.
    """
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)
    found = {shape[2:] for module, shape in outputs if isinstance(module, kinds) and len(shape) == 4}
    alike = {(h, w) for h, w in found if abs(h * size[1] - w * size[0]) <= max(size)}
    grids: set[Grid] = set()
    for h, w in alike or found:
        for divisor in (1, 2, 4, 8):
            grids |= {(-(-h // divisor), -(-w // divisor)), (max(1, h // divisor), max(1, w // divisor))}
    return grids


def find_layout(
    module: nn.Module, shape: tuple[int, ...], grids: Collection[Grid], size: Grid
) -> Layout | None:
    """Layout of a module's output of this shape; None where it is no feature of a batch of images.

    grids: those known of this model; size: (H, W) of its input, whose proportions an unknown grid has.
    """
    if len(shape) == 2:
        return Layout("vector")
    if len(shape) == 3:
        return _of_sequence(module, shape[1], shape[2], grids, size)
    if len(shape) != 4:
        return None
    first, last = shape[2:], shape[1:3]
    for fits in (lambda grid: grid in grids, lambda grid: _proportional(grid, size)):
        either = fits(first), fits(last)
        if all(either):  # as many channels as rows: what computed it tells
            either = (False, True) if _features_last(module) else (True, False)
        if any(either):
            return Layout("channels_first", first) if either[0] else Layout("channels_last", last)
    return Layout("channels_last" if _features_last(module) else "channels_first")


def _of_sequence(module: nn.Module, one: int, two: int, grids: Collection[Grid], size: Grid) -> Layout:
    if isinstance(module, _FEATURES_FIRST):
        grid, prefix = _split(two, grids, size) or (None, 0)
        return Layout("channels_first", grid, prefix)
    if found := _split(one, grids, size):
        return Layout("tokens", *found)
    if (found := _split(two, grids, None)) and not _features_last(module):
        return Layout("channels_first", *found)
    return Layout("tokens")


def _split(count: int, grids: Collection[Grid], size: Grid | None) -> tuple[Grid, int] | None:
    """The grid and the number of prefix tokens that make up so many tokens; the fewest prefix tokens win."""
    known = {h * w: (h, w) for h, w in grids}
    for prefix in range(min(MAX_PREFIX + 1, count)):
        if count - prefix in known:
            return known[count - prefix], prefix
    if size is None:
        return None
    for prefix in range(min(MAX_PREFIX + 1, count)):
        height = round(((count - prefix) * size[0] / size[1]) ** 0.5)
        if height and (count - prefix) % height == 0:
            grid = (height, (count - prefix) // height)
            if max(grid) > 1 and _proportional(grid, size):
                return grid, prefix
    return None


def _proportional(grid: tuple[int, ...], size: Grid) -> bool:
    return grid[0] * size[1] == grid[1] * size[0] and grid[0] <= size[0]


def _features_last(module: nn.Module) -> bool:
    """Does the module compute on features in the last axis, and on none in the second?"""
    parts = list(module.modules())
    return any(isinstance(part, _FEATURES_LAST) for part in parts) and not any(
        isinstance(part, _FEATURES_FIRST) for part in parts
    )
