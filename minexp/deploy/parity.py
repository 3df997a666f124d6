"""How far two runtimes agree on the same images, row for row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..certificate import Certificate

TOLERANCE = 1e-4  # of a probability


@dataclass(frozen=True)
class Parity:
    """Agreement over ``images``.

    mask_flips: pixels that are in one mask and not in the other; max_abs: the largest difference of a probability;
    labels: images of another class; certificates: images whose certificate differs in anything else, be it a count, a
    verdict, or a probability by more than 1e-4. worst: the fields that differ, with how many images each.
    mask_ties: pixels besides, whose side of a mask's level the rounding of float32 decides (`minexp.deploy.ties`); the
    certificates of these masks are compared with those that torch gives the same masks.
    """

    images: int
    mask_flips: int
    mask_flip_share: float
    max_abs: float
    labels: int
    certificates: int
    worst: dict[str, int]
    mask_ties: int = 0

    @property
    def exact(self) -> bool:
        """No mask, class or certificate differs."""
        return not (self.mask_flips or self.labels or self.certificates) and self.max_abs <= TOLERANCE

    def __str__(self) -> str:
        worst = ", ".join(f"{name} in {count}" for name, count in self.worst.items())
        return (
            f"{self.mask_flips} mask pixels flipped, probabilities off by up to {self.max_abs:.1e}, "
            f"{self.labels} labels and {self.certificates} certificates of {self.images} differ"
            + (f" ({worst})" if worst else "")
            + (
                f"; {self.mask_ties} pixels lie on their mask's level up to rounding"
                if self.mask_ties
                else ""
            )
        )


def compare(
    masks: npt.NDArray[np.bool_],
    certificates: Sequence[Certificate],
    probabilities: npt.NDArray[np.floating],
    other_masks: npt.NDArray[np.bool_],
    other_certificates: Sequence[Certificate],
    other_probabilities: npt.NDArray[np.floating],
    *,
    ties: int = 0,
) -> Parity:
    """Parity of masks bool [N,H,W], their certificates, and the maskers' probabilities [N,H,W].

    ties: pixels set aside before, as `Parity.mask_ties`.
    """
    worst: dict[str, int] = {}
    furthest = float(np.abs(probabilities - other_probabilities).max())
    differing = 0
    for one, other in zip(certificates, other_certificates, strict=True):
        fields = _differences(one, other)
        differing += bool(fields)
        for name in fields:
            worst[name] = worst.get(name, 0) + 1
        furthest = max(furthest, *(abs(getattr(one, n) - getattr(other, n)) for n in _PROBABILITIES))
    flips = int((masks != other_masks).sum())
    pairs = zip(certificates, other_certificates, strict=True)
    return Parity(
        images=len(masks),
        mask_flips=flips,
        mask_flip_share=flips / masks.size,
        max_abs=furthest,
        labels=sum(one.label != other.label for one, other in pairs),
        certificates=differing,
        worst=dict(sorted(worst.items(), key=lambda item: -item[1])),
        mask_ties=ties,
    )


_PROBABILITIES = ("conf", "conf_masked", "conf_complement", "conf_empty")


def _differences(one: Certificate, other: Certificate) -> list[str]:
    """Names of the fields that differ by more than rounding."""
    names = []
    for name, value in asdict(one).items():
        there: Any = getattr(other, name)
        close = isinstance(value, float) and isinstance(there, float) and abs(value - there) <= TOLERANCE
        if not close and value != there:
            names.append(name)
    return names
