"""Backgrounds: each family is what it says, and a draw depends on its seed alone."""

import pytest
import torch
from tiny_models import noise_images
from torch import Tensor

from minexp.backgrounds import (
    FAMILIES,
    FROM_REFERENCE,
    HELD_OUT,
    OTHER,
    TRAINING,
    Backgrounds,
    blurred,
    phase_scrambled,
    random_mixture,
    shuffled_patches,
)

GREY = torch.tensor([0.5, 0.4, 0.3])
ALL = [*TRAINING, *HELD_OUT, OTHER]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def reference() -> Tensor:
    return noise_images(6, seed=7)


def test_held_out_families_are_never_trained_on() -> None:
    assert not set(HELD_OUT) & set(TRAINING)
    assert OTHER not in TRAINING and OTHER not in HELD_OUT
    assert set(FAMILIES) == set(ALL)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 21, 17), (3, 5, 40)])
def test_every_family_gives_pixels(family: str, shape: tuple[int, int, int]) -> None:
    source = torch.rand(4, *shape, generator=rng())
    out = FAMILIES[family](source, GREY[: shape[0]], rng(1))
    assert out.shape == source.shape and out.dtype == source.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, FAMILIES[family](source, GREY[: shape[0]], rng(1)))
    if family not in ("mean", OTHER):
        assert not torch.equal(out, FAMILIES[family](source, GREY[: shape[0]], rng(2)))


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("family", ALL)
def test_a_draw_does_not_depend_on_its_batch(family: str, with_reference: bool, reference: Tensor) -> None:
    x = noise_images(5)
    picks = torch.tensor([[0, 1], [3, 3], [2, 0], [7, 5], [1, 4]])
    together = Backgrounds(GREY, reference if with_reference else None, seed=4)
    out = together.draw(family, x, picks, purpose="certificate", pool=8)
    assert out.shape == (5, 2, 3, 16, 16)
    for b in (4, 0, 2):  # another order, another object
        alone = Backgrounds(GREY, reference if with_reference else None, seed=4)
        one = alone.draw(family, x[b : b + 1], picks[b : b + 1], purpose="certificate", pool=8)
        assert torch.equal(out[b], one[0])
    assert torch.equal(out, together.draw(family, x, picks + 8, purpose="certificate", pool=8))


@pytest.mark.parametrize("family", [f for f in ALL if f not in ("mean", OTHER)])
def test_another_number_purpose_or_seed_is_another_draw(family: str, reference: Tensor) -> None:
    x, one = noise_images(1), torch.tensor([[0]])
    draws = [
        Backgrounds(GREY, reference, seed).draw(family, x, one + number, purpose=purpose)
        for seed in (0, 1)
        for number in (0, 1, 15)
        for purpose in ("predicate", "certificate", "refine")
    ]
    for index, draw in enumerate(draws):
        assert not any(torch.equal(draw, other) for other in draws[:index])


def test_families_of_other_images_take_them_from_the_reference(reference: Tensor) -> None:
    x, picks = noise_images(2), torch.arange(16).repeat(2, 1)
    out = Backgrounds(GREY, reference).draw(OTHER, x, picks, purpose="certificate")
    members = [any(torch.equal(o, r) for r in reference) for o in out[0]]
    assert all(members)
    assert len({tuple(o.flatten().tolist()) for o in out[0]}) > 2
    small = Backgrounds(GREY, reference[:, :, :8, :8]).draw(OTHER, x, picks[:, :1], purpose="certificate")
    assert small.shape == (2, 1, 3, 16, 16)
    without = Backgrounds(GREY, None)
    assert [without.shared(f) for f in FROM_REFERENCE] == [False] * len(FROM_REFERENCE)
    assert Backgrounds(GREY, reference).shared("phase") and not without.shared("blur")


def test_phase_scrambling_keeps_the_amplitude_spectrum_and_the_mean() -> None:
    source = 0.5 + 0.1 * (torch.rand(2, 3, 16, 16, generator=rng()) - 0.5)  # far from clipping
    out = phase_scrambled(source, GREY, rng(1))
    torch.testing.assert_close(torch.fft.fft2(out).abs(), torch.fft.fft2(source).abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.mean((2, 3)), source.mean((2, 3)))
    assert not torch.allclose(out, source, atol=0.02)


def test_shuffled_patches_hold_the_same_pixels_elsewhere() -> None:
    source = torch.rand(2, 3, 16, 16, generator=rng())
    out = shuffled_patches(source, GREY, rng(1))
    assert torch.equal(out.flatten(2).sort(2).values, source.flatten(2).sort(2).values)
    assert not torch.equal(out, source)
    corner = out[0, :, :2, :2]  # a patch is 2×2 here, and moves as a whole
    places = [source[0, :, i : i + 2, j : j + 2] for i in range(0, 16, 2) for j in range(0, 16, 2)]
    assert any(torch.equal(corner, place) for place in places)


def test_blur_keeps_a_flat_image_and_calms_a_busy_one() -> None:
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(blurred(flat, GREY, rng()), flat)
    busy = torch.rand(1, 3, 64, 64, generator=rng())
    assert blurred(busy, GREY, rng()).std() < 0.25 * busy.std()


def test_flat_and_mean_are_one_colour_an_image() -> None:
    source = torch.rand(3, 3, 8, 8, generator=rng())
    flat = FAMILIES["flat"](source, GREY, rng(1))
    assert torch.equal(flat.amax((2, 3)), flat.amin((2, 3)))
    assert len(flat[:, 0, 0, 0].unique()) == 3
    assert torch.equal(FAMILIES["mean"](source, GREY, rng(1)), GREY.view(1, 3, 1, 1).expand(3, 3, 8, 8))


def test_a_mixture_draws_every_family_and_takes_other_images_from_the_batch() -> None:
    x = noise_images(64)
    assert torch.equal(random_mixture(x, GREY, rng(), (OTHER,)), x.roll(1, 0))
    out = random_mixture(x, GREY, rng())
    flat = (out.amax((2, 3)) == out.amin((2, 3))).all(1)
    mean = (out == GREY.view(1, 3, 1, 1)).flatten(1).all(1)
    # about a fifth each of 64: the mean colour, one flat colour, and the noisy families
    assert 5 <= int(mean.sum()) <= 24
    assert 5 <= int((flat & ~mean).sum()) <= 24
    assert 20 <= int((~flat).sum()) <= 54
    assert torch.equal(out, random_mixture(x, GREY, rng()))
    assert not torch.equal(out, random_mixture(x, GREY, rng(1)))
