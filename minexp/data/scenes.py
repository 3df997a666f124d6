"""Built-in images whose deciding pixels are known: handwritten digits in cluttered colour scenes.

The digits are the 1,797 scans of 8×8 pixels that scikit-learn ships (UCI Optical Recognition of
Handwritten Digits). A quarter of them is held out for the ``test`` split, on whose scenes figures are reported, and
an eighth for ``validation``, on whose scenes settings are chosen; each split shows only its own scans.
Everything is a deterministic function of (variant, n, seed, split).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RequestError

Variant = Literal["plain", "shortcut", "mosaic", "segments"]
Split = Literal["train", "validation", "test"]
VARIANTS: tuple[Variant, ...] = ("plain", "shortcut", "mosaic", "segments")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SIZE = 64  # plain, shortcut
TILE = 24  # mosaic: 3 × 3 tiles of 24 pixels
GRID = 3
PATCH = 12  # shortcut: side of the corner patch
SHORTCUT_RATE = 0.95  # how often the patch names the class in the training split
_CHUNK = 256  # scenes rendered at once: the working set stays in cache


@dataclass(frozen=True)
class Scenes:
    """Images with labels and the region that decides the label.

    images uint8 [N,H,W,3]; labels int64 [N]; truth bool [N,H,W]: the box of the deciding digit
    (``plain``, ``shortcut``) or the deciding tile (``mosaic``, ``segments``; empty for "none");
    strokes bool [N,H,W]: the digit's own pixels; patch bool [N,H,W]: the shortcut patch, else empty.
    """

    variant: Variant
    images: np.ndarray
    labels: np.ndarray
    truth: np.ndarray
    strokes: np.ndarray
    patch: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def make(variant: Variant, n: int, *, seed: int = 0, split: Split = "train", decisive: bool = True) -> Scenes:
    """Render ``n`` scenes. ``decisive=False`` leaves the shortcut patch uncorrelated with the class."""
    if variant not in VARIANTS:
        raise RequestError(f"scenes: unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    if n < 1:
        raise RequestError(f"scenes: {n} images; make at least 1")
    stream = 7919 * (len(SPLITS) * VARIANTS.index(variant) + SPLITS.index(split)) + 1_000_003 * seed
    rng = torch.Generator().manual_seed(stream)
    parts = []
    for start in range(0, n, _CHUNK):
        count = min(_CHUNK, n - start)
        match variant:
            case "plain":
                part = _digit_scene(count, rng, split)
            case "shortcut":
                part = _shortcut_scene(count, rng, split, decisive)
            case "mosaic":
                part = _mosaic_scene(count, rng, split)
            case "segments":
                part = _segment_scene(count, rng)
        pixels = (part[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        parts.append((pixels, *part[1:]))
    pixels, labels, truth, strokes, patch = (torch.cat([p[i] for p in parts]).contiguous() for i in range(5))
    names = ("0", "1", "2", "none") if variant in ("mosaic", "segments") else tuple("0123456789")
    return Scenes(
        variant, pixels.numpy(), labels.numpy(), truth.numpy(), strokes.numpy(), patch.numpy(), names
    )


_Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@cache
def _digits(split: Split) -> tuple[Tensor, Tensor]:
    """Scans [N,1,8,8] in [0,1] and their labels: of every eight of a class, two for test and one for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RequestError(
            "scenes: the digit scans come with scikit-learn; pip install scikit-learn"
        ) from error
    scans = load_digits()
    labels = torch.from_numpy(scans.target).long()
    images = torch.from_numpy(scans.images).float().unsqueeze(1) / 16
    order_in_class = torch.empty_like(labels)
    for digit in range(10):
        members = (labels == digit).nonzero().flatten()
        order_in_class[members] = torch.arange(len(members))
    place = order_in_class % 8
    places = {"train": (0, 1, 2, 4, 5), "validation": (6,), "test": (3, 7)}[split]
    chosen = torch.isin(place, torch.tensor(places))
    return images[chosen], labels[chosen]


