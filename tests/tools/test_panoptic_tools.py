"""The command line with panoptic data: own files, --analyze, and the comparison of two models."""

from __future__ import annotations

import csv
import importlib.util
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.shapes import ShapesSet, register_shapes
from tests.data.panoptic_files import write_panoptic

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BASELINE = "baselines/panoptic_fpn_shapes.yaml"
# Two iterations of two images.
QUICK = [
    *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "MODEL_EMA.ENABLED", "False"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    train_net = load_tool("train_net")
    files = own_files(tmp_path)
    common = ["--config-file", BASELINE, "--dataset", prefix, *files]
    options = [*QUICK, "OUTPUT_DIR", str(tmp_path / "run")]
    assert train_net.run([*common, *options]) == 0
    assert not (tmp_path / "run/inference/analysis").exists()
    assert train_net.run([*common, "--eval-only", "--analyze", "--resume", *options]) == 0
    folder = tmp_path / "run/inference/analysis"
    with (folder / "images.csv").open() as file:
        assert {row["image_id"] for row in csv.DictReader(file)} == {"10", "11"}
    assert len(list((folder / "worst").glob("*.png"))) == 2

    capsys.readouterr()
    wrong = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"]
    assert train_net.run([*common, *options, *wrong]) == 2
    assert "SEM_SEG_HEAD.NUM_CLASSES to 3" in capsys.readouterr().err
    instances = [
        "--config-file",
        BASELINE,
        "--analyze",
        *options,
        "DATASETS.TEST",
        "('shapes_val',)",
    ]
    assert train_net.run(instances) == 2
    assert "There is no analysis of data set 'shapes_val'" in capsys.readouterr().err


def test_full_label_maps_are_drawn_by_their_own_names(prefix: str, tmp_path: Path) -> None:
    visualize_data = load_tool("visualize_data")
    (name,) = (n for n in register_shapes(ShapesSet("train", 3, 64, 64), prefix) if "panoptic" in n)
    arguments = ["--config-file", BASELINE, "--output-dir", str(tmp_path / "out"), "--num", "2"]
    arguments += ["DATASETS.TRAIN", f"('{name}',)", "INPUT.SEM_SEG_WITH_THINGS", "True"]
    assert visualize_data.main(arguments) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    cfg = visualize_data.setup(visualize_data.build_parser().parse_args(arguments))
    full = visualize_data.metadata_of(cfg, "loader")
    assert full.stuff_classes[0] == "sky" and full.stuff_classes[-1] == "figure"
    assert len(full.stuff_colors) == 14
    assert visualize_data.metadata_of(cfg, "annotation").stuff_classes[0] == "things"


def test_comparison(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    compare = load_tool("compare_panoptic")
    for split, count in (("train", 6), ("val", 3)):
        register_shapes(ShapesSet(split, count, 64, 64), prefix)
    arguments = ["--output", str(tmp_path), "--opts", *QUICK]
    for key, split in (("TRAIN", "train"), ("TEST", "val")):
        arguments += [f"DATASETS.{key}", f"('{prefix}_{split}_panoptic',)"]
    assert compare.main(arguments) == 0
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert list(rows) == [
        "Panoptic FPN",
        "UPSNet, merged by rules",
        "UPSNet, panoptic head",
    ]
    for name, row in rows.items():
        assert {"PQ", "SQ_th", "RQ_st", "mask_AP", "mIoU"} <= set(row)
        assert 0 <= row["PQ"] <= 100 and row["training_seconds"] > 0
        assert name in output
    # The same trained heads: what does not depend on the merging is the same.
    merged, unified = (rows[name] for name in list(rows)[1:])
    assert merged["mask_AP"] == unified["mask_AP"] and merged["mIoU"] == unified["mIoU"]
    assert "PQ things" in output and "panoptic head gains" in output
    # Again: nothing is trained a second time.
    stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("model_final.pth"))]
    assert len(stamps) == 2 and compare.main(arguments) == 0
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("model_final.pth"))] == stamps
    again = json.loads((tmp_path / "comparison.json").read_text())
    assert again["Panoptic FPN"]["training_seconds"] == rows["Panoptic FPN"]["training_seconds"]

    assert compare.main(["--output", str(tmp_path), "--baseline", "no_such.yaml"]) == 2
    assert "no config file" in capsys.readouterr().err


def test_unequal_budgets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    compare = load_tool("compare_panoptic")
    base = TOOLS.parent / "configs" / BASELINE
    longer = tmp_path / "longer.yaml"
    longer.write_text(f'_BASE_: "{base}"\nSOLVER:\n  MAX_ITER: 100000\n')
    arguments = ["--output", str(tmp_path / "out"), "--baseline", str(longer)]
    assert compare.main(arguments) == 2
    assert "SOLVER.MAX_ITER is 100000 for one" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pth"))
