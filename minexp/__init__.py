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
    "Certificate": "certificate",
    "Explanation": "explanation",
    "explain": "explanation",
    "contrast": "questions",
    "multiple": "questions",
    "necessary": "questions",
    "side_by_side": "explanation",
    "Minimisation": "minimise",
    "Refinement": "refine",
    "Circuit": "circuit.circuit",
    "read_circuit": "circuit.readout",
    "ablate_circuit": "circuit.readout",
    "export": "deploy.export",
    "MinexpError": "errors",
    "RequestError": "errors",
    "VerifyError": "errors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # "as": exported, for type checkers
    from ._ops import KLTarget as KLTarget
    from ._ops import activation_kl as activation_kl
    from ._ops import edge_position_topk as edge_position_topk
    from ._ops import edge_threshold as edge_threshold
    from ._ops import edge_topk as edge_topk
    from ._ops import edge_total_topk as edge_total_topk
    from .certificate import Certificate as Certificate
    from .circuit.circuit import Circuit as Circuit
    from .circuit.readout import ablate_circuit as ablate_circuit
    from .circuit.readout import read_circuit as read_circuit
    from .classifier import Classifier as Classifier
    from .classifier import load_classifier as load_classifier
    from .deploy.export import export as export
    from .errors import MinexpError as MinexpError
    from .errors import RequestError as RequestError
    from .errors import VerifyError as VerifyError
    from .explanation import Explanation as Explanation
    from .explanation import explain as explain
    from .explanation import side_by_side as side_by_side
    from .masker import Masker as Masker
    from .masker import load_masker as load_masker
    from .minimise import Minimisation as Minimisation
    from .predicate import Predicate as Predicate
    from .questions import contrast as contrast
    from .questions import multiple as multiple
    from .questions import necessary as necessary
    from .refine import Refinement as Refinement
    from .training import fit as fit


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
