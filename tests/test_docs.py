"""The documentation: it builds strictly, its snippets run, every public name and every error has its place.

Commands of the pages are run as they stand, on few images and steps, with small networks in place of downloaded ones.
"""

import ast
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import one_thread  # noqa: F401
from torch import nn

import minexp
from minexp import cli, zoos
from minexp.data.preprocessing import Preprocessing
from minexp.data.store import read_shards, read_store

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
# other tests run these, or they take minutes, or a network
NOT_RUN = (
    *("pip ", "make ", "minexp bench", "OMP_NUM_THREADS=1 minexp bench", "OMP_NUM_THREADS=2 minexp bench"),
    "minexp demo",
    *("minexp export --onnx", "minexp explain --preset paper"),
)
REMOTE = "s3://bucket/"


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page: its language, the file it is to be written to, its text, and the line it begins in."""

    language: str
    title: str | None
    text: str
    line: int


def snippets(page: str) -> list[Snippet]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Snippet(match[1], match[2], match[3], text.count("\n", 0, match.start()) + 1)
        for match in FENCE.finditer(text)
    ]


def small_network(seed: int, classes: int, size: int) -> zoos.Built:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip
    return zoos.Built(model, Preprocessing((size, size), mean=(0.5,) * 3, std=(0.5,) * 3))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with photos in classes, here and in a bucket; pretrained models are small ones of random weights."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((64, 56), Image.Resampling.BICUBIC).save(
                tmp_path / "photos" / name / f"{index}.png"
            )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    real = dict(zoos.ZOOS)

    def stand_in(kind: str) -> Callable[[str, int | None, bool], zoos.Built]:
        def build(name: str, num_classes: int | None, pretrained: bool) -> zoos.Built:
            if not pretrained or name in ("resnet19",):
                return real[kind](name, num_classes, pretrained)
            return small_network(len(name), num_classes or 5, 32)

        return build

    for kind in real:
        monkeypatch.setitem(zoos.ZOOS, kind, stand_in(kind))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # a page's net.py is not the next one's
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and origin.startswith(str(tmp_path)):
            del sys.modules[name]


def run_command(line: str, folder: Path) -> tuple[int, str]:
    """Run a `minexp` command on few images and steps: its exit code, and what it said on stderr."""
    words = [word.replace(REMOTE, f"file://{folder}/") for word in shlex.split(line, comments=True)]
    if "-m" in words[:-1] and words[0] in (
        "torchrun",
        "srun",
    ):  # in one process; tests/test_ranks.py has several
        words = words[words.index("-m") + 1 :]
    if words[:1] == ["python"]:
        runpy.run_path(words[1], run_name="__main__")
        return 0, ""
    assert words[0] == "minexp", f"{line}: neither a minexp command nor one of {NOT_RUN}"
    small = {"fit": {"--steps": "2", "--batch": "4"}, "explain": {"--limit": "2"}}.get(words[1], {})
    for option, value in small.items():
        if option in words:
            words[words.index(option) + 1] = value
        elif not ("--epochs" in words and option == "--steps"):
            words += [option, value]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([*words[1:], *([] if words[1] == "verify" else ["--quiet"])])
    return code, said.getvalue()


def commands(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", *NOT_RUN))]


GOING_ON = [f"docs/{name}.md" for name in ("quality", "deploy", "circuits", "scale")]


def going_on() -> dict[str, Any]:
    """What the quick start leaves behind, for pages that go on from there."""
    built = small_network(0, 10, 32)
    classifier = minexp.Classifier(built.model, preprocessing=built.preprocessing)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masker = minexp.fit(classifier, x, steps=2, progress=False)
    images = (x.permute(0, 2, 3, 1) * 255).byte().numpy()
    return {"minexp": minexp, "classifier": classifier, "masker": masker, "x": x, "images": images}


@pytest.mark.filterwarnings("ignore:the masks", "ignore::UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_snippets_run(page: str, workplace: Path) -> None:
    pytest.importorskip("fsspec")
    for name in {n for s in snippets(page) for n in ("torchvision", "timm", "transformers") if n in s.text}:
        pytest.importorskip(name)
    space: dict[str, Any] = {"__name__": "snippet"} | (going_on() if page in GOING_ON else {})
    if page in GOING_ON:
        run_command(
            "minexp fit --model torchvision:resnet18 --data photos/ --out masker.safetensors", workplace
        )
    for snippet in snippets(page):
        where = f"{page}:{snippet.line}"
        if snippet.title is not None:
            (workplace / snippet.title).write_text(snippet.text)
            if snippet.language == "python":
                compile(snippet.text, where, "exec")
            else:
                check_job(snippet, where, workplace)
        elif snippet.language == "python":
            exec(compile("\n" * snippet.line + snippet.text, str(ROOT / page), "exec"), space)
        elif snippet.language == "sh":
            for line in commands(snippet.text):
                code, said = run_command(line, workplace)
                assert code in (0, 3), f"{where}: {line}\n{said}"
        elif snippet.language == "console":
            check_console(snippet.text, where, workplace)
        elif snippet.language == "sql":
            run_sql(snippet.text, workplace)
        else:
            assert snippet.language in ("text", "json"), (
                f"{where}: a block of an unknown language {snippet.language!r}"
            )


def check_job(snippet: Snippet, where: str, folder: Path) -> None:
    """A script for Slurm, or a job for Kubernetes: it can be read, and its commands run in each of its tasks."""
    if snippet.language == "yaml":
        job = pytest.importorskip("yaml").safe_load(snippet.text)["spec"]
        (container,), tasks = job["template"]["spec"]["containers"], job["completions"]
        lines = container["args"]
    else:
        assert subprocess.run(["bash", "-n", snippet.title], cwd=folder).returncode == 0
        lines = [line for line in commands(snippet.text) if "minexp" in line]
        array = re.search(r"--array=0-(\d+)", snippet.text)
        tasks = 1 + int(array[1]) if array else 1
    for task in range(tasks):
        for line in lines:
            line = re.sub(r"\$(SLURM_ARRAY_TASK_ID|JOB_COMPLETION_INDEX)", str(task), line)
            code, said = run_command(line, folder)
            assert code in (0, 3), f"{where}: {line}\n{said}"
    (out,) = re.findall(r"--out (\S+)", lines[0])
    if not out.endswith(".safetensors"):
        assert sum(shard.rows for shard in read_shards(folder / out)) == 2


def check_console(text: str, where: str, folder: Path) -> None:
    """`$ command`, and the line that it answers on stderr; … stands for the rest of it."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        line, expected = part.split("\n", 1)
        code, said = run_command(line, folder)
        assert code == 2, f"{where}: {line} ended with {code}"
        start = expected.strip().partition("…")[0]
        assert said.startswith(start), f"{where}: {line} said {said}"


