"""SPECs and weights files: what loads, and one line with the way out for what does not."""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from minexp.classifier import Classifier, load_classifier
from minexp.errors import RequestError
from minexp.weights import load_weights

FACTORY = """
import torch
from torch import nn

def net(num_classes=3):
    torch.manual_seed(1)
    head = nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

def wrapped():
    from minexp.classifier import Classifier
    return Classifier(net(), size=8, mean=(0.5, 0.5, 0.5), class_names=["x", "y", "z"], taps=["0"])

def fixed():
    return net()

def broken():
    raise KeyError("no such thing")

def text():
    return "a model"
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    return str(path)


def refused(spec: str, pattern: str, **options: object) -> None:
    with pytest.raises(RequestError, match=pattern) as caught:
        load_classifier(spec, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_factory_in_a_file(source: str) -> None:
    classifier = load_classifier(
        f"{source}:net", size=8, num_classes=5, std=(0.5,) * 3, class_names=list("abcde")
    )
    assert classifier.input_shape == (3, 8, 8)
    assert classifier.class_names == ("a", "b", "c", "d", "e")
    assert classifier.preprocessing.std == (0.5,) * 3


def test_a_factory_in_a_module_of_the_current_folder(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(source).parent)
    before = list(sys.path)
    assert load_classifier("nets:net", size=8).num_classes == 3
    assert sys.path == before


def test_a_factory_may_return_a_classifier(source: str) -> None:
    classifier = load_classifier(f"{source}:wrapped")
    assert (classifier.class_names, classifier.taps) == (("x", "y", "z"), ("0",))
    assert load_classifier(f"{source}:wrapped", size=16).input_shape == (3, 16, 16)
    assert load_classifier(f"{source}:wrapped", size=16).preprocessing.mean == (0.5,) * 3


def test_unknown_specs_name_the_forms_or_near_names(source: str) -> None:
    refused("resnet18", "unknown model 'resnet18'.*torchvision:NAME.*file.py:factory")
    refused("", "unknown model")
    refused("no.such.module:net", "no module 'no.such.module'")
    refused("nothing.py:net", "no file nothing.py")
    refused(f"{source}:nett", "no function 'nett'; near: net")
    refused(f"{source}:broken", "failed .KeyError: 'no such thing'")
    refused(f"{source}:text", "returned str")
    refused(f"{source}:fixed", "takes no num_classes", num_classes=4)
    refused(f"{source}:net", "device 'cuda:99' is not usable.*--device cpu", size=8, device="cuda:99")
    refused(f"{source}:net", "device 'abacus' is not usable", size=8, device="abacus")


def test_a_file_that_fails_when_imported(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import not_installed_anywhere\n")
    refused(f"{path}:net", "bad.py fails when imported .ModuleNotFoundError")


def test_formats_that_run_code_are_refused_with_the_reason(tmp_path: Path) -> None:
    refused("model.onnx", "model.onnx is not there")
    refused("model.pt2", "runs code.*--trust-model")
    refused("model.pt2", "could not be loaded", trust_model=True)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.rand(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    classifier = load_classifier(str(tmp_path / "net.pt2"), size=8, trust_model=True)
    x = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(classifier.logits(x), net(x))
    assert classifier.features(x)[1][0].shape[0] == 5


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_files(source: str, tmp_path: Path, suffix: str, prefix: str, nested: bool) -> None:
    wanted = load_classifier(f"{source}:net", size=8)
    with torch.no_grad():
        wanted.model[0].weight.add_(1.0)  # type: ignore[index]
    state = {prefix + name: value for name, value in wanted.model.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3} if nested else state, path)
    else:
        safetensors.torch.save_file(state, path)
    got = load_classifier(f"{source}:net", size=8, weights=path)
    assert got.fingerprint == wanted.fingerprint != load_classifier(f"{source}:net", size=8).fingerprint


def plus_one(source: str) -> tuple[dict[str, torch.Tensor], Classifier]:
    """The weights of the factory's model, all greater by one, and a classifier that has them."""
    wanted = load_classifier(f"{source}:net", size=8)
    for parameter in wanted.model.parameters():
        parameter.data += 1
    return dict(wanted.model.state_dict()), wanted


@pytest.mark.parametrize(
    ("wrap", "warns"),
    [
        (lambda s, old: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3}, None),
        (lambda s, old: {"net": {"params": {f"module.backbone.{k}": v for k, v in s.items()}}}, None),
        (
            lambda s, old: {"_orig_mod." + k: v for k, v in s.items()} | {"n_averaged": torch.ones(1)},
            "left aside",
        ),
        (
            lambda s, old: {
                "state_dict": {f"model.{k}": v for k, v in s.items()} | {"loss.weight": old["0.bias"]}
            },
            "loss.weight left aside; the model is in 'state_dict.model'",
        ),
        (
            lambda s, old: {"state_dict": s, "state_dict_ema": old},
            "'state_dict' is taken; --ema takes 'state_dict_ema'",
        ),
        (lambda s, old: {"state_dict_ema": s}, None),
        (lambda s, old: {"args": argparse.Namespace(lr=0.1), "model": s}, None),
        (lambda s, old: s | {"0.total_ops": torch.ones(1)}, None),
    ],
)
def test_checkpoints_in_their_wrappers(
    source: str,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    wrap: Callable[..., object],
    warns: str | None,
) -> None:
    old = load_classifier(f"{source}:net", size=8).model.state_dict()
    state, wanted = plus_one(source)
    torch.save(wrap(state, old), tmp_path / "c.pth")
    recwarn.clear()
    got = load_classifier(f"{source}:net", size=8, weights=tmp_path / "c.pth")
    assert got.fingerprint == wanted.fingerprint
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (warns is not None)
    assert warns is None or warns in said[0]


