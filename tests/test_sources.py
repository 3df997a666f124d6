"""Every layout images come in, and every odd image: a right answer or a row with its error."""

import gzip
import io
import json
import struct
import tarfile
import threading
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from minexp.data import items
from minexp.data.sources import load_uri, open_source
from minexp.errors import RequestError


def picture(index, height=6, width=9):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def only(path):
    (item,) = open_source(path)
    assert (item.image is None) != (item.error is None)
    if item.image is not None:
        assert item.image.dtype == np.uint8 and item.image.ndim == 3 and item.image.shape[2] == 3
    return item


def png_header(width, height):
    """A PNG of a few bytes that announces any size."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- odd images


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.png", b"", "none of"),
        ("text.png", b"no picture at all\n", "none of"),
        ("cut.jpg", encoded(picture(0, 64, 64), "JPEG")[:700], "truncated"),
        ("cut.png", encoded(picture(0, 64, 64))[:700], "truncated"),
        ("header.png", encoded(picture(0))[:20], "cannot be decoded"),
        ("bomb.png", png_header(30_000, 30_000), "more than 100 megapixels"),
        ("large.png", png_header(11_000, 10_000), "11000 x 10000 pixels"),
        ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "none of"),
    ],
)
def test_what_cannot_be_decoded_is_an_item_with_the_reason(tmp_path, name, content, says):
    (tmp_path / "a.png").write_bytes(encoded(picture(1)))
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.png").write_bytes(encoded(picture(2)))
    found = {item.id: item for item in open_source(tmp_path)}
    assert list(found) == sorted(["a.png", name, "z.png"])
    assert found[name].image is None and says in found[name].error and "\n" not in found[name].error
    assert np.array_equal(found["a.png"].image, picture(1)) and np.array_equal(
        found["z.png"].image, picture(2)
    )


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_bytes_never_crash(tmp_path):
    """Flipped bytes in every format: an image or a reason, nothing else."""
    rng = np.random.default_rng(3)
    count = 0
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        whole = encoded(picture(4, 40, 40), kind)
        for _ in range(25):
            broken = bytearray(whole)
            for position in rng.integers(0, min(len(broken), 400), 4):
                broken[position] = rng.integers(256)
            (tmp_path / f"{count:03d}.png").write_bytes(broken)
            count += 1
    found = list(open_source(tmp_path))
    assert len(found) == count
    assert all((item.image is None) != (item.error is None) for item in found)


def test_a_file_that_vanishes_is_an_item_with_the_reason(tmp_path):
    save(tmp_path / "a.png", picture(0))
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    (item,) = source
    assert "No such file" in item.error


def test_one_pixel(tmp_path):
    item = only(save(tmp_path / "a.png", np.full((1, 1, 3), (3, 4, 5), np.uint8)))
    assert item.image.tolist() == [[[3, 4, 5]]]


def test_grey_becomes_rgb(tmp_path):
    grey = picture(0)[..., 0]
    assert np.array_equal(only(save(tmp_path / "a.png", grey)).image, np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey > 128)
    assert np.array_equal(only(save(tmp_path / "b.png", bits)).image[..., 1], np.where(grey > 128, 255, 0))


def test_palette_becomes_rgb(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    image.putpalette([9, 8, 7, 250, 100, 50])
    assert only(save(tmp_path / "a.png", image)).image.tolist() == [
        [[9, 8, 7], [250, 100, 50]],
        [[250, 100, 50], [9, 8, 7]],
    ]


def test_hidden_colour_under_alpha_is_gone(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (255, 0, 0, 0)  # red that nobody sees
    rgba[1] = (0, 0, 0, 128)
    image = only(save(tmp_path / "a.png", rgba)).image
    assert (image[0] == 255).all()
    assert abs(int(image[1, 0, 0]) - 127) <= 1
    grey = np.dstack([np.full((2, 2), 7, np.uint8), np.array([[0, 255], [255, 0]], np.uint8)])
    assert only(save(tmp_path / "b.png", Image.fromarray(grey))).image[..., 0].tolist() == [
        [255, 7],
        [7, 255],
    ]


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    path = save(tmp_path / "a.png", image, transparency=0)
    assert only(path).image.tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 257 * 5, 257 * 128, 65535], [256, 300, 40_000, 1]], np.uint16)
    image = only(save(tmp_path / name, Image.fromarray(values))).image
    assert image[..., 0].tolist() == [[0, 5, 128, 255], [1, 1, 156, 0]]
    assert (image[..., 0] == image[..., 2]).all()


def test_sixteen_bit_colour_keeps_its_range(tmp_path):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    row = b"\0" + struct.pack(">6H", 65535, 0, 257 * 100, 257, 257 * 9, 257 * 200)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(content + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    assert only(tmp_path / "a.png").image.tolist() == [[[255, 0, 100], [1, 9, 200]]]


def test_pixels_without_a_range_are_refused(tmp_path):
    item = only(save(tmp_path / "a.tif", Image.fromarray(np.ones((3, 3), np.float32))))
    assert "8 or 16 bits" in item.error


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    for name in ("a.jpg", "a.tif"):
        image = only(save(tmp_path / name, cmyk)).image
        assert image[..., 0].min() > 245 and image[..., 1:].max() < 10


def test_exif_rotation_is_applied(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = (250, 10, 10)  # the left half as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right for display: left becomes top
    shown = only(save(tmp_path / "a.jpg", image, exif=exif, quality=95)).image
    assert shown.shape == (16, 8, 3)
    assert shown[:6, :, 0].min() > 200 and shown[10:, :, 0].max() < 60


def test_a_colour_profile_is_ignored_and_noted_unless_it_is_srgb(tmp_path):
    from PIL import ImageCms

    image = Image.fromarray(picture(1))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(tmp_path / "srgb.png", picture(1), icc_profile=srgb)
    wide = srgb.replace(b"sRGB", b"Wide").replace(b"s\0R\0G\0B", b"W\0i\0d\0e")
    save(tmp_path / "wide.png", picture(1), icc_profile=wide)
    save(tmp_path / "none.png", picture(1))
    notes = {item.id: item.note for item in open_source(tmp_path)}
    assert notes == {"none.png": None, "srgb.png": None, "wide.png": "colour profile ignored"}
    assert np.array_equal(only(tmp_path / "wide.png").image, np.asarray(image))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_an_animation_gives_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (only(tmp_path / name).image == (200, 0, 0)).all()


# ---------------------------------------------------------------- layouts


@pytest.fixture
def tree(tmp_path):
    for index, name in enumerate(["dog/b.png", "cat/a.PNG", "cat/deep/c.png", "dog/a.png"]):
        save(tmp_path / "data" / name, picture(index))
    (tmp_path / "data" / "cat" / "notes.md").write_text("no image")
    (tmp_path / "data" / "cat" / "._a.png").write_text("left by a file manager")
    save(tmp_path / "data" / "cat" / ".thumbnails" / "a.png", picture(0))
    return tmp_path / "data"


def test_a_folder_tree_gives_labels_in_a_fixed_order(tree):
    source = open_source(tree)
    found = list(source)
    assert [item.id for item in found] == ["cat/a.PNG", "cat/deep/c.png", "dog/a.png", "dog/b.png"]
    assert [item.label for item in found] == [0, 0, 1, 1] and source.class_names == ["cat", "dog"]
    assert len(source) == 4 and source.name == "data"
    assert np.array_equal(found[2].image, picture(3))
    assert all(np.array_equal(load_uri(item.uri), item.image) for item in found)


def test_a_link_in_a_circle_ends(tree):
    (tree / "dog" / "again").symlink_to(tree)
    assert len(open_source(tree)) == 4


def test_a_glob_and_a_single_file(tree):
    assert [item.id for item in open_source(str(tree / "dog" / "*.png"))] == ["a.png", "b.png"]
    assert [item.id for item in open_source(str(tree / "**" / "*.png"))] == [
        "cat/deep/c.png",
        "dog/a.png",
        "dog/b.png",
    ]
    item = only(tree / "dog" / "b.png")
    assert item.id == "b.png" and item.label is None and np.array_equal(item.image, picture(0))


def test_a_list_of_paths_and_uris(tree):
    path = tree / "list.txt"
    remote = (tree / "dog" / "a.png").as_uri()
    path.write_text(f"dog/b.png\t7\n\n{remote}\t3\ndog/b.png\ndog/none.png\t1\n")
    found = list(open_source(path))
    assert [item.id for item in found] == ["dog/b.png", remote, "dog/b.png~2", "dog/none.png"]
    assert [item.label for item in found] == [7, 3, None, 1]
    assert np.array_equal(found[1].image, picture(3)) and np.array_equal(load_uri(remote), picture(3))
    assert "No such file" in found[3].error
    path.write_text("dog/b.png\tcat\n")
    with pytest.raises(RequestError, match="integer"):
        open_source(path)


@pytest.mark.parametrize("key", ["x", "images"])
def test_npz_arrays(tmp_path, key):
    images = np.stack([picture(index) for index in range(5)])
    np.savez_compressed(
        tmp_path / "d.npz", **{key: images}, labels=np.arange(5) % 2, class_names=["no", "yes"]
    )
    source = open_source(tmp_path / "d.npz")
    found = list(source)
    assert [item.label for item in found] == [0, 1, 0, 1, 0] and source.class_names == ["no", "yes"]
    assert all(np.array_equal(item.image, images[index]) for index, item in enumerate(found))
    assert [item.id for item in found][:2] == ["d.npz#0", "d.npz#1"]
    assert np.array_equal(load_uri(found[3].uri), images[3])
    with pytest.raises(RequestError, match="5 images"):
        load_uri(f"{tmp_path}/d.npz#5")


def test_npy_of_grey_images(tmp_path):
    images = np.stack([picture(index)[..., 0] for index in range(3)])
    np.save(tmp_path / "d.npy", images)
    found = list(open_source(tmp_path / "d.npy"))
    assert np.array_equal(found[1].image, np.repeat(images[1][..., None], 3, 2))


def write_idx(path, array):
    content = (
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (4, 7, 5), dtype=np.uint8)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    write_idx(path, images)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.array([3, 1, 4, 1], np.uint8))
    found = list(open_source(path))
    assert [item.label for item in found] == [3, 1, 4, 1]
    assert np.array_equal(found[2].image[..., 0], images[2]) and np.array_equal(
        load_uri(found[2].uri), found[2].image
    )
    whole = path.read_bytes() if not suffix else gzip.decompress(path.read_bytes())
    path.write_bytes(whole[:-3] if not suffix else gzip.compress(whole[:-3]))
    with pytest.raises(RequestError, match="cut short"):
        open_source(path)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_webdataset_tars(tmp_path):
    for shard in range(2):
        members = []
        for index in range(3):
            key = f"{shard}{index}"
            members += [
                (f"{key}.png", encoded(picture(10 * shard + index))),
                (f"{key}.cls", str(index).encode()),
            ]
        members.append((f"{shard}x.jpg", b"no picture"))
        members += [
            (f"{shard}j.png", encoded(picture(99))),
            (f"{shard}j.json", json.dumps({"label": 8}).encode()),
        ]
        write_tar(tmp_path / f"s-{shard}.tar", members)
    found = list(open_source(tmp_path / "s-0.tar"))
    assert [item.id for item in found] == [
        "s-0.tar#00.png",
        "s-0.tar#01.png",
        "s-0.tar#02.png",
        "s-0.tar#0x.jpg",
        "s-0.tar#0j.png",
    ]
    assert [item.label for item in found] == [0, 1, 2, None, 8] and "none of" in found[3].error
    assert np.array_equal(load_uri(found[1].uri), picture(1))
    both = open_source(str(tmp_path / "s-*.tar"))
    assert len(both) == 10 and [item.id for item in both.range(4, 7)] == [
        "s-0.tar#0j.png",
        "s-1.tar#10.png",
        "s-1.tar#11.png",
    ]
    assert [item.id for item in open_source(tmp_path)] == [item.id for item in both]


@pytest.mark.parametrize("layout", ["struct", "binary"])
def test_parquet(tmp_path, layout):
    contents = [encoded(picture(index)) for index in range(150)]
    contents[4] = None if layout == "struct" else b"no picture"
    column = [{"bytes": content, "path": None} for content in contents] if layout == "struct" else contents
    table = pa.table({"image": column, "label": [index % 3 for index in range(150)]})
    names = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=70)
    source = open_source(tmp_path / "d.parquet")
    found = list(source)
    assert len(source) == len(found) == 150 and source.class_names == ["a", "b", "c"]
    assert [item.id for item in found] == [f"d.parquet#{index}" for index in range(150)]
    assert found[4].error and found[5].label == 2
    for start, stop in [(0, 3), (65, 75), (69, 71), (139, 150), (71, 139)]:
        part = list(source.range(start, stop))
        assert [item.id for item in part] == [f"d.parquet#{index}" for index in range(start, stop)]
        assert all(
            np.array_equal(item.image, picture(start + i))
            for i, item in enumerate(part)
            if item.error is None
        )
    assert np.array_equal(load_uri(found[149].uri), picture(149))


# ---------------------------------------------------------------- order, resuming, threads


def test_skipping_decodes_nothing_of_what_is_skipped(tmp_path, monkeypatch):
    for index in range(30):
        save(tmp_path / f"{index:02d}.png", picture(index))
    decoded = []
    from minexp.data import sources

    decode = sources.decode
    monkeypatch.setattr(sources, "decode", lambda uri: decoded.append(uri) or decode(uri))
    source = open_source(tmp_path)
    assert [item.id for item in source.skip(27)] == ["27.png", "28.png", "29.png"]
    assert len(decoded) == 3
    assert list(source.skip(30)) == [] and list(source.skip(99)) == []


def test_decoding_runs_ahead_in_order_and_not_too_far(tmp_path, monkeypatch):
    for index in range(40):
        save(tmp_path / f"{index:02d}.png", picture(index))
    started, threads = [], set()
    decode = items.Entry.decode

    def slow_first(entry, prepare):
        started.append(entry.id)
        threads.add(threading.current_thread().name)
        if entry.id.endswith("0.png"):
            time.sleep(0.02)
        return decode(entry, prepare)

    monkeypatch.setattr(items.Entry, "decode", slow_first)
    stream = iter(open_source(tmp_path))
    seen = [next(stream).id]
    time.sleep(0.2)
    assert 1 < len(started) <= 2 * items.WORKERS + 2, "nothing was decoded ahead, or the whole source was"
    assert "MainThread" not in threads
    seen += [item.id for item in stream]
    assert seen == [f"{index:02d}.png" for index in range(40)]


def test_a_stream_left_early_leaves_no_thread(tmp_path, monkeypatch):
    for index in range(20):
        save(tmp_path / f"{index:02d}.png", picture(index))
    started = []
    decode = items.Entry.decode

    def slow(entry, prepare):
        started.append(entry.id)
        if entry.id != "00.png":
            time.sleep(0.3)
        return decode(entry, prepare)

    monkeypatch.setattr(items.Entry, "decode", slow)
    stream = iter(open_source(tmp_path))
    next(stream)
    stream.close()
    deadline = time.time() + 5
    while (
        left := [t for t in threading.enumerate() if t.name.startswith("decode")]
    ) and time.time() < deadline:
        time.sleep(0.01)
    assert not left
    assert len(started) <= 1 + items.WORKERS, "what was waiting to be decoded was decoded for nobody"


def test_images_are_prepared_by_the_threads_and_more_of_them_may_wait(tmp_path):
    for index in range(40):
        save(tmp_path / f"{index:02d}.png", picture(index))
    prepared = []

    def halve(image):
        prepared.append(threading.current_thread().name)
        if len(prepared) == 3:
            raise ZeroDivisionError("too\nsmall")
        return image[::2]

    stream = open_source(tmp_path).range(prepare=halve, ahead=25)
    first = next(stream)
    deadline = time.time() + 5
    while len(prepared) < 25 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 25 <= len(prepared) <= 26 and "MainThread" not in prepared
    found = [first, *stream]
    assert sum(item.image is None for item in found) == 1
    assert (
        next(item.error for item in found if item.image is None)
        == "cannot be read: ZeroDivisionError: too small"
    )
    assert all(item.image.shape == (3, 9, 3) for item in found if item.image is not None)


@pytest.mark.parametrize("count", [1, 3, 7, 11])
def test_shards_are_the_whole_in_order(tree, count):
    whole = open_source(tree, limit=9) if count == 3 else open_source(tree)
    parts = [whole.shard(rank, count) for rank in range(count)]
    assert [item.id for part in parts for item in part] == [item.id for item in whole]
    assert sum(map(len, parts)) == len(whole) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part.class_names == whole.class_names for part in parts)
    assert len({part.fingerprint() for part in parts}) == count
    assert [item.id for item in parts[0].skip(1)] == [item.id for item in whole][1 : len(parts[0])]
    with pytest.raises(RequestError, match=f"shard {count} of {count}: give a rank"):
        whole.shard(count, count)


def test_limit_and_fingerprint(tree, tmp_path):
    before = open_source(tree).fingerprint()
    short = open_source(tree, limit=3)
    assert len(short) == 3 and len(list(short)) == 3 and list(short.skip(3)) == []
    assert before == open_source(tree).fingerprint() != short.fingerprint()
    moved = tmp_path / "elsewhere"
    tree.rename(moved)
    assert open_source(moved).fingerprint() == before
    save(moved / "cat" / "a.PNG", picture(0, 50, 50))
    changed = open_source(moved).fingerprint()
    assert changed != before
    save(moved / "cat" / "new.png", picture(0))
    assert open_source(moved).fingerprint() != changed


def test_arrays_of_other_content_have_other_fingerprints(tmp_path):
    prints = set()
    for seed in range(3):
        np.savez(tmp_path / "d.npz", x=np.stack([picture(seed)] * 3))
        prints.add(open_source(tmp_path / "d.npz").fingerprint())
    assert len(prints) == 3


# ---------------------------------------------------------------- requests that are wrong


def test_nothing_there_says_what_to_give(tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "list.txt").write_text("\n")
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    for src in ("empty", "nowhere", "*.jpg", "emp*", "list.txt", "none.npy"):
        with pytest.raises(RequestError, match=r"give .*photos/\*\.jpg") as caught:
            open_source(tmp_path / src)
        assert src in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.zip", b"PK", "unpack"),
        ("a.tar.gz", b"\x1f\x8b", "unpack"),
        ("a.pt", b"\x80", "pickle"),
        ("a.npz", b"no archive", "cannot be read"),
        ("a.npy", b"no array", "cannot be read"),
        ("a.tar", b"no tar" * 200, "cannot be read"),
        ("a.parquet", b"PAR1no parquetPAR1", "cannot be read"),
        ("a.idx3-ubyte", b"\0\0\x0d\3", "no IDX file"),
        ("a.idx3-ubyte", b"\0", "cannot be read"),
        ("list.txt", b"\xff\xfe\xfa", "UTF-8"),
    ],
)
def test_files_of_the_wrong_kind_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=says) as caught:
        open_source(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_of_the_wrong_kind_are_named(tmp_path):
    good = np.stack([picture(0)] * 3)
    for content, says in [
        ({"x": good.astype(np.float32) / 255}, "uint8"),
        ({"x": good.transpose(0, 3, 1, 2)}, r"\[N, H, W, 1 or 3\]"),
        ({"x": good, "y": np.zeros(4, int)}, "one integer each"),
        ({"z": good}, "x or images"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
    ]:
        np.savez(tmp_path / "d.npz", **content)
        with pytest.raises(RequestError, match=says) as caught:
            open_source(tmp_path / "d.npz")
        assert "d.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_an_archive_that_announces_too_much_is_refused_before_reading(tmp_path, monkeypatch):
    from minexp.data import containers

    monkeypatch.setattr(containers, "_MAX_ARRAY", 1000)
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((100, 8, 8, 3), np.uint8))
    with pytest.raises(RequestError, match="unpacks to"):
        open_source(tmp_path / "d.npz")
    write_idx(tmp_path / "a.idx3-ubyte", np.zeros((100, 8, 8), np.uint8))
    with pytest.raises(RequestError, match="announces"):
        open_source(tmp_path / "a.idx3-ubyte")


def test_parquet_without_images_and_a_tar_without_images_are_named(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "d.parquet")
    with pytest.raises(RequestError, match=r"no column of encoded images.*text, n"):
        open_source(tmp_path / "d.parquet")
    write_tar(tmp_path / "d.tar", [("readme.md", b"hello")])
    with pytest.raises(RequestError, match="holds no image"):
        open_source(tmp_path / "d.tar")


def test_a_wrong_limit_and_lost_uris_are_named(tmp_path):
    with pytest.raises(RequestError, match="limit"):
        open_source(tmp_path, limit=0)
    for uri in ("none.png", "none.npz#3", "none.tar#a.png", "file:///none/none.png"):
        with pytest.raises(RequestError) as caught:
            load_uri(uri)
        assert "\n" not in str(caught.value)
