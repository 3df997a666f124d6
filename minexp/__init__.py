"""Minimal explanations of image classifiers, each with a tested certificate.

Public names load on first use, so that importing the package costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "activation_kl": "_ops",
    "KLTarget": "_ops",
    "edge_position_topk": "_ops",
    "edge_topk": "_ops",
    "edge_threshold": "_ops",
    "edge_total_topk": "_ops",
    "Classifier": "classifier",
    "load_classifier": "classifier",
    "Masker": "masker",
    "load_masker": "masker",
    "fit": "training",
    "Predicate": "predicate",
    "Certificate": "certify",
    "Explanation": "explanation",
    "explain": "explanation",
    "contrast": "questions",
    "multiple": "questions",
    "necessary": "questions",
    "side_by_side": "explanation",
    "Minimisation": "minimise",
    "Refinement": "refine",
    "MinexpError": "errors",
    "RequestError": "errors",
    "VerifyError": "errors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from ._ops import KLTarget, activation_kl, edge_position_topk, edge_threshold, edge_topk, edge_total_topk
    from .certify import Certificate
    from .classifier import Classifier, load_classifier
    from .errors import MinexpError, RequestError, VerifyError
    from .explanation import Explanation, explain, side_by_side
    from .masker import Masker, load_masker
    from .minimise import Minimisation
    from .predicate import Predicate
    from .questions import contrast, multiple, necessary
    from .refine import Refinement
    from .training import fit


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
