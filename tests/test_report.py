"""The report: right figures, safe text, and a page that works in a real browser, offline."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from fake_store import CLASSES, make_store
from PIL import Image

from minexp.data.store import StoreWriter, read_store
from minexp.errors import RequestError
from minexp.report import Figure, Panel, Section, gallery, write_montage, write_panel, write_report
from minexp.report.gallery import choose
from minexp.report.intervals import mean_of, share_of
from minexp.report.summary import summarise


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("fake"), count=120, side=64, lost=1)


@pytest.fixture(scope="module")
def page(store):
    return write_report(store, gallery=16)


def row(index, **changes):
    base = {
        "id": f"i{index}",
        "uri": f"nowhere/{index}.png",
        "status": "certified",
        "label": 0,
        "label_name": "cat",
        "conf": 0.9,
        "conf_masked": 0.9,
        "conf_complement": 0.1,
        "conf_empty": 0.1,
        "kept": True,
        "border_share": 0.1,
        "robust_train": 1.0,
        "robust_heldout": 1.0,
        "dilation_kept": True,
        "mask": np.eye(8, dtype=bool),
        "area": 0.125,
    }
    return base | changes


def write(directory, rows, **run):
    with StoreWriter(directory, run={"fingerprint": "f", **run}) as writer:
        writer.write(rows)
    return directory


# ---------------------------------------------------------------- figures


def test_a_mean_and_its_interval_by_hand():
    estimate = mean_of(np.array([1.0, 2.0, 3.0, 6.0, np.nan]))
    # mean 3, sample variance (4 + 1 + 0 + 9) / 3
    half = 1.959964 * (14 / 3 / 4) ** 0.5
    assert estimate.n == 4 and estimate.mean == 3
    assert estimate.low == pytest.approx(3 - half) and estimate.high == pytest.approx(3 + half)
    assert mean_of(np.array([0.99, 1.0]), bounds=(0, 1)).high == 1
    assert mean_of(np.array([np.nan])) is None and mean_of(np.array([2.0])).low is None


def test_a_share_and_its_interval_by_hand():
    # Wilson's interval of 8 in 10, from the published closed form with z = 1.96
    estimate = share_of(8, 10)
    assert (round(estimate.low, 3), estimate.mean, round(estimate.high, 3)) == (0.490, 0.8, 0.943)
    assert share_of(0, 0) is None


def test_the_summary_agrees_with_pandas(store):
    frame = read_store(store).to_pandas()
    summary = summarise(store)
    good = frame[frame["status"] != "error"]
    assert summary.rows == 120 and int(summary.error.sum()) == 5
    assert summary.mean("area").mean == pytest.approx(good["area"].mean())
    assert summary.mean("kept").mean == pytest.approx(good["kept"].mean())
    assert summary.share(summary.certified).mean == pytest.approx((good["status"] == "certified").mean())
    by_class = good.groupby("label_name")
    assert summary.classes[0].name == by_class.size().sort_values(ascending=False).index[0]
    for line in summary.classes:
        part = by_class.get_group(line.name)
        assert line.count == len(part) and line.area.mean == pytest.approx(part["area"].mean())
        assert line.correct == pytest.approx((part["truth"] == part["label"]).mean())
    families = dict(summary.families)
    shares = [json.loads(text)["blur"] for text in good["robust_families"]]
    assert families["blur"].mean == pytest.approx(np.mean(shares)) and len(families) == 9


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("empty", {"conf_empty": 0.7}),
        ("rises", {"conf": 0.4, "conf_masked": 0.95}),
        ("border", {"border_share": 0.48}),
        ("complement", {"conf_complement": 0.8}),
        ("foreign", {"robust_heldout": 0.25}),
        ("dilation", {"dilation_kept": False}),
        ("collapsed", {"mask": np.ones((8, 8), bool), "area": 1.0}),
    ],
)
def test_each_warning_names_its_rows_and_no_others(tmp_path, key, change):
    failed = {"id": "e", "uri": "e", "status": "error", "error": "broken"}
    write(tmp_path, [row(0), row(1, **change), failed, row(2), row(3, **change)])
    summary = summarise(tmp_path)
    assert [warning.key for warning in summary.warnings] == [key]
    assert summary.warnings[0].rows.tolist() == [1, 4]
    text = write_report(tmp_path).read_text()
    assert f'data-flag="{key}"' in text and "(2 of 4 images)" in text


def test_calm_rows_raise_no_warning(tmp_path):
    write(tmp_path, [row(0), row(1)])
    assert summarise(tmp_path).warnings == []
    assert "None of the known warning signs" in write_report(tmp_path).read_text()


def test_large_masks_are_a_finding(tmp_path):
    mask = np.arange(64).reshape(8, 8) < 32
    write(tmp_path, [row(0, mask=mask, area=0.5)])
    assert "Large masks" in write_report(tmp_path).read_text()


def test_views_hold_the_rows_they_promise(store):
    frame = read_store(store).to_pandas()
    summary = summarise(store)
    views = choose(summary, 10).views
    areas = frame["area"].to_numpy()
    assert list(areas[views["largest"]]) == sorted(areas[np.isfinite(areas)])[::-1][:10]
    assert list(areas[views["smallest"]]) == sorted(areas[np.isfinite(areas)])[:10]
    assert all((frame["status"] != "error")[views["sample"]]) and len(set(views["sample"])) == 10
    bad = frame[(frame["status"] != "error") & ((frame["status"] != "certified") | (frame["kept"] == False))]  # noqa: E712
    assert set(views["failures"]) <= set(bad.index) and len(views["failures"]) == min(10, len(bad))
    wrong = frame["truth"] != frame["label"]
    assert wrong[views["mistakes"]].all()
    assert views == choose(summarise(store), 10).views


def test_failures_are_the_uncertified_and_the_lost(tmp_path):
    lost = {"kept": False, "label_masked": 1}
    rows = [row(0), row(1, status="uncertified"), row(2, **lost), row(3, status="uncertified", **lost)]
    write(tmp_path, rows)
    assert set(choose(summarise(tmp_path), 10).views["failures"]) == {1, 2, 3}


# ---------------------------------------------------------------- the file


def test_the_page_is_one_file_that_names_no_other(page, store):
    text = page.read_text()
    assert page == store / "report.html" and page.stat().st_size < 15_000_000
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[a-z/.]""", text)
    assert not re.findall(r"url\((?!data:)", text) and "://" not in text
    assert not list(store.glob("*partial*"))


