"""The page: one file that explains images in a browser as Python does, offline."""

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, browsing
from deployed import exported, images
from PIL import Image

from minexp.cli import main
from minexp.data import npm
from minexp.data.decoding import decode_image
from minexp.data.store import unpack_mask
from minexp.deploy import Explainer
from minexp.deploy.page import find_web_runtime, write_page
from minexp.errors import RequestError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_web_runtime()
    except RequestError as error:
        if shutil.which("npm") and os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("page") / "demo.html"
    assert main(["export", "--onnx", str(exported().explainer), "--page", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as open_browser:
        yield open_browser


def ready(browser: Browser, path: Path, **size: int) -> dict:
    browser.requests.clear()
    browser.open(path, **size)
    assert browser.wait("document.body && document.body.dataset.ready") == "true"
    return json.loads(browser.wait("document.body.dataset.result"))


def put(browser: Browser, content: bytes, name: str, kind: str) -> dict:
    """Choose a file with the page's own field."""
    text = base64.b64encode(content).decode()
    browser.run(
        f"""(() => {{
          delete document.body.dataset.result;
          const bytes = Uint8Array.from(atob("{text}"), (c) => c.charCodeAt(0));
          const files = new DataTransfer();
          files.items.add(new File([bytes], "{name}", {{type: "{kind}"}}));
          const field = document.getElementById("file");
          field.files = files.files;
          field.dispatchEvent(new Event("change", {{bubbles: true}}));
        }})()"""
    )
    return json.loads(browser.wait("document.body.dataset.result"))


def encoded(image: np.ndarray, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def check(answer: dict, content: bytes) -> None:
    """The page's answer is Python's: class, every pixel of the mask, and the figures to rounding."""
    explainer = Explainer(exported().explainer, trusted=True)
    pixels = explainer.about.preprocessing.pixels(decode_image(io.BytesIO(content)))
    found = explainer.explain(pixels[None])
    (wanted,) = found.certificates
    assert answer["label"] == wanted.label
    mask = unpack_mask(bytes(answer["bits"]), *found.masks.shape[1:])
    assert int((mask != found.masks[0]).sum()) == 0
    assert answer["certified"] == wanted.certified and answer["evaluations"] == wanted.evaluations
    for here, there in (
        ("conf", "conf"),
        ("confMasked", "conf_masked"),
        ("confEmpty", "conf_empty"),
        ("area", "area"),
    ):
        assert answer[here] == pytest.approx(getattr(wanted, there), abs=1e-4)
    assert answer["train"]["share"] == pytest.approx(wanted.robust_train)
    assert answer["train"]["interval"] == pytest.approx([wanted.robust_train_low, wanted.robust_train_high])
    assert answer["held"]["share"] == pytest.approx(wanted.robust_heldout)


@pytest.mark.timeout(240)
def test_it_explains_as_python_does(written: Path, browser: Browser) -> None:
    check(ready(browser, written), encoded(images(1)[0], "PNG"))  # the first example
    rng = np.random.default_rng(3)
    large = np.asarray(Image.fromarray(images(9)[8]).resize((301, 214), Image.Resampling.BICUBIC))
    noisy = (large + rng.integers(0, 30, large.shape)).clip(0, 255).astype(np.uint8)
    for content, name, kind in (
        (encoded(images(6)[5], "PNG"), "same.png", "image/png"),
        (encoded(noisy, "PNG"), "large.png", "image/png"),
        (encoded(noisy[:100], "WEBP", lossless=1), "wide.webp", "image/webp"),
        (encoded(images(4)[3][:9, :11], "PNG"), "tiny.png", "image/png"),
    ):
        check(put(browser, content, name, kind), content)
    # a JPEG may be decoded a level apart
    jpeg = encoded(noisy, "JPEG", quality=92)
    answer = put(browser, jpeg, "photo.jpg", "image/jpeg")
    explainer = Explainer(exported().explainer, trusted=True)
    pixels = explainer.about.preprocessing.pixels(decode_image(io.BytesIO(jpeg)))
    assert answer["label"] == explainer.explain(pixels[None]).certificates[0].label
    assert browser.trouble == []
    assert not [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert sum(url.startswith("file:") for url in browser.requests) == 1, "nothing but the page itself"


@pytest.mark.timeout(240)
def test_threshold_keys_camera_and_bad_files(written: Path, browser: Browser) -> None:
    first = ready(browser, written)
    browser.run(
        "document.getElementById('threshold').value = 0.9;"
        "document.getElementById('threshold').dispatchEvent(new Event('input'))"
    )
    slid = json.loads(browser.wait("document.body.dataset.slide"))
    explainer = Explainer(exported().explainer, trusted=True)
    prob = explainer.explain(images(1)).probabilities[0]
    assert slid["threshold"] == 0.9 and slid["area"] == pytest.approx((prob > 0.9).mean())
    assert "no certificate" in browser.run("document.getElementById('line').textContent")
    browser.key("0")
    assert "certified" in browser.wait(
        "document.getElementById('line').textContent.includes('ms') && "
        "document.getElementById('line').textContent"
    )
    browser.run("delete document.body.dataset.result")
    browser.key("ArrowRight")
    second = json.loads(browser.wait("document.body.dataset.result"))
    assert second["bits"] != first["bits"]
    assert browser.run(
        "[...document.querySelectorAll('#examples button')].map(b => b.getAttribute('aria-pressed'))"
    ) == [
        "false",
        "true",
        "false",
        "false",
    ]
    browser.key("t")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    browser.run("delete document.body.dataset.result")
    browser.key("c")
    live = json.loads(browser.wait("document.body.dataset.result"))  # Chromium's test picture
    assert live["area"] > 0
    browser.key("c")
    assert browser.wait("document.getElementById('camera').getAttribute('aria-pressed')") == "false"
    browser.wait("!document.body.dataset.busy")
    browser.run(
        "(() => { const files = new DataTransfer(); files.items.add(new File(['no'], 'a.png', {type: 'image/png'}));"
        "const field = document.getElementById('file'); field.files = files.files;"
        "field.dispatchEvent(new Event('change')) })()"
    )
    browser.wait("document.getElementById('line').textContent.includes('no image that a browser can read')")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("width", [360, 768])
def test_it_fits_phones_and_tablets(written: Path, browser: Browser, width: int) -> None:
    ready(browser, written, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert (
        browser.run("Math.min(...['image', 'mask', 'kept'].map(i => document.getElementById(i).clientWidth))")
        > 80
    )


def test_the_page_is_small_and_the_runtime_is_the_pinned_one(written: Path, tmp_path: Path) -> None:
    assert written.stat().st_size < 10e6
    runtime = find_web_runtime()
    (tmp_path / "ort-wasm-simd-threaded.wasm").write_bytes(runtime.wasm[:-1])
    (tmp_path / "ort.wasm.bundle.min.mjs").write_bytes(runtime.loader)
    with pytest.raises(
        RequestError, match=r"does not hold ort-wasm-simd-threaded.wasm of onnxruntime-web@.*npm pack"
    ):
        find_web_runtime(tmp_path)
    (tmp_path / "ort-wasm-simd-threaded.wasm").write_bytes(runtime.wasm)
    assert find_web_runtime(tmp_path).wasm == runtime.wasm


def test_without_the_runtime_one_line_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(RequestError, match=r"carries onnxruntime-web@.*npm pack.*--web-runtime"):
        write_page(exported().explainer, tmp_path / "demo.html")
    (tmp_path / "broken.tgz").write_bytes(b"no tarball")
    with pytest.raises(RequestError, match="no npm tarball"):
        write_page(exported().explainer, tmp_path / "demo.html", web_runtime=tmp_path / "broken.tgz")
    assert not (tmp_path / "demo.html").exists()
