"""VPQ: the published tool's numbers, a naive implementation, and cases computed by hand."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2ext.evaluation.panoptic_match import Counts
from d2ext.evaluation.stq import overlap_pixels
from d2ext.evaluation.vpq import TubeSegment, VideoPanopticQuality, window_length

FIXTURE = Path(__file__).resolve().parents[1] / "reference/vpsnet/vpq"
Segment = dict[str, Any]
# ids (H, W) and segments of a frame
Map = tuple[np.ndarray, list[Segment]]


def update(
    quality: VideoPanopticQuality, video: Any, number: int, target: Map, predicted: Map
) -> None:
    """Add a frame whose tubes are what has one id."""
    places = []
    for ids, segments in (target, predicted):
        table = {0: 0, **{s["id"]: place for place, s in enumerate(segments, 1)}}
        values, inverse = np.unique(ids, return_inverse=True)
        places.append(np.array([table[v] for v in values.tolist()])[inverse.reshape(ids.shape)])
    pixels = overlap_pixels(*places, (len(target[1]) + 1, len(predicted[1]) + 1))
    tubes = [
        [
            TubeSegment(
                s["id"], s["category_id"], bool(s["iscrowd"]), s.get("area"), s.get("visibility")
            )
            for s in segments
        ]
        for _, segments in (target, predicted)
    ]
    quality.update(video, number, pixels, *tubes)


def table(counts: Counts) -> np.ndarray:
    return np.stack([counts.iou, counts.tp, counts.fp, counts.fn], axis=1)


class TestPublished:
    """The fixture: two clips of six annotated frames."""

    expected = np.load(FIXTURE / "outputs.npz")
    inputs = json.loads((FIXTURE / "manifest.json").read_text())["inputs"]

    def frames(self, kind: str) -> list[Map]:
        ids = {c["id"]: i for i, c in enumerate(self.inputs["categories"])}
        segments = [
            [{**s, "category_id": ids[s["category_id"]]} for s in of_frame]
            for of_frame in self.inputs[f"{kind}_segments_info"]
        ]
        return list(zip(self.expected[f"{kind}_ids"].astype(np.int64), segments, strict=True))

    def fill(self, numbers: list[int]) -> VideoPanopticQuality:
        quality = VideoPanopticQuality(6)
        targets, predictions = self.frames("gt"), self.frames("pred")
        for i in numbers:
            update(quality, i // 6, 4 + i % 6 * 5, targets[i], predictions[i])
        return quality

    def test_numbers(self) -> None:
        quality = self.fill(list(range(12)))
        assert quality.spacings() == {5: 10} and quality.lengths() == {6: 2}
        things = np.array([c["isthing"] for c in self.inputs["categories"]], bool)
        groups = slice(None), things, ~things
        means = []
        # Later windows first: the order makes no difference.
        for k in reversed(self.inputs["windows_k"]):
            counts = quality.counts(window_length(k, 5))
            np.testing.assert_allclose(table(counts), self.expected[f"k{k}.per_class"], rtol=1e-6)
            averages = [counts.mean_quality(group) for group in groups]
            wanted = self.expected[f"k{k}.all_things_stuff_pq_sq_rq_n"]
            np.testing.assert_allclose(averages, wanted, rtol=1e-6)
            means.append([100 * pq for pq, *_ in averages])
        np.testing.assert_allclose(means[::-1], self.expected["vpq_all_things_stuff"], rtol=1e-6)
        np.testing.assert_allclose(np.mean(means, axis=0), self.expected["vpq"], rtol=1e-6)

    def test_processes_and_order_of_frames(self) -> None:
        whole = self.fill(list(range(12)))
        merged = self.fill(list(range(6, 12)))
        merged.merge(self.fill([3, 0, 5, 1, 4, 2]))
        for length in (4, 1, 4):  # twice: nothing is used up
            np.testing.assert_allclose(table(merged.counts(length)), table(whole.counts(length)))
        each = table(whole.counts(2, [0])) + table(whole.counts(2, [1]))
        np.testing.assert_allclose(each, table(whole.counts(2)))


def naive(clips: list[list[tuple[Map, Map]]], length: int, classes: int) -> np.ndarray:
    """(C, 4) sums of IoU, TP, FP, FN from the pixels of whole windows."""
    result = np.zeros((classes, 4))
    for clip in clips:
        for start in range(len(clip) - length + 1):
            window = clip[start : start + length]
            target = np.stack([t[0] for t, _ in window])
            predicted = np.stack([p[0] for _, p in window])
            tubes: list[dict[int, Segment]] = [{}, {}]
            areas: defaultdict[int, int] = defaultdict(int)
            for pair in window:
                for known, (_, segments) in zip(tubes, pair, strict=True):
                    for s in segments:
                        known.setdefault(s["id"], s)
                for s in pair[0][1]:
                    areas[s["id"]] += s["area"]
            sizes = {p: int((predicted == p).sum()) for p in tubes[1]}
            void = {p: int(((predicted == p) & (target == 0)).sum()) for p in tubes[1]}
            matched = set()
            crowds = {}
            for g, tube in tubes[0].items():
                if tube["iscrowd"]:
                    crowds[tube["category_id"]] = g
                    continue
                hit = False
                for p, other in tubes[1].items():
                    common = int(((target == g) & (predicted == p)).sum())
                    union = areas[g] + sizes[p] - common - void[p]
                    if tube["category_id"] == other["category_id"] and common / union > 0.5:
                        result[tube["category_id"]] += [common / union, 1, 0, 0]
                        matched.add(p)
                        hit = True
                if not hit:
                    result[tube["category_id"], 3] += 1
            for p, other in tubes[1].items():
                ignored = void[p]
                crowd = crowds.get(other["category_id"])
                if crowd is not None:
                    ignored += int(((target == crowd) & (predicted == p)).sum())
                if p not in matched and ignored / sizes[p] <= 0.5:
                    result[other["category_id"], 2] += 1
    return result


def random_clip(rng: np.random.Generator, length: int) -> list[tuple[Map, Map]]:
    """Rectangles of few ids that jump about: crowds, void, classes that change within a tube."""

    def draw(ids: np.ndarray, candidates: list[int]) -> np.ndarray:
        ids = ids.copy()
        for number in candidates:
            y, x = rng.integers(0, 12, 2)
            ids[y : y + rng.integers(3, 14), x : x + rng.integers(3, 14)] = number
        return ids

    def segments(ids: np.ndarray, areas: bool) -> list[Segment]:
        result = []
        for number in rng.permutation(np.unique(ids[ids > 0])).tolist():
            segment = {"id": number, "category_id": number % 3, "iscrowd": 0}
            if rng.random() < 0.1:
                segment["category_id"] = int(rng.integers(3))
            if areas:
                segment["iscrowd"] = int(rng.random() < 0.25)
                segment["area"] = int((ids == number).sum() + rng.integers(0, 3))
            result.append(segment)
        return result

    numbers = rng.choice([*range(1, 8), 255, 256, 65535, 65536], 6, replace=False).tolist()
    ids = draw(np.zeros((16, 16), np.int64), numbers)
    clip = []
    for _ in range(length):
        ids = draw(ids, rng.choice([0, *numbers], 2).tolist())
        predicted = draw(ids, rng.choice([0, 9, *numbers], 2).tolist())
        clip.append(((ids, segments(ids, True)), (predicted, segments(predicted, False))))
    return clip


def test_naive_implementation() -> None:
    rng = np.random.default_rng(0)
    clips = [random_clip(rng, length) for length in (6, 4, 3, 1, 6, 5) for _ in range(4)]
    quality = VideoPanopticQuality(3)
    for video, clip in enumerate(clips):
        for number, pair in enumerate(clip):
            update(quality, video, 5 * number, *pair)
    for length in range(1, 5):
        expected = naive(clips, length, 3)
        assert (expected > 0).all()
        np.testing.assert_allclose(table(quality.counts(length)), expected, rtol=1e-12)
    assert not table(quality.counts(7)).any()  # no clip is so long


def row(*ids: int) -> np.ndarray:
    """A map of one row, ten pixels for each id."""
    return np.repeat(np.array([ids], np.int64), 10, axis=1)


def one(number: int, label: int = 0, **values: Any) -> Segment:
    return {"id": number, "category_id": label, "iscrowd": 0, **values}


def counts(frames: list[tuple[Map, Map]], length: int = 1) -> list[list[float]]:
    quality = VideoPanopticQuality(2)
    for number, pair in enumerate(frames):
        update(quality, "clip", number, *pair)
    return table(quality.counts(length)).tolist()


def test_prediction_is_truth() -> None:
    frame = (row(1, 2, 65536), [one(1), one(2, 1), one(65536)])
    assert counts([(frame, frame)] * 3, 2) == [[4, 4, 0, 0], [2, 2, 0, 0]]


def test_identity_that_changes_costs_only_longer_windows() -> None:
    target = (row(1, 0), [one(1)])
    frames = [(target, (row(255, 0), [one(255)])), (target, (row(256, 0), [one(256)]))]
    assert counts(frames)[0] == [2, 2, 0, 0]
    # Half of the tube each: no IoU above 0.5.
    assert counts(frames, 2)[0] == [0, 0, 2, 1]


def test_prediction_of_another_shape() -> None:
    target = (row(1, 1, 1, 2), [one(1), one(2, 1)])
    predicted = (row(7, 7, 8, 8), [one(7), one(8, 1)])
    # 20 of 30 pixels; 10 of 20: not more than half.
    assert counts([(target, predicted)]) == [[pytest.approx(2 / 3), 1, 0, 0], [0, 0, 1, 1]]


def test_void_and_crowds() -> None:
    assert counts([((row(0, 0, 1), [one(1)]), (row(5, 5, 5), [one(5)]))])[0] == [1, 1, 0, 0]
    # Half on void is held against the prediction, more is not.
    half = (row(0, 0, 1, 1), [one(1, 1)])
    assert counts([(half, (row(5, 5, 5, 5), [one(5)]))])[0] == [0, 0, 1, 0]
    more = (row(0, 0, 0, 1), [one(1, 1)])
    assert counts([(more, (row(5, 5, 5, 5), [one(5)]))])[0] == [0, 0, 0, 0]
    # Of two crowds of a class the last counts, which lies elsewhere here.
    crowds = [one(1, iscrowd=1), one(2, iscrowd=1)]
    predicted = (row(5, 0), [one(5)])
    assert counts([((row(1, 2), crowds), predicted)])[0] == [0, 0, 1, 0]
    assert counts([((row(1, 2), crowds[::-1]), predicted)])[0] == [0, 0, 0, 0]


def test_stated_area_and_first_frame_of_a_tube() -> None:
    predicted = (row(5), [one(5)])
    assert counts([((row(1), [one(1, area=20)]), predicted)])[0] == [0, 0, 1, 1]
    assert counts([((row(1), [one(1, area=16)]), predicted)])[0] == [10 / 16, 1, 0, 0]
    frames = [((row(1), [one(1, label)]), predicted) for label in (0, 1, 1)]
    assert counts(frames, 2) == [[1, 1, 1, 0], [0, 0, 0, 1]]


def test_listed_segment_without_pixel() -> None:
    assert counts([((row(1), [one(1), one(2)]), (row(5), [one(5), one(6)]))])[0] == [1, 1, 0, 1]


def test_recall_by_visibility() -> None:
    quality = VideoPanopticQuality(2)
    target = [one(1, visibility=0.4), one(2, visibility=0.9), one(3, 1, visibility=0.1)]
    update(quality, 0, 0, (row(1, 1, 2, 2, 3), target), (row(5, 0, 6, 0, 0), [one(5), one(6)]))
    # Object 1 is hidden in the first frame and seen in the second.
    target[0] = one(1, visibility=0.8)
    update(quality, 0, 1, (row(1, 1, 2, 2, 3), target), (row(5, 5, 6, 0, 0), [one(5), one(6)]))
    single = quality.recall_by_visibility(1, [0])
    assert single["hidden"] == {"tubes": 1, "recall": 0, "iou": 0.5}
    assert single["visible"] == {"tubes": 3, "recall": 1 / 3, "iou": pytest.approx(2 / 3)}
    double = quality.recall_by_visibility(2, [0])
    assert double["hidden"] == {"tubes": 1, "recall": 1, "iou": 0.75}
    assert double["visible"] == {"tubes": 1, "recall": 0, "iou": 0.5}
    none = quality.recall_by_visibility(1, [0], limit=0.0)["hidden"]
    assert none["tubes"] == 0 and math.isnan(none["recall"]) and math.isnan(none["iou"])
    other = VideoPanopticQuality(1)
    update(other, 0, 0, (row(1), [one(1)]), (row(1), [one(1)]))
    assert other.recall_by_visibility(1, [0]) == {}


def test_id_switches() -> None:
    quality = VideoPanopticQuality(2)
    target = (row(1, 2), [one(1), one(2, 1)])
    for number, (first, second) in enumerate([(5, 6), (0, 7), (8, 6), (8, 6), (5, 6)]):
        predicted = [one(first)] * bool(first) + [one(second, 1)]
        update(quality, "a", 5 * number, target, (row(first, second), predicted))
    # Object 1 is lost in between; object 2 is of a class that is not asked for.
    assert quality.id_switches("a", [0]) == [(10, 1, 5, 8), (20, 1, 8, 5)]
    assert len(quality.id_switches("a", [0, 1])) == 4


def test_window_length() -> None:
    assert [window_length(k, 5) for k in (0, 4, 5, 10, 15)] == [1, 1, 2, 3, 4]
    assert window_length(7, 1) == 8
