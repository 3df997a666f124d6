"""What a model file says about itself: JSON under `minexp.*` keys of its metadata, and a seal over its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.preprocessing import Preprocessing
from ..errors import RequestError

EXPLAINER, MASKER = "minexp.explainer/1", "minexp.masker-onnx/1"
_SEAL = "minexp.sha256"
_SEAL_BYTES = 2 + 2 + len(_SEAL) + 2 + 64  # tag and length of the entry, then of its key and its value


@dataclass(frozen=True)
class About:
    """An explainer's metadata.

    fingerprint: of the job that it stands for (classifier, masker, predicate, backgrounds). families, fresh: the
    certificate's backgrounds and draws of each. rho: the share of backgrounds the predicate asks for, None when it
    asks for none. predicate: it in words. extra: whatever else was recorded.
    """

    format: str
    fingerprint: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    families: tuple[str, ...]
    fresh: int
    rho: float | None
    predicate: str
    threshold: float
    background: tuple[float, ...]
    precision: str
    extra: Mapping[str, Any]
    explained: str | None = None

    def to_metadata(self) -> dict[str, str]:
        """Key → JSON, as it goes into the model."""
        fields = {
            "format": self.format,
            "fingerprint": self.fingerprint,
            "preprocessing": self.preprocessing.to_json(),
            "class_names": list(self.class_names),
            "families": list(self.families),
            "fresh": self.fresh,
            "rho": self.rho,
            "predicate": self.predicate,
            "threshold": self.threshold,
            "background": list(self.background),
            "precision": self.precision,
            "explained": self.explained,
            **self.extra,
        }
        return {f"minexp.{key}": json.dumps(value) for key, value in fields.items()}

    @classmethod
    def from_metadata(cls, entries: Mapping[str, str], path: object) -> About:
        """Read and check what `to_metadata` wrote. Raises RequestError."""
        try:
            fields = {
                key.removeprefix("minexp."): json.loads(value)
                for key, value in entries.items()
                if key.startswith("minexp.") and key != _SEAL
            }
            rho, explained = fields.pop("rho"), fields.pop("explained", None)
            return cls(
                format=str(fields.pop("format")),
                fingerprint=str(fields.pop("fingerprint")),
                preprocessing=Preprocessing.from_json(fields.pop("preprocessing")),
                class_names=tuple(map(str, fields.pop("class_names"))),
                families=tuple(map(str, fields.pop("families"))),
                fresh=int(fields.pop("fresh")),
                rho=None if rho is None else float(rho),
                predicate=str(fields.pop("predicate")),
                threshold=float(fields.pop("threshold")),
                background=tuple(map(float, fields.pop("background"))),
                precision=str(fields.pop("precision")),
                extra=fields,
                explained=None if explained is None else str(explained),
            )
        except _UNREADABLE as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise RequestError(
                f"{path}: its metadata is not an explainer's ({why}); export it again"
            ) from error


# Whatever JSON of the wrong shape leads to.
_UNREADABLE = (
    *(KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError),
    RequestError,
)


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """Of the job that an explainer stands for."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_about(content: bytes, entries: Mapping[str, str], path: object, formats: Sequence[str]) -> About:
    """The metadata of a file of one of these formats, with its seal. Raises RequestError."""
    if entries.get("minexp.format") not in [f'"{name}"' for name in formats]:
        raise RequestError(
            f"{path} is an ONNX model but no explainer ({formats[0]}): write one with `minexp export`"
        )
    if not seal_holds(content):
        raise RequestError(f"{path}: its content does not match its checksum: it is damaged; export it again")
    return About.from_metadata(entries, path)


def sealed(model: bytes) -> bytes:
    """The serialised model with a last metadata entry: the SHA-256 of all bytes before it."""
    key, value = _SEAL.encode(), hashlib.sha256(model).hexdigest().encode()
    entry = b"\x0a" + bytes([len(key)]) + key + b"\x12" + bytes([len(value)]) + value
    return model + b"\x72" + bytes([len(entry)]) + entry  # field 14 of ModelProto


def seal_holds(content: bytes) -> bool:
    """Is this what `sealed` gave?"""
    return len(content) > _SEAL_BYTES and sealed(content[:-_SEAL_BYTES]) == content
