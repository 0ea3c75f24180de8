"""The predictors give what Detectron2's predictor gives for each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

import d2ext
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError
from d2ext.data.errors import ImageReadError
from d2ext.engine.predictor import BatchPredictor
from d2ext.testing import tiny_config


def with_weights(folder: Path) -> CfgNode:
    cfg = tiny_config("YOLACT")
    cfg.DATASETS.TEST = ()
    torch.save({"model": build_model(cfg).state_dict()}, folder / "weights.pth")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    return cfg


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("min_size", [0, 50])
@pytest.mark.parametrize("sizes", [((40, 60), (70, 30), (64, 64)), ((40, 60), (40, 60))])
def test_equals_detectron2_s_predictor(
    tmp_path: Path, channels: str, min_size: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    cfg = with_weights(tmp_path)
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = channels, min_size
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in sizes]
    one, several = DefaultPredictor(cfg), BatchPredictor(cfg)
    for image, output in zip(images, several(images), strict=True):
        actual, expected = output["instances"], one(image)["instances"]
        assert actual.image_size == image.shape[:2]
        assert len(actual) == len(expected) > 0
        torch.testing.assert_close(actual.scores, expected.scores, atol=1e-5, rtol=0)
        assert actual.pred_classes.tolist() == expected.pred_classes.tolist()
        assert torch.equal(actual.pred_masks, expected.pred_masks)
    assert several([]) == []
    sent = several.upload(images[:1])[0]["image"]
    if min_size == 0:
        order = images[0][:, :, ::-1] if channels == "RGB" else images[0]
        assert torch.equal(sent, torch.from_numpy(np.ascontiguousarray(order)).permute(2, 0, 1))
    else:
        assert tuple(sent.shape) == (3, 50, 75)


def test_wrong_images_and_weights_are_errors(tmp_path: Path) -> None:
    cfg = with_weights(tmp_path)
    predictor = BatchPredictor(cfg)
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="height x width x 3 bytes"):
            predictor([image])
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT"):
        BatchPredictor(cfg, predictor.model)
    cfg.INPUT.FORMAT, cfg.MODEL.YOLACT.NUM_CLASSES = "RGB", 4
    with pytest.raises(CheckpointError, match="class count"):
        BatchPredictor(cfg)


# One picture in every form in which people have it; the same 8-bit values in all.
PICTURE = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8), (60, 40)
)  # BGR
GREY = cv2.cvtColor(PICTURE, cv2.COLOR_BGR2GRAY)
ALPHA = np.full((40, 60, 1), 7, np.uint8)


def write(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def turned(path: Path) -> Path:
    """A file that is stored lying on its side, and says so in its EXIF block."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    stored = Image.fromarray(np.rot90(PICTURE[:, :, ::-1]))
    return write(path, stored, exif=exif)


KINDS = {
    "path": (lambda f: str(write(f / "a.png", Image.fromarray(PICTURE[:, :, ::-1]))), PICTURE),
    "Path, RGBA": (
        lambda f: write(f / "a.png", Image.fromarray(np.dstack([PICTURE[:, :, ::-1], ALPHA]))),
        PICTURE,
    ),
    "path, turned": (lambda f: turned(f / "a.png"), PICTURE),
    "path, 16-bit grey": (
        lambda f: write(f / "a.png", Image.fromarray(GREY.astype(np.uint16) * 257)),
        np.dstack([GREY] * 3),
    ),
    "Pillow": (lambda f: Image.fromarray(PICTURE[:, :, ::-1]), PICTURE),
    "Pillow, turned": (lambda f: Image.open(turned(f / "a.png")), PICTURE),
    "Pillow, RGBA": (
        lambda f: Image.fromarray(np.dstack([PICTURE[:, :, ::-1], ALPHA])),
        PICTURE,
    ),
    "Pillow, grey": (lambda f: Image.fromarray(GREY), np.dstack([GREY] * 3)),
    "Pillow, float": (
        lambda f: Image.fromarray(GREY.astype(np.float32) / 255),
        np.dstack([GREY] * 3),
    ),
    "array": (lambda f: PICTURE, PICTURE),
    "array, not contiguous": (lambda f: PICTURE[::-1][::-1], PICTURE),
    "array, grey": (lambda f: GREY, np.dstack([GREY] * 3)),
    "array, one channel": (lambda f: GREY[:, :, None], np.dstack([GREY] * 3)),
    "array, BGRA": (lambda f: np.dstack([PICTURE, ALPHA]), PICTURE),
    "array, 16-bit": (lambda f: PICTURE.astype(np.uint16) * 257, PICTURE),
    "array, 0..1": (lambda f: PICTURE / 255.0, PICTURE),
    "array, 0..255": (lambda f: PICTURE.astype(np.float32), PICTURE),
}


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> tuple[d2ext.Predictor, Any]:
    folder = tmp_path_factory.mktemp("model")
    cfg = with_weights(folder)
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = "RGB", 50
    (folder / "config.yaml").write_text(cfg.dump())
    return d2ext.Predictor(str(folder / "config.yaml"), cfg.MODEL.WEIGHTS), DefaultPredictor(cfg)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_what_detectron2_gives(
    predictors: tuple[d2ext.Predictor, Any], kind: str, tmp_path: Path
) -> None:
    make, picture = KINDS[kind]
    ours, detectron2 = predictors
    actual, expected = ours(make(tmp_path))["instances"], detectron2(picture)["instances"]
    assert actual.image_size == (40, 60) and len(actual) == len(expected) > 0
    torch.testing.assert_close(actual.scores, expected.scores, atol=1e-5, rtol=0)
    assert torch.equal(actual.pred_masks, expected.pred_masks)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "no such file"),
        (None, "NoneType is no path"),
        (torch.zeros(3, 8, 8), "Tensor is no path"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\(2, 4, 4, 3\)"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), -1.0), r"\[-1, -1\]; expected \[0, 1\] or \[0, 255\]"),
    ],
)
def test_what_is_no_image_is_one_clear_error(
    predictors: tuple[d2ext.Predictor, Any], image: Any, message: str
) -> None:
    with pytest.raises(ImageReadError, match=message):
        predictors[0](image)


def test_predictor_of_a_config_and_overrides(tmp_path: Path) -> None:
    cfg = with_weights(tmp_path)
    cfg.freeze()
    predictor = d2ext.Predictor(cfg, overrides=["MODEL.YOLACT.TEST.SCORE_THRESH", "0.99"])
    assert len(predictor(PICTURE)["instances"]) < len(d2ext.Predictor(cfg)(PICTURE)["instances"])
    with pytest.raises(ConfigError, match="no config file"):
        d2ext.Predictor("yolact/yolact_R_51_550.yaml")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        d2ext.Predictor(cfg, str(tmp_path / "none.pth"))
