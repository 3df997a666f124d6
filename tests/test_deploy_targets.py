"""Explainers of something else than the class with the highest score: torch's rows all the same."""

import copy
from pathlib import Path

import numpy as np
import pytest
from deployed import images, networks
from tiny_models import one_thread  # noqa: F401
from trained_tiles import masker, tiles

from minexp.classifier import Classifier
from minexp.deploy.export import Draft
from minexp.deploy.retune import retune
from minexp.deploy.sealed import opened
from minexp.errors import RequestError
from minexp.predicate import Predicate
from minexp.targets import Score, Target, parse_target


def asking(target: Target, predicate: Predicate | None = None) -> Draft:
    """The tiles' explainer for another target, with the masker that was fitted to the first."""
    own, proposals = tiles().classifier, copy.deepcopy(masker())
    classifier = Classifier(
        own.model,
        mean=own.preprocessing.mean,
        std=own.preprocessing.std,
        size=24,
        class_names=own.class_names,
        target=target,
    )
    proposals.metadata["classifier"] = classifier.fingerprint
    return Draft.make(classifier, proposals, predicate or Predicate(), "mean", 0)


@pytest.mark.parametrize(
    ("target", "predicate"),
    [
        (parse_target("class:2"), None),
        (parse_target("class:none", keep=0.5), Predicate("score", tau=0.4)),
        (parse_target("label:1"), Predicate(rho=0.8)),
        (parse_target("value:0"), None),
        (parse_target("value:3", tolerance=0.7), Predicate(dilated=True)),
        (Score(column=1, keep=0.8), Predicate("top1")),
    ],
)
def test_every_target_of_one_number_is_torchs(target: Target, predicate: Predicate | None) -> None:
    asked, count = asking(target, predicate), 32
    reference = asked.torch(images(count))
    content, found, parity = asked.checked(networks(), images(count), reference)
    assert parity.exact, str(parity)
    certificates = found.certificates
    (name,) = {c.label_name for c in certificates}
    assert name == reference.certificates[0].label_name
    assert 0.02 < np.mean([c.area for c in certificates]) < 0.99
    assert len({c.evaluations for c in certificates}) > 1, "some masks need repair"
    about = opened(content).about
    assert str(asked.classifier.target) in about.predicate or about.predicate.startswith("p >=")
    if predicate is not None and predicate.kind == "score":
        assert 0 < sum(c.certified for c in certificates) < count, "the class is not every image's"


def test_a_target_of_several_labels_is_refused_in_a_line() -> None:
    with pytest.raises(RequestError, match="cannot answer for 'labels kept at 0.5', only for the class"):
        asking(parse_target("multilabel"))


def test_a_retuned_file_keeps_its_target(tmp_path: Path) -> None:
    asked, stricter = asking(parse_target("class:2")), asking(parse_target("class:2"), Predicate(rho=0.8))
    path = tmp_path / "explainer.onnx"
    path.write_bytes(asked.checked(networks(), images(4), asked.torch(images(4)))[0])
    again = opened(retune(path, rho=0.8)).explain(images(16))
    _, wanted, _ = stricter.checked(networks(), images(16), stricter.torch(images(16)))
    assert again.certificates == wanted.certificates
