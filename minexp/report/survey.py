"""Where the masks of a store lie: by class, against their class, and against each other. One pass over all masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..data.store import iter_store
from ..data.table import popcount, row_lengths

GRID = 32  # cells a side, at most, of a mean mask
ENOUGH = 20  # images of a class before anything is said of where its masks lie
ONE_CORNER, CORNERS_OR_BORDER = 0.5, 0.7  # shares of a class's evidence in such a place that are an alarm
UNLIKE = 6.0  # robust standard deviations from the class's typical distance that make an outlier
_NAMES = ("top left", "top right", "bottom left", "bottom right")

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
Counts = npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class ClassMap:
    """Masks of one class. mean [h, w]: share of its images whose mask covers a cell, on a grid of at most GRID.

    corner: share of a mask's pixels, on average, in the quarter-sided square of the fullest corner, whose name is
    ``where``; corners: in all four; border: in the outer eighth of the image. 0.06, 0.25 and 0.44 for masks spread
    evenly.
    """

    count: int
    mean: Floats
    corner: float
    where: str
    corners: float
    border: float

    @property
    def alarm(self) -> str | None:
        """Where the class's evidence is that is no place for an object, in words."""
        if self.count < ENOUGH:
            return None
        if self.corner >= ONE_CORNER:
            return f"{_percent(self.corner)} of its evidence lies in the {self.where} corner"
        if self.corners >= CORNERS_OR_BORDER:
            return f"{_percent(self.corners)} of its evidence lies in the corners"
        if self.border >= CORNERS_OR_BORDER:
            return f"{_percent(self.border)} of its evidence lies along the border"
        return None


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


@dataclass(frozen=True, eq=False)
class Survey:
    """classes: by label. twins: groups of positions whose masks are the same at a 16th of the side, within a class,
    the largest first. outliers: positions whose mask lies where those of its class do not, the oddest first.
    """

    classes: Mapping[int, ClassMap]
    twins: list[Positions]
    outliers: Positions


def survey(directory: Path, labels: Floats) -> Survey:
    """Look at all masks of a store. labels: of its rows, NaN where there is none."""
    passed = _Pass()
    position = 0
    for table in iter_store(directory, ["mask", "h", "w"]):
        passed.take(table, labels[position : position + len(table)], position)
        position += len(table)
    return passed.survey()


