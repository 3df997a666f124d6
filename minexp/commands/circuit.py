"""`minexp circuit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import RequestError
from .base import DONE, PARTLY, WithModel, at_least_one, table
from .engine import WithEngine, gpus_here

if TYPE_CHECKING:
    from ..classifier import Classifier
    from ..data.sources import ImageSource


@dataclass(frozen=True, kw_only=True)
class Circuit(WithModel, WithEngine):
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
    metric: Literal["log_prob", "logit", "margin", "contrast"] | None = None
    """The figure a circuit has to keep, by default log_prob; contrast: the logit less that on other classes' images."""
    necessity: float | None = None
    """Mode exact: weight of what is lost without the circuit beside what it keeps, by default 0.02."""
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
    seed: int = 0
    """Seed of random circuits and resampled images."""

    def run(self) -> int:
        from ..circuit.examine import SIZES
        from ..circuit.ranking import NECESSITY
        from ..circuit.settings import Settings
        from ..data.sources import open_source
        from ..jobs import circuits as job
        from ..jobs.circuit_page import write_circuit_page, write_shared_page
        from ..jobs.engine import Placement

        at_least_one("--batch", self.batch)
        if (self.data is None) == (self.explanations is None):
            raise RequestError("give either --data, images, or --explanations, a directory of minexp explain")
        if self.precision != "float32" or self.channels_last or self.compile:
            raise RequestError(
                "circuits are read from the model's operations as written; leave --precision, --channels-last and"
                " --compile out"
            )
        placement = self.placement(0 if self.device == "cpu" else gpus_here())
        if self.together and placement != Placement():
            raise RequestError(
                "a circuit that images share is read in one process; leave --together or the engine out"
            )
        settings = Settings(
            mode=self.mode,
            level=self.level,
            ablation=self.ablation,
            metric=self.metric,
            necessity=NECESSITY if self.necessity is None else self.necessity,
            sizes=self.sizes or SIZES,
            size=self.circuit_size,
            fan_in=self.fan_in,
            controls=self.controls,
            seed=self.seed,
        )
        classifier = self.classifier(None if placement.engine == "local" else "cpu")
        source: ImageSource
        if self.data is not None:
            source = open_source(self.data, limit=self.limit)
        else:
            assert self.explanations is not None
            source = job.explained_source(self.explanations, classifier, self.limit)
        known = source if self.reference is None else open_source(self.reference)
        reader = job.make_reader(classifier, settings, job.sample(known, classifier))
        title, page = f"{type(classifier.model).__name__} on {source.name}", self.out / "circuits.html"
        if self.together:
            circuit, works = job.shared_circuit(reader, source)
            circuit.save(self.out / "circuit.json")
            circuit.save(self.out / "circuit.graphml")
            write_shared_page(reader, circuit, works, page, title=title)
            summary = job.figures(circuit)
        else:
            summary = job.circuit_dataset(
                reader,
                source,
                self.out,
                batch=self.batch,
                resume=self.resume,
                progress=not self.quiet,
                placement=placement,
                load=self.subject,
            )
            if "classes" in summary and (summary["resumed"] < summary["rows"] or not page.is_file()):
                some = job.shown(source, classifier, self.out, self.shown)
                if some:
                    write_circuit_page(reader, some, page, title=title)
                if some and len(source) == 1:
                    some[0][1].save(self.out / "circuit.json")
        if page.is_file():
            summary |= {"page": str(page)}
        self.show(summary, table(summary))
        return PARTLY if summary["errors"] else DONE

    def subject(self, device: str) -> tuple[Classifier, None]:
        """What a worker needs of these options, on its device."""
        return self.classifier(device), None
