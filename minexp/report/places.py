"""The page's part about where masks lie: mean masks by class, copies, and odd ones out."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from .summary import ClassLine, Summary
from .survey import ClassMap, Floats

SHOWN = 24  # classes with a large map
THUMBS = 2000  # classes with a small one in the table: about 1 kB each


def map_uri(mean: Floats) -> str:
    """A data URI of a mean mask [h, w] as opacity, its largest value opaque, for CSS to colour."""
    alpha = (mean / max(float(mean.max()), 1e-9) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([np.zeros_like(alpha), alpha], axis=2), "LA").save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def places(summary: Summary) -> str:
    """The section, or nothing where there are no masks."""
    survey = summary.survey
    lines = [line for line in summary.classes if line.label in survey.classes]
    if not lines:
        return ""
    # alarms first, then the classes with the most images
    lines.sort(key=lambda line: (survey.classes[line.label].alarm is None, -line.count, line.name))
    maps = "".join(_figure(line, survey.classes[line.label]) for line in lines[:SHOWN])
    more = (
        f" The {SHOWN} of {len(lines)} classes with an alarm or the most images."
        if len(lines) > SHOWN
        else ""
    )
    return (
        '<section id="places"><h2>Where the evidence lies</h2><p class="explain">Mean masks: the stronger a cell, the'
        " more images of the class keep it. Evidence that always lies in one corner or along the border is seldom the"
        f' object.{more}</p><div class="maps">{maps}</div>{_twins(summary)}{_outliers(summary)}</section>'
    )


def thumb(place: ClassMap | None) -> str:
    """The cell of a class in the table of classes; it sorts by how much of the evidence is in the corners."""
    if place is None:
        return '<td data-v="-1"></td>'
    mark = " alarm" if place.alarm else ""
    title = escape(place.alarm or f"{place.corners * 100:.0f} % of its evidence lies in the corners")
    return (
        f'<td data-v="{place.corners:.4f}" title="{title}"><i class="map{mark}"'
        f' style="--at:url({map_uri(place.mean)})"></i></td>'
    )


def _figure(line: ClassLine, place: ClassMap) -> str:
    h, w = place.mean.shape
    alarm = (
        f'<p class="badges"><span class="badge no">{escape(place.alarm)}</span></p>' if place.alarm else ""
    )
    name = escape(line.name)
    return (
        f'<figure><i class="map" role="img" aria-label="mean mask of {name}" style="--r:{w}/{h};'
        f'--at:url({map_uri(place.mean)})"></i><figcaption><b>{name}</b> {line.count:,} images, at most'
        f" {place.mean.max():.0%} keep the same cell{alarm}</figcaption></figure>"
    )


def _twins(summary: Summary) -> str:
    groups = summary.survey.twins
    if not groups:
        return ""
    rows = sum(map(len, groups))
    largest = groups[0]
    label = summary.values["label"][largest[0]]
    name = next((line.name for line in summary.classes if line.label == label), str(label))
    return (
        f'<p class="explain"><b>{rows:,} images</b> have nearly the same mask as another one of their class, in'
        f" {len(groups):,} groups; the largest has {len(largest):,} images of {escape(name)}. They are copies of each"
        ' other, or one trait in one place decides them all. <button type="button" class="link" data-show="twins">'
        "show some</button></p>"
    )


def _outliers(summary: Summary) -> str:
    odd = summary.survey.outliers
    if not len(odd):
        return ""
    return (
        f'<p class="explain"><b>{len(odd):,} images</b> have their mask where the others of their class have none:'
        " unusual views, wrong labels, or another reason for the same answer."
        ' <button type="button" class="link" data-show="outliers">show some</button></p>'
    )
