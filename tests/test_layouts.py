"""Where channels and positions are, worked out by hand for the layouts that models use."""

import pytest
import torch
from torch import nn

from minexp.errors import RequestError
from minexp.layouts import Layout, certain_grids, find_layout

CONV, NORM, ANY = nn.Conv2d(3, 4, 3), nn.LayerNorm(8), nn.Identity()


@pytest.mark.parametrize(
    ("module", "shape", "layout"),
    [
        (ANY, (2, 7), Layout("vector")),
        (ANY, (2, 16, 8, 12), Layout("channels_first", (8, 12))),
        (ANY, (2, 8, 12, 16), Layout("channels_last", (8, 12))),
        (ANY, (2, 8, 12, 12), Layout("channels_last", (8, 12))),
        (
            ANY,
            (2, 64, 16, 24),
            Layout("channels_first", (16, 24)),
        ),  # in proportion, though no convolution gave it
        (
            CONV,
            (2, 8, 12, 8),
            Layout("channels_last", (8, 12)),
        ),  # only one reading has the image's proportions
        (ANY, (2, 5, 7, 11), Layout("channels_first")),  # neither does: no grid
        (NORM, (2, 5, 7, 11), Layout("channels_last")),
        (ANY, (2, 96, 48), Layout("tokens", (8, 12), 0)),
        (ANY, (2, 97, 48), Layout("tokens", (8, 12), 1)),  # class token
        (ANY, (2, 101, 48), Layout("tokens", (8, 12), 5)),  # class token and four registers
        (ANY, (2, 26, 48), Layout("tokens", (4, 6), 2)),  # class and distillation token
        (ANY, (2, 48, 96), Layout("channels_first", (8, 12), 0)),  # tokens last
        (nn.Conv1d(3, 4, 1), (2, 96, 24), Layout("channels_first", (4, 6), 0)),
        (ANY, (2, 23, 48), Layout("tokens")),
        (ANY, (2, 3, 4, 8, 12), None),
    ],
)
def test_layouts_of_an_image_of_two_to_three(
    module: nn.Module, shape: tuple[int, ...], layout: Layout | None
) -> None:
    grids = {(8, 12), (4, 6)}
    assert find_layout(module, shape, grids, (64, 96)) == layout


def test_as_many_channels_as_rows() -> None:
    shape, grids = (2, 8, 8, 8), {(8, 8)}
    block = nn.Sequential(NORM, nn.Linear(8, 8))
    assert find_layout(block, shape, grids, (64, 64)) == Layout("channels_last", (8, 8))
    assert find_layout(nn.Sequential(CONV, NORM), shape, grids, (64, 64)) == Layout("channels_first", (8, 8))


def test_tokens_take_the_grid_with_the_fewest_prefix_tokens() -> None:
    assert find_layout(ANY, (2, 17, 48), {(4, 4), (2, 2)}, (64, 64)) == Layout("tokens", (4, 4), 1)
    # no convolution cut the patches: the proportions alone tell
    assert find_layout(ANY, (2, 15, 48), set(), (48, 80)) == Layout("tokens", (3, 5), 0)


def test_grids_come_from_convolutions_of_the_images_proportions() -> None:
    outputs = [
        (CONV, (2, 4, 16, 24)),
        (CONV, (2, 4, 4, 96)),  # over tokens, folded in another way
        (NORM, (2, 4, 32, 48)),  # a norm says nothing about its axes
    ]
    assert certain_grids(outputs, (64, 96)) == {(16, 24), (8, 12), (4, 6), (2, 3)}
    assert certain_grids(outputs[1:], (64, 96)) == {(4, 96), (2, 48), (1, 24), (1, 12)}
    assert (9, 10) in certain_grids([(CONV, (2, 4, 17, 20))], (67, 80))  # halved upwards, as with padding


def test_arranged_features_put_channels_second_and_maps_lose_the_prefix() -> None:
    maps = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    last = Layout("channels_last", (4, 5)).arrange(maps.permute(0, 2, 3, 1))
    assert torch.equal(last, maps)
    tokens = torch.cat([torch.full((2, 2, 3), -1), maps.flatten(2).transpose(1, 2)], 1)
    layout = Layout("tokens", (4, 5), prefix=2)
    feature = layout.arrange(tokens)
    assert feature.shape == (2, 3, 22)
    assert torch.equal(layout.spatial(feature), maps)
    assert torch.equal(Layout("channels_first", (4, 5)).spatial(maps), maps)
    with pytest.raises(RequestError, match=r"\[2, 3, 21\] has no grid"):
        layout.spatial(feature[..., 1:])
    with pytest.raises(RequestError, match="no grid"):
        Layout("tokens").spatial(feature)
