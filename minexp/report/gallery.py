"""The gallery: which rows are shown, and each as a card of three pictures with its certificate."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.preprocessing import Preprocessing
from ..data.sources import load_uri
from ..data.store import read_rows, unpack_mask
from ..errors import MinexpError
from .pictures import image_uri, mask_uri
from .summary import FAMILIES, Summary

_SIDES = (224, 160, 112, 80)  # pixels of a picture's longer side, tried until the page is small enough
BUDGET = 11_000_000  # characters of all cards: the page stays below 15 MB

VIEWS = {
    "sample": ("Sample", "Drawn at random: what a typical explanation looks like."),
    "largest": ("Largest", "The largest masks: images for which the classifier needs the most."),
    "smallest": ("Smallest", "The smallest masks: the least that was enough."),
    "failures": ("Failures", "Not certified, or the class is lost: these masks explain nothing yet."),
    "mistakes": ("Misclassified", "The class is wrong: the mask shows what misled the classifier."),
    "flagged": ("Flagged", "Rows that a warning above concerns, some of each kind."),
    "outliers": ("Outliers", "Masks that lie where those of their class do not, the oddest first."),
    "twins": (
        "Twins",
        "Images of a class whose masks are nearly the same, side by side: copies, or one trait that decides.",
    ),
    "query": ("Query", "Drawn at random from the rows that your query matches."),
}


@dataclass
class Choice:
    """Positions to show, by view, in the view's order."""

    views: dict[str, list[int]] = field(default_factory=dict)

    @property
    def positions(self) -> list[int]:
        return list(dict.fromkeys(position for chosen in self.views.values() for position in chosen))


def render_gallery(
    directory: Path, summary: Summary, count: int, asked: npt.NDArray[np.int64] | None = None
) -> tuple[Choice, str, int]:
    """What is shown, the cards' HTML, and how many pictures could not be loaded again.

    ``count`` rows a view at most, halved as long as even small pictures are too much for one page. asked: positions of
    a view of their own.
    """
    while True:
        choice = choose(summary, count)
        if asked is not None:
            choice.views = {"query": asked[:count].tolist()} | choice.views
        cards, lost = render_cards(directory, summary, choice)
        if len(cards) <= BUDGET or count == 1:
            return choice, cards, lost
        count //= 2


def choose(summary: Summary, count: int) -> Choice:
    """At most ``count`` rows a view; a view without rows is left out."""
    rng = np.random.default_rng(0)
    area, robust = summary.values["area"], summary.values["robust_train"]
    usable = np.flatnonzero(summary.explained & np.isfinite(area))
    by_area = usable[np.argsort(area[usable], kind="stable")]
    failed = np.flatnonzero(summary.explained & (~summary.certified | (summary.values["kept"] == 0)))
    mistaken = np.flatnonzero(summary.mistaken)
    views = {
        "sample": rng.permutation(usable)[:count],
        "largest": by_area[::-1][:count],
        "smallest": by_area[:count],
        "failures": failed[np.argsort(np.nan_to_num(robust[failed]), kind="stable")][:count],
        "mistakes": rng.permutation(mistaken)[:count],
        "flagged": _taking_turns([rng.permutation(warning.rows) for warning in summary.warnings], count),
        "outliers": summary.survey.outliers[:count],
        "twins": _pairs(summary.survey.twins, count),
    }
    return Choice({view: [int(row) for row in rows] for view, rows in views.items() if len(rows)})


