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
) -> Ranking:
    """Score every node for every image.

    gradient: (activation - baseline) * gradient, one forward and backward pass. integrated: its integral while all
    nodes go from their baseline to their value together; the scores sum to m(all) - m(none). pruned: the gradient
    score in what is left of the network, while nodes are taken from it a few at a time so that m stays near m(all);
    the circuits of the given ``sizes`` (shares of the nodes) are among those on the way, and a score is the mean of
    the node's effects as long as it is left. energy: the activation's
    norm (arXiv 2509.25686), ranked within each layer. Raises RequestError for an unknown way.
    """
    if by not in get_args(By):
        raise RequestError(f"unknown ranking {by!r}; choose {', '.join(get_args(By))}")
    if by == "energy":
        return _energy(ablation)
    ones = torch.ones(len(ablation), ablation.net.nodes, device=ablation.x.device)
    if by == "pruned":
        return _pruned(ablation, ones, _schedule(ones.shape[1], rounds, sizes))
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


def _pruned(ablation: Ablation, ones: Tensor, counts: Sequence[int]) -> Ranking:
    """Of the nodes left, sorted by effect, neighbours go whose total effect brings m nearest to m(all)."""
    left, total, rounds, key = (
        ones.clone(),
        torch.zeros_like(ones),
        torch.zeros_like(ones),
        torch.zeros_like(ones),
    )
    remaining = ones.shape[1]
    for count in [*counts, 0]:
        m, effect = ablation.gradient(left)
        total, rounds = total + left * effect, rounds + left
        gone = remaining - count
        order = effect.masked_fill(left == 0, torch.inf).argsort(dim=1, stable=True)[:, :remaining]
        below = functional.pad(effect.gather(1, order).double().cumsum(1), (1, 0))
        after = m[:, None] - (below[:, gone:] - below[:, : remaining - gone + 1])
        start = (after - ablation.full[:, None]).abs().argmin(1, keepdim=True)
        chosen = order.gather(1, start + torch.arange(gone, device=order.device))
        # The fewer nodes are left when it goes, the larger a node's key; of those that go together, by effect.
        numbers = torch.arange(remaining, count, -1, device=key.device, dtype=key.dtype)
        key.scatter_(1, chosen, -numbers.log().expand_as(chosen))
        left.scatter_(1, chosen, 0.0)
        remaining = count
    return Ranking("pruned", total / rounds, key)


def _schedule(nodes: int, rounds: int, sizes: Sequence[float]) -> list[int]:
    """Counts to prune to: falling ever more slowly, by way of every size that is asked for."""
    falling = {round(nodes * (1 - step / rounds) ** 2) for step in range(1, rounds)}
    return sorted((falling | {count_of(size, nodes) for size in sizes}) - {0, nodes}, reverse=True)
