"""The nodes and edges of a circuit whose units are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._ops import edge_topk
from ..classifier import Classifier
from .ablation import Ablation
from .attribution import gradient_edges
from .circuit import SCORE, Edge, Node
from .edges import Strengths, exact_edges, gradients
from .examine import members
from .network import Network
from .published import published_edges
from .ranking import Ranking
from .settings import Settings
from .sites import Site

LINKS = 16  # edges into the class score
IMAGES = 16  # of a set, that edges and the effects of single nodes are averaged over


@dataclass(frozen=True)
class Draft:
    """Nodes by rank (those that streams carry last), edges, and what could not be read."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    notes: tuple[str, ...] = ()


def draft(
    classifier: Classifier,
    ablation: Ablation,
    settings: Settings,
    ranking: Ranking,
    place: int,
    count: int,
    group: Sequence[int],
) -> Draft:
    """The circuit of the first ``count`` nodes of a ranking's row ``place``, for the images of ``group`` together."""
    net, rows = ablation.net, group[:IMAGES]
    keep = ranking.keep(count)[place]
    chosen = {site: kept[0].nonzero()[:, 0] for site, kept in net.by_site(keep[None]).items()}
    named = [(site.name, unit) for site in net.ablated for unit in range(site.units)]
    order = ranking.key[place].argsort(descending=True, stable=True)[:count].tolist()
    scores = ranking.scores[place].tolist()
    nodes = []
    for place_in_rank, number in enumerate(order):
        name, unit = named[number]
        nodes.append(Node(name, unit, place_in_rank, scores[number]))
    if settings.mode == "paper":
        edges, notes = published_edges(classifier, ablation, rows, chosen, settings.fan_in)
        return Draft(tuple(nodes), tuple(edges), tuple(notes))
    carried = _carried(ablation, rows, settings.stream_units)
    chosen |= {site: torch.tensor([node.unit for node in units]) for site, units in carried.items()}
    find = exact_edges if settings.mode == "exact" else gradient_edges
    strengths = zip(*(find(ablation, row, chosen) for row in rows), strict=True)
    edges = [edge for parts in strengths for edge in _strongest(parts, settings.fan_in)]
    return Draft((*nodes, *(node for units in carried.values() for node in units)), tuple(edges))


def _carried(ablation: Ablation, rows: Sequence[int], count: int) -> dict[Site, list[Node]]:
    """The units of residual streams that carry most: edges run through them, though they are never ablated."""
    sites = [site for site in ablation.net.sites if not site.ablated]
    total = {site: torch.zeros(site.units, device=ablation.x.device) for site in sites}
    for row in rows if sites and count else ():
        slopes = gradients(ablation, row, [site.place for site in sites])
        for site in sites:
            value = ablation.value(site.place, row)
            change = value - ablation.without(site, row)
            total[site] += (site.split(change) * site.split(slopes[site.place])).sum((0, 2)) / len(rows)
    return {
        site: [Node(site.name, unit, -1, float(effect[unit])) for unit in sorted(_largest(effect, count))]
        for site, effect in total.items()
    }


def _largest(effect: Tensor, count: int) -> list[int]:
    return effect.abs().topk(min(count, len(effect))).indices.tolist()


def _strongest(parts: Sequence[Strengths], fan_in: int) -> list[Edge]:
    """The strongest edges into each unit of one target, averaged over images."""
    first = parts[0]
    if not first.sources:
        return []
    effect = torch.stack([part.effect for part in parts]).mean(0)
    measured = [part.change for part in parts if part.change is not None]
    change = torch.stack(measured).mean(0) if measured else None
    name, wanted = (SCORE, LINKS) if first.target is None else (first.target.name, fan_in)
    values, indices = edge_topk(effect, effect.new_ones(1, effect.shape[1]), min(wanted, effect.shape[1]))
    edges = []
    for o, slot in (values[0] != 0).nonzero().tolist():
        i = int(indices[0, o, slot])
        source, unit = first.sources[i]
        size = None if change is None else float(change[o, i])
        edges.append(Edge(source.name, unit, name, int(first.units[o]), float(values[0, o, slot]), size))
    return edges


def measured(
    ablation: Ablation, keep: Tensor, nodes: Sequence[Node], rows: Sequence[int], count: int
) -> tuple[Node, ...]:
    """The nodes, the first ``count`` in rank with what they do alone and in the circuit ``keep`` [nodes]."""
    starts = first_numbers(ablation.net)
    some = [node for node in nodes if 0 <= node.rank < count]
    if not some:
        return tuple(nodes)
    numbers = [starts[node.layer] + node.unit for node in some]
    each = torch.tensor([members(ablation, row, keep, numbers) for row in rows[:IMAGES]]).mean(0).tolist()
    known = {node: replace(node, effect=e, needed=n) for node, e, n in zip(some, *each, strict=True)}
    return tuple(known.get(node, node) for node in nodes)


def first_numbers(net: Network) -> Mapping[str, int]:
    """The number of each site's first node."""
    starts, total = {}, 0
    for site in net.ablated:
        starts[site.name] = total
        total += site.units
    return starts
