"""What the circuits of each class have in common, from a whole store of them, shard by shard. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..circuit.circuit import SCORE
from ..data.catalogue import read_manifest, read_shards
from ..data.files import replacing
from ..data.nested import unnest
from ..data.store import iter_store
from ..data.tables import CIRCUITS

CORE = 0.5  # share of a class's circuits that a node or an edge is in, to be told
FIGURES = ("size", "faithfulness", "cpr", "cmd", "inside_drop", "random_drop", "elsewhere")
_FILE = Path("classes") / "classes.parquet"  # not beside the shards, whose readers take *.parquet
_NODE = ("label", "layer", "unit")
_EDGE = ("label", "source_layer", "source", "target_layer", "target")
_WAITING = 32  # shards whose sums are put together at a time


def is_complete(directory: str | Path) -> bool:
    """Are all rows of a store's job there?"""
    rows = sum(shard.rows for shard in read_shards(Path(directory)))
    return read_manifest(Path(directory), CIRCUITS).rows == rows


def write_classes(directory: Path) -> Path:
    """Write what the circuits of each class share, unless it is there: one row a class, the most frequent first.

    `label`, `label_name`; `circuits`, how many; means of `FIGURES`; `nodes`, those in at least half of the circuits,
    the most frequent first, with the `share` of circuits they are in and mean `rank` (-1: a residual stream's unit),
    `score` and `effect`; `edges` between those, in at least half as well, with `share` and mean `effect`; `jaccard`,
    the mean overlap |A∩B|/|A∪B| of a circuit's nodes A with these nodes B. It takes the memory of a shard and of the
    distinct nodes and edges of the classes.
    """
    path = directory / _FILE
    listed = "".join(shard.sha256 for shard in read_shards(directory))
    about = {"minexp.share": str(CORE), "minexp.circuits": hashlib.sha256(listed.encode()).hexdigest()}
    if path.is_file() and _metadata(path) == about:
        return path
    table = aggregate(directory)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(about), temporary, write_page_checksum=True)
    return path


def aggregate(directory: Path) -> pa.Table:
    """What `write_classes` writes."""
    keys = ("label", "label_name")
    classes = _total(
        (_sums(rows, keys, FIGURES) for rows in _read(directory, *keys, *FIGURES)), keys, FIGURES
    )
    classes = classes.rename_columns({"n": "circuits"}).sort_by("label")

    def frequent(parts: Iterable[pa.Table], keys: Sequence[str], means: Sequence[str]) -> pa.Table:
        total = _total(parts, keys, means).join(
            classes.select(["label", "circuits"]), "label", use_threads=False
        )
        share = pc.divide(total["n"].cast(pa.float64()), total["circuits"])
        total = total.drop_columns(["n", "circuits"]).append_column("share", share)
        return total.filter(pc.greater_equal(total["share"], CORE))

    means = ("rank", "score", "effect")
    flat = (unnest(rows, "nodes", "label") for rows in _read(directory, "label", "nodes"))
    nodes = frequent((_sums(part, _NODE, means) for part in flat), _NODE, means)
    flat = (_among(unnest(rows, "edges", "label"), nodes) for rows in _read(directory, "label", "edges"))
    edges = frequent((_sums(part, _EDGE, ("effect",)) for part in flat), _EDGE, ("effect",))
    order = [("label", "ascending"), ("share", "descending")]
    nodes = nodes.sort_by([*order, ("rank", "ascending"), ("layer", "ascending"), ("unit", "ascending")])
    edges = edges.sort_by([*order, *((name, "ascending") for name in _EDGE[1:])])
    labels = classes["label"].to_numpy()
    table = classes.append_column("jaccard", pa.array(_overlaps(directory, nodes, labels), pa.float64()))
    table = table.append_column("nodes", _listed(nodes, labels)).append_column(
        "edges", _listed(edges, labels)
    )
    return table.sort_by([("circuits", "descending"), ("label", "ascending")])


