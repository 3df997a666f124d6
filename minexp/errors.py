"""What can go wrong, as one line each; the command line turns the class into its exit code."""

import difflib
from collections.abc import Iterable


class MinexpError(Exception):
    """Base of every error raised on purpose; its text is one line."""

    exit_code = 1


class RequestError(MinexpError):
    """The request was wrong: the text names what, where, and what to type instead."""

    exit_code = 2


class VerifyError(MinexpError):
    """Stored data does not verify."""

    exit_code = 4


def near(name: str, known: Iterable[str]) -> str:
    """The known names closest to `name`, for an error line."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:6])


def one_line(error: BaseException) -> str:
    """The error as `Type: text` on one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
