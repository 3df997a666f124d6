"""explain(): the same answer in every batch, every evaluation counted, the model left as it was."""

import json
import zlib
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    SIDE,
    TARGET,
    counted,
    filters,
    noise_images,
    red_images,
    red_pixel,
    state,
)
from tiny_models import (
    one_thread as one_thread,
)
from trained_tiles import masker, tiles

from minexp import explanation
from minexp.certify import Certificate, Predicate
from minexp.data.store import unpack_mask
from minexp.data.tables import EXPLANATIONS
from minexp.errors import MinexpError, RequestError
from minexp.explanation import Effort, Explanation, explain, make_backgrounds, side_by_side
from minexp.masker import Masker
from minexp.objective import Objective
from minexp.refine import Refinement

SHORT = Refinement(steps=12, stride=2, check=3, objective=Objective(area=4.0, soft=0.5))
STRICT = Predicate(rho=0.9, draws=15)


def explained(
    part: slice, *, effort: Effort, with_masker: bool = True, micro_batch: int | None = None
) -> Explanation:
    subject = tiles()
    return explain(
        subject.classifier,
        subject.x[part],
        masker() if with_masker else None,
        predicate=STRICT,
        effort=effort,
        refinement=SHORT,
        micro_batch=micro_batch,
        seed=3,
    )


def differences(left: list[Certificate], right: list[Certificate]) -> list[tuple[int, str]]:
    """Where certificates differ, but for rounding in probabilities."""
    return [
        (b, field.name)
        for b, (one, other) in enumerate(zip(left, right, strict=True))
        for field in fields(Certificate)
        if getattr(one, field.name)
        != pytest.approx(getattr(other, field.name), abs=1e-3 if field.name == "threshold" else 1e-5)
    ]


@pytest.mark.parametrize(
    ("effort", "with_masker", "n"), [("fast", True, 14), ("refined", True, 8), ("refined", False, 8)]
)
def test_an_answer_does_not_depend_on_its_batch(effort: Effort, with_masker: bool, n: int) -> None:
    whole = explained(slice(n), effort=effort, with_masker=with_masker)
    for size in (1, 3, 7):
        parts = [
            explained(slice(i, min(n, i + size)), effort=effort, with_masker=with_masker)
            for i in range(0, n, size)
        ]
        assert torch.equal(torch.cat([p.masks for p in parts]), whole.masks), size
        assert differences([c for p in parts for c in p.certificates], list(whole.certificates)) == []
    for micro_batch in (1, 3):
        again = explained(slice(n), effort=effort, with_masker=with_masker, micro_batch=micro_batch)
        assert torch.equal(again.masks, whole.masks), micro_batch
        assert differences(list(again.certificates), list(whole.certificates)) == []
    assert 0 < whole.masks.float().mean() < 0.7
    assert len({c.evaluations for c in whole.certificates}) > 1


@pytest.mark.parametrize("effort", ["fast", "refined"])
def test_evaluations_are_what_went_through_the_model(effort: Effort) -> None:
    with counted(tiles().classifier) as count:
        answer = explained(slice(30 if effort == "fast" else 6), effort=effort)
    total = sum(c.evaluations for c in answer.certificates)
    assert total == count.images - 1  # the empty image is one evaluation of the job, of no image


def test_certified_means_that_the_predicate_holds() -> None:
    answer = explained(slice(40), effort="fast")
    assert sum(c.certified for c in answer.certificates) >= 38
    for certificate in answer.certificates:
        if certificate.certified:
            assert certificate.kept and certificate.robust_train_high >= STRICT.rho and not certificate.reason
        else:
            assert certificate.reason
    assert all(c.predicate.startswith(str(STRICT)) for c in answer.certificates)  # more draws where enlarged


def test_the_known_pixel_is_explained() -> None:
    answer = explain(
        red_pixel(),
        red_images(2),
        predicate=Predicate(rho=0.95, draws=10),
        background="black",
        refinement=replace(SHORT, steps=60),
    )
    for one in answer:
        assert one.certificates[0].certified and one.certificates[0].label_name == "red"
        assert one.masks[0, TARGET[0], TARGET[1]]
        assert one.certificates[0].area < 0.15


