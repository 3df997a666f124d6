"""How strongly a unit acts on another: by ablating the source and running what lies between, whatever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ablation import Ablation, measure
from .network import Place
from .sites import Site

Chosen = Mapping[Site, Tensor]  # numbers of the units of each site that are part of a circuit


@dataclass(frozen=True, eq=False)
class Strengths:
    """Of the edges into the chosen units of one site (or into the score), from the chosen units of its parents.

    sources: (site, unit) of each column. effect [O, I]: what the edge adds to m, the target's change times the
    gradient of m by the target; change [O, I]: of the target alone, its norm over positions.
    """

    target: Site | None
    units: Tensor
    sources: tuple[tuple[Site, int], ...]
    effect: Tensor
    change: Tensor | None


def gradients(ablation: Ablation, row: int, places: Sequence[Place]) -> dict[Place, Tensor]:
    """The gradient of m by the values at those places, for one image."""
    net, x = ablation.net, ablation.x[row : row + 1]
    with torch.enable_grad():
        values = net.run({net.image: x.detach().requires_grad_(True)}, [net.scores, *places])
        m = measure(values[net.scores], ablation.label[row : row + 1], ablation.metric)
        found = torch.autograd.grad(m.sum(), [values[place] for place in places], allow_unused=True)
    net.passes += 2
    return {p: torch.zeros_like(values[p]) if g is None else g for p, g in zip(places, found, strict=True)}


def exact_edges(ablation: Ablation, row: int, chosen: Chosen) -> list[Strengths]:
    """Edges among the chosen units of one image, each source ablated in turn in all that leads to the target.

    Only what lies between a target and its parents is run, with every other activation as it is.
    """
    net = ablation.net
    slopes = gradients(ablation, row, [site.place for site in net.sites])
    targets: list[Site | None] = [site for site in net.sites if len(chosen.get(site, ()))]
    return [exact_into(ablation, row, chosen, target, slopes) for target in [*targets, None]]


@torch.no_grad()
def exact_into(
    ablation: Ablation, row: int, chosen: Chosen, target: Site | None, slopes: Mapping[Place, Tensor]
) -> Strengths:
    net = ablation.net
    place = net.scores if target is None else target.place
    units = torch.zeros(1, dtype=torch.long) if target is None else chosen[target]
    sources: list[tuple[Site, int]] = []
    effects, changes = [], []
    for parent in net.parents(place):
        for part in chosen.get(parent, torch.empty(0, dtype=torch.long)).split(ablation.micro_batch):
            value = source_ablated(ablation, row, parent, part, target)
            sources += [(parent, int(unit)) for unit in part]
            if target is None:
                label = ablation.label[row].expand(len(part))
                effect = ablation.alone[row] - measure(value, label, ablation.metric)
                effects.append(effect[None])
                changes.append(effect.abs()[None])
                continue
            clean = target.split(ablation.value(place, row))
            change = (clean - target.split(value))[:, units]  # [sources, targets, positions]
            effects.append((change * target.split(slopes[place])[:, units]).sum(2).T)
            changes.append(change.norm(dim=2).T)
    empty = ablation.full.new_zeros(len(units), 0)
    return Strengths(
        target, units, tuple(sources), torch.cat([empty, *effects], 1), torch.cat([empty, *changes], 1)
    )


def source_ablated(ablation: Ablation, row: int, source: Site, units: Tensor, target: Site | None) -> Tensor:
    """The target's value (the class scores) once for each of the units, with that unit of the source ablated.

    The target's other parents keep their values.
    """
    net = ablation.net
    place = net.scores if target is None else target.place
    rows = torch.full((len(units),), row, device=ablation.x.device)
    known = {net.image: ablation.x[rows]}
    for parent in net.parents(place):
        known[parent.place] = net.take(parent.place, ablation.values[parent.place], rows)
    keep = torch.ones(len(units), source.units, dtype=torch.bool, device=ablation.x.device)
    keep[torch.arange(len(units)), units] = False
    known[source.place] = ablation.mix(source, keep, rows)(known[source.place])
    return net.run(known, [place])[place]


@torch.no_grad()
def intervene(ablation: Ablation, row: int, edges: Sequence[tuple[Site, int, Site | None, int]]) -> Tensor:
    """What each edge (source, unit, target, unit) really does to m [edges]: the test of an edge's score.

    The target's unit is given the value it has when the source is ablated for it alone; all else reads the source
    as it is, and the network runs on from there to the class score.
    """
    net, out = ablation.net, []
    for part in [edges[i : i + ablation.micro_batch] for i in range(0, len(edges), ablation.micro_batch)]:
        for source, unit, target, aim in part:
            changed = source_ablated(ablation, row, source, torch.tensor([unit]), target)
            if target is None:
                out.append(
                    ablation.alone[row] - measure(changed, ablation.label[row : row + 1], ablation.metric)[0]
                )
                continue
            keep = torch.zeros(1, target.units, dtype=torch.bool, device=ablation.x.device)
            keep[0, aim] = True
            known = {net.image: ablation.x[row : row + 1]}
            for site in net.sites[: net.sites.index(target)]:
                known[site.place] = ablation.value(site.place, row)
            clean = ablation.value(target.place, row).unflatten(0, (-1, target.each))
            mixed = changed.unflatten(0, (-1, target.each)).where(target.spread(keep, clean), clean)
            known[target.place] = mixed.flatten(0, 1)
            scores = net.run(known, [net.scores])[net.scores]
            out.append(
                ablation.alone[row] - measure(scores, ablation.label[row : row + 1], ablation.metric)[0]
            )
    return torch.stack(out) if out else ablation.full[:0]
