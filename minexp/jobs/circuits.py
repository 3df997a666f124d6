"""A dataset's circuits: the core unit that reads one for every image or stored explanation, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import __version__
from ..circuit.circuit import Circuit
from ..circuit.ranking import count_of
from ..circuit.readout import LIMIT, Reader
from ..circuit.settings import Settings
from ..classifier import Classifier
from ..data.explained import ExplainedSource
from ..data.sources import ImageSource
from ..data.store import iter_store, read_rows, read_run
from ..data.table import Columns
from ..data.tables import CIRCUITS
from ..errors import RequestError
from .circuit_classes import is_complete, write_classes
from .circuit_rows import circuit_of, row_of
from .engine import ONE_PROCESS, Placement, run_job
from .subject import Given, Load, images_on, load_for, some_of
from .unit import ImageUnit, Pixels, Row, Unit

REFERENCES = 128  # images that baselines are averaged over
_NODE_BYTES, _EDGE_BYTES = 16, 14  # on disk, at most


@dataclass(frozen=True, eq=False)
class Work:
    """An image as the classifier takes it, uint8 [H,W,C]; of an explanation, the mask [H,W] and the class as well."""

    id: str
    uri: str
    image: Pixels
    mask: npt.NDArray[np.bool_] | None = None
    label: int | None = None


def explained_source(directory: Path, classifier: Classifier, limit: int | None = None) -> ExplainedSource:
    """Stored explanations, whose kept pixels circuits are read of.

    Raises RequestError for those of another classifier.
    """
    source = ExplainedSource(directory, limit)
    if source.run.get("classifier", classifier.fingerprint) != classifier.fingerprint:
        raise RequestError(
            f"{directory} holds explanations of another classifier; give the model and weights they are of"
        )
    return source


def sample(source: ImageSource, classifier: Classifier, count: int = REFERENCES) -> Tensor | None:
    """Up to so many of the images, evenly spaced, float [M,C,H,W]; None where there are not two."""
    pixels = some_of(source, classifier.preprocessing, count)
    return None if pixels is None else images_on("cpu", pixels)


def make_reader(
    classifier: Classifier, settings: Settings, reference: Tensor | None, blank: Tensor | None = None
) -> Reader:
    """A job's reader: removed pixels take the mean colour of the reference images [M,C,H,W], where there are any."""
    if blank is None and reference is not None:
        blank = reference.mean((0, 2, 3)).view(1, -1, 1, 1)
    return Reader(classifier, settings, reference=reference, blank=blank)


def circuit_dataset(
    reader: Reader,
    source: ImageSource,
    out: str | Path,
    *,
    batch: int = 16,
    resume: bool = True,
    progress: bool = True,
    placement: Placement = ONE_PROCESS,
    load: Load | None = None,
) -> dict[str, Any]:
    """Read the circuit of every image of `source` and store one row for each in the directory `out`, in order.

    What cannot be decoded, or whose readout throws, becomes a row with its error. A job that was stopped goes on with
    the rows that are missing. Neither the batch size nor the placement changes a circuit. When all rows are there, what
    the circuits of each class share is written beside them (`minexp.jobs.circuit_classes`).
    load: makes the classifier on a device, in each worker process; without it the reader's is sent there.
    Returns the summary of the rows in `out`. Raises RequestError when `out` holds another job.
    """
    classifier, settings = reader.classifier, reader.settings
    device = str(classifier.device) if placement.engine == "local" else "cuda" if placement.gpus else "cpu"
    run = _describe(reader, source) | {"provider": f"torch-{torch.device(device).type}"}
    explained = source if isinstance(source, ExplainedSource) else None
    if placement.in_process:
        units: Callable[[int], Unit] = lambda number: _unit(reader, explained)  # noqa: E731
    else:
        units = _Units(
            load=load or Given(classifier),
            device=device,
            fingerprint=classifier.fingerprint,
            settings=settings,
            reference=_bytes(reader.reference),
            blank=reader.blank.cpu().numpy(),
            explained=explained,
        )
    found = run_job(
        units,
        source,
        out,
        run=run,
        preprocessing=classifier.preprocessing,
        class_names=classifier.class_names,
        batch=batch,
        resume=resume,
        progress=progress,
        placement=placement,
        table=CIRCUITS,
        row_bytes=_row_bytes(reader),
    )
    size = found["size"]
    summary = {"mode": settings.mode, "nodes": None if size is None else round(size * reader.net.nodes, 4)}
    if is_complete(out):
        summary["classes"] = str(write_classes(Path(out)))
    return summary | found


def shown(
    source: ImageSource, classifier: Classifier, out: str | Path, count: int
) -> list[tuple[Work, Circuit]]:
    """The first ``count`` circuits that a whole store holds, with what they are of."""
    places: list[int] = []
    start = 0
    for rows in iter_store(out, ["status"], CIRCUITS):
        status = rows["status"].to_pylist()
        places += [start + place for place, said in enumerate(status) if said == "read"]
        start += len(status)
        if len(places) >= count:
            break
    run, found = read_run(out, CIRCUITS), []
    for place, row in zip(places, read_rows(out, places[:count], CIRCUITS), strict=False):
        found += [(work, circuit_of(row, run)) for work in works(source, classifier, place, place + 1)]
    return found


def works(
    source: ImageSource, classifier: Classifier, start: int = 0, stop: int | None = None
) -> Iterator[Work]:
    """What can be read between two positions."""
    items = source.range(start, stop, prepare=classifier.preprocessing.pixels)
    for place, item in enumerate(items, start):
        if item.image is None:
            continue
        if isinstance(source, ExplainedSource):
            (kept,) = source.kept([place])
            yield Work(item.id, item.uri, item.image, kept.mask, kept.label)
        else:
            yield Work(item.id, item.uri, item.image)