def test_every_explained_row_shown_has_its_three_pictures(page):
    text = page.read_text()
    cards = text.count('<article class="card')
    assert cards >= 40
    assert text.count('class="frame kept"') + text.count("picture not found again") == cards


def test_a_lost_picture_leaves_its_mask_and_a_note(tmp_path):
    write(tmp_path, [row(0)])
    text = write_report(tmp_path).read_text()
    assert "picture not found again" in text and 'class="frame mask"' in text
    assert "1 pictures could not be loaded again" in text


def test_the_pictures_are_those_of_the_row(tmp_path):
    """The mask in the page, decoded again, is the row's; the image is what the classifier saw."""
    import base64
    import io

    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    mask = np.random.default_rng(1).random((8, 8)) < 0.4
    write(tmp_path / "store", [row(0, uri=str(tmp_path / "a.png"), mask=mask, area=float(mask.mean()))])
    text = write_report(tmp_path / "store").read_text()
    (encoded,) = set(re.findall(r"--m:url\(data:image/png;base64,([^)]*)\)", text))
    shown = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    assert np.array_equal(np.asarray(shown)[..., 3] > 0, mask)
    (encoded,) = set(re.findall(r"--i:url\(data:image/webp;base64,([^)]*)\)", text))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")), image)


def test_text_from_outside_stays_text(tmp_path):
    evil = "</script><script>alert(1)</script>\"'<b>&"
    rows = [
        row(0, id=evil, uri=evil, label_name=evil, predicate=evil),
        {"id": evil + "2", "uri": evil, "status": "error", "error": evil},
    ]
    write(tmp_path, rows, model=evil, source_name=evil)
    sections = [Section(evil, evil, [Figure(np.zeros((4, 4, 3), np.uint8), evil)], [[evil], [evil]])]
    text = write_report(tmp_path, sections=sections).read_text()
    assert "<script>alert" not in text and text.count("<script>") == 1
    assert html.escape(evil) in text


def test_sections_carry_text_tables_and_pictures(tmp_path):
    write(tmp_path / "store", [row(0)])
    Image.new("RGB", (30, 20), "red").save(tmp_path / "curve.png")
    section = Section(
        "The curve", "First.\n\nSecond.", [Figure(tmp_path / "curve.png", "A red one")], [["a"], ["7"]]
    )
    text = write_report(tmp_path / "store", out=tmp_path / "other.html", sections=[section]).read_text()
    assert "<h2>The curve</h2>" in text and "<p>First.</p><p>Second.</p>" in text
    assert "<td>7</td>" in text and 'alt="A red one"' in text


