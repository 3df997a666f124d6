"""`minexp verify`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from .base import DAMAGED, DONE, Command


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check a store: digests, page checksums, masks, counts, duplicates."""

    example = "minexp verify runs/photos"

    directory: Positional[Path]
    """Directory that `minexp explain` wrote."""

    def run(self) -> int:
        from ..data.store import MANIFEST, verify_store

        problems = verify_store(self.directory)
        manifest = json.loads((self.directory / MANIFEST).read_text(encoding="utf-8"))
        summary = {**verdict(problems, manifest["shards"]), "problems": problems}
        text = "\n".join([*problems, f"{summary['ok']} of {summary['rows']} rows verify"])
        self.show(summary, text)
        return DAMAGED if problems else DONE


def verdict(problems: Sequence[str], shards: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts of rows: a problem of a shard as a whole makes all of its rows bad."""
    rows = sum(shard["rows"] for shard in shards)
    duplicates = sum(problem.startswith("id ") for problem in problems)
    damaged = {problem.partition(":")[0] for problem in problems if not re.match(r"(\S+: )?id ", problem)}
    bad = sum(shard["rows"] for shard in shards if shard["name"] in damaged)
    single = {match.groups() for problem in problems if (match := re.match(r"(\S+): id ('.*?'): ", problem))}
    bad += sum(shard not in damaged for shard, _ in single)
    return {"rows": rows, "ok": max(0, rows - bad - duplicates), "bad": bad, "duplicates": duplicates}
