"""explain(): from images to certified masks, the stages in order."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .backgrounds import GREY, Backgrounds
from .certify import Certificate, Judge, Predicate
from .classifier import Classifier
from .errors import MinexpError, RequestError
from .masker import Masker
from .microbatch import MicroBatch
from .refine import Refinement, refine
from .repair import Masks, growth_order, local_order, threshold_masks

Effort = Literal["fast", "refined"]
RETRIES = 2  # enlargements of a mask that fresh draws contradict
GROW = 1.1  # the least an enlarged mask gains


@dataclass(frozen=True)
class Explanation:
    """Certified masks of a batch: masks bool [B,H,W] of the pixels kept, x float [B,C,H,W], background [1,C,1,1].
    milliseconds: wall time an image, averaged over the call.

    Indexing gives one image's Explanation; ``certificates`` has one entry an image.
    """

    masks: Tensor
    x: Tensor
    background: Tensor
    certificates: tuple[Certificate, ...]
    milliseconds: float

    def __len__(self) -> int:
        return len(self.certificates)

    def __getitem__(self, index: int) -> Explanation:
        if not -len(self) <= index < len(self):
            raise IndexError(f"explanation {index} of {len(self)}")
        index %= len(self)
        one = slice(index, index + 1)
        return Explanation(
            self.masks[one], self.x[one], self.background, self.certificates[one], self.milliseconds
        )

    def __iter__(self) -> Iterator[Explanation]:
        return (self[index] for index in range(len(self)))

    def kept_images(self) -> Tensor:
        """e = m ⊙ x with removed pixels on the default background, [B,C,H,W]."""
        return torch.where(self.masks.unsqueeze(1), self.x, self.background)

    def rows(self) -> list[dict[str, Any]]:
        """One row an image with the store's columns, but for where the image came from."""
        return [
            certificate.row(mask, self.milliseconds)
            for mask, certificate in zip(self.masks.cpu().numpy(), self.certificates, strict=True)
        ]

    def __repr__(self) -> str:
        if len(self) == 1:
            return f"Explanation({self.certificates[0]})"
        area = float(np.mean([c.area for c in self.certificates]))
        good = sum(c.certified for c in self.certificates)
        return f"Explanation({len(self)} images, {good} certified, mean area {area:.1%})"


def make_backgrounds(
    classifier: Classifier,
    masker: Masker | None = None,
    *,
    reference: Tensor | None = None,
    background: str | tuple[float, ...] = "mean",
    seed: int = 0,
) -> Backgrounds:
    """A job's backgrounds: the masker's stored colour and images, or ``reference`` [M,C,H,W] in [0,1].

    background: "mean" (the data's mean colour, else the usual grey), "black", "white" or one value a channel.
    """
    channels = classifier.input_shape[0]
    if reference is None and masker is not None:
        reference = masker.reference_images()
    if background == "mean":
        if masker is not None:
            colour = masker.mean.detach().clone()
        elif reference is not None:
            colour = reference.mean((0, 2, 3))
        else:
            colour = torch.tensor(GREY if channels == 3 else (sum(GREY) / 3,) * channels)
    elif background in ("black", "white"):
        colour = torch.full((channels,), float(background == "white"))
    elif (
        not isinstance(background, str)
        and len(background) == channels
        and all(0 <= v <= 1 for v in background)
    ):
        colour = torch.tensor(background, dtype=torch.float32)
    else:
        raise RequestError(
            f"background {background!r}; give mean, black, white or {channels} values in [0,1], one a channel"
        )
    if reference is not None and len(reference) < 2:
        reference = None
    return Backgrounds(colour, reference, seed)


