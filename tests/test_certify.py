"""The predicate and the certificate, against plain recomputation one image at a time."""

import itertools
import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from test_regions import flood
from tiny_models import (
    SIDE,
    TARGET,
    counted,
    filters,
    noise_images,
    random_masks,
    red_images,
    red_pixel,
)
from tiny_models import (
    one_thread as one_thread,
)
from torch import Tensor

from minexp.backgrounds import HELD_OUT, OTHER, RANDOM, Backgrounds
from minexp.certify import Certificate
from minexp.certify import certify as measure
from minexp.classifier import Classifier
from minexp.errors import RequestError
from minexp.intervals import wilson
from minexp.judge import Judge
from minexp.predicate import Contrast, Necessary, Predicate, Question
from minexp.repair import Masks

MEAN = torch.tensor([0.5, 0.4, 0.3])
ROBUST = Predicate()


def judge(
    classifier: Classifier,
    predicate: Predicate = ROBUST,
    *,
    reference: bool = True,
    micro_batch: int | None = None,
    mean: Tensor = MEAN,
) -> Judge:
    others = noise_images(6, seed=100) if reference else None
    return Judge(classifier, predicate, Backgrounds(mean, others, seed=2), micro_batch=micro_batch)


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_by_hand() -> None:
    # (1/2 + 3.8415 / 32 ± 1.95996 · sqrt(1/64 + 3.8415 / 1024)) / (1 + 3.8415 / 16) = (0.620047 ± 0.272852) / 1.240091
    assert wilson(8, 16) == pytest.approx((0.279976, 0.720024), abs=2e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("rho", "draws", "misses"),
    [(0.95, 20, 1), (0.95, 10, 0), (0.9, 10, 1), (1.0, 50, 0), (0.7, 10, 3), (0.5, 5, 2)],
)
def test_misses_allowed(rho: float, draws: int, misses: int) -> None:
    predicate = Predicate(rho=rho, draws=draws)
    assert predicate.misses == misses
    assert (draws - misses) / draws >= rho - 1e-9 > (draws - misses - 1) / draws - 1e-6


def test_predicates_in_words() -> None:
    assert str(Predicate("top1")) == "top-1 kept"
    assert str(Predicate("score", tau=0.8)) == "p >= 0.8"
    assert str(Predicate(rho=0.9, early=20)) == "top-1 kept and robust >= 0.9 on 20 backgrounds"
    text = "top-1 kept and robust >= 0.95 on 20 backgrounds (7 without a miss), 2 times, also dilated"
    assert str(Predicate(repeats=2, dilated=True)) == text
    text = "top-1 kept and robust >= 0.95 (14 backgrounds without a miss), also dilated"
    assert str(Predicate(repeats=2, dilated=True, clean=True)) == text


@pytest.mark.parametrize("bad", [{"kind": "best"}, {"rho": 0.0}, {"rho": 1.1}, {"draws": 0}, {"tau": -0.1}])
def test_impossible_predicates_are_refused(bad: dict) -> None:
    with pytest.raises(RequestError, match="predicate"):
        Predicate(**bad)


def pixel_mask(*places: tuple[int, int]) -> Tensor:
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    for place in places:
        mask[0, 0, place[0], place[1]] = True
    return mask


@pytest.mark.parametrize("kind", ["top1", "score", "robust"])
def test_a_known_minimal_mask_holds_and_nothing_less(kind: str) -> None:
    bound = judge(red_pixel(), Predicate(kind, tau=0.9, draws=10))
    x, label = red_images(1), torch.tensor([1])
    for mask, wanted in [
        (pixel_mask(TARGET), True),
        (~pixel_mask(TARGET), False),
        (pixel_mask(), False),
        (torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool), True),
        (pixel_mask(TARGET, (0, 0)), True),
        (pixel_mask((TARGET[0], TARGET[1] + 1)), False),
    ]:
        assert bound.holds(x, label, mask).ok.tolist() == [wanted]


