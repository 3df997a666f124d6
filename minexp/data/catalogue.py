"""What a store's directory says is in it: the manifest, which never changes, and the journals, which only grow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError, VerifyError, one_line
from .files import write_text
from .shard import Shard, is_shard
from .table import Table
from .tables import EXPLANATIONS, TABLES

MANIFEST = "manifest.json"
_JOURNAL = "shards{}.jsonl"
_STRAY = re.compile(
    r"\.(?:reserve|shard)-(\d+)-.*"
)  # hidden: a shard being written, or the space held for one


@dataclass(frozen=True)
class Manifest:
    """What a store is about: facts of the job, the number of its positions (None: open), positions a shard."""

    format: str
    run: Mapping[str, Any]
    rows: int | None
    shard_rows: int

    @property
    def table(self) -> Table:
        return TABLES[self.format]

    def write(self, directory: Path) -> None:
        write_text(directory / MANIFEST, json.dumps(vars(self), indent=1) + "\n")


def read_run(directory: str | Path, table: Table = EXPLANATIONS) -> dict[str, Any]:
    """What the job recorded about itself. Raises RequestError when there is no store of that kind."""
    return dict(read_manifest(Path(directory), table).run)


def read_manifest(directory: Path, table: Table | None = None) -> Manifest:
    """Of a store of that kind, or of any.

    Raises RequestError when there is no such store, VerifyError when its manifest is damaged.
    """
    path, wanted = directory / MANIFEST, table or EXPLANATIONS
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] not in TABLES:
            raise RequestError(
                f"{path} is of format {fields['format']!r}: this version reads {', '.join(TABLES)};"
                " start over with --no-resume"
            )
        manifest = Manifest(**fields)
        if not manifest.run["fingerprint"] or manifest.shard_rows < 1:
            raise ValueError("its fields are not those of a manifest")
        if table is not None and manifest.table is not table:
            raise RequestError(
                f"{directory} holds {manifest.table.content}, no {table.content}: give the directory of those"
            )
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(
            f"no {wanted.content} in {directory} ({MANIFEST} is not there):"
            f" write them with {wanted.command} --out {directory}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise VerifyError(f"{path} is damaged: {one_line(error)}") from error


def read_shards(directory: Path) -> list[Shard]:
    """The shards that the journals list, in the source's order. Raises VerifyError for a damaged journal."""
    listed: dict[str, Shard] = {}
    for path in journals(directory):
        content = path.read_bytes()
        # What follows the last line end is an entry that a crash cut short.
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
            try:
                shard = Shard.from_json(line.decode())
            except (ValueError, KeyError, TypeError) as error:
                raise VerifyError(f"{path}: line {number} is damaged: {one_line(error)}") from error
            listed[shard.name] = shard
    return sorted(listed.values(), key=lambda shard: (shard.start, shard.stop))


def journal(directory: Path, part: tuple[int, int]) -> Path:
    """Where the i-th of n processes of a job says which shards it has written."""
    return directory / _JOURNAL.format("" if part[1] == 1 else f".{part[0]}-of-{part[1]}")


def journals(directory: Path) -> list[Path]:
    return sorted(directory.glob(_JOURNAL.format("*")))


def shard_files(directory: Path) -> set[str]:
    """Names of the shards that are there, listed or not."""
    return {entry.name for entry in os.scandir(directory) if is_shard(entry.name)}


def sweep(directory: Path, mine: Callable[[int], bool]) -> None:
    """Remove what killed processes left unfinished of these positions."""
    for entry in os.scandir(directory):
        stray = _STRAY.match(entry.name)
        if stray is not None and mine(int(stray[1])):
            Path(entry).unlink(missing_ok=True)


def clear(directory: Path) -> None:
    """Remove a store's files; the manifest first, so that what a crash leaves of it is not taken for a whole."""
    for path in [
        directory / MANIFEST,
        *journals(directory),
        *(directory / name for name in shard_files(directory)),
    ]:
        path.unlink(missing_ok=True)
