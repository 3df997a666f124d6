"""The readout as published (arXiv 2509.25686): activation energies and the weights of each stage's first layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._ops import edge_topk
from ..classifier import Classifier
from .ablation import Ablation
from .circuit import SCORE, Edge
from .edges import Chosen
from .sites import Site

CAVEATS = (
    "mode paper: an edge is the weight of a stage's first layer, whose channels are not the stage's output channels of"
    " the same number; skips, normalisation and later layers are left out",
    "mode paper: weights count without their sign, so that inhibition looks like excitation",
    "mode paper: nodes are the channels with the most energy, whether or not they matter for the class",
)
LINKS = 3  # to the class


def published_edges(
    classifier: Classifier, ablation: Ablation, rows: Sequence[int], chosen: Chosen, fan_in: int
) -> tuple[list[Edge], list[str]]:
    """Edges between consecutive stages, |W| summed over the kernel times the source's energy, and the class links.

    Energies are means over the images of ``rows``. Also what could not be read: a stage behind which no layer takes
    its channels has no edges.
    """
    model, sites = classifier.model, ablation.net.sites
    energy = {site: site.split(ablation.values[site.place])[list(rows)].norm(dim=2).mean(0) for site in sites}
    edges, missing = [], []
    for source, target in pairwise(sites):
        layer = _first_layer(model, source, target)
        if layer is None:
            missing.append(
                f"mode paper: no layer between {source.name} and {target.name} reads its channels as such"
            )
            continue
        strength = (
            layer.weight.detach().abs().flatten(2).sum(2)
            if layer.weight.ndim > 2
            else layer.weight.detach().abs()
        )
        strength = strength.to(energy[source])
        groups = getattr(layer, "groups", 1)
        values, indices = edge_topk(
            strength,
            energy[source][None],
            min(fan_in, strength.shape[1]),
            source_mask=_mask(chosen, source, source.units),
            target_mask=_mask(chosen, target, len(strength)),
            groups=groups,
        )
        for target_unit, slot in (values[0] > 0).nonzero().tolist():
            unit = int(indices[0, target_unit, slot])
            edges.append(
                Edge(source.name, unit, target.name, target_unit, float(values[0, target_unit, slot]))
            )
    return edges + _class_links(model, ablation, rows, sites[-1], chosen), missing


def _mask(chosen: Chosen, site: Site, units: int) -> Tensor:
    mask = torch.zeros(max(units, site.units), dtype=torch.bool)
    mask[chosen.get(site, torch.empty(0, dtype=torch.long))] = True
    return mask[:units]


def _first_layer(model: nn.Module, source: Site, target: Site) -> nn.Conv2d | nn.Linear | None:
    """The first layer behind a stage that reads its channels; one that also gives the next stage's, if there is any."""
    modules = list(model.named_modules())
    start, end = (
        max(
            place
            for place, (name, _) in enumerate(modules)
            if f"{name}.".startswith(f"{str(site.place).partition('@')[0]}.")
        )
        for site in (source, target)
    )
    candidates = []
    for _, module in modules[start + 1 : end + 1]:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            inputs = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
            if inputs == source.units:
                candidates.append(module)
    fits = [module for module in candidates if module.weight.shape[0] == target.units]
    return next(iter(fits or candidates), None)


def _class_links(
    model: nn.Module, ablation: Ablation, rows: Sequence[int], last: Site, chosen: Chosen
) -> list[Edge]:
    """|W[y, j]| * |h_j| of the last linear layer for the chosen channels j, h their mean over positions."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == last.units]
    units = chosen.get(last)
    if not heads or units is None or not len(units):
        return []
    features = last.split(ablation.values[last.place])[list(rows)].mean((0, 2))
    label = int(ablation.label[rows[0]])
    strength = heads[-1].weight.detach()[label : label + 1].abs().to(features)
    values, indices = edge_topk(
        strength, features.abs()[None], min(LINKS, last.units), source_mask=_mask(chosen, last, last.units)
    )
    return [
        Edge(last.name, int(unit), SCORE, 0, float(value))
        for unit, value in zip(indices[0, 0], values[0, 0], strict=True)
        if value > 0
    ]
