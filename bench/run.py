"""Benchmark suites of this folder: `python bench/run.py explain [--json] [--quiet]`, or `minexp bench explain`.

A suite is a module here with `measure(quiet: bool, **options) -> list[dict]`. Its rows have the columns below, times in
ms, or those that the module names in `COLUMNS`; its options are the keywords of `measure`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "op",
    "provider",
    "mode",
    "shape",
    "threads",
    "p20",
    "p50",
    "p80",
    "bound",
    "ratio",
    "speedup",
    "bandwidth",
)
NOT_SUITES = ("run", "test_kernels", "attributions", "peers_table")
OPTIONS = (
    "images",
    "costly_images",
    "out",
    "variant",
    "peers",
    "seed",
    "model",
    "data",
    "weights",
    "scenes",
    "rows",
)
SUITES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_SUITES))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite and print its rows as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    parser.add_argument("--images", type=int, help="images to explain")
    parser.add_argument("--costly-images", type=int, help="images for explainers that take seconds each")
    parser.add_argument("--out", help="folder for tables and plots")
    parser.add_argument("--variant", help="scenes to compare explainers on")
    parser.add_argument("--scenes", type=int, help="scenes of a job from end to end")
    parser.add_argument("--rows", type=int, help="rows of a synthetic store")
    parser.add_argument("--peers", help="explainers to compare with, separated by commas")
    for name, what in (
        ("model", "model to read circuits of"),
        ("data", "its images"),
        ("weights", "its weights"),
    ):
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--seed", type=int, help="seed of the scenes")
    options = parser.parse_args(argv)
    folder = str(Path(__file__).resolve().parent)
    sys.path[:0] = [] if folder in sys.path else [folder]
    suite = importlib.import_module(options.suite)
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    if unknown := given.keys() - inspect.signature(suite.measure).parameters.keys():
        parser.error(f"{options.suite} has no --{min(unknown)}")
    rows = suite.measure(options.quiet, **given)
    print(json.dumps(rows) if options.json else table(rows, getattr(suite, "COLUMNS", COLUMNS)))
    return 0


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as aligned text; a figure that a suite does not have stays blank."""
    cells = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells
    )


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
