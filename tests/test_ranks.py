"""Processes that train together get the masker that one process gets, also when one of them is killed on the way."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_training import fitted, images
from tiny_models import one_thread as one_thread
from torch import nn

import minexp.training as training
from minexp.errors import RequestError
from minexp.masker import Masker, load_masker
from minexp.ranks import ALONE, Ranks, joined, whole_batches

HERE = Path(__file__).parent
TOLERANCE = (
    2e-3  # of a keep-probability after 12 steps; sums over processes round otherwise than sums over images
)
pytestmark = pytest.mark.filterwarnings("ignore:the masks keep everything")

# A fit in which the process of that rank dies at that step, if it has not yet.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import minexp.training as training
import test_training
training.CHECKPOINT_EVERY = 4
out, victim, at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
seen = out.with_name("killed")
def step(record):
    if record.step == at and int(os.environ["RANK"]) == victim and not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
masker = test_training.fitted(out=out, batch=5, on_step=step)
print("resumed", masker.metadata["resumed"], masker.metadata["metrics"])
"""


def torchrun(*arguments: object, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def close(one: Masker, other: Masker) -> float:
    x = torch.from_numpy(images(6, seed=9)).permute(0, 3, 1, 2).float() / 255
    return float((one.probabilities(x) - other.probabilities(x)).abs().max())


def test_the_command_fits_in_two_processes_what_it_fits_in_one(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", images())
    model = f"{HERE / 'small_net.py'}:classifier"
    options = ["--model", model, "--data", tmp_path / "d.npy", "--steps", 12, "--batch", 7, "--json"]
    done = torchrun("-m", "minexp", "fit", *options, "--out", tmp_path / "two.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"steps": 12') == 1  # the first process talks
    one = training.fit(
        small_classifier(), images(), steps=12, batch=7, out=tmp_path / "one.safetensors", progress=False
    )
    two = load_masker(tmp_path / "two.safetensors", small_classifier())
    assert close(one, two) < TOLERANCE
    assert two.metadata["metrics"] == pytest.approx(one.metadata["metrics"], abs=TOLERANCE)
    for name, value in one.state_dict().items():  # running statistics of the whole batch, too
        torch.testing.assert_close(two.state_dict()[name], value, atol=TOLERANCE, rtol=TOLERANCE, msg=name)


def small_classifier() -> Any:
    import small_net

    return small_net.classifier()


def test_a_killed_process_ends_the_fit_and_the_same_command_ends_at_the_same_masker(tmp_path: Path) -> None:
    (tmp_path / "fit.py").write_text(SCRIPT)
    rng = np.random.default_rng(0)
    victim, at = int(rng.integers(2)), int(rng.integers(5, 11))
    command = [tmp_path / "fit.py", tmp_path / "m.safetensors", victim, at]
    killed = torchrun(*command)
    assert killed.returncode != 0 and (tmp_path / "killed").exists()
    assert (tmp_path / "m.fit").exists() and not (tmp_path / "m.safetensors").exists()
    again = torchrun(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("resumed True") == 2
    resumed = load_masker(tmp_path / "m.safetensors", small_classifier())
    assert close(resumed, fitted(batch=5)) < TOLERANCE
    assert not (tmp_path / "m.fit").exists()


def test_shares_are_uneven_by_one_and_the_whole_batch() -> None:
    for batch in range(3, 20):
        for count in range(1, 4):
            shares = [list(range(batch))[Ranks(rank, count).share(batch)] for rank in range(count)]
            assert [place for share in shares for place in share] == list(range(batch))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture
def group() -> Any:
    """A group of this process alone, whose messages come back as they are."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_batch_normalisation_is_that_of_torch_and_is_put_back() -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4) for _ in range(2)]
    inputs = [torch.randn(3, 4, 5, 6, dtype=torch.float64).add_(7).requires_grad_() for _ in range(2)]
    for norm in norms:
        norm.double()
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    weights = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), whole_batches(norms[1], Ranks(0, 2)):
        for norm, x in zip(norms, inputs, strict=True):
            (norm(x) * weights).sum().backward()
        raise ZeroDivisionError
    assert "forward" not in vars(norms[1])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for name, value in norms[0].state_dict().items():
        torch.testing.assert_close(norms[1].state_dict()[name], value)
    for one, other in zip(norms[0].parameters(), norms[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    norms[1].eval()
    with whole_batches(norms[1], Ranks(0, 2)):
        torch.testing.assert_close(norms[1](inputs[0]), norms[0].eval()(inputs[0]))


def test_what_cannot_be_trained_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined(torch.device("cpu")) as ranks:
        assert ranks == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RequestError, match="start them with torchrun, or unset WORLD_SIZE"):
        fitted()
    with pytest.raises(RequestError, match="a batch of 2 images for 3 processes"):
        training._fit(
            small_classifier(), images(), Ranks(0, 3), preset_name="default", objective=training.preset("default"),
            steps=1, epochs=None, batch=2, lr=1e-3, out=None, seed=0, resume=True, progress=False, on_step=None,
        )  # fmt: skip
