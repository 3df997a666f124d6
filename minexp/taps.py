"""Which layers of a model are compared, and their outputs laid out as [B, C, positions...]."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .errors import RequestError

Layout = Literal["channels_first", "channels_last", "tokens", "vector"]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BEFORE_ACTIVATION = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Tap:
    """One tapped layer: where it is and how its output is laid out."""

    name: str
    layout: Layout
    overwritten: bool  # a later in-place operation changes the output, so it has to be copied

    def arrange(self, output: Tensor) -> Tensor:
        """The output as [B, C, positions...] ([B, F] for a vector)."""
        if self.layout == "channels_last":
            return output.permute(0, 3, 1, 2)
        return output.transpose(1, 2) if self.layout == "tokens" else output


@dataclass
class _Record:
    name: str
    output: Tensor
    version: int
    calls: int = 1


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of interest in what a module returned (a tensor, a tuple, a mapping or an output object)."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    return None


@contextmanager
def hooked(model: nn.Module, names: Sequence[str], hook: Any) -> Iterator[None]:
    """Call `hook(name, output)` after each named module; every hook is gone afterwards, whatever happened."""
    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(
                module.register_forward_hook(lambda _module, _input, output, name=name: hook(name, output))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(model: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[str, Tensor]]:
    """Collect the taps' outputs (last call of a module wins) in the dictionary that is yielded."""
    outputs: dict[str, Tensor] = {}
    copied = {tap.name for tap in taps if tap.overwritten}

    def keep(name: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            outputs[name] = tensor.clone() if name in copied else tensor

    with hooked(model, [tap.name for tap in taps], keep):
        yield outputs


def trace(model: nn.Module, x: Tensor) -> tuple[Any, dict[str, _Record]]:
    """One forward pass: the model's output, and each module's last output in the order they finished."""
    records: dict[str, _Record] = {}

    def keep(name: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            calls = records.pop(name).calls + 1 if name in records else 1
            records[name] = _Record(name, tensor, tensor._version, calls)

    with hooked(model, [name for name, _ in model.named_modules() if name], keep):
        output = model(x)
    return output, records


def _layout(output: Tensor, square: bool) -> Layout | None:
    if output.ndim == 4:
        last = square and output.shape[1] == output.shape[2] != output.shape[3]
        return "channels_last" if last else "channels_first"
    return {2: "vector", 3: "tokens"}.get(output.ndim)  # type: ignore[return-value]


def _positions(record: _Record, square: bool) -> tuple[int, ...] | None:
    """The spatial shape of a feature map (or the number of tokens); None where there is no more than one."""
    layout = _layout(record.output, square)
    if layout in (None, "vector"):
        return None
    shape = tuple(Tap(record.name, layout, False).arrange(record.output).shape[2:])
    return shape if max(shape) > 1 else None


def find_taps(
    model: nn.Module, records: dict[str, _Record], names: Sequence[str] | None, square: bool
) -> tuple[Tap, ...]:
    """The named taps, or the automatic choice: the stem and the last stage output at each resolution.

    `records` is what `trace` saw; `square` says that the traced input had equal height and width.
    Raises RequestError for a name that is not a module of the model or that yields no usable tensor.
    """
    chosen = list(names) if names is not None else _stages(model, records, square)
    known = dict(model.named_modules())
    taps = []
    for name in chosen:
        if not name or name not in known:
            near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.4)
            hint = ", ".join(near or [item for item in known if item][:8])
            raise RequestError(f"no layer '{name}' to tap in {type(model).__name__}; near: {hint}")
        layout = _layout(records[name].output, square) if name in records else None
        if layout is None:
            raise RequestError(
                f"layer '{name}' gives no [B,C,...] tensor in a forward pass; tap another layer"
            )
        taps.append(Tap(name, layout, records[name].output._version != records[name].version))
    if len(set(chosen)) != len(chosen):
        raise RequestError(f"a layer is tapped twice: {', '.join(chosen)}; name each once")
    return tuple(taps)


def _units(model: nn.Module, records: dict[str, _Record], square: bool, prefix: str = "") -> list[str]:
    """Blocks and stages along the trunk, in order of execution.

    A plain container, and whatever spans more than one change of resolution, is opened; a block that merely
    starts at one resolution and ends at the next stays whole, so that no layer inside it is taken for a stage.
    """
    units = []
    for child, module in model.named_children():
        name = prefix + child
        inside = {
            _positions(record, square)
            for key, record in records.items()
            if key == name or key.startswith(name + ".")
        } - {None}
        own = _positions(records[name], square) if name in records else None
        opened = len(inside) > 2 or (len(inside) == 2 and type(module) in _CONTAINERS)
        if inside and (opened or own is None) and any(True for _ in module.children()):
            units += _units(module, records, square, name + ".")
        elif own is not None and records[name].calls == 1:
            units.append(name)
    order = {name: place for place, name in enumerate(records)}
    return sorted(units, key=order.__getitem__)


def _stages(model: nn.Module, records: dict[str, _Record], square: bool) -> list[str]:
    units = _units(model, records, square)
    if not units:
        return _hidden_layers(model, records)
    last = {_positions(records[name], square): name for name in units}
    stem = next(
        (name for name in units if not isinstance(model.get_submodule(name), _BEFORE_ACTIVATION)), units[0]
    )
    names = []
    for name in units:
        if name == stem or name in last.values():
            parent = name.rpartition(".")[0]
            while parent in records and records[parent].output is records[name].output:
                name, parent = parent, parent.rpartition(".")[0]
            names.append(name)
    return list(dict.fromkeys(names))


def _hidden_layers(model: nn.Module, records: dict[str, _Record]) -> list[str]:
    """For a model without feature maps: every leaf that computes something, but for the last (the logits)."""
    passing = (nn.Flatten, nn.Identity, nn.Dropout)
    leaves = [
        name
        for name, record in records.items()
        if record.calls == 1
        and record.output.ndim in (2, 3)
        and not any(True for _ in model.get_submodule(name).children())
        and not isinstance(model.get_submodule(name), passing)
    ]
    if len(leaves) < 2:
        raise RequestError(f"no layer to tap found in {type(model).__name__}; name them with taps=[...]")
    return leaves[:-1]
