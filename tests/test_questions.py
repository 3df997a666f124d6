"""Several explanations, contrasts and necessary sets, against plain forward passes."""

from typing import Any

import pytest
import torch
from tiny_models import SIDE, filters, noise_images
from tiny_models import one_thread as one_thread
from torch import Tensor, nn

from minexp.classifier import Classifier
from minexp.errors import MinexpError, RequestError
from minexp.minimise import Minimisation, single_cells
from minexp.predicate import Predicate
from minexp.questions import NOT_ENOUGH, contrast, multiple, necessary

GREY = (0.5, 0.5, 0.5)
OPTIONS: dict[str, Any] = {
    "predicate": Predicate("top1"),
    "background": GREY,
    "minimisation": Minimisation(cell=2, levels=3),
}


class Spots(nn.Module):
    """Class 1 when any of two places is red, class 2 when a third is: two reasons, and one rival."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1, bias=False), nn.ReLU()
        self.conv.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        red = self.act(self.conv(x))[:, 0]
        either = torch.maximum(red[:, 2, 2], red[:, 12, 12])
        return torch.stack([torch.full_like(either, 0.7), either, red[:, 2, 12] * 0.95], 1) * 20


def spots() -> tuple[Classifier, Tensor]:
    x = torch.full((2, 3, SIDE, SIDE), 0.4)
    for row, column in ((2, 2), (12, 12), (2, 12)):
        x[0, 0, row, column] = 1.0
    x[1, 0, 2, 2] = 1.0  # one reason only
    return Classifier(Spots(), size=SIDE, class_names=("none", "spot", "third")), x


def test_disjoint_explanations_are_found_until_there_is_no_other() -> None:
    classifier, x = spots()
    # a step of refinement: what is tested begins behind the first explanation
    found = multiple(classifier, x, count=3, effort="minimal", **OPTIONS)
    assert len(found) == 3
    first, second, third = (f.masks for f in found)
    assert not (first & second).any()
    for masks in (first, second):
        kept = torch.where(masks[0], x[0], torch.tensor(0.5))[None]
        assert classifier.logits(kept).argmax() == 1 and masks[0].sum() <= 4
    assert {bool(first[0, 2, 2]), bool(second[0, 2, 2])} == {True, False}
    assert not third[0].any() and found[2].certificates[0].reason == NOT_ENOUGH
    assert (
        not second[1].any() and not found[1].certificates[1].certified and found[0].certificates[1].certified
    )


def test_a_contrast_keeps_what_tells_two_classes_apart() -> None:
    classifier, x = filters(), noise_images(8)
    label = classifier.logits(x).argmax(1)
    rival = 0
    x = x[label != rival]
    label = label[label != rival]
    found = contrast(classifier, x, rival, **OPTIONS)
    usual = Minimisation(cell=2)
    assert all(c.minimal_at == usual.cell for c in found.certificates)
    for b, mask in enumerate(found.masks):
        scores = classifier.logits(torch.where(mask, x[b], torch.tensor(0.5))[None])[0]
        assert scores[label[b]] > scores[rival]
        for lacking in single_cells(mask[None, None], 2)[0]:
            scores = classifier.logits(torch.where(lacking, x[b], torch.tensor(0.5))[None])[0]
            assert scores[label[b]] <= scores[rival] + 1e-5
    with pytest.raises(MinexpError, match="another class"):
        contrast(classifier, x, int(label[0]), **OPTIONS)
    with pytest.raises(RequestError, match="0 to 3"):
        contrast(classifier, x, 4, **OPTIONS)


def test_a_necessary_set_takes_the_class_away_and_no_less_does() -> None:
    classifier, x = spots()
    found = necessary(classifier, x, **OPTIONS)
    assert found.flips.all()
    # both reasons have to go, or the one there is; what is left has another class
    assert found.masks[0, 2, 2] and found.masks[0, 12, 12] and found.masks[0].sum() <= 8
    assert found.masks[1, 2, 2] and not found.masks[1, 12, 12] and found.masks[1].sum() <= 4
    assert found.becomes.tolist() == [2, 0] and found.minimal_at.tolist() == [2, 2]
    certificate = found.certificates[0]
    assert certificate.certified and certificate.kept and "only with these pixels" in certificate.predicate
    rest = classifier.logits(torch.where(found.masks[:1, None], 0.5, x[:1])).softmax(1)[0, 1]
    alone = classifier.logits(torch.where(found.masks[:1, None], x[:1], 0.5)).softmax(1)[0, 1]
    assert abs(certificate.conf_masked - rest) < 1e-5 and abs(certificate.conf_complement - alone) < 1e-5


def test_a_class_that_the_empty_image_has_cannot_be_taken_away() -> None:
    classifier, x = spots()
    blank = torch.full_like(x, 0.4)
    found = necessary(classifier, blank, **OPTIONS)
    assert not found.flips.any() and not found.masks.any()