def shared_circuit(reader: Reader, source: ImageSource) -> tuple[Circuit, list[Work]]:
    """The circuit that all images share, and those that could be read. RequestError where there are not two."""
    found = list(works(source, reader.classifier))
    if len(found) < 2:
        raise RequestError(
            f"{source.name} has {len(found)} image(s) that can be read; a shared circuit takes two"
        )
    images = np.stack([work.image for work in found])
    kept = [(work.mask, work.label) for work in found if work.mask is not None and work.label is not None]
    masks = np.stack([mask for mask, _ in kept]) if kept else None
    return reader.shared(*_prepared(reader, images, masks, [label for _, label in kept])), found


def whole_images(group: Sequence[Work]) -> Tensor:
    """The images as the classifier takes them, float [B,C,H,W]."""
    return images_on("cpu", np.stack([work.image for work in group]))


def kept_image(reader: Reader, work: Work) -> Tensor:
    """An image [C,H,W] with removed pixels in the reader's blank colour."""
    return _kept(reader, work.image[None], None if work.mask is None else work.mask[None])[0]


def figures(circuit: Circuit) -> dict[str, Any]:
    """The summary of a single circuit."""
    test = circuit.test
    assert test is not None
    names = ("faithfulness", "cpr", "cmd", "inside_drop", "elsewhere")
    found: dict[str, Any] = {"mode": circuit.mode, "rows": circuit.images, "errors": 0}
    found |= {"nodes": len(circuit.members), "edges": len(circuit.edges), "size": circuit.size}
    found |= {name: getattr(test, name) for name in names}
    found["random_drop"] = None if test.random_drop is None else test.random_drop.mean
    found["stability"] = None if circuit.stability is None else circuit.stability.mean
    return found | {"passes": circuit.passes, "seconds": circuit.seconds}


@dataclass(frozen=True)
class _Units:
    """Makes the core unit of a worker: a reader like the job's. fingerprint: of the job's classifier."""

    load: Load
    device: str
    fingerprint: str
    settings: Settings
    reference: Pixels | None
    blank: npt.NDArray[np.float32]
    explained: ExplainedSource | None

    def __call__(self, number: int) -> Unit:
        classifier, _ = load_for(self.load, self.device, number, (self.fingerprint, None))
        reference = None if self.reference is None else images_on("cpu", self.reference)
        reader = make_reader(classifier, self.settings, reference, torch.from_numpy(self.blank))
        return _unit(reader, self.explained)


def _unit(reader: Reader, explained: ExplainedSource | None) -> Unit:
    def call(batch: Columns) -> list[Row]:
        masks, labels = None, []
        if explained is not None:
            kept = explained.kept(batch["position"].tolist())
            masks, labels = np.stack([one.mask for one in kept]), [one.label for one in kept]
        return [
            row_of(circuit) for circuit in reader.single(*_prepared(reader, batch["image"], masks, labels))
        ]

    return ImageUnit(call)


def _prepared(
    reader: Reader, images: Pixels, masks: npt.NDArray[np.bool_] | None, labels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Images [B,C,H,W] without their removed pixels and the class [B] of each: as explained, else as predicted."""
    x, predicted = reader.prepare(_kept(reader, images, masks))
    return x, predicted if masks is None else torch.tensor(labels, device=x.device)


def _kept(reader: Reader, images: Pixels, masks: npt.NDArray[np.bool_] | None) -> Tensor:
    x = images_on(reader.classifier.device, images)
    return x if masks is None else torch.where(torch.from_numpy(masks).to(x.device)[:, None], x, reader.blank)


def _describe(reader: Reader, source: ImageSource) -> dict[str, Any]:
    """What identifies the job, and what a reader of the store wants to know about it."""
    classifier, reference = reader.classifier, reader.reference
    identity: dict[str, Any] = {
        "classifier": classifier.fingerprint,
        "source": source.fingerprint(),
        "settings": asdict(reader.settings),
        "reference": None
        if reference is None
        else hashlib.sha256(reference.cpu().numpy().tobytes()).hexdigest(),
    }
    return {
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        **identity,
        "source_name": source.name,
        "model": type(classifier.model).__name__,
        "class_names": list(classifier.class_names),
        "layers": [{"name": s.name, "kind": s.kind, "units": s.units} for s in reader.net.sites],
        "notes": list(reader.notes),
        "precision": str(classifier.dtype).removeprefix("torch."),  # a traced network runs as it is written
        "versions": {"minexp": __version__, "torch": torch.__version__},
    }


def _bytes(reference: Tensor | None) -> Pixels | None:
    """Reference images as the bytes they were made of, uint8 [M,H,W,C], which is how they travel to workers."""
    if reference is None:
        return None
    pixels: Pixels = reference.cpu().permute(0, 2, 3, 1).mul(255).round().byte().contiguous().numpy()
    if not torch.equal(images_on("cpu", pixels), reference.cpu()):
        raise ValueError("reference images for several processes are bytes divided by 255")
    return pixels


def _row_bytes(reader: Reader) -> int:
    """What a circuit takes on disk at most."""
    size, net = reader.settings.size, reader.net
    nodes = min(LIMIT, net.nodes) if size is None else count_of(size, net.nodes)
    nodes += reader.settings.stream_units * (len(net.sites) - len(net.ablated))
    return 4096 + nodes * (_NODE_BYTES + reader.settings.fan_in * _EDGE_BYTES)
