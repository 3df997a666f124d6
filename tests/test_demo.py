"""The demo in small: every stage once, a second run on what is there, and its figures against plain counting."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import one_thread as one_thread
from torch import Tensor, nn

from minexp import demo
from minexp.classifier import Classifier
from minexp.data import scenes, subjects
from minexp.data.scenes import PATCH, Scenes
from minexp.data.store import read_store
from minexp.data.tables import CIRCUITS
from minexp.errors import RequestError
from minexp.masker import Masker

SMALL = {"variant": "segments", "images": 12, "steps": 6, "scenes": 96, "quiet": True}


@pytest.mark.filterwarnings("ignore:the masks keep everything")
def test_the_whole_job_and_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MASKER_IMAGES", dict.fromkeys(demo.MASKER_IMAGES, 64))
    monkeypatch.setattr(demo, "PREDICATE", demo.Predicate("top1"))
    first = demo.run(tmp_path, **SMALL)
    assert capsys.readouterr().out == ""
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert {
        "classifier.safetensors",
        "masker.safetensors",
        "explanations",
        "report.html",
        "opening.png",
        "circuits",
    } <= names
    assert not [
        path for path in tmp_path.iterdir() if path.name.startswith(".")
    ]  # nothing half-written is left
    assert first["rows"] == 12 and first["certified"] + first["failed"] + first["errors"] == 12
    assert first == json.loads((tmp_path / "summary.json").read_text())

    held_out = scenes.make("segments", 12, split="test")
    table = read_store(tmp_path / "explanations")
    assert table["truth"].to_pylist() == held_out.labels.tolist()
    right = np.mean(np.array(table["label"].to_pylist()) == held_out.labels)
    assert first["accuracy"] == pytest.approx(right)
    masks = demo.stored_masks(tmp_path / "explanations")
    assert first["mean_area"] == pytest.approx(masks.mean(), abs=1e-5)
    decided = held_out.labels < 3
    inside = [(m & t).sum() / max(1, m.sum()) for m, t in zip(masks, held_out.truth, strict=True)]
    assert first["inside_truth"] == pytest.approx(np.mean(np.array(inside)[decided]))
    assert first["mostly_inside_truth"] == pytest.approx(np.mean(np.array(inside)[decided] > 0.5))
    assert first["p_empty"] == pytest.approx(np.mean(table["conf_empty"].to_pylist()))
    assert first["on_patch"] is None and first["patch_decides"] == 0
    page = (tmp_path / "report.html").read_text()
    assert "Against the known truth" in page and "How the masker was trained" in page
    assert 'href="circuits/circuits.html"' in page and (tmp_path / "circuits" / "circuits.html").is_file()
    assert read_store(tmp_path / "circuits", table=CIRCUITS).num_rows == 6
    assert Image.open(tmp_path / "opening.png").size[0] > 200

    weights = (tmp_path / "classifier.safetensors").stat().st_mtime_ns
    second = demo.run(tmp_path, **(SMALL | {"quiet": False}))
    said = capsys.readouterr().out
    assert "classifier.safetensors exists" in said and "masker.safetensors exists" in said
    assert str(tmp_path / "report.html") in said and "explanations certified" in said
    assert second["resumed"] == 12
    assert (tmp_path / "classifier.safetensors").stat().st_mtime_ns == weights
    for name in ("mean_area", "certified", "kept", "inside_truth", "accuracy", "p_empty"):
        assert second[name] == first[name], name

    with pytest.raises(RequestError, match=r"other settings.*--out"):
        demo.run(tmp_path, **(SMALL | {"scenes": 97}))


class Corner(nn.Module):
    """Reads the class from the patch colour alone (class 0 or 1), through both top corners."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1, bias=False), nn.ReLU()
        self.conv.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        red = self.act(self.conv(x))[:, 0, :PATCH, :PATCH].mean((1, 2))
        return torch.stack([0.6 - red, red - 0.6], 1)


def patch_scenes(reds: list[float]) -> Scenes:
    """Grey scenes with a top-left patch of the given red and a digit box in the middle."""
    n = len(reds)
    images = np.full((n, 64, 64, 3), 120, np.uint8)
    patch, truth = np.zeros((2, n, 64, 64), bool)
    patch[:, :PATCH, :PATCH] = True
    truth[:, 30:40, 30:40] = True
    for image, red in zip(images, reds, strict=True):
        image[:PATCH, :PATCH, 0] = round(255 * red)
    return Scenes("shortcut", images, np.zeros(n, np.int64), truth, truth, patch, ("a", "b"))


def test_the_patch_decides_where_greying_it_changes_the_answer() -> None:
    data = patch_scenes([1.0, 0.9, 0.3, 0.8])  # the third has the answer of grey: its patch decides nothing
    classifier = Classifier(Corner(), size=64, class_names=("a", "b"))
    masks = np.zeros((4, 64, 64), bool)
    masks[0] = data.patch[0]  # all of the patch
    masks[1, :PATCH, : PATCH // 3] = True  # less than half of it
    masks[3, :PATCH, : 2 * PATCH // 3] = True  # more than half
    masks[3, 30:40, 30:40] = True  # and all of the digit's box
    truth = demo.compare(classifier, data, masks)
    assert truth.patch_decides == 3
    assert truth.on_patch == pytest.approx(2 / 3)
    assert truth.inside == pytest.approx(100 / (100 + PATCH * (2 * PATCH // 3)) / 4)


def test_without_a_patch_there_is_no_figure_for_it() -> None:
    data = scenes.make("plain", 5)
    classifier = subjects.digits()
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    answers = classifier.logits(x).argmax(1).detach().numpy()
    for labels, right in ((answers, 1.0), ((answers + 1) % 10, None)):
        truth = demo.compare(classifier, replace(data, labels=labels), data.truth)
        assert truth == demo.Truth(1.0, 1.0, right, 0, None)
    labels = answers.copy()
    labels[0] = (labels[0] + 1) % 10
    masks = data.truth.copy()
    masks[0] = ~masks[0]  # misses the truth where the classifier is wrong
    truth = demo.compare(classifier, replace(data, labels=labels), masks)
    assert truth.mostly_inside == 0.8 and truth.mostly_inside_right == 1.0


def test_the_masker_alone_keeps_everything_when_new() -> None:
    data = scenes.make("plain", 4)
    alone = demo.masker_alone(subjects.digits(), Masker(), data)
    assert alone == {
        "kept": 1.0,
        "area": 1.0,
        "mostly_inside": 0.0,
    }  # each box is less than half of its scene
    empty = Masker()
    nn.init.constant_(empty.head.bias, -3.0)
    assert demo.masker_alone(subjects.digits(), empty, data)["area"] == 0.0


@pytest.mark.parametrize("variant", ["plain", "shortcut"])
def test_the_overlay_shows_masks_and_truth(variant: scenes.Variant) -> None:
    data = scenes.make(variant, 6)
    nothing = demo._overlay(data, np.zeros((6, 64, 64), bool))
    everything = demo._overlay(data, np.ones((6, 64, 64), bool))
    assert nothing.shape == everything.shape and nothing.dtype == np.uint8
    yellow = (nothing == (255, 220, 0)).all(2)
    assert 0.005 < yellow.mean() < 0.2
    assert (nothing[~yellow].max(1) == nothing[~yellow].min(1)).all()  # the rest is grey
    assert not (everything[~yellow].max(1) == everything[~yellow].min(1)).all()
