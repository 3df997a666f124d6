"""The certificate of a mask: from what was measured to what is said and stored, without torch.

Every runtime (torch, ONNX Runtime) measures in its own way and writes its certificates here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .data.store import pack_mask
from .families import HELD_OUT, OTHER, RANDOM
from .intervals import wilson
from .regions import border_share, components


@dataclass(frozen=True)
class Certificate:
    """What was measured of one hard mask; names and meaning as in the store's columns.

    Shares are in [0, 1]; each robust share comes with its 95 % Wilson interval and number of draws.
    ``certified``: the predicate holds and fresh draws do not contradict it; ``reason`` says why not.
    ``families``: robust share by background family.
    """

    certified: bool
    reason: str | None
    label: int
    label_name: str
    conf: float
    label_masked: int
    conf_masked: float
    conf_complement: float
    conf_empty: float
    kept: bool
    area: float
    components: int
    border_share: float
    threshold: float
    robust_train: float
    robust_train_low: float
    robust_train_high: float
    robust_train_n: int
    robust_heldout: float
    robust_heldout_low: float
    robust_heldout_high: float
    robust_heldout_n: int
    robust_other: float | None
    robust_other_n: int
    dilation_kept: bool
    minimal_at: int | None
    predicate: str
    evaluations: int
    families: str

    def __str__(self) -> str:
        verdict = "certified" if self.certified else "NOT certified"
        return (
            f"{self.label_name} · keeps {self.area:.1%} of the pixels · p {self.conf:.2f} → {self.conf_masked:.2f} · "
            f"robust {self.robust_train:.2f} [{self.robust_train_low:.2f}, {self.robust_train_high:.2f}] · "
            f"held-out {self.robust_heldout:.2f} · {verdict}: {self.predicate}"
        )

    def row(self, mask: npt.NDArray[np.bool_], milliseconds: float) -> dict[str, Any]:
        """The store's columns of one explained image, but for where the image came from; mask [H,W]."""
        row = asdict(self)
        row["status"] = "certified" if row.pop("certified") else "uncertified"
        row["error"] = row.pop("reason")
        row["robust_families"] = row.pop("families")
        packed = pack_mask(mask)
        row |= {"ms": milliseconds, "h": mask.shape[0], "w": mask.shape[1]}
        return row | {"mask": packed, "mask_crc32": zlib.crc32(packed)}


@dataclass(frozen=True, eq=False)
class Measured:
    """What a runtime found out about the mask [H,W] of one image.

    conf and kept are of the decision that is explained; label is its class, label_masked that of the kept pixels.
    holds: does the predicate hold; kept_on: whether the decision was kept, by family of fresh backgrounds.
    """

    mask: npt.NDArray[np.bool_]
    label: int
    label_name: str
    conf: float
    label_masked: int
    conf_masked: float
    conf_complement: float
    conf_empty: float
    kept: bool
    dilation_kept: bool
    holds: bool
    threshold: float
    evaluations: int
    kept_on: Mapping[str, Sequence[bool]]
    minimal_at: int | None = None


def write_certificate(measured: Measured, predicate: str, rho: float | None) -> Certificate:
    """The certificate of what was measured.

    predicate: its text. rho: the share of backgrounds it asks for, or None when it asks for none; it is contradicted
    where the Wilson interval of the fresh draws lies below.
    """
    train, held, other = (_share(measured.kept_on, names) for names in (RANDOM, HELD_OUT, (OTHER,)))
    shares = {"mean": float(measured.kept)} | {
        name: round(float(np.mean(draws)), 4) for name, draws in measured.kept_on.items()
    }
    reason = None
    if not measured.holds:
        reason = f"the predicate fails even for the whole image: {predicate}"
    elif rho is not None and train[2] < rho:
        reason = f"fresh backgrounds contradict it: robust {train[0]:.2f}, at most {train[2]:.2f}"
    return Certificate(
        certified=reason is None,
        reason=reason,
        label=measured.label,
        label_name=measured.label_name,
        conf=measured.conf,
        label_masked=measured.label_masked,
        conf_masked=measured.conf_masked,
        conf_complement=measured.conf_complement,
        conf_empty=measured.conf_empty,
        kept=measured.kept,
        area=float(measured.mask.mean()),
        components=components(measured.mask),
        border_share=border_share(measured.mask),
        threshold=measured.threshold,
        robust_train=train[0],
        robust_train_low=train[1],
        robust_train_high=train[2],
        robust_train_n=train[3],
        robust_heldout=held[0],
        robust_heldout_low=held[1],
        robust_heldout_high=held[2],
        robust_heldout_n=held[3],
        robust_other=other[0] if other[3] else None,
        robust_other_n=other[3],
        dilation_kept=measured.dilation_kept,
        minimal_at=measured.minimal_at,
        predicate=predicate,
        evaluations=measured.evaluations,
        families=json.dumps(shares),
    )


def _share(kept_on: Mapping[str, Sequence[bool]], families: Sequence[str]) -> tuple[float, float, float, int]:
    draws = [bool(kept) for family in families for kept in kept_on.get(family, ())]
    hits, n = sum(draws), len(draws)
    return (hits / n if n else 0.0, *wilson(hits, n), n)
