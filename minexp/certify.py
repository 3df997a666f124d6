"""A certificate for every mask found, measured on draws that no search has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from .backgrounds import HELD_OUT, OTHER, RANDOM, draw_numbers
from .certificate import Certificate, Measured, write_certificate
from .judge import Judge, dilate
from .predicate import Predicate
from .repair import Masks

__all__ = ["PER_FAMILY", "Certificate", "Predicate", "certify"]

PER_FAMILY = 5  # certificate draws a family


@torch.no_grad()
def certify(
    judge: Judge,
    x: Tensor,
    logits: Tensor,
    found: Masks,
    *,
    per_family: int = PER_FAMILY,
    first: int = 0,
    again: bool = False,
) -> list[Certificate]:
    """Measure the masks found for x [B,C,H,W], on fresh draws that the predicate has never seen.

    logits [B,K]: scores of the whole images; per_family: draws a family of backgrounds. A robust predicate is
    contradicted where the Wilson interval of the fresh draws lies below rho. ``first``: number of an image's first draw
    of a family, so that masks certified one after the other meet different ones. again: ask the kept pixels' scores
    once more, instead of taking those that the search saw.
    """
    target, default, mask = judge.target, judge.backgrounds.default(x), found.masks
    decision, labels = target.decide(logits), target.label(logits).tolist()
    asked = (mask, ~mask, dilate(mask)) if again else (~mask, dilate(mask))
    probe = judge.logits(torch.cat([judge.question.show(m, x, default) for m in asked]))
    probe = probe.view(len(asked), len(x), -1)
    masked, complement, wider = probe if again else (found.scores, *probe)
    families = [*RANDOM, *HELD_OUT]
    if judge.backgrounds.reference is not None:
        families.append(OTHER)
    start = draw_numbers(x)
    draws: list[tuple[str, int | Tensor]] = [
        (family, start + first + number) for family in families for number in range(per_family)
    ]
    kept = judge.kept_on(x, decision, mask, draws, "certificate").view(len(x), len(families), -1).cpu()
    spent = 1 + len(asked) + len(draws)  # f(x), the probes, the draws
    probes = (logits, masked, complement, judge.empty(x).expand_as(logits))
    confidences = [target.confidence(scores, decision).tolist() for scores in probes]
    answers = (judge.question.margin(target, scores, decision) > 0 for scores in (masked, wider))
    same_as, dilated_as = (answer.tolist() for answer in answers)
    labels_masked = target.label(masked).tolist()
    rho = judge.predicate.rho if judge.predicate.kind == "robust" else None
    rows = []
    for b, y in enumerate(labels):
        conf, conf_masked, conf_complement, conf_empty = (values[b] for values in confidences)
        measured = Measured(
            mask=mask[b, 0].cpu().numpy(),
            label=y,
            label_name=target.name(logits[b], judge.classifier.class_names),
            conf=conf,
            label_masked=labels_masked[b],
            conf_masked=conf_masked,
            conf_complement=conf_complement,
            conf_empty=conf_empty,
            kept=same_as[b],
            dilation_kept=dilated_as[b],
            holds=bool(found.holds[b]),
            threshold=float(found.threshold[b]),
            evaluations=int(found.evaluations[b]) + spent,
            kept_on=dict(zip(families, kept[b].tolist(), strict=True)),
            minimal_at=int(found.minimal_at[b]) or None,
        )
        rows.append(write_certificate(measured, judge.claim, rho))
    return rows
