"""Exported explainers: the answers of torch, row for row, in one plain file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployed import draft, exported, folder, images, networks
from tiny_models import one_thread  # noqa: F401
from torch import nn
from trained_tiles import masker, tiles

from minexp.certificate import Certificate
from minexp.classifier import Classifier, load_classifier
from minexp.data.store import unpack_mask
from minexp.deploy import Explainer
from minexp.deploy import export as exporting
from minexp.deploy.export import export
from minexp.deploy.metadata import seal_holds
from minexp.deploy.onnx_classifier import adopt_masker
from minexp.deploy.parity import compare
from minexp.deploy.quantise import quantised
from minexp.deploy.runtime import open_session
from minexp.errors import RequestError
from minexp.predicate import Predicate


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(exported().explainer, trusted=True)


def test_every_row_is_torchs(explainer: Explainer) -> None:
    """All columns of 100 certificates, of images that need repair and enlargement among them."""
    reference = draft().torch(images())
    found = explainer.explain(images())
    rows = list(zip(found.rows(), reference.rows(), strict=True))
    for one, other in rows:
        assert one.keys() == other.keys()
        for name in other.keys() - {"ms"}:
            assert one[name] == (pytest.approx(other[name], abs=1e-4) if name in _FLOATS else other[name]), (
                name
            )
    counts = [row["evaluations"] for row, _ in rows]
    assert max(counts) > 2 * min(counts) and len(set(counts)) > 15, "repaired masks should be among them"


_FLOATS = {name for name, kind in Certificate.__annotations__.items() if "float" in kind}


@pytest.mark.parametrize(
    "predicate",
    [
        Predicate("top1"),
        Predicate("score", tau=0.8),
        Predicate(rho=0.8, draws=9, early=9),
        Predicate(dilated=True, early=3),
        Predicate(rho=0.99, draws=2, early=1),  # so easily passed that fresh draws contradict it
    ],
)
def test_every_predicate_is_torchs(predicate: Predicate, tmp_path: Path) -> None:
    asked, count = draft(predicate), 100 if predicate.draws == 2 else 24
    reference = asked.torch(images(count))
    _, found, parity = asked.checked(networks(), images(count), reference)
    assert parity.exact and parity.images == count
    if predicate.kind == "score":  # even the whole image is not always classified that surely
        assert 0 < sum(not certificate.certified for certificate in found.certificates) < 24
    if predicate.draws == 2:
        content, *_ = asked.checked(networks(), images(4), asked.torch(images(4)))
        path = tmp_path / "explainer.onnx"
        path.write_bytes(content)
        assert set(Explainer(path, trusted=True).run(images())["attempt"]) == {0, 1, 2}, "two enlargements"


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_the_batch_changes_no_answer(explainer: Explainer, batch: int) -> None:
    whole = explainer.explain(images(33)).rows()
    parts = [row for i in range(0, 33, batch) for row in explainer.explain(images(33)[i : i + batch]).rows()]
    for one, other in zip(parts, whole, strict=True):
        for name in one.keys() - {"ms"}:
            assert one[name] == (pytest.approx(other[name], abs=1e-6) if name in _FLOATS else other[name]), (
                name
            )


def test_outputs_agree_with_each_other(explainer: Explainer) -> None:
    """The graph's own figures are those the certificate is written from."""
    out, found = explainer.run(images(20)), explainer.explain(images(20))
    assert np.allclose(out["area"], [c.area for c in found.certificates])
    assert np.allclose(out["robust_train"], [c.robust_train for c in found.certificates])
    assert out["certified"].tolist() == [c.certified for c in found.certificates]
    masked = np.where(found.masks[..., None], images(20), found.kept[~found.masks][0])
    assert np.array_equal(out["explanation"], masked)


def test_the_file_is_one_plain_sealed_model_that_says_what_it_is() -> None:
    content = exported().explainer.read_bytes()
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert seal_holds(content) and not seal_holds(content[:-90] + b"x" + content[-89:])
    assert json.loads(about["minexp.class_names"]) == ["0", "1", "2", "none"]
    assert json.loads(about["minexp.preprocessing"])["input_size"] == [3, 24, 24]
    assert json.loads(about["minexp.parity"])["mask_flips"] == 0
    assert len(json.loads(about["minexp.selftest"])) == 4
    assert [i.name for i in model.graph.input] == ["image"] and not model.graph.initializer, (
        "an initializer that can be overridden breaks dynamic batching"
    )


