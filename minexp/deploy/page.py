"""One HTML file that explains images in a browser: the explainer, ONNX Runtime's WebAssembly build, and the page."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from ..data.files import write_text
from ..data.npm import NpmPackage
from ..report.frame import document, script_json, text
from .metadata import About
from .runtime import Explainer

RUNTIME = NpmPackage(
    "onnxruntime-web",  # Microsoft's, MIT licence
    "1.30.0",
    {
        "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
        "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    },
    "--web-runtime",
)
# Pictures that the reader gives and the camera makes, and WebAssembly.
POLICY = (
    "default-src 'none'; img-src data: blob:; media-src blob: mediastream:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' 'wasm-unsafe-eval' blob:"
)
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
    parts, about = resources.files(__package__), loaded.about
    page = document(
        parts,
        title=str(about.extra.get("model") or "Classifier"),
        policy=POLICY,
        style=text(resources.files("minexp.report"), "page.css"),
        script=text(parts, "page.js"),
        facts=escape(f"{len(about.class_names)} classes · {about.predicate} · {about.precision}"),
        about=script_json(_about(about)),
        alphabet=script_json(ALPHABET),
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
    return WebRuntime(*RUNTIME.find(source).values())
