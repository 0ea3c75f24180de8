"""scripts/densepose_boxes.py: surfaces in detected and in annotated boxes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from detectron2.data import DatasetCatalog

from d2ext.testing import tiny_config

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/densepose_boxes.py"


def test_rows(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("densepose_boxes", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    cfg = tiny_config("DensePose")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.INPUT.MIN_SIZE_TEST = 200  # boxes are given in pixels of another size
    cfg.DATASETS.TEST = ("shapes_val_bodies",)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DENSEPOSE_EVALUATION.GPS_K = 0.255
    rows = module.compare(cfg, 3)
    names = ("detected boxes", "annotated boxes")
    assert [row[0] for row in rows] == [n + x for n in names for x in ("", ", mean body")]
    # The random model finds nobody, and the mean body some of them, in their boxes.
    assert rows[3][2] > 10 and rows[3][2] > rows[1][2]
    (first, *_) = module.annotated(DatasetCatalog.get("shapes_val_bodies")[0]).pred_boxes
    assert (first[2:] > first[:2]).all()
