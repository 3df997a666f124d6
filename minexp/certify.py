"""The predicate an explanation has to satisfy, and the certificate of what it does satisfy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backgrounds import HELD_OUT, OTHER, POOL, RANDOM, Backgrounds, draw_numbers
from .certificate import Certificate, Measured, write_certificate
from .classifier import Classifier
from .errors import RequestError
from .microbatch import MicroBatch

__all__ = ["PER_FAMILY", "Certificate", "Judge", "Predicate"]

PER_FAMILY = 5  # certificate draws a family


@dataclass(frozen=True)
class Predicate:
    """When does a mask explain a decision? A deterministic function of (image, mask) for one job's backgrounds.

    kind "top1": the classifier's target is kept on the default background, by default argmax f(e) = the image's class;
    "score": its confidence, by default p_y(e), is at least tau; "robust": kept there and on at least the share ``rho``
    of ``draws`` random backgrounds of the training families (those of which two draws differ; the mean colour is the
    default background).
    """

    kind: Literal["top1", "score", "robust"] = "robust"
    rho: float = 0.95
    draws: int = 20
    tau: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("top1", "score", "robust"):
            raise RequestError(f"unknown predicate {self.kind!r}; choose top1, score or robust")
        if not (0 < self.rho <= 1 and 0 <= self.tau <= 1 and self.draws >= 1):
            raise RequestError(
                f"predicate with rho {self.rho}, tau {self.tau}, draws {self.draws}; "
                "give 0 < rho ≤ 1, 0 ≤ tau ≤ 1, draws ≥ 1"
            )

    @property
    def misses(self) -> int:
        """How many draws may fail."""
        return math.floor((1 - self.rho) * self.draws + 1e-9)

    def stricter(self, factor: int) -> Predicate:
        """The same predicate on that many times the draws."""
        return replace(self, draws=self.draws * factor)

    def claim(self, kept: str = "top-1 kept") -> str:
        """What it asks, in words; `kept` says when the decision is kept."""
        if self.kind == "top1":
            return kept
        if self.kind == "score":
            return f"p >= {self.tau:g}"
        return f"{kept} and robust >= {self.rho:g} on {self.draws} backgrounds"

    def __str__(self) -> str:
        return self.claim()


class Judge:
    """A predicate bound to a classifier and a job's backgrounds: decides masks and writes certificates."""

    def __init__(
        self,
        classifier: Classifier,
        predicate: Predicate,
        backgrounds: Backgrounds,
        *,
        micro_batch: MicroBatch | int | None = None,
        per_family: int = PER_FAMILY,
    ) -> None:
        self.classifier, self.predicate, self.backgrounds = classifier, predicate, backgrounds
        micro_batch = classifier.micro_batch if micro_batch is None else micro_batch
        self.micro_batch = MicroBatch(micro_batch) if isinstance(micro_batch, int) else micro_batch
        self.per_family = per_family
        self.target = classifier.target
        self.claim = predicate.claim(str(self.target))
        self._empty: dict[torch.Size, Tensor] = {}

    def stricter(self, factor: int) -> Judge:
        """The same judge with that many times the draws."""
        return Judge(
            self.classifier,
            self.predicate.stricter(factor),
            self.backgrounds,
            micro_batch=self.micro_batch,
            per_family=self.per_family,
        )

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Class scores of x, a micro-batch at a time."""
        return torch.cat(list(self.micro_batch.run(self._scores, x)))

    def _scores(self, x: Tensor) -> Tensor:
        # kernels for one image round differently: it goes beside a copy, which no count of evaluations includes
        together = x if len(x) > 1 else x.repeat(2, 1, 1, 1)
        return self.classifier.logits(together)[: len(x)]

    @torch.no_grad()
    def holds(self, x: Tensor, decision: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Does the predicate hold for masks [B,1,H,W] (bool) of x? Returns ([B] bool, [B] classifier evaluations)."""
        ok = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        spent = torch.ones(len(x), dtype=torch.long, device=x.device)
        logits = self.logits(torch.where(mask, x, self.backgrounds.default(x)))
        if self.predicate.kind == "score":
            return self.target.confidence(logits, decision) >= self.predicate.tau, spent
        ok = self.target.kept(logits, decision)
        if self.predicate.kind == "top1":
            return ok, spent
        missed = torch.zeros_like(spent)
        for first in range(0, self.predicate.draws, len(RANDOM)):
            # a wave of one draw a family; images that can no longer pass are not asked again
            alive = ok.nonzero().flatten()
            if not len(alive):
                break
            numbers = range(first, min(first + len(RANDOM), self.predicate.draws))
            pairs = [(RANDOM[n % len(RANDOM)], n // len(RANDOM)) for n in numbers]
            pool = max(POOL, -(-self.predicate.draws // len(RANDOM)))  # no draw counts twice
            kept = self._kept_on(x[alive], decision[alive], mask[alive], pairs, "predicate", pool)
            missed[alive] += (~kept).sum(1)
            spent[alive] += len(pairs)
            ok &= missed <= self.predicate.misses
        return ok, spent

    def _kept_on(
        self,
        x: Tensor,
        decision: Tensor,
        mask: Tensor,
        draws: Sequence[tuple[str, int | Tensor]],
        purpose: str,
        pool: int = POOL,
    ) -> Tensor:
        """[B, len(draws)]: is the decision kept on each (family, number or numbers [B]) background?"""

        def block(part: Tensor) -> Tensor:
            filled = []
            for family, number in draws:
                picks = number[part] if isinstance(number, Tensor) else torch.full((len(part),), number)
                background = self.backgrounds.draw(
                    family, x[part], picks[:, None], purpose=purpose, pool=pool
                )[:, 0]
                filled.append(torch.where(mask[part], x[part], background))
            scores, wanted = self.logits(torch.cat(filled)), torch.cat([decision[part]] * len(draws))
            return self.target.kept(scores, wanted).view(len(draws), len(part)).T

        places = torch.arange(len(x))  # on the CPU: it indexes numbers there, too
        return torch.cat(list(self.micro_batch.run(block, places, times=len(draws))))

    def empty(self, x: Tensor) -> Tensor:
        """Scores [K] of the default background alone; one evaluation a job."""
        if x.shape[1:] not in self._empty:
            blank = self.backgrounds.default(x).expand(1, *x.shape[1:])
            self._empty[x.shape[1:]] = self.logits(blank)[0]
        return self._empty[x.shape[1:]]

    @torch.no_grad()
    def certify(
        self,
        x: Tensor,
        logits: Tensor,
        mask: Tensor,
        *,
        holds: Tensor,
        threshold: Tensor,
        evaluations: Tensor,
        first: int = 0,
    ) -> list[Certificate]:
        """Measure hard masks [B,1,H,W] of x, on fresh draws that the predicate has never seen.

        logits: scores of the whole images; holds, threshold, evaluations [B]: what led to the masks. A robust
        predicate is contradicted where the Wilson interval of the fresh draws lies below rho. ``first``: number of
        an image's first draw of a family, so that masks certified one after the other meet different ones.
        """
        target, default = self.target, self.backgrounds.default(x)
        decision, labels = target.decide(logits), target.label(logits).tolist()
        dilated = F.max_pool2d(mask.float(), 3, 1, 1).bool()
        probe = self.logits(torch.cat([torch.where(m, x, default) for m in (mask, ~mask, dilated)])).view(
            3, len(x), -1
        )
        masked, complement, wider = probe
        families = [*RANDOM, *HELD_OUT]
        if self.backgrounds.reference is not None:
            families.append(OTHER)
        start = draw_numbers(x)
        draws: list[tuple[str, int | Tensor]] = [
            (family, start + first + number) for family in families for number in range(self.per_family)
        ]
        kept = self._kept_on(x, decision, mask, draws, "certificate").view(len(x), len(families), -1).cpu()
        spent = 4 + len(draws)  # f(x), the three probes, the draws
        probes = (logits, masked, complement, self.empty(x).expand_as(logits))
        confidences = [target.confidence(scores, decision).tolist() for scores in probes]
        same_as, dilated_as = (target.kept(scores, decision).tolist() for scores in (masked, wider))
        labels_masked = target.label(masked).tolist()
        rho = self.predicate.rho if self.predicate.kind == "robust" else None
        rows = []
        for b, y in enumerate(labels):
            conf, conf_masked, conf_complement, conf_empty = (values[b] for values in confidences)
            measured = Measured(
                mask=mask[b, 0].cpu().numpy(),
                label=y,
                label_name=target.name(logits[b], self.classifier.class_names),
                conf=conf,
                label_masked=labels_masked[b],
                conf_masked=conf_masked,
                conf_complement=conf_complement,
                conf_empty=conf_empty,
                kept=same_as[b],
                dilation_kept=dilated_as[b],
                holds=bool(holds[b]),
                threshold=float(threshold[b]),
                evaluations=int(evaluations[b]) + spent,
                kept_on=dict(zip(families, kept[b].tolist(), strict=True)),
            )
            rows.append(write_certificate(measured, self.claim, rho))
        return rows
