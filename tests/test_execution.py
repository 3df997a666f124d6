"""Precision, memory layout and compilation: what they change, by how much, and when they are refused."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import one_thread  # noqa: F401
from torch import Tensor, nn
from trained_tiles import masker, tiles

from minexp.classifier import Classifier, load_classifier
from minexp.data.sources import open_source
from minexp.data.store import read_run, read_store, unpack_mask
from minexp.errors import RequestError
from minexp.execution import Execution
from minexp.explanation import explain
from minexp.jobs import local
from minexp.repair import REPAIRS
from minexp.training import fit

# Stated in docs/how-to/faster.md: pixels of masks that may differ from those in float32, and images that may
# have another verdict.
PIXELS, VERDICTS = {"bfloat16": 0.01, "float16": 0.002}, {"bfloat16": 0.03, "float16": 0.01}
# Where a mask grows by gradients, these lead elsewhere once they are rounded.
GUIDED_PIXELS = {"bfloat16": 0.08, "float16": 0.04}


def run_in(execution: Execution) -> Classifier:
    subject = tiles().classifier
    names, settings = subject.class_names, subject.preprocessing
    return Classifier(subject.model, preprocessing=settings, class_names=names, execution=execution)


@pytest.fixture
def inside() -> Iterator[list[Tensor]]:
    """What the classifier's first stage gives, call by call."""
    seen: list[Tensor] = []
    handle = (
        tiles().classifier.model.get_submodule("layer1").register_forward_hook(lambda m, i, o: seen.append(o))
    )
    yield seen
    handle.remove()


def test_the_plain_way_is_the_default_and_takes_any_layout(inside: list[Tensor]) -> None:
    classifier, x = tiles().classifier, tiles().x[:4]
    assert classifier.execution.plain and classifier.precision == "float32"
    plain = classifier.logits(x.contiguous())
    assert torch.equal(classifier.logits(x.contiguous(memory_format=torch.channels_last)), plain)
    assert all(output.is_contiguous() for output in inside)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_inside_the_model_and_changes_masks_little(
    precision: Any, inside: list[Tensor]
) -> None:
    classifier = run_in(Execution(precision))
    inside.clear()
    x = tiles().x[:50].requires_grad_()
    scores, features = classifier.features(x)
    assert inside[0].dtype == getattr(torch, precision)
    assert scores.dtype == torch.float32 and all(feature.dtype == torch.float32 for feature in features)
    (gradient,) = torch.autograd.grad(scores.square().sum() + features[-1].sum(), x)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0
    x = x.detach()
    assert 0 < classifier.agreement.largest < 0.1
    both = {
        name: [explain(c, x, masker(), repair=repair) for c in (tiles().classifier, classifier)]
        for name, repair in REPAIRS.items()
    }
    changed = {name: (a.masks != b.masks).float().mean().item() for name, (a, b) in both.items()}
    assert changed["levels"] <= PIXELS[precision] and changed["guided"] <= GUIDED_PIXELS[precision]
    whole, lower = both["guided"]
    verdicts = [
        a.certified != b.certified for a, b in zip(whole.certificates, lower.certificates, strict=True)
    ]
    assert sum(verdicts) <= VERDICTS[precision] * len(verdicts)
    assert [c.label for c in whole.certificates] == [c.label for c in lower.certificates]


def test_batches_change_nothing_in_lower_precision_either() -> None:
    classifier, x = run_in(Execution("bfloat16")), tiles().x[:20]
    whole = explain(classifier, x, masker(), micro_batch=64)
    for size in (1, 7):
        assert torch.equal(explain(classifier, x, masker(), micro_batch=size).masks, whole.masks)


def test_channels_last_is_the_layout_inside_and_gives_the_same_masks(inside: list[Tensor]) -> None:
    classifier, x = run_in(Execution(channels_last=True)), tiles().x[:40]
    strides = {name: p.stride() for name, p in classifier.model.named_parameters()}
    inside.clear()
    lasting = explain(classifier, x, masker())
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in inside)
    assert torch.equal(lasting.masks, explain(tiles().classifier, x, masker()).masks)
    assert {name: p.stride() for name, p in classifier.model.named_parameters()} == strides
    assert classifier.agreement.largest < 1e-4


COMPILER = any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")
def test_compiled_scores_are_checked_and_few_compilations_serve_all_batches() -> None:
    torch.manual_seed(0)
    model, x = Scaled(1, 0), torch.rand(100, 3, 8, 8)
    plain = Classifier(model, size=8)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    classifier = Classifier(model, size=8, execution=Execution(compile=True))
    assert 0 <= classifier.agreement.largest < 1e-4
    for size in (2, 3, 5, 17, 20, 33, 64, 100):
        torch.testing.assert_close(classifier.logits(x[:size]), plain.logits(x[:size]))
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    torch.testing.assert_close(
        classifier.features(x)[1], plain.features(x)[1]
    )  # hooks see the model as written
    assert not any(module._compiled_call_impl for module in model.modules())


