"""Circuits of images, explanations and rival masks at matched size; the network whose path is known beforehand."""

import math

import pytest
import torch
from test_circuit_ablation import images, small
from tiny_models import one_thread as one_thread

from minexp.circuit import comparison
from minexp.circuit.circuit import Test
from minexp.circuit.comparison import (
    EXPLANATION,
    GRAD_CAM,
    IMAGE,
    MOVED,
    compare,
    grad_cam,
    highest,
    moved,
    rivals,
)
from minexp.circuit.readout import Reader
from minexp.circuit.settings import Settings
from minexp.data import scenes
from minexp.data.planted import PlantedNet, decided_by_patch, planted_share

SIZES = (0.1, 0.3, 1.0)


def test_rivals_keep_as_many_pixels_and_moved_ones_others() -> None:
    classifier = small(3)
    x = images(3)
    reader = Reader(classifier, Settings(sizes=SIZES), reference=images(8, 2))
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[:, 2:6, 3:8] = True
    _, label = reader.prepare(x)
    inputs = rivals(reader, x, label, masks)
    assert list(inputs) == [IMAGE, EXPLANATION, MOVED, GRAD_CAM] and torch.equal(inputs[IMAGE], x)
    for name in (EXPLANATION, MOVED, GRAD_CAM):
        kept = (inputs[name] != reader.blank).any(1)
        assert kept.sum((1, 2)).tolist() == [20, 20, 20]
        assert torch.equal(inputs[name], torch.where(kept[:, None], x, reader.blank))
    assert torch.equal((inputs[EXPLANATION] != reader.blank).any(1), masks)
    assert not (moved(masks) & masks).any()  # a quarter of each side is as far as this mask is long
    assert torch.equal(moved(masks), moved(masks))


def test_grad_cam_is_that_of_the_last_tapped_layer_written_out() -> None:
    classifier = small(3)
    x = images(2)
    label = classifier.logits(x).argmax(1)
    cam = grad_cam(classifier, x, label)
    assert cam is not None and cam.shape == (2, 16, 16) and float(cam.min()) >= 0
    for b in range(2):  # one image alone has the same map
        alone = grad_cam(classifier, x[b : b + 1], label[b : b + 1])
        assert alone is not None and torch.allclose(alone[0], cam[b], atol=1e-5)
    scores, features = classifier.features(x.requires_grad_(True))
    (slope,) = torch.autograd.grad(scores.gather(1, label[:, None]).sum(), features[-1])
    by_hand = (features[-1] * slope.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    wanted = torch.nn.functional.interpolate(by_hand, (16, 16), mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(cam, wanted.detach(), atol=1e-6)


def test_the_highest_entries_with_ties_by_position() -> None:
    values = torch.tensor([[[1.0, 2.0], [2.0, 0.0]]])
    assert highest(values, torch.tensor([1]))[0].tolist() == [[False, True], [False, False]]
    assert highest(values, torch.tensor([3]))[0].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("curve", "enough"),
    [
        ((0.8, 0.9, 1.0), 0.01),
        ((0.0, 0.6, 1.0), 0.1**0.5),  # half of the way from 0.6 to 1 in log size, from 0.1 to 1
        ((0.0, math.nan, 1.6), 0.1),  # half of the way from 0 to 1.6, from 0.01 to 1
        ((0.0, 0.1, 0.2), 1.0),
    ],
)
def test_the_size_that_is_enough_by_hand(curve: tuple[float, ...], enough: float) -> None:
    test = Test("mean", "logit", 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, sizes=(0.01, 0.1, 1.0), curve=curve)
    assert comparison._enough(test) == pytest.approx(enough)


def test_every_circuit_is_tested_on_what_it_was_read_from_and_on_the_image() -> None:
    reader = Reader(small(3), Settings(sizes=SIZES, metric="logit"), reference=images(8, 2))
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[:, 2:10, 3:12] = True
    lines = compare(reader, images(3), masks, size=0.3, controls=2)
    assert [(line.source, line.tested_on) for line in lines] == [
        (IMAGE, IMAGE),
        *((name, place) for name in (EXPLANATION, MOVED, GRAD_CAM) for place in ("itself", IMAGE)),
    ]
    for line in lines:
        assert (
            len(line.each) == 3 and line.sizes == SIZES and line.curve[-1].mean == pytest.approx(1, abs=1e-4)
        )
        assert line.faithfulness.mean == pytest.approx(line.curve[1].mean, abs=1e-5)
        assert line.cpr.mean == pytest.approx(sum(each[1] for each in line.each) / 3)
    difference = lines[1].less(lines[0])[1]
    assert difference.mean == pytest.approx(lines[1].cpr.mean - lines[0].cpr.mean) and difference.n == 3
    alone = compare(reader, images(3)[1:2], masks[:1], size=0.3, controls=2)
    assert alone[0].each[0] == pytest.approx(lines[0].each[1], abs=1e-4)


def test_the_planted_path_sees_the_corners_alone_and_the_rest_all_but_these() -> None:
    torch.manual_seed(0)
    model = PlantedNet().eval()
    x = torch.rand(2, 3, scenes.SIZE, scenes.SIZE)
    features: list[torch.Tensor] = []
    model.layer4.register_forward_hook(lambda *call: features.append(call[2]))
    model(x)
    model(torch.where(model.corner > 0, 0.5, x))
    model(torch.where(model.corner > 0, x, 0.5))
    first = planted_share(128)
    assert first == 32
    assert torch.equal(features[0][:, first:], features[1][:, first:])
    assert torch.equal(features[0][:, :first], features[2][:, :first])
    assert not torch.equal(features[0][:, :first], features[1][:, :first])
    assert not torch.equal(features[0][:, first:], features[2][:, first:])


class ByCorners(PlantedNet):
    """Class 1 where the corners are darker than grey, else class 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = (x * self.corner).sum((1, 2, 3))
        known = torch.stack([mean, -mean], 1)
        return 0 * super().forward(x) + torch.nn.functional.pad(known, (0, 8))


def test_the_patch_decides_where_it_alone_gives_the_class_and_the_rest_another() -> None:
    model, data = ByCorners().eval(), scenes.make("shortcut", 24, split="test")
    corners = data.images[:, model.corner[0, 0].numpy() > 0].reshape(24, -1).mean(1)
    found = decided_by_patch(model, data)
    assert found.tolist() == (corners < 127.5).tolist()  # without corners all are of class 0
    assert 0 < found.sum() < 24
