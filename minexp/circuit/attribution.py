"""Edges by gradients alone: every edge through a convolution or linear layer from one backward pass.

An edge's score is what the source contributes, less what its baseline would, times the gradient of m where that
arrives, summed over positions (attribution patching, arXiv 2310.10348). For a layer y = W x these are the entries of
W times the gradient of m by W at the input x - baseline(x), so that no edge needs a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.nn import grad as weight_gradient

from .ablation import Ablation
from .edges import Chosen, Strengths, exact_into, gradients
from .network import Network, Place, TracedNetwork
from .provenance import channel_axis, layers_between, sources_of, targets_of
from .sites import Site

_aten = torch.ops.aten
_DIFFERENTIATED = {
    _aten.conv1d.default: weight_gradient.conv1d_weight,
    _aten.conv2d.default: weight_gradient.conv2d_weight,
    _aten.conv3d.default: weight_gradient.conv3d_weight,
}
_SUPPORTED = {*_DIFFERENTIATED, _aten.linear.default}


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer between sites. Whose its channels are: the target's units [O], each parent's [I], -1 for none."""

    node: fx.Node
    outputs: Tensor
    inputs: dict[Site, Tensor]


@dataclass(frozen=True, eq=False)
class _Way:
    """How parents reach a target: through layers, or (direct [units of the target]) from unit to unit without one."""

    layers: tuple[_Layer, ...]
    direct: dict[Site, Tensor]


_ways: WeakKeyDictionary[Network, dict[Place, _Way | None]] = WeakKeyDictionary()


def gradient_edges(ablation: Ablation, row: int, chosen: Chosen) -> list[Strengths]:
    """Edges among the chosen units of one image, to first order. Normalisations count with the statistics they have.

    Where units mix in other ways than through one layer, and in a network that could not be traced, the sources are
    ablated as in `exact_edges`.
    """
    net = ablation.net
    targets: list[Site | None] = [*(site for site in net.sites if len(chosen.get(site, ()))), None]
    ways = {target: _way(net, target) for target in targets} if isinstance(net, TracedNetwork) else {}
    layers = [layer.node for way in ways.values() if way is not None for layer in way.layers]
    slopes = gradients(ablation, row, [*(site.place for site in net.sites), *dict.fromkeys(layers)])
    found = []
    for target in targets:
        way = ways.get(target)
        if way is None or not isinstance(net, TracedNetwork):
            found.append(exact_into(ablation, row, chosen, target, slopes))
        else:
            found.append(_Into(net, ablation, row, target, way, slopes).strengths(chosen))
    return found


def _way(net: TracedNetwork, target: Site | None) -> _Way | None:
    place = net.scores if target is None else target.place
    known = _ways.setdefault(net, {})
    if place not in known:
        known[place] = _find_way(net, place, target)
    return known[place]


def _find_way(net: TracedNetwork, place: fx.Node, target: Site | None) -> _Way | None:
    program, parents = net.program, net.parents(place)
    nodes = layers_between(program, parents, place)
    if any(program.behind([node]) & set(nodes) or node.target not in _SUPPORTED for node in nodes):
        return None
    layers = []
    for node in nodes:
        inputs = {p: sources_of(program, p, _input(node), channel_axis(node), parents) for p in parents}
        outputs = targets_of(program, node, target, parents)
        kept = {p: units for p, units in inputs.items() if units is not None}
        if outputs is None or len(kept) < len(parents):
            return None
        layers.append(_Layer(node, outputs, kept))
    if target is None:
        return _Way(tuple(layers), {})
    direct = {p: sources_of(program, p, place, target.axis - 1, parents, nodes) for p in parents}
    ways = {p: units for p, units in direct.items() if units is not None and bool((units >= 0).any())}
    if any(units is None for units in direct.values()) or not all(
        _injective(units) for units in ways.values()
    ):
        return None
    return _Way(tuple(layers), ways)


def _injective(units: Tensor) -> bool:
    used = units[units >= 0]
    return len(used.unique()) == len(used)


def _input(node: fx.Node) -> fx.Node:
    """What an operation reads first."""
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


