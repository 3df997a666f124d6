"""A dataset's circuits: one row for every image, or for every stored explanation; resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..circuit.circuit import Circuit
from ..circuit.readout import Reader
from ..circuit.settings import Settings
from ..classifier import Classifier
from ..data.sources import ImageSource, load_uri
from ..data.store import StoreWriter, read_rows, read_run, read_store, unpack_mask
from ..data.tables import CIRCUITS
from ..errors import MinexpError, RequestError

ROWS_PER_SHARD = 64
REFERENCES = 128  # images that baselines are averaged over
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Work:
    """An image as the classifier takes it, uint8 [H,W,C], or why there is none; of an explanation, mask and class."""

    id: str
    uri: str
    image: Pixels | None
    truth: int | None = None
    error: str | None = None
    mask: npt.NDArray[np.bool_] | None = None
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """What circuits are read of: ``count`` pieces of work from any position on, and facts that identify them."""

    name: str
    fingerprint: str
    count: int
    start: Callable[[int], Iterator[Work]]


def inputs_of_source(source: ImageSource, classifier: Classifier) -> Inputs:
    """Every image of a source, as a whole."""

    def start(position: int) -> Iterator[Work]:
        for item in source.range(position, len(source)):
            work = _prepared(classifier, item.id, item.uri, partial(_same, item.image))
            error = item.error or work.error
            yield Work(item.id, item.uri, work.image if item.error is None else None, item.label, error)

    return Inputs(source.name, source.fingerprint(), len(source), start)


def inputs_of_explanations(directory: Path, classifier: Classifier, limit: int | None = None) -> Inputs:
    """The kept pixels of every stored explanation, for the class that it explains.

    Raises RequestError for explanations of another classifier.
    """
    run = read_run(directory)
    if run.get("classifier", classifier.fingerprint) != classifier.fingerprint:
        raise RequestError(
            f"{directory} holds explanations of another classifier; give the model and weights they are of"
        )
    total = read_store(directory, ["id"]).num_rows
    count = total if limit is None else min(limit, total)

    def start(position: int) -> Iterator[Work]:
        for place in range(position, count):
            row = read_rows(directory, [place])[0]
            if row["mask"] is None:
                yield Work(row["id"], row["uri"], None, row["truth"], row["error"] or "no mask is stored")
                continue
            work = _prepared(classifier, row["id"], row["uri"], partial(load_uri, row["uri"]))
            mask = unpack_mask(row["mask"], row["h"], row["w"])
            yield Work(row["id"], row["uri"], work.image, row["truth"], work.error, mask, row["label"])

    return Inputs(
        f"{run.get('source_name', directory.name)}, kept pixels",
        f"{run['fingerprint']} {count}",
        count,
        start,
    )


def sample(inputs: Inputs, count: int = REFERENCES) -> Tensor | None:
    """Up to so many of the images, evenly spaced, float [M,C,H,W]; None where there are not two."""
    pixels = []
    for number in range(min(count, inputs.count)):
        work = next(inputs.start(number * inputs.count // min(count, inputs.count)))
        if work.image is not None:
            pixels.append(work.image)
    return _tensor(pixels) if len(pixels) > 1 else None


def make_reader(classifier: Classifier, settings: Settings, reference: Tensor | None) -> Reader:
    """A job's reader: removed pixels take the mean colour of the reference images [M,C,H,W], where there are any."""
    blank = None if reference is None else reference.mean((0, 2, 3)).view(1, -1, 1, 1)
    return Reader(classifier, settings, reference=reference, blank=blank)


def circuit_dataset(
    reader: Reader,
    inputs: Inputs,
    out: str | Path,
    *,
    batch: int = 16,
    resume: bool = True,
    progress: bool = True,
    shown: int = 0,
) -> tuple[dict[str, Any], list[tuple[Work, Circuit]]]:
    """Read the circuit of every input and store one row for each in the directory ``out``, in order.

    What cannot be decoded, or whose readout throws, becomes a row with its error. A job that was stopped goes on behind
    its last stored row. Returns the summary of all rows, and the first ``shown`` circuits of those read now.
    RequestError when ``out`` holds another job.
    """
    classifier, settings, reference = reader.classifier, reader.settings, reader.reference
    identity = {
        "classifier": classifier.fingerprint,
        "inputs": inputs.fingerprint,
        "settings": asdict(settings),
        "reference": None
        if reference is None
        else hashlib.sha256(reference.cpu().numpy().tobytes()).hexdigest(),
    }
    run = {
        "fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        **identity,
        "source_name": inputs.name,
        "model": type(classifier.model).__name__,
        "class_names": list(classifier.class_names),
        "layers": [{"name": s.name, "kind": s.kind, "units": s.units} for s in reader.net.sites],
        "notes": list(reader.notes),
        "versions": {"minexp": __version__, "torch": torch.__version__},
    }
    started = time.perf_counter()
    some: list[tuple[Work, Circuit]] = []
    store = StoreWriter(out, run=run, table=CIRCUITS, rows_per_shard=ROWS_PER_SHARD, resume=resume)
    resumed = store.rows_done
    with (
        store,
        tqdm(total=inputs.count, initial=resumed, unit="circuit", disable=None if progress else True) as bar,
    ):
        for group in _groups(inputs.start(resumed), batch):
            for work, found in zip(group, _read(reader, group), strict=True):
                if isinstance(found, Circuit) and len(some) < shown:
                    some.append((work, found))
                store.write([_row(work, found)])
            bar.update(len(group))
    seconds = round(time.perf_counter() - started, 3)
    return {**summarise(out, settings.mode), "resumed": resumed, "seconds": seconds, "out": str(out)}, some


