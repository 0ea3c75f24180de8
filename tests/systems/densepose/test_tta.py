"""Test-time augmentation of DensePose against the published implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import RotationTransform
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fvcore.transforms.transform import TransformList
from torch import nn
from torch.nn import functional as F

from d2ext.codecs.densepose import ChartPredictions
from d2ext.config import ConfigError
from d2ext.data.densepose import SurfaceSymmetry
from d2ext.modeling.tta import build_tta
from d2ext.systems.densepose.tta import (
    GeneralizedRCNNWithTTA,
    mirror,
    published_unrotate,
    unrotate,
)
from d2ext.testing import random_inputs, tiny_config
from tests.reference.fixture import Fixture, draw_tensor
from tests.systems.densepose.published import REFERENCE

MAPS = ("coarse_segm", "fine_segm", "u", "v")


def _tables(seed: int) -> np.ndarray:
    drawn = [draw_tensor(f"uv_symmetry.{x}", (24, 256, 256), seed) for x in "UV"]
    return np.clip(np.float32(0.5) + np.float32(0.25) * np.stack(drawn), 0, 1)


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture(REFERENCE / "tta_merge")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[CfgNode, nn.Module]:
    """A model, and a config for its augmentation as in the fixture."""
    path = tmp_path_factory.mktemp("tables") / "tables.npz"
    u, v = _tables(21)
    np.savez(path, U_transforms=u, V_transforms=v)
    MetadataCatalog.get("densepose_tta_test").set(densepose_uv_symmetry=str(path))
    cfg = tiny_config("DensePose")
    cfg.DATASETS.TEST = ("densepose_tta_test",)
    aug = cfg.TEST.AUG
    aug.ENABLED, aug.FLIP, aug.MIN_SIZES, aug.MAX_SIZE = True, True, (96, 120), 200
    aug.ROTATION_ANGLES = [15]
    torch.manual_seed(0)
    return cfg, build_model(cfg).eval()


def _drawn(fixture: Fixture, k: int) -> ChartPredictions:
    maps = {}
    for name, channels in fixture.manifest["inputs"]["predictor_outputs"]["channels"].items():
        x = draw_tensor(f"augmented{k}.{name}", (3, channels, 14, 14), 21)
        if name in "uv":
            x = np.float32(0.5) + np.float32(0.4) * x
        maps[name] = torch.from_numpy(x)
    return ChartPredictions(**maps)


def _wrapper(tiny: tuple[CfgNode, nn.Module], **keys: Any) -> GeneralizedRCNNWithTTA:
    cfg = tiny[0].clone()
    for key, value in keys.items():
        cfg.MODEL.ROI_DENSEPOSE_HEAD[key] = value
    wrapper = build_tta(cfg, tiny[1])
    assert isinstance(wrapper, GeneralizedRCNNWithTTA)
    return wrapper


def _merge(fixture: Fixture, wrapper: GeneralizedRCNNWithTTA) -> ChartPredictions:
    inputs, expected = fixture.manifest["inputs"], fixture.expected
    height, width = inputs["original_image_hw"]
    image = torch.zeros(3, *inputs["input_image_hw"], dtype=torch.uint8)
    images, transforms = wrapper._get_augmented_inputs(
        {"image": image, "height": height, "width": width}
    )
    sizes = [list(x["image"].shape[1:]) for x in images]
    assert sizes == [x["image_hw"] for x in inputs["augmented_images"]]
    merged = Instances((height, width), pred_boxes=Boxes(inputs["boxes_in_original_image"]))
    merged.pred_classes, merged.scores = torch.zeros(3), torch.ones(3)
    outputs = wrapper._rescale_detected_boxes(images, merged, transforms)
    for k, output in enumerate(outputs):
        boxes = output.pred_boxes.tensor
        np.testing.assert_allclose(boxes, expected[f"augmented{k}.boxes"], atol=1e-4)
        output.pred_densepose = _drawn(fixture, k)
    matrix = transforms[4].transforms[-1].rm_image
    np.testing.assert_allclose(matrix, expected["rotation4.matrix"], atol=1e-4)
    return wrapper.merge(outputs, transforms, merged.pred_boxes.tensor)


def test_merged_as_published(fixture: Fixture, tiny: tuple[CfgNode, nn.Module]) -> None:
    keys = {"PUBLISHED_TTA_CONFIDENCES": True, "PUBLISHED_TTA_ROTATION": True}
    merged = _merge(fixture, _wrapper(tiny, **keys))
    errors = {name: fixture.compare(f"merged.{name}", x) for name, x in merged.maps().items()}
    assert errors.keys() == {*MAPS, "sigma_2"} and max(errors.values()) < 1e-5, errors


def test_mirrored_as_published(fixture: Fixture) -> None:
    found = mirror(_drawn(fixture, 1), SurfaceSymmetry(torch.from_numpy(_tables(21))))
    for name in MAPS:
        assert fixture.compare(f"unflipped1.{name}", getattr(found, name)) < 1e-6
    # Published: only mirrored; ours changes the parts' channels, too.
    published = fixture.expected["unflipped1.sigma_2"]
    assert np.array_equal(found.sigma_2[:, 3], published[:, 4])
    assert np.array_equal(found.sigma_2[:, 1], published[:, 1])


def test_without_published_faults(fixture: Fixture, tiny: tuple[CfgNode, nn.Module]) -> None:
    merged = _merge(fixture, _wrapper(tiny))
    assert fixture.compare("merged.sigma_2", merged.sigma_2) > 0.1
    assert 0.01 < fixture.compare("merged.fine_segm", merged.fine_segm) < 0.5


@pytest.mark.parametrize("angle", [15, -45, 90])
def test_unrotated_maps_lie_where_they_were(tiny: tuple[CfgNode, nn.Module], angle: int) -> None:
    """A map whose values are places in the picture says so again after the rotation."""
    wrapper = _wrapper(tiny)
    wrapper.tta_mapper.angles = [angle]
    image = torch.zeros(3, 90, 128, dtype=torch.uint8)
    _, transforms = wrapper._get_augmented_inputs({"image": image, "height": 90, "width": 128})
    boxes = torch.tensor([[30.0, 20.0, 90.0, 50.0], [50.0, 10.0, 70.0, 80.0]])
    rotated = torch.from_numpy(transforms[-1].apply_box(boxes.numpy())).float()

    def places(x: torch.Tensor, back: bool) -> torch.Tensor:
        steps = (torch.arange(28) + 0.5) / 28
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
        points = x[:, None, None, :2] + grid * (x[:, 2:] - x[:, :2])[:, None, None]
        if back:
            flat = transforms[-1].inverse().apply_coords(points.reshape(-1, 2).numpy())
            points = torch.from_numpy(flat).float().reshape(points.shape)
        return points.permute(0, 3, 1, 2)

    maps = places(rotated, back=True)
    predictions = ChartPredictions(maps, maps, maps, maps)
    found = unrotate(predictions, transforms[-1], boxes, rotated).u
    error = (found - places(boxes, back=False)).abs()
    # RotationTransform.inverse() itself is off by half a pixel; at the borders, half a cell.
    assert error[:, :, 2:-2, 2:-2].max() < 1.0 and error.max() < 2.5


def _quarter(angle: int) -> TransformList:
    """A turn of a picture 40 high and 60 wide."""
    return TransformList([RotationTransform(40, 60, angle, expand=True)])


@pytest.mark.parametrize("angle", [90, -90])
@pytest.mark.parametrize("published", [False, True])
def test_a_quarter_turn_is_undone_exactly(angle: int, published: bool) -> None:
    """Of boxes of whole pixels, 12 x 20 and 24 x 6 when turned; nothing is sheared."""
    turn = _quarter(angle)
    boxes = torch.tensor([[10.0, 8.0, 30.0, 20.0], [5.0, 4.0, 11.0, 28.0]])
    rotated = torch.from_numpy(turn.apply_box(boxes.numpy())).round()
    maps = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    predictions = ChartPredictions(maps, maps, maps, maps)
    if published:
        found = published_unrotate(predictions, turn, rotated.float()).u
        pixels = [(20, 12), (6, 24)]
    else:
        found = unrotate(predictions, turn, boxes, rotated.float()).u
        pixels = [(6, 6)] * 2
    for one, x, size in zip(found, maps, pixels, strict=True):
        back = _resize(x, size).rot90(-1 if angle > 0 else 1, (-2, -1))
        torch.testing.assert_close(one, _resize(back, (6, 6)), atol=1e-5, rtol=0)


def _resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("angle", [15, -12])
def test_published_boxes_before_a_rotation(angle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """h = H|cos| + W|sin|, w = W|cos| + H|sin| about the centre turned back, corners cut to whole
    pixels, half the difference on both sides, rounded down (NOTES.md, *Test-time augmentation*)."""
    rng = np.random.default_rng(0)
    corner, sides = rng.integers(0, 20, (40, 2)), rng.integers(10, 36, (40, 2))
    boxes = np.concatenate([corner, corner + sides], axis=1)
    sizes = []

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(list(x.shape[:-3:-1]))  # w, h
        return interpolate(x, *args, **kwargs)

    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", spy)
    turn, maps = _quarter(angle), torch.rand(40, 2, 4, 4)
    predictions = ChartPredictions(maps, maps, maps, maps)
    published_unrotate(predictions, turn, torch.from_numpy(boxes).float())
    c, s = abs(np.cos(np.radians(angle))), abs(np.sin(np.radians(angle)))
    before = np.linalg.solve([[c, s], [s, c]], sides.T).T
    center = turn.transforms[0].inverse().apply_coords(boxes.reshape(-1, 2, 2).mean(axis=1))
    whole = np.trunc(center + before / 2) - np.trunc(center - before / 2)
    expected = sides + 2 * np.floor((whole - sides) / 2)
    # The second resize of each box of the first map is from the box before the rotation.
    assert sizes[1:80:2] == expected.tolist()


def test_a_model_predicts(tiny: tuple[CfgNode, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, inputs = _wrapper(tiny), random_inputs(2)
    wrapper.tta_mapper.min_sizes = (48,)
    inputs[0].update(height=90, width=120)
    inputs[1]["image"] = torch.zeros_like(inputs[1]["image"])
    calls, predict = [], tiny[1].roi_heads.predict
    monkeypatch.setattr(
        tiny[1].roi_heads, "predict", lambda *args: calls.append(args) or predict(*args)
    )
    results = wrapper(inputs)
    assert len(calls) == 2  # once an image: for the merged boxes, of its three views
    wrapper.tta_mapper.angles = []
    for x, result, straight in zip(inputs, results, wrapper(inputs), strict=True):
        found = result["instances"]
        # Boxes do not come from rotated images.
        assert torch.equal(found.pred_boxes.tensor, straight["instances"].pred_boxes.tensor)
        assert found.image_size == (x["height"], x["width"])
        assert len(found) == len(found.pred_densepose) > 0
    assert tiny[1].roi_heads.densepose_on


def test_what_cannot_be_is_named(tiny: tuple[CfgNode, nn.Module], tmp_path: Path) -> None:
    cfg, model = tiny[0].clone(), tiny[1]
    wrapper = _wrapper(tiny, PUBLISHED_TTA_ROTATION=True)
    wrapper.tta_mapper.angles = [45]
    with pytest.raises(ConfigError, match="45"):
        wrapper(random_inputs(1))
    cfg.DATASETS.TEST = ("densepose_tta_test_without_tables",)
    with pytest.raises(ConfigError, match="densepose_uv_symmetry"):
        build_tta(cfg, model)
    cfg.MODEL.ROI_DENSEPOSE_HEAD.PREDICTOR_NAME = "DensePoseEmbeddingPredictor"
    with pytest.raises(ConfigError, match="embeddings"):
        build_tta(cfg, model)
    cfg.TEST.AUG.ENABLED = False
    assert build_tta(cfg, model) is model
