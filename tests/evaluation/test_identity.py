"""IDF1, HOTA and MOTA from ids and similarities: cases computed by hand, and what is compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2ext.evaluation.identity import IdentityFrame, compare_frame, identity_metrics


def frame(targets: list[Any], predictions: list[Any], pairs: dict[Any, float]) -> IdentityFrame:
    """``pairs``: (target id, predicted id) -> similarity; others have none."""
    similarity = [[pairs.get((t, p), 0.0) for p in predictions] for t in targets]
    return IdentityFrame(targets, predictions, np.array(similarity))


def test_two_videos_by_hand() -> None:
    # Video 1: an object in 4 frames, id 8 in the first three, 9 in the last.
    first = [frame([1], [p], {(1, p): 1.0}) for p in (8, 8, 8, 9)]
    # Video 2: ids of video 1 mean nothing here. One miss, one wrong detection.
    second = [frame([1], [9], {(1, 9): 1.0}), frame([1], [], {}), frame([], [7], {})]
    metrics = identity_metrics([first, second])
    # IDTP 3 + 1 of 6 targets and 6 predictions.
    assert metrics["IDF1"] == pytest.approx(100 * 2 * 4 / (6 + 6))
    assert metrics["IDP"] == metrics["IDR"] == pytest.approx(100 * 4 / 6)
    assert metrics["IDSW"] == 1
    # 5 matches of 6, one false, one switch.
    assert metrics["MOTA"] == pytest.approx(100 * (5 - 1 - 1) / 6)
    assert metrics["DetA"] == pytest.approx(100 * 5 / 7)
    # Of each match: frames that both ids share / that one of them has.
    association = (3 * 3 / 4 + 1 / 4 + 1 / 2) / 5
    assert metrics["AssA"] == pytest.approx(100 * association)
    assert metrics["HOTA"] == pytest.approx(100 * math.sqrt(5 / 7 * association))
    assert metrics["LocA"] == pytest.approx(100)


def test_similarity_below_one() -> None:
    # 0.72 is above 14 of HOTA's 19 thresholds, and 0.4 is no match for IDF1.
    video = [frame([1], [5], {(1, 5): 0.72})] * 3
    metrics = identity_metrics([video])
    assert metrics["IDF1"] == pytest.approx(100)
    assert metrics["HOTA"] == pytest.approx(100 * 14 / 19)
    assert identity_metrics([[frame([1], [5], {(1, 5): 0.4})]])["IDF1"] == 0


def test_nothing() -> None:
    assert all(math.isnan(v) for v in identity_metrics([[frame([], [], {})]]).values())
    assert all(math.isnan(v) for v in identity_metrics([]).values())
    metrics = identity_metrics([[frame([1], [], {})]])
    assert metrics["IDF1"] == metrics["HOTA"] == metrics["MOTA"] == 0


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2ext.evaluation.identity.identity_available", lambda: False)
    with pytest.raises(ImportError, match="pip install scipy && pip install --no-deps trackeval"):
        identity_metrics([])


def entry(track: int, box: list[float], label: int = 0, **values: Any) -> dict[str, Any]:
    return {"track_id": track, "bbox": box, "category_id": label, "iscrowd": 0, **values}


def compare(kind: str, targets: list[Any], predictions: list[Any]) -> IdentityFrame:
    to_rle = lambda x: mask_util.merge(mask_util.frPyObjects(x["segmentation"], 50, 50))  # noqa: E731
    return compare_frame(kind, targets, predictions, to_rle=to_rle, sigmas=[0.05, 0.1])


def test_boxes_and_classes() -> None:
    targets = [entry(1, [0, 0, 10, 10]), entry(2, [20, 0, 10, 10], 1)]
    predictions = [entry(3, [0, 0, 10, 5]), entry(4, [20, 0, 10, 10]), entry(5, [20, 0, 10, 10], 1)]
    result = compare("bbox", targets, predictions)
    np.testing.assert_allclose(result.similarity, [[0.5, 0, 0], [0, 0, 1]])
    assert result.target_ids == [(1, 0), (2, 1)] and result.predicted_ids == [3, 4, 5]
    assert compare("bbox", targets, []).similarity.shape == (2, 0)
    assert compare("bbox", [], predictions).similarity.shape == (0, 3)


def test_crowd_takes_what_matches_nothing_else() -> None:
    targets = [entry(1, [0, 0, 10, 10]), entry(9, [0, 0, 40, 40], iscrowd=1)]
    predictions = [
        entry(3, [0, 0, 10, 10]),  # in the crowd, but it matches
        entry(4, [20, 20, 10, 10]),  # in the crowd
        entry(5, [35, 20, 12, 10]),  # 5 of 12 columns in it
        entry(6, [20, 20, 10, 10], 1),  # another class
    ]
    result = compare("bbox", targets, predictions)
    assert result.target_ids == [(1, 0)] and result.predicted_ids == [3, 5, 6]
    np.testing.assert_allclose(result.similarity, [[1, 0, 0]])


def test_masks_and_objects_that_have_none() -> None:
    triangle = [[0, 0, 20, 0, 0, 20]]
    square = [[0, 0, 20, 0, 20, 20, 0, 20]]
    targets = [entry(1, [0, 0, 20, 20], segmentation=triangle), entry(2, [30, 30, 10, 10])]
    inside = [[32, 32, 38, 32, 38, 38, 32, 38]]
    predictions = [
        entry(3, [0, 0, 20, 20], segmentation=square),
        entry(4, [32, 32, 6, 6], segmentation=inside),
    ]
    result = compare("segm", targets, predictions)
    assert result.target_ids == [(1, 0)] and result.predicted_ids == [3]
    assert result.similarity[0, 0] == pytest.approx(0.5, abs=0.05)


def test_keypoints() -> None:
    # sigma 0.05 and 0.1, area 400: exp(-d^2 / 8) and exp(-d^2 / 32). The second is not labelled once.
    both = {"area": 400, "num_keypoints": 2, "keypoints": [0, 0, 2, 10, 0, 1]}
    one = {"area": 400, "num_keypoints": 1, "keypoints": [0, 0, 2, 0, 0, 0]}
    none = {"area": 400, "num_keypoints": 0, "keypoints": [0] * 6}
    targets = [entry(1, [0, 0, 20, 20], **both), entry(2, [0, 0, 20, 20], **one)]
    targets.append(entry(3, [25, 25, 20, 20], **none))
    predictions = [
        entry(4, [0, 0, 20, 20], keypoints=[2, 0, 1, 10, 4, 1]),
        entry(5, [26, 26, 10, 10], keypoints=[30, 30, 1, 30, 30, 1]),
    ]
    result = compare("keypoints", targets, predictions)
    assert result.target_ids == [(1, 0), (2, 0)] and result.predicted_ids == [4]
    np.testing.assert_allclose(result.similarity[:, 0], [math.exp(-0.5)] * 2)
