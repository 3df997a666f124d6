"""The command line: finds the command, reads its options, turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import warnings
from collections.abc import Sequence

import tyro

from . import __version__
from .commands import COMMANDS
from .commands.base import DONE, INTERRUPTED, REQUEST, TERMINATED, Command
from .errors import MinexpError, RequestError

_EXTRAS = {
    **dict.fromkeys(("torch", "safetensors"), "torch"),
    **dict.fromkeys(("onnx", "onnxscript", "spox"), "export"),
    "onnxruntime": "onnx",
    "ray": "ray",
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
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        print(f"minexp: {error.name} is not installed; pip install 'minexp[{extra}]'", file=sys.stderr)
        return REQUEST
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


if __name__ == "__main__":
    sys.exit(main())
