"""Exported files with another threshold or other numbers of their predicate."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from deployed import draft, exported, folder, images, networks
from tiny_models import one_thread  # noqa: F401

from minexp.cli import main
from minexp.data.store import unpack_mask
from minexp.deploy import Explainer
from minexp.deploy.retune import retune
from minexp.deploy.runtime import open_session
from minexp.deploy.sealed import opened
from minexp.predicate import Predicate


def written(predicate: Predicate, path: Path) -> Path:
    asked = draft(predicate)
    path.write_bytes(asked.checked(networks(), images(4), asked.torch(images(4)))[0])
    return path


def rows(explainer: Explainer) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "ms"} for row in explainer.explain(images(40)).rows()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Predicate(), Predicate(rho=0.7)),
        (Predicate(rho=0.8), Predicate(rho=1.0)),
        (Predicate("score", tau=0.5), Predicate("score", tau=0.9)),
    ],
)
def test_a_retuned_file_is_the_one_that_would_have_been_exported(
    before: Predicate, after: Predicate, tmp_path: Path
) -> None:
    old = written(before, tmp_path / "old.onnx")
    changes = {"tau": after.tau} if after.kind == "score" else {"rho": after.rho}
    new, fresh = (
        opened(retune(old, **changes)),
        Explainer(written(after, tmp_path / "fresh.onnx"), trusted=True),
    )
    assert rows(new) == rows(fresh) != rows(Explainer(old, trusted=True))
    assert new.about.fingerprint == fresh.about.fingerprint and new.about.predicate == fresh.about.predicate
    assert new.about.rho == fresh.about.rho and new.about.extra["selftest"] == fresh.about.extra["selftest"]
    models = [onnx.load_from_string(path.read_bytes()) for path in (tmp_path / "fresh.onnx",)]
    assert models[0].graph == onnx.load_from_string(retune(old, **changes)).graph


def test_a_lower_threshold_begins_with_larger_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, out = exported().explainer, tmp_path / "new.onnx"
    assert main(["export", "--onnx", str(old), "--threshold", "0.02", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["explainer"] == str(out)
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] == 4
    one, other = (Explainer(path, trusted=True) for path in (old, out))
    before, after = (explainer.explain(images(40)) for explainer in (one, other))
    assert np.array_equal(before.probabilities, after.probabilities)
    assert (after.masks & (after.probabilities > 0.02)).sum() == (after.probabilities > 0.02).sum()
    assert after.masks.mean() > before.masks.mean()
    about = other.about
    assert about.threshold == 0.02 and about.extra["plan"]["threshold"] == 0.02
    # torch has not seen it: what is known of the original is said to be the original's
    assert about.extra["parity"] is None and about.fingerprint != one.about.fingerprint
    assert about.extra["retuned"]["from"] == one.about.fingerprint
    assert about.extra["retuned"]["parity"] == one.about.extra["parity"]
    assert about.extra["retuned"]["changes"] == {"threshold": 0.02}


def test_a_maskers_threshold(tmp_path: Path) -> None:
    plain, new = folder() / "float32" / "masker.onnx", tmp_path / "new.onnx"
    new.write_bytes(retune(plain, threshold=0.25))
    session = open_session(new.read_bytes(), "cpu", 1, "masker")
    prob, bits = session.run(["prob", "mask_bits"], {"image": images(8)})
    masks = np.stack([unpack_mask(row.tobytes(), 24, 24) for row in bits])
    assert np.array_equal(masks, prob > 0.25) and ((prob > 0.25) != (prob > 0.5)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --page FILE.html, --threshold, --rho or --tau"),
        (["--threshold", "1.5"], "threshold 1.5; give one between 0 and 1"),
        (["--rho", "0"], "give 0 < rho"),
        (["--tau", "0.9"], "its predicate is robust, which has no tau"),
        (["--rho", "0.9", "--out", "folder"], "give --out FILE.onnx"),
    ],
)
def test_what_cannot_be_retuned_is_said_in_a_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in options else ["--out", "never.onnx"]
    assert main(["export", "--onnx", str(exported().explainer), *options, *out]) == 2
    assert message in capsys.readouterr().err and not Path("never.onnx").exists()


def test_a_masker_has_no_predicate(capsys: pytest.CaptureFixture[str]) -> None:
    exported()
    masker = str(folder() / "float32" / "masker.onnx")
    assert main(["export", "--onnx", masker, "--rho", "0.9", "--out", "never.onnx"]) == 2
    assert "a masker has a threshold and no predicate" in capsys.readouterr().err
    assert main(["export", "--model", "x", "--threshold", "0.4"]) == 2
    assert "--threshold changes an exported file" in capsys.readouterr().err
