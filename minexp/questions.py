"""Other questions about a decision: is there more than one reason, why not another class, what must be there?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .certificate import Certificate
from .certify import certify
from .classifier import Classifier
from .errors import MinexpError, RequestError
from .explanation import Explanation, bind, explain
from .judge import Judge
from .masker import Masker
from .minimise import Minimisation, minimise
from .predicate import Contrast, Necessary
from .repair import SPARING, Masks, local_order, threshold_masks
from .targets import Target

NOT_ENOUGH = "the pixels that no other explanation uses are not enough"
FROM_ALL = Minimisation(parts=8, levels=3)  # how a mask of everything is reduced: on coarse cells first


@dataclass(frozen=True)
class Removal:
    """Necessary sets: without the pixels of masks bool [B,H,W] the class is lost, and no cell of them could stay.

    flips [B]: whether any removal takes the class away (False: an empty image has it, too); becomes [B]: the class
    that the rest of the image is given; minimal_at [B]: the cell's side in pixels, 0 where unproven; evaluations [B],
    the certificates' included. Certificates are about the removal: kept and robust say that the class went with it.
    """

    masks: Tensor
    flips: Tensor
    becomes: Tensor
    minimal_at: Tensor
    evaluations: Tensor
    certificates: tuple[Certificate, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row an image with the store's columns, but for where the image came from."""
        masks = self.masks.cpu().numpy()
        return [c.row(mask, 0.0) for c, mask in zip(self.certificates, masks, strict=True)]


def multiple(
    classifier: Classifier, x: Tensor, masker: Masker | None = None, *, count: int = 2, **options: Any
) -> list[Explanation]:
    """Up to ``count`` disjoint sufficient explanations of each image of x [B,C,H,W], the usual one first.

    Each further one is reduced, to 1-minimality, from all pixels that no earlier one uses. Where these are not enough,
    its mask is empty and its certificate says so. options: of `explain`.
    """
    if count < 1:
        raise RequestError(f"{count} explanations; give at least 1")
    found = [explain(classifier, x, masker, **options)]
    judge, x, logits = bind(classifier, x, masker, **_known(options))
    judge = judge.stricter(2)
    label, used = judge.target.decide(logits), found[0].masks.clone()
    open_ = torch.tensor([c.certified for c in found[0].certificates], device=x.device)
    settings = options.get("minimisation") or Minimisation()
    settings = replace(settings, parts=FROM_ALL.parts, levels=max(settings.levels, FROM_ALL.levels))
    with classifier.frozen():
        for _ in range(count - 1):
            rest = ~used[:, None]
            verdict = judge.holds(x, label, rest)
            holds = verdict.ok & open_
            start = _start(rest, verdict.scores, holds, verdict.spent)
            less = minimise(judge, x, label, start, settings)
            less = replace(less, masks=less.masks & holds[:, None, None, None])
            certificates = [
                c if h else replace(c, certified=False, reason=NOT_ENOUGH)
                for c, h in zip(certify(judge, x, logits, less), holds.tolist(), strict=True)
            ]
            found.append(replace(found[0], masks=less.masks[:, 0], certificates=tuple(certificates)))
            used, open_ = used | less.masks[:, 0], holds
    return found


def contrast(
    classifier: Classifier, x: Tensor, rival: int, masker: Masker | None = None, **options: Any
) -> Explanation:
    """Why the class, and not ``rival``? The fewest pixels on which the class stays ahead of that one.

    1-minimal, as `explain` with effort minimal; the certificates' kept and robust are those of this question.
    RequestError where ``rival`` is no class, or classes are not what is explained; MinexpError where it is the class of
    an image itself.
    """
    if classifier.target.key() != Target().key():
        raise RequestError(
            f"a contrast is between classes, and the target is {classifier.target}; leave it out"
        )
    if not 0 <= rival < classifier.num_classes:
        raise RequestError(
            f"class {rival} of {classifier.num_classes}; give 0 to {classifier.num_classes - 1}"
        )
    judge, x, logits = bind(classifier, x, masker, **_known(options))
    label = judge.target.decide(logits)
    if (label == rival).any():
        raise MinexpError(
            f"an image is classified as {classifier.class_names[rival]} itself; ask about another class"
        )
    judge = judge.about(Contrast(rival)).stricter(2)
    found = _reduced(judge, x, label, masker, options.get("minimisation"))
    certificates = certify(judge, x, logits, found)
    return Explanation(found.masks[:, 0], x, judge.backgrounds.default(x), tuple(certificates), 0.0)


def necessary(classifier: Classifier, x: Tensor, masker: Masker | None = None, **options: Any) -> Removal:
    """What must be there? The fewest pixels whose removal takes the class away, on the predicate's backgrounds."""
    judge, x, logits = bind(classifier, x, masker, **_known(options))
    judge = judge.about(Necessary())
    found = _reduced(judge, x, judge.target.decide(logits), masker, options.get("minimisation"))
    found = replace(found, masks=found.masks & found.holds[:, None, None, None])
    certificates = certify(judge, x, logits, found)
    evaluations = torch.tensor([c.evaluations for c in certificates])
    return Removal(
        found.masks[:, 0],
        found.holds,
        found.scores.argmax(1),
        found.minimal_at,
        evaluations,
        tuple(certificates),
    )


def _reduced(
    judge: Judge, x: Tensor, label: Tensor, masker: Masker | None, settings: Minimisation | None
) -> Masks:
    """1-minimal masks: from a level set of the masker's output, or from everything."""
    with judge.classifier.frozen():
        if masker is not None:
            start = threshold_masks(judge, x, label, local_order(masker.probabilities(x)), settings=SPARING)
        else:
            whole = torch.ones_like(x[:, :1], dtype=torch.bool)
            verdict = judge.holds(x, label, whole)
            start = _start(whole, verdict.scores, verdict.ok, verdict.spent)
        return minimise(judge, x, label, start, settings or FROM_ALL)


def _start(masks: Tensor, scores: Tensor, holds: Tensor, spent: Tensor) -> Masks:
    return Masks(
        masks, holds, torch.zeros(len(masks), device=masks.device), spent, scores, torch.zeros_like(spent)
    )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    names = ("predicate", "background", "reference", "seed", "micro_batch", "backgrounds")
    return {name: options[name] for name in names if name in options}
