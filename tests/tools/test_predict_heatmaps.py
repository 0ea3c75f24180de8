"""`d2ext predict` --draw heatmaps, and the drawing of maps and points."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from d2ext.testing import tiny_config
from d2ext.tools import predict
from d2ext.utils.drawing import PictureDrawer, VideoDrawer
from d2ext.utils.heatmaps import COLORS, SeesHeatmaps, draw_points, overlay_heatmaps


def _config(folder: Path, architecture: str) -> str:
    cfg = tiny_config(architecture)
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = (), ()
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "config.yaml")


def test_maps_colour_the_image() -> None:
    image = np.full((4, 6, 3), 100, np.uint8)
    heat = torch.zeros(4, 6)
    heat[1, 2] = 1.0
    picture = overlay_heatmaps(image, {"centers": heat, "strange": torch.zeros(4, 6)})
    assert tuple(picture[1, 2]) == COLORS["centers"]
    picture[1, 2] = picture[0, 0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1 and (image == 100).all()
    with pytest.raises(ValueError, match="'centers'"):
        overlay_heatmaps(image, {"centers": torch.zeros(4, 5)})


def test_points_are_marked() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    found = Instances((200, 200))
    found.pred_boxes = Boxes(torch.tensor([[20.0, 30.0, 150.0, 170.0]]))
    assert (draw_points(image, found) == image).all()
    found.centers = torch.tensor([[85.0, 100.0]])
    assert tuple(draw_points(image, found)[100, 85]) == COLORS["centers"]
    found.top_left_scores = found.bottom_right_scores = torch.ones(1)
    found.pred_keypoints = torch.tensor([[[60.0, 70.0, 1.0], [float("nan"), 1e30, 1.0]]])
    picture = draw_points(image, found)
    assert tuple(picture[30, 20]) == COLORS["top_left"]
    assert tuple(picture[170, 150]) == COLORS["bottom_right"]
    assert tuple(picture[70, 60]) == COLORS["joints"]


@pytest.mark.parametrize("drawer", [PictureDrawer, VideoDrawer])
def test_drawers_take_maps(drawer: type[PictureDrawer]) -> None:
    image = np.full((40, 60, 3), 90, np.uint8)
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 20.0, 20.0]]))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    found.centers = torch.tensor([[50.0, 30.0]])
    heat = torch.zeros(40, 60)
    heat[35, 5] = 1.0
    metadata = Metadata(name="test", thing_classes=["a"])
    output = {"instances": found}
    plain = drawer(metadata)(image, output)
    both = drawer(metadata)(image, output | {"heatmaps": {"centers": heat}})
    # BGR
    assert tuple(both[35, 5]) == tuple(both[30, 50]) == COLORS["centers"][::-1]
    assert tuple(plain[35, 5]) == (90, 90, 90)


def test_demo_draws_heatmaps(tmp_path: Path) -> None:
    config = _config(tmp_path, "CenterNet")
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    pictures = {}
    for draw in ("results", "heatmaps"):
        arguments = ["--config-file", config, "--input", str(tmp_path / "a.png"), "--draw", draw]
        arguments += ["--output", str(tmp_path / draw), "--confidence-threshold", "0"]
        torch.manual_seed(0)  # of the random weights
        assert predict.run(arguments) == 0
        pictures[draw] = cv2.imread(str(tmp_path / draw / "a.png"))
    assert pictures["heatmaps"].shape == image.shape
    assert (pictures["heatmaps"] != pictures["results"]).mean() > 0.5
    # The results are the same, whatever is drawn.
    texts = [(tmp_path / d / "coco_results.json").read_text() for d in pictures]
    assert texts[0] == texts[1]


def test_a_model_without_maps_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path, "YOLACT")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 20, 3), np.uint8))
    arguments = ["--config-file", config, "--input", str(tmp_path / "a.png"), "--draw", "heatmaps"]
    assert predict.run([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "YOLACT has no heat maps" in capsys.readouterr().err


class OnePeak(nn.Module):
    """Maps with a peak in one cell."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = (side // 4 for side in images.shape[-2:])
        maps = {
            name: torch.zeros(len(images), channels, height, width)
            for name, channels in (("heatmap", 3), ("size", 2), ("joints", 6), ("joint_heatmap", 3))
        }
        maps["offset"] = torch.full((len(images), 2, height, width), 0.5)
        maps["heatmap"] -= 9
        maps["joint_heatmap"] -= 9
        maps["heatmap"][:, 1, 9, 14] = 3.0
        maps["joint_heatmap"][:, 2, 8, 12] = 3.0
        return maps


@pytest.mark.parametrize("fixed", [False, True])
def test_heatmaps_lie_on_the_image(fixed: bool) -> None:
    """The peak of a map is where the detection is, at the size of the output."""
    cfg = tiny_config("CenterNet")
    cfg.MODEL.CENTERNET.TEST.KEEP_RESOLUTION = not fixed
    cfg.MODEL.CENTERNET.TEST.INPUT_SIZE = [96, 96]
    model = build_model(cfg).eval()
    assert isinstance(model, SeesHeatmaps)
    model.inference_network.network = OnePeak()
    image = torch.zeros(3, 70, 100, dtype=torch.uint8)
    for size in ((70, 100), (140, 300)):
        inputs = [{"image": image, "height": size[0], "width": size[1]}, {"image": image}]
        maps = model.heatmaps(inputs)
        assert [set(m) for m in maps] == [{"centers", "joints"}] * 2
        assert maps[0]["joints"].shape == size and maps[1]["joints"].shape == (70, 100)
        heat = maps[0]["centers"]
        x, y = model(inputs)[0]["instances"].centers[0].tolist()
        rows, columns = (heat > 0.5 * heat.max()).nonzero().float().mean(dim=0).tolist()
        assert abs(columns + 0.5 - x) <= size[1] / 100 and abs(rows + 0.5 - y) <= size[0] / 70
        # bilinear: the nearest pixels lie an eighth of a cell beside its middle
        assert 0.7 < heat.max() < 0.96
