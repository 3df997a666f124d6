"""A predicate bound to a classifier and a job's backgrounds: it decides masks, and counts what that takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from .backgrounds import POOL, RANDOM, Backgrounds
from .classifier import Classifier
from .microbatch import MicroBatch
from .predicate import Predicate, Question, Sufficient

WAVE = 4  # checks of one image asked at once: one draw a family
EXACT = 4  # images; kernels for smaller batches round gradients differently
GRADIENT = 2  # evaluations that one gradient counts as: the pass forward and as much again backward


def dilate(mask: Tensor) -> Tensor:
    """Masks [B,1,H,W] (bool) grown by one pixel on all sides."""
    return F.max_pool2d(mask.float(), 3, 1, 1).bool()


def repeated(x: Tensor) -> Tensor:
    """x [B,...] as often as gives EXACT images or more, where it has fewer: no count of evaluations includes these."""
    return x if len(x) >= EXACT else x.repeat(-(-EXACT // len(x)), *(1,) * (x.dim() - 1))


@dataclass(frozen=True)
class Verdict:
    """Of masks of a batch: does the predicate hold [B], and classifier evaluations spent [B].

    scores [B,K]: the classifier's, of what the mask shows on the default background, where the predicate holds.
    margins [B,D]: of each of the predicate's checks, positive where it passed; NaN where it was not asked.
    """

    ok: Tensor
    spent: Tensor
    scores: Tensor
    margins: Tensor

    def of(self, index: Tensor) -> Verdict:
        """About the masks numbered ``index`` alone."""
        return Verdict(self.ok[index], self.spent[index], self.scores[index], self.margins[index])


def harder(margins: Tensor, before: Tensor | None = None) -> Tensor:
    """Hints for the next mask of the same images: checks last passed by less, or failed, are asked first. [B,D]"""
    return torch.where(margins.isnan(), torch.zeros_like(margins) if before is None else before, -margins)


class Judge:
    """A predicate bound to a classifier and a job's backgrounds: decides masks."""

    def __init__(
        self,
        classifier: Classifier,
        predicate: Predicate,
        backgrounds: Backgrounds,
        *,
        question: Question | None = None,
        micro_batch: MicroBatch | int | None = None,
    ) -> None:
        self.classifier, self.predicate, self.backgrounds = classifier, predicate, backgrounds
        self.question: Question = Sufficient() if question is None else question
        micro_batch = classifier.micro_batch if micro_batch is None else micro_batch
        self.micro_batch = MicroBatch(micro_batch) if isinstance(micro_batch, int) else micro_batch
        self.target = classifier.target
        self._empty: dict[torch.Size, Tensor] = {}

    @property
    def claim(self) -> str:
        """What the predicate asks, in words."""
        return self.predicate.claim(self.question.claim(str(self.target)))

    def stricter(self, factor: int) -> Judge:
        """The same judge with that many times the draws; where masks may pass early, what it accepts passes here."""
        other = copy.copy(self)  # which shares what is known of the empty image
        other.predicate = self.predicate.stricter(factor)
        return other

    def cleaner(self) -> Judge:
        """The same judge, for which one miss among the early draws is enough; what it accepts passes here."""
        other = copy.copy(self)
        other.predicate = replace(self.predicate, clean=True)
        return other

    def about(self, question: Question) -> Judge:
        """The same judge, asking another question."""
        other = copy.copy(self)
        other.question = question
        return other

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Class scores of x, a micro-batch at a time."""
        return torch.cat(list(self.micro_batch.run(self._scores, x)))

    def _scores(self, x: Tensor) -> Tensor:
        # kernels for one image round differently: it goes beside a copy, which no count of evaluations includes
        together = x if len(x) > 1 else x.repeat(2, 1, 1, 1)
        return self.classifier.logits(together)[: len(x)]

    @property
    def checks(self) -> int:
        """D, the number of checks: the default background, dilated on it, the draws in their order."""
        draws = self.predicate.repeats * self.predicate.draws if self.predicate.kind == "robust" else 0
        return 1 + self.predicate.dilated + draws

    def early(self) -> Tensor:
        """Which checks [D] a mask without a miss is held to."""
        plain, predicate = 1 + self.predicate.dilated, self.predicate
        number = torch.arange(self.checks, device=self.classifier.device) - plain
        return (number < 0) | (number % predicate.draws < predicate.early)

    def holds(
        self,
        x: Tensor,
        decision: Tensor,
        mask: Tensor,
        *,
        hints: Tensor | None = None,
        known: Verdict | None = None,
    ) -> Verdict:
        """Does the predicate hold for masks [B,1,H,W] (bool) of x?

        Checks are asked in waves, and an image whose verdict is known is not asked again. hints [B,D]: checks with
        high ones are asked first, which changes no verdict but may find it sooner. known: what has been asked of these
        masks is not asked, nor counted, again.
        """
        return self._ask(x, decision, mask, self._useful, hints, known)

    def passes(self, x: Tensor, decision: Tensor, mask: Tensor, checks: Tensor, hints: Tensor) -> Verdict:
        """Do masks [B,1,H,W] of x pass all of these checks [B,D]? Cheaper than the predicate, and not the same."""

        def useful(margins: Tensor) -> tuple[Tensor, Tensor]:
            open_, bad = checks & margins.isnan(), (checks & (margins <= 0)).any(1)
            return open_ & ~bad[:, None], ~open_.any(1) & ~bad

        return self._ask(x, decision, mask, useful, hints)

    @torch.no_grad()
    def _ask(
        self,
        x: Tensor,
        decision: Tensor,
        mask: Tensor,
        useful: Callable[[Tensor], tuple[Tensor, Tensor]],
        hints: Tensor | None,
        known: Verdict | None = None,
    ) -> Verdict:
        margins = torch.full((len(x), self.checks), torch.nan, device=x.device)
        scores: Tensor | None = None
        if known is not None:
            margins, scores = known.margins.clone(), known.scores.clone()
        before = (~margins.isnan()).sum(1)
        # without hints: the default background alone, on which many masks fail, then wave by wave
        waves = chain((1,) if hints is None else (1, 1), repeat(WAVE))
        urgency = -torch.arange(self.checks, device=x.device).expand(margins.shape).float()
        if hints is not None:
            urgency = hints + 1e-6 * urgency
        while True:
            wanted, ok = useful(margins)
            if not wanted.any():
                break
            most = min(next(waves), self.checks)
            ranked = urgency.masked_fill(~wanted, -torch.inf).topk(most, 1).indices
            asked = torch.zeros_like(wanted).scatter_(1, ranked, True) & wanted
            image, check = asked.nonzero(as_tuple=True)
            found = self._check(x, mask, image, check)
            margins[image, check] = self._margin(found, decision[image])
            if scores is None:
                scores = found.new_zeros(len(x), found.shape[1])
            plain = check == 0
            scores[image[plain]] = found[plain]
        assert scores is not None
        return Verdict(ok, (~margins.isnan()).sum(1) - before, scores, margins)

    def _useful(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Which checks [B,D] can still change a verdict, and which images [B] have passed by what was asked."""
        predicate, plain = self.predicate, 1 + self.predicate.dilated
        asked, passed = ~margins.isnan(), margins > 0
        useful = ~asked
        bad, good = (asked & ~passed)[:, :plain].any(1), passed[:, :plain].all(1)
        if predicate.kind == "robust":
            shape = (predicate.repeats, predicate.draws)
            asked, passed = (t[:, plain:].unflatten(1, shape) for t in (asked, passed))
            missed = asked & ~passed
            misses, early_missed = missed.sum(2), missed[..., : predicate.early].any(2)
            clean = passed[..., : predicate.early].all(2)
            enough = asked.all(2) & (misses <= predicate.misses)
            failed = early_missed & (misses > predicate.misses)  # which one is, where the predicate is clean
            asks = ~asked & ~(clean | enough | failed)[..., None]
            asks[..., predicate.early :] &= early_missed[..., None]
            useful[:, plain:] = asks.flatten(1)
            bad |= failed.any(1)
            good &= (clean | enough).all(1)
        return useful & ~bad[:, None], good & ~bad

    def _check(self, x: Tensor, mask: Tensor, image: Tensor, check: Tensor) -> Tensor:
        """Scores [N,K] of the checks numbered ``check`` [N] for the images numbered ``image`` [N]."""
        shown: list[Tensor] = []
        places: list[Tensor] = []
        scores: list[Tensor] = []
        for number in check.unique().tolist():
            place = (check == number).nonzero().flatten()
            index = image[place]
            # most often all images are asked alike: then nothing of them is copied
            part, kept = (x, mask) if len(index) == len(x) else (x[index], mask[index])
            shown.append(self._shown(part, kept, number))
            places.append(place)
            if sum(map(len, shown)) >= self.micro_batch.size:
                scores.append(self.logits(torch.cat(shown)))
                shown = []
        if shown:
            scores.append(self.logits(torch.cat(shown)))
        found = torch.cat(scores)
        return torch.empty_like(found).index_copy_(0, torch.cat(places), found)

    def _shown(self, x: Tensor, mask: Tensor, check: int) -> Tensor:
        """What the classifier is shown of x [B,C,H,W] in one check."""
        widened = 0 < check <= self.predicate.dilated
        return self.question.show(dilate(mask) if widened else mask, x, self._background(x, check))

    def _background(self, x: Tensor, check: int) -> Tensor:
        """What one check puts behind the masks of x [B,C,H,W]; of one image, where it is the same for all."""
        plain = 1 + self.predicate.dilated
        if check < plain:
            return self.backgrounds.default(x)
        family, number = RANDOM[(check - plain) % len(RANDOM)], (check - plain) // len(RANDOM)
        pool = max(
            POOL, -(-self.predicate.repeats * self.predicate.draws // len(RANDOM))
        )  # no draw counts twice
        like = x[:1] if self.backgrounds.shared(family) else x
        picks = torch.full((len(like), 1), number)
        return self.backgrounds.draw(family, like, picks, purpose="predicate", pool=pool)[:, 0]

    def backgrounds_of(self, x: Tensor, checks: Tensor) -> Tensor:
        """[B,C,H,W]: what check number ``checks`` [B] puts behind the mask of each image of x [B,C,H,W]."""
        behind = torch.empty_like(x)
        for number in checks.unique().tolist():
            place = (checks == number).nonzero().flatten()
            behind[place] = self._background(x[place], number).to(x.dtype)
        return behind

    def slope(self, x: Tensor, decision: Tensor, mask: Tensor, background: Tensor) -> Tensor:
        """What showing more of each pixel of x [B,C,H,W] adds to the decision's score, to first order: [B,1,H,W].

        mask [B,1,H,W]: how much of each is shown now, in [0, 1]. It counts as GRADIENT evaluations an image.
        """
        with torch.enable_grad():
            value = mask.clone().requires_grad_(True)
            shown = value * x + (1 - value) * background
            scores = self.classifier.logits(repeated(shown))[: len(x)]
            (slope,) = torch.autograd.grad(-self.target.loss(scores, decision).sum(), value)
        return slope

    def _margin(self, scores: Tensor, decision: Tensor) -> Tensor:
        """[N], positive where a check is passed."""
        if self.predicate.kind == "score":
            reached = self.target.confidence(scores, decision) >= self.predicate.tau
            return torch.where(reached, 1.0, -1.0)
        return self.question.margin(self.target, scores, decision)

    @torch.no_grad()
    def kept_on(
        self,
        x: Tensor,
        decision: Tensor,
        mask: Tensor,
        draws: Sequence[tuple[str, int | Tensor]],
        purpose: str,
        pool: int = POOL,
    ) -> Tensor:
        """[B, len(draws)]: is the question answered on each (family, number or numbers [B]) background?"""

        def block(part: Tensor) -> Tensor:
            filled = []
            for family, number in draws:
                picks = number[part] if isinstance(number, Tensor) else torch.full((len(part),), number)
                background = self.backgrounds.draw(
                    family, x[part], picks[:, None], purpose=purpose, pool=pool
                )[:, 0]
                filled.append(self.question.show(mask[part], x[part], background))
            scores, wanted = self.logits(torch.cat(filled)), torch.cat([decision[part]] * len(draws))
            return (self.question.margin(self.target, scores, wanted) > 0).view(len(draws), len(part)).T

        places = torch.arange(len(x))  # on the CPU: it indexes numbers there, too
        return torch.cat(list(self.micro_batch.run(block, places, times=len(draws))))

    def empty(self, x: Tensor) -> Tensor:
        """Scores [K] of the default background alone; one evaluation a job."""
        if x.shape[1:] not in self._empty:
            blank = self.backgrounds.default(x).expand(1, *x.shape[1:])
            self._empty[x.shape[1:]] = self.logits(blank)[0]
        return self._empty[x.shape[1:]]
