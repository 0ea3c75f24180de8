"""The augmentations of RetinaFace's recipe."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform

from d2ext import model_zoo
from d2ext.data import build_augmentations
from d2ext.data.augmentations import DetectionInput
from d2ext.data.augmentations.square import (
    INTERPOLATIONS,
    InterpolatedResizeTransform,
    PadToSquare,
    RandomlyInterpolatedSquare,
    RandomSquareCrop,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    np.random.seed(0)
    random.seed(0)


def _crop(boxes: list[list[float]], **options: object) -> tuple[DetectionInput, T.Transform]:
    aug_input = DetectionInput(
        np.zeros((100, 150, 3), np.uint8), boxes=np.array(boxes).reshape(-1, 4).astype(float)
    )
    return aug_input, RandomSquareCrop(**options)(aug_input)


def test_crops_are_squares_with_a_whole_face() -> None:
    boxes = [[20, 10, 40, 35], [80, 60, 149, 99], [118, 50, 123, 55]]
    sides = set()
    for _ in range(60):
        aug_input, tfm = _crop(boxes)
        assert tfm.w == tfm.h
        sides.add(tfm.w)
        window = np.array([tfm.x0, tfm.y0, tfm.x0 + tfm.w, tfm.y0 + tfm.h])
        whole = [all(b[:2] >= window[:2]) and all(b[2:] <= window[2:]) for b in np.array(boxes)]
        assert any(whole)
        assert all(aug_input.keep[np.array(whole)])
    assert sides == {30, 45, 60, 80, 100}


def test_images_without_a_possible_crop_stay() -> None:
    _, tfm = _crop([[0, 0, 150, 100]], trials=5)
    assert isinstance(tfm, NoOpTransform)
    _, tfm = _crop([])
    assert tfm.w == tfm.h <= 100


@pytest.mark.parametrize("clip", [True, False])
def test_points_outside_are_unlabelled_or_as_published_at_the_border(clip: bool) -> None:
    augmentations = [RandomSquareCrop((0.5,), clip_points=clip), RandomlyInterpolatedSquare(49)]
    outside = 0
    for _ in range(30):
        aug_input = DetectionInput(
            np.zeros((100, 100, 3), np.uint8), boxes=np.array([[20.0, 20, 30, 30], [0, 0, 60, 60]])
        )
        tfm = T.AugmentationList(augmentations)(aug_input)
        if not aug_input.keep[1]:
            continue
        points = {"keypoints": [1.0, 2, 2, 25, 25, 2, 99, 98, 1], "bbox": [0, 0, 60, 60]}
        points["bbox_mode"] = 0
        moved = detection_utils.transform_instance_annotations(points, tfm, (49, 49))["keypoints"]
        assert (moved[:, :2] >= 0).all() and (moved[:, :2] <= 49).all()
        assert moved[1, 2] == 2
        assert moved[2, 2] == (1 if clip else 0)
        if clip:
            assert moved[2].tolist() == [49, 49, 1]
        outside += 1
    assert outside > 5


def test_padding_is_at_the_right_and_bottom() -> None:
    image = np.full((3, 5, 3), 7, np.uint8)
    padded = PadToSquare((1.0, 2.0, 3.0))(T.AugInput(image)).apply_image(image)
    assert padded.shape == (5, 5, 3)
    assert (padded[:3] == 7).all() and (padded[3:] == [1, 2, 3]).all()
    assert isinstance(PadToSquare((0.0,) * 3)(T.AugInput(image[:, :3])), NoOpTransform)


def test_all_interpolations_are_drawn() -> None:
    image = np.random.rand(20, 20, 3).astype(np.float32) * 255
    augmentation = RandomlyInterpolatedSquare(13)
    seen = set()
    for _ in range(40):
        tfm = augmentation(T.AugInput(image))
        assert isinstance(tfm, InterpolatedResizeTransform)
        expected = cv2.resize(image, (13, 13), interpolation=tfm.interpolation)
        np.testing.assert_array_equal(tfm.apply_image(image), expected)
        seen.add(tfm.interpolation)
    assert seen == set(INTERPOLATIONS)


def test_points_at_the_border_stay_there() -> None:
    for side in range(1, 200):
        tfm = InterpolatedResizeTransform(side, side, 640, 640, cv2.INTER_LINEAR)
        assert tfm.apply_coords(np.array([[0.0, side]])).tolist() == [[0.0, 640.0]]


def test_the_recipe() -> None:
    cfg = model_zoo.get_config("retinaface/mobilenet025_wider.yaml")
    augmentations = build_augmentations(cfg, True)
    for boxes, size in (
        ([[5.0, 5, 40, 50]], (60, 90)),
        ([[0.0, 0, 90, 60]], (60, 90)),
        ([], (9, 7)),
    ):
        image = np.random.randint(0, 256, (*size, 3), dtype=np.uint8)
        aug_input = DetectionInput(image, boxes=np.array(boxes).reshape(-1, 4))
        T.AugmentationList(augmentations)(aug_input)
        assert aug_input.image.shape == (640, 640, 3)
        assert aug_input.image.dtype == np.float32
        assert len(aug_input.boxes) == 0 or aug_input.keep.all()
    assert not any(isinstance(x, RandomSquareCrop) for x in build_augmentations(cfg, False))
    # the mean colour, blue first
    assert augmentations[2].fill == [104.0, 117.0, 123.0]
