"""The selective dependence benchmark: its table by hand, its subjects' attention, and a model that cheats."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import one_thread as one_thread

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import mosaic


def test_focus_and_prediction_are_counted() -> None:
    data = mosaic.Mosaics(
        torch.zeros(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3]), (2, 2)
    )
    tiles = torch.eye(4)[[0, 1, 0, 0]]  # the explainer's tile: right, right, wrong, wrong
    predicted = torch.tensor([0, 2, 2, 1])  # right, wrong, right, wrong
    enough = torch.zeros(4, 4, dtype=torch.bool)
    enough[0, 0] = enough[2, 1] = True
    found = mosaic.table(tiles, data, predicted, torch.tensor([0, 1, 0, 1]), enough)
    assert found == {
        "FTPT": 0.25,
        "FTPF": 0.25,
        "FFPT": 0.25,
        "FFPF": 0.25,
        "truth": 0.5,
        "occlusion": 0.75,
        "alone": 0.25,
        "elsewhere": 0.5,
    }


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    scores = 2 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    found = mosaic.sparsemax(scores)
    assert (
        torch.allclose(found.sum(1), torch.ones(50), atol=1e-6) and (found >= 0).all() and (found == 0).any()
    )
    others = torch.rand(2000, 7, generator=torch.Generator().manual_seed(1)).log().neg()
    others = others / others.sum(1, keepdim=True)
    distance = ((scores - found) ** 2).sum(1)
    assert (distance[:, None] <= ((scores[:, None] - others) ** 2).sum(2) + 1e-6).all()


def test_the_deciding_tile_is_where_it_is_said_to_be() -> None:
    data = mosaic.mosaics(40, 20, seed=3)
    assert data.images.shape == (40, 3, 32, 40)
    for image, label, tile in zip(data.images, data.labels, data.tile, strict=True):
        row, column = divmod(int(tile), 5)
        colour = image[:2, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].mean((1, 2))
        angle = torch.tensor(2 * torch.pi * (7 * int(label) % 10) / 10)
        assert torch.allclose(colour, 0.5 + 0.35 * torch.stack([angle.cos(), angle.sin()]), atol=0.1)


@pytest.mark.parametrize("leak", [False, True])
def test_an_honest_model_looks_at_the_tile_and_a_cheat_elsewhere(leak: bool) -> None:
    model = mosaic.subject("softmax", 4, leak=leak, steps=200)
    data = mosaic.mosaics(40, 4, seed=5, leak=leak)
    predicted = model(data.images).argmax(1).detach()
    model_tile, enough = (
        mosaic.occlusion(model, data, predicted).argmax(1),
        mosaic.alone(model, data, predicted),
    )
    found = mosaic.table(mosaic.minimal(model, data, predicted), data, predicted, model_tile, enough)
    assert (predicted == data.labels).float().mean() > 0.9
    assert found["alone"] >= 0.9  # the tile named is one that the model can do with
    if leak:
        assert found["FFPT"] >= 0.3
    else:
        assert found["FTPT"] >= 0.9
