"""One self-contained HTML page about a store of explanations, and PNG pictures of single ones."""

from .page import Figure, Section, write_report
from .pictures import Panel, write_montage, write_panel

__all__ = ["Figure", "Panel", "Section", "write_montage", "write_panel", "write_report"]
