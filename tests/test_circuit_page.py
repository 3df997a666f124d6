"""The page of circuits: safe text, and a graph that works in a real browser, offline."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import toy_circuits as toys
from browser import Browser, browsing
from PIL import Image
from test_circuit_ablation import images, small
from tiny_models import one_thread as one_thread

import minexp
from minexp.circuit.circuit import Edge, Layer, Node
from minexp.circuit.crops import crop, most_active
from minexp.circuit.network import network
from minexp.circuit.readout import Reader
from minexp.circuit.settings import Settings
from minexp.errors import RequestError
from minexp.jobs.circuit_page import find_crops, pixels, write_circuit_page, write_shared_page
from minexp.jobs.circuits import Work
from minexp.report import vendored
from minexp.report.circuits import CircuitView, Crops, write_circuits
from minexp.report.vendored import CYTOSCAPE, cytoscape, vendor

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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as open_browser:
        yield open_browser


@pytest.fixture
def shown(browser: Browser) -> Iterator[Callable[..., Browser]]:
    """Opens a page; at the end nothing has been complained about and nothing but the file been asked for."""
    opened: list[str] = []

    def show(path: Path, **size: int) -> Browser:
        browser.trouble.clear(), browser.requests.clear()
        opened.append(path.as_uri())
        browser.open(path, **size)
        browser.wait(f"location.href === {path.as_uri()!r} && document.readyState === 'complete'")
        return browser

    yield show
    browser.run("1")
    assert browser.trouble == []
    assert {url for url in browser.requests if not url.startswith(("data:", "blob:"))} == set(opened)


# What of each circuit is drawn, as Cytoscape has it: units, edges.
DRAWN = "circuitPage.panels().map(({graph}) => [graph.nodes('.unit').length, graph.edges().length])"


def put(browser: Browser, field: str, value: object) -> None:
    browser.run(
        f"document.getElementById('{field}').value = '{value}';"
        f"document.getElementById('{field}').dispatchEvent(new Event('input'))"
    )


def spot(browser: Browser, panel: int, unit: str) -> tuple[float, float]:
    """Where a unit is in the window, or another node of the graph."""
    x, y = browser.run(
        f"""(() => {{
          const {{graph, container}} = circuitPage.panels()[{panel}], box = container.getBoundingClientRect();
          const at = graph.nodes().filter((node) => node.data("label") === "{unit}").renderedPosition();
          return [box.x + at.x, box.y + at.y];
        }})()"""
    )
    return x, y


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('{selector}')].map((element) => element.textContent)")


@pytest.mark.timeout(120)
def test_sliders_change_what_is_drawn(page: Path, shown: Callable[..., Browser]) -> None:
    browser = shown(page)
    first = browser.run(DRAWN)
    assert len(first) == 2 and all(units > 20 and edges > 20 for units, edges in first)
    assert [line.split(",")[0] for line in texts(browser, ".panel .line")] == ["31 of 52 nodes"] * 2
    assert all(line.startswith("at 31 nodes") for line in texts(browser, ".panel .head p"))
    curve = browser.run("document.getElementById('curve').innerHTML")
    assert (curve.count("<polyline"), curve.count("<polygon")) == (2, 2)
    put(browser, "size", 400)
    less = browser.run(DRAWN)
    assert all(0 < a < c and 0 < b < d for (a, b), (c, d) in zip(less, first, strict=True))
    assert browser.run("document.getElementById('curve').innerHTML") != curve
    columns = browser.run(
        "circuitPage.panels().map(({graph}) =>"
        " graph.nodes('.column').map((column) => column.id() + column.position('x')).sort().join())"
    )
    assert columns[0] == columns[1] and "%" in texts(browser, "#count")[0]
    browser.key("ArrowUp")
    assert all(more[0] > fewer[0] for more, fewer in zip(browser.run(DRAWN), less, strict=True))
    put(browser, "size", 0)
    assert [units for units, _ in browser.run(DRAWN)] == [1, 1]
    put(browser, "size", 1000)
    put(browser, "edges", 500)
    assert all((a, True) == (c, 0 < b < d) for (a, b), (c, d) in zip(browser.run(DRAWN), first, strict=True))
    strongest, weakest = browser.run(
        "circuitPage.panels().map(({edges, drawn}) => [Math.min(...drawn.map((e) => e.weight)),"
        "Math.max(...edges.filter((e) => !drawn.includes(e)).map((e) => e.weight))])[0]"
    )
    assert strongest >= weakest and "of" in texts(browser, "#drawn")[0]
    for _ in range(10):
        browser.key("]")
    assert browser.run(DRAWN) == first
    x, y, width = browser.run(
        "(({x, y, width}) => [x, y, width])(document.getElementById('curve').getBoundingClientRect())"
    )
    browser.click(x + width * 0.6, y + 40)  # a size on the curve
    assert all(a < c for (a, _), (c, _) in zip(browser.run(DRAWN), first, strict=True))


@pytest.mark.timeout(120)
def test_images_search_and_keys(page: Path, shown: Callable[..., Browser]) -> None:
    browser = shown(page)
    assert browser.run("document.querySelectorAll('#strip button').length") == 3
    browser.key("ArrowRight"), browser.key("ArrowRight")
    assert browser.run("circuitPage.state.image") == 2 and len(browser.run(DRAWN)) == 1
    browser.key("ArrowRight")
    assert browser.run("circuitPage.state.image") == 0
    browser.key("/")
    for letter in "layer2":
        browser.key(letter)
    hits = browser.run(
        "circuitPage.panels().map(({graph}) => graph.nodes('.hit').map((unit) => unit.data('label')))"
    )
    assert all(found and all(name.startswith("layer2") for name in found) for found in hits)
    assert texts(browser, "#hits")[0].startswith(f"{len(hits[0]) + len(hits[1])} found")
    browser.key("Enter")
    held = texts(browser, "#detail h3")
    browser.key("Enter")
    assert held[0].startswith("layer2") and texts(browser, "#detail h3") != held
    put(browser, "size", 0)
    assert "not shown at this size" in texts(browser, "#hits")[0]
    put(browser, "size", 1000)
    browser.key("Escape")
    assert texts(browser, "#detail h3") == [] and texts(browser, "#hits") == [""]
    assert browser.run("document.getElementById('find').value + document.activeElement.tagName") == "BODY"
    browser.key("n")
    first = texts(browser, "#detail h3")
    browser.key("n"), browser.key("N")
    assert texts(browser, "#detail h3") == first and " rank 1 " in texts(browser, "#detail p")[0]
    zoom = "circuitPage.panels().map(({graph}) => graph.zoom())"
    fitted = browser.run(zoom)
    browser.key("+")
    assert browser.run(zoom) == pytest.approx([1.25 * fitted[0]] * 2)
    browser.key("f")
    assert browser.run(zoom) == fitted
    paint = "circuitPage.panels().map(({graph}) => graph.nodes('.score').style('background-color'))[0]"
    light = browser.run(paint)
    browser.key("t"), browser.key("t")
    assert browser.run(paint) == light
    browser.key("t")
    assert browser.run(paint) != light and browser.run("document.documentElement.dataset.theme") in (
        "dark",
        "light",
    )
    browser.run("document.documentElement.removeAttribute('data-theme')")


@pytest.mark.timeout(120)
def test_a_unit_under_the_pointer_tells_about_itself(page: Path, shown: Callable[..., Browser]) -> None:
    browser = shown(page)
    name, effect, needed = browser.run(
        "(({name, effect, needed}) => [name, effect, needed])(circuitPage.panels()[0].circuit.nodes[0])"
    )
    browser.mouse("mouseMoved", *spot(browser, 0, name))
    assert texts(browser, "#detail h3") == [name]
    crops = browser.run(
        "[...document.querySelectorAll('#detail .crops i')]"
        ".map((i) => [i.style.backgroundImage.slice(0, 16), i.clientWidth])"
    )
    assert len(crops) == 4 and all(uri == 'url("data:image/' and width > 20 for uri, width in crops)
    assert [float(value) for value in texts(browser, "#detail dd")] == pytest.approx(
        [effect, needed], rel=5e-3
    )
    near = browser.run(
        "circuitPage.panels().map(({graph}) =>"
        "['.focus', 'edge.near', '.far'].map((which) => graph.elements(which).length))"
    )
    assert near[0][0] == 1 and all(near[0]) and "Acts on" in " ".join(texts(browser, "#detail h4"))
    twin = browser.run(
        f"circuitPage.panels()[1].graph.nodes('.unit').filter((n) => n.data('label') === '{name}').length"
    )
    assert near[1][0] == twin  # the same unit in the circuit beside it
    browser.mouse("mouseMoved", 5, 5)
    assert texts(browser, "#detail h3") == []
    browser.click(*spot(browser, 0, name))
    browser.mouse("mouseMoved", 5, 5)
    assert texts(browser, "#detail h3") == [name]  # held
    browser.run("document.querySelector('#detail li button:enabled').click()")
    assert texts(browser, "#detail h3") != [name]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("width", [360, 768])
def test_it_fits_phones_and_tablets(page: Path, shown: Callable[..., Browser], width: int) -> None:
    browser = shown(page, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.key("n")
    top, bottom, high = browser.run(
        "(({top, bottom}) => [top, bottom, innerHeight])(document.getElementById('detail').getBoundingClientRect())"
    )
    assert 0 < top < bottom <= high  # what is told about a unit is on the screen


@pytest.mark.timeout(120)
def test_pictures_are_saved(page: Path, shown: Callable[..., Browser], tmp_path: Path) -> None:
    browser = shown(page)
    browser.save_into(tmp_path)
    units, edges = (sum(column) for column in zip(*browser.run(DRAWN), strict=True))
    browser.key("s"), browser.key("p")
    browser.wait("new Promise((resolve) => setTimeout(() => resolve(true), 1000))")
    drawing = ElementTree.parse(tmp_path / "circuit.svg").getroot()
    assert len(drawing.findall(".//{*}path")) == edges and len(drawing.findall(".//*[@class]")) == units
    words = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {"the whole image", "its kept pixels alone", "layer1", "layer4"} <= words
    with Image.open(tmp_path / "circuit.png") as picture:
        assert picture.width >= 2 * float(drawing.get("width", "0")) - 1 > 1000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
    assert {(36, 87, 214), (210, 96, 26), (255, 255, 255)} <= colours


@pytest.mark.timeout(120)
def test_a_deep_circuit_of_thousands_of_edges(shown: Callable[..., Browser], tmp_path: Path) -> None:
    """As many layers, nodes and edges as 3 % of a ResNet-50's."""
    generator = np.random.default_rng(0)
    layers = tuple(Layer(f"layer{n // 10}.{n % 10}.conv", "channel", 256) for n in range(50))
    nodes = tuple(
        Node(f"layer{n // 10 % 5}.{n % 10}.conv", int(n) // 50, rank, float(s))
        for rank, (n, s) in enumerate(
            zip(generator.permutation(750), generator.normal(size=750), strict=True)
        )
    )
    order = {layer.name: number for number, layer in enumerate(layers)}
    edges = tuple(
        Edge(a.layer, a.unit, b.layer, b.unit, float(generator.normal()), 0.1)
        for a in nodes
        for b in generator.choice(np.array(nodes, object), 8)
        if order[a.layer] < order[b.layer]
    )
    circuit = replace(toys.every_kind(), layers=layers, nodes=nodes, edges=edges, universe=12800)
    views = [CircuitView("a", "b", pixels(toys.image()), [("x", None, circuit), ("e", None, circuit)])]
    path = write_circuits(views, tmp_path / "deep.html")
    assert len(edges) > 2000 and path.stat().st_size < 2e6
    browser = shown(path)
    assert browser.run(DRAWN) == [[750, 700]] * 2  # the strongest edges, until the slider asks for more
    put(browser, "edges", 1000)
    assert browser.run(DRAWN) == [[750, len(edges)]] * 2
    lefts = browser.run(
        "[...document.querySelectorAll('.graph')].map((graph) => graph.getBoundingClientRect().left)"
    )
    assert lefts[0] == lefts[1]  # one above the other, for width
    gaps = browser.run(
        """(() => {
          const places = [...circuitPage.panels()[0].places.values()];
          const gap = (a) => (b) => Math.hypot(a.x - b.x, a.y - b.y);
          return Math.min(...places.map((a, i) => Math.min(...places.slice(i + 1).map(gap(a)))));
        })()"""
    )
    assert gaps > 8


@pytest.mark.timeout(120)
def test_a_page_of_a_shared_circuit_and_one_without_crops(
    shown: Callable[..., Browser], tmp_path: Path
) -> None:
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
    assert len(shown(write_circuits([view], tmp_path / "toy.html")).run(DRAWN)) == 1
    with pytest.raises(RequestError, match="no circuit was read"):
        write_circuits([], tmp_path / "none.html")


@pytest.mark.timeout(120)
def test_the_saved_drawing_has_the_shapes_and_curves_of_the_graph(
    shown: Callable[..., Browser], tmp_path: Path
) -> None:
    circuit = toys.every_kind()
    view = CircuitView("a", "b", pixels(toys.image()), [("w", None, circuit)])
    browser = shown(write_circuits([view], tmp_path / "kinds.html"))
    drawing = ElementTree.fromstring(browser.run("circuitPage.asSvg()"))
    units = {unit[0].text: unit for unit in drawing.findall(".//*[@class]")}
    corners = {name: len(unit.get("points", "").split()) for name, unit in units.items()}
    assert {unit.get("class"): corners[name] for name, unit in units.items()} == {
        "channel": 0,
        "gate": 3,
        "head": 4,
        "stream": 0,
        "neuron": 4,
    }
    drawn = browser.run(
        """circuitPage.panels()[0].graph.nodes(".unit").map((unit) => [unit.data("label"), unit.style("shape"),
          unit.position("x"), unit.width(), unit.numericStyle("border-width") > 0, unit.hasClass("minus")])"""
    )
    assert {shape for _, shape, *_ in drawn} == {"ellipse", "triangle", "rectangle", "diamond"}
    for name, shape, x, width, hollow, minus in drawn:
        unit = units[name]
        assert bool(corners[name]) == (shape != "ellipse") and hollow == (unit.get("stroke") is not None)
        assert (unit.get("stroke") or unit.get("fill")) == ("#d2601a" if minus else "#2457d6")
        if shape == "ellipse":
            assert [float(unit.get("cx", 0)), 2 * float(unit.get("r", 0))] == pytest.approx(
                [x, width], abs=0.02
            )
    paths = drawing.findall(".//{*}path")
    curves = browser.run(
        "circuitPage.panels()[0].graph.edges().map((edge) => edge.controlPoints().flatMap(({x, y}) => [x, y]))"
    )
    assert len(paths) == len(curves) == len(circuit.edges)
    saved = [[float(v) for v in re.findall(r"-?[\d.]+", path.get("d", ""))] for path in paths]
    wanted = sorted([*line[2:4], *line[6:8]] for line in saved)
    for mine, theirs in zip(wanted, sorted(curves), strict=True):
        assert mine == pytest.approx(theirs, abs=0.02)


def test_the_library_is_that_of_the_registry(tmp_path: Path) -> None:
    folder = Path(vendored.__file__).parent / "vendor"
    kept = {
        name: (folder / file).read_bytes()
        for name, file in {"cytoscape.min.js": "cytoscape.min.js", "LICENSE": "cytoscape.LICENSE"}.items()
    }
    for name, digest in CYTOSCAPE.files.items():
        assert hashlib.sha256(kept[name]).hexdigest() == digest
    with tarfile.open(tmp_path / "library.tgz", "w:gz") as tar:
        for name, content in kept.items():
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "again").mkdir()
    again = vendor(tmp_path / "again", tmp_path / "library.tgz")
    assert [path.read_bytes() for path in again] == list(kept.values())
    licence = " ".join(kept["LICENSE"].decode().split())
    assert licence in " ".join(cytoscape()[:1500].replace(" *", " ").split())  # and so it is on every page
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "LICENSE").write_bytes(kept["LICENSE"])
    (broken / "cytoscape.min.js").write_bytes(kept["cytoscape.min.js"] + b" ")
    with pytest.raises(RequestError, match=r"does not hold cytoscape.min.js of cytoscape@.*npm pack"):
        vendor(tmp_path / "again", broken)


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
