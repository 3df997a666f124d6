"""What of a model's output is explained, and when a masked image counts as keeping it.

A target turns the model's output into scores [B,K], and the scores of whole images into their *decisions*: a tensor,
one row an image, that the scores of masked images are then compared with. Everything downstream asks the target alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import RequestError, near
from .tracing import first_tensor

TEMPERATURE = 2.0  # of the output KL
KEEP = 0.9  # share of the whole image's score that has to be left


@dataclass(frozen=True, eq=False)
class Target:
    """The class with the highest score: kept where it has the highest score still."""

    outputs: ClassVar[int] = 2  # the fewest scores an image that it makes sense for

    @property
    def of_classes(self) -> bool:
        """Are the scores the model's own, one a class?"""
        return True

    def scores(self, output: Any) -> Tensor | None:
        """The scores [B,K] in whatever the model returned; None where there are none."""
        scores = getattr(output, "logits", None)
        if not isinstance(scores, Tensor):
            scores = output.get("logits") if isinstance(output, Mapping) else None
        return scores if isinstance(scores, Tensor) else first_tensor(output)

    def bound(self, class_names: Sequence[str]) -> Target:
        """The same, with a class given by name turned into its number."""
        return self

    def key(self) -> str:
        """Text that is the same for the same target, in every process."""
        settings = (f"{field.name}={_stable(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({', '.join(settings)})"

    def decide(self, scores: Tensor) -> Tensor:
        """The decisions [B,...] of whole images from their scores [B,K]."""
        return scores.argmax(1)

    def kept(self, scores: Tensor, decision: Tensor) -> Tensor:
        """Do these scores [B,K] keep the decision? [B] bool."""
        return scores.argmax(1) == decision

    def confidence(self, scores: Tensor, decision: Tensor) -> Tensor:
        """How far the decision is held up, [B]: the probability of the class."""
        return scores.softmax(1).gather(1, decision[:, None])[:, 0]

    def loss(self, scores: Tensor, decision: Tensor) -> Tensor:
        """A differentiable loss [B] that falls as the decision is kept: the cross-entropy."""
        return F.cross_entropy(scores, decision, reduction="none")

    def divergence(self, whole: Tensor, scores: Tensor) -> Tensor:
        """How far scores are from those of the whole images, [B]: the KL divergence at temperature 2."""
        return output_kl(whole, scores)

    def label(self, scores: Tensor) -> Tensor:
        """Number of the class that scores [B,K] are for, [B]."""
        return scores.argmax(1)

    def name(self, scores: Tensor, class_names: Sequence[str]) -> str:
        """What is explained of one image with scores [K], in words."""
        return class_names[int(self.label(scores[None])[0])]

    def __str__(self) -> str:
        return "top-1 kept"


class Binary(Target):
    """One output whose sign is the decision, as of a network trained with a sigmoid: classes 0 (negative) and 1."""

    def scores(self, output: Any) -> Tensor | None:
        score = super().scores(output)
        if score is None or score.ndim > 2 or (score.ndim == 2 and score.shape[1] != 1):
            raise RequestError(
                "target binary is for one output an image; leave --target out for several classes"
            )
        score = score.reshape(-1, 1)
        return torch.cat([torch.zeros_like(score), score], 1)

    def __str__(self) -> str:
        return "sign kept"


@dataclass(frozen=True, eq=False)
class MultiLabel(Target):
    """Independent labels with a sigmoid each: those at or above ``threshold`` have to stay there.

    Where there is none, the highest has to keep the share ``keep`` of its probability. A decision is the probability
    [B,K] that each label has to reach, 0 for those that do not matter.
    """

    threshold: float = 0.5
    keep: float = KEEP
    outputs: ClassVar[int] = 1

    def decide(self, scores: Tensor) -> Tensor:
        p = scores.sigmoid()
        given = p >= self.threshold
        highest = F.one_hot(p.argmax(1), p.shape[1]).bool()
        none = ~given.any(1, keepdim=True)
        return torch.where(given, self.threshold, 0.0).to(p) + torch.where(none & highest, self.keep * p, 0.0)

    def kept(self, scores: Tensor, decision: Tensor) -> Tensor:
        return (scores.sigmoid() >= decision).all(1)

    def confidence(self, scores: Tensor, decision: Tensor) -> Tensor:
        """Probability of the least certain of the labels that have to stay."""
        return torch.where(decision > 0, scores.sigmoid(), 1.0).amin(1)

    def loss(self, scores: Tensor, decision: Tensor) -> Tensor:
        """Mean binary cross-entropy of the labels that have to stay."""
        given = (decision > 0).to(scores)
        return (F.softplus(-scores) * given).sum(1) / given.sum(1).clamp_min(1)

    def divergence(self, whole: Tensor, scores: Tensor) -> Tensor:
        """Sum over the labels of the KL of their two-way distributions."""
        p = whole.sigmoid()
        return (
            p * (F.softplus(-scores) - F.softplus(-whole))
            + (1 - p) * (F.softplus(scores) - F.softplus(whole))
        ).sum(1)

    def name(self, scores: Tensor, class_names: Sequence[str]) -> str:
        decision = self.decide(scores[None])[0]
        return ", ".join(
            name for name, floor in zip(class_names, decision.tolist(), strict=True) if floor > 0
        )

    def __str__(self) -> str:
        return f"labels kept at {self.threshold:g}"


@dataclass(frozen=True, eq=False)
class Score(Target):
    """One number an image, which has to keep the share ``keep`` of what it is on the whole image.

    A decision is that number, [B]: below zero, it may fall by the share 1 − keep of its magnitude.
    function: the number(s) [B] from the model's output; without it, column ``column`` of the scores.
    """

    column: int = 0
    keep: float = KEEP
    function: Callable[[Any], Tensor] | None = None
    title: str = "score"
    outputs: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RequestError(
                f"keep is {self.keep}; give the share of the score to keep, above 0 and at most 1"
            )

    def scores(self, output: Any) -> Tensor | None:
        if self.function is None:
            scores = super().scores(output)
            return scores if scores is None or scores.ndim > 1 else scores[:, None]
        score = self.function(output)
        if not isinstance(score, Tensor) or score.ndim != 1:
            raise RequestError(f"the target {self.title} has to return one number an image, a tensor [B]")
        return score[:, None]

    @property
    def of_classes(self) -> bool:
        return self.function is None

    def bound(self, class_names: Sequence[str]) -> Target:
        if not 0 <= self.column < len(class_names):
            raise RequestError(f"output {self.column} of a model with {len(class_names)}; they count from 0")
        return self

    def number(self, scores: Tensor) -> Tensor:
        """The number [B] in scores [B,K]."""
        return scores[:, self.column]

    def slack(self, decision: Tensor) -> Tensor:
        """By how much the number may fall, [B]."""
        return (1 - self.keep) * decision.abs()

    def decide(self, scores: Tensor) -> Tensor:
        return self.number(scores)

    def kept(self, scores: Tensor, decision: Tensor) -> Tensor:
        return self.number(scores) >= decision - self.slack(decision)

    def confidence(self, scores: Tensor, decision: Tensor) -> Tensor:
        """The number itself."""
        return self.number(scores)

    def loss(self, scores: Tensor, decision: Tensor) -> Tensor:
        """By how much the number fell, 1 where it may fall no further."""
        return F.relu(decision - self.number(scores)) / self.slack(decision).clamp_min(1e-6)

    def divergence(self, whole: Tensor, scores: Tensor) -> Tensor:
        return torch.zeros(len(scores), device=scores.device)

    def label(self, scores: Tensor) -> Tensor:
        return torch.full((len(scores),), self.column, device=scores.device)

    def name(self, scores: Tensor, class_names: Sequence[str]) -> str:
        return self.title

    def __str__(self) -> str:
        return f"{self.title} >= {self.keep:g} of the image's"


@dataclass(frozen=True, eq=False)
class ChosenClass(Score):
    """The probability of one class, whether it is the image's highest or not. sigmoid: of independent labels."""

    chosen: int | str = 0
    sigmoid: bool = False

    def bound(self, class_names: Sequence[str]) -> Target:
        column, names = self.chosen, list(class_names)
        if isinstance(column, str) and column not in names and column.isdecimal():
            column = int(column)
        if isinstance(column, str):
            if column not in names:
                raise RequestError(f"no class '{column}' to explain; near: {near(column, names)}")
            column = names.index(column)
        chosen = replace(self, column=column, chosen=column)
        Score.bound(chosen, names)
        return replace(chosen, title=f"p({names[column]})")

    def number(self, scores: Tensor) -> Tensor:
        return (scores.sigmoid() if self.sigmoid else scores.softmax(1))[:, self.column]

    def loss(self, scores: Tensor, decision: Tensor) -> Tensor:
        """The cross-entropy of the class."""
        column = scores[:, self.column]
        return F.softplus(-column) if self.sigmoid else scores.logsumexp(1) - column

    def divergence(self, whole: Tensor, scores: Tensor) -> Tensor:
        if self.sigmoid:
            pick = slice(self.column, self.column + 1)
            return MultiLabel().divergence(whole[:, pick], scores[:, pick])
        return output_kl(whole, scores)

    def name(self, scores: Tensor, class_names: Sequence[str]) -> str:
        return class_names[self.column]


@dataclass(frozen=True, eq=False)
class Value(Score):
    """One output of a regression, which has to stay within ``tolerance`` of its value on the whole image.

    tolerance: in the output's units; by default a tenth of the value.
    """

    tolerance: float | None = None
    title: str = "value"

    def slack(self, decision: Tensor) -> Tensor:
        return (
            super().slack(decision) if self.tolerance is None else torch.full_like(decision, self.tolerance)
        )

    def kept(self, scores: Tensor, decision: Tensor) -> Tensor:
        return (self.number(scores) - decision).abs() <= self.slack(decision)

    def loss(self, scores: Tensor, decision: Tensor) -> Tensor:
        """The distance to the value, 1 where it may grow no further."""
        return (self.number(scores) - decision).abs() / self.slack(decision).clamp_min(1e-6)

    def __str__(self) -> str:
        share = f"{1 - self.keep:.0%} of it" if self.tolerance is None else f"{self.tolerance:g}"
        return f"{self.title} within {share}"


def similarity(references: Tensor, *, keep: float = KEEP, scale: float = 100.0) -> Target:
    """Cosine similarity of the model's image embedding [B,D] to reference embeddings, as of a text (CLIP's score).

    references: one embedding [D], whose similarity has to keep the share ``keep``; or several [K,D], among which the
    most similar has to stay so, with probabilities softmax(scale · cosine).
    """
    if references.ndim not in (1, 2) or not references.is_floating_point() or 0 in references.shape:
        raise RequestError(
            f"reference embeddings of {references.dtype} {list(references.shape)}; give floats, [D] or [K,D]"
        )
    cosine = _Cosine(F.normalize(references.float(), dim=-1))
    if references.ndim == 1:
        return Score(function=cosine, keep=keep, title="similarity")
    return _Nearest(cosine, scale)


@dataclass(frozen=True, eq=False)
class _Cosine:
    """Cosine similarity of a model's image embeddings to references of unit length: [B], or [B,K] for several."""

    references: Tensor

    def __call__(self, output: Any) -> Tensor:
        found, size = _embedding(output), self.references.shape[-1]
        if found is None or found.ndim != 2 or found.shape[1] != size:
            shape = "none" if found is None else str(list(found.shape))
            raise RequestError(
                f"image embeddings {shape} beside references of {size} numbers; take both of one model"
            )
        found, references = F.normalize(found, dim=1), self.references.to(found.device, found.dtype)
        return found @ (references if references.ndim == 1 else references.mT)


@dataclass(frozen=True, eq=False)
class _Nearest(Target):
    """The most similar of several references."""

    cosine: _Cosine
    scale: float

    @property
    def of_classes(self) -> bool:
        return False

    def scores(self, output: Any) -> Tensor | None:
        return self.scale * self.cosine(output)

    def __str__(self) -> str:
        return "most similar kept"


def _stable(value: Any) -> str:
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().numpy().tobytes()).hexdigest()
    if isinstance(value, _Cosine):
        return _stable(value.references)
    if callable(value):
        code = getattr(value, "__code__", None)
        body = hashlib.sha256(code.co_code).hexdigest() if code is not None else ""
        return f"{getattr(value, '__qualname__', type(value).__qualname__)} {body}"
    return repr(value)


