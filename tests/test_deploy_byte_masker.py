"""The masker in 8 bits: the same function in a form that ONNX Runtime computes in integers from the image on."""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from deployed import images
from tiny_models import one_thread  # noqa: F401
from torch import Tensor, nn
from trained_tiles import masker as trained

from minexp.deploy import byte_masker
from minexp.deploy.byte_masker import ByteMasker, byte_values, widened
from minexp.deploy.networks import masker_network, quantised_masker
from minexp.deploy.runtime import open_session
from minexp.masker import Architecture, Masker

SIZES = [(32, 32), (33, 47), (17, 18), (24, 31), (40, 20)]  # odd ones, and each rest of a division by 8


def trained_like(architecture: Architecture) -> Masker:
    """With statistics in its normalisations and weights in its head."""
    torch.manual_seed(0)
    masker = Masker(architecture).eval()
    for module in masker.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    nn.init.normal_(masker.head.weight, std=0.1)
    return masker


def pictures(count: int, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Smooth, uint8 [N,H,W,C], every byte from 0 to 255 likely."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.3
    x = F.interpolate(coarse, size=size, mode="bilinear").clamp(0, 1)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@cache
def in_bytes(architecture: Architecture) -> onnx.ModelProto:
    return quantised_masker(trained_like(architecture), pictures(16, architecture.channels, (32, 32)))


def floats(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


ARCHITECTURES = [
    Architecture(),
    Architecture(stride=4),
    Architecture(channels=1, stride=4),
    Architecture(channels=1),
    Architecture(channels=4, widths=(8, 8, 20)),
    Architecture(channels=9, widths=(20, 24, 32), stride=4),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_the_function_is_the_maskers(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a border of exactly the masker's grey, to rounding; with the nearest byte, but for half a byte there."""
    masker = trained_like(architecture)
    for size in SIZES:
        pixels = pictures(2, architecture.channels, size)
        expected = masker.grid(floats(pixels))
        for origin, tolerance in ((127.5, 2e-5), (128, 2e-2)):
            monkeypatch.setattr(byte_masker, "ORIGIN", origin)
            given = ByteMasker(masker).eval()(torch.from_numpy(byte_values(pixels)))
            assert given.shape == expected.shape
            assert (given - expected).abs().max() < tolerance * expected.std()


def test_new_channels_change_nothing() -> None:
    masker = trained_like(Architecture(widths=(6, 12, 20)))
    wide, x = widened(masker), floats(pictures(2, 3, (24, 24)))
    assert wide.architecture.widths == (16, 16, 20) and not wide.training
    torch.testing.assert_close(wide(x), masker(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES[:3], ids=str)
def test_integers_from_the_image_to_the_head(architecture: Architecture, tmp_path) -> None:
    """After ONNX Runtime's fusions nothing but the head multiplies floats, and each layer has whole vectors."""
    model = in_bytes(architecture)
    assert {opset.domain for opset in model.opset_import} == {""}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "fused.onnx").graph
    kinds = [node.op_type for node in graph.node]
    layers = sum(isinstance(module, nn.Conv2d) for module in Masker(architecture).modules())
    assert kinds.count("QLinearConv") == layers - 1 and kinds.count("ConvTranspose") == 1
    assert "Conv" not in kinds and "BatchNormalization" not in kinds
    assert "QuantizeLinear" not in kinds[: kinds.index("QLinearConv")]
    assert kinds.count("QLinearAdd") == len(architecture.widths) - 1
    assert kinds.count("DequantizeLinear") == len(architecture.widths), (
        "one before each enlargement, one for the head"
    )
    sides = {tensor.name: tensor.dims for tensor in graph.initializer}
    assert min(sides[node.input[3]][0] for node in graph.node if node.op_type == "QLinearConv") >= 16


@pytest.mark.parametrize("architecture", ARCHITECTURES[:3], ids=str)
def test_eight_bits_stay_near_float(architecture: Architecture) -> None:
    masker = trained_like(architecture)
    session = open_session(in_bytes(architecture).SerializeToString(), "cpu", 1, "masker")
    for size in SIZES:
        pixels = pictures(5, architecture.channels, size)
        expected = masker(floats(pixels)).detach().numpy()
        (logits,) = session.run(None, {"x": pixels})
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() < 0.25 * expected.std()
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.998
        alone = np.concatenate([session.run(None, {"x": pixels[i : i + 1]})[0] for i in range(5)])
        np.testing.assert_array_equal(alone, logits)


def test_a_trained_maskers_masks_stay() -> None:
    model = quantised_masker(trained(), images(32))
    session = open_session(model.SerializeToString(), "cpu", 1, "masker")
    given = session.run(None, {"x": images()})[0][:, 0] > 0
    expected = trained().probabilities(floats(images()))[:, 0].numpy() > 0.5
    assert 0.02 < expected.mean() < 0.98
    assert (given != expected).mean() < 0.02


@pytest.mark.parametrize("stride", [2, 4])
def test_float32_is_any_size_and_enlarged_as_torch_does(stride: int) -> None:
    masker = trained_like(Architecture(stride=stride))
    session = open_session(masker_network(masker, (24, 24)).SerializeToString(), "cpu", 1, "masker")
    for size in SIZES:
        x = floats(pictures(3, 3, size))
        (logits,) = session.run(None, {"x": x.contiguous().numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), masker(x), atol=2e-5, rtol=1e-5)
