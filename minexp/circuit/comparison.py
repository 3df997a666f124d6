"""Circuits from an image, from its explanation and from other masks of the same area, at matched size."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    enough: share of the nodes at which faithfulness first reaches 0.8. inside, outside, random: fall of m when
    the circuit at ``size``, all but it, or random circuits like it are ablated. curve: faithfulness at each of the
    sizes. differences of enough, cpr and cmd to the circuits from the whole image, image by image.
    """

    source: str
    tested_on: str
    images: int
    size: float
    enough: Interval
    faithfulness: Interval
    cpr: Interval
    cmd: Interval
    inside: Interval
    outside: Interval
    random: Interval
    sizes: tuple[float, ...]
    curve: tuple[Interval, ...]
    enough_difference: Interval | None = None
    cpr_difference: Interval | None = None
    cmd_difference: Interval | None = None


def compare(reader: Reader, x: Tensor, masks: Tensor, *, size: float = 0.1, controls: int = 20) -> list[Line]:
    """Lines for circuits read from images x [B,C,H,W], and from what masks [B,H,W] and their rivals keep of them.

    The rivals have each mask's area: the mask itself moved elsewhere (cyclically), and the highest values of Grad-CAM.
    Every circuit is tested on what it was read from and, for the class of the whole image, on that.
    """
    classifier = reader.classifier
    whole, label = reader.prepare(x)
    inputs = {
        IMAGE: whole,
        EXPLANATION: torch.where(masks[:, None].to(whole.device), whole, reader.blank),
        MOVED: torch.where(moved(masks)[:, None].to(whole.device), whole, reader.blank),
    }
    cam = grad_cam(classifier, whole, label)
    if cam is not None:
        inputs[GRAD_CAM] = torch.where(highest(cam, masks.flatten(1).sum(1))[:, None], whole, reader.blank)
    sizes, by = reader.settings.sizes, reader.settings.by
    on_image = reader.ablation(whole, label)
    lines: list[Line] = []
    base: dict[str, list[tuple[float, float, float]]] = {}
    for name, e in inputs.items():
        own = on_image if name == IMAGE else reader.ablation(e, label)
        ranking = rank(own, by, sizes=sizes)
        for place, ablation in (("itself", own), (IMAGE, on_image)):
            if name == IMAGE and place == IMAGE:
                continue
            tests = _tests(ablation, ranking, size, sizes, controls)
            figures = [(_enough(t), t.cpr or math.nan, t.cmd or math.nan) for t in tests]
            base.setdefault(IMAGE, figures)
            lines.append(_line(name, place, size, tests, figures, base[IMAGE] if name != IMAGE else None))
    return lines


def _tests(
    ablation: Ablation, ranking: Ranking, size: float, sizes: Sequence[float], controls: int
) -> list[Test]:
    count = count_of(size, ablation.net.nodes)
    return examine(ablation, ranking, [count] * len(ranking.key), sizes=sizes, effort=Effort(controls))


def _line(
    name: str,
    place: str,
    size: float,
    tests: Sequence[Test],
    figures: Sequence[tuple[float, float, float]],
    base: Sequence[tuple[float, float, float]] | None,
) -> Line:
    enough, cpr, cmd = (interval(column) for column in zip(*figures, strict=True))
    differences: list[Interval | None] = [None, None, None]
    if base is not None:
        pairs = list(zip(figures, base, strict=True))
        differences = [interval([mine[i] - other[i] for mine, other in pairs]) for i in range(3)]
    return Line(
        source=name,
        tested_on=place,
        images=len(tests),
        size=size,
        enough=enough,
        faithfulness=interval([t.faithfulness for t in tests]),
        cpr=cpr,
        cmd=cmd,
        inside=interval([t.inside_drop for t in tests]),
        outside=interval([t.outside_drop for t in tests]),
        random=interval([t.random_drop.mean for t in tests if t.random_drop is not None]),
        sizes=tests[0].sizes,
        curve=tuple(interval(column) for column in zip(*(t.curve for t in tests), strict=True)),
        enough_difference=differences[0],
        cpr_difference=differences[1],
        cmd_difference=differences[2],
    )


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
