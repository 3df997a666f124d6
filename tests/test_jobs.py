"""A dataset through explain(): one row for every input, in order, whatever happens on the way."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from minexp.certify import Predicate
from minexp.classifier import Classifier
from minexp.data.sources import open_source
from minexp.data.store import read_run, read_store, unpack_mask, verify_store
from minexp.errors import RequestError
from minexp.jobs import local
from minexp.repair import SPARING

SIZE = 8


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return Classifier(net, size=SIZE, class_names=["cat", "dog", "eel"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images of two classes; the value of every pixel is ten times the image's number. Two cannot be read."""
    root = tmp_path / "images"
    for number in range(9):
        place = root / ("dog" if number < 5 else "eel")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIZE, SIZE, 3), number * 10, np.uint8)).save(place / f"{number}.png")
    (root / "dog" / "2.png").write_bytes((root / "dog" / "2.png").read_bytes()[:40])
    (root / "eel" / "7.png").write_text("not an image")
    return root


Stub = Callable[..., Any]


def stub(seen: list[list[float]] | None = None, fail: Callable[[Tensor], None] = lambda x: None) -> Stub:
    """Explains an image by keeping its first row; records the pixel values it was called with."""

    def explain(classifier: Classifier, x: Tensor, masker: Any, **settings: Any) -> Any:
        values = [round(float(image.mean() * 255)) for image in x]
        if seen is not None:
            seen.append([float(value) for value in values])
        fail(x)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[0] = True
        rows = [
            {
                "status": "certified" if value < 60 else "uncertified",
                "label": value // 10 % 3,
                "area": 1 / SIZE,
                "kept": value < 60,
                "robust_train": 1.0,
                "evaluations": value,
                "mask": mask,
            }
            for value in values
        ]
        return SimpleNamespace(rows=lambda: rows)

    return explain


def run(classifier: Classifier, folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"explain": stub(), "progress": False, "predicate": Predicate("top1")} | options
    return local.explain_dataset(classifier, open_source(folder), None, out, **options)


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_one_row_for_every_input_in_order(
    classifier: Classifier, folder: Path, tmp_path: Path, batch: int
) -> None:
    summary = run(classifier, folder, tmp_path / "out", batch=batch)
    rows = read_store(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows] == [f"{'dog' if n < 5 else 'eel'}/{n}.png" for n in range(9)]
    assert [row["status"] for row in rows] == [
        "error" if n in (2, 7) else "certified" if n < 6 else "uncertified" for n in range(9)
    ]
    assert [row["evaluations"] for row in rows] == [None if n in (2, 7) else 10 * n for n in range(9)]
    assert all(row["error"] for row in rows if row["status"] == "error")
    assert rows[7]["mask"] is None
    assert unpack_mask(rows[0]["mask"], SIZE, SIZE).sum() == SIZE
    assert [row["truth"] for row in rows] == [1] * 5 + [2] * 4  # by name: dog and eel are classes 1 and 2
    assert verify_store(tmp_path / "out") == []
    expected = {"rows": 9, "certified": 5, "failed": 2, "errors": 2, "mean_area": 0.125, "resumed": 0}
    assert {key: summary[key] for key in expected} == expected
    assert summary["kept"] == pytest.approx(5 / 7, abs=1e-6)
    assert summary["evaluations_per_image"] == pytest.approx(sum(10 * n for n in (0, 1, 3, 4, 5, 6, 8)) / 7)
    assert summary["robust_heldout"] is None
    assert (summary["provider"], summary["precision"]) == ("torch-cpu", "float32")
    assert summary["images_per_second"] > 0


def test_an_image_that_makes_explain_throw_costs_only_its_own_row(
    classifier: Classifier, folder: Path, tmp_path: Path
) -> None:
    def fail(x: Tensor) -> None:
        if any(round(float(image.mean() * 255)) == 40 for image in x):
            raise ZeroDivisionError("area\nis nought")

    seen: list[list[float]] = []
    summary = run(classifier, folder, tmp_path / "out", batch=5, explain=stub(seen, fail))
    rows = read_store(tmp_path / "out").to_pylist()
    assert [row["status"] for row in rows].count("error") == 3
    assert rows[4]["error"] == "ZeroDivisionError: area is nought"
    assert rows[3]["status"] == "certified"
    assert summary["errors"] == 3
    # The batch once, then its four readable images one by one; then the second batch.
    assert seen == [[0, 10, 30, 40], [0], [10], [30], [40], [50, 60, 80]]


def test_a_wrong_request_ends_the_job_at_once(classifier: Classifier, folder: Path, tmp_path: Path) -> None:
    def fail(x: Tensor) -> None:
        raise RequestError("no such background")

    with pytest.raises(RequestError, match="no such background"):
        run(classifier, folder, tmp_path / "out", explain=stub(None, fail))
    assert not (tmp_path / "out").exists()
    # Nothing is left that would refuse the corrected request as another job.
    assert run(classifier, folder, tmp_path / "out", seed=1)["rows"] == 9
    with pytest.raises(RequestError, match="no such background"):
        run(classifier, folder, tmp_path / "out", seed=1, resume=False, explain=stub(None, fail))


