"""STQ: the published code's numbers, and cases computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from d2ext.evaluation.stq import SegmentationTrackingQuality, VideoSegment, overlap_pixels

FIXTURE = Path(__file__).resolve().parents[1] / "reference/video/stq"


def segments(values: np.ndarray, things: list[int], target: bool) -> tuple[np.ndarray, list]:
    """(H, W) (class << 8) + id -> (H, W) places and their segments; class 255 is place 0."""
    unique, places = np.unique(values, return_inverse=True)
    result, table = [], np.zeros(len(unique), np.int64)
    for i, value in enumerate(unique.tolist()):
        category, number = value >> 8, value & 255
        if category == 255:
            continue
        crowd = target and category in things and number == 0
        track = number if category in things and not crowd else None
        result.append(VideoSegment(category, track, crowd))
        table[i] = len(result)
    return table[places].reshape(values.shape), result


def test_published_numbers() -> None:
    expected = np.load(FIXTURE / "outputs.npz")
    manifest = json.loads((FIXTURE / "manifest.json").read_text())
    halves = [SegmentationTrackingQuality(), SegmentationTrackingQuality()]
    each = [SegmentationTrackingQuality() for _ in range(3)]
    frames = zip(
        expected["ground_truth"],
        expected["predictions"],
        expected["sequence"].tolist(),
        strict=True,
    )
    for truth, predicted, sequence in frames:
        target_places, targets = segments(truth, manifest["things"], True)
        places, predictions = segments(predicted, manifest["things"], False)
        pixels = overlap_pixels(target_places, places, (len(targets) + 1, len(predictions) + 1))
        for quality in (halves[sequence % 2], each[sequence]):
            quality.update(sequence, pixels, targets, predictions)

    halves[0].merge(halves[1])
    result = halves[0].compute()

    for name in ("STQ", "AQ", "IoU"):
        assert result[name] == pytest.approx(float(expected[name]), abs=1e-9)
        mine = [quality.compute()[name] for quality in each]
        np.testing.assert_allclose(mine, expected[f"{name}_per_seq"], rtol=0, atol=1e-9)


def thing(track: int, **values: bool) -> VideoSegment:
    return VideoSegment("car", track, **values)


def stq(frames: list[tuple[list[list[int]], list, list]]) -> dict[str, float]:
    quality = SegmentationTrackingQuality()
    for pixels, targets, predictions in frames:
        quality.update("video", np.array(pixels), targets, predictions)
    return quality.compute()


def test_perfect_and_identity_that_changes() -> None:
    road = VideoSegment("road")
    right = [([[0, 0, 0], [0, 50, 0], [0, 0, 10]], [road, thing(1)], [road, thing(7)])] * 4
    assert stq(right) == {"STQ": 1, "AQ": 1, "IoU": 1}
    # Another id in the second half: two tracks with TPA 20 of 40 each: 2 x 20 x 20/40 / 40.
    other = [([[0, 0, 0], [0, 50, 0], [0, 0, 10]], [road, thing(1)], [road, thing(8)])] * 2
    assert stq(right[:2] + other) == pytest.approx({"STQ": math.sqrt(0.5), "AQ": 0.5, "IoU": 1})


def test_missed_frame_void_and_crowd() -> None:
    seen = ([[0, 0], [0, 10]], [thing(1)], [thing(1)])
    missed = ([[0], [10]], [thing(1)], [])
    # TPA 30 of 40: 30 x 30/40 / 40; a quarter of the pixels of the class is missed, and the published
    # code counts "nothing" as a second class.
    result = stq([seen] * 3 + [missed])
    assert result == pytest.approx({"STQ": 0.75 * math.sqrt(0.375), "AQ": 0.5625, "IoU": 0.375})
    # 10 pixels where nothing is labelled belong to the predicted track, not to the class.
    void = ([[0, 10], [0, 10]], [thing(1)], [thing(1)])
    assert stq([void]) == pytest.approx({"STQ": math.sqrt(0.5), "AQ": 0.5, "IoU": 1})
    # Where the annotations have a crowd only the class counts.
    crowd = ([[0, 0], [0, 10], [0, 30]], [thing(1), VideoSegment("car", None, True)], [thing(1)])
    assert stq([crowd]) == {"STQ": 1, "AQ": 1, "IoU": 1}


def test_things_without_tracks() -> None:
    result = stq([([[0, 0], [0, 10]], [thing(1)], [VideoSegment("car")])])
    assert result == {"STQ": 0, "AQ": 0, "IoU": 1}
    assert math.isnan(
        stq([([[0, 0], [0, 10]], [VideoSegment("road")], [VideoSegment("road")])])["AQ"]
    )


def test_sizes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), the frame's \(2, 2\)"):
        overlap_pixels(np.zeros((2, 2), int), np.zeros((2, 3), int), (1, 1))
