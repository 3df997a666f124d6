"""The benchmark runner: its table, its JSON, and the answer where there is no source checkout."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minexp import cli
from minexp.commands import bench

BENCH = Path(__file__).parent.parent / "bench"
ROW = {"op": "explain x", "provider": "torch-cpu", "mode": "fast", "shape": "1x3", "threads": 1}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A suite that measures nothing, in place of explain; the list receives its `quiet`."""
    seen: list[bool] = []

    def measure(quiet: bool) -> list[dict[str, Any]]:
        seen.append(quiet)
        return [{**ROW, "p20": 1.0, "p50": 2.0, "p80": 1234.5, "bound": 1.35, "ratio": 1.25}, ROW]

    monkeypatch.setitem(sys.modules, "explain", SimpleNamespace(measure=measure))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return seen


def test_rows_as_a_table_and_as_json(suite: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(runpy.run_path(str(BENCH / "run.py"))["COLUMNS"])
    assert lines[1].split() == [
        "explain",
        "x",
        "torch-cpu",
        "fast",
        "1x3",
        "1",
        "1",
        "2",
        "1.23e+03",
        "1.35",
        "1.25",
    ]
    assert len({len(line) for line in lines}) == 1
    assert cli.main(["bench", "explain", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["p80"] == 1234.5 and rows[1] == ROW
    assert suite == [False, True]


def test_an_installed_package_says_that_it_has_no_benchmarks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "minexp" / "commands" / "bench.py"))
    assert cli.main(["bench", "explain"]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_the_data_suite_measures_decoders_loader_and_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import data

    monkeypatch.setattr(data, "ROUNDS", 2)
    monkeypatch.setattr(data, "CASES", ((32, 2),))
    assert cli.main(["bench", "data", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)
    by_mode = {(row["op"], row["mode"]): row for row in rows}
    assert {"decode", "resize to 224²", "loader"} <= {row["op"] for row in rows}
    job = by_mode["explain scenes at 32²", "job"]
    assert (job["bound"], job["shape"]) == (1.1, "2x3x32x32") and job["ratio"] > 0.3
    assert all(row["p50"] > 0 for row in rows)