class _Into:
    """The edges into one target, for one image."""

    def __init__(
        self,
        net: TracedNetwork,
        ablation: Ablation,
        row: int,
        target: Site | None,
        way: _Way,
        slopes: Mapping[Place, Tensor],
    ) -> None:
        self.net, self.ablation, self.target, self.way, self.slopes = net, ablation, target, way, slopes
        self.place = net.scores if target is None else target.place
        self.parents = net.parents(self.place)
        self.known = {net.image: ablation.x[row : row + 1]}
        self.known |= {parent.place: ablation.value(parent.place, row) for parent in self.parents}
        self.base = {parent: ablation.without(parent, row) for parent in self.parents}

    @torch.no_grad()
    def strengths(self, chosen: Chosen) -> Strengths:
        units = torch.zeros(1, dtype=torch.long) if self.target is None else chosen[self.target]
        sources: list[tuple[Site, int]] = []
        effects = [self.ablation.full.new_zeros(len(units), 0)]
        inputs = self._inputs()
        for parent in self.parents:
            wanted = chosen.get(parent)
            if wanted is None or not len(wanted):
                continue
            rows = 1 if self.target is None else self.target.units
            score = self.ablation.full.new_zeros(rows, parent.units)
            for layer in self.way.layers:
                self._through(layer, parent, inputs[layer.node], score)
            if parent in self.way.direct:
                self._directly(parent, score)
            sources += [(parent, int(unit)) for unit in wanted]
            effects.append(score[units][:, wanted])
        return Strengths(self.target, units, tuple(sources), torch.cat(effects, 1), None)

    def _inputs(self) -> dict[fx.Node, Tensor]:
        """What each layer reads when nothing is ablated."""
        read = {layer.node: _input(layer.node) for layer in self.way.layers}
        values = self.net.program.run(self.known, read.values())
        return {node: values[source] for node, source in read.items()}

    def _through(self, layer: _Layer, parent: Site, clean: Tensor, score: Tensor) -> None:
        """Add the edges of one parent through one layer."""
        inputs, outputs = layer.inputs[parent].to(score.device), layer.outputs.to(score.device)
        if not bool((inputs >= 0).any()):
            return
        program, source, weight = self.net.program, _input(layer.node), layer.node.args[1]
        assert isinstance(weight, fx.Node)
        norms = [
            n for n in program.between([p.place for p in self.parents], [source]) if n.target in _FREEZABLE
        ]
        before = program.run(self.known, map(_input, norms))
        frozen = {norm: _frozen(norm, before[_input(norm)]) for norm in norms}
        ablated = program.run({**self.known, parent.place: self.base[parent]}, [source], functions=frozen)[
            source
        ]
        value = program.run({}, [weight])[weight]
        entries = _entries(value, clean - ablated, self.slopes[layer.node], layer.node)
        channels = torch.arange(len(inputs), device=score.device).view(-1, entries.shape[1])  # of each group
        columns = inputs[channels].repeat_interleave(len(entries) // len(channels), 0)
        rows = outputs[:, None].expand_as(columns)
        there = (columns >= 0) & (rows >= 0)
        score.view(-1).index_add_(0, (rows * parent.units + columns)[there], entries[there])

    def _directly(self, parent: Site, score: Tensor) -> None:
        """Add the edges of one parent that meet no layer, such as an identity skip."""
        units = self.way.direct[parent].to(score.device)
        with torch.enable_grad():
            leaf = self.known[parent.place].detach().requires_grad_(True)
            held = self.net.program.run(self.known, [layer.node for layer in self.way.layers])
            value = self.net.program.run({**self.known, **held, parent.place: leaf}, [self.place])[self.place]
            (slope,) = torch.autograd.grad((value * self.slopes[self.place]).sum(), leaf)
        change = self.known[parent.place] - self.base[parent]
        effect = (parent.split(change) * parent.split(slope)).sum((0, 2))
        targets = (units >= 0).nonzero()[:, 0]
        score[targets, units[targets]] += effect[units[targets]]


def _entries(weight: Tensor, x: Tensor, slope: Tensor, layer: fx.Node) -> Tensor:
    """[O, I/groups]: weight times the gradient of m by it, at the input x, summed over the kernel."""
    if layer.target is _aten.linear.default:
        return weight * (slope.flatten(0, -2).T @ x.flatten(0, -2))
    options = (*layer.args[3:], *(1, 0, 1, 1)[len(layer.args[3:]) :])  # stride, padding, dilation, groups
    function = _DIFFERENTIATED[layer.target]  # type: ignore[index]
    return (weight * function(x, weight.shape, slope, *options)).flatten(2).sum(2)


_FREEZABLE = {_aten.layer_norm.default, _aten.group_norm.default}


def _frozen(node: fx.Node, clean: Tensor) -> Callable[..., Tensor]:
    """The normalisation with the mean and variance that it has when nothing is ablated."""

    def function(
        x: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        if node.target is _aten.group_norm.default:
            return _frozen_groups(x, clean, shape, weight, bias, eps)
        dims = tuple(range(-len(shape), 0))
        y = (x - clean.mean(dims, keepdim=True)) * (
            clean.var(dims, unbiased=False, keepdim=True) + eps
        ).rsqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return function


def _frozen_groups(
    x: Tensor, clean: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    apart, flat = x.unflatten(1, (groups, -1)).flatten(2), clean.unflatten(1, (groups, -1)).flatten(2)
    y = (apart - flat.mean(2, keepdim=True)) * (flat.var(2, unbiased=False, keepdim=True) + eps).rsqrt()
    y = y.view_as(x)
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)
