"""Weights: from files into models, without running anything that a file may carry, and their digest."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import RequestError, near, one_line
from .zoos import quiet

_PYTORCH = (".pth", ".pt", ".bin", ".ckpt", ".th", ".tar")
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.I)
# Counters that serve training or profiling alone; files from other programs often lack or add them.
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")


def read_weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a .safetensors file, or in a PyTorch file read with `weights_only=True`, by their place.

    A checkpoint keeps them under names of its own ("state_dict", "model_ema"); a plain file's place is "".
    Raises RequestError when there is no such file, it is damaged, or reading it would have to unpickle objects.
    """
    if not path.is_file():
        raise RequestError(f"no weights file {path}; give an existing .safetensors or .pth file")
    if path.suffix == ".safetensors":
        try:
            return {"": safetensors.torch.load_file(path)}
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{path} is not a readable safetensors file ({one_line(error)})") from error
    if path.suffix not in _PYTORCH:
        raise RequestError(f"weights of type '{path.suffix}' are not read; give .safetensors or .pth: {path}")
    try:
        # a training script's settings, which are plain values, stand beside the weights in many checkpoints
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path} holds pickled objects, which can run code when read; where you trust it, convert it once: "
            "import torch, safetensors.torch as s; m = torch.load(PATH, weights_only=False); "
            "s.save_model(m, 'weights.safetensors')"
        ) from error
    except Exception as error:
        raise RequestError(f"{path} is not a readable PyTorch weights file ({one_line(error)})") from error
    found = dict(_state_dicts(content))
    if not found:
        raise RequestError(f"{path} holds no state dict; save one with torch.save(model.state_dict(), PATH)")
    return found


def _state_dicts(content: Any, place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of names to tensors in what a checkpoint holds."""
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(isinstance(name, str) for name in tensors):
        yield place, tensors
    for name, value in content.items():
        if isinstance(name, str):  # an optimiser's state goes by numbers
            yield from _state_dicts(value, f"{place}.{name}" if place else name)


@dataclass(frozen=True)
class _Reading:
    """One way to read the model's weights out of a file: from which state dict, behind which prefix."""

    place: str
    prefix: str
    tensors: dict[str, Tensor]  # by the model's names, as far as the file has them
    aside: list[str]  # names in the same state dict that the prefix leaves out

    @property
    def averaged(self) -> bool:
        return bool(_AVERAGED.search(self.place) or _AVERAGED.search(self.prefix))

    def __str__(self) -> str:
        return f"'{'.'.join(part for part in (self.place, self.prefix.rstrip('.')) if part)}'"


def load_weights(model: nn.Module, path: Path, *, ema: bool = False) -> None:
    """Put the file's tensors into the model; every one has to fit (RequestError naming those that do not).

    Wrappers of a checkpoint and prefixes of names ("module.", "model.") are found by which of the model's names are
    behind them. ema: take the averaged weights where the file holds those beside the plain ones.
    What is left aside is said in a warning.
    """
    own = model.state_dict()
    state_dicts = read_weights(path)
    readings = [
        reading for place, tensors in state_dicts.items() for reading in _readings(own, tensors, place)
    ]
    readings = [reading for reading in readings if reading.averaged or not ema]
    if not readings:
        raise RequestError(f"{path} holds no averaged weights; leave --ema out")
    fullest = max(len(reading.tensors.keys() & own.keys()) for reading in readings)
    fitting = [reading for reading in readings if len(reading.tensors.keys() & own.keys()) == fullest]
    fitting.sort(key=lambda reading: (reading.averaged != ema, len(reading.prefix)))
    chosen = _converted(model, fitting[0])
    _check(model, own, chosen.tensors, path)
    if chosen.aside:
        warnings.warn(f"{path}: {_some(chosen.aside)} left aside; the model is in {chosen}", stacklevel=2)
    averaged = [str(reading) for reading in fitting if reading.averaged]
    if averaged and not chosen.averaged:
        warnings.warn(f"{path}: {chosen} is taken; --ema takes {averaged[0]} instead", stacklevel=2)
    fitting_names = {name: value for name, value in chosen.tensors.items() if name in own}
    model.load_state_dict(fitting_names, strict=False)


def _readings(own: Mapping[str, Tensor], tensors: dict[str, Tensor], place: str) -> Iterator[_Reading]:
    """The state dict as it is, behind each prefix that leads to names of the model, and for a model in a wrapper."""
    anchors = [name for name in own if not name.endswith(_COUNTERS)]
    anchors = anchors[:1] + anchors[-1:]
    behind = {key[: -len(name)] for name in anchors for key in tensors if key.endswith(f".{name}")}
    for prefix in ["", *sorted(behind)]:
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        yield _Reading(place, prefix, inside, [key for key in tensors if not key.startswith(prefix)])
    for name in anchors[:1]:
        parts = name.split(".")[:-1]
        for count in range(1, len(parts) + 1):
            wrapper = ".".join(parts[:count]) + "."
            if all(key.startswith(wrapper) for key in own):
                yield _Reading(place, "", {wrapper + key: value for key, value in tensors.items()}, [])


def _converted(model: nn.Module, reading: _Reading) -> _Reading:
    """Weights in an architecture's older or original naming, by the conversion that its library ships."""
    if reading.tensors.keys() >= {name for name in model.state_dict() if not name.endswith(_COUNTERS)}:
        return reading
    library = type(model).__module__.partition(".")[0]
    convert = {"timm": _timm_names, "transformers": _transformers_names}.get(library)
    try:
        return reading if convert is None else replace(reading, tensors=convert(model, dict(reading.tensors)))
    except Exception:  # not a naming that it knows: what does not fit is said about the file as it is
        return reading


def _timm_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sys.modules[type(model).__module__].checkpoint_filter_fn(tensors, model))


def _transformers_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files keep the names of the first release, which loading renames."""
    with quiet(sys.modules["transformers"]):
        loaded, report = type(model).from_pretrained(
            None, config=model.config, state_dict=tensors, output_loading_info=True
        )
    left_out = (*report["missing_keys"], *report["mismatched_keys"])
    kept = {name: value for name, value in loaded.state_dict().items() if name not in left_out}
    return kept | {name: tensors[name] for name in report["unexpected_keys"]}


def _check(model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in own if name not in tensors and not name.endswith(_COUNTERS)]
    unexpected = [name for name in tensors if name not in own and not name.endswith(_COUNTERS)]
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has unexpected {_some(unexpected)}"] if unexpected else []
        hint = (
            f"; '{missing[0]}' is perhaps its {near(missing[0], unexpected)}"
            if missing and unexpected
            else ""
        )
        raise RequestError(f"{path} does not fit {type(model).__name__}: it {' and '.join(parts)}{hint}")
    for name, value in tensors.items():
        if name in own and value.shape != own[name].shape:
            there, here = list(value.shape), list(own[name].shape)
            head = there[1:] == here[1:] and there[:1] != here[:1]
            hint = f"; give --num-classes {there[0]}" if head else ""
            raise RequestError(
                f"{path} does not fit {type(model).__name__}: {name} is {there} there and {here} in the model{hint}"
            )


def state_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the tensors of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
