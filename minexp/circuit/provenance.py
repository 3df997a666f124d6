"""Which channel of a layer belongs to which unit of a site, found by changing units and seeing what changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program, Values, sizes
from .sites import CONVOLUTION, ELEMENTWISE, LINEAR, NORM, Site


def layers_between(program: Program, parents: Sequence[Site], place: fx.Node) -> list[fx.Node]:
    """The convolutions and linear layers that lead from the parents to a place."""
    starts = [parent.place for parent in parents]
    reached = program.behind(starts) | set(starts)
    return [n for n in program.between(starts, [place]) if n.target in LINEAR and n.args[0] in reached]


def sources_of(
    program: Program,
    source: Site,
    place: fx.Node,
    axis: int,
    parents: Sequence[Site],
    held: Sequence[fx.Node] = (),
) -> Tensor | None:
    """For each channel of a place's value (along axis) the unit of the source that it is computed from, -1 for none.

    held: layers whose outputs stay as they are. None where a channel reads more than one unit.
    """
    probe = _Probe(program, parents, held, [place])

    def reacts(changed: Tensor) -> Tensor:
        value = probe.run({source.place: probe.change(source, changed)})[place]
        return (value - probe.clean[place]).movedim(axis, 0).flatten(1).abs().amax(1).cpu() > 1e-5

    return _decode(source.units, reacts)


def targets_of(
    program: Program, layer: fx.Node, target: Site | None, parents: Sequence[Site]
) -> Tensor | None:
    """For each output channel of a layer the unit of the target that it leads to; None where to more than one.

    Without a target, every channel leads to the class score, unit 0.
    """
    if target is None:
        return torch.zeros(sizes(layer)[channel_axis(layer)], dtype=torch.long)
    probe = _Probe(program, parents, [], [layer])
    axis = channel_axis(layer)

    def reacts(aimed: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = probe.clean[layer].detach().requires_grad_(True)
            value = target.split(probe.run({layer: leaf}, [target.place])[target.place])
            weight = (torch.rand(value.shape, generator=probe.generator) + 0.5) * aimed[None, :, None]
            (slope,) = torch.autograd.grad((value * weight.to(value)).sum(), leaf)
        return slope.movedim(axis, 0).flatten(1).abs().amax(1).cpu() > 1e-7

    return _decode(target.units, reacts)


def channel_axis(layer: fx.Node) -> int:
    """Axis of the channels in what a layer reads and writes."""
    return 1 if layer.target in CONVOLUTION else len(sizes(layer)) - 1


class _Probe:
    """A part of a program made linear in single units: nonlinearities and normalisations pass on what they get."""

    def __init__(
        self, program: Program, parents: Sequence[Site], held: Sequence[fx.Node], wanted: Sequence[fx.Node]
    ) -> None:
        self.program = program
        self.generator = torch.Generator().manual_seed(0)
        self.functions = {
            n: _pass_on(n) for n in program.steps if n.target in ELEMENTWISE or n.target in NORM
        }
        self.known: Values = {program.image: self._random(program.image)}
        self.known |= {parent.place: self._random(parent.place) for parent in parents}
        self.known |= {layer: self._random(layer) for layer in held}
        self.clean = self.run({}, wanted)
        self.wanted = wanted

    def _random(self, node: fx.Node) -> Tensor:
        value = torch.rand(sizes(node), generator=self.generator) + 0.5
        return value.to(node.meta["val"])

    def change(self, site: Site, units: Tensor) -> Tensor:
        """The site's random value with other random values in some units."""
        value = self.known[site.place].unflatten(0, (-1, site.each))
        other = (torch.rand(value.shape, generator=self.generator) + 2).to(value)
        return other.where(site.spread(units[None].to(value.device), value), value).flatten(0, 1)

    def run(self, known: Values, wanted: Sequence[fx.Node] | None = None) -> Values:
        return self.program.run(
            {**self.known, **known}, self.wanted if wanted is None else wanted, functions=self.functions
        )


def _pass_on(node: fx.Node) -> Callable[..., Any]:
    several = isinstance(node.meta.get("val"), (tuple, list))
    return (lambda x, *_, **__: (x, None, None)) if several else (lambda x, *_, **__: x)


def _decode(units: int, reacts: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Unit numbers read bit by bit: ``reacts(units bool [U])`` says which channels notice those units."""
    number = torch.arange(units)
    found: Tensor | None = None
    anything = reacts(torch.ones(units, dtype=torch.bool))
    for bit in range(max(1, (units - 1).bit_length())):
        have = (number >> bit & 1).bool()
        on, off = reacts(have), reacts(~have)
        if bool((on & off).any()) or not torch.equal(on | off, anything):
            return None
        found = on.long() << bit if found is None else found + (on.long() << bit)
    assert found is not None
    return found.masked_fill(~anything, -1)