def test_a_store_of_errors_alone_has_a_report(tmp_path):
    write(tmp_path, [{"id": "a", "uri": "a", "status": "error", "error": "broken"}])
    text = write_report(tmp_path).read_text()
    assert "No image could be explained" in text and "broken" in text


def test_the_page_stays_within_its_size(tmp_path, monkeypatch):
    """Too many large pictures are shrunk first; when that is not enough, fewer are shown."""
    store = make_store(tmp_path, count=30, side=200, errors=0)
    summary = summarise(store)
    choice = choose(summary, 16)
    large = len(gallery.render_cards(store, summary, choice)[0])
    for share, fewer in [(0.75, False), (0.4, True)]:
        monkeypatch.setattr(gallery, "BUDGET", int(large * share))
        text = write_report(store, gallery=16).read_text()
        cards = text[text.index('<article class="card') : text.rindex("</article>")]
        assert len(cards) <= large * share
        assert (cards.count("<article") < len(choice.positions)) == fewer


def test_wrong_requests_are_named(tmp_path):
    with pytest.raises(RequestError, match="minexp explain"):
        write_report(tmp_path)
    StoreWriter(tmp_path, run={"fingerprint": "f"}).close()
    with pytest.raises(RequestError, match="no rows"):
        write_report(tmp_path)
    with pytest.raises(RequestError, match="gallery"):
        write_report(tmp_path, gallery=0)


# ---------------------------------------------------------------- PNG pictures


