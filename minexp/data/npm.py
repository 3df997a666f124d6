"""Files of npm packages: pinned by version and digest, taken from a tarball, a folder, the user's cache, or by npm."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError

_LARGEST = 64 << 20  # bytes of one file


@dataclass(frozen=True)
class NpmPackage:
    """A version of a package, and those of its files that are wanted, by name, with their SHA-256.

    option: how the user gives a tarball or folder of it.
    """

    name: str
    version: str
    files: Mapping[str, str]
    option: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def find(self, source: str | Path | None = None) -> dict[str, bytes]:
        """The files, in the order of ``files``; without a source from the cache, where npm puts them the first time.

        Raises RequestError where they cannot be had, or are not those of this version.
        """
        source = self._cached() if source is None else Path(source)
        if source.is_dir():
            contents = {path.name: path.read_bytes() for path in source.rglob("*") if path.name in self.files}
        elif source.is_file():
            contents = self._unpacked(source)
        else:
            raise RequestError(f"{source} is not there: give a tarball or folder of {self}")
        for name, digest in self.files.items():
            if hashlib.sha256(contents.get(name, b"")).hexdigest() != digest:
                raise RequestError(f"{source} does not hold {name} of {self}: get it with `npm pack {self}`")
        return {name: contents[name] for name in self.files}

    def _unpacked(self, path: Path) -> dict[str, bytes]:
        contents = {}
        try:
            with tarfile.open(path, "r:gz") as tar:
                for member in tar:
                    name = member.name.rpartition("/")[2]
                    if member.isreg() and name in self.files and member.size < _LARGEST:
                        file = tar.extractfile(member)
                        contents[name] = file.read() if file is not None else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            raise RequestError(
                f"{path} is no npm tarball ({error}): get it with `npm pack {self}`"
            ) from error
        return contents

    def _cached(self) -> Path:
        """The tarball in the user's cache, put there by npm the first time."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(base) / "minexp" / f"{self.name}-{self.version}.tgz"
        if path.is_file():
            return path
        npm = shutil.which("npm")
        way_out = f"run `npm pack {self}` and give the file as {self.option}"
        if npm is None:
            raise RequestError(f"the page carries {self}, which is not in {path.parent}: {way_out}")
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", str(self), "--silent", "--pack-destination", str(path.parent)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            raise RequestError(f"npm could not fetch {self} ({type(error).__name__}): {way_out}") from error
        return path
