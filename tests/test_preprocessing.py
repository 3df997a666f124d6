"""Preprocessing against Pillow's own resize and crop, done the long way."""

import json

import numpy as np
import pytest
from PIL import Image

from minexp.data.preprocessing import Preprocessing
from minexp.errors import RequestError


def picture(height, width, channels=3, seed=0):
    """A smooth picture: on noise, resampling windows that differ by a hair would differ by whole levels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    return np.asarray(coarse)[..., :channels]


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (256, 256), (64, 300)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_and_crop_agree_with_the_long_way(shape, interpolation):
    image = picture(*shape)
    short = min(shape)
    width, height = (256 * side // short for side in (shape[1], shape[0]))
    whole = Image.fromarray(image).resize((width, height), getattr(Image.Resampling, interpolation.upper()))
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    slow = np.asarray(whole)[top : top + 224, left : left + 224].astype(int)
    fast = Preprocessing((224, 224), resize=256, interpolation=interpolation).pixels(image).astype(int)
    assert fast.shape == (224, 224, 3)
    assert np.abs(fast - slow).max() <= 1


def test_nearest_keeps_the_image_s_own_values():
    image = np.where(np.arange(40 * 30).reshape(40, 30, 1) % 7 == 0, 255, 3).astype(np.uint8).repeat(3, 2)
    out = Preprocessing((13, 17), interpolation="nearest").pixels(image)
    assert set(np.unique(out)) == {3, 255}


def test_squash_takes_the_whole_image():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 30:] = 200
    out = Preprocessing((10, 10)).pixels(image)
    assert out[:, :4].max() == 0 and out[:, 6:].min() == 200


@pytest.mark.parametrize("resize", [None, 8])
def test_an_image_of_the_right_size_passes_untouched(resize):
    image = picture(7, 8)
    assert np.array_equal(Preprocessing((7, 8), resize=resize).pixels(image), image)


def test_channels_are_converted_both_ways():
    grey = picture(9, 9, 1)
    assert np.array_equal(Preprocessing((9, 9)).pixels(grey), grey.repeat(3, 2))
    assert np.array_equal(Preprocessing((9, 9)).pixels(grey[..., 0]), grey.repeat(3, 2))
    one = Preprocessing((9, 9), mean=(0.5,), std=(0.5,), channels=1)
    luma = one.pixels(np.full((9, 9, 3), (255, 0, 0), np.uint8))
    assert luma.shape == (9, 9, 1) and luma[0, 0, 0] == 76  # ITU-R 601: .299 of red


def test_a_one_pixel_image_and_a_long_strip_come_out_whole():
    out = Preprocessing((224, 224), resize=256).pixels(np.full((1, 1, 3), 7, np.uint8))
    assert out.shape == (224, 224, 3) and (out == 7).all()
    # Resized whole, this strip would be 256 x 25,600,000 pixels.
    strip = Preprocessing((224, 224), resize=256).pixels(np.full((1, 100_000, 3), 9, np.uint8))
    assert strip.shape == (224, 224, 3) and (strip == 9).all()


@pytest.mark.parametrize(
    "settings",
    [
        Preprocessing(
            (224, 224), resize=375, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)
        ),
        Preprocessing((48, 64)),
        Preprocessing((28, 28), resize=30, mean=(0.13,), std=(0.3,), channels=1),
    ],
)
def test_json_round_trip(settings):
    assert Preprocessing.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_timm_settings_are_understood():
    timm = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
    timm |= {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "pool_size": None,
    }
    settings = Preprocessing.from_json(timm)
    assert settings.resize == 256 and settings.size == (224, 224) and settings.mean == (0.485, 0.456, 0.406)
    assert Preprocessing.from_json(timm | {"crop_mode": "squash"}).resize is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": (0, 5)}, "size"),
        ({"interpolation": "magic"}, "bilinear"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.5,)}, "mean"),
        ({"resize": 10}, "resize"),
        ({"channels": 4}, "channels"),
    ],
)
def test_wrong_settings_are_named(change, says):
    with pytest.raises(RequestError, match=says) as caught:
        Preprocessing(**({"size": (32, 32)} | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_what_is_not_an_image_is_refused(image):
    with pytest.raises(RequestError, match="uint8"):
        Preprocessing((8, 8)).pixels(image)