def test_whatever_fresh_draws_contradict_is_enlarged_or_marked() -> None:
    classifier, x = filters(), noise_images(24)
    lenient = explain(classifier, x, predicate=Predicate("top1"), refinement=SHORT)
    strict = explain(classifier, x, predicate=Predicate(rho=0.95, draws=5), refinement=SHORT)
    assert any(c.robust_train_high < 0.95 for c in lenient.certificates)
    for certificate in strict.certificates:
        assert certificate.certified == (certificate.robust_train_high >= 0.95)
        assert certificate.kept
    assert np.mean([c.area for c in strict.certificates]) > np.mean([c.area for c in lenient.certificates])


def test_enlarging_helps_and_touches_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, x, weak = filters(), noise_images(24), Predicate(rho=0.95, draws=5)
    final = explain(classifier, x, predicate=weak, refinement=SHORT)
    monkeypatch.setattr(explanation, "RETRIES", 0)
    first = explain(classifier, x, predicate=weak, refinement=SHORT)
    contradicted = [b for b, c in enumerate(first.certificates) if not c.certified]
    assert contradicted and sum(c.certified for c in final.certificates) > 24 - len(contradicted)
    for b in range(24):
        if b in contradicted:
            assert final.masks[b].sum() > first.masks[b].sum()
            assert final.certificates[b].evaluations > first.certificates[b].evaluations
        else:
            assert torch.equal(final.masks[b], first.masks[b])
            assert final.certificates[b] == first.certificates[b]


def test_a_predicate_that_even_the_whole_image_fails_is_reported() -> None:
    classifier, x = filters(), noise_images(6)
    answer = explain(classifier, x, predicate=Predicate("score", tau=0.99999999), refinement=SHORT)
    failed = [b for b, c in enumerate(answer.certificates) if not c.certified]
    assert failed
    for b in failed:
        row = answer.rows()[b]
        assert row["status"] == "uncertified" and "even for the whole image: p >= 1" in row["error"]


def test_rows_have_the_stores_columns() -> None:
    answer = explained(slice(3), effort="fast")
    rows = answer.rows()
    assert {*rows[0], "id", "uri", "truth"} == set(EXPLANATIONS.schema.names)
    for row, mask, certificate in zip(rows, answer.masks.numpy(), answer.certificates, strict=True):
        assert np.array_equal(unpack_mask(row["mask"], 24, 24), mask)
        assert row["mask_crc32"] == zlib.crc32(row["mask"])
        assert row["status"] == ("certified" if certificate.certified else "uncertified")
        assert row["area"] == pytest.approx(mask.mean()) and row["ms"] > 0
        assert set(json.loads(row["robust_families"])) >= {"mean", "uniform", "blur", "other"}
        assert row["error"] == certificate.reason


def test_an_explanation_is_a_sequence() -> None:
    answer = explained(slice(4), effort="fast")
    assert len(answer) == 4 and len(list(answer)) == 4
    assert (
        torch.equal(answer[-1].masks, answer.masks[3:]) and answer[-1].certificates == answer.certificates[3:]
    )
    with pytest.raises(IndexError):
        answer[4]
    assert "4 images" in repr(answer) and "keeps" in repr(answer[0])
    kept = answer.kept_images()
    inside = answer.masks[:, None].expand_as(kept)
    assert torch.equal(kept[inside], answer.x[inside])
    outside = kept.movedim(1, -1)[~answer.masks]
    torch.testing.assert_close(outside, masker().mean.expand_as(outside))


def test_an_explanation_shows_itself() -> None:
    answer = explained(slice(3), effort="fast")
    picture = answer.plot(limit=2)
    assert picture.mode == "RGB" and picture.width > picture.height  # two panels beside each other
    page = answer._repr_html_()
    assert page.count("<figure") == 3 and page.count("data:image") == 6
    assert answer.certificates[0].predicate.replace(">", "&gt;") in page
    both = side_by_side({"one": answer, "two": answer})
    assert both.height > 3 * 256 > both.width - 3 * 30 > 2 * 256


