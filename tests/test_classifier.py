"""Classifier: what it computes, and that the user's model is untouched afterwards."""

import pytest
import torch
from torch import Tensor, nn

from minexp.classifier import Classifier
from minexp.data.preprocessing import Preprocessing
from minexp.errors import RequestError


class Net(nn.Module):
    """Stem, two stages and a head; throws on request."""

    def __init__(self, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU())
        self.fc = nn.Linear(8, classes)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.relu(self.bn1(self.conv1(x)))))
        if self.fail:
            raise ValueError("broken on purpose")
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().train()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_logits_are_the_models_own_in_eval_mode_on_normalised_pixels(model: Net) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    classifier = Classifier(model, mean=mean, std=std, size=16)
    x = torch.rand(5, 3, 16, 16)
    got = classifier.logits(x)
    model.eval()
    wanted = model((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(classifier.probabilities(x), wanted.softmax(1))
    torch.testing.assert_close(classifier.features(x)[0], wanted)


def test_features_are_the_tapped_outputs(model: Net) -> None:
    classifier = Classifier(model, size=16, taps=["conv1", "bn1", "relu", "stage2", "fc"])
    x = torch.rand(3, 3, 16, 16)
    logits, taps = classifier.features(x)
    assert [tuple(tap.shape) for tap in taps] == [(3, 6, 16, 16)] * 3 + [(3, 8, 4, 4), (3, 4)]
    model.eval()
    torch.testing.assert_close(taps[0], model.conv1(x))
    # The in-place ReLU behind bn1 must not have changed what the bn1 tap shows.
    torch.testing.assert_close(taps[1], model.bn1(model.conv1(x)))
    assert (taps[1] < 0).any() and (taps[2] >= 0).all()
    torch.testing.assert_close(taps[4], logits)


def test_gradients_reach_the_input_and_no_parameter(model: Net) -> None:
    classifier = Classifier(model, size=16)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    logits, taps = classifier.features(x)
    (logits.sum() + sum(tap.square().sum() for tap in taps)).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["logits", "features", "probabilities"])
@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_as_it_was_afterwards(model: Net, method: str, fail: bool) -> None:
    model.stage1.eval()
    model.conv1.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    classifier = Classifier(model, size=16)
    model.fail = fail
    if fail:
        with pytest.raises(ValueError, match="on purpose"):
            getattr(classifier, method)(torch.rand(2, 3, 16, 16))
    else:
        getattr(classifier, method)(torch.rand(2, 3, 16, 16))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert hooks(model) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    model.fail = False
    assert classifier.logits(torch.rand(2, 3, 16, 16)).shape == (2, 4)


def test_building_a_classifier_on_a_failing_model_leaves_no_hook(model: Net) -> None:
    model.fail = True
    with pytest.raises(RequestError, match=r"\[2,3,16,16\].*on purpose.*size and channels"):
        Classifier(model, size=16)
    assert hooks(model) == 0 and model.training


def test_frozen_nests(model: Net) -> None:
    classifier = Classifier(model, size=16)
    with classifier.frozen():
        classifier.logits(torch.rand(1, 3, 16, 16))
        assert not model.training and not model.fc.weight.requires_grad
    assert model.training and model.fc.weight.requires_grad


def test_batch_size_does_not_change_the_answer(model: Net) -> None:
    classifier = Classifier(model, size=16)
    x = torch.rand(4, 3, 16, 16)
    together, taps = classifier.features(x)
    for index in range(4):
        alone, single = classifier.features(x[index : index + 1])
        torch.testing.assert_close(alone[0], together[index])
        for one, many in zip(single, taps, strict=True):
            torch.testing.assert_close(one[0], many[index])


def test_fingerprint_follows_weights_preprocessing_and_taps(model: Net) -> None:
    classifier = Classifier(model, size=16)
    first = classifier.fingerprint
    assert first == classifier.fingerprint and len(first) == 64
    classifier.logits(torch.rand(2, 3, 16, 16))
    assert first == classifier.fingerprint
    assert first != Classifier(model, size=16, mean=(0.1, 0.1, 0.1)).fingerprint
    assert first != Classifier(model, size=16, taps=["stage2"]).fingerprint
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    assert first != classifier.fingerprint


def test_labels_devices_and_costs(model: Net) -> None:
    classifier = Classifier(model, size=(16, 8), class_names=["a", "b", "c", "d"])
    assert classifier.num_classes == 4 and classifier.class_names == ("a", "b", "c", "d")
    assert classifier.input_shape == (3, 16, 8) and classifier.device.type == "cpu"
    by_hand = 16 * 8 * 6 * 27 + 8 * 4 * 8 * 54 + 4 * 2 * 8 * 72 + 8 * 4
    assert classifier.macs() == by_hand
    assert classifier.macs((32, 16)) == 4 * (by_hand - 32) + 32
    with pytest.raises(RequestError, match="3 class names .* 4 outputs"):
        Classifier(model, size=16, class_names=["a", "b", "c"])
    assert Classifier(model, size=16).class_names == ("0", "1", "2", "3")


def test_one_channel_models_and_given_preprocessing() -> None:
    grey = Classifier(Net(channels=1), size=16)
    assert grey.input_shape == (1, 16, 16)
    settings = Preprocessing(size=(32, 32), resize=40, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert Classifier(Net(), preprocessing=settings).preprocessing is settings
    changed = Classifier(Net(), preprocessing=settings, size=16, std=(1.0,) * 3).preprocessing
    assert (changed.size, changed.resize, changed.mean, changed.std) == ((16, 16), 20, (0.5,) * 3, (1.0,) * 3)


def test_wrong_inputs_and_outputs_are_one_line_requests(model: Net) -> None:
    classifier = Classifier(model, size=16)
    for x in (torch.rand(3, 16, 16), torch.rand(2, 1, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(RequestError, match=r"give float \[B,3,H,W\]") as caught:
            classifier.logits(x)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match=r"Sequential returned \[2, 6, 16, 16\]"):
        Classifier(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), size=16)


def test_models_that_wrap_their_scores() -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"hidden": x, "logits": super().forward(x)}

    assert Classifier(Wrapped(), size=16).logits(torch.rand(2, 3, 16, 16)).shape == (2, 4)


def test_parallel_and_compiled_wrappers_come_off(model: Net) -> None:
    x = torch.rand(3, 3, 16, 16)
    wanted = Classifier(model, size=16).features(x)
    average = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (nn.DataParallel(model), torch.compile(nn.DataParallel(model), backend="eager"), average):
        classifier = Classifier(wrapped, size=16)
        assert type(classifier.model) is Net
        torch.testing.assert_close(classifier.features(x)[1], wanted[1])
    assert Classifier(nn.DataParallel(model), size=16).fingerprint == Classifier(model, size=16).fingerprint


@pytest.mark.parametrize("nested", [True, False])
def test_hooks_reach_into_compiled_parts(model: Net, nested: bool) -> None:
    x, outer, prefix = torch.rand(3, 3, 16, 16), nn.Sequential(model), "0." if nested else ""
    taps = [f"{prefix}relu", f"{prefix}stage1.0", f"{prefix}stage2.1"]
    wanted = Classifier(outer if nested else model, size=16, taps=taps).features(x)
    model.compile(backend="eager")
    outer.eval()(x)
    classifier = Classifier(outer if nested else model, size=16, taps=taps)
    for _ in range(2):
        classifier.logits(x)  # compiled by now, and without hooks
    torch.testing.assert_close(classifier.features(x)[1], wanted[1])
