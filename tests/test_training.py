"""fit: keep-all first, soft then hard, killed and resumed to the bit, and refused where it must be."""

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_net
import torch
from PIL import Image
from tiny_models import one_thread as one_thread
from tiny_models import state
from torch import Tensor, nn

import minexp.training as training
from minexp.classifier import Classifier
from minexp.data.sources import open_source
from minexp.errors import RequestError
from minexp.masker import Masker, load_masker
from minexp.objective import Objective
from minexp.training import Step, as_pixels, fit

OBJECTIVE = Objective(area=2.0, soft=0.5, dual_rate=0.1)


# fits of a few steps end where they began; only the tests of the warning look at it
pytestmark = pytest.mark.filterwarnings("ignore:the masks keep everything")


def images(n: int = 24, seed: int = 0, size: int = small_net.SIZE) -> np.ndarray:
    """Scenes [n,H,W,3] of the colour classifier: coarse noise with a tinted upper half."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 120, (n, size // 4, size // 4, 3))
    coarse[np.arange(n), : size // 8, :, rng.integers(0, 3, n)] += 130
    return coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8)


def fitted(classifier: Classifier | None = None, **changes: Any) -> Masker:
    settings: dict[str, Any] = {"objective": OBJECTIVE, "steps": 12, "batch": 6, "progress": False} | changes
    return fit(classifier or small_net.classifier(), settings.pop("images", images()), **settings)


def same(left: Masker, right: Masker) -> bool:
    """Equal to the bit."""
    a, b = left.state_dict(), right.state_dict()
    return set(a) == set(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def test_the_first_step_keeps_everything_and_the_mask_shrinks_from_there() -> None:
    curve: list[Step] = []
    masker = fitted(steps=40, on_step=curve.append)
    assert curve[0].area == 1.0 and curve[0].kept == 1.0
    assert [s.step for s in curve] == list(range(40))
    assert [s.hard for s in curve] == [False] * 20 + [True] * 20
    assert curve[-1].area < 0.9
    assert np.mean([s.kept for s in curve[-10:]]) > 0.8
    assert masker.metadata["metrics"]["area"] == pytest.approx(np.mean([s.area for s in curve]))
    assert masker.metadata["steps"] == 40 and not masker.training


def test_robustness_alone_trains_the_masker_through_hard_masks() -> None:
    """Its only way to the weights is the straight-through path; a plain comparison would leave them."""
    alone = Objective(act=0, ce=0, kl=0, area=0, crisp=0, tv=0, rob=1, match="off", dual=False, soft=0.0)
    masker = fitted(objective=alone, steps=6)
    assert masker.head.weight.abs().max() > 1e-4


def test_random_backgrounds_are_drawn_anew_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    real = training.random_mixture

    def spy(x: Tensor, mean: Tensor, rng: torch.Generator, *rest: Any) -> Tensor:
        drawn.append(
            real(torch.full_like(x, 0.5), mean, rng, *rest)
        )  # the same whatever the order of the images
        return drawn[-1]

    monkeypatch.setattr(training, "random_mixture", spy)
    fitted(steps=4)
    assert len(drawn) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_every_image_is_seen_once_an_epoch() -> None:
    run = training._Run(
        small_net.classifier(), Masker(), OBJECTIVE, torch.zeros(20, 3, 32, 32), 99, 6, 1e-3, 5
    )
    epochs = []
    for epoch in range(2):
        seen = []
        for place in range(3):
            run.step = epoch * 3 + place
            seen += run.indices().tolist()
        assert len(seen) == len(set(seen)) == 18
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_the_area_weight_follows_the_decision() -> None:
    held: list[Step] = []
    fitted(objective=replace(OBJECTIVE, target=0.5, ce=5.0, rob=5.0, area=0.1), steps=20, on_step=held.append)
    assert held[-1].area_weight > held[0].area_weight == 0.1
    lost: list[Step] = []
    # nothing keeps the decision: the mask goes, and the weight with it
    gone = Objective(act=0, ce=0, kl=0, rob=0, area=30.0, match="off", dual_rate=0.1)
    fitted(objective=gone, steps=40, lr=3e-2, on_step=lost.append)
    assert lost[-1].area_weight < max(s.area_weight for s in lost)
    assert lost[-1].kept < 0.9


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_at(step: int) -> Any:
    def stop(record: Step) -> None:
        if record.step == step:
            raise Killed

    return stop


@pytest.mark.parametrize("at", [2, 5, 9])  # before the first checkpoint, in the soft phase, in the hard phase
def test_a_killed_fit_resumes_to_the_very_same_masker(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 4)
    out = tmp_path / "m.safetensors"
    curve: list[Step] = []
    undisturbed = fitted(on_step=curve.append)
    with pytest.raises(Killed):
        fitted(out=out, on_step=killed_at(at))
    assert not out.exists() and (tmp_path / "m.fit").exists() == (at >= 4)
    again: list[Step] = []
    resumed = fitted(out=out, on_step=again.append)
    assert same(resumed, undisturbed)
    assert again == curve[at // 4 * 4 :]  # it went on from the checkpoint, not from the start
    assert resumed.metadata["resumed"] == (at >= 4)
    assert resumed.metadata["metrics"] == undisturbed.metadata["metrics"]
    assert same(load_masker(out, small_net.classifier()), undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.csv", "m.json", "m.png", "m.safetensors"]
    lines = (tmp_path / "m.csv").read_text().splitlines()
    assert lines[0] == "step,loss,area,kept,robust,area_weight,hard" and len(lines) == 13
    assert Image.open(tmp_path / "m.png").size[0] > 100


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import minexp.training as training
import test_training
training.CHECKPOINT_EVERY = 4
def slowly(record):
    print(record.step, flush=True)
    if record.step == 6:
        time.sleep(60)
test_training.fitted(out=sys.argv[2], on_step=slowly)
"""


