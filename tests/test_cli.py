"""The command line: help, mistakes, exit codes, and the commands that need no model."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minexp import cli
from minexp.data.shard import shard_name
from minexp.data.store import StoreWriter

PYTHON = [sys.executable, "-m", "minexp.cli"]


def call(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a command run in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def store(tmp_path: Path) -> Path:
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    row: dict[str, Any] = {"uri": "x.png", "status": "certified", "area": 0.25, "mask": mask, "label": 1}
    with StoreWriter(tmp_path / "store", run={"fingerprint": "f"}, rows_per_shard=4) as writer:
        writer.write([{**row, "id": str(number)} for number in range(10)])
    return tmp_path / "store"


def test_help_is_quick_and_names_every_command() -> None:
    started = time.perf_counter()
    done = subprocess.run([*PYTHON, "--help"], capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", done.stdout, re.M)
    assert seconds < 1.5  # 0.1 s on an idle machine; importing torch alone would take longer
    code = "import sys, minexp.cli; print([m for m in ('torch', 'pyarrow', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_with_one_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(name, "--help", capsys=capsys)
    assert (code, err) == (0, "")
    assert out.count("Example: minexp ") == 1
    assert f"Example: {cli.COMMANDS[name].example}" in " ".join(out.split())
    assert "--json" in out and "--quiet" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["reprot", "x"], "no command 'reprot'; did you mean 'report'"),
        (["frobnicate"], "no command 'frobnicate'; use one of demo, fit, explain"),
        (["report"], "Missing from minexp report: PATH; see minexp report --help"),
        (["explain", "--model", "m"], "--data STR --out PATH; see minexp explain --help"),
        (
            ["explain", "--model", "m", "--data", "d", "--out", "o", "--effort", "slow"],
            "invalid choice 'slow'",
        ),
        (["explain", "--model", "m", "--data", "d", "--out", "o", "--ray"], "Unrecognized options: --ray;"),
        (["fit", "--model", "m", "--data", "d", "--out", "o", "--steps", "many"], "invalid literal"),
        (
            ["explain", "--model", "m", "--data", "d", "--out", "o", "--batch", "0"],
            "--batch is 0; give at least 1",
        ),
        (
            ["fit", "--model", "m", "--data", "d", "--out", "o", "--batch", "-3"],
            "--batch is -3; give at least 1",
        ),
        (["report", "x", "--gallery", "0"], "--gallery is 0; give at least 1"),
        (
            ["explain", "--model", "m", "--data", __file__, "--out", "o", "--size", "1", "2", "3"],
            "--size takes one side",
        ),
        (["report", "/nonexistent"], "no explanations in /nonexistent"),
        (["verify", "/nonexistent"], "no explanations in /nonexistent"),
        (["explain", "--model", "m", "--data", "/nonexistent", "--out", "o"], "/nonexistent is not there"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(*arguments, capsys=capsys)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("minexp: ")
    assert line in err


def test_nothing_given_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys=capsys)
    assert code == 2 and "usage: minexp" in out
    code, out, _ = call("--version", capsys=capsys)
    assert code == 0 and re.fullmatch(r"minexp \d+\.\d+\.\d+\n", out)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call("doctor", "--json", capsys=capsys)
    facts = json.loads(out)
    assert code == 0
    assert {"version", "torch", "device", "kernels", "threads"} <= set(facts)
    for device in ("cpu", "cuda"):
        assert facts["kernels"][device] is True or facts["kernels"]["why"][device]
    code, out, _ = call("doctor", capsys=capsys)
    assert code == 0
    assert re.search(r"^cpu kernels +(compiled|no: .+)$", out, re.M)
    assert re.search(rf"^torch +{re.escape(facts['torch'])}$", out, re.M)


def test_verify(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call("verify", store, "--json", capsys=capsys)
    assert code == 0
    whole = {"rows": 10, "ok": 10, "bad": 0, "duplicates": 0, "missing": 0, "problems": []}
    assert json.loads(out) == whole
    shard = store / shard_name(4, 8)
    content = bytearray(shard.read_bytes())
    content[60] ^= 4  # in the pages of the first column
    shard.write_bytes(content)
    code, out, _ = call("verify", store, "--json", capsys=capsys)
    summary = json.loads(out)
    assert code == 4
    assert (summary["rows"], summary["ok"], summary["bad"]) == (10, 6, 4)
    assert summary["problems"]
    code, out, _ = call("verify", store, capsys=capsys)
    assert code == 4 and f"{shard.name}: row group 0: " in out and out.endswith("6 of 10 rows verify\n")
    assert call("verify", store, "--quiet", capsys=capsys)[:2] == (4, "")


def test_a_place_that_cannot_be_written_is_a_wrong_request(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = call("report", store, "--out", tmp_path / "file" / "page.html", capsys=capsys)
    assert code == 2
    assert err.count("\n") == 1 and "file" in err and "give a path" in err
