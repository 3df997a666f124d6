"""Benchmark suites of this folder: `python bench/run.py explain [--json] [--quiet]`, or `minexp bench explain`.

A suite is a module here with `measure(quiet: bool, **options) -> list[dict]`. Its rows have the columns of
`rows.COLUMNS`, times in ms, or those that the module names in `COLUMNS`; its options are the keywords of `measure`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = ("kernels", "explain", "data", "deploy", "mosaic", "peers", "ablation", "circuit", "scale")
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
    from rows import COLUMNS, table

    suite = importlib.import_module(options.suite)
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    if unknown := given.keys() - inspect.signature(suite.measure).parameters.keys():
        parser.error(f"{options.suite} has no --{min(unknown)}")
    rows = suite.measure(options.quiet, **given)
    print(json.dumps(rows) if options.json else table(rows, getattr(suite, "COLUMNS", COLUMNS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