def test_score_threshold_is_of_the_explained_class() -> None:
    x, mask, label = noise_images(8), random_masks(8), torch.arange(8) % 4
    classifier = filters()
    p = classifier.probabilities(torch.where(mask, x, MEAN.view(1, 3, 1, 1))).gather(1, label[:, None])[:, 0]
    tau = float(p.median()) + 1e-4
    found = judge(classifier, Predicate("score", tau=tau)).holds(x, label, mask)
    assert torch.equal(found.ok, p >= tau) and 0 < found.ok.sum() < 8
    assert found.spent.tolist() == [1] * 8


def slow_holds(bound: Judge, x: Tensor, label: int, mask: Tensor) -> bool:
    """The predicate of one image, draw by draw; x [1,C,H,W]."""
    classifier, predicate = bound.classifier, bound.predicate
    wide = torch.nn.functional.max_pool2d(mask.float(), 3, 1, 1).bool()
    for shown in [mask, wide] if predicate.dilated else [mask]:
        if int(classifier.logits(torch.where(shown, x, MEAN.view(1, 3, 1, 1))).argmax()) != label:
            return False
    for repeat in range(predicate.repeats):
        kept = []
        for number in range(repeat * predicate.draws, (repeat + 1) * predicate.draws):
            family, pick = RANDOM[number % 4], torch.tensor([[number // 4]])
            background = bound.backgrounds.draw(family, x, pick, purpose="predicate")[0]
            kept.append(int(classifier.logits(torch.where(mask, x, background)).argmax()) == label)
        forgiven = not predicate.clean and sum(kept) >= predicate.rho * predicate.draws - 1e-9
        if not (all(kept[: predicate.early]) or forgiven):
            return False
    return True


PREDICATES = [
    Predicate(rho=0.6, draws=8, early=5, clean=True),
    Predicate(rho=0.95, draws=10),
    Predicate(rho=0.8, draws=12, early=12),
    Predicate(rho=0.6, draws=10, early=3),
    Predicate(rho=1.0, draws=3),
    Predicate(rho=0.7, draws=7, early=5, repeats=3),
    Predicate(rho=0.8, draws=10, early=4, repeats=2, dilated=True),
]


@pytest.mark.parametrize("predicate", PREDICATES, ids=str)
@pytest.mark.parametrize("reference", [True, False])
def test_robust_predicate_against_single_draws(predicate: Predicate, reference: bool) -> None:
    classifier, n = filters(), 24
    x, mask = noise_images(n), torch.cat([random_masks(n // 2, 0.6), random_masks(n // 2, 0.95)])
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier, predicate, reference=reference, micro_batch=7)
    with counted(classifier) as count:
        found = bound.holds(x, label, mask)
    assert count.images == int(found.spent.sum())
    slow = [slow_holds(bound, x[b : b + 1], int(label[b]), mask[b : b + 1]) for b in range(n)]
    assert found.ok.tolist() == slow
    assert 0 < found.ok.sum() < n  # both answers occur
    for b in found.ok.nonzero().flatten().tolist():
        scores = classifier.logits(torch.where(mask[b], x[b], MEAN.view(3, 1, 1))[None])[0]
        assert torch.allclose(found.scores[b], scores, atol=1e-5)


@pytest.mark.parametrize("predicate", PREDICATES, ids=str)
def test_hints_change_what_is_asked_and_no_verdict(predicate: Predicate) -> None:
    classifier, n = filters(), 24
    x, mask = noise_images(n), torch.cat([random_masks(n // 2, 0.6), random_masks(n // 2, 0.95)])
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier, predicate)
    plain = bound.holds(x, label, mask)
    again = bound.holds(x, label, mask, hints=(plain.margins <= 0).float())
    assert torch.equal(again.ok, plain.ok)
    rejected = ~plain.ok
    assert again.spent[rejected].sum() < plain.spent[rejected].sum()
    random = torch.rand(plain.margins.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bound.holds(x, label, mask, hints=random).ok, plain.ok)


@pytest.mark.parametrize("predicate", PREDICATES, ids=str)
def test_what_is_known_of_a_mask_is_not_asked_again(predicate: Predicate) -> None:
    classifier, n = filters(), 24
    x, mask = noise_images(n), torch.cat([random_masks(n // 2, 0.6), random_masks(n // 2, 0.95)])
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier, predicate)
    whole = bound.holds(x, label, mask)
    some = torch.zeros(n, bound.checks, dtype=torch.bool)
    some[:, ::2] = True
    known = bound.passes(x, label, mask, some, torch.zeros(n, bound.checks))
    with counted(classifier) as count:
        found = bound.holds(x, label, mask, known=known)
    assert torch.equal(found.ok, whole.ok) and 0 < found.ok.sum() < n
    assert count.images == int(found.spent.sum()) < int(whole.spent.sum())
    assert torch.allclose(found.scores[found.ok], whole.scores[whole.ok], atol=1e-5)


def test_one_miss_rejects_where_the_predicate_is_clean() -> None:
    """The strictest judge of all: what it accepts passes the named predicate, and a mask that fails shows one miss."""
    classifier, n = filters(), 32
    x, mask = noise_images(n), random_masks(n, 0.9)
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier, Predicate(rho=0.6, draws=10, early=5, repeats=2))
    loose, clean = bound.holds(x, label, mask), bound.cleaner().holds(x, label, mask)
    assert (loose.ok | ~clean.ok).all() and loose.ok.sum() > clean.ok.sum() > 0
    assert (clean.spent <= loose.spent).all()
    assert ((clean.margins <= 0).any(1) == ~clean.ok).all()
    early = bound.early().expand(n, -1)
    assert torch.equal(clean.ok, bound.passes(x, label, mask, early, torch.zeros(n, bound.checks)).ok)


def test_a_mask_passes_early_or_after_all_draws() -> None:
    """Draws that fail by number: seven without a miss are enough, one miss of twenty is forgiven, two are not."""
    bound = judge(red_pixel(), Predicate(), mean=torch.zeros(3))
    x, label, mask = red_images(5), torch.ones(5, dtype=torch.long), pixel_mask(TARGET).expand(5, -1, -1, -1)
    misses = [set(), {3}, {3, 9}, {9, 12}, {2, 3}]

    def answer(_x: Tensor, _mask: Tensor, image: Tensor, check: Tensor) -> Tensor:
        missed = [int(c) - 1 in misses[int(i)] for i, c in zip(image, check, strict=True)]
        return torch.tensor([[1.0, 0.0] if m else [0.0, 1.0] for m in missed])

    bound._check = answer  # type: ignore[method-assign]
    found = bound.holds(x, label, mask)
    assert found.ok.tolist() == [True, True, False, True, False]
    assert found.spent.tolist() == [8, 21, 13, 8, 5]


def test_what_the_stricter_judge_accepts_is_accepted() -> None:
    classifier, n = filters(), 32
    x, mask = noise_images(n), random_masks(n, 0.9)
    label = classifier.logits(x).argmax(1)
    bound = judge(classifier, Predicate(rho=0.8, draws=10, early=4))
    loose, strict = bound.holds(x, label, mask).ok, bound.stricter(3).holds(x, label, mask).ok
    assert (loose | ~strict).all() and loose.sum() > strict.sum() > 0


@pytest.mark.parametrize("predicate", PREDICATES[:6], ids=str)
def test_acceptance_is_the_share_of_draws_that_pass(predicate: Predicate) -> None:
    """Against the enumeration of every outcome of the draws."""
    for robust in (0.0, 0.6, 0.9, 1.0):
        total = 0.0
        for outcome in itertools.product((0, 1), repeat=predicate.draws):
            hits = sum(outcome)
            forgiven = not predicate.clean and hits >= predicate.rho * predicate.draws - 1e-9
            if all(outcome[: predicate.early]) or forgiven:
                total += robust**hits * (1 - robust) ** (predicate.draws - hits)
        assert predicate.acceptance(robust) == pytest.approx(total**predicate.repeats)


@pytest.mark.parametrize("question", [Necessary(), Contrast(2)])
def test_other_questions_are_asked_of_every_background(question: Question) -> None:
    classifier, n = filters(), 32
    x, mask = noise_images(n), random_masks(n, 0.5)
    label = classifier.logits(x).argmax(1)
    backgrounds = Backgrounds(MEAN, noise_images(6, seed=9), seed=2)
    found = Judge(classifier, Predicate(rho=1.0, draws=4), backgrounds, question=question).holds(
        x, label, mask
    )
    for b in range(n):
        one, y, shown = x[b : b + 1], int(label[b]), mask[b]
        draws = [MEAN.view(1, 3, 1, 1).expand_as(one)]
        draws += [
            backgrounds.draw(family, one, torch.tensor([[0]]), purpose="predicate")[0] for family in RANDOM
        ]
        answers = []
        for background in draws:
            kept = (
                torch.where(shown, background, one)
                if isinstance(question, Necessary)
                else torch.where(shown, one, background)
            )
            scores = classifier.logits(kept)[0]
            answers.append(
                int(scores.argmax()) != y if isinstance(question, Necessary) else scores[y] > scores[2]
            )
        assert bool(found.ok[b]) == all(answers)
    assert 0 < found.ok.sum() < n


def certify(bound: Judge, x: Tensor, mask: Tensor) -> list[Certificate]:
    n = len(x)
    return measure(
        bound,
        x,
        bound.logits(x),
        Masks(
            mask,
            holds=torch.arange(n) % 2 == 0,
            threshold=torch.linspace(0.1, 0.9, n),
            evaluations=torch.arange(n),
            scores=bound.logits(torch.where(mask, x, bound.backgrounds.default(x))),
            minimal_at=4 * (torch.arange(n) % 3),
        ),
    )


def slow_certificate(bound: Judge, x: Tensor, mask: Tensor, b: int, n: int) -> dict:
    """The certificate of image b of n from single forward passes and plain counting; x [C,H,W], mask [H,W]."""
    classifier = bound.classifier
    plain = mask.numpy()

    def scores(kept: np.ndarray, background: Tensor) -> Tensor:
        image = torch.empty_like(x)
        for i in range(SIDE):
            for j in range(SIDE):
                image[:, i, j] = x[:, i, j] if kept[i, j] else background[:, i, j]
        return classifier.logits(image[None])[0].softmax(0)

    default = MEAN.view(3, 1, 1).expand_as(x)
    wide = np.zeros_like(plain)
    for i, j in zip(*np.nonzero(plain), strict=True):
        wide[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2] = True
    full = classifier.logits(x[None])[0].softmax(0)
    y = int(full.argmax())
    masked = scores(plain, default)
    values = (x * 255).round().to(torch.uint8).flatten().tolist()
    first = sum(value * (place * 40503 % 65521) for place, value in enumerate(values)) % 2**31
    families = [*RANDOM, *HELD_OUT] + ([OTHER] if bound.backgrounds.reference is not None else [])
    hits = {}
    for family in families:
        draws = bound.backgrounds.draw(
            family, x[None], torch.tensor([[first + k for k in range(5)]]), purpose="certificate"
        )[0]
        hits[family] = sum(int(scores(plain, draw).argmax()) == y for draw in draws)
    train, held = sum(hits[f] for f in RANDOM), sum(hits[f] for f in HELD_OUT)
    count = int(plain.sum())
    inner = int(plain[1:-1, 1:-1].sum())  # 4 % of 16 is one pixel
    return {
        "certified": b % 2 == 0 and wilson(train, 20)[1] >= bound.predicate.rho,
        "label": y,
        "label_name": str(y),
        "conf": float(full[y]),
        "label_masked": int(masked.argmax()),
        "conf_masked": float(masked[y]),
        "conf_complement": float(scores(~plain, default)[y]),
        "conf_empty": float(classifier.logits(default[None])[0].softmax(0)[y]),
        "kept": int(masked.argmax()) == y,
        "area": count / SIDE**2,
        "components": flood(plain),
        "border_share": (count - inner) / count if count else 0.0,
        "threshold": float(torch.linspace(0.1, 0.9, n)[b]),
        "robust_train": train / 20,
        "robust_train_low": wilson(train, 20)[0],
        "robust_train_high": wilson(train, 20)[1],
        "robust_train_n": 20,
        "robust_heldout": held / 15,
        "robust_heldout_low": wilson(held, 15)[0],
        "robust_heldout_high": wilson(held, 15)[1],
        "robust_heldout_n": 15,
        "robust_other": hits[OTHER] / 5 if OTHER in hits else None,
        "robust_other_n": 5 if OTHER in hits else 0,
        "dilation_kept": int(scores(wide, default).argmax()) == y,
        "minimal_at": 4 * (b % 3) or None,
        "predicate": str(bound.predicate),
        "evaluations": b + 3 + 5 * len(families),
        "families": {"mean": float(int(masked.argmax()) == y)}
        | {family: hits[family] / 5 for family in families},
    }


@pytest.mark.parametrize("reference", [True, False])
def test_every_field_against_plain_recomputation(reference: bool) -> None:
    classifier, n = filters(), 8
    x = noise_images(n)
    mask = torch.cat(
        [
            random_masks(3, 0.5),
            random_masks(3, 0.8, seed=1),
            torch.zeros(1, 1, SIDE, SIDE).bool(),
            pixel_mask((0, 0)),
        ]
    )
    bound = judge(classifier, reference=reference)
    certificates = certify(bound, x, mask)
    seen = set()
    for b, certificate in enumerate(certificates):
        slow = slow_certificate(bound, x[b], mask[b, 0], b, n)
        assert {*slow, "reason"} == {field.name for field in fields(Certificate)}
        cause = {True: None, False: "contradict" if b % 2 == 0 else "whole image"}[slow["certified"]]
        assert (cause or "") in (certificate.reason or "") and (cause is None) == (certificate.reason is None)
        for name, value in slow.items():
            got = json.loads(certificate.families) if name == "families" else getattr(certificate, name)
            assert got == pytest.approx(value, abs=1e-5), (b, name)
        seen |= {certificate.robust_train, certificate.robust_heldout}
    assert len(seen) > 3, "the toy classifier should survive some backgrounds and not others"
    assert len({c.kept for c in certificates}) == 2


def test_a_certificate_counts_its_own_evaluations() -> None:
    classifier, x, mask = filters(), noise_images(5), random_masks(5)
    bound = judge(classifier, micro_batch=3)
    logits = bound.logits(x)
    with counted(classifier) as count:
        certificates = measure(
            bound,
            x,
            logits,
            Masks(mask, torch.ones(5).bool(), torch.zeros(5), torch.zeros(5), logits, torch.zeros(5)),
        )
    # f(x) was given, the empty image belongs to the job and not to an image
    assert sum(c.evaluations for c in certificates) == count.images + 5 - 1
    with counted(classifier) as count:
        certify(bound, x, mask)
    assert (
        count.images == sum(c.evaluations for c in certificates) + 5
    )  # e, too; the empty image is known now


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 1000])
def test_a_certificate_does_not_depend_on_the_batch(micro_batch: int) -> None:
    x, mask = noise_images(7), random_masks(7)
    whole = certify(judge(filters(), micro_batch=64), x, mask)
    assert_close(certify(judge(filters(), micro_batch=micro_batch), x, mask), whole)
    bound = judge(filters(), micro_batch=micro_batch)
    one = certify(bound, x[4:5], mask[4:5])[0]
    for field in fields(Certificate):
        if field.name not in ("certified", "threshold", "evaluations", "minimal_at"):
            value = getattr(one, field.name)
            assert value == pytest.approx(getattr(whole[4], field.name), abs=1e-6), field.name


def assert_close(left: list[Certificate], right: list[Certificate]) -> None:
    for a, b in zip(left, right, strict=True):
        for field in fields(Certificate):
            assert getattr(a, field.name) == pytest.approx(getattr(b, field.name), abs=1e-6), field.name


def test_scores_do_not_depend_on_the_batch() -> None:
    """To the bit: what a score rounds to decides ties, and descents enlarge the difference."""
    x = noise_images(9)
    whole = judge(filters(), micro_batch=64).logits(x)
    for micro_batch in (1, 2, 4, 7):
        assert torch.equal(judge(filters(), micro_batch=micro_batch).logits(x), whole), micro_batch
    assert torch.equal(judge(filters()).logits(x[3:4]), whole[3:4])


def test_certificate_draws_are_not_the_predicates() -> None:
    """A mask repaired until the predicate's own draws pass must be judged on others."""
    asked: dict[str, list[Tensor]] = {}
    classifier = filters()
    bound = judge(classifier, Predicate(rho=1.0, draws=40, early=40))  # never stops early
    real = bound.backgrounds.draw

    def spy(family: str, x: Tensor, picks: Tensor, *, purpose: str, pool: int = 16) -> Tensor:
        out = real(family, x, picks, purpose=purpose, pool=pool)
        asked.setdefault(purpose, []).extend(out.flatten(0, 1))
        return out

    bound.backgrounds.draw = spy  # type: ignore[method-assign]
    x, mask = noise_images(1), torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool)
    bound.holds(x, classifier.logits(x).argmax(1), mask)
    certify(bound, x, mask)
    assert {len(v) for v in asked.values()} == {40} and len(asked) == 2
    trained_on, fresh = asked.values()
    assert not any(torch.equal(a, b) for a in trained_on for b in fresh)
    assert sum(torch.equal(a, b) for a in fresh for b in fresh) <= 40 + 2 * 6  # its own draws differ, too


def test_no_draw_of_a_predicate_counts_twice() -> None:
    classifier = filters()
    bound = judge(classifier, Predicate(rho=1.0, draws=100, early=100))
    real, asked = bound.backgrounds.draw, []

    def spy(family: str, *arguments: Any, **options: Any) -> Tensor:
        out = real(family, *arguments, **options)
        if family == "uniform":
            asked.append(tuple(out.flatten().tolist()))
        return out

    bound.backgrounds.draw = spy  # type: ignore[method-assign]
    x, mask = noise_images(1), torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool)
    assert bound.holds(x, classifier.logits(x).argmax(1), mask).spent.tolist() == [101]
    assert len(asked) == len(set(asked)) == 25


def test_known_certificate_of_a_red_pixel() -> None:
    bound = judge(red_pixel(), reference=False, mean=torch.zeros(3))
    (certificate,) = certify(bound, red_images(1), pixel_mask(TARGET))
    assert certificate.label == 1 and certificate.label_name == "red" and certificate.kept
    assert certificate.area == 1 / 256 and certificate.components == 1 and certificate.border_share == 0
    assert certificate.robust_train == certificate.robust_heldout == 1.0
    assert certificate.conf == certificate.conf_masked > 0.99
    assert certificate.conf_complement == certificate.conf_empty < 0.01
    assert certificate.dilation_kept and certificate.robust_other is None and certificate.robust_other_n == 0
    assert "certified: top-1 kept and robust >= 0.95" in str(certificate)
