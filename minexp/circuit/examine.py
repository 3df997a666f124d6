"""The test of circuits: kept alone, taken out, against random ones, at every size, on other images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..intervals import Z95
from .ablation import Ablation, generator
from .circuit import Interval, Test, area
from .network import Network
from .ranking import Ranking, count_of

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the nodes
ENOUGH = 0.8  # faithfulness of a circuit that is worth its name


@dataclass(frozen=True)
class Effort:
    """How much of the test is made: random circuits at the circuit's size, and at every size of the curve."""

    controls: int = 20
    curve_controls: int = 0


def smallest_enough(ablation: Ablation, ranking: Ranking, sizes: Sequence[float], limit: int) -> list[int]:
    """For each image, the nodes of the smallest circuit among the sizes that is faithful enough.

    Where none within the limit is, the most faithful one within it.
    """
    counts = [c for c in dict.fromkeys(count_of(s, ablation.net.nodes) for s in sizes) if c <= limit] or [
        limit
    ]
    f = torch.stack([ablation.faithfulness(expand(ranking.keep(c), len(ablation))) for c in counts])
    if len(ranking.key) < len(ablation):
        f = f.mean(1, keepdim=True)
    chosen = []
    for column in f.nan_to_num(-math.inf).T.tolist():
        good = [count for count, value in zip(counts, column, strict=True) if value >= ENOUGH]
        chosen.append(good[0] if good else counts[column.index(max(column))])
    return chosen


def examine(
    ablation: Ablation,
    ranking: Ranking,
    counts: Sequence[int],
    *,
    sizes: Sequence[float] = SIZES,
    effort: Effort = Effort(),
    others: Ablation | None = None,
) -> list[Test]:
    """Test the circuits of the first counts[b] nodes of each image's ranking; a ranking of one row is all images'."""
    number = len(ablation)
    keep = torch.cat(
        [ranking.keep(count)[min(b, len(ranking.key) - 1)][None] for b, count in enumerate(counts)]
    )
    keep = expand(keep, number)
    rows = torch.arange(number, device=keep.device)
    inside, outside = ablation.scores(keep, rows), ablation.scores(~keep, rows)
    steps = sorted({*sizes})
    curve = []
    for size in steps:
        kept = expand(ranking.keep(count_of(size, ablation.net.nodes)), number)
        curve.append(ablation.faithfulness(kept).tolist())
    tests = []
    for b in range(number):
        values = [column[b] for column in curve]
        elsewhere = None if others is None else _elsewhere(ablation, others, keep[b], b)
        random = _random(ablation, keep[b], b, effort.controls)
        randoms: list[Interval] = []
        if effort.curve_controls:
            for size in steps:
                same = ranking.keep(count_of(size, ablation.net.nodes))[min(b, len(ranking.key) - 1)]
                randoms.append(_random(ablation, same, b, effort.curve_controls)[0])
        tests.append(
            Test(
                ablation=ablation.baseline.kind,
                metric=ablation.metric,
                full=float(ablation.full[b]),
                empty=float(ablation.empty[b]),
                faithfulness=float(ablation.relative(inside[b], rows[b])),
                completeness=float(ablation.relative(outside[b], rows[b])),
                inside_drop=float(ablation.full[b] - outside[b]),
                outside_drop=float(ablation.full[b] - inside[b]),
                random_faithfulness=random[0] if effort.controls else None,
                random_drop=random[1] if effort.controls else None,
                elsewhere=elsewhere,
                sizes=tuple(steps),
                curve=tuple(values),
                random_curve=tuple(randoms),
                cpr=area(steps, values),
                cmd=area(steps, [abs(1 - value) for value in values]),
            )
        )
    return tests


def random_like(net: Network, keep: Tensor, draws: int, seed: int) -> Tensor:
    """Random circuits bool [draws, nodes] with as many units of each site as keep [nodes] has."""
    rng = generator(seed)
    parts = []
    for site, kept in net.by_site(keep[None]).items():
        noise = torch.rand(draws, site.units, generator=rng)
        first = noise.argsort(dim=1)[:, : int(kept.sum())]
        parts.append(torch.zeros(draws, site.units, dtype=torch.bool).scatter(1, first, True))
    return torch.cat(parts, 1).to(keep.device)


def _random(ablation: Ablation, keep: Tensor, row: int, draws: int) -> tuple[Interval, Interval]:
    """Faithfulness of random circuits, and the fall of m when they are ablated."""
    like = random_like(ablation.net, keep, draws, ablation.seeds[row])
    rows = torch.full((draws,), row, device=keep.device)
    f = ablation.faithfulness(like, rows)
    drop = ablation.full[row] - ablation.scores(~like, rows)
    return interval(f.tolist()), interval(drop.tolist())


def _elsewhere(ablation: Ablation, others: Ablation, keep: Tensor, row: int) -> float | None:
    """Mean over images of other classes of what the circuit does there for this image's class."""
    label = int(ablation.label[row])
    rows = (others.label != label).nonzero()[:, 0]
    if not len(rows):
        return None
    m = others.scores(keep.expand(len(rows), -1), rows, torch.full_like(rows, label))
    there = torch.full((len(rows),), row, device=keep.device)
    return float(ablation.relative(m, there).mean())


def members(
    ablation: Ablation, row: int, keep: Tensor, nodes: Sequence[int]
) -> tuple[list[float], list[float]]:
    """For each node of a circuit: the fall of m when it alone is ablated, and the faithfulness lost without it."""
    rows = torch.full((len(nodes),), row, device=keep.device)
    one = torch.zeros(len(nodes), len(keep), dtype=torch.bool, device=keep.device)
    one[torch.arange(len(nodes)), list(nodes)] = True
    alone = ablation.full[row] - ablation.scores(~one, rows)
    lost = ablation.faithfulness(keep[None], rows[:1]) - ablation.faithfulness(keep & ~one, rows)
    return alone.tolist(), lost.tolist()


def expand(keep: Tensor, rows: int) -> Tensor:
    """A shared circuit [1, nodes] for every image; others as they are."""
    return keep.expand(rows, -1) if len(keep) == 1 else keep


def interval(values: Sequence[float]) -> Interval:
    """Mean and its 95 % interval (normal approximation) over finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = sum(finite) / len(finite)
    spread = math.sqrt(sum((value - mean) ** 2 for value in finite) / max(1, len(finite) - 1))
    half = Z95 * spread / math.sqrt(len(finite))
    return Interval(mean, mean - half, mean + half, len(finite))


def mean_test(tests: Sequence[Test]) -> Test:
    """The test of one circuit over several images, or of one circuit each: the mean of every figure."""
    if len(tests) == 1:
        return tests[0]
    return Test(**{f.name: _mean([getattr(test, f.name) for test in tests]) for f in fields(Test)})


def _mean(values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    first = present[0] if present else None
    if isinstance(first, tuple):
        return tuple(_mean(column) for column in zip(*present, strict=True))
    if isinstance(first, Interval):
        return interval([value.mean for value in present])
    if isinstance(first, float):
        return interval(present).mean
    return first
