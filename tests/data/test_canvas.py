"""CornerNet's crop, padding and mirror: pixels, masks, polygons, boxes and keypoints move together."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.structures import polygons_to_bitmask

from d2ext.config import get_cfg
from d2ext.data import build_augmentations
from d2ext.data.augmentations.affine import PixelMirrorTransform
from d2ext.data.augmentations.canvas import (
    CanvasCropTransform,
    RandomCanvasCrop,
    RandomPixelMirror,
    SquareCanvas,
)
from d2ext.data.augmentations.geometry import random_center
from d2ext.data.augmentations.resize import ResizeToSquare
from d2ext.model_zoo import get_config
from tests.data.scenes import COLORS, iou, object_at, paint_scene
from tests.data.test_augmentations import augment, transformed

AUGMENTATIONS = {
    "crop": RandomCanvasCrop(size=150, scales=(0.6, 0.9, 1.3), border=40),
    "square": SquareCanvas(),
    "mirror": RandomPixelMirror(1.0),
    "everything": [
        RandomCanvasCrop(size=151, border=30),
        ResizeToSquare(180),
        RandomPixelMirror(),
    ],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_annotations_follow_the_painted_objects(name: str, seed: int) -> None:
    scene = paint_scene(seed=seed)
    np.random.seed(seed)
    aug_input, tfms = augment(AUGMENTATIONS[name], scene)
    image, shape = aug_input.image, aug_input.image.shape[:2]
    seen = 0
    for i, color in enumerate(COLORS):
        painted = object_at(image, color)
        polygons = transformed(scene.polygon_annotations[i], tfms, shape)
        rle = transformed(scene.rle_annotations[i], tfms, shape)
        from_polygons = polygons_to_bitmask(polygons["segmentation"], *shape)
        if painted.sum() >= 100:
            seen += 1
            assert iou(painted, from_polygons) > 0.85
            assert iou(painted, rle["segmentation"].astype(bool)) > 0.9
            ys, xs = np.nonzero(painted)
            tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            box = polygons["bbox"]
            # Mirrored boxes lie one pixel to the left, as published.
            assert (box[:2] <= tight[:2] + 2.5).all() and (box[2:] >= tight[2:] - 3).all()
        elif painted.sum() == 0:
            assert from_polygons.sum() <= 8 and rle["segmentation"].sum() <= 8
        x, y, visible = polygons["keypoints"][0]
        if visible and x < shape[1] - 1 and y < shape[0] - 1:
            assert painted[int(y), int(x)]
    assert seen > 0


def test_window_by_hand() -> None:
    image = np.arange(1, 31, dtype=np.uint8).reshape(5, 6)
    window = CanvasCropTransform(6, 5, center_x=1, center_y=4, new_w=4, new_h=4)
    assert (window.left, window.top) == (-1, 2)
    expected = np.zeros((4, 4), np.uint8)
    expected[:3, 1:] = image[2:5, :3]
    np.testing.assert_array_equal(window.apply_image(image), expected)
    labels = window.apply_labels(image)
    assert labels.tolist() == np.where(expected == 0, 255, expected).tolist()
    assert window.apply_coords(np.array([[0.0, 2.0]])).tolist() == [[1.0, 0.0]]
    boxes = np.array([[0.0, 3, 5, 5], [4, 0, 6, 1]])
    assert window.apply_box(boxes).tolist() == [[1, 1, 4, 3], [4, 0, 4, 0]]


def test_odd_windows_lose_their_last_row_and_column() -> None:
    """Published quirk."""
    image = np.ones((9, 9, 3), np.uint8)
    window = CanvasCropTransform(9, 9, 4, 4, 5, 5).apply_image(image)
    assert window[:4, :4].all()
    assert not window[4].any() and not window[:, 4].any()
    even = CanvasCropTransform(9, 9, 4, 4, 4, 4).apply_image(image)
    assert even.all()


def test_wrong_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="centre"):
        CanvasCropTransform(10, 10, 10, 3, 5, 5)
    with pytest.raises(ValueError, match="SCALES"):
        RandomCanvasCrop(size=10, scales=())
    with pytest.raises(ValueError, match="9x10"):
        CanvasCropTransform(10, 9, 5, 5, 5, 5).apply_image(np.zeros((5, 5)))


@pytest.mark.parametrize("length", [1, 2, 100, 256, 257, 640])
def test_random_centers_keep_away_from_the_ends(length: int) -> None:
    np.random.seed(0)
    places = {random_center(length, 128) for _ in range(200)}
    margin = 128
    while length - margin <= margin:
        margin //= 2
    assert min(places) >= margin and max(places) < length - margin
    assert len(places) > min(length - 2 * margin, 20) // 2


def test_recipe() -> None:
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATION.NAME = "cornernet"
    cfg.INPUT.AUGMENTATION.SIZE = 127
    np.random.seed(1)
    image = np.random.default_rng(0).integers(0, 255, (90, 160, 3)).astype(np.uint8)
    shapes, dtypes = set(), set()
    for _ in range(5):
        aug_input = T.AugInput(image)
        T.AugmentationList(build_augmentations(cfg, True))(aug_input)
        shapes.add(aug_input.image.shape)
        dtypes.add(aug_input.image.dtype.name)
    assert shapes == {(127, 127, 3)} and dtypes == {"float32"}
    # Without randomness: padded to a square, resized, bytes.
    cfg.INPUT.AUGMENTATION.CROP_ENABLED = False
    cfg.INPUT.AUGMENTATION.FLIP_PROB = 0.0
    cfg.INPUT.AUGMENTATION.COLOR_JITTER = 0.0
    cfg.INPUT.AUGMENTATION.LIGHTING = 0.0
    aug_input = T.AugInput(image)
    T.AugmentationList(build_augmentations(cfg, True))(aug_input)
    assert aug_input.image.dtype == np.uint8
    assert not aug_input.image[:20].any() and not aug_input.image[-20:].any()
    assert (aug_input.image[40:90, 10:-10].max(axis=2) > 0).all()
    # As CornerNet-Squeeze: resized as it is.
    squeeze = get_config("cornernet/cornernet_squeeze_511.yaml").INPUT.AUGMENTATION
    cfg.INPUT.AUGMENTATION.PAD_TO_SQUARE = squeeze.PAD_TO_SQUARE
    aug_input = T.AugInput(image, boxes=np.array([[16.0, 9, 32, 18]]))
    T.AugmentationList(build_augmentations(cfg, True))(aug_input)
    np.testing.assert_array_equal(aug_input.image, cv2.resize(image, (127, 127)))
    np.testing.assert_allclose(aug_input.boxes, [[12.7, 12.7, 25.4, 25.4]])
    # Mirrored boxes are indices of pixels.
    assert PixelMirrorTransform(127).apply_box(np.array([[0.0, 3, 126, 9]])).tolist() == [
        [0, 3, 126, 9]
    ]
