"""The automatic choice of layers, their layouts and the hooks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minexp.classifier import Classifier
from minexp.errors import RequestError
from minexp.tracing import hooked


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def test_a_plain_cnn_is_tapped_at_its_stem_and_at_the_end_of_each_resolution() -> None:
    assert Classifier(small_cnn(), size=16).taps == ("1", "3", "6")


@pytest.mark.parametrize(
    ("name", "taps", "resolutions"),
    [
        ("resnet18", ("relu", "layer1", "layer2", "layer3", "layer4"), [48, 24, 12, 6, 3]),
        (
            "mobilenet_v3_small",
            ("features.0", "features.1", "features.3", "features.8", "features"),
            [48, 24, 12, 6, 3],
        ),
        (
            "mobilenet_v2",
            ("features.0", "features.1", "features.3", "features.6", "features.13", "features"),
            [48, 48, 24, 12, 6, 3],
        ),
        (
            "densenet121",
            (
                "features.relu0",
                "features.denseblock1",
                "features.denseblock2",
                "features.denseblock3",
                "features",
            ),
            [48, 24, 12, 6, 3],
        ),
        (
            "efficientnet_b0",
            ("features.0", "features.1", "features.2", "features.3", "features.5", "features"),
            [48, 48, 24, 12, 6, 3],
        ),
    ],
)
def test_automatic_taps_of_known_models(name: str, taps: tuple[str, ...], resolutions: list[int]) -> None:
    models = pytest.importorskip("torchvision.models")
    classifier = Classifier(getattr(models, name)(weights=None), size=96)
    assert classifier.taps == taps
    _, features = classifier.features(torch.rand(2, 3, 96, 96))
    assert [feature.shape[2] for feature in features] == resolutions
    assert all(feature.shape[0] == 2 for feature in features)


class Residual(nn.Module):
    """Two stages of blocks, their ReLUs functional or one module used everywhere."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 12, 3, 2, 1)
        self.conv4 = nn.Conv2d(12, 12, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 3)
        self.functional = functional

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True) if self.functional else self.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x))
        x = self.act(self.conv2(x) + x)
        x = self.act(self.conv3(x))
        x = self.act(self.conv4(x) + x)
        return self.head(x.mean((2, 3)))


def test_a_module_used_again_is_tapped_at_one_of_its_calls() -> None:
    classifier = Classifier(Residual(functional=False), size=16)
    assert classifier.taps == ("relu@1", "relu@2", "relu@4")
    x = torch.rand(2, 3, 16, 16)
    scores, (first, second, last) = classifier.features(x)
    model = classifier.model
    with torch.no_grad():
        torch.testing.assert_close(first, model.conv1(x).relu())
        torch.testing.assert_close(second, (model.conv2(first) + first).relu())
        torch.testing.assert_close(model.head(last.mean((2, 3))), scores)
    _, (ending,) = Classifier(model, size=16, taps=["relu"]).features(x)
    assert torch.equal(ending, last)
    with pytest.raises(RequestError, match="'relu@5' gives no"):
        Classifier(model, size=16, taps=["relu@5"])


def test_functional_in_place_activations_leave_what_is_tapped_as_it_was() -> None:
    classifier = Classifier(Residual(functional=True), size=16)
    assert classifier.taps == ("conv1", "conv3")
    x = torch.rand(2, 3, 16, 16)
    _, (first, third) = classifier.features(x)
    model = classifier.model
    torch.testing.assert_close(first, model.conv1(x))
    assert (first < 0).any() and (third < 0).any()


def test_prefix_tokens_are_found_and_left_out_of_maps() -> None:
    timm = pytest.importorskip("timm")
    narrow = {"embed_dim": 48, "depth": 4, "num_heads": 2, "num_classes": 3}
    for name, size, prefix in (
        ("vit_tiny_patch16_224", (48, 80), 1),
        ("deit_tiny_distilled_patch16_224", (64, 64), 2),
        ("vit_small_patch14_reg4_dinov2", (56, 84), 5),
        ("vit_base_patch16_siglip_gap_224", (64, 64), 0),
    ):
        model = timm.create_model(name, pretrained=False, img_size=size, **narrow)
        classifier = Classifier(model, size=size)
        assert classifier.taps == ("patch_embed", "blocks.0", "blocks.1", "blocks.2", "blocks")
        layout = classifier.layouts[-1]
        assert (layout.kind, layout.prefix) == ("tokens", model.num_prefix_tokens) == ("tokens", prefix)
        assert layout.grid == model.patch_embed.grid_size
        _, features = classifier.features(torch.rand(2, 3, *size))
        wanted = model.eval().forward_intermediates(torch.zeros(2, 3, *size), intermediates_only=True)[-1]
        assert layout.spatial(features[-1]).shape == wanted.shape


def test_branches_that_run_in_parallel_to_the_end_are_tapped_as_they_come() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.ReLU())
            self.coarse = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU())
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.fine(x).mean((2, 3)), self.coarse(x).mean((2, 3))], 1))

    assert Classifier(Branches(), size=16).taps == ("fine", "coarse")


def test_an_unknown_tap_lists_near_names() -> None:
    with pytest.raises(RequestError, match="no layer 'stage.convv1'.*near:.*stage.conv1"):
        model = nn.Sequential()
        model.add_module("stage", nn.Sequential())
        model.stage.add_module("conv1", nn.Conv2d(3, 4, 3))
        model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
        Classifier(model, size=8, taps=["stage.convv1"])
    with pytest.raises(RequestError, match="tapped twice"):
        Classifier(small_cnn(), size=16, taps=["1", "1"])


class Tokens(nn.Module):
    """Patches as tokens [B, N, D] (or as [B, H, W, D]), as transformers lay them out."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, 4)
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = self.block(x.permute(0, 2, 3, 1) if self.maps else x.flatten(2).transpose(1, 2))
        return self.head(x.flatten(1, -2).mean(1))


@pytest.mark.parametrize(("maps", "shape"), [(False, (2, 6, 16)), (True, (2, 6, 4, 4))])
def test_channels_come_second_in_every_layout(maps: bool, shape: tuple[int, ...]) -> None:
    model = Tokens(maps)
    x = torch.rand(2, 3, 16, 16)
    _, (feature,) = Classifier(model, size=16, taps=["block"]).features(x)
    assert feature.shape == shape
    wanted = model.block(model.patch(x).flatten(2).transpose(1, 2))[:, 5]
    torch.testing.assert_close(feature.flatten(2)[:, :, 5], wanted)


def test_a_model_without_maps_is_tapped_at_its_hidden_layers() -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2))
    assert Classifier(mlp, size=4).taps == ("1", "2")
    with pytest.raises(RequestError, match="taps="):
        Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), size=4)


def test_hooks_go_when_the_body_throws_and_when_a_name_is_wrong() -> None:
    model = small_cnn()
    with pytest.raises(ValueError, match="inside"), hooked(model, ["0", "1"], lambda name, output: None):
        assert len(model[0]._forward_hooks) == len(model[1]._forward_hooks) == 1
        raise ValueError("inside")
    with pytest.raises(AttributeError), hooked(model, ["0", "nothing"], lambda name, output: None):
        pass
    assert not any(module._forward_hooks for module in model.modules())
