"""Every stage on architectures of torchvision, timm and transformers, with random weights and no layer named."""

import json
from collections.abc import Callable

import pytest
import torch
from tiny_models import one_thread, state  # noqa: F401
from torch import nn
from torch.utils.hooks import RemovableHandle

from minexp.certify import Predicate
from minexp.classifier import Classifier
from minexp.explanation import explain
from minexp.refine import Refinement
from minexp.training import fit

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
CLASSES = 5


def tv(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def tm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def hf(config: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(num_labels=CLASSES, **options)
        return transformers.AutoModelForImageClassification.from_config(settings)

    return build


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 4, 2, 32, 64, num_classes=CLASSES)


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


NARROW = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}

# model, input size, prefix tokens of the last tap, and for each tap its channels, height and width
MATRIX = {
    "residual": (tv("resnet18"), 64, 0, "64×32×32 64×16×16 128×8×8 256×4×4 512×2×2"),
    "plain": (tv("squeezenet1_1"), 64, 0, "64×31×31 128×15×15 256×7×7 384×3×3 512×3×3"),
    "depthwise": (tv("mobilenet_v3_small"), 64, 0, "16×32×32 16×16×16 24×8×8 48×4×4 576×2×2"),
    "shuffle": (tv("shufflenet_v2_x0_5"), 64, 0, "24×32×32 24×16×16 48×8×8 96×4×4 1024×2×2"),
    "squeeze and excite": (
        tv("efficientnet_b0"),
        64,
        0,
        "32×32×32 16×32×32 24×16×16 40×8×8 112×4×4 1280×2×2",
    ),
    "dense": (
        tm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
        64,
        0,
        "16×32×32 32×16×16 32×8×8 32×4×4 32×2×2",
    ),
    "grouped": (tv("regnet_y_400mf"), 48, 0, "32×24×24 48×12×12 104×6×6 208×3×3 440×2×2"),
    "inception": (tv("googlenet", init_weights=False), 64, 0, "64×32×32 192×16×16 480×8×8 832×4×4 1024×2×2"),
    "re-parametrised": (tm("repvgg_a0"), 64, 0, "48×32×32 48×16×16 96×8×8 192×4×4 1280×2×2"),
    "convnext": (tm("convnext_atto"), 64, 0, "40×16×16 40×16×16 80×8×8 160×4×4 320×2×2"),
    "convnext of transformers": (
        hf("ConvNextV2Config", hidden_sizes=[8, 16, 24], depths=[1, 2, 1], num_stages=3),
        48,
        0,
        "8×12×12 8×12×12 16×6×6 24×3×3",
    ),
    "vit of torchvision": (small_vit, 32, 1, " ".join(["32×4×4"] * 5)),
    "vit with registers": (
        tm("vit_small_patch14_reg4_dinov2", img_size=56, embed_dim=48, depth=4, num_heads=2),
        56,
        5,
        " ".join(["48×4×4"] * 5),
    ),
    "vit with registers of transformers": (
        hf("Dinov2WithRegistersConfig", image_size=56, patch_size=14, **NARROW),
        56,
        5,
        " ".join(["32×4×4"] * 5),
    ),
    "vit, not square": (
        tm("vit_tiny_patch16_224", img_size=(48, 80), embed_dim=48, depth=4, num_heads=2),
        (48, 80),
        1,
        " ".join(["48×3×5"] * 5),
    ),
    "distilled": (
        tm("deit_tiny_distilled_patch16_224", img_size=64, depth=4),
        64,
        2,
        " ".join(["192×4×4"] * 5),
    ),
    "beit": (
        tm("beit_base_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=2),
        64,
        1,
        " ".join(["48×4×4"] * 5),
    ),
    "beit of transformers": (
        hf("BeitConfig", image_size=64, patch_size=16, **NARROW),
        64,
        1,
        " ".join(["32×4×4"] * 5),
    ),
    "swin, not square": (
        tm("swin_tiny_patch4_window7_224", img_size=(32, 48), **SWIN),
        (32, 48),
        0,
        "16×8×12 16×8×12 16×8×12 32×4×6",
    ),
    "swin of torchvision": (small_swin, 32, 0, "16×8×8 16×8×8 16×8×8 32×4×4"),
    "swin of transformers": (
        hf("SwinConfig", image_size=32, patch_size=4, **SWIN),
        32,
        0,
        "16×8×8 16×8×8 32×4×4 32×4×4 32×4×4",
    ),
    "hybrid": (
        tm("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=48, depth=4, num_heads=2),
        64,
        1,
        "64×32×32 64×16×16 48×2×2 48×2×2 48×2×2",
    ),
    "mobilevit": (tm("mobilevit_xxs"), 64, 0, "16×32×32 16×32×32 24×16×16 48×8×8 64×4×4 320×2×2"),
    "pyramid": (tm("pvt_v2_b0"), 64, 0, "32×16×16 32×16×16 64×8×8 160×4×4 256×2×2"),
    "mixer": (tm("mixer_s32_224", img_size=64), 64, 0, " ".join(["512×2×2"] * 5)),
    "pooling": (tm("poolformer_s12"), 64, 0, "64×16×16 64×16×16 128×8×8 320×4×4 512×2×2"),
}


def conditioned(model: nn.Module, size: int | tuple[int, int]) -> nn.Module:
    """The model with the statistics of one batch in its norms and a head whose scores differ.

    Random weights alone let activations vanish, and tie all classes but for rounding.
    """
    x = torch.rand(8, 3, *(size if isinstance(size, tuple) else (size, size)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        heads = [m for m in model.modules() if getattr(m, "out_features", 0) == CLASSES]
        for head in heads or [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1:]:
            head.weight.normal_()
        output = model.eval()(x)
        spread = getattr(output, "logits", output).std()
        for head in heads:
            head.weight *= 2 / spread
    return model.train()


class Stop(Exception):
    """What a model of the user may throw."""


def failing(model: nn.Module, calls: int) -> RemovableHandle:
    """The model throws in its last block from that many calls on."""
    count = iter(range(calls))

    def stop(module: nn.Module, inputs: object) -> None:
        if next(count, None) is None:
            raise Stop

    return list(model.modules())[-1].register_forward_pre_hook(stop)


@pytest.mark.filterwarnings("ignore:the masks")
@pytest.mark.parametrize("name", MATRIX)
def test_every_stage(name: str) -> None:
    build, size, prefix, shapes = MATRIX[name]
    torch.manual_seed(0)
    model = conditioned(build(), size)
    before = state(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    classifier = Classifier(model, size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    x = torch.rand(2, *classifier.input_shape)

    _, features = classifier.features(x)
    maps = [layout.spatial(f) for layout, f in zip(classifier.layouts, features, strict=True)]
    assert " ".join("×".join(map(str, m.shape[1:])) for m in maps) == shapes
    assert classifier.layouts[-1].prefix == prefix

    masker = fit(classifier, x, steps=2, batch=2, progress=False)
    assert masker.metadata["steps"] == 2
    settings = {
        "effort": "refined",
        "refinement": Refinement(steps=4, check=2),
        "predicate": Predicate(draws=4),
    }
    explanation = explain(classifier, x, masker, **settings)
    for mask, certificate in zip(explanation.masks, explanation.certificates, strict=True):
        assert 0 <= certificate.area == pytest.approx(float(mask.float().mean()))
        assert certificate.kept and certificate.certified == (certificate.reason is None)
        assert certificate.robust_train_n == 20 and set(json.loads(certificate.families)) >= {"mean", "blur"}
    assert state(model) == before

    handle = failing(model, 3)
    with pytest.raises(Stop):
        explain(classifier, x, masker, **settings)
    handle.remove()
    assert state(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