@pytest.mark.filterwarnings("ignore:the masks")
def test_a_masker_fitted_in_one_precision_serves_another() -> None:
    classifier = run_in(Execution("bfloat16", channels_last=True))
    fitted = fit(classifier, tiles().images[:8], steps=2, batch=4, progress=False)
    assert classifier.fingerprint == tiles().classifier.fingerprint
    assert len(explain(tiles().classifier, tiles().x[:2], fitted)) == 2


class Scaled(nn.Module):
    """A convolution whose weights are multiplied and an offset added and taken off again."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.conv.weight *= scale
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)) + self.offset
        return self.head((x - self.offset).mean((2, 3)))


@pytest.mark.parametrize(
    ("precision", "scale", "offset"),
    [("float16", 1e6, 0.0), ("bfloat16", 1e-3, 100.0), ("float16", 1e-3, 1000.0)],
)
def test_a_model_whose_scores_do_not_survive_is_refused_with_figures(
    precision: Any, scale: float, offset: float
) -> None:
    torch.manual_seed(0)
    model = Scaled(scale, offset)
    Classifier(model, size=8)
    with pytest.raises(
        RequestError, match=f"in {precision} scores differ by .* allowed; leave it out"
    ) as caught:
        Classifier(model, size=8, execution=Execution(precision))
    assert "\n" not in str(caught.value)


def test_what_does_not_run_at_all_is_one_line() -> None:
    class Broken(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise NotImplementedError("no kernel\nfor Half")
            return super().forward(x)

    with pytest.raises(
        RequestError, match="does not run in float16 .NotImplementedError: no kernel for Half.; leave"
    ):
        Classifier(Broken(1, 0), size=8, execution=Execution("float16"))
    with pytest.raises(RequestError, match="unknown precision 'int4'; choose one of float32"):
        Execution("int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_another_dtype_take_and_give_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Scaled(1, 0)
    wanted = Classifier(model, size=8).logits(torch.full((2, 3, 8, 8), 0.3))
    classifier = Classifier(model.to(dtype), size=8)
    assert classifier.precision == str(dtype).removeprefix("torch.")
    scores, features = classifier.features(torch.full((2, 3, 8, 8), 0.3))
    assert scores.dtype == torch.float32 and features[0].dtype == torch.float32
    torch.testing.assert_close(scores, wanted, rtol=0.05, atol=0.02)


def test_a_job_records_how_the_model_was_run_and_is_another_job(tmp_path: Path) -> None:
    images = (tiles().x[:4].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    torch.save(0, tmp_path / "unused.pth")
    np.save(tmp_path / "d.npy", images)
    source = open_source(tmp_path / "d.npy")
    summary = local.explain_dataset(
        run_in(Execution("bfloat16")), source, masker(), tmp_path / "out", progress=False
    )
    assert summary["precision"] == "bfloat16"
    assert read_run(tmp_path / "out")["execution"].startswith("bfloat16: scores differ by")
    with pytest.raises(RequestError, match="another job"):
        local.explain_dataset(tiles().classifier, source, masker(), tmp_path / "out", progress=False)


def test_certificates_are_those_of_the_precision_that_the_store_states(tmp_path: Path) -> None:
    """A stored mask's confidence is what the model says in that precision, and not what it says in float32."""
    images = (tiles().x[:12].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    np.save(tmp_path / "d.npy", images)
    off = {}
    for precision in ("float32", "bfloat16"):
        classifier, out = run_in(Execution(precision)), tmp_path / precision  # type: ignore[arg-type]
        source = open_source(tmp_path / "d.npy")
        local.explain_dataset(classifier, source, masker(), out, background="black", progress=False)
        assert read_run(out)["precision"] == precision
        rows = read_store(out).to_pylist()
        masks = torch.from_numpy(np.stack([unpack_mask(row["mask"], row["h"], row["w"]) for row in rows]))
        kept = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255) * masks[:, None]
        label = torch.tensor([row["label"] for row in rows])[:, None]
        said = torch.tensor([row["conf_masked"] for row in rows])
        with torch.no_grad():
            again = {
                name: run_in(Execution(name)).logits(kept).softmax(1).gather(1, label)[:, 0]  # type: ignore[arg-type]
                for name in ("float32", "bfloat16")
            }
        off[precision] = {name: float((scores - said).abs().max()) for name, scores in again.items()}
    assert off["float32"]["float32"] < 1e-5 and off["bfloat16"]["bfloat16"] < 1e-5
    assert off["float32"]["bfloat16"] > 1e-4 and off["bfloat16"]["float32"] > 1e-4


def test_options_of_a_factory_s_classifier_stay(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from test_execution import Scaled\nfrom minexp.classifier import Classifier\n"
        "from minexp.execution import Execution\n"
        "def net():\n    return Classifier(Scaled(1, 0), size=8, execution=Execution(channels_last=True))\n"
    )
    assert load_classifier(f"{tmp_path / 'net.py'}:net").execution.channels_last
    other = load_classifier(f"{tmp_path / 'net.py'}:net", execution=Execution("bfloat16"))
    assert str(other.execution) == "bfloat16"
