"""What can go wrong, as one line each; the command line turns the class into its exit code."""


class MinexpError(Exception):
    """Base of every error raised on purpose; its text is one line."""

    exit_code = 1


class RequestError(MinexpError):
    """The request was wrong: the text names what, where, and what to type instead."""

    exit_code = 2


class VerifyError(MinexpError):
    """Stored data does not verify."""

    exit_code = 4