@pytest.mark.parametrize("effort", ["fast", "refined"])
@pytest.mark.parametrize("throws", [False, True])
def test_the_model_is_as_it_was_afterwards(effort: Effort, throws: bool) -> None:
    classifier = tiles().classifier
    model = classifier.model.train().requires_grad_(True)
    first = next(model.parameters())
    first.requires_grad_(False)
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = None
    try:
        if throws:
            calls = []

            def fail(*_: Any) -> None:
                calls.append(1)
                if len(calls) > 3:
                    raise ValueError("broken on purpose")

            handle = model.fc.register_forward_hook(fail)  # type: ignore[union-attr, operator]
            before = state(model)
            with pytest.raises(ValueError, match="on purpose"):
                explained(slice(3), effort=effort)
        else:
            explained(slice(3), effort=effort)
        assert state(model) == before
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    finally:
        if handle is not None:
            handle.remove()
        model.eval()
        first.requires_grad_(True)


def test_the_maskers_mode_is_as_it_was() -> None:
    mine = masker().train()
    try:
        explained(slice(2), effort="fast")
        assert mine.training
        explained(slice(2), effort="refined")
        assert mine.training
    finally:
        mine.eval()


def test_a_masker_of_another_classifier_is_refused() -> None:
    mine = masker()
    assert mine.metadata["classifier"] == tiles().classifier.fingerprint
    with pytest.raises(RequestError, match="another classifier"):
        explain(filters(), noise_images(2), mine)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.rand(3, 16, 16), "float.*B,3,H,W"),
        (torch.rand(2, 1, 16, 16), "float"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.rand(0, 3, 16, 16), "B ≥ 1"),
        (2 * torch.ones(1, 3, 16, 16), r"in \[0,1\]"),
        (torch.full((1, 3, 16, 16), float("nan")), r"in \[0,1\]"),
        (-torch.ones(1, 3, 16, 16), r"in \[0,1\]"),
    ],
)
def test_impossible_images_are_refused(x: torch.Tensor, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        explain(filters(), x)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(RequestError, match=r"needs a masker.*minexp.fit"):
        explain(filters(), noise_images(1), effort="fast")
    with pytest.raises(RequestError, match="unknown effort 'slow'"):
        explain(filters(), noise_images(1), effort="slow")  # type: ignore[arg-type]
    for bad in ("blue", (0.5, 0.5), (0.1, 0.2, 1.3)):
        with pytest.raises(RequestError, match="background"):
            make_backgrounds(filters(), background=bad)


def test_backgrounds_come_from_the_masker_or_the_reference() -> None:
    classifier, mine, others = filters(), Masker(), noise_images(5)
    mine.mean = torch.tensor([0.1, 0.2, 0.3])
    assert make_backgrounds(classifier, mine).reference is None
    assert torch.equal(make_backgrounds(classifier, mine).mean, mine.mean)
    mine.reference = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    assert make_backgrounds(classifier, mine).reference.shape == (2, 3, SIDE, SIDE)
    given = make_backgrounds(classifier, reference=others)
    torch.testing.assert_close(given.mean, others.mean((0, 2, 3)))
    assert make_backgrounds(classifier, reference=others[:1]).reference is None
    for name, value in (("black", 0.0), ("white", 1.0)):
        assert make_backgrounds(classifier, background=name).mean.tolist() == [value] * 3
    assert make_backgrounds(classifier, background=(0.0, 0.5, 1.0)).mean.tolist() == [0.0, 0.5, 1.0]
    grey = make_backgrounds(classifier).mean
    assert grey.tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_another_seed_draws_other_backgrounds() -> None:
    classifier, x = filters(), noise_images(12)
    shares = [
        [
            c.robust_train
            for c in explain(
                classifier, x, predicate=Predicate("top1"), refinement=SHORT, seed=s
            ).certificates
        ]
        for s in (0, 0, 1)
    ]
    assert shares[0] == shares[1] != shares[2]


def test_scores_that_are_not_finite_are_refused() -> None:
    """argmax of NaN is a class that every mask keeps: such a model must not get certificates."""
    classifier = filters()
    next(classifier.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(MinexpError, match="NaN"):
        explain(classifier, noise_images(2), refinement=Refinement(steps=2))
