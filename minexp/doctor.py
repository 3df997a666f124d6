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
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "fsspec",
)


def examine() -> dict[str, Any]:
    """The facts, JSON-able. `kernels.cpu` and `kernels.cuda` are true, or false with the reason under `why`."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "cpus": os.cpu_count(),
        **_torch(),
        "onnx_providers": _providers(),
    }


def _torch() -> dict[str, Any]:
    """What torch says; without it, explainers still run."""
    try:
        import torch
    except ModuleNotFoundError:
        why = "torch is not installed; pip install 'minexp[torch]'"
        kernels = {"cpu": False, "cuda": False, "why": {"cpu": why, "cuda": why}}
        return {"torch": None, "device": "cpu", "threads": os.cpu_count(), "kernels": kernels}
    from ._ops import kernel_status

    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "device": f"cuda: {torch.cuda.get_device_name()}" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "kernels": kernel_status(),
    }


def _providers() -> list[str]:
    """Where ONNX Runtime can run here; nothing without it."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return [str(name) for name in onnxruntime.get_available_providers()]


def describe(facts: dict[str, Any]) -> str:
    """The facts as aligned lines for a reader."""
    kernels = facts["kernels"]
    lines = [
        ("minexp", facts["version"]),
        ("Python", f"{facts['python']} on {facts['platform']}"),
        ("torch", facts["torch"] or "not installed"),
        *((name, found or "not installed") for name, found in facts["libraries"].items()),
        ("device", facts["device"]),
        ("ONNX Runtime on", ", ".join(facts["onnx_providers"]) or "not installed"),
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
