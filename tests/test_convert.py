"""Masks in other tools' formats are the store's masks, bit by bit."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_store import make_store
from PIL import Image

from minexp import cli
from minexp.data import convert as module
from minexp.data.convert import convert, rle
from minexp.data.store import StoreWriter, read_store, unpack_mask
from minexp.errors import RequestError


def decoded(counts: str, size: list[int]) -> np.ndarray:
    """COCO's compressed run lengths, the slow way."""
    values, place = [], 0
    while place < len(counts):
        value, shift = 0, 0
        while True:
            bits = ord(counts[place]) - 48
            value |= (bits & 31) << shift
            shift, place = shift + 5, place + 1
            if not bits & 32:
                break
        if bits & 16:
            value -= 1 << shift
        values.append(value + (values[-2] if len(values) > 2 else 0))
    flat = [place % 2 for place, value in enumerate(values) for _ in range(value)]
    return np.array(flat, bool).reshape(size[::-1]).T


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"), count=20, side=48, errors=3, lost=2)


def masks(store: Path) -> dict[str, np.ndarray]:
    rows = read_store(store, ["id", "h", "w", "mask"]).to_pylist()
    return {
        row["id"]: unpack_mask(row["mask"], row["h"], row["w"]) for row in rows if row["mask"] is not None
    }


def cases() -> list[np.ndarray]:
    rng, sizes = np.random.default_rng(0), ((1, 1), (5, 3), (40, 300), (224, 224))
    return [rng.random(size) < share for size in sizes for share in (0, 0.01, 0.5, 1)]


def test_run_lengths_are_those_of_coco() -> None:
    for mask in cases():
        np.testing.assert_array_equal(decoded(rle(mask), list(mask.shape)), mask)
    assert rle(np.array([[0, 1], [0, 1]], bool)) == "22" and rle(np.ones((2, 2), bool)) == "04"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pycocotools_reads_the_run_lengths() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    for mask in cases():
        np.testing.assert_array_equal(coco.decode({"size": list(mask.shape), "counts": rle(mask)}), mask)


def test_coco_has_every_mask_with_its_class(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks.json"
    assert cli.main(["convert", str(store), "--to", "coco", "--out", str(out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["left_out"], summary["unread"]) == (17, 3, 0)
    found = json.loads(out.read_text())
    labels = {row["id"]: row["label_name"] for row in read_store(store, ["id", "label_name"]).to_pylist()}
    names = {category["id"]: category["name"] for category in found["categories"]}
    images = {image["id"]: image for image in found["images"]}
    expected = masks(store)
    assert len(images) == len(found["annotations"]) == 17
    for entry in found["annotations"]:
        image = images[entry["image_id"]]
        mask = expected[image["file_name"]]
        assert (image["height"], image["width"]) == mask.shape
        np.testing.assert_array_equal(
            decoded(entry["segmentation"]["counts"], entry["segmentation"]["size"]), mask
        )
        x, y, w, h = entry["bbox"]
        assert entry["area"] == mask.sum() == mask[y : y + h, x : x + w].sum()
        assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()
        assert names[entry["category_id"]] == labels[image["file_name"]]


def test_png_files_are_the_masks(store: Path, tmp_path: Path) -> None:
    assert convert(store, tmp_path / "png", "png", progress=False).rows == 17
    for name, mask in masks(store).items():
        with Image.open(tmp_path / "png" / f"{name}.png") as image:
            assert image.mode == "1"
            np.testing.assert_array_equal(np.asarray(image), mask)
    with pytest.raises(RequestError, match="is there already"):
        convert(store, tmp_path / "png", "png")
    with pytest.raises(RequestError, match="no explanations in"):
        convert(tmp_path, tmp_path / "x", "coco")


def test_no_id_leads_out_of_the_folder(tmp_path: Path) -> None:
    names = ["../../evil.png", "/etc/passwd", "..\\up", "a/./b?.png", ".."]
    assert [module._relative(name) for name in names] == [
        "evil.png.png", "etc/passwd.png", "up.png", "a/b_.png.png", "image.png",
    ]  # fmt: skip
    mask = np.eye(4, dtype=bool)
    with StoreWriter(tmp_path / "s", run={"fingerprint": "x", "class_names": ["a"]}) as writer:
        row = {"status": "certified", "label": 0, "mask": mask, "area": 0.25}
        writer.write([row | {"id": name, "uri": name} for name in names])
    convert(tmp_path / "s", tmp_path / "out" / "png", "png", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s"]
    assert len([p for p in (tmp_path / "out").rglob("*.png") if p.is_file()]) == 5


def test_a_hugging_face_data_set_has_pictures_masks_and_classes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_ROWS", 8)
    out = tmp_path / "hf"
    done = convert(store, out, "huggingface", progress=False)
    assert (done.rows, done.left_out, done.unread) == (17, 3, 2)
    files = sorted((out / "data").iterdir())
    assert [file.name for file in files] == [f"train-0000{number}.parquet" for number in range(3)]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    pictures = {row["id"]: row["uri"] for row in read_store(store, ["id", "uri"]).to_pylist()}
    for row, (name, mask) in zip(rows, masks(store).items(), strict=True):
        assert row["id"] == name
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"]))), mask)
        if row["image"] is not None:
            picture = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            np.testing.assert_array_equal(picture, np.asarray(Image.open(pictures[name]).convert("RGB")))
    assert sum(row["image"] is None for row in rows) == 2
    features = json.loads(pq.read_schema(files[0]).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == features["mask"] == {"_type": "Image"}
    labels = {row["id"]: row["label_name"] for row in read_store(store, ["id", "label_name"]).to_pylist()}
    assert all(features["label"]["names"][row["label"]] == labels[row["id"]] for row in rows)


def test_the_datasets_library_loads_it(store: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    convert(store, tmp_path / "hf", "huggingface", progress=False)
    loaded = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 17 and loaded[0]["mask"].size == loaded[0]["image"].size == (48, 48)
    name = next(r["label_name"] for r in read_store(store).to_pylist() if r["id"] == loaded[0]["id"])
    assert loaded.features["label"].int2str(loaded[0]["label"]) == name
