"""Where bytes are: a file here, or a URI that fsspec opens (s3://, gs://, https://, hf:// …)."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, Any

from ..errors import RequestError

_URI = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)


def is_uri(text: str) -> bool:
    """Is it written as a URI, rather than as a path?"""
    return _URI.match(text) is not None


@dataclass(frozen=True)
class Place:
    """One file, by its absolute path or its URI."""

    uri: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.uri).name if is_uri(self.uri) else os.path.basename(self.uri)

    @property
    def path(self) -> str | None:
        """The path on this machine, None for a URI."""
        return None if is_uri(self.uri) else self.uri

    def __str__(self) -> str:
        return self.uri

    def exists(self) -> bool:
        if self.path is not None:
            return os.path.isfile(self.path)
        system, path = _system(self.uri)
        return bool(_told(self.uri, system.isfile, path))

    def size(self) -> int:
        """Length in bytes."""
        if self.path is not None:
            return os.stat(self.path).st_size
        system, path = _system(self.uri)
        return int(_told(self.uri, system.size, path) or 0)

    def open(self) -> IO[bytes]:
        """The file opened for reading, seekable."""
        if self.path is not None:
            return open(self.path, "rb")
        system, path = _system(self.uri)
        return _told(self.uri, system.open, path, "rb")

    def read(self, offset: int = 0, count: int | None = None) -> bytes:
        """So many bytes from an offset on, by default all of them. May be called from any thread."""
        if self.path is not None:
            with open(self.path, "rb") as file:
                file.seek(offset)
                return file.read() if count is None else file.read(count)
        system, path = _system(self.uri)
        stop = None if count is None else offset + count
        return bytes(_told(self.uri, system.cat_file, path, start=offset or None, end=stop))

    def version(self) -> str:
        """Text that changes when the file does, as far as its system says."""
        if self.path is not None:
            status = os.stat(self.path)
            return f"{status.st_mtime_ns} {status.st_size}"
        system, path = _system(self.uri)
        return str(_told(self.uri, system.ukey, path))


def list_remote(uri: str) -> tuple[str, list[str]] | None:
    """The folder and the URIs of the files in it and below, or of those that a glob matches; None for a file.

    In the order of a local folder; hidden names are left out. Raises RequestError when it cannot be listed.
    """
    system, path = _system(uri)
    if uri.lower().startswith(
        ("http://", "https://")
    ):  # a question mark begins a query there, and no folder is listed
        return None
    if any(sign in path for sign in "*?["):
        found = [p for p in _told(uri, system.glob, path) if _told(uri, system.isfile, p)]
        root = path.partition("*")[0].rpartition("/")[0]
    elif _told(uri, system.isdir, path):
        found, root = _told(uri, system.find, path), path.rstrip("/")
    else:
        return None
    inside = [p for p in found if not any(part.startswith(".") for part in p[len(root) :].split("/"))]
    return system.unstrip_protocol(root), [
        system.unstrip_protocol(p) for p in sorted(inside, key=lambda p: p.split("/"))
    ]


@lru_cache(maxsize=64)
def _system(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it."""
    require_fsspec(uri)
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(uri)
    except (ImportError, ValueError) as error:  # the protocol is unknown, or its package is missing
        raise RequestError(f"{uri} cannot be opened: {' '.join(str(error).split())}") from error
    return system, str(path)


def require_fsspec(uri: str) -> None:
    """RequestError where URIs cannot be opened."""
    if importlib.util.find_spec("fsspec") is None:
        raise RequestError(f"{uri} needs fsspec: pip install 'minexp[uri]'")


def _told(uri: str, call: Any, *arguments: Any, **options: Any) -> Any:
    """What the call returns; its failure as one line that names the URI."""
    try:
        return call(*arguments, **options)
    except Exception as error:  # every file system has its own errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"{uri} cannot be fetched: {reason}") from error
