"""The training objective as named terms, and its presets.

Terms and symbols follow Suhail, Anand and Sethi (arXiv 2509.23051, 2509.25686). All are means over the
batch, and the spatial ones means over pixels, so that weights do not depend on resolution or batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import KLTarget, activation_kl
from .classifier import Classifier
from .errors import RequestError

Match = Literal["kl", "mse", "cosine", "off"]


@dataclass(frozen=True)
class Objective:
    """Weights of the terms. ``dual`` makes the area's weight a dual variable that starts at ``area``.

    match: how activations are compared (KL of softmaxed features; MSE; 1 − cosine; off).
    layer_weights: α_l, one a tap, by default 1, 2, 4 … normalised to sum 1.
    soft: share of the steps trained on probabilities before the mask is thresholded straight-through.
    target, soft_target: the share of images whose decision should hold under random backgrounds (dual only), for
    thresholded and for soft masks. The soft one is lower: masks have to concentrate first, and grow robust then.
    """

    act: float = 0.1
    ce: float = 2.0
    kl: float = 0.5
    area: float = 1.0
    crisp: float = 0.5
    tv: float = 4.0
    rob: float = 4.0
    match: Match = "kl"
    layer_weights: tuple[float, ...] | None = None
    axis: str = "all"
    dual: bool = True
    target: float = 0.96
    soft_target: float = 0.9
    dual_rate: float = 0.1
    dual_range: tuple[float, float] = (0.05, 40.0)
    soft: float = 0.6


PRESETS: dict[str, Objective] = {
    "default": Objective(),
    # the plain weighted sum: nothing adapts, the area weight is what it says
    "kl": Objective(dual=False, area=15.0),
    # the published weights for a ResNet-18, thresholded from the first step on
    "paper": Objective(
        act=10, ce=15, kl=5, area=100, crisp=1, tv=500, rob=100, match="kl", dual=False, soft=0.0
    ),
}


def preset(name: str) -> Objective:
    """The named preset."""
    if name not in PRESETS:
        raise RequestError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def layer_weights(objective: Objective, layers: int) -> list[float]:
    """α_l for that many taps: deeper layers count more, the sum is 1."""
    if objective.layer_weights is not None:
        if len(objective.layer_weights) != layers:
            raise RequestError(
                f"{len(objective.layer_weights)} layer weights for {layers} taps; give one for each"
            )
        return list(objective.layer_weights)
    total = 2.0**layers - 1
    return [2.0**index / total for index in range(layers)]


@dataclass(frozen=True)
class Target:
    """What the explanation has to reproduce, computed once from the whole image: decision, scores, activations."""

    decision: Tensor
    logits: Tensor
    features: KLTarget | list[Tensor]


@torch.no_grad()
def make_target(classifier: Classifier, x: Tensor, objective: Objective, *, reused: bool) -> Target:
    """Target of x [B,C,H,W]. ``reused`` caches the softmaxed activations, which pays from the second step on."""
    logits, features = classifier.features(x)
    if objective.match == "off" or objective.act == 0:
        features = []
    cached = (
        KLTarget(features, axis=objective.axis) if reused and objective.match == "kl" and features else None
    )
    return Target(classifier.target.decide(logits), logits, features if cached is None else cached)


def activation_match(objective: Objective, target: Target, features: Sequence[Tensor]) -> Tensor:
    """Σ_l α_l D(φ_l(x), φ_l(e)) for every image: [B]."""
    weights = layer_weights(objective, len(features))
    if objective.match == "kl":
        return activation_kl(target.features, list(features), weights=weights, axis=objective.axis)
    assert isinstance(target.features, list)
    total = torch.zeros(len(features[0]), device=features[0].device)
    for weight, a, b in zip(weights, target.features, features, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        match = ((a - b) ** 2).mean(1) if objective.match == "mse" else 1 - F.cosine_similarity(a, b, dim=1)
        total = total + weight * match
    return total


def total_variation(mask: Tensor) -> Tensor:
    """Mean absolute difference of 4-neighbours of a mask [B,1,H,W], per image: [B]."""
    down = (
        (mask[:, :, 1:] - mask[:, :, :-1]).abs().mean((1, 2, 3))
        if mask.shape[2] > 1
        else mask.sum((1, 2, 3)) * 0
    )
    right = (mask[..., 1:] - mask[..., :-1]).abs().mean((1, 2, 3)) if mask.shape[3] > 1 else down * 0
    return down + right


@dataclass(frozen=True)
class Terms:
    """Every term per image [B], and whether the decision held under the default and the random background."""

    values: Mapping[str, Tensor]
    kept: Tensor
    robust: Tensor

    def total(self, objective: Objective, area_weight: float | Tensor) -> Tensor:
        """The weighted sum, averaged over the batch."""
        weights: dict[str, float | Tensor] = {
            name: getattr(objective, name) for name in ("act", "ce", "kl", "crisp", "tv", "rob")
        }
        weights["area"] = area_weight
        return sum((weights[n] * v for n, v in self.values.items()), torch.zeros(())).mean()


def evaluate_terms(
    objective: Objective,
    classifier: Classifier,
    x: Tensor,
    p: Tensor,
    mask: Tensor,
    target: Target,
    background: Tensor,
    random_background: Tensor,
) -> Terms:
    """All terms for images x [B,C,H,W], probabilities p and the mask (soft or straight-through) [B,1,H,W].

    The explanation on the default and on the random background go through the classifier as one batch.
    """
    explained = mask * x + (1 - mask) * background
    shifted = mask * x + (1 - mask) * random_background
    b = len(x)
    both, features = classifier.features(torch.cat([explained, shifted]))
    logits, random_logits = both[:b], both[b:]
    values = {
        **_answer(objective, classifier, target, logits, [layer[:b] for layer in features]),
        "rob": classifier.target.loss(random_logits, target.decision),
        **_shape(p, mask),
    }
    with torch.no_grad():
        kept, robust = (classifier.target.kept(scores, target.decision) for scores in (logits, random_logits))
    return Terms(values, kept, robust)


def evaluate_on(
    objective: Objective,
    classifier: Classifier,
    x: Tensor,
    p: Tensor,
    mask: Tensor,
    target: Target,
    background: Tensor,
    *,
    random: bool,
) -> Terms:
    """The terms that are about one background, a random one or the default one, as evaluate_terms has them."""
    shown = mask * x + (1 - mask) * background
    if random:
        logits = classifier.logits(shown)
        answer = {"rob": classifier.target.loss(logits, target.decision)}
    else:
        logits, features = classifier.features(shown)
        answer = _answer(objective, classifier, target, logits, features)
    with torch.no_grad():
        kept = classifier.target.kept(logits, target.decision)
    return Terms({**answer, **_shape(p, mask)}, kept, kept)


def _answer(
    objective: Objective, classifier: Classifier, target: Target, logits: Tensor, features: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The terms about the answer to the explanation on the default background."""
    values = {
        "ce": classifier.target.loss(logits, target.decision),
        "kl": classifier.target.divergence(target.logits, logits),
    }
    if objective.match != "off" and objective.act:
        values["act"] = activation_match(objective, target, features)
    return values


def _shape(p: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The terms about the mask alone."""
    return {
        "area": mask.mean((1, 2, 3)),
        "crisp": (p - p * p).mean((1, 2, 3)),
        "tv": total_variation(mask),
    }


class AreaDual:
    """The area's weight as a dual variable of "the decision holds": raised while it does, lowered while it fails."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.value = objective.area

    def update(self, held: float, *, hard: bool = True) -> None:
        """One step from the share of images [0, 1] whose decision held, with thresholded or soft masks."""
        if not self.objective.dual:
            return
        low, high = self.objective.dual_range
        target = self.objective.target if hard else self.objective.soft_target
        slack = held - target
        # one failing image in a batch weighs as much as many that hold: scale both sides to a unit step
        slack = slack / (1 - target) if slack > 0 else slack / target * 4
        self.value = min(
            high, max(low, self.value * (1 + self.objective.dual_rate * max(-1.0, min(1.0, slack))))
        )
