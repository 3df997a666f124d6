"""Targets: decisions worked by hand, losses against plain float64, and explanations that find each one's pixels."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import one_thread  # noqa: F401
from torch import Tensor, nn

from minexp.certify import Predicate
from minexp.classifier import Classifier, load_classifier
from minexp.errors import RequestError
from minexp.explanation import explain
from minexp.masker import Masker
from minexp.refine import Refinement
from minexp.targets import (
    Binary,
    ChosenClass,
    MultiLabel,
    Score,
    Target,
    Value,
    output_kl,
    parse_target,
    similarity,
)
from minexp.training import fit

SIDE = 16
SPOTS = ((3, 4), (11, 5), (7, 12))  # the pixels behind outputs 0, 1 and 2


class Spots(nn.Module):
    """Output k is the brightness of pixel k, less 1/2, times 8; nothing else in the image matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        with torch.no_grad():
            self.conv.weight.fill_(1 / 3)
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        grey = self.act(self.conv(x))[:, 0]
        return 8 * (torch.stack([grey[:, r, c] for r, c in SPOTS], 1) - 0.5)


def image(*brightness: float) -> Tensor:
    x = torch.full((1, 3, SIDE, SIDE), 0.25)
    for (row, column), value in zip(SPOTS, brightness, strict=True):
        x[:, :, row, column] = value
    return x


# logits 3.2, 2.4 and -4; on black all are -4
BOTH = image(0.9, 0.8, 0.0)


def kept_pixels(target: Target | str, x: Tensor = BOTH, model: nn.Module | None = None) -> set[int]:
    """Which of the three pixels a refined explanation keeps; it may keep a few others, but far from all."""
    classifier = Classifier(model or Spots(), size=SIDE, target=target)
    explanation = explain(
        classifier,
        x,
        predicate=Predicate("top1"),
        background="black",
        refinement=Refinement(steps=60, check=5, stride=1),
    )
    certificate = explanation.certificates[0]
    assert certificate.certified and certificate.kept, certificate.reason
    assert certificate.predicate == str(classifier.target)
    assert certificate.area < 0.2
    return {k for k, (r, c) in enumerate(SPOTS) if explanation.masks[0, r, c]}


def test_each_target_finds_its_own_pixels() -> None:
    # the top class needs pixel 0 alone; class 1 is the runner-up and needs its own
    assert 0 in kept_pixels("top1")
    assert 1 in kept_pixels(ChosenClass(chosen=1, keep=0.5))
    assert kept_pixels("multilabel") >= {0, 1}
    assert 1 in kept_pixels(ChosenClass(chosen=1, sigmoid=True))
    assert 1 in kept_pixels(Value(column=1))
    assert 1 in kept_pixels(Score(function=lambda output: output[:, 1] + 4, title="second"))
    reference = torch.tensor([0.0, 1.0, 0.0])
    assert 1 in kept_pixels(similarity(reference, keep=0.95))


