"""The page: one HTML file that needs nothing else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from ..data.files import write_text
from ..data.store import read_rows, read_store
from ..errors import RequestError
from . import charts
from .frame import document, text
from .gallery import VIEWS, render_gallery
from .intervals import Estimate
from .pictures import Pixels, file_uri, image_uri
from .places import THUMBS, places, thumb
from .query import Query, ask
from .summary import FAMILIES, ClassLine, Summary, summarise

_ERRORS_SHOWN = 200


@dataclass(frozen=True, eq=False)
class Figure:
    """A picture for a section: a PNG, JPEG or WEBP file, or pixels uint8 [h, w, 1 or 3]."""

    picture: Path | Pixels
    caption: str


@dataclass(frozen=True)
class Section:
    """An own part of the page. Text is plain, paragraphs apart by an empty line; the table's first row is its head.

    link: the text of a link and its address, relative to the page.
    """

    title: str
    text: str
    figures: Sequence[Figure] = ()
    table: Sequence[Sequence[str]] = ()
    link: tuple[str, str] | None = None


def write_report(
    directory: str | Path,
    *,
    out: str | Path | None = None,
    gallery: int = 48,
    sections: Sequence[Section] = (),
    query: str | None = None,
) -> Path:
    """Write the report of a store to ``out`` (DIR/report.html) and return its path.

    gallery: rows shown in each view. query: a condition in SQL over the store's columns, whose rows get a view.
    Raises RequestError when there is no store, it holds no rows, or the query cannot be answered.
    """
    directory = Path(directory)
    if gallery < 1:
        raise RequestError(f"the gallery is {gallery}: give at least 1")
    summary = summarise(directory)
    if not summary.rows:
        raise RequestError(f"{directory} holds no rows yet: run minexp explain --out {directory} first")
    answer = None if query is None else ask(directory, query, gallery)
    choice, cards, lost = render_gallery(
        directory, summary, gallery, None if answer is None else answer.sample
    )
    parts = resources.files(__package__)
    page = document(
        parts,
        title=_title(summary),
        script=text(parts, "page.js"),
        headline=_headline(summary),
        facts=_facts(summary),
        tiles=_tiles(summary),
        warnings=_warnings(summary),
        histogram=charts.histogram(summary.values["area"][summary.explained]),
        scatter=charts.scatter(
            summary.values["area"], summary.values["robust_heldout"], summary.certified & summary.explained
        ),
        families=charts.bars(_families(summary)),
        places=places(summary),
        classes=_classes(summary),
        sections="".join(map(_section, sections)),
        views=_views(choice.views, answer),
        class_options=_class_options(summary.classes),
        cards=cards,
        lost=f'<p class="note">{lost} pictures could not be loaded again: only their masks are shown.</p>'
        if lost
        else "",
        errors=_errors(directory, summary),
        run=_run(summary),
    )
    path = Path(out) if out is not None else directory / "report.html"
    write_text(path, page)
    return path


def _title(summary: Summary) -> str:
    model, data = summary.run.get("model"), summary.run.get("source_name")
    return " on ".join(str(part) for part in (model, data) if part) or "Explanations"


def _headline(summary: Summary) -> str:
    area, kept = summary.mean("area"), summary.mean("kept")
    if area is None or kept is None:
        return "No image could be explained."
    return (
        f"Shown only <em>{_percent(area.mean)}</em> of an image’s pixels on average,"
        f" the classifier keeps its answer for <em>{_percent(kept.mean)}</em> of the images."
    )


def _facts(summary: Summary) -> str:
    explained = int(summary.explained.sum())
    facts = [f"{summary.rows:,} images", f"{int(summary.certified.sum()):,} certified"]
    if explained - int(summary.certified.sum()):
        facts.append(f"{explained - int(summary.certified.sum()):,} not certified")
    if summary.error.any():
        facts.append(f"{int(summary.error.sum()):,} with errors")
    return " · ".join(facts)


def _tiles(summary: Summary) -> str:
    tiles = [
        ("Mask area", summary.mean("area"), "of the pixels are enough; smaller says more", "share"),
        (
            "Certified",
            summary.share(summary.certified),
            "of the explained images satisfy the predicate",
            "share",
        ),
        ("Class kept", summary.mean("kept"), "of the masks alone give the same class", "share"),
        ("Robust", summary.mean("robust_train"), "of random backgrounds leave the class unchanged", "share"),
        (
            "Robust, held out",
            summary.mean("robust_heldout"),
            "the same on kinds of background never used",
            "share",
        ),
        (
            "Over other images",
            summary.mean("robust_other"),
            "the same on whole other images, which bring rivals",
            "share",
        ),
        (
            "p(class | empty)",
            summary.mean("conf_empty"),
            "probability with every pixel removed; high is bad",
            "share",
        ),
        (
            "p(class | rest)",
            summary.mean("conf_complement"),
            "probability from all but the mask; low: it was needed",
            "share",
        ),
        (
            "Classified right",
            summary.share(summary.right) if summary.truth_known else None,
            "of the images, whatever the mask",
            "share",
        ),
        (
            "Evaluations",
            summary.mean("evaluations", (0, float("inf"))),
            "classifier passes spent on an image",
            "count",
        ),
    ]
    return "".join(_tile(*tile) for tile in tiles if tile[1] is not None)


def _tile(name: str, estimate: Estimate | None, meaning: str, kind: str) -> str:
    if estimate is None:
        return ""
    show = _percent if kind == "share" else _count
    interval = "one image"
    if estimate.low is not None and estimate.high is not None:
        interval = f"95 % CI {show(estimate.low).removesuffix(' %')} – {show(estimate.high)}"
    return (
        f'<div class="tile"><h3>{escape(name)}</h3><p class="figure">{show(estimate.mean)}</p>'
        f'<p class="interval">{interval}</p><p class="meaning">{escape(meaning)}</p></div>'
    )


def _warnings(summary: Summary) -> str:
    explained = int(summary.explained.sum())
    area = summary.mean("area")
    lines = []
    if area is not None and area.mean > 0.3:
        lines.append(
            '<li class="warning"><b>Large masks.</b> On average the masks cover'
            f" {_percent(area.mean)} of the image. A brittle classifier has no small robust explanation: before blaming"
            " the masks, train it with noise and random erasing.</li>"
        )
    for warning in sorted(summary.warnings, key=lambda warning: -len(warning.rows)):
        share = len(warning.rows) / explained
        lines.append(
            f'<li class="warning"><b>{_percent(share)} · {escape(warning.chip)}</b>'
            f" ({len(warning.rows):,} of {explained:,} images). {escape(warning.text)}"
            f' <button type="button" class="link" data-flag="{warning.key}">show some</button></li>'
        )
    if not lines:
        return '<p class="calm">None of the known warning signs was found.</p>'
    return f"<ul>{''.join(lines)}</ul>"


def _families(summary: Summary) -> list[tuple[str, str, Estimate]]:
    known = {family: estimate for family, estimate in summary.families if family in FAMILIES}
    rest = [("more", family, estimate) for family, estimate in summary.families if family not in FAMILIES]
    return [(*FAMILIES[family], known[family]) for family in FAMILIES if family in known] + rest


def _classes(summary: Summary) -> str:
    lines = summary.classes
    known = any(line.correct is not None for line in lines)
    heads = ["Class", "Where", "Images", *(["Correct"] if known else []), "Mask area"]
    heads += ["Kept", "Robust", "Held out", "Not certified"]
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in heads)
    body = []
    top = max((line.area.mean for line in lines), default=1.0) or 1.0
    for number, line in enumerate(lines):
        half = "" if line.area.high is None else f" ±&nbsp;{(line.area.high - line.area.mean) * 100:.1f}"
        cells = [
            f'<th scope="row" data-v="{escape(line.name)}">{escape(line.name)}</th>',
            thumb(summary.survey.classes.get(line.label) if number < THUMBS else None),
            f'<td data-v="{line.count}">{line.count:,}</td>',
        ]
        if known:
            cells.append(_cell(line.correct))
        cells.append(
            f'<td data-v="{line.area.mean}" class="meter" style="--p:{line.area.mean / top * 100:.0f}%">'
            f"{_percent(line.area.mean)}<small>{half}</small></td>"
        )
        cells += map(_cell, (line.kept, line.robust_train, line.robust_heldout, line.failed))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _cell(share: float | None) -> str:
    if share is None or not np.isfinite(share):
        return '<td data-v="-1">–</td>'
    return f'<td data-v="{share}">{_percent(share)}</td>'


def _views(views: dict[str, list[int]], answer: Query | None) -> str:
    about = {view: text for view, (_, text) in VIEWS.items()}
    if answer is not None:
        about["query"] = f"Drawn at random from the {answer.matches:,} rows where {answer.condition}."
    return "".join(
        f'<button type="button" role="tab" data-view="{view}" data-about="{escape(about[view])}"'
        f' aria-selected="false">{VIEWS[view][0]} <span>{len(chosen)}</span></button>'
        for view, chosen in views.items()
    )


def _class_options(lines: Iterable[ClassLine]) -> str:
    names = sorted({line.name for line in lines})
    return "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)


def _section(section: Section) -> str:
    paragraphs = "".join(
        f"<p>{escape(part.strip())}</p>" for part in section.text.split("\n\n") if part.strip()
    )
    if section.link is not None:
        text, address = map(escape, section.link)
        paragraphs += f'<p><a href="{address}">{text}</a></p>'
    figures = []
    for figure in section.figures:
        shown = figure.picture
        uri = image_uri(shown, 1200) if isinstance(shown, np.ndarray) else file_uri(shown, 1200)
        caption = escape(figure.caption)
        figures.append(
            f'<figure><img src="{uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        )
    table = ""
    if section.table:
        head, *body = section.table
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        table = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return (
        f'<section class="own"><h2>{escape(section.title)}</h2><div class="prose">{paragraphs}</div>{table}'
        f'<div class="figures">{"".join(figures)}</div></section>'
    )


def _errors(directory: Path, summary: Summary) -> str:
    if not summary.error.any():
        return ""
    status = read_store(directory, ["status"])["status"]
    positions = np.flatnonzero(np.asarray(pc.equal(status, "error")))
    rows = read_rows(directory, [int(position) for position in positions[:_ERRORS_SHOWN]])
    kinds = "".join(f"<li><b>{count:,}</b> × {escape(kind)}</li>" for kind, count in summary.error_kinds)
    lines = "".join(
        f'<tr><th scope="row">{escape(row["id"])}</th><td>{escape(row["error"] or "")}</td></tr>'
        for row in rows
    )
    more = (
        f"<p class='note'>The first {len(rows):,} of {len(positions):,}.</p>"
        if len(positions) > len(rows)
        else ""
    )
    return (
        f'<section id="errors"><h2>Errors</h2><p class="explain">{len(positions):,} inputs could not be explained.'
        f" They are rows of the store too, so that nothing is lost in silence.</p><ul class='kinds'>{kinds}</ul>"
        "<details><summary>Every input with its error</summary>"
        f'<div class="wide"><table><tbody>{lines}</tbody></table></div>{more}</details></section>'
    )


def _run(summary: Summary) -> str:
    lines = []
    for key, value in summary.run.items():
        if key == "class_names" or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items())
        lines.append(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>")
    return "".join(lines)


def _percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def _count(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
