"""Track AP: the official code's numbers, and cases computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.evaluation.track_ap import Track, evaluate_tracks, track_iou, track_results

FIXTURE = Path(__file__).resolve().parents[1] / "reference/video/ytvis_eval"


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons or RLE of any form -> compressed RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def read_tracks(content: list[dict[str, Any]], sizes: dict[int, tuple[int, int]]) -> list[Track]:
    return [
        Track(
            entry["video_id"],
            entry["category_id"],
            {
                t: to_rle(mask, *sizes[entry["video_id"]])
                for t, mask in enumerate(entry["segmentations"])
                if mask is not None
            },
            entry.get("score", 1.0),
            entry.get("iscrowd", 0),
        )
        for entry in content
    ]


def test_official_numbers() -> None:
    truth = json.loads((FIXTURE / "ground_truth.json").read_text())
    sizes = {v["id"]: (v["height"], v["width"]) for v in truth["videos"]}
    targets = read_tracks(truth["annotations"], sizes)
    predictions = read_tracks(json.loads((FIXTURE / "predictions.json").read_text()), sizes)
    categories = [c["id"] for c in truth["categories"]]
    expected = np.load(FIXTURE / "outputs.npz")

    scorer = evaluate_tracks(targets, predictions, categories)

    np.testing.assert_allclose(scorer.stats, expected["stats"], rtol=0, atol=1e-9)
    # Stored in single precision.
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    np.testing.assert_allclose(precision[..., -1], expected["precision"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(recall, expected["recall"], rtol=0, atol=1e-6)
    pairs = [key for key in expected.files if key.startswith("iou.")]
    assert len(pairs) == 17
    for key in pairs:
        video, category = map(int, key.split(".")[1:])
        here = (video, category)
        d = [t for t in predictions if (t.video_id, t.category_id) == here]
        d.sort(key=lambda track: -track.score)
        g = [t.masks for t in targets if (t.video_id, t.category_id) == here]
        ious = track_iou([t.masks for t in d], g)
        np.testing.assert_allclose(ious, expected[key], rtol=0, atol=1e-6)
    results = track_results(scorer, [c["name"] for c in truth["categories"]])
    assert results["AP"] == pytest.approx(12.958929, abs=1e-6)
    assert math.isnan(results["AP-never_there"]) and results["APm"] == 0


def box(x: int, y: int, width: int, height: int, size: int = 100) -> dict[str, Any]:
    mask = np.zeros((size, size), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return mask_util.encode(mask)


def still(video: int = 0, frames: range = range(10), **values: Any) -> Track:
    return Track(video, 1, {t: box(10, 10, 20, 20) for t in frames}, **values)


def ap(targets: list[Track], predictions: list[Track]) -> dict[str, float]:
    return track_results(evaluate_tracks(targets, predictions, [1]), ["thing"])


def test_iou_counts_frames_of_either() -> None:
    # 400 pixels in each of 10 frames; seen in frames 5 to 14, half as large in 5 and 6.
    prediction = {t: box(10, 10, 20, 20) for t in range(5, 15)}
    prediction[5] = prediction[6] = box(10, 10, 10, 20)
    common = 3 * 400 + 2 * 200
    union = 10 * 400 + 8 * 400 + 2 * 200 - common
    iou = track_iou([prediction, {}], [still().masks])
    np.testing.assert_allclose(iou, [[common / union], [0]])


def test_perfect_and_nothing() -> None:
    assert ap([still()], [still(score=0.3)])["AP"] == pytest.approx(100)
    assert ap([still()], [])["AP"] == 0
    assert all(math.isnan(value) for value in ap([], [still()]).values())
    # A wrong track in a video without objects, with a higher score.
    assert ap([still()], [still(score=0.3), still(video=1, score=0.9)])["AP"] == pytest.approx(50)


def test_identity_that_changes() -> None:
    # Each half has IoU 0.5: right at one of ten thresholds, and the other half is then wrong.
    halves = [still(frames=range(5), score=0.9), still(frames=range(5, 10), score=0.8)]
    results = ap([still()], halves)
    assert results["AP"] == pytest.approx(10) and results["AP50"] == pytest.approx(100)
    # 7 of 10 frames: 0.5 to 0.7.
    assert ap([still()], [still(frames=range(7))])["AP"] == pytest.approx(50)


def test_crowd_is_ignored_but_no_magnet() -> None:
    crowd = Track(0, 1, {t: box(40, 40, 60, 60) for t in range(10)}, iscrowd=1)
    same = [Track(0, 1, crowd.masks, score=s) for s in (0.9, 0.8)]
    assert ap([still(), crowd], [still(score=0.5), *same])["AP"] == pytest.approx(100)
    # COCO would ignore whatever lies in the crowd.
    inside = Track(0, 1, {t: box(50, 50, 10, 10) for t in range(10)}, score=0.9)
    assert ap([still(), crowd], [still(score=0.5), inside])["AP"] == pytest.approx(50)


def test_limits_of_areas() -> None:
    # Mean of 100 x 100 and 200 x 200 is 25000: medium, though one of the frames is small.
    track = Track(0, 1, {0: box(0, 0, 100, 100, 200), 1: box(0, 0, 200, 200, 200)})
    results = ap([track], [track])
    assert results["APm"] == pytest.approx(100)
    assert math.isnan(results["APs"]) and math.isnan(results["APl"])
