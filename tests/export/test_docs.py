"""The example of docs/export.md runs, where neither PyTorch nor d2ext can be imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

import d2ext
from d2ext.export import numpy_results
from tests.export.cases import HEIGHT, WIDTH, Exported

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
WITHOUT = (
    "import sys\nfor name in ('torch', 'd2ext', 'detectron2'):\n    sys.modules[name] = None\n"
)


def test_the_example_without_pytorch(
    tmp_path: Path, exported_case: Callable[[str], Exported]
) -> None:
    shutil.copy(exported_case("retinaface").path("onnx"), tmp_path / "faces.onnx")
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (example,) = re.findall(r"```python\n(import json.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 32
    (tmp_path / "example.py").write_text(WITHOUT + example)
    shutil.copy(numpy_results.__file__, tmp_path)
    command = [sys.executable, "example.py", "faces.onnx", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = np.array([line.split() for line in done.stdout.splitlines()], dtype=float)
    expected = d2ext.Predictor(str(tmp_path / "faces.onnx"))(image)["instances"]
    assert len(rows) == len(expected) > 0
    np.testing.assert_allclose(rows[:, :4], expected.pred_boxes.tensor, atol=0.06)
    np.testing.assert_allclose(rows[:, 4], expected.scores, atol=1e-4)
