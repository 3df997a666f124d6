"""Which layers of a model are compared, chosen by where the decision passes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .errors import RequestError
from .layouts import Grid, Layout, certain_grids, find_layout
from .tracing import Record, Trace, first_tensor, hooked

AT_LEAST = 5  # taps of a model that has so many blocks
_LINEAR = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PASSING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Tap:
    """One tapped layer. name: the module's, with "@2" behind it for the second call of a module used again.

    overwritten: a later in-place operation changes the output, so that it has to be copied.
    """

    name: str
    layout: Layout
    overwritten: bool = False

    @property
    def module(self) -> str:
        """The module's name in the model."""
        return self.name.partition("@")[0]

    @property
    def call(self) -> int | None:
        """Which call of the module is tapped, counted from 1; None for its last."""
        _, _, number = self.name.partition("@")
        return int(number) if number else None


@contextmanager
def recording(model: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[str, Tensor]]:
    """Collect the taps' outputs, by their names, in the dictionary that is yielded."""
    outputs: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    wanted: dict[str, list[Tap]] = {}
    for tap in taps:
        wanted.setdefault(tap.module, []).append(tap)

    def keep(module: str, output: Any) -> None:
        seen[module] = seen.get(module, 0) + 1
        tensor = first_tensor(output)
        for tap in wanted[module]:
            if tensor is not None and tap.call in (None, seen[module]):
                outputs[tap.name] = tensor.clone() if tap.overwritten else tensor

    with hooked(model, list(wanted), keep):
        yield outputs


@dataclass(frozen=True, eq=False)
class _Point:
    """A place where a layer could be tapped. resolution: its grid, or its number of tokens where they form none.

    block: its module is made of others. inside: it is a step in a block that changes the
    resolution, ahead of the change.
    """

    record: Record
    module: nn.Module
    layout: Layout
    resolution: tuple[int, ...]
    inside: bool = False

    @property
    def block(self) -> bool:
        return any(True for _ in self.module.children())


def find_taps(
    model: nn.Module, trace: Trace, batch: int, size: Grid, names: Sequence[str] | None = None
) -> tuple[Tap, ...]:
    """The named taps, or the automatic choice: the stem, the end of each resolution, and blocks evenly between.

    trace: of a pass over `batch` images of size (H, W). Chosen are outputs that every path to the scores passes, so
    that no branch of a block is taken for a stage; where branches run in parallel up to the end, any on a path.
    Raises RequestError for a name that is no module of the model or that gives no usable tensor.
    """
    modules = dict(model.named_modules())
    grids = certain_grids(((modules[record.name], record.shape) for record in trace.records), size)
    layouts = {
        record: find_layout(modules[record.name], record.shape, grids, size)
        for record in trace.records
        if record.shape[:1] == (batch,)
    }
    if names is not None:
        if len(set(names)) != len(names):
            raise RequestError(f"a layer is tapped twice: {', '.join(names)}; name each once")
        return tuple(_named(modules, layouts, name) for name in names)
    points = _points(modules, trace, layouts, trace.waypoints)
    if len(points) < 2:
        points = _outermost(_points(modules, trace, layouts, trace.path)) or points
    if points:
        return tuple(Tap(_label(trace, point.record), point.layout) for point in _stages(points))
    return tuple(Tap(record.name, layout) for record, layout in _hidden_layers(modules, trace, layouts))


def mark_overwritten(model: nn.Module, taps: Sequence[Tap], run: Callable[[], Any]) -> tuple[Tap, ...]:
    """The taps, told which of their outputs `run`, a forward pass of the model, changes in place afterwards."""
    with recording(model, taps) as outputs:
        versions: dict[str, int] = {}

        def note(module: str, _output: Any) -> None:
            versions.update({name: t._version for name, t in outputs.items() if name not in versions})

        with hooked(model, list(dict.fromkeys(tap.module for tap in taps)), note):
            run()
        changed = {name for name, tensor in outputs.items() if tensor._version != versions[name]}
    return tuple(replace(tap, overwritten=tap.name in changed) for tap in taps)


def _label(trace: Trace, record: Record) -> str:
    return record.name if trace.calls[record.name] == 1 else f"{record.name}@{record.call}"


def _named(modules: dict[str, nn.Module], layouts: dict[Record, Layout | None], name: str) -> Tap:
    tap = Tap(name, Layout("vector"))
    if not tap.module or tap.module not in modules:
        near = difflib.get_close_matches(tap.module, list(modules), n=4, cutoff=0.4)
        hint = ", ".join(near or [item for item in modules if item][:8])
        raise RequestError(f"no layer '{name}' to tap in {type(modules['']).__name__}; near: {hint}")
    calls = [record for record in layouts if record.name == tap.module]
    record = next((record for record in reversed(calls) if tap.call in (None, record.call)), None)
    layout = None if record is None else layouts[record]
    if layout is None:
        raise RequestError(f"layer '{name}' gives no [B,C,...] tensor in a forward pass; tap another layer")
    return replace(tap, layout=layout)


