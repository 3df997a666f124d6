"""Explainers where they run: without torch, with the same rows, store, report and verification."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient
from deployed import draft, exported, folder, images, networks
from google.protobuf import text_format
from PIL import Image
from tiny_models import one_thread  # noqa: F401
from trained_tiles import masker, tiles

from minexp.cli import main
from minexp.data.sources import open_source
from minexp.data.store import read_run, read_store
from minexp.deploy import Explainer
from minexp.deploy.metadata import About
from minexp.deploy.repository import write_repository
from minexp.errors import MinexpError, RequestError
from minexp.jobs.local import explain_dataset
from minexp.predicate import Predicate
from minexp.repair import REPAIRS
from minexp.report import write_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(exported().explainer, trusted=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty mosaics as files, one of them cut short, one of another size."""
    root = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(images(20)):
        picture = Image.fromarray(image)
        picture = picture.resize((60, 48)) if number == 7 else picture
        picture.save(root / f"{number:02d}.png")
    (root / "03.png").write_bytes((root / "03.png").read_bytes()[:60])
    return root


def test_the_command_stores_the_rows_of_the_torch_path(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = str(exported().explainer)
    assert (
        main(["explain", "--onnx", onnx, "--data", str(pictures), "--out", str(tmp_path / "onnx"), "--json"])
        == 3
    )
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["errors"], summary["provider"]) == (20, 1, "onnxruntime-cpu")
    assert summary["precision"] == "float32" and summary["certified"] > 15
    torch_path = partial(explain_dataset, repair=REPAIRS["levels"], progress=False)
    torch_path(tiles().classifier, open_source(pictures), masker(), tmp_path / "torch")
    one, other = (read_store(tmp_path / name).to_pylist() for name in ("onnx", "torch"))
    for row, wanted in zip(one, other, strict=True):
        for name, value in wanted.items():
            if name != "ms":
                assert row[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), (
                    name
                )
    assert read_run(tmp_path / "onnx")["versions"].keys() == {"minexp", "onnxruntime"}
    # both stores verify in this runtime, and are reported alike
    for name in ("onnx", "torch"):
        assert main(["verify", str(tmp_path / name), "--onnx", onnx, "--json"]) == 0
        verdict = json.loads(capsys.readouterr().out)
        assert (verdict["rows"], verdict["ok"], verdict["bad"]) == (20, 20, 0)
        assert write_report(tmp_path / name).stat().st_size > 10_000


def test_verification_finds_what_another_explainer_answers_otherwise(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "store", tmp_path / "other.onnx"
    assert (
        main(["explain", "--onnx", str(exported().explainer), "--data", str(pictures), "--out", str(out)])
        == 3
    )
    lenient = draft(Predicate(rho=0.5))
    other.write_bytes(lenient.checked(networks(), images(4), lenient.torch(images(4)))[0])
    capsys.readouterr()
    assert main(["verify", str(out), "--onnx", str(other), "--json"]) == 4
    verdict = json.loads(capsys.readouterr().out)
    assert 0 < verdict["bad"] < 20 and verdict["ok"] + verdict["bad"] == 20
    assert "pixels of the mask differ" in verdict["problems"][0]
    (pictures / "05.png").rename(pictures / "05.gone")
    assert main(["verify", str(out), "--onnx", str(exported().explainer), "--json"]) == 4
    (pictures / "05.gone").rename(pictures / "05.png")
    (line,) = json.loads(capsys.readouterr().out)["problems"]
    assert "05.png" in line and "cannot be read again" in line


def test_an_explainer_is_held_to_its_own_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(exported().explainer)
    assert main(["verify", path, "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["rows"], verdict["ok"], verdict["provider"]) == (4, 4, "onnxruntime-cpu")
    real = About.from_metadata

    def tampered(entries: dict[str, str], where: object) -> About:
        about = real(entries, where)
        about.extra["selftest"][1]["mask_crc32"] += 1  # type: ignore[index]
        return about

    monkeypatch.setattr(About, "from_metadata", tampered)
    assert main(["verify", path, "--json"]) == 4
    assert "picture 1: mask_crc32" in capsys.readouterr().out


def test_a_stopped_job_goes_on(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "explain",
        "--onnx",
        str(exported().explainer),
        "--data",
        str(pictures),
        "--out",
        str(tmp_path / "o"),
    ]
    for _ in range(2):
        main([*command, "--json"])
    first, again = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["resumed"], again["resumed"], again["rows"]) == (0, 20, 20)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--predicate", "top1"], "--predicate was decided when"),
        (["--masker", "m.safetensors"], "--masker was decided when"),
        (["--threads", "0"], "--threads is 0"),
        (["--provider", "cuda"], "no CUDAExecutionProvider.*pip install onnxruntime-gpu"),
    ],
)
def test_requests_that_cannot_be_met(
    options: list[str], reason: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "explain",
        "--onnx",
        str(exported().explainer),
        "--data",
        str(pictures),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*command, *options]) == 2
    captured = capsys.readouterr().err
    assert re.search(reason, captured) and captured.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_wrong_images_are_refused(explainer: Explainer) -> None:
    for wrong in (
        images(2)[:, :20],
        images(2).astype(float),
        images(2)[0],
        images(2)[:0],
        images(2)[..., :1],
    ):
        with pytest.raises(RequestError, match=r"give uint8 \[B,24,24,3\]"):
            explainer.explain(wrong)
    with pytest.raises(RequestError, match="no explainer"):
        Explainer(folder() / "float32" / "masker.onnx")