def _uniform(rng: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _pick(rng: torch.Generator, split: Split, wanted: Tensor) -> Tensor:
    """One random scan [N,1,8,8] of each wanted digit [N]."""
    images, labels = _digits(split)
    out = torch.empty(len(wanted), 1, 8, 8)
    for digit in wanted.unique().tolist():
        pool = (labels == digit).nonzero().flatten()
        slots = (wanted == digit).nonzero().flatten()
        out[slots] = images[pool[torch.randint(len(pool), (len(slots),), generator=rng)]]
    return out


def _place(scans: Tensor, centre: Tensor, scale: Tensor, angle: Tensor, shear: Tensor, size: int) -> Tensor:
    """Opacity [N,1,size,size] of each scan [N,1,8,8] at centre [N,2] with box side scale [N], in pixels."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    # grid_sample wants the map from output to input coordinates, both in [-1, 1]
    ratio = size / scale
    rows_x = torch.stack([cos, sin], 1) * ratio[:, None]
    rows_y = torch.stack([-sin + shear * cos, cos + shear * sin], 1) * ratio[:, None]
    linear = torch.stack([rows_x, rows_y], 1)
    middle = 2 * (centre + 0.5) / size - 1
    theta = torch.cat([linear, -(linear @ middle[:, :, None])], 2)
    grid = F.affine_grid(theta, [len(scans), 1, size, size], align_corners=False)
    soft = F.grid_sample(
        F.interpolate(scans, scale_factor=4, mode="bicubic", align_corners=False),
        grid,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return ((soft - 0.2) / 0.5).clamp(0, 1)


def _texture(n: int, rng: torch.Generator, size: int) -> Tensor:
    """Smooth colour clouds plus a faint grating: [n,3,size,size]."""
    image = _uniform(rng, n, 3, 1, 1, low=0.2, high=0.8).expand(n, 3, size, size).clone()
    for cells, strength in ((3, 0.22), (8, 0.10), (24, 0.07)):
        noise = _uniform(rng, n, 3, cells, cells, low=-strength, high=strength)
        image += F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
    axis = torch.arange(size, dtype=torch.float32)
    angle, period = _uniform(rng, n, 1, 1, high=math.pi), _uniform(rng, n, 1, 1, low=4, high=14)
    wave = torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None]
    tint = _uniform(rng, n, 3, 1, 1, low=-0.06, high=0.06)
    return image + tint * torch.sin(2 * math.pi * wave / period).unsqueeze(1)


def _blend(image: Tensor, opacity: Tensor, colour: Tensor) -> Tensor:
    return image + opacity * (colour[:, :, None, None] - image)


def _strokes(image: Tensor, rng: torch.Generator, count: int) -> Tensor:
    """Draw ``count`` thin random segments over each image, each present with probability 2/3."""
    n, _, size, _ = image.shape
    axis = torch.arange(size, dtype=torch.float32)
    px, py = axis[None, None, :], axis[None, :, None]
    for _ in range(count):
        start = _uniform(rng, n, 2, high=size)
        angle, length = _uniform(rng, n, high=2 * math.pi), _uniform(rng, n, low=6, high=0.6 * size)
        step = torch.stack([torch.cos(angle), torch.sin(angle)], 1) * length[:, None]
        dx, dy = px - start[:, 0, None, None], py - start[:, 1, None, None]
        sx, sy = step[:, 0, None, None], step[:, 1, None, None]
        along = ((dx * sx + dy * sy) / (length**2)[:, None, None]).clamp(0, 1)
        distance = torch.hypot(dx - along * sx, dy - along * sy)
        width = _uniform(rng, n, 1, 1, low=0.4, high=1.0)
        shown = (_uniform(rng, n, 1, 1) < 2 / 3).float() * 0.9
        image = _blend(
            image, ((width + 0.5 - distance).clamp(0, 1) * shown).unsqueeze(1), _uniform(rng, n, 3)
        )
    return image


def _fragments(image: Tensor, rng: torch.Generator, split: Split, count: int) -> Tensor:
    """Blend quarters of random digits over each image: the right texture, no readable digit."""
    n, _, size, _ = image.shape
    for _ in range(count):
        scans = _pick(rng, split, torch.randint(10, (n,), generator=rng))
        top, left = torch.randint(2, (2, n), generator=rng) * 4
        rows = torch.arange(8)
        keep = ((rows >= top[:, None]) & (rows < top[:, None] + 4))[:, None, :, None]
        keep = keep & ((rows >= left[:, None]) & (rows < left[:, None] + 4))[:, None, None, :]
        opacity = _place(
            scans * keep,
            _uniform(rng, n, 2, high=size),
            _uniform(rng, n, low=20, high=30),
            _uniform(rng, n, high=2 * math.pi),
            torch.zeros(n),
            size,
        )
        image = _blend(image, 0.85 * opacity, _uniform(rng, n, 3))
    return image


def _contrasting(image: Tensor, opacity: Tensor, rng: torch.Generator, contrast: float) -> Tensor:
    """A colour [N,3] whose luminance differs by at least ``contrast`` from what it will cover."""
    luma = torch.tensor([0.299, 0.587, 0.114])
    cover = opacity.sum((2, 3)).clamp_min(1e-6)
    under = (image * opacity).sum((2, 3)) / cover @ luma
    colour = _uniform(rng, len(image), 3)
    up = under < 0.5
    wanted = torch.where(up, under + contrast, under - contrast) + _uniform(
        rng, len(image), low=-0.08, high=0.08
    )
    return (colour + (wanted - colour @ luma)[:, None]).clamp(0, 1)


def _boxes(opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Strokes [N,H,W] and their bounding boxes [N,H,W] as boolean masks."""
    strokes = opacity[:, 0] > 0.35
    rows, cols = strokes.any(2), strokes.any(1)

    def span(hit: Tensor) -> Tensor:
        return (hit.cummax(1).values) & (hit.flip(1).cummax(1).values.flip(1))

    return strokes, span(rows.int()).bool()[:, :, None] & span(cols.int()).bool()[:, None, :]


def _digit_scene(
    n: int,
    rng: torch.Generator,
    split: Split,
    *,
    scale: tuple[float, float] = (26, 34),
    contrast: float = 0.52,
) -> _Part:
    labels = torch.randint(10, (n,), generator=rng)
    image = _strokes(_texture(n, rng, SIZE), rng, 4)
    image = _fragments(image, rng, split, 3)
    side = _uniform(rng, n, low=scale[0], high=scale[1])
    margin = (side / 2)[:, None]
    centre = margin + _uniform(rng, n, 2) * (SIZE - 1 - 2 * margin)
    tilt, shear = _uniform(rng, n, low=-0.2, high=0.2), _uniform(rng, n, low=-0.15, high=0.15)
    opacity = _place(_pick(rng, split, labels), centre, side, tilt, shear, SIZE)
    image = _blend(image, opacity, _contrasting(image, opacity, rng, contrast))
    strokes, box = _boxes(opacity)
    return image + 0.02 * torch.randn(image.shape, generator=rng), labels, box, strokes, torch.zeros_like(box)


def _shortcut_scene(n: int, rng: torch.Generator, split: Split, decisive: bool) -> _Part:
    """A fainter digit, and a framed corner patch whose hue names the class in 95 % of the images."""
    image, labels, box, strokes, patch = _digit_scene(n, rng, split, scale=(24, 30), contrast=0.25)
    honest = _uniform(rng, n) < (SHORTCUT_RATE if decisive else 0.0)
    named = torch.where(honest, labels, torch.randint(10, (n,), generator=rng))
    hue = 2 * math.pi * named / 10
    colour = 0.5 + 0.45 * torch.stack([torch.cos(hue + shift) for shift in (0.0, 2.094, 4.189)], 1)
    corner = torch.randint(4, (n,), generator=rng)
    # white around black around the hue: no flat or noisy background passes for a patch
    frame = torch.ones(PATCH, PATCH)
    frame[1:-1, 1:-1] = 0
    for index in range(n):
        c = int(corner[index])
        rows = slice(0, PATCH) if c < 2 else slice(SIZE - PATCH, SIZE)
        cols = slice(0, PATCH) if c % 2 == 0 else slice(SIZE - PATCH, SIZE)
        image[index, :, rows, cols] = frame
        image[index, :, rows, cols][:, 3:-3, 3:-3] = colour[index, :, None, None]
        patch[index, rows, cols] = True
    strokes, box = strokes & ~patch, box & ~patch
    return image, labels, box, strokes, patch


def _tile_layout(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """labels [n] (3 = none, a quarter of all), deciding tile [n] (-1 for none), digit per tile [n,9]."""
    cells = GRID * GRID
    none = _uniform(rng, n) < 0.25
    labels = torch.where(none, 3, torch.randint(3, (n,), generator=rng))
    where = torch.where(none, -1, torch.randint(cells, (n,), generator=rng))
    digits = torch.randint(3, 10, (n, cells), generator=rng)
    chosen = torch.arange(cells)[None, :] == where[:, None]
    return labels, where, torch.where(chosen, labels[:, None], digits)


def _tile_masks(where: Tensor) -> Tensor:
    cells = torch.arange(GRID * GRID)[None, :] == where[:, None]
    grid = cells.view(-1, GRID, GRID)
    return grid.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)


def _mosaic_scene(n: int, rng: torch.Generator, split: Split) -> _Part:
    labels, where, digits = _tile_layout(n, rng)
    size, cells = GRID * TILE, GRID * GRID
    tiles = _texture(n * cells, rng, TILE)
    centre = TILE / 2 - 0.5 + _uniform(rng, n * cells, 2, low=-1.5, high=1.5)
    side = _uniform(rng, n * cells, low=18, high=23)
    tilt, shear = (_uniform(rng, n * cells, low=-0.15, high=0.15) for _ in range(2))
    opacity = _place(_pick(rng, split, digits.flatten()), centre, side, tilt, shear, TILE)
    tiles = _blend(tiles, opacity, _contrasting(tiles, opacity, rng, 0.52))

    def assemble(t: Tensor) -> Tensor:
        channels = t.shape[1]
        t = t.view(n, GRID, GRID, channels, TILE, TILE).permute(0, 3, 1, 4, 2, 5)
        return t.reshape(n, channels, size, size)

    truth = _tile_masks(where)
    strokes = (assemble(opacity)[:, 0] > 0.35) & truth
    image = assemble(tiles)
    image = image + 0.02 * torch.randn(image.shape, generator=rng)
    return image, labels, truth, strokes, torch.zeros_like(truth)


def _segment_scene(n: int, rng: torch.Generator) -> _Part:
    """Mosaics of flat tiles: each tile is a point in the (red, green) plane, one cluster per class.

    Ten clusters on a circle stand for the ten digits; the selective-dependence rule is the mosaic's.
    """
    labels, where, digits = _tile_layout(n, rng)
    angle = 2 * math.pi * digits / 10
    points = 0.5 + 0.35 * torch.stack([torch.cos(angle), torch.sin(angle)], -1)
    points = points + 0.03 * torch.randn(points.shape, generator=rng)
    colour = torch.cat([points, torch.full((*digits.shape, 1), 0.5)], -1).clamp(0, 1)
    image = colour.view(n, GRID, GRID, 3).permute(0, 3, 1, 2)
    image = image.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3)
    truth = _tile_masks(where)
    return image, labels, truth, truth.clone(), torch.zeros_like(truth)
