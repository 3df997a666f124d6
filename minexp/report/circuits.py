"""The page of circuits: one HTML file that needs nothing else; what draws it is in viewer/ and vendor/."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..data.files import write_text
from ..errors import RequestError
from .frame import document, script_json, text
from .pictures import Pixels, image_uri
from .vendored import CYTOSCAPE, cytoscape

if TYPE_CHECKING:
    from ..circuit.circuit import Circuit

SCRIPTS = ("model.js", "layout.js", "graph.js", "picture.js", "curve.js", "unit.js", "page.js")
_COLUMNS = 32  # tiles in a row of the sheet of crops
_PICTURE = 160  # pixels


@dataclass(frozen=True, eq=False)
class CircuitView:
    """An image with its circuits side by side: (what of, its pixels uint8 [h,w,1 or 3] or None, the circuit)."""

    id: str
    label: str
    picture: Pixels
    circuits: Sequence[tuple[str, Pixels | None, Circuit]]


@dataclass(frozen=True, eq=False)
class Crops:
    """What units respond to: tiles uint8 [units, k, side, side, 3] of the units named "layer/unit", in that order."""

    units: Sequence[str] = ()
    tiles: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 1, 1, 3), np.uint8))


def write_circuits(
    views: Sequence[CircuitView], path: str | Path, *, title: str = "Circuits", crops: Crops | None = None
) -> Path:
    """Write the page of some images' circuits. Raises RequestError when there are none."""
    if not views:
        raise RequestError("no circuit was read, so there is none to show")
    circuits: list[dict[str, Any]] = []
    images = []
    for view in views:
        numbers = []
        for what, pixels, circuit in view.circuits:
            picture = None if pixels is None else image_uri(pixels, _PICTURE)
            numbers.append(len(circuits))
            circuits.append({"title": what, "picture": picture, **_compact(circuit)})
        picture = image_uri(view.picture, _PICTURE)
        images.append({"id": view.id, "label": view.label, "picture": picture, "circuits": numbers})
    data = {"images": images, "circuits": circuits, "crops": _sheet(crops or Crops())}
    notes = dict.fromkeys(note for view in views for _, _, circuit in view.circuits for note in circuit.notes)
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    viewer = resources.files(__package__) / "viewer"
    page = document(
        viewer,
        title=title,
        notes=f"<ul>{items}</ul>" if items else "",
        data=script_json(data),
        library=cytoscape(),
        version=CYTOSCAPE.version,
        script=text(viewer, *SCRIPTS),
    )
    write_text(path, page)
    return Path(path)


def _compact(circuit: Circuit) -> dict[str, Any]:
    """A circuit as the page's script reads it: nodes and edges as short lists, edges by the numbers of their nodes."""
    layers = {layer.name: number for number, layer in enumerate(circuit.layers)}
    places = {(node.layer, node.unit): number for number, node in enumerate(circuit.nodes)}
    test = circuit.test
    figures: Mapping[str, Any] | None = None
    if test is not None:
        figures = {
            "faithfulness": _number(test.faithfulness),
            "random": None if test.random_faithfulness is None else _number(test.random_faithfulness.mean),
            "inside": _number(test.inside_drop),
            "randomDrop": None if test.random_drop is None else _number(test.random_drop.mean),
            "elsewhere": _number(test.elsewhere),
        }
    return {
        "label": circuit.label_name,
        "mode": circuit.mode,
        "universe": circuit.universe,
        "layers": [{"name": layer.name, "kind": layer.kind} for layer in circuit.layers],
        "nodes": [
            [layers[n.layer], n.unit, n.rank, _number(n.score), _number(n.effect), _number(n.needed)]
            for n in circuit.nodes
        ],
        "edges": [
            [
                places[e.source_layer, e.source],
                places.get((e.target_layer, e.target), -1),
                _number(e.effect),
                _number(e.change),
            ]
            for e in circuit.edges
        ],
        "sizes": [] if test is None else list(test.sizes),
        "curve": [] if test is None else [_number(f) for f in test.curve],
        "randomCurve": []
        if test is None
        else [[_number(v) for v in (i.mean, i.low, i.high)] for i in test.random_curve],
        "test": figures,
    }


def _number(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def _sheet(crops: Crops) -> dict[str, Any]:
    """All tiles on one picture, row by row."""
    units, count, side = crops.tiles.shape[:3]
    rows = {name: number for number, name in enumerate(crops.units)}
    about = {"rows": rows, "units": units, "count": count, "side": side, "columns": _COLUMNS}
    if not units or not count:
        return {**about, "uri": ""}
    lines = -(-units * count // _COLUMNS)
    sheet = np.full((lines * _COLUMNS, side, side, 3), 127, np.uint8)
    sheet[: units * count] = crops.tiles.reshape(-1, side, side, 3)
    picture = (
        sheet.reshape(lines, _COLUMNS, side, side, 3).swapaxes(1, 2).reshape(lines * side, _COLUMNS * side, 3)
    )
    return {**about, "uri": image_uri(picture, max(picture.shape[:2]))}
