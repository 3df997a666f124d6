"""The certificate of a mask: what it satisfies, measured on draws that no search has seen."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .backgrounds import HELD_OUT, OTHER, RANDOM
from .intervals import wilson
from .judge import Judge, dilate
from .predicate import Predicate
from .regions import border_share, components
from .repair import Masks

__all__ = ["PER_FAMILY", "Certificate", "Predicate", "certify"]

PER_FAMILY = 5  # draws a family


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


@torch.no_grad()
def certify(
    judge: Judge,
    x: Tensor,
    logits: Tensor,
    found: Masks,
    *,
    per_family: int = PER_FAMILY,
    purpose: str = "certificate",
) -> list[Certificate]:
    """Measure the masks found for x [B,C,H,W], on fresh draws that the predicate has never seen.

    logits [B,K]: scores of the whole images; per_family: draws a family of backgrounds. A robust predicate is
    contradicted where the Wilson interval of the fresh draws lies below rho.
    """
    mask, label, default = found.masks, logits.argmax(1), judge.backgrounds.default(x)
    full = logits.softmax(1).gather(1, label[:, None])[:, 0]
    probe = judge.logits(torch.cat([torch.where(m, x, default) for m in (~mask, dilate(mask))]))
    complement, wider = probe.view(2, len(x), -1).softmax(2)
    masked = found.scores.softmax(1)
    families = [*RANDOM, *HELD_OUT]
    if judge.backgrounds.reference is not None:
        families.append(OTHER)
    start = torch.tensor([zlib.crc32(image.tobytes()) for image in _bytes(x)])
    draws: list[tuple[str, int | Tensor]] = [
        (family, start % 2**31 + number) for family in families for number in range(per_family)
    ]
    kept = judge.kept_on(x, label, mask, draws, purpose).view(len(x), len(families), -1).cpu()
    spent = 3 + len(draws)  # f(x), the two probes, the draws
    empty = judge.empty(x)
    picked = [t.gather(1, label[:, None])[:, 0].tolist() for t in (masked, complement)]
    rows = []
    for b, y in enumerate(label.tolist()):
        same = int(masked[b].argmax()) == y
        by_family = {"mean": float(same)} | dict(zip(families, kept[b].float().mean(1).tolist(), strict=True))
        train = _share([kept[b, families.index(f)] for f in RANDOM])
        held = _share([kept[b, families.index(f)] for f in HELD_OUT])
        other = _share([kept[b, families.index(OTHER)]]) if OTHER in families else (None, 0.0, 1.0, 0)
        plain = mask[b, 0].cpu().numpy()
        reason = None
        if not found.holds[b]:
            reason = f"the predicate fails even for the whole image: {judge.predicate}"
        elif judge.predicate.kind == "robust" and train[2] < judge.predicate.rho:
            reason = f"fresh backgrounds contradict it: robust {train[0]:.2f}, at most {train[2]:.2f}"
        rows.append(
            Certificate(
                certified=reason is None,
                reason=reason,
                label=y,
                label_name=judge.classifier.class_names[y],
                conf=float(full[b]),
                label_masked=int(masked[b].argmax()),
                conf_masked=picked[0][b],
                conf_complement=picked[1][b],
                conf_empty=float(empty[y]),
                kept=same,
                area=float(plain.mean()),
                components=components(plain),
                border_share=border_share(plain),
                threshold=float(found.threshold[b]),
                robust_train=train[0],
                robust_train_low=train[1],
                robust_train_high=train[2],
                robust_train_n=train[3],
                robust_heldout=held[0],
                robust_heldout_low=held[1],
                robust_heldout_high=held[2],
                robust_heldout_n=held[3],
                robust_other=other[0],
                robust_other_n=other[3],
                dilation_kept=int(wider[b].argmax()) == y,
                minimal_at=int(found.minimal_at[b]) or None,
                predicate=str(judge.predicate),
                evaluations=int(found.evaluations[b]) + spent,
                families=json.dumps({k: round(v, 4) for k, v in by_family.items()}),
            )
        )
    return rows


def _bytes(x: Tensor) -> Iterator[np.ndarray]:
    yield from (x * 255).round().to(torch.uint8).cpu().numpy()


def _share(draws: list[Tensor]) -> tuple[float, float, float, int]:
    hits, n = sum(int(d.sum()) for d in draws), sum(d.numel() for d in draws)
    return (hits / n, *wilson(hits, n), n)
