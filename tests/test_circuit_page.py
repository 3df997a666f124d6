"""The page of circuits: safe text, and a graph that works in a real browser, offline."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_circuits as toys
from test_circuit_ablation import images, small
from test_report import browse
from tiny_models import one_thread as one_thread

import minexp
from minexp.circuit.crops import crop, most_active
from minexp.circuit.network import network
from minexp.circuit.readout import Reader
from minexp.circuit.settings import Settings
from minexp.errors import RequestError
from minexp.jobs.circuit_page import find_crops, pixels, write_circuit_page, write_shared_page
from minexp.jobs.circuits import Work
from minexp.report.circuits import CircuitView, Crops, write_circuits

QUICK: dict[str, Any] = {
    "sizes": (0.02, 0.1, 0.3, 0.6, 1.0),
    "controls": 3,
    "members": 8,
    "curve_controls": 3,
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, of which the first two have a circuit of the whole and one of the kept pixels."""
    classifier = small(11, size=32)
    classifier.class_names = ("red & <b>", "green", "blue", "dark", "none")
    reader = Reader(classifier, Settings(size=0.6, **QUICK), reference=images(12, 3, size=32))
    x = images(3, 4, size=32)
    mask = np.zeros((32, 32), bool)
    mask[4:20, 4:20] = True
    works = [
        Work(f"<img src=x>{n}", "u", pixels(image), mask=mask if n < 2 else None, label=None)
        for n, image in enumerate(x)
    ]
    some = []
    for work, image in zip(works, x, strict=True):
        kept = image if work.mask is None else torch.where(torch.from_numpy(mask), image, reader.blank[0])
        some.append((work, reader.single(*reader.prepare(kept))[0]))
    return write_circuit_page(
        reader, some, tmp_path_factory.mktemp("page") / "circuits.html", title="<i>Net</i>"
    )


def test_no_text_becomes_markup_and_nothing_is_fetched(page: Path) -> None:
    text = page.read_text()
    assert "<img src=x>" not in text and "<i>Net</i>" not in text and "&lt;i&gt;Net" in text
    assert not re.search(r"(src|href)=.?https?:", text) and "$" not in re.sub(
        r"<script.*?</script>", "", text, flags=re.S
    )
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert [len(image["circuits"]) for image in data["images"]] == [2, 2, 1]
    assert data["images"][0]["id"] == "<img src=x>0" and data["crops"]["uri"].startswith("data:image/webp")


@pytest.mark.timeout(120)
def test_slider_images_search_and_keys(page: Path, tmp_path: Path) -> None:
    script = """
      const P = circuitPage, out = {};
      const nodes = () => P.panels().map((panel) => [panel.shown.size, panel.edges.length]);
      out.tabs = document.querySelectorAll("#strip button").length;
      out.first = nodes();
      out.lines = [...document.querySelectorAll(".panel p")].map((p) => p.textContent);
      const pixel = () => P.asCanvas().toDataURL().length;
      const full = pixel();
      choose("size", 400); out.less = nodes(); out.columns = P.panels().map((panel) => panel.columns.join());
      out.counts = P.panels().map((panel) => panel.count); out.changed = pixel() !== full;
      out.count = document.getElementById("count").textContent;
      press("ArrowUp"); out.more = nodes();
      choose("size", 0); out.one = nodes();
      choose("size", 1000); out.again = nodes();
      press("ArrowRight"); press("ArrowRight"); out.third = [P.state.image, nodes().length];
      press("ArrowRight"); out.round = P.state.image;
      choose("find", "layer2"); out.hits = P.panels().map((panel) => panel.hits.size);
      document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
      out.held = document.querySelector("#detail h3").textContent;
      out.crops = [...document.querySelectorAll("#detail .crops i")].map((i) => i.style.backgroundImage.slice(0, 20));
      out.terms = [...document.querySelectorAll("#detail dt")].map((dt) => dt.textContent);
      out.links = document.querySelectorAll("#detail li button").length;
      press("Escape");
      out.after = document.querySelector("#detail h3") === null && document.getElementById("find").value;
      out.curve = document.querySelectorAll("#curve polyline").length;
      out.bands = document.querySelectorAll("#curve polygon").length;
      out.svg = (P.asSvg().match(/<circle/g) || []).length - P.panels().length;
      press("t"); out.theme = document.documentElement.dataset.theme;
      return out;
    """
    out = browse(page, tmp_path, script)
    assert out["tabs"] == 3 and len(out["first"]) == 2
    members = out["first"][0][0]
    assert out["lines"][1].startswith(f"{members} of ") or out["lines"][0].startswith("at ")
    assert any(f"{members} of 52 nodes" in line for line in out["lines"])
    assert all(
        less[0] < first[0] and less[1] < first[1]
        for less, first in zip(out["less"], out["first"], strict=True)
    )
    assert out["counts"][0] == out["counts"][1] and out["columns"][0] == out["columns"][1]
    assert out["changed"] and "%" in out["count"]
    assert all(more[0] > less[0] for more, less in zip(out["more"], out["less"], strict=True))
    assert [count for count, _ in out["one"]] == [1, 1] and out["again"] == out["first"]
    assert out["third"] == [2, 1] and out["round"] == 0
    assert min(out["hits"]) > 0 and out["held"].startswith("layer2")
    assert len(out["crops"]) == 4 and all("data:image" in uri for uri in out["crops"])
    assert "rank" in out["terms"] and out["links"] > 0
    assert out["after"] == "" and out["curve"] == 2 and out["bands"] == 2
    assert out["svg"] == sum(count for count, _ in out["first"])
    assert out["theme"] in ("dark", "light")


