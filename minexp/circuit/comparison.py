"""Circuits from an image, from its explanation and from other masks of the same area, at matched size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..classifier import Classifier
from .ablation import Ablation, generator
from .circuit import Interval, Test
from .examine import ENOUGH, Effort, examine, interval
from .ranking import Ranking, count_of, rank
from .readout import Reader

IMAGE, EXPLANATION, MOVED, GRAD_CAM = "image", "explanation", "moved mask", "Grad-CAM"


@dataclass(frozen=True)
class Line:
    """Circuits read from one kind of input, tested on one: means over images with 95 % intervals.

    enough: share of the nodes at which faithfulness first reaches 0.8. faithfulness, inside, outside, random,
    elsewhere: of the circuits of ``size``, as in `Test` (random: mean fall of m over the random circuits). curve:
    faithfulness at each of the sizes. each: enough, cpr and cmd of every image.
    """

    source: str
    tested_on: str
    size: float
    enough: Interval
    faithfulness: Interval
    cpr: Interval
    cmd: Interval
    inside: Interval
    outside: Interval
    random: Interval
    elsewhere: Interval
    sizes: tuple[float, ...]
    curve: tuple[Interval, ...]
    each: tuple[tuple[float, float, float], ...]

    def less(self, other: Line) -> tuple[Interval, Interval, Interval]:
        """Differences of enough, cpr and cmd to another line's, image by image."""
        pairs = list(zip(self.each, other.each, strict=True))
        a, b, c = (interval([mine[i] - its[i] for mine, its in pairs]) for i in range(3))
        return a, b, c


def compare(reader: Reader, x: Tensor, masks: Tensor, *, size: float = 0.1, controls: int = 20) -> list[Line]:
    """Lines for circuits read from images x [B,C,H,W], and from what masks [B,H,W] and their rivals keep of them.

    The rivals have each mask's area: the mask itself moved elsewhere (cyclically), and the highest values of Grad-CAM.
    Every circuit is tested on what it was read from and, for the class of the whole image, on that.
    """
    whole, label = reader.prepare(x)
    on_image = reader.ablation(whole, label)
    lines: list[Line] = []
    for name, e in rivals(reader, whole, label, masks).items():
        own = on_image if name == IMAGE else reader.ablation(e, label)
        settings = reader.settings
        ranking = rank(own, settings.by, sizes=settings.sizes, necessity=settings.necessity)
        if name != IMAGE:
            lines.append(line_of(reader, own, ranking, name, "itself", size=size, controls=controls))
        lines.append(line_of(reader, on_image, ranking, name, IMAGE, size=size, controls=controls))
    return lines


def rivals(reader: Reader, x: Tensor, label: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """What circuits are read from: the images, what their masks keep, and what other masks of the same area do."""
    masks = masks.to(x.device)
    inputs = {
        IMAGE: x,
        EXPLANATION: torch.where(masks[:, None], x, reader.blank),
        MOVED: torch.where(moved(masks)[:, None], x, reader.blank),
    }
    cam = grad_cam(reader.classifier, x, label)
    if cam is not None:
        inputs[GRAD_CAM] = torch.where(highest(cam, masks.flatten(1).sum(1))[:, None], x, reader.blank)
    return inputs


def line_of(
    reader: Reader,
    ablation: Ablation,
    ranking: Ranking,
    source: str,
    tested_on: str,
    *,
    size: float = 0.1,
    controls: int = 20,
) -> Line:
    """The line of one ranking, tested on the images of ``ablation``."""
    counts = [count_of(size, ablation.net.nodes)] * len(ranking.key)
    effort, sizes = Effort(controls), reader.settings.sizes
    tests = examine(ablation, ranking, counts, sizes=sizes, effort=effort, others=reader.others)
    each = tuple((_enough(t), _known(t.cpr), _known(t.cmd)) for t in tests)
    enough, cpr, cmd = (interval(column) for column in zip(*each, strict=True))
    return Line(
        source=source,
        tested_on=tested_on,
        size=size,
        enough=enough,
        faithfulness=interval([t.faithfulness for t in tests]),
        cpr=cpr,
        cmd=cmd,
        inside=interval([t.inside_drop for t in tests]),
        outside=interval([t.outside_drop for t in tests]),
        random=interval([t.random_drop.mean for t in tests if t.random_drop is not None]),
        elsewhere=interval([_known(t.elsewhere) for t in tests]),
        sizes=tests[0].sizes,
        curve=tuple(interval(column) for column in zip(*(t.curve for t in tests), strict=True)),
        each=each,
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _enough(test: Test) -> float:
    """Share of the nodes at which the curve first reaches 0.8, between two sizes by the logarithm of the size."""
    last: tuple[float, float] | None = None
    for share, f in zip(test.sizes, test.curve, strict=True):
        if math.isfinite(f) and f >= ENOUGH:
            if last is None or last[1] >= f:
                return share
            t = (ENOUGH - last[1]) / (f - last[1])
            return math.exp((1 - t) * math.log(last[0]) + t * math.log(share))
        if math.isfinite(f):
            last = share, f
    return 1.0


def moved(masks: Tensor, seed: int = 0) -> Tensor:
    """Each mask [B,H,W] shifted by at least a quarter of each side, around the edges, to a random place."""
    rng, out = generator(seed), []
    for mask in masks:
        shift = [
            int(torch.randint(side // 4, side - side // 4 + 1, (), generator=rng)) for side in mask.shape
        ]
        out.append(mask.roll(shift, (0, 1)))
    return torch.stack(out)


def grad_cam(classifier: Classifier, x: Tensor, label: Tensor) -> Tensor | None:
    """Grad-CAM [B,H,W] at the last tapped layer with a grid (arXiv 1610.02391); None for a model without one."""
    with torch.enable_grad():
        scores, features = classifier.features(x.detach().requires_grad_(True))
        total = scores.gather(1, label[:, None]).sum()
        for layout, feature in reversed(list(zip(classifier.layouts, features, strict=True))):
            if layout.grid is None or feature.ndim < 3:
                continue
            (slope,) = torch.autograd.grad(total, feature, allow_unused=True, retain_graph=True)
            if slope is not None:  # a copy of what is overwritten later has none
                break
        else:
            return None
    value, weight = layout.spatial(feature.detach()), layout.spatial(slope).mean((2, 3), keepdim=True)
    cam = (value * weight).sum(1, keepdim=True).relu()
    return F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def highest(values: Tensor, counts: Tensor) -> Tensor:
    """Masks [B,H,W] of the counts[b] highest entries of each map, ties by position."""
    flat = values.flatten(1)
    place = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (place < counts.to(place.device)[:, None]).view_as(values)
