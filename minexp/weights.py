"""Weights: from files into models, without running anything that a file may carry, and their digest."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import RequestError
from .specs import near, one_line

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "backbone.")
_PYTORCH = (".pth", ".pt", ".bin", ".ckpt", ".th")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file read with `weights_only=True`.

    Raises RequestError when there is no such file, it is damaged, or reading it would have to unpickle objects.
    """
    if not path.is_file():
        raise RequestError(f"no weights file {path}; give an existing .safetensors or .pth file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{path} is not a readable safetensors file ({one_line(error)})") from error
    if path.suffix not in _PYTORCH:
        raise RequestError(f"weights of type '{path.suffix}' are not read; give .safetensors or .pth: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path} holds pickled objects, which can run code when read; where you trust it, convert it once: "
            "import torch, safetensors.torch as s; m = torch.load(PATH, weights_only=False); "
            "s.save_model(m, 'weights.safetensors')"
        ) from error
    except Exception as error:
        raise RequestError(f"{path} is not a readable PyTorch weights file ({one_line(error)})") from error
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise RequestError(f"{path} holds no state dict; save one with torch.save(model.state_dict(), PATH)")


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the file's tensors into the model; every one has to fit (RequestError naming those that do not)."""
    own = model.state_dict()
    tensors = read_weights(path)
    for prefix in _PREFIXES:
        if not any(name.startswith(prefix) for name in own) and all(
            name.startswith(prefix) for name in tensors
        ):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    # Batch counters serve training alone; files from other programs often lack them.
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
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
        if value.shape != own[name].shape:
            there, here = list(value.shape), list(own[name].shape)
            head = there[1:] == here[1:] and there[:1] != here[:1]
            hint = f"; give --num-classes {there[0]}" if head else ""
            raise RequestError(
                f"{path} does not fit {type(model).__name__}: {name} is {there} there and {here} in the model{hint}"
            )
    model.load_state_dict(tensors, strict=False)


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
