"""`minexp circuit`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import RequestError
from .base import DONE, PARTLY, WithModel, at_least_one, table


@dataclass(frozen=True, kw_only=True)
class Circuit(WithModel):
    """Read circuits: which channels, heads and neurons carry each decision, tested by ablation."""

    example = "minexp circuit --model torchvision:resnet18 --explanations runs/photos --out runs/circuits"

    data: str | None = None
    """Images: a folder, a glob, one image, a .txt of paths, .npz, .npy, IDX, WebDataset .tar or Parquet."""
    explanations: Path | None = None
    """In place of images, a directory that `minexp explain` wrote: circuits of the kept pixels."""
    out: Path
    """Directory of the Parquet store and the page."""
    mode: Literal["exact", "gradient", "paper"] = "exact"
    """exact: nodes by pruning, edges by ablating their source; gradient: both to first order; paper: as published."""
    level: Literal["layer", "stage"] = "layer"
    """Every layer, or the tapped stages alone."""
    ablation: Literal["mean", "zero", "resample", "blank"] | None = None
    """What units outside a circuit become; by default their mean over reference images, or with one image blank."""
    metric: Literal["contrast", "logit", "margin", "log_prob"] | None = None
    """The figure a circuit has to keep; contrast: the class's logit less that on images of other classes (default)."""
    sizes: tuple[float, ...] = ()
    """Shares of the nodes to test, in place of 0.001 to 1."""
    circuit_size: float | None = None
    """Share of the nodes in each circuit; by default the smallest of the sizes that keeps 0.8 of the score."""
    fan_in: int = 4
    """Edges kept into each unit."""
    controls: int = 20
    """Random circuits of the same size for comparison."""
    reference: str | None = None
    """Images for mean and resample ablation and for the page's crops; by default some of the data."""
    together: bool = False
    """One circuit that all images share, in place of one for each."""
    shown: int = 12
    """Images on the page."""
    batch: int = 16
    """Images at once; no effect on the answers."""
    limit: int | None = None
    """Only the first images."""
    seed: int = 0
    """Seed of random circuits and resampled images."""
    resume: bool = True
    """Start over instead of going on behind the last stored row."""

    def run(self) -> int:
        from ..circuit.examine import SIZES
        from ..circuit.settings import Settings
        from ..data.sources import open_source
        from ..jobs import circuits as job
        from ..jobs.circuit_page import write_circuit_page, write_shared_page

        at_least_one("--batch", self.batch)
        if (self.data is None) == (self.explanations is None):
            raise RequestError("give either --data, images, or --explanations, a directory of minexp explain")
        settings = Settings(
            mode=self.mode,
            level=self.level,
            ablation=self.ablation,
            metric=self.metric,
            sizes=self.sizes or SIZES,
            size=self.circuit_size,
            fan_in=self.fan_in,
            controls=self.controls,
            seed=self.seed,
        )
        source = None if self.data is None else open_source(self.data, limit=self.limit)
        classifier = self.classifier()
        if source is not None:
            inputs = job.inputs_of_source(source, classifier)
        else:
            assert self.explanations is not None
            inputs = job.inputs_of_explanations(self.explanations, classifier, self.limit)
        wanted = inputs
        if self.reference is not None:
            wanted = job.inputs_of_source(open_source(self.reference), classifier)
        reader = job.make_reader(classifier, settings, job.sample(wanted))
        title, page = f"{type(classifier.model).__name__} on {inputs.name}", self.out / "circuits.html"
        if self.together:
            circuit, works = job.shared_circuit(reader, inputs)
            circuit.save(self.out / "circuit.json")
            circuit.save(self.out / "circuit.graphml")
            write_shared_page(reader, circuit, works, page, title=title)
            summary = job.figures(circuit)
        else:
            summary, some = job.circuit_dataset(
                reader,
                inputs,
                self.out,
                batch=self.batch,
                resume=self.resume,
                progress=not self.quiet and sys.stderr.isatty(),
                shown=self.shown,
            )
            if some:
                write_circuit_page(reader, some, page, title=title)
            if some and inputs.count == 1:
                some[0][1].save(self.out / "circuit.json")
        if page.is_file():
            summary |= {"page": str(page)}
        self.show(summary, table(summary))
        return PARTLY if summary["errors"] else DONE