def _embedding(output: Any) -> Tensor | None:
    """The image embedding in what an encoder returned: transformers' names for it, else its first matrix."""
    for name in ("image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return first_tensor(output)


def output_kl(whole: Tensor, scores: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """KL(softmax(whole/T) ‖ softmax(scores/T))·T² per image: [B]."""
    a, b = F.log_softmax(whole / temperature, 1), F.log_softmax(scores / temperature, 1)
    return (a.exp() * (a - b)).sum(1) * temperature**2


FORMS = (
    "top1, class:NAME, label:NAME, multilabel, binary, value:OUTPUT, similarity:EMBEDDINGS.npy, or a function"
    " from the model's output to [B] as package.module:function or file.py:function"
)


def parse_target(text: str, *, keep: float = KEEP, tolerance: float | None = None) -> Target:
    """The target that a text names, in one of FORMS. Raises RequestError for any other."""
    kind, _, rest = text.partition(":")
    if text == "top1":
        return Target()
    if text == "binary":
        return Binary()
    if text == "multilabel":
        return MultiLabel(keep=keep)
    if kind in ("class", "label") and rest:
        return ChosenClass(chosen=rest, sigmoid=kind == "label", keep=keep)
    if kind == "value" and (rest or "0").isdecimal():
        return Value(column=int(rest or 0), keep=keep, tolerance=tolerance)
    if kind == "similarity" and rest:
        return similarity(_embeddings(Path(rest)), keep=keep)
    if rest:
        from .specs import named_object

        function = named_object(text, "target", FORMS)
        return Score(function=function, keep=keep, title=text.rpartition(":")[2])
    raise RequestError(f"unknown target '{text}'; write it as {FORMS}")


def _embeddings(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"{path} holds no embeddings ({error}); save them with numpy.save") from error
