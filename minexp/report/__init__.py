"""One self-contained HTML page about a store of explanations, and PNG pictures of single ones."""

from .page import Figure, Section, write_report
from .pictures import Panel, montage, table_of_pictures, write_montage, write_panel

__all__ = [
    "Figure",
    "Panel",
    "Section",
    "montage",
    "table_of_pictures",
    "write_montage",
    "write_panel",
    "write_report",
]
