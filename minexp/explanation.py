"""explain(): from images to certified masks, the stages in order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .backgrounds import GREY, Backgrounds
from .certificate import Certificate
from .certify import PER_FAMILY, certify
from .classifier import Classifier
from .errors import MinexpError, RequestError
from .judge import Judge
from .masker import Masker
from .microbatch import MicroBatch
from .minimise import Minimisation
from .objective import PRESETS, Match
from .predicate import Predicate
from .refine import Refinement
from .repair import Repair
from .search import EFFORTS, Effort, Search

if TYPE_CHECKING:
    from PIL import Image

FRESH = {"fast": 1, "refined": PER_FAMILY, "minimal": PER_FAMILY}  # certificate draws a family
RETRIES = 2  # enlargements of a mask that fresh draws contradict


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

    def plot(self, *, columns: int = 2, limit: int = 24) -> Image.Image:
        """Image → mask → kept image of the first ``limit`` images, with their certificates, as a Pillow picture."""
        from .report import Panel, montage

        shown = min(limit, len(self))
        pictures, kept = (_pixels(t[:shown]) for t in (self.x, self.kept_images()))
        masks = self.masks[:shown].cpu().numpy()
        lines = map(str, self.certificates)
        return montage(
            [Panel(*row) for row in zip(pictures, masks, kept, lines, strict=False)], columns=columns
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the pictures, and the certificates in words."""
        from .report.pictures import image_uri

        shown = min(6, len(self))
        rows = zip(
            _pixels(self.x[:shown]), _pixels(self.kept_images()[:shown]), self.certificates, strict=False
        )
        style = 'style="width:160px;image-rendering:pixelated;margin:2px"'
        figures = "".join(
            f'<figure style="margin:0 0 12px"><img {style} src="{image_uri(image, 320)}" alt="image">'
            f'<img {style} src="{image_uri(kept, 320)}" alt="what the mask keeps">'
            f'<figcaption style="font:13px sans-serif">{escape(str(certificate))}</figcaption></figure>'
            for image, kept, certificate in rows
        )
        return f"<div><p>{escape(repr(self) if len(self) > 1 else 'Explanation')}</p>{figures}</div>"

    def __repr__(self) -> str:
        if len(self) == 1:
            return f"Explanation({self.certificates[0]})"
        area = float(np.mean([c.area for c in self.certificates]))
        good = sum(c.certified for c in self.certificates)
        return f"Explanation({len(self)} images, {good} certified, mean area {area:.1%})"


def side_by_side(explanations: Mapping[str, Explanation]) -> Image.Image:
    """The same images explained in several ways: one row an image, one column an explanation, as a Pillow picture."""
    from .report import table_of_pictures

    first = next(iter(explanations.values()))
    images = _pixels(first.x)
    kept = {name: _pixels(found.kept_images()) for name, found in explanations.items()}
    rows = [[image, *(kept[name][b] for name in explanations)] for b, image in enumerate(images)]
    notes = [
        [
            first.certificates[b].label_name,
            *(
                f"{c.area:.1%} · held-out {c.robust_heldout:.2f} · {c.evaluations} evaluations"
                for c in (found.certificates[b] for found in explanations.values())
            ),
        ]
        for b in range(len(first))
    ]
    return table_of_pictures(["image", *explanations], rows, notes)


