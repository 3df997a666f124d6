"""A job of circuits of a small network. `python circuit_job.py DATA OUT [OPTIONS as JSON]`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faults import Chaos
from torch import Tensor
from torch.nn.modules.batchnorm import BatchNorm2d

from minexp.circuit.settings import Settings
from minexp.classifier import Classifier
from minexp.data.explained import ExplainedSource
from minexp.data.sources import ImageSource, open_source
from minexp.data.store import read_store
from minexp.data.subjects import SceneNet
from minexp.data.tables import CIRCUITS
from minexp.jobs import circuits as job
from minexp.jobs.engine import Placement
from minexp.targets import Target

QUICK: dict[str, Any] = {"metric": "log_prob", "sizes": (0.1, 0.5, 1.0), "controls": 2, "members": 2}
NOT_SAME = ["seconds", "passes"]  # what reading took, of which images share some


class Doubles(SceneNet):
    """In float64, where which images are read together cannot turn a rank."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).float()


def network(seed: int = 9, size: int = 16) -> Classifier:
    torch.manual_seed(seed)
    model = Doubles(5, (4, 6, 6, 8)).eval()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.05, 0.15)  # type: ignore[union-attr, operator]
    return Classifier(model.double(), size=size, mean=(0.5,) * 3, std=(0.25,) * 3)


class Troubled(Target):
    """The most probable class, found while processes are being killed."""

    chaos: Chaos

    def key(self) -> str:
        return Target().key()

    def label(self, scores: Tensor) -> Tensor:
        self.chaos.batch()
        return super().label(scores)


@dataclass(frozen=True)
class Loaded:
    """Loads the network in a worker."""

    chaos: Chaos | None = None

    def __call__(self, device: str) -> tuple[Classifier, None]:
        torch.set_num_threads(1)
        classifier = network()
        if self.chaos is not None:
            classifier.target = Troubled()
            object.__setattr__(classifier.target, "chaos", self.chaos)
        return classifier, None


def run(source: ImageSource, out: Path, *, batch: int = 4, **options: Any) -> dict[str, Any]:
    classifier = network()
    load = Loaded(Chaos(*options.pop("chaos")) if "chaos" in options else None)
    settings = Settings(**QUICK, level=options.pop("level", "layer"))
    reader = job.make_reader(classifier, settings, job.sample(source, classifier))
    return job.circuit_dataset(
        reader, source, out, batch=batch, progress=False, placement=Placement(**options), load=load
    )


def opened(data: Path) -> ImageSource:
    return ExplainedSource(data) if data.is_dir() else open_source(data)


def rows(out: Path) -> Any:
    """What has to be the same whoever reads it."""
    return read_store(out, table=CIRCUITS).drop_columns(NOT_SAME)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(opened(Path(sys.argv[1])), Path(sys.argv[2]), **json.loads(sys.argv[3]))))
