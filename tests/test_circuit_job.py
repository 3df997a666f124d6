"""Circuits of a dataset: a row for every input, stopped and gone on, from images and from explanations."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from test_circuit_ablation import small
from tiny_models import one_thread as one_thread
from torch import Tensor

from minexp import cli
from minexp.circuit.circuit import Circuit
from minexp.circuit.readout import Reader
from minexp.circuit.settings import Settings
from minexp.classifier import Classifier
from minexp.data.sources import ImageSource, open_source
from minexp.data.store import MANIFEST, StoreWriter, read_run, read_store, verify_store
from minexp.data.tables import CIRCUITS
from minexp.errors import RequestError
from minexp.jobs import circuits as job

QUICK: dict[str, Any] = {"sizes": (0.1, 0.5, 1.0), "controls": 2, "members": 2}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return small(9)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(7) % 3)
    return tmp_path / "d.npz"


def reader(classifier: Classifier, source: ImageSource, **settings: Any) -> Reader:
    return job.make_reader(classifier, Settings(**{**QUICK, **settings}), job.sample(source, classifier))


def test_a_row_for_every_image(classifier: Classifier, data: Path, tmp_path: Path) -> None:
    source = open_source(data)
    found = reader(classifier, source)
    summary = job.circuit_dataset(found, source, tmp_path / "out", batch=3, progress=False)
    assert (summary["rows"], summary["errors"], summary["mode"]) == (7, 0, "exact")
    rows = read_store(tmp_path / "out", table=CIRCUITS).to_pylist()
    x = torch.from_numpy(np.load(data)["images"]).permute(0, 3, 1, 2).float() / 255
    alone = found.single(*found.prepare(x))
    for row, circuit in zip(rows, alone, strict=True):
        assert row["status"] == "read" and row["label"] == circuit.label
        assert [(n["layer"], n["unit"]) for n in row["nodes"]] == [(n.layer, n.unit) for n in circuit.nodes]
        assert len(row["edges"]) == len(circuit.edges) and circuit.test is not None
        assert row["faithfulness"] == pytest.approx(circuit.test.faithfulness, abs=1e-5)
        assert row["random_drop_low"] <= row["random_drop"] <= row["random_drop_high"]
        assert row["curve"] == pytest.approx(list(circuit.test.curve), abs=1e-5)
    assert [row["truth"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert summary["faithfulness"] == pytest.approx(np.mean([r["faithfulness"] for r in rows]), abs=1e-4)
    assert summary["nodes"] == pytest.approx(np.mean([len(c.members) for c in alone]), abs=1e-3)
    assert summary["edges"] == pytest.approx(np.mean([len(c.edges) for c in alone]), abs=1e-3)
    for (work, again), circuit in zip(job.shown(source, classifier, tmp_path / "out", 9), alone, strict=True):
        assert again.test is not None and circuit.test is not None and work.mask is None
        plain = replace(circuit, seconds=again.seconds, passes=again.passes).to_json()
        close = json.loads(
            json.dumps(again.to_json()), parse_float=lambda text: pytest.approx(float(text), 1e-4, 1e-5)
        )
        assert plain["test"].pop("random_curve") == close["test"].pop("random_curve") == []
        assert plain == close
    assert verify_store(tmp_path / "out") == []
    nodes = duckdb.sql(f"select unnest(nodes, recursive := true) from '{tmp_path}/out/*.parquet'").fetchall()
    assert len(nodes) == sum(len(c.nodes) for c in alone)


def test_a_stopped_job_goes_on_and_ends_the_same(
    classifier: Classifier, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(data)
    found = reader(classifier, source)
    job.circuit_dataset(found, source, tmp_path / "whole", batch=2, progress=False)
    single = found.single
    calls = 0

    def stops(x: Tensor, label: Tensor) -> list[Circuit]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return single(x, label)

    monkeypatch.setattr(found, "single", stops)
    with pytest.raises(KeyboardInterrupt):
        job.circuit_dataset(found, source, tmp_path / "out", batch=2, progress=False)
    monkeypatch.setattr(found, "single", single)
    summary = job.circuit_dataset(found, source, tmp_path / "out", batch=3, progress=False)
    assert (summary["resumed"], summary["rows"]) == (4, 7)
    drop = ["seconds", "passes", "sizes", "curve", "nodes", "edges", "notes"]
    whole, parts = (read_store(tmp_path / name, table=CIRCUITS) for name in ("whole", "out"))
    for one, other in zip(*(t.drop_columns(drop).to_pylist() for t in (whole, parts)), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for one, other in zip(whole["nodes"].to_pylist(), parts["nodes"].to_pylist(), strict=True):
        assert [(n["layer"], n["unit"]) for n in one] == [(n["layer"], n["unit"]) for n in other]
    with pytest.raises(RequestError, match="circuits of another job"):
        other = job.make_reader(classifier, Settings(**QUICK, seed=1), job.sample(source, classifier))
        job.circuit_dataset(other, source, tmp_path / "out", progress=False)


def test_what_cannot_be_read_is_a_row_with_its_error(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    source = open_source(folder)
    found = reader(classifier, source)
    single = found.single

    def fails(x: Tensor, label: Tensor) -> list[Circuit]:
        if len(x) > 1 or abs(float(x[0, 0, 0, 0]) - first) < 1e-6:
            raise ValueError("odd image")
        return single(x, label)

    with Image.open(folder / "1.png") as picture:
        first = np.asarray(picture)[0, 0, 0] / 255
    monkeypatch.setattr(found, "single", fails)
    summary = job.circuit_dataset(found, source, tmp_path / "out", progress=False)
    rows = {row["id"]: row for row in read_store(tmp_path / "out", table=CIRCUITS).to_pylist()}
    assert summary["errors"] == 2 and summary["rows"] == 4
    assert rows["1.png"]["error"] == "ValueError: odd image" and rows["1.png"]["nodes"] is None
    assert rows["broken.png"]["status"] == "error" and rows["0.png"]["status"] == "read"
    assert verify_store(tmp_path / "out") == []


def explanations(directory: Path, data: Path, classifier: Classifier) -> Path:
    """A store of explanations of the images in data: masks of the upper half, class 2, one without a mask."""
    mask = np.zeros((16, 16), bool)
    mask[:8] = True
    run = {"fingerprint": "f", "classifier": classifier.fingerprint, "source_name": "d.npz"}
    with StoreWriter(directory, run=run) as store:
        for number in range(3):
            row: dict[str, Any] = {"id": str(number), "uri": f"{data}#{number}", "status": "certified"}
            store.write([row | {"mask": mask, "label": 2, "area": 0.5}])
        store.write([{"id": "3", "uri": "gone.png", "status": "error", "error": "gone"}])
    return directory


def test_circuits_of_stored_explanations(classifier: Classifier, data: Path, tmp_path: Path) -> None:
    stored = explanations(tmp_path / "explained", data, classifier)
    source = job.explained_source(stored, classifier)
    found = reader(classifier, source, metric="logit")
    summary = job.circuit_dataset(found, source, tmp_path / "out", progress=False)
    some = job.shown(source, classifier, tmp_path / "out", 9)
    assert (summary["rows"], summary["errors"], len(some)) == (4, 1, 3)
    assert all(work.mask is not None and work.mask[:8].all() and not work.mask[8:].any() for work, _ in some)
    x = torch.from_numpy(np.load(data)["images"][:3]).permute(0, 3, 1, 2).float() / 255
    x[:, :, 8:] = found.blank
    assert torch.allclose(found.blank.flatten(), job.sample(source, classifier).mean((0, 2, 3)))  # type: ignore[union-attr]
    with torch.no_grad():
        score = classifier.logits(x)[:, 2]
    rows = read_store(tmp_path / "out", table=CIRCUITS).to_pylist()
    assert [row["label"] for row in rows] == [2, 2, 2, None]
    assert [row["full"] for row in rows[:3]] == pytest.approx(score.tolist(), abs=1e-4)
    assert rows[3]["error"] == "gone"
    with pytest.raises(RequestError, match="explanations of another classifier"):
        job.explained_source(stored, small(10))


def test_a_circuit_that_several_images_share(classifier: Classifier, data: Path) -> None:
    source = open_source(data)
    circuit, works = job.shared_circuit(reader(classifier, source, size=0.2), source)
    assert circuit.images == 7 == len(works) and circuit.stability is not None
    one = open_source(data, limit=1)
    with pytest.raises(RequestError, match=r"has 1 image\(s\) that can be read; a shared circuit takes two"):
        job.shared_circuit(Reader(classifier, Settings(**QUICK)), one)


def test_damage_is_found(classifier: Classifier, data: Path, tmp_path: Path) -> None:
    source = open_source(data, limit=2)
    job.circuit_dataset(Reader(classifier, Settings(**QUICK)), source, tmp_path / "out", progress=False)
    assert read_run(tmp_path / "out", CIRCUITS)["layers"][0] == {
        "name": "stem.0",
        "kind": "channel",
        "units": 4,
    }
    with pytest.raises(RequestError, match="holds circuits, no explanations"):
        read_store(tmp_path / "out")
    row = read_store(tmp_path / "out", table=CIRCUITS).to_pylist()[0]
    with StoreWriter(tmp_path / "bad", run={"fingerprint": "f"}, table=CIRCUITS) as store:
        lost = [node for node in row["nodes"] if node["layer"] != row["edges"][0]["source_layer"]]
        store.write([row | {"id": "lost", "nodes": lost, "size": len(lost) / row["universe"]}])
        store.write([row | {"id": "less", "nodes": row["nodes"][:-1], "edges": []}])
        store.write([row | {"id": "none", "nodes": None}, row | {"id": "fine"}])
    said = dict(re.findall(r"id '(\w+)': (.*)", "\n".join(verify_store(tmp_path / "bad"))))
    assert re.fullmatch(r"an edge ends at \S+/\d+, which is no node", said.pop("lost"))
    count = sum(node["rank"] >= 0 for node in row["nodes"])
    assert said.pop("less") == f"{count - 1} nodes, where its size says {count}"
    assert said == {"none": "no nodes or no edges"}
    shard = next((tmp_path / "out").glob("shard*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    problems = verify_store(tmp_path / "out")
    assert problems and all(problem.startswith(shard.name) for problem in problems)


# ---------------------------------------------------------------- the command


MODEL = str(Path(__file__).parent / "small_net.py") + ":classifier"


def call(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    images = np.full((5, 32, 32, 3), 20, np.uint8)
    for number in range(5):
        images[number, :, :, number % 3] = 200 + number
    np.savez(tmp_path / "c.npz", images=images)
    return tmp_path / "c.npz"


def test_the_command_from_images_to_page(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["circuit", "--model", MODEL, "--data", colours, "--out", tmp_path / "out", "--controls", 2]
    code, out, _ = call(*arguments, "--sizes", 0.4, 1, "--json", capsys=capsys)
    assert code == 0
    summary = json.loads(out)
    keys = "mode nodes edges faithfulness cpr cmd inside_drop random_drop passes seconds"
    assert set(keys.split()) <= set(summary) and summary["rows"] == 5
    assert "its kept pixels" not in (tmp_path / "out" / "circuits.html").read_text()
    code, out, _ = call("verify", tmp_path / "out", "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["ok"] == 5
    code, _, err = call("report", tmp_path / "out", capsys=capsys)
    assert code == 2 and "holds circuits, no explanations" in err
    code, out, _ = call(*arguments, "--sizes", 0.4, 1, capsys=capsys)
    assert code == 0 and re.search("resumed +5\n", out)
    one = [*arguments[:6], tmp_path / "one", *arguments[7:], "--limit", 1, "--ablation", "blank", "--quiet"]
    assert call(*one, capsys=capsys) == (0, "", "")
    circuit = Circuit.load(tmp_path / "one" / "circuit.json")
    assert circuit.label_name == "red" and circuit.universe == 3
    assert circuit.test is not None and circuit.test.ablation == "blank"


def test_the_command_for_a_shared_circuit(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["circuit", "--model", MODEL, "--data", colours, "--out", tmp_path / "out", "--together"]
    code, out, _ = call(*arguments, "--json", "--ablation", "zero", "--mode", "gradient", capsys=capsys)
    assert code == 0
    summary = json.loads(out)
    assert summary["rows"] == 5 and 0 < summary["stability"] <= 1 and summary["mode"] == "gradient"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "circuit.json",
        "circuit.graphml",
        "circuits.html",
    }


def test_what_the_command_refuses(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["circuit", "--model", MODEL, "--out", tmp_path / "out"]
    code, _, err = call(*base, capsys=capsys)
    assert code == 2 and "give either --data, images, or --explanations" in err
    code, _, err = call(*base, "--explanations", tmp_path, capsys=capsys)
    assert code == 2 and "no explanations in" in err
    code, _, err = call(*base, "--data", colours, "--sizes", 3, capsys=capsys)
    assert code == 2 and "give shares of the nodes" in err
    code, _, err = call(*base, "--data", colours, "--limit", 1, "--ablation", "mean", capsys=capsys)
    assert code == 2 and "mean ablation needs at least 2 reference images" in err
    assert not (tmp_path / "out" / MANIFEST).exists()