def run_sql(text: str, folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    if not (folder / "runs" / "photos").is_dir():
        run_command("minexp explain --model torchvision:resnet18 --data photos/ --out runs/photos", folder)
    for statement in filter(str.strip, text.split(";")):
        assert duckdb.sql(statement) is not None


OWN_NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)), inplace=True)


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.stages = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return {"scores": self.head(x.mean((2, 3)))}


def model():
    return Mine()
"""


@pytest.mark.filterwarnings("ignore:the masks", "ignore::UserWarning")
def test_the_readme_takes_a_new_user_from_a_network_and_a_checkpoint_to_a_report(workplace: Path) -> None:
    """Own module in a file, own folder, own checkpoint: the README's three commands, word by word."""
    (workplace / "net.py").write_text(OWN_NETWORK)
    torch.manual_seed(0)
    state = runpy.run_path("net.py")["model"]().state_dict()
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, "net.pth"
    )
    lines = commands(next(s.text for s in snippets("README.md") if s.language == "sh"))
    assert [line.split()[1] for line in lines] == ["fit", "explain", "report"]
    for line in lines:
        code, said = run_command(line, workplace)
        assert code in (0, 3), said
    rows = read_store("runs/photos").to_pylist()
    assert [row["id"] for row in rows] == ["cat/0.png", "cat/1.png"] and all(row["mask"] for row in rows)
    assert "cat/0.png" in (workplace / "runs" / "photos" / "report.html").read_text("utf-8")
    assert (workplace / "masker.safetensors").is_file()


