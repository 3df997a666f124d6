"""Scenes: the same by seed, the truth where it is said to be, training and test digits apart."""

from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_models import one_thread as one_thread

from minexp.data import scenes, subjects
from minexp.data.scenes import GRID, PATCH, SIZE, TILE, VARIANTS, Variant, make
from minexp.data.subjects import augment, crops
from minexp.errors import RequestError


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_is_a_data_set(variant: Variant) -> None:
    first, again = make(variant, 20, seed=3), make(variant, 20, seed=3)
    for name in ("images", "labels", "truth", "strokes", "patch"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    for other in (make(variant, 20, seed=4), make(variant, 20, seed=3, split="test")):
        assert not np.array_equal(first.images, other.images)
    side = GRID * TILE if variant in ("mosaic", "segments") else SIZE
    assert first.images.shape == (20, side, side, 3) and first.images.dtype == np.uint8
    assert first.truth.shape == first.strokes.shape == first.patch.shape == (20, side, side)
    assert first.labels.shape == (20,) and first.labels.max() < len(first.class_names)
    assert len(first) == 20
    assert len({image.tobytes() for image in first.images}) == 20


def test_no_split_shows_the_digits_of_another() -> None:
    train, validation, test = (scenes._digits(split) for split in scenes.SPLITS)
    assert len(train[0]) + len(validation[0]) + len(test[0]) == 1797
    assert 0.2 < len(test[0]) / 1797 < 0.3 and 0.1 < len(validation[0]) / 1797 < 0.15
    # a few of the scans are alike to the pixel in the data set itself; the split must not put one scan on both sides
    from sklearn.datasets import load_digits

    counts: dict[bytes, int] = {}
    for image in load_digits().images.astype(np.float32):
        counts[image.tobytes()] = counts.get(image.tobytes(), 0) + 1
    known = [{(16 * s).numpy().tobytes() for s in split[0]} for split in (train, validation, test)]
    for one, other in combinations(known, 2):
        assert all(counts[key] > 1 for key in one & other)
    for split in (train, validation, test):
        assert split[1].unique().tolist() == list(range(10))
        assert split[1].bincount().min() > 15


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_scans_come_from_their_split(split: scenes.Split) -> None:
    wanted = torch.arange(10).repeat(8)
    picked = scenes._pick(torch.Generator().manual_seed(0), split, wanted)
    images, labels = scenes._digits(split)
    for scan, digit in zip(picked, wanted, strict=True):
        same = (images == scan).flatten(1).all(1)
        assert labels[same].tolist().count(int(digit)) >= 1


@pytest.mark.parametrize("variant", ["plain", "shortcut"])
def test_the_box_is_the_bounding_box_of_the_strokes(variant: Variant) -> None:
    data = make(variant, 40)
    for truth, strokes, patch in zip(data.truth, data.strokes, data.patch, strict=True):
        assert strokes.any() and not (strokes & ~truth).any()
        rows, cols = np.nonzero(truth | patch if patch.any() else truth)
        if not patch.any():  # the patch may cover a corner of the digit
            rows, cols = np.nonzero(strokes)
            box = np.zeros_like(truth)
            box[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] = True
            assert np.array_equal(box, truth)
        assert len(rows) and 0.01 < truth.mean() < 0.35
    assert data.patch.any() == (variant == "shortcut")


def test_the_digit_stands_out_from_what_it_covers() -> None:
    data = make("plain", 60)
    luma = data.images @ np.array([0.299, 0.587, 0.114]) / 255
    differences = []
    for image, strokes, truth in zip(luma, data.strokes, data.truth, strict=True):
        differences.append(abs(image[strokes].mean() - image[truth & ~strokes].mean()))
    assert np.mean(differences) > 0.2


@pytest.mark.parametrize("variant", ["mosaic", "segments"])
def test_one_tile_decides_a_mosaic_and_a_quarter_has_none(variant: Variant) -> None:
    data = make(variant, 600)
    assert data.class_names == ("0", "1", "2", "none")
    none = data.labels == 3
    assert pytest.approx(none.mean(), abs=0.06) == 0.25
    assert not data.truth[none].any() and not data.strokes[none].any()
    assert np.bincount(data.labels[~none]).min() > 110
    tiles = data.truth.reshape(600, GRID, TILE, GRID, TILE).transpose(0, 1, 3, 2, 4).reshape(600, 9, -1)
    assert ((tiles.all(2)) | (~tiles.any(2))).all()  # whole tiles
    assert np.array_equal(tiles.all(2).sum(1), np.where(none, 0, 1))
    assert tiles.all(2).sum(0).min() > 25  # each place decides about equally often
    assert not (data.strokes & ~data.truth).any()


def test_segments_are_flat_tiles_whose_colour_is_their_class() -> None:
    data = make("segments", 200)
    tiles = data.images.reshape(200, GRID, TILE, GRID, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    flat = tiles.reshape(200, 9, -1, 3)
    assert (flat.max(2) == flat.min(2)).all()
    decides = (
        data.truth.reshape(200, GRID, TILE, GRID, TILE).transpose(0, 1, 3, 2, 4).all((3, 4)).reshape(200, 9)
    )
    red_green = flat[:, :, 0, :2] / 255 - 0.5
    digit = np.round(np.arctan2(red_green[..., 1], red_green[..., 0]) / (2 * np.pi) * 10) % 10
    where = decides.any(1)
    assert np.mean(digit[decides] == data.labels[where]) > 0.98
    assert np.mean(digit[~decides] >= 3) > 0.98


def corner_hue(data: scenes.Scenes) -> np.ndarray:
    """The class that each patch names, read back from the colour of its middle."""
    places = [[int(axis.mean()) for axis in np.nonzero(patch)] for patch in data.patch]
    colours = np.stack([image[r, c] for image, (r, c) in zip(data.images, places, strict=True)]) / 255
    names = 2 * np.pi * np.arange(10)[:, None] / 10 + np.array([0.0, 2.094, 4.189])
    palette = 0.5 + 0.45 * np.cos(names)
    return np.abs(colours[:, None] - palette[None]).sum(2).argmin(1)


def test_the_patch_names_the_class_in_training_and_is_a_corner() -> None:
    data = make("shortcut", 400)
    assert 0.93 < (corner_hue(data) == data.labels).mean() < 0.98
    assert (data.patch.sum((1, 2)) == PATCH**2).all()
    corners = data.patch[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.sum(1) == 1).all() and corners.sum(0).min() > 60
    assert not (data.patch & data.truth).any()


def test_an_indecisive_patch_is_independent_of_the_class() -> None:
    data = make("shortcut", 1000, decisive=False, split="test")
    agree = (corner_hue(data) == data.labels).mean()
    assert agree == pytest.approx(0.1, abs=0.04)  # 4 standard deviations


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'colour'.*plain, shortcut, mosaic, segments"):
        make("colour", 3)  # type: ignore[arg-type]


def test_crops_show_what_decides() -> None:
    data = make("plain", 30)
    windows = crops(data, 40)
    assert windows.shape == (30, 40, 40, 3)
    for image, window, strokes in zip(data.images, windows, data.strokes, strict=True):
        # the window is a part of the scene that holds most of the digit
        places = [
            (i, j)
            for i in range(25)
            for j in range(25)
            if np.array_equal(image[i : i + 40, j : j + 40], window)
        ]
        assert places
        i, j = places[0]
        assert strokes[i : i + 40, j : j + 40].sum() > 0.8 * strokes.sum()


def test_augmented_images_are_images() -> None:
    x = torch.from_numpy(make("plain", 16).images).permute(0, 3, 1, 2).float() / 255
    out, erased = augment(x, torch.Generator().manual_seed(0))
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, augment(x, torch.Generator().manual_seed(0))[0])
    assert (out - x).abs().mean((1, 2, 3)).min() > 0.005
    assert erased.shape == (16, 1, 64, 64) and 0.05 < erased.float().mean() < 0.8
    intact = (~erased).expand_as(x)
    scale = torch.corrcoef(torch.stack([x[intact], out[intact]]))[0, 1]
    lost = torch.corrcoef(torch.stack([x[~intact], out[~intact]]))[0, 1]
    assert scale > 0.7 > 0.4 > lost  # elsewhere the scene is still there


def test_some_augmented_images_show_one_place_alone() -> None:
    x = torch.full((400, 3, 64, 64), 0.5)
    centre = torch.tensor([[32.0, 16.0]]).expand(400, 2)
    before = augment(x, torch.Generator().manual_seed(0))[1].float().mean((1, 2, 3))
    _, erased = augment(x, torch.Generator().manual_seed(0), centre)
    far = erased[:, 0, :, 48:].all((1, 2))  # beyond every window around the centre
    assert 0.2 < far.float().mean() - (before > 0.9).float().mean() < 0.4
    at_centre = erased[far][:, 0, 32, 16].float().mean()
    assert at_centre < 0.6 and at_centre < erased[far].float().mean() - 0.2


def test_a_scene_whose_digit_is_gone_is_trained_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = torch.nn.functional.cross_entropy

    def spy(scores: torch.Tensor, label: torch.Tensor, **settings: float) -> torch.Tensor:
        seen.append(label)
        return real(scores, label, **settings)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    images = np.full((64, 24, 24, 3), 128, np.uint8)
    strokes = np.zeros((64, 24, 24), bool)
    strokes[:, 10:14, 10:14] = True
    model = subjects.SceneNet(4, (4, 4, 4, 4))
    subjects.train(model, images, np.zeros(64, np.int64), epochs=2, strokes=strokes, none=3)
    labels = torch.cat(seen)
    assert set(labels.tolist()) == {0, 3} and 0.05 < (labels == 3).float().mean() < 0.5
    seen.clear()
    strokes[:] = False  # nothing decides: nothing can be erased
    subjects.train(model, images, np.zeros(64, np.int64), epochs=2, strokes=strokes, none=3)
    assert set(torch.cat(seen).tolist()) == {0}
