"""The store: whole or not at all, checked, resumable, and readable by others' tools."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minexp.data.shard import shard_name
from minexp.data.store import (
    COLUMNS,
    StoreWriter,
    pack_mask,
    read_rows,
    read_run,
    read_store,
    unpack_mask,
    verify_store,
)
from minexp.errors import RequestError, VerifyError

RUN = {"fingerprint": "f00d", "model": "a model", "class_names": ["cat", "dog"]}


def make_row(index, size=16):
    mask = np.random.default_rng(index).random((size, size + 3)) < 0.2
    return {
        "id": f"image-{index}",
        "uri": f"images/{index}.png",
        "status": "certified",
        "label": index % 2,
        "label_name": ["cat", "dog"][index % 2],
        "conf": np.float32(0.9),
        "kept": np.bool_(True),
        "area": float(mask.mean()),
        "robust_train": 0.96875,
        "robust_train_n": 32,
        "robust_families": {"mean": 1.0, "noise": 0.9375},
        "mask": mask,
    }


def error_row(index):
    return {"id": f"image-{index}", "uri": f"images/{index}.png", "status": "error", "error": "truncated"}


def fill(directory, count=10, rows_per_shard=4, start=0, **options):
    with StoreWriter(directory, run=RUN, rows_per_shard=rows_per_shard, **options) as writer:
        writer.write([make_row(index) for index in range(start, count)])
    return directory


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (224, 224), (7, 1)])
def test_masks_survive_packing(shape):
    mask = np.random.default_rng(1).random(shape) < 0.5
    assert np.array_equal(unpack_mask(pack_mask(mask), *shape), mask)


def test_packed_bits_are_row_major_most_significant_first():
    mask = np.array([[True, False, False], [False, False, False], [False, False, True]])
    assert pack_mask(mask) == bytes([0b10000000, 0b10000000])


def test_unpacking_the_wrong_size_is_refused():
    with pytest.raises(VerifyError, match="3 bytes"):
        unpack_mask(b"abc", 5, 5)


def test_rows_come_back_as_written(tmp_path):
    fill(tmp_path, 10)
    table = read_store(tmp_path)
    assert tuple(table.column_names) == COLUMNS
    assert table["id"].to_pylist() == [f"image-{index}" for index in range(10)]
    row = table.slice(7, 1).to_pylist()[0]
    want = make_row(7)
    assert np.array_equal(unpack_mask(row["mask"], row["h"], row["w"]), want["mask"])
    assert row["area"] == pytest.approx(want["area"]) and row["kept"] is True and row["truth"] is None
    assert json.loads(row["robust_families"]) == want["robust_families"]
    assert read_run(tmp_path) == RUN
    assert verify_store(tmp_path) == []


def test_columns_and_single_rows_can_be_read_alone(tmp_path):
    fill(tmp_path, 10)
    assert read_store(tmp_path, ["area", "id"]).column_names == ["area", "id"]
    assert [row["id"] for row in read_rows(tmp_path, [9, 0, 5, 9])] == [
        "image-9",
        "image-0",
        "image-5",
        "image-9",
    ]
    with pytest.raises(RequestError, match="no column 'colour'"):
        read_store(tmp_path, ["colour"])
    with pytest.raises(IndexError, match="10 rows"):
        read_rows(tmp_path, [10])


def test_rows_of_later_row_groups_are_found(tmp_path):
    with StoreWriter(tmp_path, run=RUN) as writer:
        writer.write([make_row(index, 4) for index in range(600)])
    assert [row["id"] for row in read_rows(tmp_path, [0, 255, 256, 599])] == [
        f"image-{i}" for i in (0, 255, 256, 599)
    ]


def test_an_empty_store_reads_as_no_rows(tmp_path):
    StoreWriter(tmp_path, run=RUN).close()
    assert read_store(tmp_path).num_rows == 0 and verify_store(tmp_path) == []


def test_error_rows_need_no_mask(tmp_path):
    with StoreWriter(tmp_path, run=RUN) as writer:
        writer.write([make_row(0), error_row(1)])
    assert read_store(tmp_path, ["error"])["error"].to_pylist() == [None, "truncated"]
    assert verify_store(tmp_path) == []


def test_resume_goes_on_where_the_rows_end(tmp_path):
    fill(tmp_path, 6)
    writer = StoreWriter(tmp_path, run=RUN, rows_per_shard=4)
    assert writer.rows_done == 6
    writer.write([make_row(index) for index in range(6, 11)])
    writer.close()
    assert read_store(tmp_path, ["id"])["id"].to_pylist() == [f"image-{index}" for index in range(11)]
    assert verify_store(tmp_path) == []


def test_a_foreign_job_is_refused_with_the_way_out(tmp_path):
    fill(tmp_path, 3)
    with pytest.raises(RequestError, match="--no-resume") as caught:
        StoreWriter(tmp_path, run={"fingerprint": "other"})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert read_store(tmp_path).num_rows == 3
    with StoreWriter(tmp_path, run={"fingerprint": "other"}, resume=False) as writer:
        assert writer.rows_done == 0
        writer.write([make_row(5)])
    assert read_store(tmp_path, ["id"])["id"].to_pylist() == ["image-5"] and verify_store(tmp_path) == []


def test_two_writers_at_once_are_refused(tmp_path):
    writer = StoreWriter(tmp_path, run=RUN)
    with pytest.raises(RequestError, match="another process"):
        StoreWriter(tmp_path, run=RUN)
    writer.close()
    StoreWriter(tmp_path, run=RUN).close()


def test_no_store_says_what_to_type(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        for read in (read_store, read_run, verify_store):
            with pytest.raises(RequestError, match="minexp explain --out"):
                read(directory)


def test_a_kill_in_the_middle_leaves_only_whole_shards(tmp_path):
    """Killed while a shard is being written: what is named is whole, and the job resumes exactly there."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        import pyarrow.parquet as pq
        from test_store import RUN, make_row
        from minexp.data.store import StoreWriter
        write_table = pq.write_table
        def dying(table, where, **options):
            write_table(table, where, **options)
            if len(written) == 2:
                os.truncate(where, os.path.getsize(where) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(where)
        written = []
        pq.write_table = dying
        writer = StoreWriter({str(tmp_path)!r}, run=RUN, rows_per_shard=4)
        writer.write([make_row(index) for index in range(30)])
    """
    dead = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert sorted(path.name for path in tmp_path.glob("shard-*")) == [
        shard_name(0, 4),
        shard_name(4, 8),
    ]
    assert read_store(tmp_path).num_rows == 8 and verify_store(tmp_path) == []
    with StoreWriter(tmp_path, run=RUN, rows_per_shard=4) as writer:
        assert writer.rows_done == 8
        writer.write([make_row(index) for index in range(8, 30)])
    assert read_store(tmp_path, ["id"])["id"].to_pylist() == [f"image-{index}" for index in range(30)]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_shard_renamed_just_before_a_crash_is_taken_in(tmp_path):
    fill(tmp_path, 8)
    journal = tmp_path / "shards.jsonl"
    first, second = journal.read_text().splitlines(keepends=True)
    for left in (first, first + second[:40]):  # never listed, or while it was being listed
        journal.write_text(left)
        assert any("not listed" in problem for problem in verify_store(tmp_path))
        assert read_store(tmp_path).num_rows == 4
        with StoreWriter(tmp_path, run=RUN) as writer:
            assert writer.rows_done == 8
        assert verify_store(tmp_path) == []
        assert journal.read_text() == first + second


def test_any_flipped_bit_is_found(tmp_path):
    fill(tmp_path, 12, rows_per_shard=12)
    shard = tmp_path / shard_name(0, 12)
    whole = shard.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(whole) * 8, 40):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << (position % 8)
        shard.write_bytes(broken)
        assert verify_store(tmp_path), f"bit {position} flipped without notice"
    shard.write_bytes(whole)
    assert verify_store(tmp_path) == []


def test_flips_that_change_values_silently_stop_ordinary_reading(tmp_path):
    """Parquet alone reads many a flipped bit as another value; page checksums turn each into an error."""
    fill(tmp_path, 12, rows_per_shard=12)
    shard = tmp_path / shard_name(0, 12)
    whole = shard.read_bytes()
    truth = pq.read_table(shard)
    pages_end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # what follows is the footer
    silent = 0
    for position in np.random.default_rng(1).integers(4 * 8, pages_end * 8, 60):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << (position % 8)
        shard.write_bytes(broken)
        try:
            changed = not pq.read_table(shard).equals(truth)
        except (OSError, pa.ArrowException):
            continue
        if changed:
            silent += 1
            with pytest.raises(VerifyError, match=shard_name(0, 12)):
                read_store(tmp_path)
    assert silent >= 3


def test_missing_shards_wrong_masks_and_doubled_rows_are_found(tmp_path):
    lying = make_row(1) | {"area": 0.99}
    damaged = make_row(2) | {"mask_crc32": 1}
    with StoreWriter(tmp_path, run=RUN, rows_per_shard=4) as writer:
        writer.write([make_row(0), make_row(0), lying, damaged])
        writer.write([make_row(index) for index in range(4, 8)])
    problems = verify_store(tmp_path)
    assert len(problems) == 3
    assert any("'image-0': stored 2 times" in problem for problem in problems)
    assert any("'image-1': the mask covers" in problem for problem in problems)
    assert any("'image-2': the mask does not match" in problem for problem in problems)
    (tmp_path / shard_name(0, 4)).unlink()
    assert f"{shard_name(0, 4)}: missing" in verify_store(tmp_path)
    with pytest.warns(match="is missing"), pytest.raises(VerifyError, match="lacks the rows from 0 on"):
        StoreWriter(tmp_path, run=RUN)


def test_rows_the_schema_does_not_know_are_refused(tmp_path):
    with StoreWriter(tmp_path, run=RUN) as writer:
        with pytest.raises(ValueError, match="'colour'"):
            writer.write([make_row(0) | {"colour": 1}])
        with pytest.raises(ValueError, match="status"):
            writer.write([make_row(0) | {"status": "fine"}])


def test_duckdb_and_pandas_read_it_as_it_is(tmp_path):
    fill(tmp_path, 10)
    pattern = str(tmp_path / "shard-*.parquet")
    query = f"select id, area, bit_count(mask::BIT) / (h * w) from '{pattern}' order by id"
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == 10
    for index, (name, area, counted) in enumerate(rows):
        assert name == f"image-{index}" and counted == pytest.approx(area, abs=1e-6)
    frame = pandas.concat(map(pandas.read_parquet, sorted(tmp_path.glob("shard-*.parquet"))))
    assert list(frame.columns) == list(COLUMNS) and len(frame) == 10
    assert frame["kept"].all() and frame["area"].iloc[3] == pytest.approx(make_row(3)["area"])
