"""Which nodes matter most: four ways to score and order all nodes of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import RequestError
from .ablation import Ablation

By = Literal["pruned", "integrated", "gradient", "energy"]
ROUNDS = 32  # of pruning, beside one for each size asked for
STEPS = 16  # of the integral
NECESSITY = 0.02  # weight of what the score loses without the circuit, beside what the circuit keeps of it


@dataclass(frozen=True, eq=False)
class Ranking:
    """scores float [B, nodes]: effect of each node on m (energy: its norm); key [B, nodes]: the larger, the sooner.

    by: one of `By`, or what another method calls its scores.
    """

    by: str
    scores: Tensor
    key: Tensor

    def keep(self, count: int) -> Tensor:
        """The circuits of that many nodes: bool [B, nodes]. Ties go to the earlier node."""
        order = self.key.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return torch.zeros_like(self.key, dtype=torch.bool).scatter(1, order, True)

    def together(self) -> Ranking:
        """One ranking [1, nodes] of all images: mean score, mean key."""
        return Ranking(self.by, self.scores.mean(0, keepdim=True), self.key.mean(0, keepdim=True))


def count_of(size: float, nodes: int) -> int:
    """Nodes in a circuit that is this share of them: at least one."""
    return min(nodes, max(1, round(size * nodes)))


def rank(
    ablation: Ablation,
    by: By,
    *,
    sizes: Sequence[float] = (),
    rounds: int = ROUNDS,
    steps: int = STEPS,
    necessity: float = NECESSITY,
) -> Ranking:
    """Score every node for every image.

    gradient: (activation - baseline) * gradient, one forward and backward pass. integrated: its integral while all
    nodes go from their baseline to their value together; the scores sum to m(all) - m(none). pruned: the gradient
    score in what is left of the network, plus ``necessity`` times that in the rest, what was taken from it so far,
    while nodes are taken a few at a time so that m of what is left stays near m(all) and m of the rest near m(none);
    the circuits of the given ``sizes`` (shares of the nodes) are among those on the way, and a score is the mean of
    the node's effects as long as it is left. energy: the activation's norm (arXiv 2509.25686), ranked within each
    layer. Raises RequestError for an unknown way.
    """
    if by not in get_args(By):
        raise RequestError(f"unknown ranking {by!r}; choose {', '.join(get_args(By))}")
    if by == "energy":
        return _energy(ablation)
    ones = torch.ones(len(ablation), ablation.net.nodes, device=ablation.x.device)
    if by == "pruned":
        return _pruned(ablation, ones, _schedule(ones.shape[1], rounds, sizes), necessity)
    if by == "gradient":
        scores = ablation.gradient(ones)[1]
    else:
        scores = torch.zeros_like(ones)
        for step in range(steps):
            scores += ablation.gradient(ones * ((step + 0.5) / steps))[1] / steps
    return Ranking(by, scores, scores)


def _energy(ablation: Ablation) -> Ranking:
    scores, keys = [], []
    for site in ablation.net.ablated:
        energy = site.split(ablation.values[site.place])[: len(ablation)].norm(dim=2)
        place = energy.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        scores.append(energy)
        keys.append(1 - (place + 0.5) / site.units)  # the same share of every layer
    return Ranking("energy", torch.cat(scores, 1), torch.cat(keys, 1))


def _pruned(ablation: Ablation, ones: Tensor, counts: Sequence[int], necessity: float) -> Ranking:
    """Of the nodes left, sorted by effect, neighbours go whose total effect leaves both sides nearest to their aims.

    What is left aims at m(all). The rest, which they join, aims at m(none) or less: a unit whose copies would carry
    the class on without it is of no use in a circuit unless they are in it, too.
    """
    left, total, rounds, key = ones.clone(), *(torch.zeros_like(ones) for _ in range(3))
    rows = torch.arange(len(ones), device=ones.device)
    remaining = ones.shape[1]
    for count in [*counts, 0]:
        if necessity:
            m, effects = ablation.gradient(torch.cat([left, 1 - left]), rows.repeat(2))
            (m, m_rest), (kept, missed) = m.chunk(2), effects.chunk(2)
        else:
            m, kept = ablation.gradient(left)
            m_rest, missed = torch.zeros_like(m), torch.zeros_like(kept)
        effect = kept + necessity * missed
        total, rounds = total + left * effect, rounds + left
        gone = remaining - count
        order = effect.masked_fill(left == 0, torch.inf).argsort(dim=1, stable=True)[:, :remaining]
        short = (m[:, None] - _windows(kept.gather(1, order), gone) - ablation.full[:, None]).abs()
        over = m_rest[:, None] + _windows(missed.gather(1, order), gone) - ablation.empty[:, None]
        start = (short + necessity * over.clamp_min(0)).argmin(1, keepdim=True)
        chosen = order.gather(1, start + torch.arange(gone, device=order.device))
        # The fewer nodes are left when it goes, the larger a node's key; of those that go together, by effect.
        numbers = torch.arange(remaining, count, -1, device=key.device, dtype=key.dtype)
        key.scatter_(1, chosen, -numbers.log().expand_as(chosen))
        left.scatter_(1, chosen, 0.0)
        remaining = count
    return Ranking("pruned", total / rounds, key)


def _windows(values: Tensor, width: int) -> Tensor:
    """Sums of every ``width`` neighbours of values [B, n], in double precision: [B, n - width + 1]."""
    below = functional.pad(values.double().cumsum(1), (1, 0))
    return below[:, width:] - below[:, : below.shape[1] - width]


def _schedule(nodes: int, rounds: int, sizes: Sequence[float]) -> list[int]:
    """Counts to prune to: falling ever more slowly, by way of every size that is asked for."""
    falling = {round(nodes * (1 - step / rounds) ** 2) for step in range(1, rounds)}
    return sorted((falling | {count_of(size, nodes) for size in sizes}) - {0, nodes}, reverse=True)