def test_an_export_that_differs_from_torch_is_refused_with_figures(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting.make_plan
    monkeypatch.setattr(exporting, "make_plan", lambda *a, **k: replace(real(*a, **k), growth=1.6))
    monkeypatch.setattr(exporting.Draft, "networks", lambda self: networks())
    with pytest.raises(
        RequestError, match=r"nothing is written: [1-9]\d* mask pixels flipped.*certificates of 64 differ"
    ):
        export(tiles().classifier, masker(), tmp_path / "out", images=images(64))
    assert not (tmp_path / "out").exists()


def test_parity_counts_what_differs() -> None:
    found = Explainer(exported().explainer, trusted=True).explain(images(4))
    masks, certificates = found.masks.copy(), list(found.certificates)
    masks[1, 0, :3] ^= True
    certificates[2] = replace(
        certificates[2], label=certificates[2].label + 1, conf=certificates[2].conf - 0.25
    )
    parity = compare(
        masks, certificates, found.probabilities, found.masks, found.certificates, found.probabilities
    )
    assert (parity.mask_flips, parity.labels, parity.certificates) == (3, 1, 1)
    assert parity.max_abs == pytest.approx(0.25) and not parity.exact
    assert parity.worst == {"label": 1, "conf": 1}


@pytest.mark.parametrize("size", [(24, 24), (37, 50), (16, 129)])
def test_the_masker_takes_any_size(size: tuple[int, int]) -> None:
    session = open_session((folder() / "float32" / "masker.onnx").read_bytes(), "cpu", 1, "masker")
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    out = dict(zip(("prob", "mask_bits", "explanation"), session.run(None, {"image": pixels}), strict=True))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    p = masker().probabilities(x)[:, 0].numpy()
    assert np.abs(out["prob"] - p).max() < 1e-5
    masks = np.stack([unpack_mask(bits.tobytes(), *size) for bits in out["mask_bits"]])
    assert np.array_equal(masks, p > 0.5)
    assert np.array_equal(out["explanation"], np.where(masks[..., None], pixels, 0))


def test_exporting_leaves_the_models_as_they_were() -> None:
    classifier, m = tiles().classifier, masker()
    before = [module.training for module in (*classifier.model.modules(), *m.modules())]
    hooks = sum(len(module._forward_hooks) for module in classifier.model.modules())
    draft().networks()
    assert [module.training for module in (*classifier.model.modules(), *m.modules())] == before
    assert sum(len(module._forward_hooks) for module in classifier.model.modules()) == hooks


class Fixed(nn.Module):
    """A forward pass that only works for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.act(self.conv(x)).mean((2, 3))
        return self.head(torch.stack([features[i] for i in range(int(x.shape[0]))]))


def test_a_model_that_fixes_the_batch_is_refused() -> None:
    from minexp.deploy.networks import classifier_network

    with pytest.raises(RequestError, match="batch|export"):
        classifier_network(Classifier(Fixed(), size=16))


# ---------------------------------------------------------------- 8 bits


def test_eight_bits_are_measured_before_they_are_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting.Draft, "networks", lambda self: networks())
    # networks this small, trained for seconds, lose more to eight bits than the limit for real ones
    monkeypatch.setattr("minexp.deploy.quantise.MOST_FLIPS", 0.04)
    done = export(tiles().classifier, masker(), tmp_path / "int8", images=images(32), quantize="int8")
    cost = done.summary()["quantize"]
    assert cost["acceptable"] and cost["kept"] == (1.0, 1.0) and cost["parity"]["images"] == 32
    assert 0 < cost["parity"]["max_abs"] < 0.3, "eight bits round"
    float32 = exported().files[0].stat().st_size
    assert done.files[0].stat().st_size < 0.45 * float32
    assert Explainer(done.explainer, trusted=True).about.precision == "int8"
    monkeypatch.setattr("minexp.deploy.quantise.MOST_FLIPS", -1.0)
    with pytest.raises(
        RequestError, match=r"int8 against float32 on 8 images: .* mask pixels.*nothing is written"
    ):
        export(tiles().classifier, masker(), tmp_path / "no", images=images(8), quantize="int8")
    assert not (tmp_path / "no").exists()


def test_the_last_layer_stays_exact() -> None:
    x = images(16).transpose(0, 3, 1, 2).astype(np.float32) / 255
    model = quantised(networks()[1], x)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[-1] == "Gemm" and kinds.count("DequantizeLinear") > 10
    assert "DequantizeLinear" not in [
        node.op_type for node in model.graph.node if node.output[0] == model.graph.output[0].name
    ]


# ---------------------------------------------------------------- a classifier that is ONNX


def test_an_onnx_classifier_is_merged(tmp_path) -> None:
    plain = tmp_path / "classifier.onnx"
    own = tiles().classifier
    # the network without its normalisation, as a user would have it
    bare = Classifier(own.model, size=24, class_names=own.class_names)
    from minexp.deploy.networks import classifier_network

    onnx.save(classifier_network(bare), plain)
    classifier = load_classifier(
        str(plain), mean=own.preprocessing.mean, std=own.preprocessing.std, class_names=own.class_names
    )
    x = tiles().x[:5]
    assert torch.allclose(classifier.logits(x), own.logits(x), atol=1e-5)
    masker().save(tmp_path / "masker.safetensors")
    done = export(
        classifier,
        adopt_masker(tmp_path / "masker.safetensors", classifier),
        tmp_path / "out",
        images=images(16),
    )
    assert done.parity.exact
    rows = Explainer(done.explainer, trusted=True).explain(images(16)).rows()
    for one, other in zip(rows, draft().torch(images(16)).rows(), strict=True):
        assert (one["label"], one["mask"], one["status"]) == (other["label"], other["mask"], other["status"])
    with pytest.raises(RequestError, match="gives no gradients"):
        classifier.logits(x.requires_grad_()).sum().backward()
