"""Explainers as ONNX files: written from torch, run without it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime import Explainer

__all__ = ["Explainer"]


def __getattr__(name: str) -> Any:
    if name == "Explainer":
        return import_module(".runtime", __name__).Explainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