def test_a_panel_shows_image_mask_and_kept(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 255
    mask = np.zeros((32, 32), bool)
    mask[:, :16] = True
    kept = np.where(mask[..., None], image, np.uint8(128))
    path = write_panel(image, mask, kept, "cat · 50 %", tmp_path / "panel.png")
    panel = np.asarray(Image.open(path))
    middle = panel.shape[0] // 2
    assert tuple(panel[middle, 28 + 128]) == (255, 0, 0)
    assert tuple(panel[middle, 28 + 270 + 50]) == (36, 87, 214) and panel[middle, 28 + 270 + 200].min() > 200
    assert tuple(panel[middle, 28 + 540 + 50]) == (255, 0, 0) and tuple(panel[middle, 28 + 540 + 200]) == (
        128,
        128,
        128,
    )


def test_a_montage_takes_any_number_of_any_shape(tmp_path):
    panels = [
        Panel(
            np.zeros((h, w, c), np.uint8), np.ones((h, w), bool), np.zeros((h, w, c), np.uint8), "line " * 60
        )
        for h, w, c in [(8, 8, 3), (300, 200, 3), (5, 9, 1)]
    ]
    with Image.open(write_montage(panels[:1], tmp_path / "one.png")) as picture:
        one = picture.size
    with Image.open(write_montage(panels, tmp_path / "three.png")) as picture:
        three = picture.size
    assert three[0] > 1.9 * one[0] and three[1] > 1.5 * one[1]
    with pytest.raises(ValueError, match="at least one"):
        write_montage([], tmp_path / "none.png")


# ---------------------------------------------------------------- a real browser

WATCH = """<script>
const trouble = [];
addEventListener("error", (e) => trouble.push("error: " + e.message));
addEventListener("unhandledrejection", (e) => trouble.push("rejection: " + e.reason));
document.addEventListener("securitypolicyviolation", (e) => trouble.push("blocked: " + e.blockedURI));
</script>"""
HARNESS = """<script>
const shown = () => [...document.querySelectorAll("#cards .card")].filter((card) => !card.hidden);
const ids = () => shown().map((card) => card.dataset.id);
const areas = () => shown().map((card) => Number(card.dataset.area));
const click = (selector) => document.querySelector(selector).click();
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const choose = (id, value) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event("input"));
};
addEventListener("load", () => {
  let result;
  try { result = (() => { %s })(); } catch (error) { trouble.push("script: " + error); }
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const text = JSON.stringify({result, trouble, requests: requests.filter((name) => !name.startsWith("data:"))});
  const target = parent.document.createElement("pre");
  target.id = "result";
  target.textContent = text;
  parent.document.body.append(target);
});
</script>"""


def browse(page, tmp_path, script, *, width=1280, dark=False):
    """Open a copy of the page in headless Chromium, run ``script`` in it, and return what it returns.

    Fails on any error on the console, any blocked or external request. Narrow widths, which a window cannot have,
    are given to a frame.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: install it (apt-get install chromium)")
        pytest.skip("no Chromium on this machine")
    text = (
        page.read_text()
        .replace("<head>", "<head>" + WATCH, 1)
        .replace("</body>", HARNESS % script + "</body>", 1)
    )
    if width < 500:
        frame = (
            f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(text)}"></iframe>'
        )
        text = f'<!doctype html><html><head><meta charset="utf-8"></head><body>{frame}</body></html>'
    copy = tmp_path / "copy.html"
    copy.write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-sync", "--disable-component-update"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom"]
    flags += [f"--window-size={max(width, 500)},900", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND"]
    if dark:
        flags.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run(
        [chromium, *flags, copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
        encoding="utf-8",
    )
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found, "the page's script did not finish"
    answer = json.loads(html.unescape(found[1]))
    assert answer["trouble"] == [] and answer["requests"] == []
    return answer["result"]


@pytest.mark.timeout(120)
def test_views_filters_and_keys_work(page, tmp_path):
    script = """
      const out = {};
      out.first = ids();
      click("#more-cards"); out.more = ids();
      click('[data-view="largest"]'); out.largest = areas();
      press("3"); out.smallest = areas();
      choose("sort", "-area"); out.resorted = areas(); choose("sort", "");
      press("1"); choose("class", "red disc");
      out.names = shown().map((card) => card.dataset.name); choose("class", "");
      click("#more-cards");
      choose("find", out.more[5]); out.found = ids();
      choose("find", "no such id"); out.none = ids(); out.note = !document.getElementById("nothing").hidden;
      choose("find", "");
      const flag = document.querySelector("[data-flag]"); flag.click();
      out.flag = flag.dataset.flag; out.flags = shown().map((card) => card.dataset.flags);
      press("1"); shown()[0].click();
      out.open = document.getElementById("one").open; out.terms = document.querySelectorAll("#one dt").length;
      const before = document.querySelector("#one .id").textContent;
      press("ArrowRight"); out.stepped = document.querySelector("#one .id").textContent !== before;
      click("#close"); out.closed = !document.getElementById("one").open;
      const heads = document.querySelectorAll("#class-table thead button");
      heads[1].click(); heads[1].click();
      out.counts = [...document.querySelectorAll("#class-table tbody tr")].map((row) => +row.children[1].dataset.v);
      press("t"); out.theme = document.documentElement.dataset.theme;
      return out;
    """
    got = browse(page, tmp_path, script)
    assert len(got["first"]) == 12 and len(got["more"]) == 16 and got["more"][:12] == got["first"]
    assert got["largest"] == sorted(got["largest"], reverse=True) and len(got["largest"]) == 12
    assert got["smallest"] == sorted(got["smallest"]) and got["smallest"][0] < got["largest"][-1]
    assert got["resorted"] == sorted(got["resorted"], reverse=True) and got["resorted"] != got["smallest"]
    assert got["names"] and set(got["names"]) == {"red disc"}
    assert got["found"] == [got["more"][5]] and got["none"] == [] and got["note"]
    assert got["flags"] and all(got["flag"] in flags.split() for flags in got["flags"])
    assert got["open"] and got["terms"] > 15 and got["stepped"] and got["closed"]
    assert got["counts"] == sorted(got["counts"]) and len(got["counts"]) == len(CLASSES)
    assert got["theme"] == "dark"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_overflows_and_pictures_are_painted(page, tmp_path, width):
    script = """
      const root = document.documentElement;
      const wide = [...document.querySelectorAll("body *")].filter((node) =>
        node.getBoundingClientRect().right > innerWidth + 1 && !node.closest(".tabs, .wide, [hidden], dialog"));
      const frame = document.querySelector(".card:not([hidden]) .frame.kept i").getBoundingClientRect();
      return {inner: innerWidth, scroll: root.scrollWidth, wide: wide.map((node) => node.className || node.tagName),
              frame: [frame.width, frame.height],
              mask: getComputedStyle(document.querySelector(".frame.kept i")).maskImage};
    """
    got = browse(page, tmp_path, script, width=width)
    assert got["inner"] == width and got["scroll"] <= width and got["wide"] == []
    assert min(got["frame"]) > 60 and got["frame"][0] == pytest.approx(got["frame"][1], abs=1)
    assert got["mask"].startswith('url("data:image/png')


@pytest.mark.timeout(120)
def test_the_system_s_dark_theme_is_followed(page, tmp_path):
    script = "return getComputedStyle(document.body).backgroundColor"
    light, dark = (browse(page, tmp_path, script, dark=dark) for dark in (False, True))
    assert light == "rgb(247, 246, 243)" and dark == "rgb(15, 18, 22)"
