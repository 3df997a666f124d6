"""Worker processes: the same rows as one process, whatever dies on the way, and nothing twice."""

import errno
import json
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from faults import Chaos, same, start, survive, wait_for
from stub_job import Stub, make_data, run

from minexp.data.sources import open_source
from minexp.data.store import Store, read_shards, read_store, verify_store
from minexp.errors import MinexpError, RequestError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "d.npy", 2000)


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> Path:
    out = data.parent / "undisturbed"
    summary = run(data, out)
    assert (summary["rows"], summary["workers"], summary["restarts"]) == (2000, 1, 0)
    return out


def test_workers_store_what_one_process_stores(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    summary = run(data, tmp_path / "out", workers=3, batch=50)
    assert (summary["rows"], summary["workers"], summary["restarts"]) == (2000, 3, 0)
    assert same(tmp_path / "out", undisturbed)
    again = run(data, tmp_path / "out", workers=2)
    assert again["resumed"] == again["rows"] == 2000
    assert {name: again[name] for name in ("certified", "failed", "mean_area", "kept")} == {
        name: summary[name] for name in ("certified", "failed", "mean_area", "kept")
    }


@pytest.mark.timeout(900)
def test_fifty_kills_of_workers_and_parents_lose_and_double_nothing(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    chaos, out = Chaos(str(tmp_path / "chaos"), 50), tmp_path / "out"
    summary = survive(chaos, data, out, workers=2, flush_seconds=0.05, batch=8, seconds=0.03)
    assert chaos.given == 50 and summary["begun"] == 11
    assert summary["rows"] == 2000
    assert same(out, undisturbed)
    assert not [path.name for path in out.iterdir() if "partial" in path.name or "reserve" in path.name]


def test_an_image_that_kills_its_process_costs_only_its_own_row(data: Path, tmp_path: Path) -> None:
    images = np.load(data)[:40]
    images[17, 0, 0, 0] = 1
    np.save(tmp_path / "d.npy", images)
    summary = run(tmp_path / "d.npy", tmp_path / "out", Stub(fate=((1, "kill"),)), workers=2)
    rows = read_store(tmp_path / "out").to_pylist()
    assert [row["id"] for row in rows if row["status"] == "error"] == ["d.npy#17"]
    assert rows[17]["error"] == "ends every process that works on it (SIGKILL)"
    assert len(rows) == 40 and summary["errors"] == 1 and summary["restarts"] >= 3
    assert verify_store(tmp_path / "out") == []


def test_a_broken_device_replaces_the_process_and_finds_the_image(tmp_path: Path) -> None:
    images = np.load(make_data(tmp_path / "d.npy", 6))
    images[4, 0, 0, 0] = 3
    np.save(tmp_path / "d.npy", images)
    stub = Stub(fate=((3, "device"),))
    run(tmp_path / "d.npy", tmp_path / "out", stub, workers=2)
    rows = read_store(tmp_path / "out", ["status", "error"]).to_pylist()
    assert [row["status"] == "error" for row in rows] == [False] * 4 + [True, False]
    assert "exit code 70" in rows[4]["error"]
    with pytest.raises(MinexpError, match="CUDA error"):  # in one process nothing can be replaced
        run(tmp_path / "d.npy", tmp_path / "one", stub)


def test_workers_that_cannot_start_end_the_job(data: Path, tmp_path: Path) -> None:
    with pytest.raises(MinexpError, match=r"workers die while they start \(exit code 7\).*fewer --workers"):
        run(data, tmp_path / "out", Stub(start="exit"), workers=2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ZeroDivisionError, match="oh"):
        run(data, tmp_path / "out", Stub(start="oh"), workers=2)
    with pytest.raises(RequestError, match="cannot be sent to worker processes.*--workers 1"):
        run(data, tmp_path / "out", lambda number: None, workers=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_workers_store_what_they_have(
    data: Path, undisturbed: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out"
    job = start(data, out, workers=2, seconds=0.3)
    wait_for(out, ".reserve*")
    time.sleep(0.6)
    os.kill(job.pid, number)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == code, stderr
    stored = read_store(out).num_rows
    assert 0 < stored < 2000 and stored % 16 == 0
    assert any(shard.rows < 256 for shard in read_shards(out))  # rows that waited for their shard to be full
    assert verify_store(out) == []
    assert run(data, out)["resumed"] == stored
    assert same(out, undisturbed)


def test_parts_of_a_job_share_a_directory(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    jobs = [start(data, out, workers=1 + part % 2, part=[part, 3], seconds=0.01) for part in range(3)]
    summaries = []
    for job in jobs:
        stdout, stderr = job.communicate(timeout=120)
        assert job.returncode == 0, stderr
        summaries.append(json.loads(stdout))
    assert sum(summary["rows"] for summary in summaries) == 2000
    assert min(summary["rows"] for summary in summaries) > 400
    assert same(out, undisturbed)
    whole = run(data, out)
    assert whole["resumed"] == whole["rows"] == 2000
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["shards.jsonl"]


def test_two_jobs_in_one_directory_are_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = start(data, out, seconds=0.2)
    wait_for(out, ".reserve*")
    for options in ({}, {"part": (0, 2)}):
        with pytest.raises(RequestError, match="another process is writing"):
            run(data, out, **options)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=60)
    assert read_store(out).num_rows > 0
    with pytest.raises(RequestError, match="another job"):
        run(data, out, run={"fingerprint": "other", "provider": "none", "precision": "uint8"})
    parts = start(data, out, part=[0, 2], seconds=0.2)
    wait_for(out, ".reserve*")
    for options in ({}, {"part": (0, 2)}, {"part": (1, 3)}):
        with pytest.raises(RequestError, match="another process is writing"):
            run(data, out, **options)
    with pytest.raises(RequestError, match="other parts' rows"):
        run(data, out, part=(1, 2), resume=False)
    assert run(data, out, part=(1, 2))["rows"] > 900
    parts.send_signal(signal.SIGINT)
    parts.communicate(timeout=60)


def test_errors_end_the_job_where_it_was_asked_for(tmp_path: Path) -> None:
    images = np.load(make_data(tmp_path / "d.npy", 600))
    images[[300, 400, 500], 0, 0, 0] = 5
    np.save(tmp_path / "d.npy", images)
    stub = Stub(fate=((5, "oh"),))
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        with pytest.raises(MinexpError, match="d.npy#300: ZeroDivisionError: oh .--on-error skip") as caught:
            run(tmp_path / "d.npy", out, stub, errors=0, workers=workers)
        assert caught.value.exit_code == 3
        stored = read_store(out, ["id", "status"])
        assert "error" not in stored["status"].to_pylist() and stored.num_rows >= 300 * (workers == 1)
        with pytest.raises(MinexpError, match="d.npy#[345]00: "):  # nothing of it was forgotten
            run(tmp_path / "d.npy", out, stub, errors=0, workers=workers)
        with pytest.raises(MinexpError, match="more than 2 rows have errors"):
            run(tmp_path / "d.npy", out, stub, errors=2, workers=workers)
        with pytest.raises(MinexpError, match="more than 2 rows have errors"):
            run(tmp_path / "d.npy", out, stub, errors=2, workers=workers)
        summary = run(tmp_path / "d.npy", out, stub, errors=3, workers=workers)
        assert (summary["rows"], summary["errors"]) == (600, 3)
        assert verify_store(out) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_before_work_is_lost(
    data: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "disk"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=340k", "tmpfs", str(out)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        with pytest.raises(
            RequestError, match=r"no space is left for .*: \d+ of 2000 rows are stored; free some"
        ):
            run(data, out, workers=workers)
        assert verify_store(out) == []
        assert 0 < (stored := read_store(out).num_rows) < 2000
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        assert run(data, out, workers=workers)["resumed"] == stored
        assert same(out, undisturbed)
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("place", ["reserve", "shard", "journal"])
def test_space_that_runs_out_anywhere_leaves_a_store_that_goes_on(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    calls = 0

    def full(call: Any) -> Any:
        def write(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return write

    owner: Any
    owner, name = {
        "reserve": (os, "posix_fallocate"),
        "shard": (pq, "write_table"),
        "journal": (Store, "record"),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, full(getattr(owner, name)))
        with pytest.raises(RequestError, match="no space is left for .*: 768 of 2000 rows are stored"):
            run(data, tmp_path / "out")
    # a shard whose name only the journal lacks is taken in
    assert run(data, tmp_path / "out")["resumed"] == (1024 if place == "journal" else 768)
    assert same(tmp_path / "out", undisturbed)


def test_sources_travel_to_workers_in_small_parts(tmp_path: Path) -> None:
    make_data(tmp_path / "d.npy", 5000)
    part = open_source(tmp_path / "d.npy").part(4000, 4010)
    sent = pickle.dumps(part)
    assert len(sent) < 1000
    assert [item.id for item in pickle.loads(sent)] == [f"d.npy#{place}" for place in range(4000, 4010)]