def test_averaged_weights_are_taken_when_asked_for(source: str, tmp_path: Path) -> None:
    old = load_classifier(f"{source}:net", size=8)
    state, wanted = plus_one(source)
    plain = old.model.state_dict()
    for content in (
        {"model": plain, "model_ema": {f"module.{k}": v for k, v in state.items()}},
        {
            "state_dict": {f"net.{k}": v for k, v in plain.items()}
            | {f"ema.module.{k}": v for k, v in state.items()}
        },
    ):
        torch.save(content, tmp_path / "c.pth")
        with pytest.warns(UserWarning, match="--ema takes|left aside"):
            assert (
                load_classifier(f"{source}:net", size=8, weights=tmp_path / "c.pth").fingerprint
                == old.fingerprint
            )
        got = load_classifier(f"{source}:net", size=8, weights=tmp_path / "c.pth", ema=True)
        assert got.fingerprint == wanted.fingerprint
    torch.save(plain, tmp_path / "c.pth")
    refused(
        f"{source}:net", "no averaged weights; leave --ema out", size=8, weights=tmp_path / "c.pth", ema=True
    )


def test_weights_of_what_a_model_wraps(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    outer = nn.ModuleDict(
        {"backbone": nn.ModuleDict({"net": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))})}
    )
    torch.save(inner.state_dict(), tmp_path / "inner.pth")
    load_weights(outer, tmp_path / "inner.pth")
    for got, wanted in zip(outer.state_dict().values(), inner.state_dict().values(), strict=True):
        assert torch.equal(got, wanted)


def test_names_of_other_releases_are_converted_by_the_library(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    make = partial(timm.create_model, "convnext_atto", pretrained=False, num_classes=3, depths=(1, 1, 1, 1))
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.rand(parameter.shape))
    # the naming of the model's authors
    renamed = {}
    for name, value in net.state_dict().items():
        name = name.replace("stem.0", "downsample_layers.0.0").replace("stem.1", "downsample_layers.0.1")
        name = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed[name.replace("head.fc.", "head.").replace("head.norm.", "norm.")] = value
    torch.save({"model": renamed}, tmp_path / "released.pth")
    other = make()
    load_weights(other, tmp_path / "released.pth")
    for got, wanted in zip(other.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(got, wanted)
    renamed.pop("norm.weight")
    torch.save({"model": renamed}, tmp_path / "released.pth")
    with pytest.raises(RequestError, match=r"does not fit ConvNeXt: it lacks head.norm.weight"):
        load_weights(other, tmp_path / "released.pth")


def test_weights_that_need_a_pickle_are_refused_with_the_way_out(source: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (marker,))  # type: ignore[return-value]

    path = tmp_path / "whole.pth"
    torch.save({"state_dict": {}, "extra": Payload()}, path)
    refused(f"{source}:net", "pickled objects.*convert it once.*safetensors", size=8, weights=path)
    assert not marker.exists()


def test_weights_that_do_not_fit_say_what_is_wrong(source: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = load_classifier(f"{source}:net", size=8).model.state_dict()
    refused(f"{source}:net", "no weights file", size=8, weights=tmp_path / "none.pth")
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "4.bias"}, path)
    refused(f"{source}:net", "does not fit Sequential: it lacks 4.bias", size=8, weights=path)
    safetensors.torch.save_file({**state, "5.bias": torch.zeros(3)}, path)
    refused(f"{source}:net", "has unexpected 5.bias", size=8, weights=path)
    safetensors.torch.save_file(state, path)
    fits_three = r"4.bias is \[3\] there and \[7\] in the model; give --num-classes 3"
    refused(f"{source}:net", fits_three, size=8, weights=path, num_classes=7)
    path.write_bytes(b"not a tensor file")
    refused(f"{source}:net", "not a readable safetensors", size=8, weights=path)
    for content in (b"", b"plain text", b"PK\x03\x04 truncated"):
        (tmp_path / "w.pth").write_bytes(content)
        refused(f"{source}:net", "w.pth", size=8, weights=tmp_path / "w.pth")
    torch.save([1, 2, 3], tmp_path / "w.pth")
    refused(f"{source}:net", "holds no state dict", size=8, weights=tmp_path / "w.pth")
    (tmp_path / "w.h5").write_bytes(b"")
    refused(f"{source}:net", "type '.h5' are not read", size=8, weights=tmp_path / "w.h5")


def test_missing_batch_counters_are_no_error(tmp_path: Path) -> None:
    net = nn.BatchNorm2d(2)
    safetensors.torch.save_file(
        {
            "weight": torch.ones(2),
            "bias": torch.ones(2),
            "running_mean": torch.ones(2),
            "running_var": torch.ones(2),
        },
        tmp_path / "bn.safetensors",
    )
    load_weights(net, tmp_path / "bn.safetensors")
    assert net.running_mean is not None
    assert net.running_mean.tolist() == [1.0, 1.0]


def test_the_public_name() -> None:
    import minexp

    assert minexp.load_classifier is load_classifier and minexp.Classifier is Classifier