class Only(Spots):
    """The first output alone, [B,1] or [B]."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)[:, :1]
        return scores[:, 0] if self.flat else scores


@pytest.mark.parametrize("flat", [False, True])
def test_models_of_one_output(flat: bool) -> None:
    with pytest.raises(RequestError, match=r"returned \[2(, 1)?\].*--target binary or --target value"):
        Classifier(Only(flat), size=SIDE)
    assert 0 in kept_pixels("binary", model=Only(flat))
    assert 0 in kept_pixels("value", model=Only(flat))
    classifier = Classifier(Only(flat), size=SIDE, target="binary", class_names=["no", "yes"])
    logit = 8 * 0.4
    assert classifier.probabilities(BOTH)[0, 1].item() == pytest.approx(1 / (1 + math.exp(-logit)))
    assert (
        explain(classifier, BOTH, predicate=Predicate("top1"), refinement=Refinement(steps=2))
        .certificates[0]
        .label_name
        == "yes"
    )


def test_decisions_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.5, -1.0], [-3.0, -1.0, -2.0]])
    assert Target().decide(scores).tolist() == [0, 1]
    both = MultiLabel().decide(scores)
    p = 1 / (1 + math.exp(1.0))  # the second image has no label: its highest is kept at 9/10
    torch.testing.assert_close(both, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.9 * p, 0.0]]))
    assert MultiLabel().name(scores[0], "abc") == "a, b" and MultiLabel().name(scores[1], "abc") == "b"
    lost = torch.tensor([[2.0, -0.1, 5.0], [9.0, math.log(0.89 * p / (1 - 0.89 * p)), 9.0]])
    assert MultiLabel().kept(scores, both).tolist() == [True, True]
    assert MultiLabel().kept(lost, both).tolist() == [False, False]
    assert MultiLabel().confidence(lost, both)[0].item() == pytest.approx(1 / (1 + math.exp(0.1)))
    value = Value(column=2, tolerance=0.25)
    assert value.kept(scores + 0.2, value.decide(scores)).tolist() == [True, True]
    assert value.kept(scores - 0.3, value.decide(scores)).tolist() == [False, False]
    share = Score(column=1)  # below zero, a tenth of the magnitude may be lost
    decision = share.decide(scores)
    assert share.kept(torch.tensor([[0, 0.46, 0], [0, -1.09, 0]]), decision).tolist() == [True, True]
    assert share.kept(torch.tensor([[0, 0.44, 0], [0, -1.11, 0]]), decision).tolist() == [False, False]
    chosen = ChosenClass(chosen="b").bound("abc")
    e = [math.exp(v) for v in (2.0, 0.5, -1.0)]
    assert chosen.decide(scores)[0].item() == pytest.approx(e[1] / sum(e))
    assert str(chosen) == "p(b) >= 0.9 of the image's" and chosen.name(scores[0], "abc") == "b"
    assert ChosenClass(chosen="2").bound("abc").label(scores).tolist() == [2, 2]


@pytest.mark.parametrize(
    "target",
    [
        Target(),
        MultiLabel(),
        ChosenClass(column=1),
        ChosenClass(column=1, sigmoid=True),
        Value(column=1),
        Score(),
    ],
)
def test_losses_fall_as_the_decision_is_kept_and_a_batch_changes_nothing(target: Target) -> None:
    rng = torch.Generator().manual_seed(0)
    whole = 2 * torch.randn(6, 4, generator=rng)
    masked = (whole + torch.randn(6, 4, generator=rng)).requires_grad_()
    decision = target.decide(whole)
    assert target.kept(whole, decision).all()
    torch.testing.assert_close(target.divergence(whole, whole), torch.zeros(6))
    assert (target.divergence(whole, masked) >= -1e-6).all()
    for quantity in (target.loss, target.confidence, target.kept):
        together = quantity(masked, decision)
        alone = torch.cat([quantity(masked[b : b + 1], decision[b : b + 1]) for b in range(6)])
        assert torch.equal(together, alone) and together.shape == (6,)
    # a step down the loss brings the score nearer to what has to be kept
    loss = target.loss(masked, decision)
    (gradient,) = torch.autograd.grad(loss.sum(), masked)
    better = target.loss(masked.detach() - 1e-3 * gradient, decision)
    assert (better <= loss + 1e-7).all()
    assert (loss.detach() - better).sum() > 0


def test_losses_in_float64() -> None:
    scores, whole = torch.tensor([[0.3, -1.2, 2.0]]), torch.tensor([[1.0, 0.4, -0.5]])
    z, w = scores[0].tolist(), whole[0].tolist()
    sigmoid = [1 / (1 + math.exp(-v)) for v in z]
    labels = MultiLabel()
    expected = -(math.log(sigmoid[0]) + math.log(sigmoid[1])) / 2
    assert labels.loss(scores, labels.decide(whole)).item() == pytest.approx(expected, rel=1e-6)
    p = [1 / (1 + math.exp(-v)) for v in w]
    kl = sum(
        a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p, sigmoid, strict=True)
    )
    assert labels.divergence(whole, scores).item() == pytest.approx(kl, rel=1e-5)
    total = sum(map(math.exp, z))
    assert ChosenClass(column=1).loss(scores, whole[:, 1]).item() == pytest.approx(
        math.log(total) - z[1], rel=1e-6
    )
    assert Value(column=0).loss(scores, whole[:, 0]).item() == pytest.approx(0.7 / 0.1, rel=1e-5)
    assert Value(column=0, tolerance=0.35).loss(scores, whole[:, 0]).item() == pytest.approx(2, rel=1e-5)
    assert Score(column=1).loss(scores, whole[:, 1]).item() == pytest.approx(1.6 / 0.04, rel=1e-4)


def softmax(values: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(v / temperature) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def test_output_kl() -> None:
    rng = torch.Generator().manual_seed(1)
    a, b = 4 * torch.randn(5, 6, generator=rng), 4 * torch.randn(5, 6, generator=rng)
    for temperature in (1.0, 2.0, 5.0):
        pairs = [
            (softmax(x, temperature), softmax(y, temperature))
            for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True)
        ]
        expected = [sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in pairs]
        got = output_kl(a, b, temperature)
        torch.testing.assert_close(got, torch.tensor(expected) * temperature**2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output_kl(a, b), output_kl(a, b, 2.0))


def test_similarity_to_one_text_or_to_several() -> None:
    texts = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    classifier = Classifier(Spots(), size=SIDE, target=similarity(texts), class_names=["cat", "dog"])
    assert (classifier.num_classes, classifier.class_names) == (2, ("cat", "dog"))
    output = Spots()(BOTH)[0].double()
    cosine = output[:2] / output.norm()
    torch.testing.assert_close(classifier.logits(BOTH)[0].double(), 100 * cosine, rtol=1e-5, atol=1e-5)
    single = Classifier(Spots(), size=SIDE, target=similarity(texts[1]))
    torch.testing.assert_close(single.logits(BOTH)[0, 0].double(), cosine[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(RequestError, match=r"embeddings \[2, 3\] beside references of 4 numbers"):
        Classifier(Spots(), size=SIDE, target=similarity(torch.ones(4)))


@pytest.mark.filterwarnings("ignore:the masks")
def test_masks_are_trained_for_the_target_and_fit_no_other() -> None:
    x = torch.cat([image(0.9, 0.8, 0.0), image(0.7, 1.0, 0.2)])
    classifier = Classifier(Spots(), size=SIDE, target="multilabel")
    masker = fit(classifier, x, steps=2, batch=2, progress=False)
    with pytest.raises(RequestError, match="fitted to another classifier"):
        explain(Classifier(Spots(), size=SIDE), x, masker)
    rows = explain(classifier, x, masker, predicate=Predicate(draws=4)).rows()
    assert [row["label_name"] for row in rows] == ["0, 1", "0, 1"]


def test_fingerprints_tell_targets_apart() -> None:
    def fingerprint(target: Target | str) -> str:
        return Classifier(Spots(), size=SIDE, target=target).fingerprint

    ones, zeros = torch.ones(3), torch.tensor([1.0, 0.0, 0.0])
    targets: list[Target | str] = [
        "top1",
        "class:1",
        "class:2",
        "label:1",
        "multilabel",
        "value:1",
        MultiLabel(keep=0.5),
    ]
    targets += [similarity(ones), similarity(zeros), Score(function=lambda output: output[:, 0])]
    targets += [Score(function=lambda output: output[:, 1] * 2)]
    assert len({fingerprint(target) for target in targets}) == len(targets)
    assert fingerprint("top1") == Classifier(Spots(), size=SIDE).fingerprint
    assert fingerprint(similarity(ones)) == fingerprint(similarity(ones.clone()))


def test_targets_as_the_command_line_writes_them(tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.array([0.0, 1.0, 0.0], np.float32))
    (tmp_path / "mine.py").write_text("def second(output):\n    return output[:, 1]\n\nwrong = str\n")
    assert isinstance(parse_target("binary"), Binary)
    chosen = parse_target("label:eel", keep=0.8)
    assert isinstance(chosen, ChosenClass) and chosen.sigmoid and chosen.keep == 0.8
    value = parse_target("value:2", tolerance=3.0)
    assert isinstance(value, Value) and (value.column, value.tolerance) == (2, 3.0)
    for text in (f"similarity:{tmp_path / 'text.npy'}", f"{tmp_path / 'mine.py'}:second"):
        assert Classifier(Spots(), size=SIDE, target=text).logits(BOTH).shape == (1, 1)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("top2", "unknown target 'top2'; write it as top1, class:NAME"),
        ("class:", "unknown target 'class:'"),
        ("class:cta", "no class 'cta' to explain; near: cat"),
        ("class:7", "output 7 of a model with 3; they count from 0"),
        ("value:3", "output 3 of a model with 3"),
        ("binary", "one output an image"),
        ("similarity:none.npy", "none.npy holds no embeddings"),
        ("no.such:function", "no module 'no.such' for the target"),
        ("minexp.targets:nothing", "has no function 'nothing'"),
        ("builtins:str", "the target str has to return one number an image"),
    ],
)
def test_wrong_targets_are_one_line(target: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        Classifier(Spots(), size=SIDE, target=target, class_names=["cat", "dog", "eel"])
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="keep is 0"):
        Score(keep=0)


def test_a_factory_s_classifier_keeps_its_target_unless_another_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from test_targets import SIDE, Spots\nfrom minexp.classifier import Classifier\n"
        "def net():\n    return Classifier(Spots(), size=SIDE, target='multilabel')\n"
    )
    assert isinstance(load_classifier(f"{tmp_path / 'net.py'}:net").target, MultiLabel)
    assert isinstance(load_classifier(f"{tmp_path / 'net.py'}:net", target="value:1").target, Value)


def test_exported_explainers_are_not_for_several_labels_at_once(tmp_path: Path) -> None:
    from minexp.deploy.export import export

    pytest.importorskip("onnx")
    classifier = Classifier(Spots(), size=SIDE, target="multilabel")
    masker = Masker()
    masker.reference = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    with pytest.raises(RequestError, match="cannot answer for 'labels kept at 0.5'.*load the classifier"):
        export(classifier, masker, tmp_path, images=torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8).numpy())
