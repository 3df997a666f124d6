"""Jobs in processes of their own, and what ends those in the middle of anything."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from minexp.data.store import read_store, verify_store

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Chaos:
    """SIGKILLs that a job's processes give themselves and their parent, so that no clock and no load decides how many.

    folder: has a file for each that was given, and the parent's number; count: of them in all, one in ``parents`` to
    the parent. A process lives for a random number of batches, one at least and ``life`` on average; the end comes at
    any moment of one.
    """

    folder: str
    count: int
    parents: int = 5
    life: float = 3.0

    def batch(self) -> None:
        """A batch begins."""
        global _lives
        if _lives is None:
            _lives = 1 + int(random.expovariate(1 / (self.life - 1)))
        _lives -= 1
        if _lives == -1:
            threading.Timer(random.uniform(0, 0.06), self._strike).start()

    def _strike(self) -> None:
        for number in range(self.count):
            try:
                (Path(self.folder) / f"kill-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            to_parent = number % self.parents == self.parents // 2  # the last ones are to workers
            os.kill(
                int((Path(self.folder) / "parent").read_text()) if to_parent else os.getpid(), signal.SIGKILL
            )
            return

    @property
    def given(self) -> int:
        return len(list(Path(self.folder).glob("kill-*")))


_lives: int | None = None  # batches this process has left


def start(data: Path, out: Path, script: str = "stub_job.py", **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(HERE / script), str(data), str(out), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def survive(
    chaos: Chaos, data: Path, out: Path, script: str = "stub_job.py", **options: Any
) -> dict[str, Any]:
    """Give a job again and again until it ends by itself: its summary, with how often it was begun."""
    Path(chaos.folder).mkdir()
    for begun in range(1, chaos.count + 2):
        job = start(data, out, script, chaos=[*astuple(chaos)], **options)
        (Path(chaos.folder) / "parent").write_text(str(job.pid))
        stdout, stderr = job.communicate(timeout=600)
        if job.returncode != -signal.SIGKILL:
            assert job.returncode == 0, stderr
            return json.loads(stdout.splitlines()[-1]) | {"begun": begun}  # Ray's own words come before
        if out.exists() and any(out.glob("shards*.jsonl")):
            assert verify_store(out) == []
    raise AssertionError("killed more often than asked for")


def wait_for(out: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not any(out.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(one: Path, other: Path) -> bool:
    """Row for row, and both whole."""
    assert verify_store(one) == verify_store(other) == []
    tables = [read_store(out).drop_columns(["ms"]) for out in (one, other)]
    return bool(tables[0].equals(tables[1]))