def _read(directory: Path, *columns: str) -> Iterator[pa.Table]:
    """These columns of the circuits, shard by shard, without the rows that have none."""
    for rows in iter_store(directory, ["status", *columns], CIRCUITS):
        yield rows.filter(pc.equal(rows["status"], "read")).drop_columns(["status"])


def _sums(rows: pa.Table, keys: Sequence[str], means: Sequence[str]) -> pa.Table:
    """By key: `n`, how many rows, and of every column for a mean its sum and count."""
    doubles = pa.table(
        [*(rows[key] for key in keys), *(rows[name].cast(pa.float64()) for name in means)], [*keys, *means]
    )
    wanted = [([], "count_all"), *((name, how) for name in means for how in ("sum", "count"))]
    return (
        doubles.group_by(list(keys), use_threads=False).aggregate(wanted).rename_columns({"count_all": "n"})
    )


def _total(parts: Iterable[pa.Table], keys: Sequence[str], means: Sequence[str]) -> pa.Table:
    """Parts of `_sums` as one, with means in place of sums."""
    waiting: list[pa.Table] = []
    names = ["n", *(f"{name}_{how}" for name in means for how in ("sum", "count"))]

    def together() -> list[pa.Table]:
        groups = pa.concat_tables(waiting).group_by(list(keys), use_threads=False)
        found = groups.aggregate([(name, "sum") for name in names])
        return [found.rename_columns({f"{name}_sum": name for name in names})]

    for part in parts:
        waiting.append(part)
        if len(waiting) > _WAITING:
            waiting = together()
    (total,) = together()
    for name in means:
        count = total[f"{name}_count"]
        known = pc.if_else(pc.equal(count, 0), None, count)  # a mean of nothing is null
        total = total.append_column(name, pc.divide(total[f"{name}_sum"], known.cast(pa.float64())))
    return total.select([*keys, "n", *means])


def _among(edges: pa.Table, nodes: pa.Table) -> pa.Table:
    """The edges whose ends are both among a class's nodes, or are its score."""
    known, (label, *ends) = nodes.select(list(_NODE)), _EDGE
    edges = edges.join(known, [label, *ends[:2]], list(_NODE), "left semi", use_threads=False)
    to_score = pc.equal(edges["target_layer"], SCORE)
    others = edges.filter(pc.invert(to_score))
    others = others.join(known, [label, *ends[2:]], list(_NODE), "left semi", use_threads=False)
    return pa.concat_tables([edges.filter(to_score), others])


def _overlaps(directory: Path, nodes: pa.Table, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """For each class, the mean Jaccard index of its circuits' nodes with these."""
    core = nodes.filter(pc.greater_equal(nodes["rank"], 0)).select(list(_NODE))
    sizes = np.bincount(np.searchsorted(labels, core["label"].to_numpy()), minlength=len(labels))
    total, count = np.zeros(len(labels)), np.zeros(len(labels))
    for rows in _read(directory, "label", "nodes"):
        own = unnest(rows, "nodes", "label")
        own = own.filter(pc.greater_equal(own["rank"], 0))
        both = own.join(core, list(_NODE), join_type="left semi", use_threads=False)
        mine, inside = (np.bincount(part["row"].to_numpy(), minlength=len(rows)) for part in (own, both))
        places = np.searchsorted(labels, rows["label"].to_numpy())
        np.add.at(total, places, inside / np.maximum(1, mine + sizes[places] - inside))
        np.add.at(count, places, 1)
    return total / np.maximum(1, count)


def _listed(rows: pa.Table, labels: npt.NDArray[np.int32]) -> pa.Array:
    """Rows sorted by label as a list of structs for each of the labels."""
    starts = np.searchsorted(rows["label"].to_numpy(), [*labels, np.iinfo(np.int32).max])
    fields = rows.drop_columns(["label"]).combine_chunks()
    structs = pa.StructArray.from_arrays(
        [fields[name].combine_chunks() for name in fields.column_names], fields.column_names
    )
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), structs)


def _metadata(path: Path) -> dict[str, str]:
    found = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in found.items() if key.startswith(b"minexp.")}
