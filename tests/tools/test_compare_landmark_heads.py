"""tools/compare_landmark_heads.py trains, evaluates, and writes what it says."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2ext.config import ConfigError
from d2ext.data.shapes import ShapesSet, register_shapes

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_landmark_heads.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("d2ext_compare_landmark_heads", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small_data():
    """``few_train_*`` and ``few_val_*`` of `shapes`."""
    names = [
        name
        for split, num in (("train", 3), ("val", 4))
        for name in register_shapes(ShapesSet(split, num, 128, 128, seed=5), prefix="few")
    ]
    yield
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def options(folder: Path) -> list[str]:
    return [
        *("--output-dir", str(folder), "--iterations", "3", "--evaluations", "2"),
        *("--images", "3", "--threads", "1", "--opts"),
        *("DATASETS.TRAIN", "('few_train_landmarks',)", "DATASETS.TEST", "('few_val_landmarks',)"),
        *("SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.NEWELL_HOURGLASS.CHANNELS", "8"),
        *("MODEL.NEWELL_HOURGLASS.STEM_CHANNELS", "[8,8,8]"),
    ]


def test_comparison(tool, small_data, tmp_path, capsys):
    page = tmp_path / "docs" / "heads.md"
    page.parent.mkdir()
    page.write_text(f"before\n{tool.START}\nold\n{tool.END}\nafter\n")
    plots = importlib.util.find_spec("matplotlib") is not None
    heads = ["heatmap_gaussian", "heatmap_cauchy", "regression"]
    arguments = ["--heads", *heads, *options(tmp_path), "--docs", str(page)]
    if not plots:
        arguments.insert(0, "--no-plots")
    assert tool.main(arguments) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert [r["head"] for r in report["heads"]] == heads
    assert report["images"] == 3 and report["iterations"] == 3
    for result in report["heads"]:
        assert [p["iteration"] for p in result["curve"]] == [1, 3]
        assert 0 < result["curve"][0]["seconds"] < result["curve"][1]["seconds"]
        assert len(result["errors"]) == report["instances"] > 0
        assert result["nme"] == pytest.approx(np.mean(result["errors"]), abs=1e-3)
        # The last point of the curve is the model that is left.
        assert result["curve"][-1]["nme"] == pytest.approx(result["nme"])
        shares = [row["share"] for row in result["occlusion"] if row["kind"] == "painted"]
        assert shares == list(tool.CUTOUTS)
        painted = [row["nme"] for row in result["occlusion"] if row["kind"] == "painted"]
        assert painted[0] == pytest.approx(result["nme"]) and len(set(painted)) > 1
    rows = list(csv.DictReader((tmp_path / "occlusion.csv").open()))
    assert {row["kind"] for row in rows} == {"natural", "painted"}
    assert len(list(csv.DictReader((tmp_path / "curve.csv").open()))) == 6
    table = (tmp_path / "table.md").read_text()
    assert "heat maps, Cauchy" in table and table.count("\n") == 5
    assert table in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert table in text and "3 iterations of 2 crops" in text
    if plots:
        for name in ("time", "occlusion", "targets"):
            assert (tmp_path / f"{name}.png").stat().st_size > 5000
            assert f"images/landmark_heads_{name}.png" in text
            assert (page.parent / f"images/landmark_heads_{name}.png").exists()


def test_errors_fall_where_a_model_is_right(tool, small_data):
    """A model that returns the truth has error 0, one that is off by a pixel has a known error."""
    cfg = tool.head_config("regression", tool.build_parser().parse_args([]))
    cfg.DATASETS.TEST = ("few_val_landmarks",)
    validation = tool.Validation(cfg, tool.ImageCache(1 << 30), 4)
    truth = iter(validation.evaluator.annotations)

    class Answer(torch.nn.Module):
        def forward(self, inputs):
            results = []
            for one in inputs:
                points = [next(truth)["keypoints"] for _ in one["instances"].instance_ids]
                output = Instances((128, 128), instance_ids=one["instances"].instance_ids)
                output.pred_keypoints = torch.tensor(points).reshape(len(points), -1, 3)
                output.pred_keypoints[..., 0] += 1
                results.append({"instances": output})
            return results

    errors = validation.errors(Answer())
    sides = [np.sqrt(a["area"]) for a in validation.evaluator.annotations]
    np.testing.assert_allclose(errors, 100 / np.array(sides), rtol=1e-4)


def test_painted_share(tool):
    instances = Instances((100, 100))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 20, 90, 80]]))
    instances.instance_ids = torch.tensor([3])
    one = {"image": torch.zeros(3, 100, 100, dtype=torch.uint8) + 7, "instances": instances}
    places = set()
    for image_id in range(5):
        one["image_id"] = image_id
        painted = tool.paint_over(one, 0.25)["image"]
        assert painted.equal(tool.paint_over(one, 0.25)["image"])
        changed = (painted != 7).any(0)
        ys, xs = changed.nonzero().unbind(1)
        assert changed.sum() == (xs.max() - xs.min() + 1) * (ys.max() - ys.min() + 1)
        assert abs(int(changed.sum()) - 0.25 * 80 * 60) < 100
        assert xs.min() >= 10 and xs.max() < 90 and ys.min() >= 20 and ys.max() < 80
        places.add(int(xs.min()))
    assert len(places) > 2 and (one["image"] == 7).all()


def test_curve_is_denser_at_the_start(tool):
    found = tool.evaluated_iterations(800, 8)
    assert found[-1] == 800 and len(found) == 8
    assert (np.diff(np.diff(found)) >= -1).all()
    assert tool.evaluated_iterations(2, 8) == [1, 2]


def test_wrong_use(tool, tmp_path, monkeypatch, capsys):
    assert tool.main(["--iterations", "0"]) == 2
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert tool.main(["--output-dir", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()  # before anything is trained
    (tmp_path / "page.md").write_text("no markers")
    report = {"heads": [], **dict.fromkeys(("iterations", "batch", "seed", "instances"), 1)}
    report |= {"images": 1, "torch": "", "device": "", "threads": 1, "minutes": 1.0}
    with pytest.raises(ConfigError, match="has no lines"):
        tool.write_docs(tmp_path / "page.md", tmp_path, report, [])