def _pixels(x: Tensor) -> np.ndarray:
    """uint8 [B,H,W,C] of float [B,C,H,W] in [0,1]; the first channel alone where there are two or more than three."""
    x = x if x.shape[1] in (1, 3) else x[:, :1]
    return (x.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


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
    fresh: int | None = None,
    refinement: Refinement | None = None,
    minimisation: Minimisation | None = None,
    preset: str = "default",
    match: Match | None = None,
    repair: Repair | None = None,
) -> Explanation:
    """Explain the decision (by default the top class) of every image of x, float [B,C,H,W] in [0,1].

    effort "fast": the masker's mask, repaired where the predicate fails; "refined": optimised per image, from
    keep-all; "minimal": reduced from there until no single cell can go. What tries many masks has to satisfy the
    predicate on more draws (search.REPEATS). A mask whose fresh draws
    contradict the predicate is searched again with more draws and certified anew. fresh: draws a family in the
    certificate, by default 1 for fast and 5 for the others. preset, match: objective of the per-image search
    (objective.PRESETS) and how it compares activations; "paper" is the published recipe, a network trained for every
    image, whose masks are certified as they come. repair: how a fast mask is repaired. ``backgrounds`` are made once
    a job from ``seed`` (make_backgrounds), so that the answer for an image does not depend on its batch; when given,
    they stand in for ``background``, ``reference`` and ``seed``.
    Raises MinexpError for scores that are not finite, RequestError for input that is not such a batch or a fast
    explanation without a masker.
    """
    started = time.perf_counter()
    effort = ("refined" if masker is None else "fast") if effort is None else effort
    if effort not in EFFORTS:
        raise RequestError(f"unknown effort {effort!r}; choose {', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}")
    if preset not in PRESETS:
        raise RequestError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if preset == "paper" and (masker is not None or effort != "refined"):
        raise RequestError(
            "preset paper trains a network for every image: leave the masker and the effort out"
        )
    if effort == "fast" and masker is None:
        raise RequestError("effort fast needs a masker; fit one with minexp.fit, or choose effort refined")
    judge, x, logits = bind(
        classifier,
        x,
        masker,
        predicate=predicate,
        background=background,
        reference=reference,
        seed=seed,
        micro_batch=micro_batch,
        backgrounds=backgrounds,
    )
    fresh = FRESH[effort] if fresh is None else fresh
    with classifier.frozen():
        search = Search(judge, x, logits, masker, effort, refinement, minimisation, preset, match, repair)
        found = search.find()
        again_asked = search.repair.again
        certificates = certify(search.judge, x, logits, found, per_family=fresh, again=again_asked)
        for attempt in range(1, RETRIES + 1 if preset != "paper" else 1):
            # what fresh draws contradict is searched again with more draws, and certified on draws fresh again
            again = [b for b, c in enumerate(certificates) if found.holds[b] and not c.certified]
            if not again:
                break
            index = torch.tensor(again, device=x.device)
            spent = torch.tensor([certificates[b].evaluations - 1 for b in again], device=x.device)
            judge, larger = search.enlarge(index, found.masks[index], attempt)
            larger = replace(larger, evaluations=larger.evaluations + spent)
            found = found.put(index, larger)
            new = certify(
                judge
                if effort == "minimal"
                else search.judge,  # 1-minimality is about the predicate that is named
                x[index],
                logits[index],
                larger,
                per_family=fresh,
                first=attempt * fresh,
                again=again_asked,
            )
            for b, certificate in zip(again, new, strict=True):
                certificates[b] = certificate
    milliseconds = (time.perf_counter() - started) * 1000 / max(1, len(x))
    return Explanation(found.masks[:, 0], x, judge.backgrounds.default(x), tuple(certificates), milliseconds)


def bind(
    classifier: Classifier,
    x: Tensor,
    masker: Masker | None,
    *,
    predicate: Predicate | None = None,
    background: str | tuple[float, ...] = "mean",
    reference: Tensor | None = None,
    seed: int = 0,
    micro_batch: MicroBatch | int | None = None,
    backgrounds: Backgrounds | None = None,
) -> tuple[Judge, Tensor, Tensor]:
    """The judge of a request, the images where the classifier is, and the classifier's scores of them [B,K]."""
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
    logits = judge.logits(x)
    if not logits.isfinite().all():
        raise MinexpError(
            "the classifier gives NaN or infinite scores; check its weights, and that mean and std are its own"
        )
    return judge, x, logits


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
