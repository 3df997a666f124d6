"""`minexp explain` with another question: several explanations, why not a class, what must be there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_net import NAMES, SIZE, classifier
from tiny_models import one_thread as one_thread

from minexp import cli
from minexp.data.store import read_run, read_store, unpack_mask

MODEL = f"{Path(__file__).parent / 'small_net.py'}:classifier"
BLUE = 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three red images with some blue in the upper half, and a blue one."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        image = rng.integers(0, 40, (SIZE, SIZE, 3), dtype=np.uint8)
        image[: SIZE // 2, :, 0 if number < 3 else 2] = 250
        image[: SIZE // 2, : SIZE // 4, 2] = 220
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def run(capsys: pytest.CaptureFixture[str], photos: Path, *options: str) -> tuple[int, Any]:
    arguments = [
        "--model",
        MODEL,
        "--data",
        str(photos),
        "--out",
        str(photos.parent / "out"),
        "--predicate",
        "top1",
    ]
    code = cli.main(["explain", *arguments, "--background", "black", *options, "--json", "--quiet"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else said.err


def stored(out: Path) -> list[tuple[Any, np.ndarray]]:
    rows = read_store(out).to_pylist()
    return [(row, unpack_mask(row["mask"], SIZE, SIZE) if row["mask"] else np.zeros(0)) for row in rows]


def scores(photos: Path, number: int, shown: np.ndarray) -> torch.Tensor:
    image = np.where(shown[..., None], np.asarray(Image.open(photos / f"{number}.png")), 0)
    return classifier().logits(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0]


def test_several_explanations_are_stores_of_disjoint_masks(
    capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    code, summary = run(capsys, photos, "--multiple", "2", "--effort", "minimal", "--cell", "8")
    assert code == 0 and summary["certified"] == summary["certified_2"] == 4
    first, second = stored(photos.parent / "out"), stored(photos.parent / "out" / "2")
    for number, ((row, mask), (other, further)) in enumerate(zip(first, second, strict=True)):
        assert row["id"] == other["id"] == f"{number}.png" and row["label"] == other["label"]
        assert mask.any() and further.any() and not (mask & further).any()
        for shown in (mask, further):
            assert scores(photos, number, shown).argmax() == row["label"]


def test_why_not_keeps_the_class_ahead_and_an_image_of_the_other_is_an_error(
    capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    code, summary = run(capsys, photos, "--why-not", "blue", "--cell", "4")
    assert (code, summary["certified"], summary["errors"]) == (3, 3, 1)
    rows = stored(photos.parent / "out")
    assert "classified as blue itself" in rows[3][0]["error"]
    for number, (row, mask) in enumerate(rows[:3]):
        found = scores(photos, number, mask)
        assert row["predicate"].startswith("ahead of class 2") and row["minimal_at"] == 4
        assert row["label_name"] == "red" and found[0] > found[BLUE] and 0 < mask.mean() < 0.5
    assert read_run(photos.parent / "out")["predicate"].startswith("ahead of class 2")
    code, said = run(capsys, photos, "--necessary")
    assert code == 2 and "another job" in said


def test_the_necessary_set_takes_the_class_away(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    code, summary = run(capsys, photos, "--necessary", "--cell", "4")
    assert code == 0 and summary["certified"] == summary["kept"] * 4 == 4
    for number, (row, mask) in enumerate(stored(photos.parent / "out")):
        rest = scores(photos, number, ~mask)
        assert rest.argmax() == row["label_masked"] != row["label"] and row["minimal_at"] == 4
        assert abs(row["conf_masked"] - rest.softmax(0)[row["label"]]) < 1e-4
        assert 0 < mask.mean() < 0.6 and "only with these pixels" in row["predicate"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--why-not", "rad"), "did you mean red"),
        (("--why-not", str(len(NAMES))), "from 0 to 3"),
        (("--why-not", "red", "--necessary"), "give one of them"),
        (("--multiple", "0"), "--multiple"),
        (("--necessary", "--effort", "minimal"), "leave --effort"),
        (("--why-not", "red", "--target", "class:blue"), "between classes"),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str], photos: Path, options: tuple[str, ...], said: str
) -> None:
    code, text = run(capsys, photos, *options)
    assert code == 2 and said in text and len(text.strip().splitlines()) == 1
