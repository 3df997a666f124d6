"""Hostile and damaged model files: one clear line within limits, and nothing read outside the model."""

import copy
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from deployed import exported
from onnx import TensorProto, helper

from minexp.deploy import Explainer, trial
from minexp.deploy.metadata import sealed
from minexp.deploy.untrusted import read_model
from minexp.errors import RequestError

Model = onnx.ModelProto


@pytest.fixture(scope="module")
def good() -> Model:
    return onnx.load_from_string(exported().explainer.read_bytes())


def write(path: Path, model: Model) -> Path:
    """As an attacker would: with a seal of its own."""
    unsealed = copy.deepcopy(model)
    kept = [entry for entry in unsealed.metadata_props if entry.key != "minexp.sha256"]
    del unsealed.metadata_props[:]
    unsealed.metadata_props.extend(kept)
    path.write_bytes(sealed(unsealed.SerializeToString()))
    return path


def loop_body(model: Model) -> onnx.GraphProto:
    (node,) = (node for node in model.graph.node if node.op_type == "Loop")
    return next(attribute.g for attribute in node.attribute if attribute.name == "body")


def external(model: Model) -> None:
    tensor = next(node for node in loop_body(model).node if node.op_type == "Constant").attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="beside.bin")


def domain(model: Model) -> None:
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    loop_body(model).node[0].domain = "com.acme"


def function(model: Model) -> None:
    model.functions.add(name="f", domain="")


def huge(model: Model) -> None:
    """0.1 kB that ask for 160 GB, once the session runs."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [40_000_000_000])
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Constant", [], ["huge_shape"], value=shape),
        helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"], value=value),
        helper.make_node("ReduceSum", ["huge"], ["huge_sum"], keepdims=0),
        helper.make_node("Add", ["area_before", "huge_sum"], ["area"]),
    ]
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == "area":
                node.output[place] = "area_before"
    model.graph.node.extend(nodes)


def endless(model: Model) -> None:
    """A loop that never ends."""
    (node,) = (node for node in model.graph.node if node.op_type == "Loop")
    body = loop_body(model)
    forever = helper.make_tensor("forever", TensorProto.BOOL, [1], [True])
    body.node.append(helper.make_node("Constant", [], ["go_on_forever"], value=forever))
    body.output[0].name = "go_on_forever"
    for constant in model.graph.node:
        if constant.output and constant.output[0] == node.input[0]:
            constant.attribute[0].t.CopyFrom(helper.make_tensor("m", TensorProto.INT64, [1], [2**62]))


def announced(model: Model) -> None:
    tensor = next(node for node in loop_body(model).node if node.op_type == "Constant").attribute[0].t
    del tensor.dims[:]
    tensor.dims.extend([1 << 20, 1 << 19])


def random_operator(model: Model) -> None:
    model.graph.node.append(helper.make_node("RandomUniform", [], ["noise"], shape=[8]))


def nested(model: Model) -> None:
    graph = helper.make_graph([], "deepest", [], [])
    for depth in range(8):
        node = helper.make_node("If", ["c"], [f"o{depth}"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], f"g{depth}", [], [])
    model.graph.node.append(graph.node[0])


def other_inputs(model: Model) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8


def fewer_outputs(model: Model) -> None:
    del model.graph.output[3]


def metadata(key: str, value: str | None) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        for entry in list(model.metadata_props):
            if entry.key == f"minexp.{key}":
                model.metadata_props.remove(entry)
        if value is not None:
            model.metadata_props.add(key=f"minexp.{key}", value=value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (external, "keeps tensors in files beside it"),
        (domain, "domain 'com.acme'"),
        (function, "functions of its own"),
        (huge, "ONNX Runtime does not load it|not enough memory|damaged or hostile|ONNX Runtime"),
        (announced, "announces a tensor"),
        (random_operator, "RandomUniform"),
        (nested, "nests graphs"),
        (other_inputs, "does not load it|not those its metadata describes"),
        (fewer_outputs, "not those its metadata describes"),
        (metadata("format", '"something else"'), "no explainer"),
        (metadata("format", None), "no explainer"),
        (metadata("class_names", "7"), "metadata is not an explainer's"),
        (metadata("preprocessing", '{"input_size": [3, -1, 24]}'), "metadata is not an explainer's"),
        (metadata("preprocessing", "[" * 100_000), "metadata is not an explainer's"),
        (metadata("fresh", "1e400"), "metadata is not an explainer's"),
        (metadata("families", '["uniform"]'), "not those its metadata describes"),
        (metadata("class_names", "[]"), "names 0 classes"),
    ],
)
def test_each_hostile_file_is_refused_in_one_line(
    tmp_path: Path, good: Model, change: Callable[[Model], None], reason: str
) -> None:
    model = copy.deepcopy(good)
    change(model)
    path = write(tmp_path / "explainer.onnx", model)
    os.mkfifo(tmp_path / "beside.bin")  # who opens it waits for ever
    with pytest.raises(RequestError, match=reason) as caught:
        Explainer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_never_ends_is_stopped(
    tmp_path: Path, good: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(good)
    endless(model)
    path = write(tmp_path / "explainer.onnx", model)
    monkeypatch.setattr(trial, "SECONDS", 6)
    started = time.monotonic()
    with pytest.raises(RequestError, match="took more than 6 s"):
        Explainer(path)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 100, b"ONNX", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x72\x02\x0a\x00"],
)
def test_what_is_no_model_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "explainer.onnx"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="damaged or no ONNX model"):
        read_model(path)
    with pytest.raises(RequestError, match="is not there"):
        read_model(tmp_path / "nothing.onnx")


def test_every_flipped_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    content, rng = exported().explainer.read_bytes(), random.Random(1)
    path = tmp_path / "explainer.onnx"
    for _ in range(60):
        damaged = bytearray(content)
        place = rng.randrange(len(damaged))
        if rng.random() < 0.5:
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        with pytest.raises(RequestError):
            Explainer(path, trusted=True)


FUZZ = """
import json, sys
from pathlib import Path
from minexp.deploy import Explainer
from minexp.errors import RequestError
for line in sys.stdin:
    path = Path(line.strip())
    try:
        Explainer(path)
        print(json.dumps([path.name, "runs"]), flush=True)
    except RequestError as error:
        print(json.dumps([path.name, str(error)]), flush=True)
