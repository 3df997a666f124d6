"""The benchmark runner: its table, its JSON, and the answer where there is no source checkout."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
    assert lines[0].split() == list(runpy.run_path(str(BENCH / "rows.py"))["COLUMNS"])
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


def test_the_scale_suite_measures_stages_jobs_a_store_and_projects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(BENCH))
    import scale

    for name, value in {"ROUNDS": 1, "MEASURED": 4, "RAY": False, "ZOO": False}.items():
        monkeypatch.setattr(scale, name, value)
    threads = torch.get_num_threads()
    options = ["--scenes", "8", "--rows", "600", "--out", str(tmp_path), "--json", "--quiet"]
    assert cli.main(["bench", "scale", *options]) == 0
    assert torch.get_num_threads() == threads
    rows = json.loads(capsys.readouterr().out)
    stages = {row["mode"]: row["rate"] for row in rows if row["op"] == "stage of scenes at 64²"}
    assert list(stages) == ["decode", "classifier", "masker", "certify", "write"]
    assert [row["mode"] for row in rows if row["op"].startswith("job")] == [
        "compute",
        "1 worker",
        "2 workers",
    ]
    assert {row["bound"] for row in rows if row["op"] == "report"} == {60.0, 2000.0, 15.0}
    million = next(row for row in rows if row["mode"] == "1,000,000 images")
    assert million["seconds"] == pytest.approx(1e6 * sum(1 / rate for rate in stages.values()) / scale.CORES)
    assert {path.name for path in tmp_path.iterdir()} <= {"scale-cpu.csv", "scale-cpu.png", "scale-cuda.csv"}
    assert len((tmp_path / "scale-cpu.csv").read_text().splitlines()) == len(rows) + 1
