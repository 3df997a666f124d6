"""One HTML file that explains images in a browser: the explainer, ONNX Runtime's WebAssembly build, and the page."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from ..data.files import write_text
from ..errors import RequestError
from .metadata import About
from .runtime import Explainer

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"  # Microsoft's, MIT licence, on the npm registry
_FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
# Printable characters that end neither an element nor a string: 85 of them write 4 bytes in 5.
ALPHABET = "".join(chr(c) for c in range(33, 127) if chr(c) not in "<>&\"'\\`")[:85]


@dataclass(frozen=True, eq=False)
class WebRuntime:
    """ONNX Runtime for browsers: its loader, a JavaScript module, and its WebAssembly."""

    loader: bytes
    wasm: bytes


def write_page(explainer: str | Path, out: str | Path, *, web_runtime: str | Path | None = None) -> Path:
    """Write ``out``, a page that needs no network, and return its path.

    web_runtime: an onnxruntime-web tarball or folder of the right version; by default the one kept in the user's cache,
    fetched once with npm. Raises RequestError where there is neither.
    """
    loaded = Explainer(explainer, trusted=True)
    runtime = find_web_runtime(web_runtime)
    parts = resources.files(__package__)
    report = resources.files("minexp.report")
    about = loaded.about
    page = Template(parts.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        style=report.joinpath("page.css").read_text(encoding="utf-8")
        + parts.joinpath("page.css").read_text(encoding="utf-8"),
        script=parts.joinpath("page.js").read_text(encoding="utf-8"),
        title=escape(str(about.extra.get("model") or "Classifier")),
        facts=escape(f"{len(about.class_names)} classes · {about.predicate} · {about.precision}"),
        about=_script_json(_about(about)),
        alphabet=_script_json(ALPHABET),
        loader=_packed(runtime.loader),
        wasm=_packed(runtime.wasm),
        model=_packed(Path(explainer).read_bytes()),
    )
    write_text(out, page)
    return Path(out)


def _about(about: About) -> dict[str, object]:
    """What the page's script has to know."""
    return {
        "classes": about.class_names,
        "explained": about.explained,
        "preprocessing": about.preprocessing.to_json(),
        "background": about.background,
        "families": about.families,
        "fresh": about.fresh,
        "rho": about.rho,
        "predicate": about.predicate,
        "threshold": about.threshold,
        "number": (about.extra.get("plan") or {}).get("number"),
        "examples": [row["png"] for row in about.extra.get("selftest") or ()],
    }


def _script_json(value: object) -> str:
    return json.dumps(value).replace("<", "\\u003c")


def _packed(content: bytes) -> str:
    """gzip, then five characters for four bytes; the length of what is packed comes first."""
    small = gzip.compress(content, 9, mtime=0)
    words = np.frombuffer(small + b"\0" * (-len(small) % 4), ">u4").astype(np.int64)
    digits = np.empty((len(words), 5), np.uint8)
    for place in range(4, -1, -1):
        words, digits[:, place] = np.divmod(words, 85)
    letters = np.frombuffer(ALPHABET.encode(), np.uint8)
    return f"{len(small)} {letters[digits].tobytes().decode()}"


def find_web_runtime(source: str | Path | None = None) -> WebRuntime:
    """The two files of the right version, from a tarball, a folder, the cache or npm; their digests are checked."""
    if source is None:
        source = _cached()
    source = Path(source)
    if source.is_dir():
        found = {path.name: path for path in source.rglob("*") if path.name in _FILES}
        contents = {name: path.read_bytes() for name, path in found.items()}
    elif source.is_file():
        contents = _from_tarball(source)
    else:
        raise RequestError(f"{source} is not there: give a tarball or folder of {PACKAGE}")
    for name, digest in _FILES.items():
        if hashlib.sha256(contents.get(name, b"")).hexdigest() != digest:
            raise RequestError(
                f"{source} does not hold {name} of {PACKAGE}: get it with `npm pack {PACKAGE}`"
            )
    return WebRuntime(*(contents[name] for name in _FILES))


def _from_tarball(path: Path) -> dict[str, bytes]:
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name in _FILES and member.size < 64 << 20:
                    file = tar.extractfile(member)
                    contents[name] = file.read() if file is not None else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise RequestError(f"{path} is no npm tarball ({error}): get it with `npm pack {PACKAGE}`") from error
    return contents


def _cached() -> Path:
    """The tarball in the user's cache, put there by npm the first time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "minexp" / f"onnxruntime-web-{VERSION}.tgz"
    if path.is_file():
        return path
    npm = shutil.which("npm")
    way_out = f"run `npm pack {PACKAGE}` and give the file as --web-runtime"
    if npm is None:
        raise RequestError(f"the page carries {PACKAGE}, which is not in {path.parent}: {way_out}")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(path.parent)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    except (subprocess.SubprocessError, OSError) as error:
        raise RequestError(f"npm could not fetch {PACKAGE} ({type(error).__name__}): {way_out}") from error
    return path
