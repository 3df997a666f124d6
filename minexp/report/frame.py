"""What every page is set in: one HTML file that fetches nothing, and its basic style."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

# Nothing but what the file itself holds; a page that makes pictures or modules of its own says so in its `policy`.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(folder: Traversable, *, title: str, policy: str = POLICY, style: str = "", **fields: str) -> str:
    """The HTML of the page in ``folder``: its page.html with the fields filled in, its page.css behind ``style``.

    title: plain text. fields: HTML, or script between its tags.
    """
    frame = resources.files(__package__)
    body = Template(text(folder, "page.html")).substitute(fields, title=escape(title))
    return Template(text(frame, "frame.html")).substitute(
        title=escape(title),
        policy=policy,
        style="\n".join((text(frame, "frame.css"), style, text(folder, "page.css"))),
        body=body,
    )


def text(folder: Traversable, *names: str) -> str:
    """These files of a folder of the package, one after the other."""
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)


def script_json(value: object) -> str:
    """A value as JSON that ends no element. Raises ValueError where a figure is not finite."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