def test_no_block_is_indented() -> None:
    """Indented blocks have no language, so nothing would run them."""
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        indented = [line for line in text.splitlines() if re.match(r"    (minexp|import|from|\$) ", line)]
        assert not indented, f"{page}: {indented[0].strip()}: write it as a fenced block"


# ---------------------------------------------------------------- errors


def messages() -> dict[str, str]:
    """Every error text of the package with … for what is filled in, and where it is raised."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        return text(node.left) + text(node.right) if isinstance(node, ast.BinOp) else "…"

    found = {}
    for path in sorted((ROOT / "minexp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", "")
            if name in ("RequestError", "MinexpError", "VerifyError") and node.args:
                found[text(node.args[0])] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return {
        message: where
        for message, where in found.items()
        if re.search(r"\w{2}", message.replace("ONNX Runtime", ""))
    }


def explained() -> dict[str, list[str]]:
    yaml = pytest.importorskip("yaml")
    pages: dict[str, list[str]] = {}
    for page in (DOCS / "errors").glob("*.md"):
        head = re.match(r"---\n(.*?)\n---\n", page.read_text(encoding="utf-8"), re.S)
        if head is not None:
            for message in yaml.safe_load(head[1])["says"]:
                pages.setdefault(message, []).append(page.name)
    return pages


def test_every_error_has_its_page() -> None:
    raised, pages = messages(), explained()
    silent = [f"{where}: {message}" for message, where in raised.items() if message not in pages]
    assert not silent, "add these lines to `says` of a page in docs/errors:\n" + "\n".join(silent)
    stale = [
        f"{page}: {message}" for message, names in pages.items() for page in names if message not in raised
    ]
    assert not stale, "no code raises these any more; correct or remove them:\n" + "\n".join(stale)


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    for name in ("mkdocs", "griffe", "latex2mathml"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_strictly_and_takes_nothing_from_elsewhere(hooks: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")
    }
    assert {
        "index.html",
        "errors/model-unknown.html",
        "reference/commands.html",
        "how-to/targets.html",
    } <= pages.keys()
    for name, html in pages.items():
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", html), name
        assert "\\(" not in html.replace("\\(in", "") or name != "concepts/explanation.html"
    assert pages["concepts/explanation.html"].count("<math") > 10
    assert "<code>--channels-last</code>" in pages["reference/commands.html"]
    assert all(f"{name}.html" in pages["errors/index.html"] for name in ("uri", "target", "out-of-memory"))


def test_a_public_name_without_a_docstring_or_a_place_fails_the_build(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mkdocs.exceptions import PluginError

    hooks.on_pre_build(None)
    for name in ("layouts", "targets.Target.kept", "targets.similarity"):
        hooks.package.cache_clear()
        thing = hooks.package()[f"classifier.Classifier.{name}" if name == "layouts" else name]
        monkeypatch.setattr(thing, "docstring", None)
        with pytest.raises(PluginError, match=f"minexp.*{name.split('.')[-1]} has no docstring"):
            hooks.on_pre_build(None)
    hooks.package.cache_clear()
    monkeypatch.setattr(hooks, "listed", lambda: {"minexp.fit"})
    with pytest.raises(PluginError, match=r"classifier.Classifier is public and on no page"):
        hooks.on_pre_build(None)


def test_pages_that_are_not_written_yet_are_left_out(hooks: ModuleType) -> None:
    nav = [{"Home": "index.md"}, {"Part": [{"There": "quickstart.md"}, {"Not yet": "nowhere.md"}]}]
    assert hooks._present(nav) == [{"Home": "index.md"}, {"Part": [{"There": "quickstart.md"}]}]