def test_an_image_that_cannot_be_prepared_costs_only_its_own_row(
    classifier: Classifier, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fussy(type(classifier.preprocessing)):  # type: ignore[misc]
        def pixels(self, image: Any) -> Any:
            if image[0, 0, 0] == 30:
                raise MemoryError("too large")
            return super().pixels(image)

    classifier.preprocessing = Fussy(**vars(classifier.preprocessing))
    run(classifier, folder, tmp_path / "out")
    rows = read_store(tmp_path / "out").to_pylist()
    assert rows[3]["error"] == "cannot be read: MemoryError: too large"
    assert [row["status"] for row in rows].count("error") == 3
    assert rows[4]["evaluations"] == 40


def test_an_interrupted_job_goes_on_and_ends_like_an_undisturbed_one(
    classifier: Classifier, folder: Path, tmp_path: Path
) -> None:
    def fail(x: Tensor) -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt

    seen: list[list[float]] = []
    with pytest.raises(KeyboardInterrupt):
        run(classifier, folder, tmp_path / "cut", batch=2, explain=stub(seen, fail))
    assert read_store(tmp_path / "cut").num_rows == 4
    more: list[list[float]] = []
    summary = run(classifier, folder, tmp_path / "cut", batch=2, explain=stub(more))
    assert (summary["rows"], summary["resumed"]) == (9, 4)
    assert more[0] == [40, 50]
    run(classifier, folder, tmp_path / "whole")
    assert read_store(tmp_path / "cut").equals(read_store(tmp_path / "whole"))
    assert verify_store(tmp_path / "cut") == []


def test_a_finished_job_is_not_done_again_and_a_foreign_one_is_refused(
    classifier: Classifier, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = run(classifier, folder, out)
    seen: list[list[float]] = []
    again = run(classifier, folder, out, explain=stub(seen))
    assert seen == []
    assert again["rows"] == again["resumed"] == first["rows"] == 9
    for options in (
        {"seed": 1},
        {"background": "black"},
        {"predicate": Predicate("score")},
        {"effort": "refined"},
        {"repair": SPARING},
    ):
        with pytest.raises(RequestError, match="another job"):
            run(classifier, folder, out, **options)
    other = Classifier(classifier.model, size=SIZE, mean=(0.5,) * 3)
    with pytest.raises(RequestError, match="another job"):
        run(other, folder, out)
    (folder / "dog" / "2.png").unlink()
    with pytest.raises(RequestError, match="another job"):
        run(classifier, folder, out)
    assert run(classifier, folder, out, resume=False)["rows"] == 8


def test_the_store_says_what_made_it(classifier: Classifier, folder: Path, tmp_path: Path) -> None:
    run(classifier, folder, tmp_path / "out", seed=3)
    about = read_run(tmp_path / "out")
    assert about["classifier"] == classifier.fingerprint
    assert about["class_names"] == ["cat", "dog", "eel"]
    assert about["preprocessing"]["input_size"] == [3, SIZE, SIZE]
    assert (about["seed"], about["predicate"], about["background"]) == (3, "top-1 kept", "mean")


def test_labels_that_cannot_be_the_classifiers_are_left_out(classifier: Classifier, tmp_path: Path) -> None:
    images = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    np.savez(tmp_path / "x.npz", x=images, y=np.array([2, 0, 1]))
    run(classifier, tmp_path / "x.npz", tmp_path / "a")
    assert read_store(tmp_path / "a")["truth"].to_pylist() == [2, 0, 1]
    for name in ("ant", "bee"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        Image.fromarray(images[0]).save(tmp_path / "tree" / name / "0.png")
    run(classifier, tmp_path / "tree", tmp_path / "b")
    assert read_store(tmp_path / "b")["truth"].to_pylist() == [None, None]


def test_without_a_masker_backgrounds_come_from_the_data(
    classifier: Classifier, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def explain(classifier: Classifier, x: Tensor, masker: Any, *, backgrounds: Any, **settings: Any) -> Any:
        given.append(backgrounds)
        return stub()(classifier, x, masker)

    run(classifier, folder, tmp_path / "short", explain=explain)
    assert given[0].reference is None
    monkeypatch.setattr(local, "REFERENCES", 4)
    given.clear()
    run(classifier, folder, tmp_path / "long", explain=explain, batch=3)
    assert all(backgrounds is given[0] for backgrounds in given)
    # Images 0, 2, 4 and 6 of nine; the third of them cannot be read.
    assert [round(float(image.mean() * 255)) for image in given[0].reference] == [0, 40, 60]
    assert given[0].mean.mean() * 255 == pytest.approx(100 / 3, abs=0.01)
