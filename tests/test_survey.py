"""Where masks lie: mean masks, corners, copies and odd ones out, against counts made one mask at a time."""

from pathlib import Path

import numpy as np
import pytest
from test_report import row, write

from minexp.data.table import pack_mask
from minexp.errors import RequestError
from minexp.report import write_report
from minexp.report.query import ask
from minexp.report.summary import summarise
from minexp.report.survey import GRID, block_sums, cell_counts, survey


def disc(rng, size, y, x, radius):
    h, w = size
    yy, xx = np.mgrid[:h, :w]
    return ((yy - y * h) ** 2 + (xx - x * w) ** 2 < (radius * min(h, w)) ** 2) & (rng.random(size) < 0.9)


@pytest.mark.parametrize(
    "size", [(8, 8), (33, 20), (64, 64), (65, 65), (224, 224), (96, 224), (300, 401), (512, 640)]
)
def test_cells_count_the_pixels_of_the_mask_in_them(size):
    rng = np.random.default_rng(0)
    masks = rng.random((3, *size)) < 0.3
    bits = np.stack([np.frombuffer(pack_mask(mask), np.uint8) for mask in masks])
    counts, side = cell_counts(bits, *size)
    assert max(counts.shape[1:]) <= GRID
    for mask, cells in zip(masks, counts, strict=True):
        for y in range(cells.shape[0]):
            for x in range(cells.shape[1]):
                assert cells[y, x] == mask[y * side : (y + 1) * side, x * side : (x + 1) * side].sum()
    assert block_sums(counts, 4, 4).sum() == masks.sum()


def rows_of(count, where, size=(64, 64), label=0, seed=0, start=0):
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        mask = disc(rng, size, *where(rng), 0.1)
        made.append(
            row(start + index, label=label, label_name=f"class {label}", mask=mask, area=float(mask.mean()))
        )
    return made


def middle(rng):
    return rng.uniform(0.3, 0.7, 2)


def corner(rng):
    return 0.1, 0.9


def test_mean_masks_are_those_of_the_class(tmp_path):
    rows = rows_of(30, middle) + rows_of(40, corner, label=1, start=30)
    rows.insert(5, {"id": "e", "uri": "e", "status": "error", "error": "broken"})
    write(tmp_path, rows)
    found = survey(tmp_path, summarise(tmp_path).values["label"])
    for label in (0, 1):
        masks = np.stack([r["mask"] for r in rows if r.get("label") == label])
        assert found.classes[label].count == len(masks)
        expected = masks.mean(0).reshape(32, 2, 32, 2).mean((1, 3))
        assert np.allclose(found.classes[label].mean, expected)
    assert found.classes[1].where == "top right" and found.classes[1].corner > 0.95
    assert found.classes[0].corner < 0.2 and found.classes[0].border < 0.2


def test_classes_whose_evidence_lies_in_a_corner_raise_the_alarm(tmp_path):
    write(
        tmp_path,
        rows_of(30, middle) + rows_of(30, corner, label=1, start=30) + rows_of(19, corner, label=2, start=60),
    )
    summary = summarise(tmp_path)
    (alarm,) = [warning for warning in summary.warnings if warning.key == "shortcut"]
    assert alarm.rows.tolist() == list(range(30, 60))  # 19 images of a class say too little
    assert "class 1 (100 % of its evidence lies in the top right corner)" in alarm.text
    page = write_report(tmp_path).read_text()
    assert page.count('class="map alarm"') == 1 and 'data-flag="shortcut"' in page
    write(tmp_path / "four", rows_of(40, lambda rng: rng.choice([0.08, 0.92], 2)))
    (alarm,) = [warning for warning in summarise(tmp_path / "four").warnings if warning.key == "shortcut"]
    assert "of its evidence lies in the corners" in alarm.text
    border = [
        r | {"mask": np.pad(np.zeros((58, 58), bool), 3, constant_values=True)} for r in rows_of(25, middle)
    ]
    write(tmp_path / "frames", [r | {"area": float(r["mask"].mean())} for r in border])
    (alarm,) = [warning for warning in summarise(tmp_path / "frames").warnings if warning.key == "shortcut"]
    assert "along the border" in alarm.text


def test_copies_and_odd_ones_out_are_found(tmp_path):
    rng = np.random.default_rng(3)
    rows = rows_of(60, lambda rng: (0.5 + rng.uniform(-0.05, 0.05), 0.5), seed=1)
    odd = disc(rng, (64, 64), 0.85, 0.2, 0.1)
    rows[17] |= {"mask": odd, "area": float(odd.mean())}
    for copy in (40, 50):
        near = rows[30]["mask"] & (rng.random((64, 64)) < 0.97)
        rows[copy] |= {"mask": near, "area": float(near.mean())}
    other = rows[30] | {"id": "other", "label": 1, "label_name": "class 1"}  # the same mask for another class
    write(tmp_path, [*rows, other])
    found = summarise(tmp_path).survey
    assert found.outliers.tolist() == [17]
    assert {30, 40, 50} <= set(found.twins[0].tolist()) and 60 not in found.twins[0]
    page = write_report(tmp_path).read_text()
    assert 'data-view="twins"' in page and 'data-view="outliers"' in page and 'data-show="twins"' in page


def test_masks_of_other_sizes_are_passed_over(tmp_path):
    write(tmp_path, [row(0), row(1, mask=np.ones((4, 4), bool), area=1.0), row(2)])
    found = survey(tmp_path, np.zeros(3))
    assert found.classes[0].count == 2 and np.allclose(found.classes[0].mean, np.eye(8))


def test_a_query_samples_the_rows_it_matches(tmp_path):
    rows = [
        row(index, area=0.125, conf=index / 100, label_name="cat's" if index % 3 else "dog")
        for index in range(90)
    ]
    write(tmp_path / "store", rows[:50])
    write(tmp_path / "store", rows[50:])  # in a shard of its own
    answer = ask(tmp_path / "store", "label_name = 'dog' and conf > 0.455", 8)
    assert answer.matches == 14
    assert len(answer.sample) == 8 and set(answer.sample.tolist()) <= set(range(48, 90, 3))
    assert (
        ask(tmp_path / "store", "label_name = 'dog' and conf > 0.455", 8).sample.tolist()
        == answer.sample.tolist()
    )
    assert sorted(ask(tmp_path / "store", "conf > 0.875", 8).sample.tolist()) == [88, 89]
    page = write_report(
        tmp_path / "store", query="label_name = 'cat''s' and conf > 0.855", gallery=4
    ).read_text()
    assert "from the 3 rows where label_name = &#x27;cat&#x27;&#x27;s&#x27;" in page
    assert page.index('data-view="query"') < page.index('data-view="sample"')
    for wrong in ("colour = 1", "conf >", "conf > 0.5); drop table rows --"):
        with pytest.raises(RequestError, match="--query .*give a condition"):
            ask(tmp_path / "store", wrong, 4)
    assert (Path(tmp_path) / "store" / "manifest.json").exists()