class _Pass:
    """What is kept of the masks seen: sums by class, and of each row 64 bytes of profile and 8 of signature."""

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None
        self._side = 1
        self._sums: dict[int, npt.NDArray[np.uint64]] = {}
        self._edges: dict[int, Floats] = {}
        self._counts: dict[int, int] = {}
        self._rows: list[Positions] = []
        self._labels: list[Positions] = []
        self._profiles: list[npt.NDArray[np.uint8]] = []
        self._signatures: list[npt.NDArray[np.uint64]] = []

    def take(self, table: Any, labels: Floats, start: int) -> None:
        """Masks of another size than the first ones are passed over: they could not be laid on each other."""
        masks = table["mask"].combine_chunks()
        h, w = (np.asarray(table[name].fill_null(0).to_numpy()) for name in ("h", "w"))
        usable = np.flatnonzero(~np.asarray(masks.is_null()) & np.isfinite(labels))
        if not len(usable):
            return
        if self._size is None:
            self._size = int(h[usable[0]]), int(w[usable[0]])
        usable = usable[(h[usable] == self._size[0]) & (w[usable] == self._size[1])]
        bits = _stacked(masks, usable, -(-self._size[0] * self._size[1] // 8))
        cells, self._side = cell_counts(bits, *self._size)
        fine = block_sums(cells, 2, 2)
        coarse = block_sums(fine, 2, 2).reshape(len(fine), -1)
        found = labels[usable].astype(np.int64)
        self._add(cells, found)
        self._rows.append(usable + start)
        self._labels.append(found)
        self._profiles.append((coarse.astype(np.float32) * (255 / (16 * self._side**2))).astype(np.uint8))
        self._signatures.append(_signature(fine >= 2 * self._side**2))

    def _add(self, cells: Counts, labels: Positions) -> None:
        for label, mask, edges in zip(labels.tolist(), cells, _edges(cells), strict=True):
            if label not in self._sums:
                self._sums[label], self._edges[label] = np.zeros(mask.shape, np.uint64), np.zeros(5)
            self._sums[label] += mask
            self._edges[label] += edges
            self._counts[label] = self._counts.get(label, 0) + 1

    def survey(self) -> Survey:
        if not self._rows:
            return Survey({}, [], np.zeros(0, np.int64))
        assert self._size is not None
        pixels = block_sums(np.ones((1, *self._size), np.uint8), self._side, self._side)[0]
        classes = {
            label: _map(count, self._sums[label] / (pixels * count), self._edges[label] / count)
            for label, count in self._counts.items()
        }
        rows, labels = np.concatenate(self._rows), np.concatenate(self._labels)
        profiles, signatures = np.concatenate(self._profiles), np.concatenate(self._signatures)
        return Survey(classes, _twins(rows, labels, profiles, signatures), _outliers(rows, labels, profiles))


def _stacked(masks: pa.BinaryArray, rows: Positions, width: int) -> npt.NDArray[np.uint8]:
    """The bytes of the masks in those rows, each ``width`` long: [rows, width]."""
    starts, lengths, content = row_lengths(masks)
    if len(rows) == len(masks) and (lengths == width).all():  # they lie one behind the other
        return content[starts[0] : starts[0] + width * len(rows)].reshape(-1, width)
    return content[starts[rows][:, None] + np.arange(width)]


def cell_counts(bits: npt.NDArray[np.uint8], h: int, w: int) -> tuple[Counts, int]:
    """Packed masks [n, bytes] as mask pixels a cell, [n, at most GRID, at most GRID], and the side of a cell."""
    n = len(bits)
    if w % 8 == 0 and w > 2 * GRID:  # whole bytes lie in a cell
        side = 8 * -(-max(h, w) // (8 * GRID))
        return block_sums(popcount(bits).reshape(n, h, w // 8), side, side // 8), side
    side = -(-max(h, w) // GRID)
    return block_sums(np.unpackbits(bits, axis=1, count=h * w).reshape(n, h, w), side, side), side


def block_sums(values: npt.NDArray[Any], rows: int, columns: int) -> Counts:
    """Sums over blocks of [n, h, w], the last ones cut short: [n, ⌈h / rows⌉, ⌈w / columns⌉]."""
    for axis, side in ((1, rows), (2, columns)):
        if lacking := -values.shape[axis] % side:
            wide = [(0, 0)] * 3
            wide[axis] = (0, lacking)
            values = np.pad(values, wide)
        # slices added up: a sum over a short axis takes numpy several times as long
        parts = [values[(slice(None),) * axis + (slice(first, None, side),)] for first in range(side)]
        values = parts[0].astype(np.uint16)
        for part in parts[1:]:
            values += part
    return values


def _signature(cells: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each pattern [n, h, w]."""
    packed = np.packbits(cells.reshape(len(cells), -1), axis=1)
    padded = np.zeros((len(cells), -(-packed.shape[1] // 8) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    out = np.zeros(len(cells), np.uint64)
    for word in padded.view(np.uint64).T:
        out = (out ^ word) * np.uint64(0x9E3779B97F4A7C15)
        out ^= out >> np.uint64(32)
    return out


def _edges(cells: Counts) -> Floats:
    """Shares of each mask's pixels in the four corners, as in _NAMES, and along the border: [n, 5]."""
    whole = np.maximum(1, cells.sum((1, 2), dtype=np.int64))
    h, w = (max(1, round(side / 4)) for side in cells.shape[1:])
    top, left = (max(1, round(side / 8)) for side in cells.shape[1:])
    corners = [cells[:, :h, :w], cells[:, :h, -w:], cells[:, -h:, :w], cells[:, -h:, -w:]]
    sums = [part.sum((1, 2), dtype=np.int64) for part in (*corners, cells[:, top:-top, left:-left])]
    sums[-1] = cells.sum((1, 2), dtype=np.int64) - sums[-1]
    return np.stack(sums, axis=1) / whole[:, None]


def _map(count: int, mean: Floats, edges: Floats) -> ClassMap:
    best = int(np.argmax(edges[:4]))
    return ClassMap(count, mean, float(edges[best]), _NAMES[best], float(edges[:4].sum()), float(edges[4]))


def _twins(
    rows: Positions, labels: Positions, profiles: npt.NDArray[np.uint8], signatures: npt.NDArray[np.uint64]
) -> list[Positions]:
    part = profiles.any(1) & (profiles < 255).any(1)  # empty and full masks are all alike
    rows, keys = (
        rows[part],
        signatures[part] ^ (labels[part].astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)),
    )
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    groups = [group for group in np.split(rows[order], cuts) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def _outliers(rows: Positions, labels: Positions, profiles: npt.NDArray[np.uint8]) -> Positions:
    """Rows whose profile is farther from their class's mean, by cosine, than those of the class usually are."""
    found, scores = [], []
    order = np.argsort(labels, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(group) < ENOUGH:
            continue
        own = profiles[group].astype(np.float32)
        mean = own.mean(0)
        norms = np.linalg.norm(own, axis=1) * np.linalg.norm(mean)
        distance = 1 - own @ mean / np.maximum(norms, 1e-9)
        middle = np.median(distance)
        spread = 1.4826 * np.median(np.abs(distance - middle))
        score = (distance - middle) / max(float(spread), 0.02)
        odd = score > UNLIKE
        found.append(rows[group[odd]])
        scores.append(score[odd])
    if not found:
        return np.zeros(0, np.int64)
    positions = np.concatenate(found)
    return positions[np.argsort(-np.concatenate(scores), kind="stable")]
