"""The masker: keep-all at the start, small, saved whole, refused where it does not belong."""

import json
from pathlib import Path

import pytest
import small_net
import torch
from safetensors.torch import load_file, save_file
from tiny_models import one_thread as one_thread
from torch import nn

from minexp.data.subjects import SceneNet, classifier
from minexp.errors import RequestError
from minexp.masker import KEEP_ALL, Architecture, Masker, load_masker, straight_through


def untrained(stride: int = 2, channels: int = 3) -> Masker:
    torch.manual_seed(0)
    return Masker(Architecture(channels=channels, stride=stride))


def trained(stride: int = 2) -> Masker:
    """A masker whose weights and running statistics are not those of a new one."""
    masker = untrained(stride)
    for parameter in masker.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    masker.train()(torch.rand(8, 3, 32, 32))
    masker.reference = (torch.rand(3, 3, 32, 32) * 255).to(torch.uint8)
    masker.mean = torch.tensor([0.1, 0.2, 0.3])
    return masker.eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("stride", "size"), [(2, (64, 64)), (2, (37, 50)), (4, (224, 224)), (4, (130, 161))])
def test_it_starts_from_keep_all(stride: int, size: tuple[int, int], training: bool) -> None:
    masker = untrained(stride).train(training)
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        logits = masker(x)
    assert logits.shape == (2, 1, *size)
    torch.testing.assert_close(logits, torch.full_like(logits, KEEP_ALL))
    p = masker.probabilities(x)
    assert (p > 0.8).all() and (p < 0.99).all()  # all kept, and not so sure that no gradient is left
    assert torch.equal(straight_through(p), torch.ones_like(p))


@pytest.mark.parametrize(("side", "stride"), [(64, 2), (224, 4)])
def test_it_is_lightweight(side: int, stride: int) -> None:
    masker, subject = untrained(stride), classifier(SceneNet(10))
    assert sum(p.numel() for p in masker.parameters()) < 500_000
    assert masker.macs((side, side)) < subject.macs((side, side)) / 2


def test_macs_are_counted_by_hand() -> None:
    masker = Masker(Architecture(channels=1, widths=(2, 3, 5), stride=2))
    grid = {1: 16 * 16, 2: 8 * 8, 3: 4 * 4}
    stem = grid[1] * 9 * 1 * 2
    down = grid[2] * 9 * 2 * 3 + grid[3] * 9 * 3 * 5
    context = 2 * grid[3] * 9 * 5 * 5
    narrow = grid[3] * 5 * 3 + grid[2] * 3 * 2
    up = grid[2] * 9 * 3 * 3 + grid[1] * 9 * 2 * 2
    head = grid[1] * 9 * 2
    assert masker.macs((32, 32)) == stem + down + context + narrow + up + head


def test_upsampling_is_smooth() -> None:
    """No transposed convolutions, whose uneven overlap prints a checkerboard; at most linear between cells."""
    masker = trained(4)
    assert not any(isinstance(m, nn.ConvTranspose2d | nn.PixelShuffle) for m in masker.modules())
    with torch.no_grad():
        logits = masker(torch.rand(1, 3, 64, 64))[0, 0]
    bend = (logits[:, 2:] - 2 * logits[:, 1:-1] + logits[:, :-2]).abs()
    # between two cell centres, four pixels apart, interpolation is linear
    assert bend[:, 2::4].max() < 1e-4 < bend.max()


def test_probabilities_leave_the_masker_as_it_was() -> None:
    masker = trained().train()
    before = {k: v.clone() for k, v in masker.state_dict().items()}
    p = masker.probabilities(torch.rand(2, 3, 32, 32))
    assert masker.training and not p.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in masker.state_dict().items())
    with pytest.raises(RuntimeError):
        masker.probabilities(torch.rand(2, 5, 32, 32))
    assert masker.training


def test_straight_through_is_hard_forward_and_identity_backward() -> None:
    p = torch.tensor([0.0, 0.2, 0.5, 0.500001, 0.9, 1.0], requires_grad=True)
    mask = straight_through(p)
    torch.testing.assert_close(mask, torch.tensor([0.0, 0, 0, 1, 1, 1]))
    (mask * torch.arange(6.0)).sum().backward()
    assert torch.equal(p.grad, torch.arange(6.0))


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    masker, subject = trained(4), small_net.classifier()
    masker.metadata = {"classifier": subject.fingerprint, "steps": 7}
    masker.save(tmp_path / "deep" / "m.safetensors")
    again = load_masker(tmp_path / "deep" / "m.safetensors", subject)
    assert again.architecture == masker.architecture and again.metadata == masker.metadata
    assert not again.training
    assert set(again.state_dict()) == set(masker.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in masker.state_dict().items())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(again.probabilities(x), masker.probabilities(x))
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["m.json", "m.safetensors"]
    about = json.loads((tmp_path / "deep" / "m.json").read_text())
    assert about["classifier"] == subject.fingerprint and about["architecture"]["stride"] == 4


def test_a_masker_of_another_classifier_is_refused(tmp_path: Path) -> None:
    masker, path = trained(), tmp_path / "m.safetensors"
    masker.metadata = {"classifier": small_net.classifier().fingerprint}
    masker.save(path)
    assert load_masker(path, small_net.classifier())
    with pytest.raises(RequestError, match="another classifier.*minexp fit"):
        load_masker(path, small_net.other())
    masker.metadata = {}
    masker.save(path)
    with pytest.raises(RequestError, match="another classifier"):
        load_masker(path, small_net.classifier())


def test_what_is_no_masker_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(RequestError, match="no such masker.*minexp fit"):
        Masker.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(RequestError, match="not a readable masker"):
        Masker.load(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(RequestError, match="not a masker"):
        Masker.load(path)
    trained().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="not a readable masker"):
        Masker.load(path)
    path.write_bytes(whole)
    state, about = load_file(path), json.loads((tmp_path / "m.json").read_text())
    state["head.bias"] = torch.tensor([float("nan")])
    save_file(state, path, metadata={"minexp": json.dumps(about)})
    with pytest.raises(RequestError, match="NaN"):
        Masker.load(path)
    about["architecture"]["widths"] = [12, 24, 40]
    save_file(state, path, metadata={"minexp": json.dumps(about)})
    with pytest.raises(RequestError, match="do not fit the architecture"):
        Masker.load(path)


@pytest.mark.parametrize("bad", [Architecture(stride=3), Architecture(widths=(8, 16))])
def test_impossible_architectures_are_refused(bad: Architecture) -> None:
    with pytest.raises(RequestError, match="stride 2 or 4"):
        Masker(bad)


def test_reference_images() -> None:
    masker = untrained()
    assert masker.reference_images() is None
    masker.reference = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(masker.reference_images(), torch.ones(2, 3, 8, 8))


def test_probabilities_do_not_depend_on_the_batch() -> None:
    masker, x = trained(), torch.rand(9, 3, 32, 32)
    whole = masker.probabilities(x)
    for size in (1, 2, 3, 7):
        parts = torch.cat([masker.probabilities(part) for part in x.split(size)])
        assert torch.equal(parts, whole), size
