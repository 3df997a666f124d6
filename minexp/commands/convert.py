"""`minexp convert`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .base import DONE, Command, table


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Write a store's masks as COCO JSON, PNG files or a Hugging Face data set."""

    example = "minexp convert runs/photos --to coco --out masks.json"

    directory: Positional[Path]
    """Directory that `minexp explain` wrote."""
    to: Literal["coco", "png", "huggingface"]
    """coco: run lengths in one JSON file; png: a file an image; huggingface: Parquet that load_dataset reads, with
    the model's input beside each mask."""
    out: Path
    """The JSON file, or the directory of the others."""

    def run(self) -> int:
        from ..data.convert import convert

        summary = asdict(convert(self.directory, self.out, self.to, progress=not self.quiet))
        self.show(summary, table(summary))
        return DONE
