"""The quick look at annotations and the thorough one."""

from collections import Counter

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.structures import BoxMode

from d2ext.data.annotations import (
    BAD_BOX,
    BAD_POLYGON,
    EMPTY_MASK,
    NO_GEOMETRY,
    describe_dropped,
    normalize_annotation,
    normalize_annotations,
    obvious_flaw,
)

SQUARE = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]
EMPTY_RLE = mask_util.encode(np.zeros((8, 8), np.uint8, order="F"))
FULL_RLE = mask_util.encode(np.ones((8, 8), np.uint8, order="F"))
XYWH, XYXY = BoxMode.XYWH_ABS, BoxMode.XYXY_ABS

FLAWED = [
    ({}, NO_GEOMETRY),
    ({"bbox": [], "segmentation": []}, NO_GEOMETRY),
    ({"bbox": [5, 5, 0, 4], "bbox_mode": XYWH}, BAD_BOX),
    ({"bbox": [5, 5, -1, 4], "bbox_mode": XYWH}, BAD_BOX),
    ({"bbox": [5, 5, 4, 9], "bbox_mode": XYXY}, BAD_BOX),
    ({"bbox": [5, 5, float("nan"), 9], "bbox_mode": XYWH, "segmentation": SQUARE}, BAD_BOX),
    ({"bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 5], [1, 1, 2, 2, 3]]}, BAD_POLYGON),
    ({"bbox": [1, 1, 4, 4], "segmentation": EMPTY_RLE}, EMPTY_MASK),
    ({"bbox": [1, 1, 4, 4], "segmentation": {"size": [8, 8], "counts": [64]}}, EMPTY_MASK),
]
SUBTLE = [
    ({"bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 2, 2, 3, 3]]}, BAD_POLYGON),
    ({"bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 2, 2, 3, float("nan")]]}, BAD_POLYGON),
    ({"bbox": [1, 1, 4, float("inf")]}, BAD_BOX),
]
SOUND = [
    {"bbox": [5, 5, 1, 4], "bbox_mode": XYWH},
    {"bbox": [5, 5, 6, 9], "bbox_mode": XYXY},
    {"bbox": [5, 5, 1, 4]},  # COCO's mode
    {"segmentation": SQUARE},
    {"segmentation": FULL_RLE},
    {"segmentation": {"size": [8, 8], "counts": [0, 64]}},
    {"bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 5], *SQUARE]},
]


@pytest.mark.parametrize(("annotation", "reason"), FLAWED)
def test_both_find_the_obvious(annotation, reason):
    assert obvious_flaw(annotation) == reason
    assert normalize_annotation(annotation) == (None, reason)


@pytest.mark.parametrize(("annotation", "reason"), SUBTLE)
def test_the_thorough_one_finds_more(annotation, reason):
    assert obvious_flaw(annotation) == ""
    assert normalize_annotation(annotation) == (None, reason)


@pytest.mark.parametrize("annotation", SOUND)
def test_sound_annotations(annotation):
    assert obvious_flaw(annotation) == ""
    result, reason = normalize_annotation(annotation)
    assert reason == "" and result["bbox_mode"] == XYXY
    x0, y0, x1, y1 = result["bbox"]
    assert x1 > x0 and y1 > y0


def test_boxes_by_hand():
    def box(annotation):
        return normalize_annotation(annotation)[0]["bbox"]

    assert box({"bbox": [5, 6, 1, 4], "bbox_mode": XYWH}) == [5, 6, 6, 10]
    assert box({"segmentation": [*SQUARE, [0, 2, 9, 2, 9, 3]]}) == [0, 1, 9, 5]
    assert box({"segmentation": FULL_RLE}) == [0, 0, 8, 8]
    # Column by column: 10 pixels skipped, then 3 set, which are rows 2 to 4 of column 1.
    assert box({"segmentation": {"size": [8, 8], "counts": [10, 3, 51]}}) == [1, 2, 2, 5]


def test_description():
    dropped = Counter()
    usable = normalize_annotations([a for a, _ in FLAWED] + SOUND, dropped)
    assert len(usable) == len(SOUND)
    assert describe_dropped(dropped).startswith(f"4 ({BAD_BOX}), 2 (")
