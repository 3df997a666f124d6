"""Models of torchvision, timm and transformers: their preprocessing is the libraries' own, and so are the labels."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_load_classifier import refused

from minexp.classifier import load_classifier
from minexp.data.preprocessing import Preprocessing
from minexp.zoos import ZOOS, ReversedChannels, _processor_settings


def photograph() -> Image.Image:
    """Smooth, so that resampling that differs by a hair does not differ by whole levels."""
    coarse = np.random.default_rng(0).integers(0, 256, (14, 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((500, 333), Image.Resampling.BICUBIC)


def same(settings: Preprocessing, theirs: Any) -> bool:
    """Do normalised model inputs [C,H,W] agree but for rounding, that is by two levels of 255 at the very most?"""
    image = photograph()
    ours = (settings.pixels(np.asarray(image)) / 255 - settings.mean) / settings.std
    levels = np.abs(ours.transpose(2, 0, 1) - np.asarray(theirs)) * 255 * max(settings.std)
    return bool(levels.max() < 2.2 and levels.mean() < 0.02)


def test_torchvision_models_bring_their_preprocessing_and_labels(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    safetensors.torch.save_file(models.resnet18(weights=None).state_dict(), tmp_path / "r.safetensors")
    classifier = load_classifier("torchvision:resnet18", weights=tmp_path / "r.safetensors")
    settings = classifier.preprocessing
    assert (settings.size, settings.resize, settings.interpolation) == ((224, 224), 256, "bilinear")
    assert settings.mean == (0.485, 0.456, 0.406)
    assert classifier.class_names[0] == "tench" and classifier.num_classes == 1000
    refused("torchvision:resnet19", "no classifier 'resnet19'; near: .*resnet18")
    refused("torchvision:resnet18", "--num-classes 1000", weights=tmp_path / "r.safetensors", num_classes=7)


def test_torchvision_imports_beside_a_torch_of_another_build(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    # A fresh process, without what conftest.py declares.
    code = (
        "from minexp.specs import build\n"
        "built = build('torchvision:resnet18', num_classes=None, pretrained=False, trust_model=False)\n"
        "print(len(built.class_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1000", done.stderr


def test_timm_models_bring_their_preprocessing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet18", pretrained=False, num_classes=6)
    torch.save(net.state_dict(), tmp_path / "t.pth")
    classifier = load_classifier("timm:resnet18", weights=tmp_path / "t.pth", num_classes=6)
    config = timm.data.resolve_model_data_config(net)
    assert classifier.preprocessing.mean == config["mean"]
    assert classifier.input_shape == config["input_size"]
    assert classifier.taps == ("act1", "layer1", "layer2", "layer3", "layer4")
    refused("timm:resnet_18", "timm has no model 'resnet_18'; near: .*resnet18")


def test_hugging_face_folders_bring_preprocessing_and_labels(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label={0: "cat", 1: "dog", 2: "eel"}
    )
    net = transformers.ResNetForImageClassification(config)
    net.save_pretrained(tmp_path / "net")
    (tmp_path / "net" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ConvNextImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": 56},
                "crop_pct": 0.875,
                "resample": 3,
                "do_normalize": True,
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [0.4, 0.5, 0.6],
            }
        )
    )
    classifier = load_classifier(f"hf:{tmp_path / 'net'}")
    assert classifier.class_names == ("cat", "dog", "eel")
    settings = classifier.preprocessing
    assert (settings.size, settings.resize, settings.interpolation) == ((56, 56), 64, "bicubic")
    assert settings.mean == (0.1, 0.2, 0.3)
    x = torch.rand(2, 3, 56, 56)
    logits, taps = classifier.features(x)
    normalised = (x - torch.tensor(settings.mean).view(3, 1, 1)) / torch.tensor(settings.std).view(3, 1, 1)
    torch.testing.assert_close(logits, net.eval()(normalised).logits)
    assert len(taps) >= 2
    refused(f"hf:{tmp_path / 'nothing'}", "could not be loaded")
    (tmp_path / "net" / "model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "net" / "pytorch_model.bin")
    refused(f"hf:{tmp_path / 'net'}", "could not be loaded.*safetensors")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "swin_t"])
def test_torchvision_preprocessing_is_that_of_its_transforms(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    built = ZOOS["torchvision"](name, None, False)
    theirs = models.get_model_weights(name).DEFAULT.transforms()(photograph())
    assert same(built.preprocessing, theirs)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224.fb_in1k",
        "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    ],
)
def test_timm_preprocessing_is_that_of_its_transforms(name: str) -> None:
    timm = pytest.importorskip("timm")
    built = ZOOS["timm"](name, None, False)
    config = timm.data.resolve_model_data_config(built.model)
    theirs = timm.data.create_transform(**config, is_training=False)(photograph())
    assert same(built.preprocessing, theirs)
    assert built.class_names[281] == "tabby"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ViT", {}),
        ("DeiT", {}),  # squashed, then cropped
        ("Beit", {}),
        ("ConvNext", {}),
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("EfficientNet", {}),  # divides by the deviation twice
        ("EfficientNet", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False}),
        ("CLIP", {}),
        ("Levit", {}),
        ("PoolFormer", {}),
        ("Pvt", {"do_rescale": False}),
        ("MobileNetV2", {"do_normalize": False}),
        ("MobileViT", {"size": {"shortest_edge": 288}}),
    ],
)
def test_hugging_face_preprocessing_is_that_of_its_processor(name: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{name}ImageProcessor")(**changes)
    theirs = processor(photograph(), return_tensors="np")["pixel_values"][0]
    if processor.to_dict().get("do_flip_channel_order"):
        theirs = theirs[::-1]
    settings = json.loads(processor.to_json_string())
    if name == "MobileViT":
        settings.pop("image_mean"), settings.pop("image_std")  # it has them and does not use them
    assert same(_processor_settings(settings), theirs)


def test_hugging_face_folders_without_a_processor_or_without_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        num_labels=3,
    )
    net = transformers.ViTForImageClassification(config)
    net.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no preprocessor_config.json; give --mean"):
        classifier = load_classifier(f"hf:{tmp_path}", mean=(0.5,) * 3)
    assert classifier.input_shape == (3, 32, 32)
    (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")
    refused(f"hf:{tmp_path}", "could not be loaded")
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        again = load_classifier(f"hf:{tmp_path}", weights=tmp_path / "mine.safetensors", mean=(0.5,) * 3)
    assert again.fingerprint == classifier.fingerprint


def test_models_that_take_blue_first_get_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    net = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    )
    net.save_pretrained(tmp_path)
    settings = {"size": {"height": 32, "width": 32}, "do_normalize": False, "do_flip_channel_order": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    classifier = load_classifier(f"hf:{tmp_path}")
    assert isinstance(classifier.model[0], ReversedChannels)  # type: ignore[index]
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier.logits(x), net.eval()(x.flip(1)).logits)
    other = load_classifier(f"hf:{tmp_path}", weights=tmp_path / "model.safetensors")
    assert other.fingerprint == classifier.fingerprint
