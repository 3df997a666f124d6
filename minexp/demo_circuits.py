"""The demo's circuits: those of a few explanations beside those of their whole images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .circuit.settings import Settings
from .classifier import Classifier
from .jobs import circuits as job
from .jobs.circuit_page import write_circuit_page
from .report import Section

COUNT = 6  # explanations


def circuits(out: Path, classifier: Classifier, reference: Tensor) -> tuple[Path, Section]:
    """The page of a few explanations' circuits beside those of their whole images, and what the report says of it."""
    directory = out / "circuits"
    source = job.explained_source(out / "explanations", classifier, COUNT)
    reader = job.make_reader(classifier, Settings(metric="log_prob"), reference)
    summary = job.circuit_dataset(reader, source, directory, resume=False, progress=False)
    if not (some := job.shown(source, classifier, directory, COUNT)):
        return directory, Section("Circuits", "No circuit could be read.")
    page = write_circuit_page(reader, some, directory / "circuits.html", title="Circuits of scenes")
    text = (
        "Which channels carry these decisions, read from the kept pixels and, beside them, from the whole image; "
        "everything outside a circuit is set to its mean over the scenes."
    )
    figures = ("size", "faithfulness", "elsewhere", "inside_drop", "random_drop")
    table = [
        ["figure, mean", "value"],
        *([name.replace("_", " "), f"{summary[name]:.2f}"] for name in figures if summary[name] is not None),
    ]
    link = ("Open the circuits", page.relative_to(out).as_posix())
    return page, Section("Circuits", text, table=table, link=link)
