"""Real explanations of real files: every layout the same rows, corrupt files as rows, memory that stays flat."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import png_header, write_idx, write_tar
from tiny_models import one_thread  # noqa: F401
from trained_tiles import masker, tiles

from minexp.certify import Predicate
from minexp.data.sources import open_source
from minexp.data.store import read_store, verify_store
from minexp.jobs.local import explain_dataset

KINDS = ("folder", "glob", "list", "npy", "npz", "idx", "tar", "tars", "parquet", "rows", "uri", "uris")
SAME = (
    "status",
    "label",
    "conf",
    "area",
    "robust_train",
    "robust_heldout",
    "threshold",
    "mask",
    "mask_crc32",
)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def lay_out(images: np.ndarray, kind: str, root: Path) -> str:
    """Store the images in one of KINDS, in their order; the SRC that names them."""
    files = {f"{index:02d}.png": png(image) for index, image in enumerate(images)}
    if kind in ("folder", "glob", "list"):
        for name, content in files.items():
            (root / name).write_bytes(content)
        (root / "list.txt").write_text("\n".join(files))
        return {"folder": str(root), "glob": f"{root}/*.png", "list": f"{root}/list.txt"}[kind]
    if kind in ("npy", "npz"):
        np.save(root / "d.npy", images) if kind == "npy" else np.savez(root / "d.npz", x=images)
        return f"{root}/d.{kind}"
    if kind == "idx":
        write_idx(root / "d.idx4-ubyte", images)
        return f"{root}/d.idx4-ubyte"
    if kind in ("tar", "tars"):
        members = list(files.items())
        write_tar(root / "0.tar", members if kind == "tar" else members[:5])
        if kind == "tars":
            write_tar(root / "1.tar", members[5:])
        return f"{root}/0.tar" if kind == "tar" else f"{root}/*.tar"
    if kind in ("parquet", "rows"):
        content = (
            [*files.values()] if kind == "parquet" else [{"bytes": c, "path": n} for n, c in files.items()]
        )
        pq.write_table(pa.table({"image": content}), root / "d.parquet", row_group_size=6)
        return f"{root}/d.parquet"
    fsspec = pytest.importorskip("fsspec")
    for name, content in files.items():
        fsspec.filesystem("memory").pipe(f"/{root.name}/{name}", content)
    if kind == "uri":
        return f"memory://{root.name}"
    (root / "list.txt").write_text("\n".join(f"memory://{root.name}/{name}" for name in files))
    return f"{root}/list.txt"


def rows(src: str, out: Path, **options: Any) -> list[dict[str, Any]]:
    options |= {"predicate": Predicate(draws=8), "progress": False}
    explain_dataset(tiles().classifier, open_source(src), masker(), out, **options)
    assert verify_store(out) == []
    return read_store(out).to_pylist()


def pictures(count: int) -> np.ndarray:
    return (tiles().x[:count].permute(0, 2, 3, 1) * 255).round().byte().numpy()


def test_every_kind_of_source_gives_the_same_explanations(tmp_path: Path) -> None:
    found = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        found[kind] = rows(lay_out(pictures(16), kind, tmp_path / kind), tmp_path / f"{kind}-out", batch=7)
        assert len({row["id"] for row in found[kind]}) == 16, kind
    first = found["folder"]
    assert sum(row["status"] == "certified" for row in first) >= 12
    assert len({row["mask_crc32"] for row in first}) > 12
    for kind, others in found.items():
        for one, other in zip(first, others, strict=True):
            assert [one[column] for column in SAME] == [other[column] for column in SAME], kind


def test_batches_of_one_of_seven_and_of_sixty_four_give_the_same_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", pictures(66))
    once, *others = (rows(f"{tmp_path}/d.npy", tmp_path / f"{batch}", batch=batch) for batch in (64, 7, 1))
    for other in others:
        for one, two in zip(once, other, strict=True):
            assert one["mask"] == two["mask"] and one["evaluations"] == two["evaluations"]
            for column in SAME[:-2]:
                same = pytest.approx(two[column], rel=1e-5) if isinstance(two[column], float) else two[column]
                assert one[column] == same, column


def test_a_folder_with_corrupt_files_is_explained_to_its_end(tmp_path: Path) -> None:
    """1,000 files, one in twenty damaged in one of five ways."""
    good = [png(image) for image in pictures(100)]
    damaged = [b"", b"no image at all", good[0][:60], png_header(60_000, 60_000), bytes(200)]
    for index in range(1000):
        content = damaged[index // 20 % 5] if index % 20 == 7 else good[index % 100]
        (tmp_path / f"{index:04d}.png").write_bytes(content)
    classifier, predicate = tiles().classifier, Predicate("top1")
    summary = explain_dataset(
        classifier,
        open_source(tmp_path),
        masker(),
        tmp_path / "out",
        predicate=predicate,
        batch=64,
        progress=False,
    )
    assert (summary["rows"], summary["errors"]) == (1000, 50)
    table = read_store(tmp_path / "out").to_pylist()
    assert [row["id"] for row in table] == [f"{index:04d}.png" for index in range(1000)]
    errors = [index for index, row in enumerate(table) if row["status"] == "error"]
    assert errors == [index for index in range(1000) if index % 20 == 7]
    assert all(table[index]["error"] and table[index]["mask"] is None for index in errors)
    assert sum(row["mask"] is not None for row in table) == 950
    assert verify_store(tmp_path / "out") == []


MEASURED = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from tiny_models import red_pixel
from minexp.certify import Predicate
from minexp.data.sources import open_source
from minexp.explanation import explain
from minexp.jobs.local import explain_dataset
from minexp.masker import Masker

resident = []

def watched(*arguments, **options):
    resident.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
    return explain(*arguments, **options)

masker = Masker().eval()
masker.reference = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
classifier = red_pixel()
classifier.micro_batch.size = 2048
summary = explain_dataset(
    classifier, open_source({src!r}), masker, {out!r}, predicate=Predicate("top1"), batch=64, progress=False,
    explain=watched,
)
print(json.dumps([summary["rows"], summary["errors"], resident]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat_over_ten_thousand_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for index in range(10_000):
            content = png(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            member = tarfile.TarInfo(f"{index:05d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    code = MEASURED.format(tests=str(Path(__file__).parent), src=f"{tmp_path}/d.tar", out=f"{tmp_path}/out")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    explained, errors, resident = json.loads(done.stdout)
    assert (explained, errors) == (10_000, 0)
    # The allocator lends and returns arenas of 16 MB, so the floor is what shows a leak: one 16 x 16 image in
    # float32 each would raise it by 15 MB between these windows, and one decoded photograph each by gigabytes.
    fifth = len(resident) // 5
    early, late = resident[fifth : 2 * fifth], resident[-fifth:]
    seen = [size >> 20 for size in resident[::10]]
    assert min(late) - min(early) < 8 * 2**20, seen
    assert max(late) - min(early) < 96 * 2**20, seen
