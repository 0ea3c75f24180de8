"""scripts/flow_errors.py on the real pair with known flow."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_errors_on_a_real_pair(
    real_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those of DIS and of no motion are what data/README.md says."""
    folder = real_data / "flow/RubberWhale"
    files = [str(folder / name) for name in ("frame10.png", "frame11.png", "flow10.flo")]
    picture = tmp_path / "flow.png"
    monkeypatch.setattr(sys, "argv", ["flow_errors.py", *files, "--picture", str(picture)])
    runpy.run_path(str(ROOT / "scripts/flow_errors.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[-2] for row in rows] == ["1.256", "0.226"]
    assert Image.open(picture).size == (4 * 584, 388)
