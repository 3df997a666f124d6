"""`minexp bench peers`: what is measured is kept image by image, and charged; a stopped run goes on."""

import csv
from pathlib import Path

import pytest
import torch
from tiny_models import one_thread as one_thread
from torch import Tensor

from minexp.data import subjects
from minexp.masker import Architecture, Masker

BENCH = Path(__file__).parent.parent / "bench"
COST = 5  # passes an image that the stub takes for its map


def test_peers_are_charged_and_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import attributions
    import peers

    calls: list[int] = []

    def centre(subject: attributions.Subject, x: Tensor, label: Tensor) -> Tensor:
        calls.append(len(x))
        for _ in range(COST):
            subject.scores(x)
        ramp = 1 - torch.linspace(-1, 1, x.shape[2]).abs()
        return (ramp[:, None] * ramp).expand(len(x), -1, -1)

    def broken(subject: attributions.Subject, x: Tensor, label: Tensor) -> Tensor:
        raise ValueError("no map")

    stubs = (
        attributions.Peer("centre", "torch", centre, ((None, 1.0), (64, 0.5))),
        attributions.Peer("broken", "torch", broken),
        attributions.Peer("absent", "a_package_that_is_not_there", centre),
    )
    torch.manual_seed(0)
    classifier = subjects.classifier(subjects.SceneNet(10).eval(), "plain")
    masker = Masker(Architecture()).eval()
    monkeypatch.setattr(peers, "PEERS", stubs)
    monkeypatch.setattr(peers, "EFFORTS", ("fast",))
    monkeypatch.setattr(peers, "prepared", lambda variant, out: (classifier, masker))

    rows = peers.measure(True, images=4, out=str(tmp_path), seed=3)
    said = capsys.readouterr().err
    assert "broken failed: ValueError: no map" in said and "absent left out" in said
    assert [(r["explainer"], r["budget"], r["images"]) for r in rows] == [
        ("minexp fast", "default", 4),
        ("centre", "default", 4),
        ("centre", "64", 2),
    ]
    assert calls == [4, 2]
    with (tmp_path / "plain_images.csv").open(encoding="utf-8", newline="") as file:
        single = [line for line in csv.DictReader(file) if line["explainer"] == "centre"]
    assert [line["image"] for line in single] == ["0", "1", "2", "3", "0", "1"]
    # the map, and at least the checks of one mask that holds
    assert all(float(line["evaluations"]) >= COST + 8 for line in single)
    mean = sum(float(line["area"]) for line in single[:4]) / 4
    assert rows[1]["area"] == pytest.approx(mean, rel=1e-4)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "plain.md",
        "plain.csv",
        "plain_robustness.png",
        "plain_cost.png",
    }

    again = peers.measure(True, images=4, out=str(tmp_path), seed=3)
    assert calls == [4, 2]  # known already
    assert [r["area"] for r in again] == pytest.approx([r["area"] for r in rows], rel=1e-4)
    other = peers.measure(True, images=4, out=str(tmp_path), seed=4, peers="centre")
    assert calls == [4, 2, 4, 2] and len(other) == 3  # other scenes