def explain(
    classifier: Classifier,
    x: Tensor,
    masker: Masker | None = None,
    *,
    predicate: Predicate | None = None,
    effort: Effort | None = None,
    background: str | tuple[float, ...] = "mean",
    reference: Tensor | None = None,
    seed: int = 0,
    micro_batch: MicroBatch | int | None = None,
    backgrounds: Backgrounds | None = None,
    refinement: Refinement | None = None,
) -> Explanation:
    """Explain the decision (by default the top class) of every image of x, float [B,C,H,W] in [0,1].

    effort "fast": the masker's mask, repaired where the predicate fails; "refined": optimised per image, from
    the masker's output or, without a masker, from keep-all. A mask whose fresh draws contradict the predicate is
    enlarged on more draws and certified anew. ``backgrounds`` are made once a job from ``seed``
    (make_backgrounds), so that the answer for an image does not depend on its batch; when given, they stand in for
    ``background``, ``reference`` and ``seed``.
    Raises MinexpError for scores that are not finite, RequestError for input that is not such a batch or a fast
    explanation without a masker.
    """
    started = time.perf_counter()
    effort = ("refined" if masker is None else "fast") if effort is None else effort
    if effort not in ("fast", "refined"):
        raise RequestError(f"unknown effort {effort!r}; choose fast or refined")
    if effort == "fast" and masker is None:
        raise RequestError("effort fast needs a masker; fit one with minexp.fit, or choose effort refined")
    _check(classifier, x)
    if (
        masker is not None
        and masker.metadata.get("classifier", classifier.fingerprint) != classifier.fingerprint
    ):
        raise RequestError(
            "this masker was fitted to another classifier; fit one for this model with minexp.fit"
        )
    x = x.to(classifier.device)
    if backgrounds is None:
        backgrounds = make_backgrounds(
            classifier, masker, reference=reference, background=background, seed=seed
        )
    judge = Judge(classifier, predicate or Predicate(), backgrounds, micro_batch=micro_batch)
    with classifier.frozen():
        logits = judge.logits(x)
        if not logits.isfinite().all():
            raise MinexpError(
                "the classifier gives NaN or infinite scores; check its weights, and that mean and std are its own"
            )
        found, order = _find(judge, x, logits, masker, effort, refinement)
        certificates = judge.certify(
            x,
            logits,
            found.masks,
            holds=found.holds,
            threshold=found.threshold,
            evaluations=found.evaluations,
        )
        for attempt in range(1, RETRIES + 1):
            again = [b for b, c in enumerate(certificates) if found.holds[b] and not c.certified]
            if again:
                found = _enlarge(judge, x, logits, order, found, certificates, again, attempt)
    spent = (time.perf_counter() - started) * 1000 / max(1, len(x))
    return Explanation(found.masks[:, 0], x, backgrounds.default(x), tuple(certificates), spent)


def _find(
    judge: Judge,
    x: Tensor,
    logits: Tensor,
    masker: Masker | None,
    effort: Effort,
    refinement: Refinement | None,
) -> tuple[Masks, Tensor]:
    """Masks that satisfy the predicate, and the order [B,1,H,W] in which pixels would join them."""

    def find(part: Tensor, scores: Tensor) -> tuple[Masks, Tensor]:
        decision = judge.target.decide(scores)
        p = None if masker is None else masker.probabilities(part)
        if effort == "fast":
            assert p is not None
            p = local_order(p)
            return threshold_masks(judge, part, decision, p), p
        numbers = torch.tensor([zlib.crc32(i.numpy().tobytes()) % 2**20 for i in part.cpu()])
        refined = refine(
            judge,
            part,
            refinement or Refinement(),
            start=None if p is None else torch.logit(p, 1e-4),
            numbers=numbers,
        )
        return refined, growth_order(refined.masks)

    masks, orders = zip(*judge.micro_batch.run(find, x, logits), strict=True)
    joined = (torch.cat([getattr(part, name) for part in masks]) for name in Masks.__annotations__)
    return Masks(*joined), torch.cat(orders)


def _enlarge(
    judge: Judge,
    x: Tensor,
    logits: Tensor,
    order: Tensor,
    found: Masks,
    certificates: list[Certificate],
    again: list[int],
    attempt: int,
) -> Masks:
    """Grow masks whose fresh draws contradict the predicate, on more draws, and certify them on draws fresh again."""
    index = torch.tensor(again, device=x.device)
    size, scores = found.masks[index].flatten(1).sum(1), logits[index]
    larger = threshold_masks(
        judge.stricter(2**attempt),
        x[index],
        judge.target.decide(scores),
        order[index],
        at_least=(size * GROW).ceil().long(),
    )
    spent = (
        torch.tensor([certificates[b].evaluations for b in again], device=x.device) + larger.evaluations - 1
    )
    new = judge.certify(
        x[index],
        scores,
        larger.masks,
        holds=larger.holds,
        threshold=larger.threshold,
        evaluations=spent,
        first=attempt * judge.per_family,
    )
    for b, certificate in zip(again, new, strict=True):
        certificates[b] = certificate
    masks, threshold = found.masks.clone(), found.threshold.clone()
    masks[index], threshold[index] = larger.masks, larger.threshold
    return Masks(masks, found.holds, threshold, found.evaluations)


def _check(classifier: Classifier, x: Tensor) -> None:
    channels = classifier.input_shape[0]
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point() or len(x) == 0:
        raise RequestError(
            f"images of {str(x.dtype).removeprefix('torch.')} {list(x.shape)}; give float [B,{channels},H,W], B ≥ 1"
        )
    low, high = float(x.min()), float(x.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # also catches NaN
        raise RequestError(
            f"pixel values from {low:g} to {high:g}; give them in [0,1] (the classifier applies mean and std itself)"
        )
