"""A classifier as sites and what lies between them: traced where it can be, by hooks on its stages where not."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from ..classifier import Classifier
from ..errors import RequestError
from ..taps import Tap
from ..tracing import first_tensor, hooked
from .program import Edit, Program, Value
from .sites import Site, find_sites

Level = Literal["layer", "stage"]
Place = Any  # where a value arises: an operation of a program, or the name of a tapped layer


class Network(ABC):
    """What a circuit is read from: sites, and the computation between them.

    note: why the network is coarser than asked for, "" where it is not. input_shape: (C, H, W) of an image.
    passes: the forward passes of single images run so far, parts of a pass counted by their multiply-adds.
    """

    sites: tuple[Site, ...]
    image: Place
    scores: Place
    input_shape: tuple[int, int, int]
    note: str = ""
    passes: float = 0.0

    @abstractmethod
    def run(
        self,
        known: Mapping[Place, Value],
        wanted: Iterable[Place],
        edits: Mapping[Place, Edit] | None = None,
    ) -> dict[Place, Value]:
        """Wanted values from the known ones, the image among them; ``edits`` change a value where it arises."""

    @abstractmethod
    def take(self, place: Place, value: Tensor, rows: Tensor) -> Tensor:
        """The value for a batch made of those images, by number."""

    @abstractmethod
    def parents(self, place: Place) -> tuple[Site, ...]:
        """The sites that a place is computed from without another site between, in order of execution."""

    @property
    def ablated(self) -> tuple[Site, ...]:
        """The sites whose units are nodes."""
        return tuple(site for site in self.sites if site.ablated)

    @property
    def nodes(self) -> int:
        """How many nodes there are; they are numbered through the ablated sites in order."""
        return sum(site.units for site in self.ablated)

    def by_site(self, factors: Tensor) -> dict[Site, Tensor]:
        """[B, nodes] cut into [B, units] for each ablated site."""
        sites = self.ablated
        return dict(zip(sites, factors.split([site.units for site in sites], 1), strict=True))


class TracedNetwork(Network):
    """A network whose every operation is known."""

    def __init__(self, program: Program, sites: tuple[Site, ...]) -> None:
        self.program, self.sites, self.input_shape = program, sites, program.input_shape
        self.image, self.scores = program.image, program.scores
        self._at = {site.place: site for site in sites}
        self._parents: dict[fx.Node, tuple[Site, ...]] = {}

    def run(
        self,
        known: Mapping[Place, Value],
        wanted: Iterable[Place],
        edits: Mapping[Place, Edit] | None = None,
    ) -> dict[Place, Value]:
        wanted = list(wanted)
        self.passes += len(known[self.image]) * self.program.share(known, wanted)
        return self.program.run(known, wanted, edits)

    def take(self, place: Place, value: Tensor, rows: Tensor) -> Tensor:
        return self.program.take(place, value, rows)

    def parents(self, place: Place) -> tuple[Site, ...]:
        if place not in self._parents:
            inside = self.program.between(self._at.keys() - {place}, [place])
            read = {source for node in inside for source in node.all_input_nodes} & self._at.keys()
            found = (self._at[node] for node in read if node is not place)
            self._parents[place] = tuple(sorted(found, key=lambda site: self.program.place(site.place)))
        return self._parents[place]


class TappedNetwork(Network):
    """A network of which only the tapped layers are known; everything between two taps is run as a whole."""

    image, scores = "image", "scores"

    def __init__(self, classifier: Classifier, note: str = "") -> None:
        self._classifier, self.note, self.input_shape = classifier, note, classifier.input_shape
        x = torch.full((1, *self.input_shape), 0.5, device=classifier.device)
        with torch.no_grad():
            features = dict(zip(classifier.taps, classifier.features(x)[1], strict=True))
        self._taps = {(tap.module, tap.call): tap.name for tap in classifier._taps}
        self.sites = tuple(_stage(tap, features[tap.name]) for tap in classifier._taps)

    def run(
        self,
        known: Mapping[Place, Value],
        wanted: Iterable[Place],
        edits: Mapping[Place, Edit] | None = None,
    ) -> dict[Place, Value]:
        values: dict[Place, Value] = {}
        calls: dict[str, int] = {}
        self.passes += len(known[self.image])

        def at(module: str, output: Any) -> Any:
            calls[module] = calls.get(module, 0) + 1
            name = self._taps.get((module, calls[module])) or self._taps.get((module, None))
            if name is None:
                return None
            value = known.get(name, first_tensor(output))
            if name not in known and edits is not None and name in edits:
                value = edits[name](value)
            values[name] = value
            return _replaced(output, value)

        modules = list(dict.fromkeys(module for module, _ in self._taps))
        with self._classifier.frozen(), hooked(self._classifier.model, modules, at):
            values[self.scores] = self._classifier.logits(known[self.image])
        return {place: values[place] for place in wanted}

    def take(self, place: Place, value: Tensor, rows: Tensor) -> Tensor:
        return value.index_select(0, rows)

    def parents(self, place: Place) -> tuple[Site, ...]:
        names = [site.place for site in self.sites]
        before = len(names) if place == self.scores else names.index(place)
        return self.sites[max(0, before - 1) : before]


def _stage(tap: Tap, feature: Tensor) -> Site:
    axis = {"tokens": 2, "channels_last": 3}.get(tap.layout.kind, 1)
    return Site(tap.name, "stage", feature.shape[1], axis + 1, 1, tap.name)


def _replaced(output: Any, value: Tensor) -> Any:
    """What a module returned, with another first tensor in it."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, dict):
        key = next(key for key, item in output.items() if first_tensor(item) is not None)
        changed = {**output, key: _replaced(output[key], value)}
        return type(output)(**changed) if type(output) is not dict else changed
    place = next(place for place, item in enumerate(output) if first_tensor(item) is not None)
    items = [*output[:place], _replaced(output[place], value), *output[place + 1 :]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


_networks: WeakKeyDictionary[Classifier, dict[Any, Network]] = WeakKeyDictionary()


def network(classifier: Classifier, level: Level = "layer") -> Network:
    """The network of a classifier: all its layers, or its tapped stages alone.

    A model that torch.export cannot trace, or whose traced parts do not add up to what the model computes, has its
    stages alone at either level; a warning and ``note`` say why. The result is kept as long as the classifier.
    """
    if level not in ("layer", "stage"):
        raise RequestError(f"unknown level {level!r}; choose layer or stage")
    kept = _networks.setdefault(classifier, {})
    key = level, classifier.device, classifier.input_shape, classifier.taps
    if key not in kept:
        try:
            kept[key] = _traced(classifier) if level == "layer" else TappedNetwork(classifier)
        except RequestError as error:
            warnings.warn(f"{error}; its circuits have its stages as layers", stacklevel=2)
            kept[key] = TappedNetwork(classifier, note=str(error))
    return kept[key]


def _traced(classifier: Classifier) -> TracedNetwork:
    program = Program(classifier)
    result = TracedNetwork(program, find_sites(program))
    _verify(result, classifier)
    return result


@torch.no_grad()
def _verify(candidate: TracedNetwork, classifier: Classifier) -> None:
    """Refuse a trace whose values are not the model's, or where an image of a batch is not where it should be."""
    kind = type(classifier.model).__name__
    if not candidate.sites:
        raise RequestError(f"{kind}: its trace shows no convolution or linear layer to take nodes from")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, *classifier.input_shape), generator=generator).to(classifier.device)
    wanted = [candidate.scores, *(site.place for site in candidate.sites)]
    both = candidate.run({candidate.image: x}, wanted)
    alone = candidate.run({candidate.image: x[1:]}, wanted)
    one = torch.ones(1, dtype=torch.long, device=x.device)
    same = _close(both[candidate.scores], classifier.logits(x))
    for place in wanted:
        same = same and _close(candidate.take(place, both[place], one), alone[place])
    if not same:
        raise RequestError(f"{kind}: its trace computes something else than the model")


def _close(a: Tensor, b: Tensor) -> bool:
    """The same numbers to rounding; the same ones not finite."""
    finite = b.isfinite()
    if a.shape != b.shape or not torch.equal(a.isfinite(), finite):
        return False
    a, b = a[finite], b[finite]
    return not len(b) or bool((a - b).abs().max() <= 1e-3 * b.abs().max().clamp_min(1e-3))
