"""Circuits on the engines: the same rows from any number of processes, whatever dies; what the classes share."""

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from circuit_job import network, opened, rows, run
from faults import HERE, Chaos, start, survive, wait_for
from tiny_models import one_thread as one_thread

from minexp import cli
from minexp.data.sources import open_source
from minexp.data.store import StoreWriter, read_shards, read_store, verify_store
from minexp.data.tables import CIRCUITS
from minexp.errors import MinexpError, RequestError
from minexp.jobs.circuit_classes import write_classes

COUNT = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    np.save(path := tmp_path_factory.mktemp("data") / "d.npy", images)
    return path


@pytest.fixture(scope="module")
def explained(data: Path) -> Path:
    """Explanations of the images: a random half of the pixels, for a random class; one failed."""
    rng, directory = np.random.default_rng(1), data.parent / "explained"
    with StoreWriter(directory, run={"fingerprint": "f", "classifier": network().fingerprint}) as store:
        for number in range(COUNT):
            row: dict[str, Any] = {"id": f"image {number}", "uri": f"{data}#{number}", "truth": number % 5}
            mask = rng.random((16, 16)) < 0.5
            known = {"status": "certified", "label": int(rng.integers(5)), "mask": mask, "area": mask.mean()}
            store.write([row | (known if number != 7 else {"status": "error", "error": "gone"})])
    return directory


@pytest.fixture(scope="module")
def undisturbed(explained: Path, data: Path) -> Path:
    torch.set_num_threads(1)
    summary = run(opened(explained), out := data.parent / "undisturbed")
    assert (summary["rows"], summary["read"], summary["errors"], summary["restarts"]) == (
        COUNT,
        COUNT - 1,
        1,
        0,
    )
    return out


def same(one: Path, other: Path) -> bool:
    assert verify_store(one) == verify_store(other) == []
    return bool(rows(one).equals(rows(other)))


def test_workers_parts_and_batches_give_the_same_rows(
    explained: Path, undisturbed: Path, tmp_path: Path
) -> None:
    summary = run(opened(explained), tmp_path / "two", workers=2, batch=7)
    assert (summary["rows"], summary["workers"], summary["restarts"]) == (COUNT, 2, 0)
    assert same(tmp_path / "two", undisturbed)
    first = run(opened(explained), tmp_path / "parts", part=(0, 2), batch=1)
    assert first["rows"] == 16 and "classes" not in first
    second = run(opened(explained), tmp_path / "parts", part=(1, 2))
    assert second["rows"] == 8 and Path(second["classes"]).is_file()
    assert same(tmp_path / "parts", undisturbed)
    whole = run(opened(explained), tmp_path / "parts")
    assert whole["resumed"] == COUNT and whole["nodes"] == summary["nodes"]
    tables = [pq.read_table(out / "classes") for out in (undisturbed, tmp_path / "two", tmp_path / "parts")]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    with pytest.raises(RequestError, match="circuits of another job"):
        run(open_source(explained.parent / "d.npy"), tmp_path / "two")


@pytest.mark.timeout(900)
def test_kills_of_workers_and_parents_lose_and_double_nothing(
    explained: Path, tmp_path: Path, undisturbed: Path
) -> None:
    chaos, out = Chaos(str(tmp_path / "chaos"), 4, parents=3, life=1.5), tmp_path / "out"
    summary = survive(chaos, explained, out, "circuit_job.py", workers=2, flush_seconds=0.05, batch=1)
    assert chaos.given == 4 and summary["begun"] == 2
    assert same(out, undisturbed)
    assert not [path.name for path in out.iterdir() if "partial" in path.name or "reserve" in path.name]