def _pairs(groups: Sequence[npt.NDArray[np.int64]], count: int) -> npt.NDArray[np.int64]:
    """Two of each group, side by side, of as many groups as there is room for."""
    return np.concatenate([group[:2] for group in groups[: count // 2]] or [np.zeros(0, np.int64)])


def _taking_turns(groups: Sequence[npt.NDArray[np.int64]], count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` different entries, one of each group in turn."""
    taken: dict[int, None] = {}
    for rank in range(max((len(group) for group in groups), default=0)):
        for group in groups:
            if len(taken) < count and rank < len(group):
                taken[int(group[rank])] = None
        if len(taken) >= count:
            break
    return np.array(list(taken), dtype=np.int64)


def render_cards(directory: Path, summary: Summary, choice: Choice) -> tuple[str, int]:
    """The cards' HTML, and how many pictures could not be loaded again."""
    positions = choice.positions
    rows = read_rows(directory, positions) if positions else []
    fields = summary.run.get("preprocessing")
    preprocessing = Preprocessing.from_json(fields) if fields else None
    pictures = [_picture(row, preprocessing) for row in rows]
    ranks = {
        view: {position: rank for rank, position in enumerate(chosen)}
        for view, chosen in choice.views.items()
    }
    chips = {warning.key: (warning.chip, set(warning.rows.tolist())) for warning in summary.warnings}
    cards: list[str] = []
    for side in _SIDES:
        cards = [
            _card(
                row,
                picture,
                side,
                {view: rank[position] for view, rank in ranks.items() if position in rank},
                {key: chip for key, (chip, concerned) in chips.items() if position in concerned},
                summary.run.get("class_names") or (),
            )
            for position, row, picture in zip(positions, rows, pictures, strict=True)
        ]
        if sum(map(len, cards)) <= BUDGET:
            break
    return "".join(cards), sum(picture is None for picture in pictures)


def _picture(row: Mapping[str, Any], preprocessing: Preprocessing | None) -> npt.NDArray[np.uint8] | None:
    """The pixels the classifier saw, loaded again; None when they are gone or have another size than the mask."""
    try:
        image = load_uri(row["uri"])
        pixels = image if preprocessing is None else preprocessing.pixels(image)
    except MinexpError:
        return None
    return pixels if pixels.shape[:2] == (row["h"], row["w"]) else None


def _card(
    row: Mapping[str, Any],
    picture: npt.NDArray[np.uint8] | None,
    side: int,
    ranks: Mapping[str, int],
    chips: Mapping[str, str],
    names: Sequence[str],
) -> str:
    name = escape(str(row["label_name"] if row["label_name"] is not None else row["label"]))
    certified = row["status"] == "certified"
    small = " crisp" if max(row["h"] or 0, row["w"] or 0) <= 128 else ""
    frames = _frames(row, picture, side, name)
    badges = f'<span class="badge {"ok" if certified else "no"}">{"certified" if certified else "not certified"}</span>'
    if row["kept"] is False:
        badges += '<span class="badge no">class lost</span>'
    if row["truth"] is not None and row["truth"] != row["label"]:
        badges += f'<span class="badge no">wrong, is {escape(_truth(row, names))}</span>'
    badges += "".join(f'<span class="chip">{escape(chip)}</span>' for chip in chips.values())
    data: dict[str, Any] = {f"rank-{view}": rank for view, rank in ranks.items()}
    data |= {"name": row["label_name"] or row["label"], "id": row["id"], "flags": " ".join(chips)}
    data |= {
        "area": _round(row["area"]),
        "robust": _round(row["robust_heldout"]),
        "conf": _round(row["conf"]),
    }
    attributes = " ".join(f'data-{key}="{escape(str(value))}"' for key, value in data.items())
    details = "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(value)}</dd>" for term, value in _details(row, names)
    )
    return (
        f'<article class="card{small}" tabindex="0" {attributes}'
        f' aria-label="{name}: {_percent(row["area"])} of the pixels">'
        f'<div class="frames">{frames}</div>'
        f'<p class="line"><b>{name}</b> {_line(row)}</p><p class="badges">{badges}</p>'
        f'<p class="id" title="{escape(row["uri"])}">{escape(row["id"])}</p><dl>{details}</dl></article>\n'
    )


def _frames(row: Mapping[str, Any], picture: npt.NDArray[np.uint8] | None, side: int, name: str) -> str:
    if row["mask"] is None:
        return '<div class="frame none">no mask</div>'
    mask = unpack_mask(row["mask"], row["h"], row["w"])
    style = f"--m:url({mask_uri(mask)});--r:{row['w']}/{row['h']}"
    if picture is None:
        return (
            f'<div class="set" style="{style}"><div class="frame none">picture not found again</div>'
            f'<div class="frame mask" role="img" aria-label="mask"></div></div>'
        )
    return (
        f'<div class="set" style="--i:url({image_uri(picture, side)});{style}">'
        f'<div class="frame image" role="img" aria-label="image, classified as {name}"></div>'
        f'<div class="frame mask" role="img" aria-label="mask"></div>'
        f'<div class="frame kept" role="img" aria-label="kept pixels"><i></i></div></div>'
    )


def _line(row: Mapping[str, Any]) -> str:
    parts = [f"{_percent(row['area'])} of the pixels"]
    if row["conf"] is not None and row["conf_masked"] is not None:
        parts.append(f"p {row['conf']:.2f} → {row['conf_masked']:.2f}")
    if row["robust_train"] is not None:
        parts.append(f"robust {row['robust_train']:.2f}")
    if row["robust_heldout"] is not None:
        parts.append(f"held-out {row['robust_heldout']:.2f}")
    return " · ".join(parts)


def _details(row: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """The whole certificate in words; what is null is left out."""

    def robust(family: str) -> str | None:
        if row[f"robust_{family}"] is None:
            return None
        low, high, n = (row.get(f"robust_{family}_{part}") for part in ("low", "high", "n"))
        interval = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
        return f"{row[f'robust_{family}']:.3f}{interval}" + (f" of {n} draws" if n else "")

    def number(key: str, form: str = ".3f") -> str | None:
        return None if row[key] is None else format(row[key], form)

    def yes(key: str) -> str | None:
        return None if row[key] is None else ("yes" if row[key] else "no")

    families = json.loads(row["robust_families"] or "{}")
    pairs = [
        ("predicate", row["predicate"]),
        ("status", row["status"]),
        ("true class", None if row["truth"] is None else _truth(row, names)),
        ("class kept", yes("kept")),
        ("mask area", _percent(row["area"])),
        ("p(class), whole image", number("conf")),
        ("p(class), mask only", number("conf_masked")),
        ("p(class), all but the mask", number("conf_complement")),
        ("p(class), empty image", number("conf_empty")),
        ("robust, training backgrounds", robust("train")),
        ("robust, held-out backgrounds", robust("heldout")),
        ("robust, other images", robust("other")),
        *(
            (f"· over {FAMILIES.get(family, (0, family))[1]}", f"{share:.2f}")
            for family, share in families.items()
        ),
        ("kept when widened by a pixel", yes("dilation_kept")),
        ("connected regions", number("components", "d")),
        ("share on the border", _percent(row["border_share"]) if row["border_share"] is not None else None),
        ("mask threshold", number("threshold")),
        ("minimal at cell size", number("minimal_at", "d")),
        ("classifier evaluations", number("evaluations", "d")),
        ("time", None if row["ms"] is None else f"{row['ms']:.1f} ms"),
        ("uri", row["uri"]),
    ]
    return [(term, str(value)) for term, value in pairs if value not in (None, "")]


def _truth(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return names[row["truth"]] if 0 <= row["truth"] < len(names) else str(row["truth"])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"


def _round(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
