"""What this installation is made of: versions, device, threads, and which operators are compiled."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import __version__

_LIBRARIES = (
    "numpy",
    "pillow",
    "pyarrow",
    "safetensors",
    "torchvision",
    "timm",
    "transformers",
    "scikit-learn",
    "fsspec",
)


def examine() -> dict[str, Any]:
    """The facts, JSON-able. `kernels.cpu` and `kernels.cuda` are true, or false with the reason under `why`."""
    import torch

    from ._ops import kernel_status

    cuda = torch.cuda.is_available()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "device": f"cuda: {torch.cuda.get_device_name()}" if cuda else "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": kernel_status(),
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as aligned lines for a reader."""
    kernels = facts["kernels"]
    lines = [
        ("minexp", facts["version"]),
        ("Python", f"{facts['python']} on {facts['platform']}"),
        ("torch", facts["torch"]),
        *((name, found or "not installed") for name, found in facts["libraries"].items()),
        ("device", facts["device"]),
        ("threads", f"{facts['threads']} of {facts['cpus']} CPUs"),
    ]
    for device in ("cpu", "cuda"):
        state = "compiled" if kernels[device] else f"no: {kernels['why'][device]}"
        lines.append((f"{device} kernels", state))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
