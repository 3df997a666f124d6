"""Architecture families, each exported, checked and compared with torch at every batch size."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from tiny_models import one_thread  # noqa: F401
from torch import nn

from minexp.classifier import Classifier
from minexp.deploy.export import Draft
from minexp.deploy.networks import classifier_network, masker_network
from minexp.deploy.runtime import Explainer, open_session
from minexp.masker import Architecture, Masker
from minexp.predicate import Predicate

SIZE, CLASSES = 32, 7


def torchvision_model(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=CLASSES, **options)

    return build


def timm_model(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return build


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 16, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 1)]
    return EfficientNet(blocks, dropout=0.1, num_classes=CLASSES)


VIT = {"img_size": SIZE, "patch_size": 8, "depth": 2}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ResNet": timm_model("resnet10t"),
    "MobileNet (depthwise)": timm_model("mobilenetv3_small_050"),
    "EfficientNet (squeeze-excitation)": efficientnet,
    "DenseNet": torchvision_model("DenseNet", growth_rate=8, block_config=(2, 2, 2), num_init_features=16),
    "ShuffleNet (channel shuffle)": torchvision_model("shufflenet_v2_x0_5"),
    "ConvNeXt (layer norm)": timm_model("convnext_atto", depths=(1, 1, 1, 1)),
    "ViT": timm_model("vit_tiny_patch16_224", **VIT),
    "ViT with registers": timm_model("vit_small_patch14_reg4_dinov2", **VIT),
    "DeiT distilled": timm_model("deit_tiny_distilled_patch16_224", **VIT),
    "Swin (windows)": torchvision_model(
        "SwinTransformer",
        patch_size=[2, 2],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
    ),
}


def masker() -> Masker:
    """Random weights whose mask is about half of the pixels."""
    torch.manual_seed(1)
    m = Masker(Architecture())
    nn.init.normal_(m.head.weight, std=0.5)
    nn.init.constant_(m.head.bias, 0.45)
    m.reference = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    return m.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_exports_and_agrees_with_torch(family: str, tmp_path) -> None:
    torch.manual_seed(0)
    classifier = Classifier(FAMILIES[family](), size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.no_grad():  # scores far enough apart that a decision is one
        for parameter in list(classifier.model.parameters())[-2:]:
            parameter.mul_(4)
    model = classifier_network(classifier)
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString(), "cpu", 1, family)
    x = torch.rand(33, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = classifier.probabilities(x).numpy()
    for batch in range(1, 34):
        scores = session.run(None, {"x": x[:batch].numpy()})[0].astype(np.float64)
        p = np.exp(scores - scores.max(1, keepdims=True))
        assert np.abs(p / p.sum(1, keepdims=True) - wanted[:batch]).max() <= 1e-4

    # the explainer around it: torch's masks and certificates, at batches of one and of many
    draft = Draft.make(classifier, masker(), Predicate(draws=4), "mean", 0)
    pixels = (x[:9] * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    content, _, parity = draft.checked((_masker_network(), model), pixels, draft.torch(pixels))
    assert parity.exact and parity.images == 9
    path = tmp_path / "explainer.onnx"
    path.write_bytes(content)
    explainer = Explainer(path, trusted=True)
    whole = explainer.explain(pixels)
    for place in (0, 8):
        assert np.array_equal(explainer.explain(pixels[place : place + 1]).masks[0], whole.masks[place])


_made: list[onnx.ModelProto] = []


def _masker_network() -> onnx.ModelProto:
    if not _made:
        _made.append(masker_network(masker(), (SIZE, SIZE)))
    return _made[0]


def test_the_maskers_mask_is_torchs_at_every_batch() -> None:
    session, m = open_session(_masker_network().SerializeToString(), "cpu", 1, "masker"), masker()
    x = torch.rand(33, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    p = m.probabilities(x).numpy()
    assert 0.2 < (p > 0.5).mean() < 0.8
    for batch in range(1, 34):
        logits = session.run(None, {"x": x[:batch].numpy()})[0]
        assert np.array_equal(logits > 0, p[:batch] > 0.5)
        assert np.abs(1 / (1 + np.exp(-logits)) - p[:batch]).max() <= 1e-4
