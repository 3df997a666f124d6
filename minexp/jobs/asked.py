"""Other questions as jobs: what explains a batch in the place of `minexp.explain`, and can be sent to a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..classifier import Classifier
from ..explanation import Explanation
from ..masker import Masker
from ..predicate import Contrast, Necessary, Question, Sufficient
from ..questions import Removal, contrast, multiple, necessary

REDUCED = ("effort", "preset", "match")  # options of a per-image search, which these questions do not make


@dataclass(frozen=True)
class Another:
    """The ``number``-th (from 1) of an image's disjoint explanations."""

    number: int
    question: ClassVar[Question] = Sufficient()

    def __call__(
        self, classifier: Classifier, x: Tensor, masker: Masker | None, **options: Any
    ) -> Explanation:
        return multiple(classifier, x, masker, count=self.number, **options)[-1]


@dataclass(frozen=True)
class WhyNot:
    """Why not class ``rival``? An image of that class is an error of its own."""

    rival: int

    @property
    def question(self) -> Question:
        return Contrast(self.rival)

    def __call__(
        self, classifier: Classifier, x: Tensor, masker: Masker | None, **options: Any
    ) -> Explanation:
        return contrast(classifier, x, self.rival, masker, **_without(options))


@dataclass(frozen=True)
class Needed:
    """What must be there?"""

    question: ClassVar[Question] = Necessary()

    def __call__(self, classifier: Classifier, x: Tensor, masker: Masker | None, **options: Any) -> Removal:
        return necessary(classifier, x, masker, **_without(options))


def _without(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in REDUCED}
