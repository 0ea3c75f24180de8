"""docs/notebooks: their cells run one after the other, here with fewer iterations and images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.shapes import ShapesSet, register_shapes

FILE = Path(__file__).resolve().parents[2] / "docs/notebooks/first_steps.ipynb"


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    for split, number in (("train", 8), ("val", 3)):
        register_shapes(ShapesSet(split, number, 160, 160), "notebook")
    yield {"__name__": "__main__"}
    for name in [x for x in DatasetCatalog.list() if x.startswith("notebook_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
    matplotlib.pyplot.close("all")


def test_first_steps(scope: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    cells = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10 and not any(cell.get("outputs") for cell in cells)
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        for long, short in (("ITERATIONS = 920", "ITERATIONS = 2"), ('"shapes_', '"notebook_')):
            source = source.replace(long, short)
        for _ in range(1 if "trainer.train" in source else 2):  # as people do
            exec(compile(source, cell["id"], "exec"), scope)
    assert set(scope["results"]) == {"bbox", "segm"}
    assert len(scope["lines"]) == 2 and scope["VAL"] == "notebook_val_rle"
    assert scope["picture"].shape == scope["image"].shape == (160, 160, 3)
    assert re.search(r"^segm \{'AP': ", capsys.readouterr().out, flags=re.MULTILINE)
    assert os.path.isfile("output/notebook/model_final.pth")