def shared_circuit(reader: Reader, inputs: Inputs) -> tuple[Circuit, list[Work]]:
    """The circuit that all inputs share, and those that could be read. RequestError where there are not two."""
    works = [work for work in inputs.start(0) if work.image is not None]
    if len(works) < 2:
        raise RequestError(
            f"{inputs.name} has {len(works)} image(s) that can be read; a shared circuit takes two"
        )
    return reader.shared(*_inputs(reader, works)), works


def whole_images(group: Sequence[Work]) -> Tensor:
    """The images as the classifier takes them, float [B,C,H,W]."""
    return _tensor([work.image for work in group if work.image is not None])


def kept_images(reader: Reader, group: Sequence[Work]) -> Tensor:
    """The same with removed pixels in the reader's blank colour."""
    x = whole_images(group).to(reader.classifier.device)
    masks = [
        np.ones(x.shape[2:], bool) if work.mask is None else work.mask
        for work in group
        if work.image is not None
    ]
    mask = torch.from_numpy(np.stack(masks)).to(x.device)
    return torch.where(mask[:, None], x, reader.blank)


def summarise(out: str | Path, mode: str) -> dict[str, Any]:
    """Counts and means over all rows stored in ``out``; a mean is None when no row has the figure."""
    names = ("faithfulness", "cpr", "cmd", "inside_drop", "random_drop", "elsewhere", "passes")
    table = read_store(out, ["status", "edges", "size", "universe", *names], CIRCUITS)
    errors = pc.sum(pc.equal(table["status"], "error")).as_py() or 0
    means = {
        "nodes": pc.mean(pc.multiply(table["size"], table["universe"])).as_py(),
        "edges": pc.mean(pc.list_value_length(table["edges"])).as_py(),
        **{name: pc.mean(table[name]).as_py() for name in ("size", *names)},
    }
    rounded = {name: None if value is None else round(value, 4) for name, value in means.items()}
    return {"mode": mode, "rows": table.num_rows, "errors": errors, **rounded}


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


def _prepared(classifier: Classifier, name: str, uri: str, load: Callable[[], Pixels | None]) -> Work:
    try:
        image = load()
        return Work(name, uri, None if image is None else classifier.preprocessing.pixels(image))
    except Exception as error:
        return Work(name, uri, None, error=_text(error))


def _same(image: Pixels | None) -> Pixels | None:
    return image


def _tensor(pixels: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(255)


def _groups(works: Iterator[Work], size: int) -> Iterator[list[Work]]:
    group: list[Work] = []
    for work in works:
        group.append(work)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _read(reader: Reader, group: Sequence[Work]) -> list[Circuit | str]:
    """A circuit or an error for each; when reading throws, the images are tried one by one."""
    good = [work for work in group if work.image is not None]
    found: Iterator[Circuit | str] = iter(_each(reader, good) if good else [])
    return [work.error or "could not be decoded" if work.image is None else next(found) for work in group]


def _each(reader: Reader, group: Sequence[Work]) -> list[Circuit | str]:
    try:
        return list(reader.single(*_inputs(reader, group)))
    except RequestError:
        raise  # no single image is at fault
    except Exception as error:
        if len(group) == 1:
            return [_text(error)]
    return [found for work in group for found in _each(reader, [work])]


def _inputs(reader: Reader, group: Sequence[Work]) -> tuple[Tensor, Tensor]:
    """Images and the class of each: the explained one, else the predicted one."""
    x, label = reader.prepare(kept_images(reader, group))
    given = [
        predicted if work.label is None else work.label
        for work, predicted in zip(group, label.tolist(), strict=True)
    ]
    return x, torch.tensor(given, device=x.device)


def _row(work: Work, found: Circuit | str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": work.id, "uri": work.uri, "truth": work.truth}
    if isinstance(found, str):
        return row | {"status": "error", "error": found}
    test = found.test
    assert test is not None
    row |= {"status": "read", "label": found.label, "label_name": found.label_name, "mode": found.mode}
    row |= {
        "level": found.level,
        "ablation": test.ablation,
        "metric": test.metric,
        "universe": found.universe,
    }
    row |= {"size": found.size, "passes": found.passes, "seconds": found.seconds}
    plain = (
        "full",
        "empty",
        "faithfulness",
        "completeness",
        "inside_drop",
        "outside_drop",
        "elsewhere",
        "cpr",
        "cmd",
    )
    row |= {name: getattr(test, name) for name in plain}
    for name in ("random_faithfulness", "random_drop"):
        interval = getattr(test, name)
        if interval is not None:
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    row |= {"sizes": list(test.sizes), "curve": list(test.curve)}
    return row | {
        "nodes": [asdict(node) for node in found.nodes],
        "edges": [asdict(edge) for edge in found.edges],
    }


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, MinexpError) else f"{type(error).__name__}: {text}")[:500]
