"""Every odd file through the command line: a right answer or a row with its error, never a crash, never silence."""

import io
import json
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_net import SIZE

from minexp import cli
from minexp.data.store import MANIFEST, read_shards, read_store, verify_store

HERE = Path(__file__).parent
MODEL = f"{HERE / 'small_net.py'}:classifier"
RED, GREEN, BLUE = (220, 20, 20), (20, 220, 20), (20, 20, 220)


def minexp(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minexp.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=HERE.parent)


def plain(colour: tuple[int, ...], size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def huge_header() -> bytes:
    """A PNG that claims 30,000 × 30,000 pixels and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def hidden_colour() -> Image.Image:
    """Opaque green above, fully transparent below, where the file still stores red."""
    pixels = np.zeros((40, 48, 4), np.uint8)
    pixels[:20] = (*GREEN, 255)
    pixels[20:] = (255, 0, 0, 0)
    return Image.fromarray(pixels)


def half_and_half() -> Image.Image:
    """Left half blue, right half red: upright, after a quarter turn clockwise, blue is above."""
    pixels = np.zeros((40, 48, 3), np.uint8)
    pixels[:, :24], pixels[:, 24:] = BLUE, RED
    return Image.fromarray(pixels)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    return encoded(half_and_half(), "JPEG", exif=exif, quality=95)


# name of the file, its content, and the class it has (or a word of the error in its row)
CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "animated.gif": (
        lambda: encoded(plain(GREEN), "GIF", save_all=True, append_images=[plain(BLUE), plain(RED)]),
        "green",
    ),
    "cmyk.jpg": (lambda: encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95), "red"),
    "deep.png": (
        # 0.3 of white in 16 bits: dark if scaled, bright if clipped to 8 bits
        lambda: encoded(Image.fromarray(np.full((40, 48), 20_000, np.uint16)), "PNG"),
        "dark",
    ),
    "empty.png": (lambda: b"", "!"),
    "grey.png": (lambda: encoded(plain((60,), mode="L"), "PNG"), "dark"),
    "huge.png": (huge_header, "!100 megapixels"),
    "one.png": (lambda: encoded(plain(BLUE, (1, 1)), "PNG"), "blue"),
    "plain.jpg": (lambda: encoded(plain(RED), "JPEG", quality=95), "red"),
    "sideways.jpg": (turned, "blue"),
    "text.png": (lambda: b"these are words, not pixels\n" * 20, "!"),
    "transparent.png": (lambda: encoded(hidden_colour(), "PNG"), "green"),
    "truncated.jpg": (lambda: encoded(half_and_half(), "JPEG", quality=95)[:600], "!truncated"),
}


@pytest.fixture(scope="module")
def masker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masker fitted for a few steps: enough to go through every stage."""
    folder = tmp_path_factory.mktemp("fit")
    pixels = torch.randint(0, 256, (16, SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    np.savez(folder / "train.npz", x=pixels)
    out = folder / "masker.safetensors"
    done = minexp(
        "fit", "--model", MODEL, "--data", folder / "train.npz", "--out", out, "--steps", 3, "--json"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert {"steps", "seconds", "area", "kept", "robust_train", "resumed"} <= set(summary)
    assert summary["steps"] == 3
    return out


def test_a_folder_of_odd_files(masker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (content, _) in CASES.items():
        (folder / name).write_bytes(content())
    out = tmp_path / "out"
    done = minexp("explain", "--model", MODEL, "--masker", masker, "--data", folder, "--out", out, "--json")
    assert done.returncode == 3, done.stderr  # done in part: some rows are errors
    assert "Traceback" not in done.stderr
    rows = {row["id"]: row for row in read_store(out).to_pylist()}
    assert list(rows) == sorted(CASES)
    for name, (_, expected) in CASES.items():
        row = rows[name]
        if expected.startswith("!"):
            assert row["status"] == "error", name
            assert expected[1:] in row["error"].lower(), row["error"]
            assert "\n" not in row["error"]
            assert row["mask"] is None
        else:
            assert row["status"] in ("certified", "uncertified"), (name, row["error"])
            assert row["label_name"] == expected, name
            assert row["conf"] > 0.5, name
            assert (row["h"], row["w"]) == (SIZE, SIZE)
            assert 0 <= row["area"] <= 1
            assert row["evaluations"] > 0
    errors = sum(expected.startswith("!") for _, expected in CASES.values())
    summary = json.loads(done.stdout)
    wanted = "rows certified failed errors mean_area kept robust_train robust_heldout evaluations_per_image seconds"
    wanted += " images_per_second provider precision"
    assert set(wanted.split()) <= set(summary)
    assert (summary["rows"], summary["errors"]) == (len(CASES), errors)
    assert summary["certified"] + summary["failed"] == len(CASES) - errors
    assert verify_store(out) == []
    report = minexp("report", out)
    assert report.returncode == 0, report.stderr
    page = (out / "report.html").read_text()
    assert "truncated.jpg" in page


def test_batching_changes_no_stored_answer(masker: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8))
    tables = []
    for batch in (1, 5):
        out = tmp_path / f"out{batch}"
        command = [
            "explain",
            "--model",
            MODEL,
            "--masker",
            masker,
            "--data",
            tmp_path / "x.npz",
            "--out",
            out,
        ]
        done = minexp(*command, "--batch", batch, "--quiet")
        assert done.returncode in (0, 3), done.stderr
        assert done.stdout == ""
        tables.append(
            read_store(out, ["id", "status", "label", "area", "evaluations", "robust_train", "mask_crc32"])
        )
    assert tables[0].equals(tables[1])


def test_wrong_requests_are_one_line_with_the_way_out(
    masker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    plain(RED).save(tmp_path / "images" / "a.png")
    good = {"--model": MODEL, "--masker": masker, "--data": tmp_path / "images", "--out": tmp_path / "out"}

    def explain(**changes: object) -> str:
        options = good | {f"--{name}": value for name, value in changes.items()}
        code = cli.main(["explain", *(str(part) for option in options.items() for part in option)])
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, "")
        assert captured.err.startswith("minexp: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    assert "holds no images" in explain(data=tmp_path / "empty")
    assert "unknown model 'resnet18'; write it as torchvision:NAME" in explain(model="resnet18")
    other = explain(model=f"{HERE / 'small_net.py'}:other")
    assert "another classifier" in other and "minexp fit" in other
    assert "no such masker" in explain(masker=tmp_path / "none.safetensors")

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"state_dict": {}, "extra": Payload()}, tmp_path / "whole.pth")
    refused = explain(weights=tmp_path / "whole.pth")
    assert "pickled objects" in refused and "safetensors" in refused
    assert not (tmp_path / "out").exists()


def rows_listed(out: Path) -> int:
    return sum(shard.rows for shard in read_shards(out)) if (out / MANIFEST).exists() else 0


HELD = """
import sys, time
from pathlib import Path

sys.path.append({here!r})
import small_net

GATE, JOURNAL = Path({gate!r}), Path({journal!r})


class Held(small_net.Colour):
    def forward(self, x):
        while GATE.exists() and JOURNAL.exists() and JOURNAL.stat().st_size:
            time.sleep(0.01)
        return super().forward(x)


def classifier():
    return small_net.Classifier(Held(), size=small_net.SIZE, class_names=small_net.NAMES)
"""


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_stopped_job_goes_on_where_it_was(masker: Path, tmp_path: Path, number: str, code: int) -> None:
    count = 400
    images = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=images)
    out = tmp_path / "out"
    arguments = ["explain", "--masker", masker, "--data", tmp_path / "x.npz", "--out", out, "--model"]
    # the same network, which waits with some rows stored until the signal is sent
    (gate := tmp_path / "gate").touch()
    paths = {"here": str(HERE), "gate": str(gate), "journal": str(out / "shards.jsonl")}
    (tmp_path / "held.py").write_text(HELD.format(**paths))
    command = [sys.executable, "-m", "minexp.cli", *map(str, arguments), f"{tmp_path / 'held.py'}:classifier"]
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parent,
        # a test run started in the background ignores SIGINT, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while rows_listed(out) == 0 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(getattr(signal, number))
    gate.unlink()
    stdout, stderr = job.communicate(timeout=240)
    assert job.returncode == code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    if number == "SIGINT":
        assert stderr == "minexp: interrupted; the same command again goes on from here\n"
    assert verify_store(out) == []
    stored = read_store(out, ["id", "mask_crc32"])
    assert 0 < stored.num_rows < count
    done = minexp(*arguments, MODEL, "--json")
    assert done.returncode in (0, 3), done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["resumed"]) == (count, stored.num_rows)
    assert verify_store(out) == []  # no row doubled
    assert read_store(out, ["id", "mask_crc32"]).slice(0, stored.num_rows).equals(stored)