@pytest.mark.timeout(900)
def test_a_ray_cluster_gives_the_same_rows(
    explained: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.syspath_prepend(str(HERE))
    summary = run(opened(explained), tmp_path / "out", engine="ray", workers=1)
    assert (summary["rows"], summary["errors"]) == (COUNT, 1)
    assert same(tmp_path / "out", undisturbed)


def test_errors_and_another_process_end_the_job(explained: Path, tmp_path: Path) -> None:
    with pytest.raises(MinexpError, match="image 7: gone .--on-error skip"):
        run(opened(explained), tmp_path / "out", errors=0, batch=2)
    assert read_store(tmp_path / "out", table=CIRCUITS).num_rows == 7
    writer = StoreWriter(tmp_path / "busy", run={"fingerprint": "f"}, table=CIRCUITS)
    with writer, pytest.raises(RequestError, match="another process is writing"):
        run(opened(explained), tmp_path / "busy")


def test_explanations_that_grow_are_another_job(explained: Path, tmp_path: Path) -> None:
    shutil.copytree(explained, tmp_path / "explained")
    source = opened(tmp_path / "explained")
    with StoreWriter(tmp_path / "explained", run={"fingerprint": "f"}) as store:
        store.write([{"id": "new", "uri": "new", "status": "error", "error": "late"}])
    assert len(source) == COUNT and source.fingerprint() != opened(tmp_path / "explained").fingerprint()
    with pytest.raises(RequestError, match="has changed since the job began"):
        run(source, tmp_path / "out", workers=2)
    with (
        StoreWriter(tmp_path / "none", run={"fingerprint": "f"}),
        pytest.raises(RequestError, match="no rows yet"),
    ):
        opened(tmp_path / "none")


# ---------------------------------------------------------------- classes


def test_what_the_circuits_of_a_class_share(undisturbed: Path) -> None:
    """Against plain loops over the rows."""
    stored = [row for row in rows(undisturbed).to_pylist() if row["status"] == "read"]
    table = pq.read_table(undisturbed / "classes").to_pylist()
    assert [row["circuits"] for row in table] == sorted((row["circuits"] for row in table), reverse=True)
    assert {row["label"]: row["circuits"] for row in table} == Counter(row["label"] for row in stored)
    some = 0
    for found in table:
        mine = [row for row in stored if row["label"] == found["label"]]
        assert found["label_name"] == mine[0]["label_name"]
        for name in ("faithfulness", "cmd", "random_drop", "size"):
            known = [row[name] for row in mine if row[name] is not None]
            assert found[name] == pytest.approx(np.mean(known))
        nodes: dict[Any, list[Any]] = {}
        edges: dict[Any, list[Any]] = {}
        ends = ("source_layer", "source", "target_layer", "target")
        for row in mine:
            for node in row["nodes"]:
                nodes.setdefault((node["layer"], node["unit"]), []).append(node)
            for edge in row["edges"]:
                edges.setdefault(tuple(edge[end] for end in ends), []).append(edge)
        nodes = {key: value for key, value in nodes.items() if len(value) >= len(mine) / 2}
        known_ends = {*nodes, ("score", 0)}
        edges = {
            key: value
            for key, value in edges.items()
            if len(value) >= len(mine) / 2 and {key[:2], key[2:]} <= known_ends
        }
        assert {(n["layer"], n["unit"]) for n in found["nodes"]} == set(nodes)
        assert {tuple(e[end] for end in ends) for e in found["edges"]} == set(edges)
        some += len(edges) > 0
        for node in found["nodes"]:
            those = nodes[node["layer"], node["unit"]]
            assert node["share"] == pytest.approx(len(those) / len(mine))
            assert node["score"] == pytest.approx(np.mean([n["score"] for n in those]))
            measured = [n["effect"] for n in those if n["effect"] is not None]
            assert node["effect"] == (pytest.approx(np.mean(measured)) if measured else None)
        for edge in found["edges"]:
            those = edges[tuple(edge[end] for end in ends)]
            assert edge["share"] == pytest.approx(len(those) / len(mine))
            assert edge["effect"] == pytest.approx(np.mean([e["effect"] for e in those]))
        core = {key for key, value in nodes.items() if value[0]["rank"] >= 0}
        own = [{(n["layer"], n["unit"]) for n in row["nodes"] if n["rank"] >= 0} for row in mine]
        assert found["jaccard"] == pytest.approx(np.mean([len(a & core) / len(a | core) for a in own]))
    assert some > 1


def test_classes_are_written_again_only_where_circuits_are_others(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    path = write_classes(tmp_path / "out")
    before = path.stat().st_mtime_ns
    assert write_classes(tmp_path / "out").stat().st_mtime_ns == before
    (shard, *_) = read_shards(tmp_path / "out")
    (tmp_path / "out" / shard.name).unlink()
    journal = tmp_path / "out" / "shards.jsonl"
    journal.write_text("".join(line for line in journal.open() if shard.name not in line))
    table = pq.read_table(write_classes(tmp_path / "out"))
    assert sum(table["circuits"].to_pylist()) < COUNT - 1


# ---------------------------------------------------------------- the command


def test_the_command_on_two_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.full((5, 32, 32, 3), 20, np.uint8)
    for number in range(5):
        images[number, :, :, number % 3] = 200 + number
    np.savez(tmp_path / "c.npz", images=images)
    arguments = [
        "circuit",
        "--model",
        f"{HERE / 'small_net.py'}:classifier",
        "--data",
        f"{tmp_path / 'c.npz'}",
    ]
    arguments += ["--controls", "2", "--sizes", "0.4", "1", "--json", "--quiet"]
    assert cli.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    one = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, "--out", str(tmp_path / "two"), "--workers", "2", "--batch", "2"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert Path(two["page"]).is_file() and Path(two["classes"]).is_file()
    took = ("seconds", "images_per_second", "passes", "out", "page", "classes", "workers")
    assert {k: v for k, v in one.items() if k not in took} == {k: v for k, v in two.items() if k not in took}
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--together", "--workers", "2"]) == 2
    assert "is read in one process" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--precision", "bfloat16"]) == 2
    assert "leave --precision, --channels-last and --compile out" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--shard", "2/2"]) == 2
    assert "--shard is 2/2" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "two"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] == 5
    shard = next((tmp_path / "two").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    column = pq.ParquetFile(shard).metadata.row_group(0).column(12)
    content[
        (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1
    ] ^= 1
    shard.write_bytes(bytes(content))
    assert cli.main(["verify", str(tmp_path / "two")]) == 4
    assert f"{shard.name}: row group 0" in capsys.readouterr().out


def test_a_signal_lets_workers_store_what_they_have(
    explained: Path, undisturbed: Path, tmp_path: Path
) -> None:
    process = start(explained, tmp_path / "out", "circuit_job.py", workers=1, flush_seconds=0.0, batch=1)
    wait_for(tmp_path / "out", "shard-*.parquet")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and stderr.endswith("KeyboardInterrupt\n"), stderr
    stored = read_store(tmp_path / "out", table=CIRCUITS).num_rows
    assert 0 < stored < COUNT
    assert run(opened(explained), tmp_path / "out")["resumed"] == stored
    assert same(tmp_path / "out", undisturbed)
