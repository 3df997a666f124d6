"""`minexp bench peers`: what is measured is kept image by image, and charged; a stopped run goes on."""

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import one_thread as one_thread
from torch import Tensor

from minexp import paper
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
        attributions.Peer("centre", "torch", centre, (None, 64)),
        attributions.Peer("broken", "torch", broken),
        attributions.Peer("absent", "a_package_that_is_not_there", centre),
    )
    torch.manual_seed(0)
    classifier = subjects.classifier(subjects.SceneNet(10).eval(), "plain")
    masker = Masker(Architecture()).eval()
    monkeypatch.setattr(peers, "PEERS", stubs)
    monkeypatch.setattr(peers, "EFFORTS", ("fast",))
    monkeypatch.setattr(peers, "PAPER_SHARE", 0.5)
    monkeypatch.setattr(paper, "optimise", partial(paper.optimise, steps=1))
    monkeypatch.setattr(peers, "prepared", lambda variant, out: (classifier, masker))

    rows = peers.measure(True, images=4, costly_images=2, out=str(tmp_path), seed=3)
    said = capsys.readouterr().err
    assert "broken failed: ValueError: no map" in said and "absent left out" in said
    assert [(r["explainer"], r["budget"], r["images"]) for r in rows] == [
        ("minexp fast", "default", 4),
        ("minexp fast, levels", "default", 4),
        ("minexp paper", "default", 1),
        ("centre", "default", 4),
        ("centre", "64", 2),
    ]
    assert calls == [4, 2]
    assert set(peers.COLUMNS) >= set(rows[3])  # what the command prints
    with (tmp_path / "plain_images.csv").open(encoding="utf-8", newline="") as file:
        single = [line for line in csv.DictReader(file) if line["explainer"] == "centre"]
    assert [line["image"] for line in single] == ["0", "1", "2", "3", "0", "1"]
    # the map, and at least the checks of one mask that holds
    assert all(float(line["evaluations"]) >= COST + 8 for line in single)
    mean = sum(float(line["area"]) for line in single[:4]) / 4
    assert rows[3]["area"] == pytest.approx(mean, rel=1e-4)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "plain.md",
        "plain.csv",
        "plain_robustness.png",
        "plain_cost.png",
    }

    again = peers.measure(True, images=4, costly_images=2, out=str(tmp_path), seed=3)
    assert calls == [4, 2]  # known already
    assert [r["area"] for r in again] == pytest.approx([r["area"] for r in rows], rel=1e-4)
    other = peers.measure(True, images=4, costly_images=2, out=str(tmp_path), seed=4, peers="centre")
    assert calls == [4, 2, 4, 2] and len(other) == 5  # other scenes


def test_a_stopped_run_of_peers_loses_one_chunk_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import attributions
    import peers

    calls: list[int] = []
    stop_at = 3

    def left_first(subject: attributions.Subject, x: Tensor, label: Tensor) -> Tensor:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(len(x))
        return torch.linspace(1, 0, x.shape[3]).expand(len(x), *x.shape[2:])

    torch.manual_seed(0)
    classifier, masker = (
        subjects.classifier(subjects.SceneNet(10).eval(), "plain"),
        Masker(Architecture()).eval(),
    )
    stub = attributions.Peer("left", "torch", left_first, (None,), costly=True)
    monkeypatch.setattr(peers, "PEERS", (stub,))
    monkeypatch.setattr(peers, "EFFORTS", ())
    monkeypatch.setattr(peers, "SMALL_CHUNK", 2)
    monkeypatch.setattr(peers, "PAPER_SHARE", 0)
    monkeypatch.setattr(peers, "prepared", lambda variant, out: (classifier, masker))
    settings = {"images": 10, "costly_images": 9, "out": str(tmp_path), "seed": 3}

    with pytest.raises(KeyboardInterrupt):
        peers.measure(True, **settings)
    assert calls == [2, 2, 2]
    stop_at = 100
    (row,) = peers.measure(True, **settings)
    assert calls == [2, 2, 2, 2, 1] and row["images"] == 9
    undisturbed = peers.measure(True, **{**settings, "out": str(tmp_path / "anew")})
    assert row["area"] == pytest.approx(undisturbed[0]["area"], rel=1e-5)
    # more images than before: only those that are not known
    (row,) = peers.measure(True, **{**settings, "costly_images": 10})
    assert calls[-1] == 1 and row["images"] == 10


def test_break_even_weighs_the_fit_against_what_fast_saves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import peers_table

    def measured(name: str, seconds: float) -> peers_table.Measured:
        figures = {figure: np.full(3, 0.5) for figure in peers_table.NAMES}
        return peers_table.Measured(name, "default", {**figures, "seconds": np.full(3, seconds)})

    results = peers_table.Results(tmp_path / "plain", ("job",), fit_seconds=90.0)
    for name, seconds in (("slow", 0.75), ("minexp fast", 0.25), ("faster", 0.125)):
        results.add(measured(name, seconds), "job")
    fast, slow, faster = results.rows()
    assert fast["fit_seconds"] == 90 and slow["break_even"] == 180  # 90 s at 0.5 s an image
    assert "break_even" not in fast and "break_even" not in faster
    # read back, and another job's figures left alone
    assert peers_table.Results(tmp_path / "plain", ("job",)).images("slow", "default") == 3
    assert peers_table.Results(tmp_path / "plain", ("other",)).images("slow", "default") == 0
