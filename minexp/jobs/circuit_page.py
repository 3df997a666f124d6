"""From circuits to their page: pictures of the images, crops of what units respond to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..circuit.circuit import Circuit
from ..circuit.crops import crop, most_active
from ..circuit.readout import Reader
from ..report.circuits import CircuitView, Crops, write_circuits
from .circuits import Work, kept_image, whole_images
from .unit import Pixels

CROPPED = 400  # units that the page shows crops of, the first in rank
TILE = 40  # pixels


def pixels(image: Tensor) -> Pixels:
    """An image [C,H,W] in [0,1] as uint8 [H,W,1 or 3]."""
    found = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return found if found.shape[2] in (1, 3) else found[..., :1]


def find_crops(reader: Reader, circuits: Sequence[Circuit]) -> Crops:
    """What the circuits' foremost units respond to among the reader's reference images."""
    images = reader.reference
    if images is None:
        return Crops()
    nodes = sorted((node for circuit in circuits for node in circuit.nodes), key=lambda node: node.rank)
    chosen = list(dict.fromkeys((node.layer, node.unit) for node in nodes))[:CROPPED]
    sites = {site.name: site for site in reader.net.sites}
    wanted: dict[str, list[int]] = {}
    for layer, unit in chosen:
        wanted.setdefault(layer, []).append(unit)
    best = most_active(
        reader.net, images, {sites[k]: v for k, v in wanted.items()}, micro_batch=reader.micro_batch
    )
    names = [f"{layer}/{unit}" for layer, units in wanted.items() for unit in units]
    tiles = [crop(images, found, TILE) for found in best.values()]
    return Crops(names, np.concatenate(tiles)) if tiles else Crops()


def write_circuit_page(
    reader: Reader, some: Sequence[tuple[Work, Circuit]], path: str | Path, *, title: str
) -> Path:
    """Write the page of these circuits, those of kept pixels beside that of their whole image."""
    views = []
    for work, circuit in some:
        image = whole_images([work])
        if work.mask is None:
            beside: list[tuple[str, Pixels | None, Circuit]] = [("the image", None, circuit)]
        else:
            label = torch.tensor([circuit.label], device=reader.classifier.device)
            whole = reader.single(image.to(label.device), label)[0]
            beside = [
                ("the whole image", None, whole),
                ("its kept pixels alone", pixels(kept_image(reader, work)), circuit),
            ]
        views.append(CircuitView(work.id, circuit.label_name, pixels(image[0]), beside))
    circuits = [circuit for view in views for _, _, circuit in view.circuits]
    return write_circuits(views, path, title=title, crops=find_crops(reader, circuits))


def write_shared_page(
    reader: Reader, circuit: Circuit, works: Sequence[Work], path: str | Path, *, title: str
) -> Path:
    """Write the page of a circuit that several images share, with the first of them as its picture."""
    what = f"what {circuit.images} images share"
    view = CircuitView(what, circuit.label_name, pixels(whole_images(works[:1])[0]), [(what, None, circuit)])
    return write_circuits([view], path, title=title, crops=find_crops(reader, [circuit]))
