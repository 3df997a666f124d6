"""`minexp report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from .base import DONE, Command, at_least_one


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write the report of a store: one self-contained HTML page."""

    example = "minexp report runs/photos"

    directory: Positional[Path]
    """Directory that `minexp explain` wrote."""
    out: Path | None = None
    """The page, in place of report.html in the directory."""
    gallery: int = 48
    """Images in each view of the gallery."""
    query: str | None = None
    """A condition in SQL over the store's columns, such as "label_name = 'cat' and area > 0.3": its rows get a view of
    their own (pip install 'minexp[report]')."""

    def run(self) -> int:
        from ..report import write_report

        at_least_one("--gallery", self.gallery)
        page = write_report(self.directory, out=self.out, gallery=self.gallery, query=self.query)
        self.show({"report": str(page)}, str(page))
        return DONE
