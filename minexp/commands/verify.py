"""`minexp verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ..errors import RequestError
from .base import DAMAGED, DONE, Command


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check a store (digests, checksums, masks or circuits, counts, doubles), or an explainer.onnx on its pictures."""

    example = "minexp verify runs/photos"

    path: Positional[Path]
    """Directory that `minexp explain` or `minexp circuit` wrote, or an explainer.onnx of `minexp export`."""
    onnx: Path | None = None
    """With a directory: explain its images again with this explainer.onnx, here, and compare every row."""
    provider: Literal["cpu", "cuda", "tensorrt", "openvino"] = "cpu"
    """Where an explainer runs."""

    def run(self) -> int:
        if self.path.is_file():
            return self._explainer()
        from ..data.verify import examine_store

        found = examine_store(self.path, progress=not self.quiet)
        summary: dict[str, Any] = {
            "rows": found.rows,
            "ok": found.ok,
            "bad": found.bad,
            "duplicates": found.duplicates,
            "missing": found.missing,
            "problems": found.problems,
        }
        if self.onnx is not None and not found.problems:
            summary |= self._recomputed(self.onnx, found.rows)
        text = [*summary["problems"], f"{summary['ok']} of {found.rows} rows verify"]
        if found.missing:
            text.append(f"{found.missing} rows are still missing: the same {found.command} goes on")
        self.show(summary, "\n".join(text))
        return DAMAGED if summary["problems"] else DONE

    def _recomputed(self, path: Path, rows: int) -> dict[str, Any]:
        from tqdm import tqdm

        from ..deploy.job import recompute
        from ..deploy.runtime import Explainer

        explainer = Explainer(path, provider=self.provider)
        quiet = True if self.quiet or self.json else None
        differing = list(tqdm(recompute(self.path, explainer, rows), unit=" rows differ", disable=quiet))
        about = {"provider": explainer.provider_name, "precision": explainer.about.precision}
        return {"ok": rows - len(differing), "bad": len(differing), "problems": differing, **about}

    def _explainer(self) -> int:
        from ..deploy.job import selftest
        from ..deploy.runtime import Explainer

        if self.onnx is not None:
            raise RequestError(f"--onnx recomputes a store: give its directory in place of {self.path}")
        explainer = Explainer(self.path, provider=self.provider)
        rows, problems = selftest(explainer)
        summary: dict[str, Any] = {
            "rows": rows,
            "ok": rows - len(problems),
            "bad": len(problems),
            "duplicates": 0,
        }
        summary |= {"problems": problems, "provider": explainer.provider_name}
        summary |= {"precision": explainer.about.precision}
        self.show(summary, "\n".join([*problems, f"{summary['ok']} of {rows} pictures verify"]))
        return DAMAGED if problems else DONE
