"""Sources behind URIs, on fsspec's file system in memory: the same items as from files."""

import importlib.util

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import encoded, picture, save, write_idx, write_tar

from minexp.data import places
from minexp.data.sources import load_uri, open_source
from minexp.errors import RequestError


@pytest.fixture
def bucket():
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def put(system, name, array):
    system.pipe(f"/bucket/{name}", encoded(array))


def test_a_remote_folder_is_read_like_a_local_one(bucket, tmp_path):
    names = ["cat/a.png", "cat/b.PNG", "cat-like/c.png", "dog/deep/d.png", ".hidden/e.png", "dog/notes.txt"]
    for index, name in enumerate(names):
        put(bucket, f"photos/{name}", picture(index))
        save(tmp_path / "photos" / name, picture(index), format="PNG")
    here, there = open_source(tmp_path / "photos"), open_source("memory://bucket/photos")
    for local, remote in zip(here, there, strict=True):
        assert (local.id, local.label) == (remote.id, remote.label)
        assert np.array_equal(local.image, remote.image)
        assert np.array_equal(load_uri(remote.uri), remote.image)
    assert there.class_names == here.class_names == ["cat", "cat-like", "dog"]
    assert [item.id for item in open_source("memory://bucket/photos/cat/*.png")] == ["a.png"]
    assert len(open_source("memory://bucket/photos/**/*.png")) == 3
    with pytest.raises(RequestError, match="holds no images"):
        open_source("memory://bucket/photos/none*")


@pytest.mark.parametrize(
    "kind", ["d.npy", "d.npz", "d.tar", "d.parquet", "train-images-idx3-ubyte.gz", "list.txt"]
)
def test_remote_containers(bucket, tmp_path, kind):
    images = [picture(index)[..., 0] if "idx" in kind else picture(index) for index in range(5)]
    path = tmp_path / kind
    if kind == "d.npy":
        np.save(path, np.stack(images))
    elif kind == "d.npz":
        np.savez(path, x=np.stack(images), y=np.arange(5))
    elif kind == "d.tar":
        write_tar(path, [(f"{index}.png", encoded(image)) for index, image in enumerate(images)])
    elif kind == "d.parquet":
        pq.write_table(pa.table({"image": [encoded(image) for image in images]}), path, row_group_size=2)
    elif kind == "list.txt":
        for index, image in enumerate(images):
            put(bucket, f"sub/{index}.png", image)
        path.write_text("".join(f"sub/{index}.png\t{index}\n" for index in range(5)))
    else:
        write_idx(path, np.stack(images))
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
        bucket.pipe(
            "/bucket/train-labels-idx1-ubyte.gz", (tmp_path / "train-labels-idx1-ubyte.gz").read_bytes()
        )
    bucket.pipe(f"/bucket/{kind}", path.read_bytes())
    source = open_source(f"memory://bucket/{kind}")
    found = list(source)
    assert len(found) == 5 and len({item.id for item in found}) == 5
    for item, image in zip(found, images, strict=True):
        assert np.array_equal(item.image, image if image.ndim == 3 else image[..., None].repeat(3, 2)), (
            item.error
        )
        assert np.array_equal(load_uri(item.uri), item.image)
    assert [item.id for item in source.skip(3)] == [item.id for item in found][3:]
    first = source.fingerprint()
    assert first == open_source(f"memory://bucket/{kind}").fingerprint()


def test_many_remote_containers_are_one_source(bucket, tmp_path):
    for part in range(3):
        write_tar(tmp_path / "d.tar", [(f"{part}{index}.png", encoded(picture(index))) for index in range(2)])
        bucket.pipe(f"/bucket/shards/{part}.tar", (tmp_path / "d.tar").read_bytes())
    for src in ("memory://bucket/shards", "memory://bucket/shards/*.tar"):
        assert [item.id for item in open_source(src)][-1] == "2.tar#21.png"


def test_what_is_not_there_or_cannot_be_fetched_is_named(bucket, monkeypatch):
    with pytest.raises(RequestError, match=r"memory://bucket/d.npz is not there"):
        open_source("memory://bucket/d.npz")
    with pytest.raises(RequestError, match=r"nope://bucket/x cannot be opened: Protocol not known"):
        open_source("nope://bucket/x")
    with pytest.raises(RequestError, match=r"d.zip is not read as images: unpack it"):
        open_source("memory://bucket/d.zip")
    (item,) = open_source("memory://bucket/a.png")
    assert item.image is None and "memory://bucket/a.png cannot be fetched" in item.error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    places._system.cache_clear()
    with pytest.raises(RequestError, match=r"needs fsspec: pip install 'minexp\[uri\]'"):
        open_source("memory://bucket/a.png")