def test_a_stream_of_images_of_any_size(explainer: Explainer) -> None:
    sizes = [(24, 24), (48, 31), (300, 200), (24, 25), (26, 24)]
    rng = np.random.default_rng(0)
    stream = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    parts = list(explainer.stream(iter(stream), batch=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    alone = explainer.explain(explainer.about.preprocessing.pixels(stream[2])[None])
    assert np.array_equal(parts[1].masks[0], alone.masks[0])


def test_scores_that_are_not_finite_are_an_error(
    explainer: Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = explainer.run
    monkeypatch.setattr(explainer, "run", lambda x: real(x) | {"conf": np.full(len(x), np.nan, np.float32)})
    with pytest.raises(MinexpError, match="NaN or infinite scores"):
        explainer.explain(images(2))


# ---------------------------------------------------------------- model repositories


def test_a_model_repository_follows_tritons_schema(tmp_path: Path) -> None:
    content, masks = (exported().files[place].read_bytes() for place in (1, 0))
    about = Explainer(exported().explainer, trusted=True).about
    files = write_repository(tmp_path, content, masks, about)
    assert all(path.is_file() for path in files) and len(files) == 6
    # the schema as NVIDIA's client ships it; its package would import gRPC too
    schema = Path(tritonclient.__path__[0]) / "grpc" / "model_config_pb2.py"
    description = importlib.util.spec_from_file_location("model_config_pb2", schema)
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    for name in ("minexp_explainer", "minexp_masker"):
        config = text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), module.ModelConfig())
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 32)
        session = onnxruntime.InferenceSession(tmp_path / name / "1" / "model.onnx")
        for ours, theirs in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [value.name for value in ours] == [value.name for value in theirs]
            for one, other in zip(ours, theirs, strict=True):
                shape = list(one.dims) if not one.HasField("reshape") else list(one.reshape.shape)
                assert shape == [side if isinstance(side, int) else -1 for side in other.shape[1:]]
                kind = {"float": "FP32", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}[other.type[7:-1]]
                assert one.data_type == module.DataType.Value(f"TYPE_{kind}")
    text = (tmp_path / "minexp_explainer" / "config.pbtxt").read_text()
    label = text_format.Parse(text, module.ModelConfig()).output[0]
    assert label.name == "label"
    assert (tmp_path / "minexp_explainer" / label.label_filename).read_text().split() == [
        "0",
        "1",
        "2",
        "none",
    ]


# ---------------------------------------------------------------- without torch


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with this package, ONNX Runtime and what reads images and options: no torch."""
    home = tmp_path_factory.mktemp("without") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        str(python),
        "install",
        "-q",
    ]
    options = {"check": True, "capture_output": True, "text": True, "timeout": 280}
    needed = ["onnxruntime", "numpy", "pillow", "pyarrow", "tqdm", "tyro"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *needed], **options)
    source = tmp_path_factory.mktemp("source")
    for name in (
        "minexp",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    ):  # pip builds beside what it is given
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*pip, "--no-deps", str(source)], env=os.environ | {"MINEXP_BUILD": "0"}, **options)
    return home / "bin"


def test_everything_that_runs_an_explainer_works_without_torch(without_torch: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=images(100))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [without_torch / arguments[0], *arguments[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert "No module named 'torch'" in run("python", "-c", "import torch").stderr
    onnx = str(exported().explainer)
    measured = (
        "import re, sys; from minexp.cli import main; "
        f"code = main(['explain', '--onnx', {onnx!r}, '--data', 'images.npz', '--out', 'store', '--json']); "
        # not ru_maxrss, which counts what the parent held before it became this program
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    done = run("python", "-c", measured)
    summary, kilobytes = done.stdout.splitlines()
    assert json.loads(summary)["rows"] == 100 and json.loads(summary)["errors"] == 0, done.stderr
    assert int(kilobytes) * 1024 < 400e6
    assert run("minexp", "report", "store").returncode == 0
    assert run("minexp", "verify", "store", "--onnx", onnx).returncode == 0
    assert run("minexp", "verify", onnx).returncode == 0
    assert run("minexp", "doctor", "--json").returncode == 0
    refused = run(
        "minexp", "fit", "--model", "torchvision:resnet18", "--data", "images.npz", "--out", "m.safetensors"
    )
    assert (refused.returncode, refused.stderr) == (
        2,
        "minexp: torch is not installed; pip install 'minexp[torch]'\n",
    )
    # the same rows as here
    here = Explainer(onnx, trusted=True).explain(images(100)).rows()
    there = read_store(tmp_path / "store").to_pylist()
    for name in ("label", "status", "mask", "evaluations", "robust_families"):
        assert [row[name] for row in here] == [row[name] for row in there]


def test_the_runtime_imports_no_torch() -> None:
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'safetensors', 'onnx', 'spox', 'onnxscript'))); "
        "import minexp.deploy.job, minexp.deploy.runtime, minexp.report, minexp.jobs.engine, minexp.cli; "
        "import minexp.deploy; minexp.deploy.Explainer"
    )
    subprocess.run([sys.executable, "-c", blocked], check=True, cwd=ROOT)
