"""What units respond to: crops of images around the places where they are most active."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .network import Network
from .sites import Site

Tiles = npt.NDArray[np.uint8]
MAX_PREFIX = 8  # class and register tokens ahead of an image's own


@dataclass(frozen=True, eq=False)
class Best:
    """The images where units are most active: activation, image number and (row, column) in [0, 1], each [units, k]."""

    activation: Tensor
    image: Tensor
    centre: Tensor
    span: float  # side of a crop that shows what a position sees, as a share of the image; 1: no position


@torch.no_grad()
def most_active(
    net: Network, images: Tensor, wanted: Mapping[Site, Sequence[int]], count: int = 4, micro_batch: int = 32
) -> dict[Site, Best]:
    """For the wanted units of each site the images [M,C,H,W] with the highest activation at any position.

    A head's activation is the norm of its output at a token.
    """
    found: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in wanted}
    grids: dict[Site, tuple[int, int, int] | None] = {}
    for x in images.split(micro_batch):
        values = net.run({net.image: x}, [site.place for site in wanted])
        for site, units in wanted.items():
            value = values[site.place].unflatten(0, (-1, site.each))
            grids[site] = _grid(site, value.shape)
            activity = site.split(values[site.place])[:, list(units)]
            if site.kind == "head":  # positions are (token, dimension)
                activity = activity.unflatten(2, (-1, value.shape[-1])).norm(dim=3)
            best = activity.max(dim=2)
            found[site].append((best.values.T, best.indices.T))
    result = {}
    for site, parts in found.items():
        activation, position = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        top = activation.topk(min(count, activation.shape[1]), dim=1)
        position = position.gather(1, top.indices)
        grid = grids[site]
        if grid is None:
            centre, span = torch.full((*position.shape, 2), 0.5), 1.0
        else:
            height, width, prefix = grid
            place = (position - prefix).clamp_min(0)
            rows, columns = torch.div(place, width, rounding_mode="floor"), place % width
            centre = torch.stack([(rows + 0.5) / height, (columns + 0.5) / width], 2)
            span = min(1.0, max(0.25, 5 / min(height, width)))
        result[site] = Best(top.values.cpu(), top.indices.cpu(), centre.cpu(), span)
    return result


def crop(images: Tensor, best: Best, side: int) -> Tiles:
    """The crops as uint8 [units, k, side, side, 3]; what lies outside of an image is grey."""
    units, count = best.image.shape
    height, width = images.shape[2:]
    reach = max(2, round(best.span * min(height, width)))
    padded = F.pad(images.cpu(), (reach // 2,) * 2 + (reach // 2,) * 2, value=0.5)
    tiles = np.empty((units, count, side, side, 3), np.uint8)
    for unit in range(units):
        for place in range(count):
            row, column = best.centre[unit, place].tolist()
            top, left = int(row * height), int(column * width)
            if best.span == 1.0:
                piece = images[best.image[unit, place]].cpu()[None]
            else:
                piece = padded[best.image[unit, place], :, top : top + reach, left : left + reach][None]
            piece = F.interpolate(
                piece.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
            )
            pixels = (piece[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            tiles[unit, place] = pixels if pixels.shape[2] == 3 else pixels[..., :1]
    return tiles


def _grid(site: Site, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """(rows, columns, tokens ahead) of a site's positions, of a value [B, each, ...]; None where they form no grid."""
    if site.each != 1:
        return None
    rest = [size for axis, size in enumerate(shape) if axis not in (0, 1, site.axis)]
    if site.kind == "head":
        rest = rest[:-1]
    if len(rest) == 2 and max(rest) > 1:
        return rest[0], rest[1], 0
    if len(rest) != 1 or rest[0] < 4:
        return None
    for prefix in range(min(MAX_PREFIX, rest[0]) + 1):
        edge = math.isqrt(rest[0] - prefix)
        if edge > 1 and edge * edge == rest[0] - prefix:
            return edge, edge, prefix
    return None