def test_a_fit_ended_by_sigkill_resumes_to_the_very_same_masker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(training.__file__).parents[1])},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "6":
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "m.fit").is_file() and not out.exists()
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 4)
    again: list[Step] = []
    resumed = fitted(out=out, on_step=again.append)
    assert again[0].step == 4
    assert same(resumed, fitted())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"steps": 13},
        {"batch": 5},
        {"lr": 1e-3},
        {"objective": replace(OBJECTIVE, tv=0.1)},
        {"images": images(seed=3)},
        {"images": images(25)},
        {"classifier": small_net.other()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_of_another_fit_is_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    out = tmp_path / "m.safetensors"
    with pytest.raises(Killed):
        fitted(out=out, on_step=killed_at(3))
    before = (tmp_path / "m.fit").read_bytes()
    with pytest.raises(RequestError, match=r"m\.fit: checkpoint of another fit.*--no-resume"):
        fitted(out=out, **change)
    assert (tmp_path / "m.fit").read_bytes() == before
    anew = fitted(out=out, resume=False, **change)
    assert not anew.metadata["resumed"] and not (tmp_path / "m.fit").exists()


@pytest.mark.parametrize("content", ["nonsense", "half", "foreign"])
def test_what_is_no_checkpoint_is_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    out, path = tmp_path / "m.safetensors", tmp_path / "m.fit"
    with pytest.raises(Killed):
        fitted(out=out, on_step=killed_at(3))
    if content == "nonsense":
        path.write_bytes(b"no checkpoint")
    elif content == "half":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        training.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(RequestError, match=r"m\.fit.*--no-resume"):
        fitted(out=out)


def test_another_seed_is_another_masker_and_the_same_seed_the_same() -> None:
    first = fitted(steps=4)
    assert same(first, fitted(steps=4))
    assert not same(first, fitted(steps=4, seed=1))


def test_the_callers_random_numbers_stay_as_they_are() -> None:
    classifier = small_net.classifier()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(classifier, steps=1)
    assert torch.equal(torch.rand(3), expected)


class Collapse(nn.Module):
    """Class 0 whatever it sees, unless told to throw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.drop = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)
        self.left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ValueError("broken on purpose")
        return self.fc(self.drop(self.act(self.conv(x))).mean((2, 3))) + torch.tensor([50.0, 0.0, 0.0])


@pytest.mark.parametrize("throws", [False, True])
def test_the_model_is_as_it_was_afterwards(throws: bool) -> None:
    model = Collapse()
    classifier = Classifier(model, size=32)
    model.train().requires_grad_(True)
    model.drop.eval()
    model.fc.bias.requires_grad_(False)
    before = state(model)
    if throws:
        model.left = 5
        with pytest.raises(ValueError, match="broken on purpose"):
            fitted(classifier)
    else:
        fitted(classifier, steps=3)
    assert state(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_empty_masks_are_warned_of() -> None:
    objective = Objective(act=0, ce=0, kl=0, rob=0, area=50.0, match="off", dual=False)
    curve: list[Step] = []
    with pytest.warns(UserWarning, match=r"masks are empty.*lower area weight"):
        fitted(objective=objective, steps=80, lr=0.1, on_step=curve.append)
    assert curve[-1].area < 0.001


def test_masks_that_keep_everything_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"keep everything.*more steps"):
        fitted(objective=replace(OBJECTIVE, area=0.0, dual=False, ce=10.0), steps=8, lr=1e-4)


def test_masks_between_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training._warn_if_collapsed({"area": 0.002})
        training._warn_if_collapsed({"area": 0.94})


def test_divergence_is_reported() -> None:
    classifier = small_net.classifier()
    with torch.no_grad():
        classifier.model.head.bias[0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(RequestError, match=r"diverged at step 0"):
        fitted(classifier)


def test_steps_and_epochs() -> None:
    curve: list[Step] = []
    fitted(steps=None, epochs=1.5, on_step=curve.append)
    assert len(curve) == 6  # 24 images in batches of 6
    with pytest.raises(RequestError, match="not both"):
        fitted(epochs=1)
    with pytest.raises(RequestError, match="at least 1"):
        fitted(steps=0)
    with pytest.raises(RequestError, match="unknown preset"):
        fitted(objective=None, preset_name="none")
    with pytest.raises(RequestError, match=r"m\.safetensors"):
        fitted(out="m.pth")


def test_images_in_every_form_become_the_same_pixels(tmp_path: Path) -> None:
    classifier, array = small_net.classifier(), images(5)
    whole = as_pixels(array, classifier)
    assert whole.shape == (5, 3, 32, 32) and whole.dtype == torch.uint8
    assert torch.equal(as_pixels(whole, classifier), whole)
    assert torch.equal(as_pixels(whole.float() / 255, classifier), whole)
    for number, image in enumerate(array):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "2b.png").write_bytes(b"not an image")
    assert torch.equal(as_pixels(open_source(str(tmp_path)), classifier), whole)  # the odd one is left out


def test_what_cannot_be_fitted_to_is_refused(tmp_path: Path) -> None:
    classifier = small_net.classifier()
    for bad in (images(1), images(4, size=8), images(4)[..., :1], images(4)[0], torch.zeros(4, 32, 32, 3)):
        with pytest.raises(RequestError, match="give"):
            as_pixels(bad, classifier)
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(RequestError, match="no image of the data could be read"):
        as_pixels(open_source(str(tmp_path)), classifier)


def test_the_masker_carries_its_data_and_its_origin() -> None:
    classifier, data = small_net.classifier(), images(40)
    masker = fitted(classifier, images=data, steps=2)
    torch.testing.assert_close(masker.mean, torch.from_numpy(data).float().mean((0, 1, 2)) / 255)
    stored = {image.numpy().tobytes() for image in masker.reference.permute(0, 2, 3, 1)}
    assert len(stored) == training.REFERENCES and stored <= {image.tobytes() for image in data}
    assert masker.metadata["classifier"] == classifier.fingerprint
    assert masker.metadata["images"] == 40