def _points(
    modules: dict[str, nn.Module], trace: Trace, layouts: dict[Record, Layout | None], nodes: Container[Any]
) -> list[_Point]:
    """Outputs at these nodes that have several positions, in order; of modules that give the same one, the outermost.

    Resolution only falls on the way to the scores: what has more positions than an output before it (the fixed grid
    of a pooling, say) is left out.
    """
    groups: dict[Any, list[Record]] = {}
    for record in trace.records:
        if record.node in nodes:
            groups.setdefault(record.node, []).append(record)
    points = []
    for records in groups.values():
        inner = records[0].name
        outer = min((r for r in records if f"{inner}.".startswith(f"{r.name}.")), key=lambda r: len(r.name))
        module, layout = modules[outer.name], layouts.get(outer)
        resolution = None if layout is None else _resolution(layout, outer.shape)
        if layout is not None and resolution is not None and not isinstance(module, _PASSING):
            points.append(_Point(outer, module, layout, resolution))
    points.sort(key=lambda point: trace.waypoints.get(point.record.node, 0))
    fewest, falling = math.inf, []
    for point in points:
        if math.prod(point.resolution) <= fewest:
            falling.append(point)
            fewest = math.prod(point.resolution)
    return [point for point in _marked(falling, trace) if math.prod(point.resolution) > 1]


def _resolution(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """What tells stages apart: the grid, or the number of tokens; None for a vector or an odd shape."""
    return layout.grid or (shape[1:2] if layout.kind == "tokens" else None)


def _marked(points: Sequence[_Point], trace: Trace) -> list[_Point]:
    """The points, those told that lie inside a block which starts at one resolution and ends at the next.

    A part with branches of its own is a block itself, wherever it lies.
    """
    branches = [r.name for r in trace.records if r.node in trace.path and r.node not in trace.waypoints]
    blocks = {
        f"{point.record.name}.": point.resolution
        for point in points
        if point.block and type(point.module) not in _CONTAINERS
    }
    spans = {
        prefix: {end} | {p.resolution for p in points if p.record.name.startswith(prefix)}
        for prefix, end in blocks.items()
    }

    def inside(point: _Point) -> bool:
        name = point.record.name
        within = (p for p in spans if name.startswith(p) and len(spans[p]) == 2)
        return any(blocks[prefix] != point.resolution for prefix in within) and not any(
            branch.startswith(f"{name}.") for branch in branches
        )

    return [replace(point, inside=inside(point)) for point in points]


def _outermost(points: Sequence[_Point]) -> list[_Point]:
    blocks = tuple(f"{p.record.name}." for p in points if p.block and type(p.module) not in _CONTAINERS)
    return [p for p in points if p.block and not p.record.name.startswith(blocks)]


def _stages(points: Sequence[_Point]) -> list[_Point]:
    """The stem, the last point of each resolution, and further blocks of the resolution that has most."""
    groups: dict[tuple[int, ...], list[_Point]] = {}
    for point in points:
        groups.setdefault(point.resolution, []).append(point)
    outside = {key: [p for p in group if not p.inside] or group for key, group in groups.items()}
    blocks = {key: [p for p in group if p.block] for key, group in outside.items()}
    chosen = {(blocks[key] or group)[-1] for key, group in outside.items()}
    chosen.add(_stem(next(iter(outside.values()))))
    longest = [point for point in max(blocks.values(), key=len) if point not in chosen]
    missing = AT_LEAST - len(chosen)
    if missing > 0 and longest:  # blocks of one resolution, as a vision transformer's: at even depths
        parts = missing + 1
        chosen |= {longest[part * (len(longest) + 1) // parts - 1] for part in range(1, parts)}
    return [point for point in points if point in chosen]


def _stem(points: Sequence[_Point]) -> _Point:
    """The first of these that is an activation or a patch embedding, with the module it begins."""
    stem = next((p for p in points if not _before_activation(p)), points[0])
    for parent in points:
        first = next(p for p in points if f"{p.record.name}.".startswith(f"{parent.record.name}."))
        if f"{stem.record.name}.".startswith(f"{parent.record.name}.") and first is points[0]:
            stem = parent
    return stem


def _before_activation(point: _Point) -> bool:
    """Is it a plain linear layer, other than one that cuts the image into patches?"""
    conv = point.module if isinstance(point.module, nn.Conv2d) else None
    patches = conv is not None and conv.stride == conv.kernel_size and max(conv.stride) > 1
    return isinstance(point.module, _LINEAR) and not point.block and not patches


def _hidden_layers(
    modules: dict[str, nn.Module], trace: Trace, layouts: dict[Record, Layout | None]
) -> list[tuple[Record, Layout]]:
    """For a model without feature maps: every leaf that computes something, but for the last (the logits)."""
    leaves = [
        (record, layout)
        for record, layout in layouts.items()
        if layout is not None
        and trace.calls[record.name] == 1
        and not any(True for _ in modules[record.name].children())
        and not isinstance(modules[record.name], _PASSING)
    ]
    if len(leaves) < 2:
        raise RequestError(
            f"no layer to tap found in {type(modules['']).__name__}; name them with taps=[...]"
        )
    return leaves[:-1]
