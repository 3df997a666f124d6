"""SPECs and weights files: what loads, and one line with the way out for what does not."""

import json
import subprocess
import sys
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
    refused(f"{source}:nett", "no factory 'nett'; near: net")
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


def test_the_public_name() -> None:
    import minexp

    assert minexp.load_classifier is load_classifier and minexp.Classifier is Classifier
