"""Small members of every family of models: sites, edges and ablation, traced as a whole."""

from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from tiny_models import one_thread as one_thread
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from minexp.circuit.ablation import Ablation
from minexp.circuit.attribution import gradient_edges
from minexp.circuit.baseline import Baseline, make_baseline
from minexp.circuit.edges import exact_edges
from minexp.circuit.network import TracedNetwork, network
from minexp.classifier import Classifier

tv = torchvision.models


def mobilenet() -> nn.Module:
    settings = [
        InvertedResidualConfig(8, 3, 16, 8, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(8, 3, 24, 8, True, "HS", 1, 1, 1.0),
    ]
    return tv.MobileNetV3(settings, last_channel=16, num_classes=5)


def efficientnet() -> nn.Module:
    settings = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 12, 2)]
    return tv.EfficientNet(settings, dropout=0.0, num_classes=5)


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    config.num_labels = 5
    return transformers.ViTForImageClassification(config)


def hf_swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(config)


def hf_resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="bottleneck", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )


def swin() -> nn.Module:
    return tv.SwinTransformer([4, 4], 8, [2, 2], [2, 4], [4, 4], num_classes=5)


def densenet() -> nn.Module:
    return tv.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)


def convnext() -> nn.Module:
    return tv.ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 2)], num_classes=5)


def resnext() -> nn.Module:
    return tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=4)


# Kinds of sites there have to be, how many of each.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnext": (
        resnext,
        {"channel": 12, "neuron": 1},
    ),  # stem; two and a sum in each of four blocks, the last one at 1×1
    "densenet": (densenet, {"channel": 10}),  # stem, two a layer, transition
    "mobilenet_v3": (mobilenet, {"channel": 8, "neuron": 3, "gate": 2}),
    "efficientnet": (efficientnet, {"channel": 10, "neuron": 3, "gate": 3}),
    "convnext": (convnext, {"channel": 8, "neuron": 3}),
    "vit": (vit, {"channel": 1, "head": 2, "neuron": 2, "stream": 4}),
    "swin": (swin, {"channel": 1, "head": 4, "neuron": 5, "stream": 8}),
    "timm vit": (timm_vit, {"channel": 1, "head": 2, "neuron": 2, "stream": 4}),
    "hf vit": (hf_vit, {"channel": 1, "head": 2, "neuron": 2, "stream": 4}),
    "hf swin": (hf_swin, {"channel": 1, "head": 4, "neuron": 5, "stream": 8}),
    "hf resnet": (hf_resnet, {"channel": 7}),
}


def load(build: Callable[[], nn.Module]) -> Classifier:
    """The model in float64 with weights and statistics that leave no unit idle."""
    torch.manual_seed(0)
    model = build().double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return Classifier(model, size=32, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(autouse=True)
def _float64() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_edges_and_ablation(family: str) -> None:
    build, kinds = FAMILIES[family]
    classifier = load(build)
    net = network(classifier)
    assert isinstance(net, TracedNetwork), net.note
    assert Counter(site.kind for site in net.sites) == kinds
    assert all(net.parents(site.place) for site in net.sites[1:]) and not net.parents(net.sites[0].place)

    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        label = classifier.logits(x).argmax(1)
    baseline = make_baseline(net, "blank", reference=None, blank=torch.full((1, 3, 1, 1), 0.5))
    ablation = Ablation(net, x, label, baseline)
    with torch.no_grad():
        whole = classifier.logits(x).gather(1, label[:, None])[:, 0]
        nothing = classifier.logits(torch.full((1, 3, 32, 32), 0.5))[0, label]
    assert torch.allclose(ablation.full, whole)
    if all(
        site.ablated for site in net.sites
    ):  # where streams carry the image past the nodes, none is not blank
        assert torch.allclose(ablation.empty, nothing)

    # A source a little nearer to its baseline moves its targets by the derivative: the edges by gradient.
    step = 1e-5
    near = {
        site.place: (
            (1 - step) * ablation.values[site.place].unflatten(0, (-1, site.each))
            + step * baseline.values[site.place].unflatten(0, (-1, site.each))
        ).flatten(0, 1)[: site.each]
        for site in net.sites
    }
    alone = Ablation(net, x[:1], label[:1], baseline)
    moved = Ablation(net, x[:1], label[:1], Baseline("blank", near))
    generator = torch.Generator().manual_seed(2)
    chosen = {site: torch.randperm(site.units, generator=generator)[:4].sort().values for site in net.sites}
    slopes = gradient_edges(alone, 0, chosen)
    steps = exact_edges(moved, 0, chosen)
    assert [part.sources for part in slopes] == [part.sources for part in steps]
    a, b = (torch.cat([part.effect.flatten() for part in parts]) for parts in (slopes, steps))
    b = b / step
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert (a.abs() > 1e-9).float().mean() > 0.2
    # By gradient, normalisations keep their statistics, and a densenet's sources pass a ReLU on their way to a layer.
    if any(name in family for name in ("vit", "swin", "convnext", "densenet")):
        assert correlation > 0.9
    else:
        assert torch.allclose(a, b, atol=1e-3 * float(b.abs().max()))