"""


def mutated(model: Model, rng: random.Random) -> Model:
    """One random change to the structure of a model: an attribute, a shape, an edge, a node, a value."""
    model = copy.deepcopy(model)
    graph = rng.choice([model.graph, loop_body(model), loop_body(model)])
    node = rng.choice(graph.node)
    kind = rng.randrange(6)
    if kind == 0 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice([-1, 0, 1 << 40, rng.randrange(100)])
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice([-1, 0, 1 << 33, 7])
    elif kind == 1 and node.input:
        other = rng.choice(graph.node)
        node.input[rng.randrange(len(node.input))] = other.output[0] if other.output else ""
    elif kind == 2:
        graph.node.remove(node)
    elif kind == 3:
        node.op_type = rng.choice(
            ["Add", "Conv", "Reshape", "Expand", "Tile", "Resize", "Gather", "Range", "Pad"]
        )
    elif kind == 4:
        constants = [n for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")]
        tensor = rng.choice(constants).attribute[0].t
        raw = bytearray(tensor.raw_data)
        for _ in range(min(8, len(raw))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        tensor.raw_data = bytes(raw)
    else:
        nodes = [copy.deepcopy(n) for n in graph.node]
        rng.shuffle(nodes)
        del graph.node[:]
        graph.node.extend(nodes)
    return model


def test_300_mutated_files_crash_and_hang_nothing(tmp_path: Path, good: Model) -> None:
    """250 with damaged bytes, some sealed again, and 50 of a changed structure; in a process with limits."""
    rng, content = random.Random(0), exported().explainer.read_bytes()
    paths = []
    for number in range(300):
        path = tmp_path / f"{number:03d}.onnx"
        if number >= 250:
            write(path, mutated(good, rng))
        else:
            damaged = bytearray(content)
            for _ in range(rng.randrange(1, 20)):
                place = rng.randrange(len(damaged))
                width = rng.randrange(1, 5)
                other = width if number % 4 < 2 else rng.randrange(6)  # replaced, or also shifted
                damaged[place : place + width] = rng.randbytes(other)
            # some sealed again, so that the bytes themselves are looked at
            path.write_bytes(damaged if number % 8 else sealed(bytes(damaged[:-83])))
        paths.append(path)
    done = subprocess.run(
        [sys.executable, "-c", FUZZ],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(answers) == 300
    refused = [text for text in answers.values() if text != "runs"]
    assert all(text.count("\n") == 0 and ".onnx" in text for text in refused)
    assert len(refused) > 200
    kinds = {
        part
        for text in refused
        for part in ("checksum", "damaged or no ONNX", "does not load")
        if part in text
    }
    assert len(kinds) == 3, kinds


def test_a_crash_of_the_trial_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    crash = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    monkeypatch.setattr(trial.subprocess, "run", lambda command, **options: real(crash, **options))
    with pytest.raises(RequestError, match="ends in signal 11"):
        Explainer(exported().explainer)
    Explainer(exported().explainer, trusted=True).run(np.zeros((1, 24, 24, 3), np.uint8))
