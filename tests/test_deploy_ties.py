"""Pixels whose side of a mask's level rounding decides: told from flips, and certified by torch."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from deployed import draft, images, networks
from tiny_models import one_thread  # noqa: F401

from minexp.deploy import export as exporting
from minexp.deploy.bake import make_plan
from minexp.deploy.export import Draft
from minexp.deploy.sealed import finished, opened
from minexp.deploy.ties import certify_again, tied
from minexp.errors import RequestError
from minexp.explanation import bind
from minexp.predicate import Predicate
from minexp.repair import SPARING, THOROUGH, Repair


def grid() -> np.ndarray:
    """Probabilities [8,8] of distinct values, 16 of them above one half."""
    p = np.linspace(0.9, 0.1, 64, dtype=np.float32).reshape(8, 8)
    p[2:] *= 0.5
    return p


def test_a_pixel_on_the_level_is_a_tie_and_one_that_is_not_is_a_flip() -> None:
    p = grid()
    p[1, 7] = p[1, 6] = 0.7  # the two last of the mask are equal
    mask = p >= 0.7
    one_less, another_less = mask.copy(), mask.copy()
    one_less[1, 7] = False
    another_less[1, 2] = False
    assert mask.sum() > 14 and tied(p, p, mask, one_less) and tied(p, p, one_less, mask)
    assert not tied(p, p, mask, another_less), "its probability is far from the level"
    away = p.copy()
    away[1, 7] = 0.7 * (1 - 2e-5)
    assert not tied(away, away, mask, one_less), "apart by more than rounding, and the maskers agree"
    assert tied(away, away * np.float32(1 + 2e-5), mask, one_less), "within what the maskers differ by"
    assert not tied(away, away * np.float32(1 + 2e-4), mask, one_less), "no rounding is that large"
    assert not tied(p, p, mask, p > 0.3), "a level set of another size is another answer"


def test_a_pixel_on_the_threshold_may_change_the_sizes_that_are_tried() -> None:
    p = grid()
    p[1, 7] = 0.5  # on the threshold, where the other masker's is above it
    other = p.copy()
    other[1, 7] = np.nextafter(np.float32(0.5), np.float32(1))
    ranked = np.sort(p.ravel())[::-1]
    masks = [p >= ranked[size - 1] for size in (19, 20, 25)]
    assert tied(p, other, masks[0], masks[1]) and not tied(p, p, masks[0], masks[1])
    assert not tied(p, other, masks[0], masks[2])


def disturbed(scale: float) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The tiles' networks, the masker's weights off by relative errors of that scale."""
    masker, rng = onnx.ModelProto(), np.random.default_rng(0)
    masker.CopyFrom(networks()[0])
    for node in masker.graph.node:
        if node.op_type != "Constant":
            continue
        tensor = node.attribute[0].t
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 4:
            values = (values * (1 + scale * rng.standard_normal(values.shape))).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return masker, networks()[1]


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding worse than float32's: a hundred images this small have no tie of that."""
    monkeypatch.setattr("minexp.deploy.ties.MOST", 1e-3)


@pytest.mark.usefixtures("coarse")
def test_an_export_with_ties_is_written_and_counts_them() -> None:
    reference = draft().torch(images())
    _, found, parity = draft().checked(disturbed(3e-5), images(), reference)
    flips = int((found.masks != reference.masks.numpy()).sum())
    assert parity.exact and parity.mask_flips == 0
    assert parity.mask_ties == flips > 0
    assert f"{flips} pixels lie on their mask's level up to rounding" in str(parity)
    with pytest.raises(RequestError, match=r"[1-9]\d* mask pixels flipped"):
        draft().checked(disturbed(1e-2), images(), reference)


@pytest.mark.usefixtures("coarse")
def test_a_tie_with_another_certificate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says about the runtime's mask has to be what the runtime says."""
    real = exporting.certify_again

    def other(*args: object) -> object:
        certificate = real(*args)  # type: ignore[arg-type]
        return replace(certificate, robust_train=certificate.robust_train - 0.25)

    monkeypatch.setattr(exporting, "certify_again", other)
    with pytest.raises(RequestError, match="robust_train in"):
        draft().checked(disturbed(3e-5), images(), draft().torch(images()))


@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_torch_certifies_a_given_mask_as_it_would_its_own(attempt: int) -> None:
    """Of images whose mask held at once, and of images whose mask was enlarged, the certificates torch wrote."""
    predicate = Predicate(rho=0.99, draws=2, early=1)  # so easily passed that fresh draws contradict it
    asked = draft(predicate)
    x = torch.from_numpy(images()).permute(0, 3, 1, 2).float() / 255
    found = asked.torch(images())
    attempts = _attempts(asked)
    chosen = np.flatnonzero(attempts == attempt)[:4]
    assert len(chosen)
    for b in chosen:
        own = found.certificates[b]
        judge, one, logits = bind(
            asked.classifier, x[b : b + 1], asked.masker, predicate=predicate, backgrounds=asked.backgrounds
        )
        again = certify_again(judge, one, logits, found.masks[b][None, None], attempt, own)
        for name, value in vars(own).items():
            assert getattr(again, name) == (
                pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
            ), name


def _attempts(asked: Draft) -> np.ndarray:
    explainer = opened(finished(asked._graph(networks()), asked.about("float32")))
    return explainer.run(images())["attempt"]


@pytest.mark.parametrize(
    ("predicate", "repair", "words"),
    [(Predicate(clean=True), SPARING, "Predicate.clean"), (Predicate(), THOROUGH, "Repair.again")],
)
def test_what_a_graph_cannot_ask_is_refused(predicate: Predicate, repair: Repair, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        make_plan(predicate, "top-1 kept", repair=repair)