@pytest.mark.timeout(120)
def test_a_unit_under_the_pointer_tells_about_itself(page: Path, tmp_path: Path) -> None:
    script = """
      const panel = circuitPage.panels()[0], at = [...panel.shown][0], spot = panel.at.get(at);
      const box = panel.canvas.getBoundingClientRect(), view = circuitPage.state.view;
      const x = box.left + view.x + spot.x * view.k, y = box.top + view.y + spot.y * view.k;
      const where = {clientX: x, clientY: y, bubbles: true};
      panel.canvas.dispatchEvent(new PointerEvent("pointermove", where));
      const node = panel.circuit.nodes[at];
      const name = panel.circuit.layers[node.layer].name + "/" + node.unit;
      const over = document.querySelector("#detail h3").textContent;
      panel.canvas.dispatchEvent(new PointerEvent("pointerleave"));
      const gone = document.querySelector("#detail h3") === null;
      return [name, over, gone, document.scrollingElement.scrollWidth, innerWidth];
    """
    name, over, left, width, window = browse(page, tmp_path, script)
    assert over == name and left and width <= window
    _, _, _, width, window = browse(page, tmp_path, script, width=400)
    assert width <= window


def test_a_page_of_a_shared_circuit_and_one_without_crops(tmp_path: Path) -> None:
    classifier = small(11, size=32)
    x = images(9, 4, size=32)
    reader = Reader(classifier, Settings(size=0.3, **QUICK), reference=x)
    works = [Work(str(n), "u", pixels(image)) for n, image in enumerate(x)]
    circuit = reader.shared(*reader.prepare(x))
    path = write_shared_page(reader, circuit, works, tmp_path / "shared.html", title="t")
    assert "what 9 images share" in path.read_text()
    alone = minexp.read_circuit(
        toys.classifier(toys.Attention()), toys.image(), target=0, size=1.0, ablation="zero"
    )
    view = CircuitView("a", "b", pixels(toys.image()), [("w", None, alone)])
    browse(write_circuits([view], tmp_path / "toy.html"), tmp_path, "return 1")
    with pytest.raises(RequestError, match="no circuit was read"):
        write_circuits([], tmp_path / "none.html")


@pytest.mark.timeout(120)
def test_the_saved_drawing_has_the_shapes_of_the_canvas(tmp_path: Path) -> None:
    circuit = toys.every_kind()
    view = CircuitView("a", "b", pixels(toys.image()), [("w", None, circuit)])
    script = """
      const drawing = new DOMParser().parseFromString(circuitPage.asSvg(), "image/svg+xml");
      const units = [...drawing.querySelectorAll("[class]")].map((unit) => [unit.querySelector("title").textContent, {
        kind: unit.getAttribute("class"), element: unit.tagName,
        corners: (unit.getAttribute("points") || "").split(" ").filter(Boolean).length,
        hollow: unit.getAttribute("fill") === "none", colour: unit.getAttribute("stroke") || unit.getAttribute("fill"),
      }]);
      return [Object.fromEntries(units), units.length, drawing.querySelectorAll("path").length];
    """
    units, count, edges = browse(write_circuits([view], tmp_path / "kinds.html"), tmp_path, script)
    assert count == len(units) == 5 and edges == len(circuit.edges)
    assert {unit["kind"]: (unit["element"], unit["corners"], unit["hollow"]) for unit in units.values()} == {
        "channel": ("circle", 0, False),
        "gate": ("polygon", 3, False),
        "head": ("polygon", 4, False),
        "stream": ("circle", 0, True),
        "neuron": ("polygon", 4, False),
    }
    assert units["neuron/3"]["colour"] != units["head/0"]["colour"] == units["stream/0"]["colour"]


def test_crops_show_where_a_unit_is_most_active() -> None:
    classifier = toys.classifier(toys.Chain(), size=16)
    net = network(classifier)
    x = torch.full((3, 3, 16, 16), 0.1)
    x[1, 0, 12:, 2:5] = 1.0  # red, below left, in the second image
    site = next(site for site in net.sites if site.name == "conv1")
    best = most_active(net, x, {site: [0, 3]}, count=2)[site]
    assert best.image[:, 0].tolist() == [1, 1] and best.activation[0, 0] == pytest.approx(1.0)
    row, column = best.centre[0, 0].tolist()
    assert row > 0.7 and 0.1 < column < 0.35
    tiles = crop(x, best, 10)
    assert tiles.shape == (2, 2, 10, 10, 3) and tiles[0, 0, ..., 0].max() > 200 > tiles[0, 1, ..., 0].max()
    reader = Reader(classifier, Settings(ablation="zero", size=1.0, **QUICK), reference=x)
    found = find_crops(reader, reader.single(*reader.prepare(x[:1])))
    assert set(found.units) == {f"conv1/{n}" for n in range(4)} | {f"conv2/{n}" for n in range(3)}
    assert isinstance(found, Crops) and len(found.tiles) == 7
    attention = toys.classifier(toys.Attention())
    net = network(attention)
    head = next(site for site in net.sites if site.kind == "head")
    best = most_active(net, torch.rand(3, 3, 4, 4), {head: [0, 1]})[head]
    assert best.span == 1.0 or best.centre.shape == (2, 3, 2)  # the tokens of 2×2 patches form a grid
