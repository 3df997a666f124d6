"""The examples run, in small, and write what they say."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import one_thread as one_thread

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.filterwarnings("ignore:the masks")
def test_efforts_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "efforts.png"
    small = ["--scenes", "64", "--steps", "4", "--images", "2", "--out", str(picture)]
    monkeypatch.setattr(sys, "argv", ["efforts.py", *small])
    runpy.run_path(str(EXAMPLES / "efforts.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert all(effort in said for effort in ("fast", "refined", "minimal")) and "disjoint" in said
    width, height = Image.open(picture).size
    assert width > 4 * 256 and height > 2 * 256
