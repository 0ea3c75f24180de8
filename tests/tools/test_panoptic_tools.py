"""The command line with panoptic data: own files and --analyze."""

from __future__ import annotations

import csv
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.shapes import ShapesSet, register_shapes
from d2ext.tools import train, visualize_data
from tests.data.panoptic_files import write_panoptic

BASELINE = "baselines/panoptic_fpn_shapes.yaml"
# Two iterations of two images.
QUICK = [
    *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "MODEL_EMA.ENABLED", "False"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
]


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh name; what gets registered under it is removed again."""
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    prefix = f"test_tools_{uuid.uuid4().hex}"
    yield prefix
    for name in DatasetCatalog.list():
        if name.startswith(prefix):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


def own_files(folder: Path) -> list[str]:
    arguments = []
    for split in ("train", "val"):
        write_panoptic(folder / split, 2)
        arguments += [f"--{split}-panoptic-json", str(folder / split / "panoptic.json")]
        arguments += [f"--{split}-panoptic-root", str(folder / split / "panoptic")]
        arguments += [f"--{split}-images", str(folder / split / "images")]
    return arguments


def test_own_panoptic_data_from_the_command_line(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = own_files(tmp_path)
    common = ["--config-file", BASELINE, "--dataset", prefix, *files]
    options = [*QUICK, "OUTPUT_DIR", str(tmp_path / "run")]
    assert train.run([*common, *options]) == 0
    assert not (tmp_path / "run/inference/analysis").exists()
    assert train.run([*common, "--eval-only", "--analyze", "--resume", *options]) == 0
    folder = tmp_path / "run/inference/analysis"
    with (folder / "images.csv").open() as file:
        assert {row["image_id"] for row in csv.DictReader(file)} == {"10", "11"}
    assert len(list((folder / "worst").glob("*.png"))) == 2

    capsys.readouterr()
    wrong = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"]
    assert train.run([*common, *options, *wrong]) == 2
    assert "SEM_SEG_HEAD.NUM_CLASSES to 3" in capsys.readouterr().err
    instances = [
        "--config-file",
        BASELINE,
        "--eval-only",
        "--analyze",
        *options,
        "DATASETS.TEST",
        "('shapes_val_faces',)",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "1",
    ]
    assert train.run(instances) == 2
    assert "There is no analysis of data set 'shapes_val_faces'" in capsys.readouterr().err


def test_full_label_maps_are_drawn_by_their_own_names(prefix: str, tmp_path: Path) -> None:
    (name,) = (n for n in register_shapes(ShapesSet("train", 3, 64, 64), prefix) if "panoptic" in n)
    arguments = ["--config-file", BASELINE, "--output-dir", str(tmp_path / "out"), "--num", "2"]
    arguments += ["DATASETS.TRAIN", f"('{name}',)", "INPUT.SEM_SEG_WITH_THINGS", "True"]
    assert visualize_data.run(arguments) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    cfg = visualize_data.setup(visualize_data.build_parser().parse_args(arguments))
    full = visualize_data.metadata_of(cfg, "loader")
    assert full.stuff_classes[0] == "sky" and full.stuff_classes[-1] == "figure"
    assert len(full.stuff_colors) == 14
    assert visualize_data.metadata_of(cfg, "annotation").stuff_classes[0] == "things"
