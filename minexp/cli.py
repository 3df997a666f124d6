"""The command line: each command is a dataclass whose fields are its options and whose `run` does it.

torch and everything that needs it is imported inside `run`, so that help and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro
from tyro.conf import Positional

from . import __version__
from .errors import MinexpError, RequestError

DONE, REQUEST, PARTLY, DAMAGED, INTERRUPTED, TERMINATED = 0, 2, 3, 4, 130, 143


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command takes."""

    example: ClassVar[str]

    quiet: bool = False
    """No progress bar and no summary."""
    json: bool = False
    """Print one machine-readable summary on stdout."""

    def run(self) -> int:
        """Do it; the exit code."""
        raise SystemExit(REQUEST)

    def show(self, summary: Any, text: str) -> None:
        """The summary as JSON, or the text for a reader, on stdout."""
        if self.json:
            print(json.dumps(summary))
        elif not self.quiet:
            print(text)


@dataclass(frozen=True, kw_only=True)
class WithModel(Command):
    """A command about a classifier."""

    model: str
    """The classifier: torchvision:NAME, timm:NAME, hf:PATH_OR_ID, package.module:factory or file.py:factory."""
    weights: Path | None = None
    """Its weights, .safetensors or .pth, in place of the source's own."""
    num_classes: int | None = None
    """Number of outputs, where it is not the model's usual one."""
    class_names: Path | None = None
    """Text file with one class name a line."""
    size: tuple[int, ...] = ()
    """Input size in pixels: one side, or height and width."""
    mean: tuple[float, ...] = ()
    """Normalisation, one value a channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = ()
    """Normalisation, one value a channel."""
    taps: tuple[str, ...] = ()
    """Layers whose activations are matched, in place of the end of each stage."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    trust_model: bool = False
    """Load a .pt2 model although that runs code in it."""

    def classifier(self) -> Any:
        """The Classifier these options describe."""
        import torch

        from .classifier import load_classifier

        if len(self.size) > 2:
            raise RequestError(f"--size takes one side, or height and width, not {len(self.size)} numbers")
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return load_classifier(
            self.model,
            weights=self.weights,
            num_classes=self.num_classes,
            mean=self.mean or None,
            std=self.std or None,
            size=(self.size[0], self.size[-1]) if self.size else None,
            class_names=None if self.class_names is None else _lines(self.class_names),
            taps=self.taps or None,
            device=auto if self.device == "auto" else self.device,
            trust_model=self.trust_model,
        )


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Built-in scenes, end to end: train a classifier, fit a masker, explain, certify, report."""

    example = "minexp demo --out out/demo"

    out: Path = Path("out/demo")
    """Directory for everything that is made; a second run goes on from what is there."""
    variant: Literal["plain", "shortcut", "mosaic", "segments"] = "plain"
    """plain; shortcut: a corner patch gives the class away; mosaic: one tile of 3×3 decides; segments: likewise."""
    images: int = 1000
    """Held-out scenes to explain."""
    scenes: int = 12_000
    """Scenes to train the classifier on."""
    steps: int = 1200
    """Training steps of the masker."""
    augment: bool = True
    """Train the classifier without noise and erased regions: a brittle subject, whose masks have to be large."""
    seed: int = 0
    """Seed of everything random."""

    def run(self) -> int:
        from . import demo

        summary = demo.run(
            self.out,
            variant=self.variant,
            images=self.images,
            scenes=self.scenes,
            steps=self.steps,
            augmented=self.augment,
            seed=self.seed,
            quiet=self.quiet or self.json,
        )
        if self.json:
            print(json.dumps(summary))
        return DONE


@dataclass(frozen=True, kw_only=True)
class Fit(WithModel):
    """Train a masker for a classifier over a set of images."""

    example = "minexp fit --model torchvision:resnet18 --data photos/ --out masker.safetensors"

    data: str
    """Images: a folder, a glob, one image, a .txt of paths, .npz, .npy, IDX, WebDataset .tar or Parquet."""
    out: Path
    """The masker, a .safetensors file; settings and metrics go beside it."""
    preset: Literal["default", "kl"] = "default"
    """default: the area's weight adapts to the decision; kl: the plain weighted sum."""
    steps: int | None = None
    """Optimisation steps."""
    epochs: float | None = None
    """Passes over the data, in place of steps."""
    batch: int = 32
    """Images a step."""
    lr: float = 3e-3
    """Learning rate."""
    limit: int | None = None
    """Use only the first images."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = True
    """Start over instead of going on from an interrupted fit of the same settings."""

    def run(self) -> int:
        from .data.sources import open_source
        from .training import fit

        _at_least_one("--batch", self.batch)
        source = open_source(self.data, limit=self.limit)
        classifier = self.classifier()
        masker = fit(
            classifier,
            source,
            preset_name=self.preset,
            steps=self.steps,
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            out=self.out,
            seed=self.seed,
            resume=self.resume,
            progress=not self.quiet and sys.stderr.isatty(),
        )
        about = masker.metadata
        summary = {key: about[key] for key in ("steps", "seconds", "resumed")}
        metrics = about["metrics"]
        summary |= {"area": metrics["area"], "kept": metrics["kept"], "robust_train": metrics["robust"]}
        summary |= {"out": str(self.out)}
        command = f"minexp explain --model {self.model} --masker {self.out} --data {self.data} --out DIR"
        self.show(summary, f"{_table(summary)}\nnext: {command}")
        return DONE


@dataclass(frozen=True, kw_only=True)
class Explain(WithModel):
    """Explain a set of images: one certified minimal mask and one stored row for each."""

    example = "minexp explain --model torchvision:resnet18 --masker masker.safetensors --data photos/ --out runs/photos"

    data: str
    """Images: a folder, a glob, one image, a .txt of paths, .npz, .npy, IDX, WebDataset .tar or Parquet."""
    out: Path
    """Directory of the Parquet store."""
    masker: Path | None = None
    """Masker made by `minexp fit` for this classifier; without it each image is optimised on its own."""
    effort: Literal["fast", "refined"] | None = None
    """fast: the masker and a threshold search; refined: optimise each mask further (the default without a masker)."""
    predicate: Literal["robust", "top1", "score"] = "robust"
    """What a mask has to do: keep the class on random backgrounds, on the plain background, or keep its probability."""
    rho: float = 0.95
    """With robust: share of the random backgrounds on which the class has to stay."""
    draws: int = 20
    """With robust: number of random backgrounds."""
    tau: float = 0.5
    """With score: the probability to reach."""
    background: Literal["mean", "black", "white"] = "mean"
    """What removed pixels become in the kept image."""
    batch: int = 32
    """Images at once; no effect on the answers."""
    limit: int | None = None
    """Only the first images."""
    seed: int = 0
    """Seed of the random backgrounds."""
    resume: bool = True
    """Start over instead of going on behind the last stored row."""

    def run(self) -> int:
        from .certify import Predicate
        from .data.sources import open_source
        from .jobs.local import explain_dataset
        from .masker import load_masker

        _at_least_one("--batch", self.batch)
        source = open_source(self.data, limit=self.limit)
        classifier = self.classifier()
        masker = None if self.masker is None else load_masker(self.masker, classifier)
        summary = explain_dataset(
            classifier,
            source,
            masker,
            self.out,
            predicate=Predicate(self.predicate, rho=self.rho, draws=self.draws, tau=self.tau),
            effort=self.effort or ("refined" if masker is None else "fast"),
            background=self.background,
            seed=self.seed,
            batch=self.batch,
            resume=self.resume,
            progress=not self.quiet,
        )
        self.show(summary, _table(summary) + f"\nnext: minexp report {self.out}")
        return PARTLY if summary["failed"] or summary["errors"] else DONE


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write the report of a store: one self-contained HTML page."""

    example = "minexp report runs/photos"

    directory: Positional[Path]
    """Directory that `minexp explain` wrote."""
    out: Path | None = None
    """The page, in place of report.html in the directory."""
    gallery: int = 48
    """Images in each view of the gallery."""

    def run(self) -> int:
        from .report import write_report

        _at_least_one("--gallery", self.gallery)
        page = write_report(self.directory, out=self.out, gallery=self.gallery)
        self.show({"report": str(page)}, str(page))
        return DONE


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check a store: digests, page checksums, masks, counts, duplicates."""

    example = "minexp verify runs/photos"

    directory: Positional[Path]
    """Directory that `minexp explain` wrote."""

    def run(self) -> int:
        from .data.store import MANIFEST, verify_store

        problems = verify_store(self.directory)
        manifest = json.loads((self.directory / MANIFEST).read_text(encoding="utf-8"))
        summary = {**_verdict(problems, manifest["shards"]), "problems": problems}
        text = "\n".join([*problems, f"{summary['ok']} of {summary['rows']} rows verify"])
        self.show(summary, text)
        return DAMAGED if problems else DONE


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Time the operators or the whole explanation (in a source checkout)."""

    example = "minexp bench explain"

    suite: Positional[Literal["kernels", "explain"]]
    """What to time."""

    def run(self) -> int:
        import runpy

        script = Path(__file__).resolve().parent.parent / "bench" / "run.py"
        if not script.is_file():
            raise RequestError(
                "the benchmarks are not installed with the package; run this in a source checkout"
            )
        options = [f"--{name}" for name in ("json", "quiet") if getattr(self, name)]
        return int(runpy.run_path(str(script))["main"]([self.suite, *options]) or DONE)


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Versions, device, threads, and which operators are compiled."""

    example = "minexp doctor"

    def run(self) -> int:
        from .doctor import describe, examine

        facts = examine()
        self.show(facts, describe(facts))
        return DONE


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "fit": Fit,
    "explain": Explain,
    "report": Report,
    "verify": Verify,
    "bench": Bench,
    "doctor": Doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0 done, 2 the request was wrong, 3 done in part, 4 damaged data, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(_overview())
        return DONE if arguments else REQUEST
    if arguments[0] == "--version":
        print(f"minexp {__version__}")
        return DONE
    warnings.showwarning = lambda message, *_, **__: print(f"minexp: warning: {message}", file=sys.stderr)
    # A job that is told to end closes its store like one that is interrupted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        return _parse(arguments).run()
    except MinexpError as error:
        print(f"minexp: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"minexp: {error.filename}: {error.strerror}; give a path that can be read or written",
            file=sys.stderr,
        )
        return REQUEST
    except KeyboardInterrupt:
        print("minexp: interrupted; the same command again goes on from here", file=sys.stderr)
        return INTERRUPTED


def _overview() -> str:
    lines = [
        "Minimal explanations of image classifiers, each with a tested certificate.",
        "",
        "usage: minexp COMMAND ...",
    ]
    lines += [
        "",
        *(f"  {name:<9}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()),
    ]
    return "\n".join(
        [*lines, "", "minexp COMMAND --help lists a command's options. Example: minexp demo --out out/demo"]
    )


def _parse(arguments: Sequence[str]) -> Command:
    name, *rest = arguments
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(COMMANDS)}"
        raise RequestError(f"no command '{name}'; {hint}")
    command = COMMANDS[name]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                command,
                prog=f"minexp {name}",
                description=f"{command.__doc__}\n\nExample: {command.example}",
                args=rest,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise RequestError(_one_line(complaint.getvalue(), name)) from None


def _one_line(box: str, name: str) -> str:
    """The parser's framed complaint without its frame and without the help of the options it names."""
    # Box characters frame it where stderr can show them; elsewhere its title stands above a rule.
    inside = [line.strip("│") for line in box.splitlines() if line.strip() and not re.match(r"[╭╰]", line)]
    if len(inside) > 1 and re.fullmatch(r" *-+ *", inside[1]):
        inside = inside[2:]
    text = " ".join(line for line in inside if not line.startswith(" " * 9))
    text = re.split(r"For full helptext", text)[0]
    text = " ".join(re.sub(r"─{2,}|-{3,}", " ", text).split()).rstrip(".")
    return f"{text}; see minexp {name} --help"


def _verdict(problems: Sequence[str], shards: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts of rows: a problem of a shard as a whole makes all of its rows bad."""
    rows = sum(shard["rows"] for shard in shards)
    duplicates = sum(problem.startswith("id ") for problem in problems)
    damaged = {problem.partition(":")[0] for problem in problems if not re.match(r"(\S+: )?id ", problem)}
    bad = sum(shard["rows"] for shard in shards if shard["name"] in damaged)
    single = {match.groups() for problem in problems if (match := re.match(r"(\S+): id ('.*?'): ", problem))}
    bad += sum(shard not in damaged for shard, _ in single)
    return {"rows": rows, "ok": max(0, rows - bad - duplicates), "bad": bad, "duplicates": duplicates}


def _table(summary: dict[str, Any]) -> str:
    width = max(map(len, summary))
    return "\n".join(f"{key.replace('_', ' '):<{width}}  {value}" for key, value in summary.items())


def _at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise RequestError(f"{option} is {value}; give at least 1")


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path} is not readable ({type(error).__name__}); give one class name a line"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
