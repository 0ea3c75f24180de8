"""Video Panoptic Quality (arXiv 2006.11339): panoptic quality of tubes over windows of frames.

A window is n consecutive annotated frames of a clip; it slides by one. In it, the segments of one object
form a tube. Tubes are compared as segments of an image are (:mod:`~d2ext.evaluation.panoptic_match`):
IoU > 0.5 within a class is a match, void does not count as part of a prediction, a prediction more than
half of which is void or crowd of its class is left out. Matches, wrong and missed tubes are added up
over all windows of all clips; VPQ of n is the mean over the classes that occur of

    PQ = sum of IoUs / (matches + wrong / 2 + missed / 2).

Published rules that change numbers, kept (vpsnet/NOTES.md, "VPQ"): a tube's class and whether it is a
crowd are those of its first frame in the window; of several crowds of a class, the one that appears last
counts; areas of annotated segments are those that the JSON file states, areas of predicted ones are
counted pixels.

Each frame is kept as the pixels that each annotated segment shares with each predicted one, a table of
some hundred rows; a window is a sum of these.

Letters: G annotated and P predicted segments of a frame, T annotated and Q predicted tubes of a clip,
C classes.
"""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from d2ext.evaluation.panoptic_match import Counts

__all__ = ["IdSwitch", "TubeSegment", "VideoPanopticQuality", "window_length"]

# As in panoptic quality.
_MATCH_IOU = 0.5
_IGNORED_SHARE = 0.5


class TubeSegment(NamedTuple):
    """A segment of a frame.

    Attributes:
        tube: segments of a clip that are equal in it are one object
        label: class in [0, C)
        iscrowd: of annotations
        area: pixels of an annotated segment as its file states them; None: as counted
        visibility: share of an annotated object that is not hidden; None: not known
    """

    tube: Hashable
    label: int
    iscrowd: bool = False
    area: float | None = None
    visibility: float | None = None


class IdSwitch(NamedTuple):
    """An annotated object that is found under another id than before.

    Attributes:
        frame: number in its clip
        target: the object
        before, after: predicted tubes
    """

    frame: int
    target: Any
    before: Any
    after: Any


@dataclass(frozen=True)
class _Frame:
    number: int
    shared: np.ndarray
    """(M, 3): row, column and value of what is not 0 in the (G + 1, P + 1) table of pixels."""
    targets: Sequence[TubeSegment]
    predictions: Sequence[TubeSegment]


class VideoPanopticQuality:
    """Adds up frames of clips; memory grows with the number of segments, not of pixels."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._videos: dict[Hashable, list[_Frame]] = {}

    def update(
        self,
        video_id: Hashable,
        frame: int,
        pixels: np.ndarray,
        targets: Sequence[TubeSegment],
        predictions: Sequence[TubeSegment],
    ) -> None:
        """Add an annotated frame; they may come in any order.

        Args:
            video_id: of its clip
            frame: its number in the clip, counting frames that are not annotated, too
            pixels: (G + 1, P + 1) counts of pixels (:func:`~d2ext.evaluation.stq.overlap_pixels`);
                row 0: not labelled (void), column 0: nothing predicted
            targets, predictions: G, P segments; several may belong to one tube
        """
        rows, columns = np.nonzero(pixels)
        shared = np.stack([rows, columns, pixels[rows, columns].astype(np.int64)], axis=1)
        areas = pixels.sum(axis=1)[1:].tolist()
        known = [
            s if s.area is not None else s._replace(area=area)
            for s, area in zip(targets, areas, strict=True)
        ]
        self._videos.setdefault(video_id, []).append(
            _Frame(frame, shared, known, tuple(predictions))
        )

    def merge(self, other: "VideoPanopticQuality") -> None:
        """Add the frames of another process; no frame may be in both."""
        for video_id, frames in other._videos.items():
            self._videos.setdefault(video_id, []).extend(frames)

    def video_ids(self) -> list[Hashable]:
        """Of all clips, in the order in which they came."""
        return list(self._videos)

    def lengths(self) -> Counter[int]:
        """Annotated frames of a clip → number of such clips."""
        return Counter(map(len, self._videos.values()))

    def spacings(self) -> Counter[int]:
        """Frames from an annotated frame to the next → how often."""
        result: Counter[int] = Counter()
        for frames in self._videos.values():
            numbers = sorted(frame.number for frame in frames)
            result.update(b - a for a, b in itertools.pairwise(numbers))
        return result

    def counts(self, length: int, video_ids: Iterable[Hashable] | None = None) -> Counts:
        """Matches, wrong and missed tubes of all windows of ``length`` annotated frames.

        A clip with fewer annotated frames has no window.

        Args:
            length: 1 and up
            video_ids: clips that count; None: all
        """
        total = Counts.zeros(self._num_classes)
        for video_id in self._videos if video_ids is None else video_ids:
            clip = _Clip(self._videos[video_id])
            for start in range(clip.length - length + 1):
                total.add(clip.window(start, start + length).counts(self._num_classes))
        return total

    def recall_by_visibility(
        self, length: int, labels: Sequence[int], limit: float = 0.8
    ) -> dict[str, dict[str, float]]:
        """How well tubes are found that are hidden in part somewhere, and the others.

        Args:
            length: of windows, in annotated frames
            labels: classes that count
            limit: a tube is "hidden" if in a frame of the window its visibility is below it

        Returns:
            for "hidden" and "visible": ``tubes``, how many; ``recall``, the share of them that has a
            match; ``iou``, the mean over all of them of the best IoU with a prediction of their class
            (0: there is none). NaN where there is no tube; empty if no annotation has a visibility
        """
        rows = []
        for frames in self._videos.values():
            clip = _Clip(frames)
            for start in range(clip.length - length + 1):
                window = clip.window(start, start + length)
                counted = np.isin(window.target_labels, labels) & ~window.crowd
                counted &= ~np.isnan(window.visibility)
                best = window.best_iou()[counted]
                rows.append(np.stack([window.visibility[counted], best], axis=1))
        visibility, iou = np.concatenate(rows or [np.zeros((0, 2))]).T
        if not len(iou):
            return {}
        hidden = visibility < limit
        result = {}
        for name, ious in (("hidden", iou[hidden]), ("visible", iou[~hidden])):
            share = (ious > _MATCH_IOU).mean() if len(ious) else np.nan
            mean = ious.mean() if len(ious) else np.nan
            result[name] = {"tubes": len(ious), "recall": float(share), "iou": float(mean)}
        return result

    def id_switches(self, video_id: Hashable, labels: Sequence[int]) -> list[IdSwitch]:
        """Where objects of some classes are found under another id than when last found.

        Found is an object in a frame in which its segment matches one.

        Args:
            labels: of things
        """
        clip = _Clip(self._videos[video_id])
        last: dict[int, int] = {}
        switches = []
        for time in range(clip.length):
            window = clip.window(time, time + 1)
            for target, prediction, _ in window.matches():
                if window.target_labels[target] not in labels:
                    continue
                before = last.get(target, prediction)
                last[target] = prediction
                if before != prediction:
                    names = clip.targets[target], clip.predictions[before]
                    number = clip.numbers[time]
                    switches.append(IdSwitch(number, *names, clip.predictions[prediction]))
        return switches


def window_length(k: int, spacing: int) -> int:
    """Annotated frames of a window of ``k`` frames: k // spacing + 1 (0: a single frame).

    Cityscapes-VPS has annotated every fifth, so that its 0, 5, 10, 15 are 1 to 4.
    """
    return k // spacing + 1


class _Clip:
    """Tables of a clip: tubes are numbered from 1, 0 is void or nothing."""

    def __init__(self, frames: Sequence[_Frame]) -> None:
        frames = sorted(frames, key=lambda frame: frame.number)
        self.length = len(frames)
        self.numbers = [frame.number for frame in frames]
        self.targets: list[Hashable] = [None]
        self.predictions: list[Hashable] = [None]
        numbered = [
            _number((f.targets for f in frames), self.targets),
            _number((f.predictions for f in frames), self.predictions),
        ]
        shared = []
        for frame, *tubes in zip(frames, *numbered, strict=True):
            rows, columns, values = frame.shared.T
            shared.append(np.stack([tubes[0][rows], tubes[1][columns], values], axis=1))
        self._shared, self._shared_ends = _joined(shared, 3)
        self._segments = [
            _joined(
                [
                    np.array(
                        [
                            (n, s.label, s.iscrowd, s.area or 0, _or_nan(s.visibility))
                            for n, s in zip(numbers[1:].tolist(), segments, strict=True)
                        ],
                        np.float64,
                    ).reshape(-1, 5)
                    for numbers, segments in zip(side, lists, strict=True)
                ],
                5,
            )
            for side, lists in zip(
                numbered,
                ([f.targets for f in frames], [f.predictions for f in frames]),
                strict=True,
            )
        ]

    def window(self, start: int, stop: int) -> "_Window":
        """Frames ``start`` to ``stop`` - 1 of the annotated ones."""
        shared = self._shared[self._shared_ends[start] : self._shared_ends[stop]]
        targets, predictions = (rows[ends[start] : ends[stop]] for rows, ends in self._segments)
        return _Window(shared, targets, predictions, len(self.targets), len(self.predictions))


class _Window:
    """Tubes of a window.

    Attributes:
        target_labels, predicted_labels: (T + 1,), (Q + 1,) int64 class of each tube of the clip, -1: not
            in this window
        crowd: (T + 1,) bool
        visibility: (T + 1,) the least over the frames, NaN: not known
    """

    def __init__(
        self,
        shared: np.ndarray,
        targets: np.ndarray,
        predictions: np.ndarray,
        num_targets: int,
        num_predictions: int,
    ) -> None:
        """
        Args:
            shared: (M, 3) int64 target, prediction, pixels
            targets, predictions: (N, 5) float64 tube, label, crowd, area, visibility of segments
            num_targets, num_predictions: T + 1, Q + 1
        """
        codes, inverse = np.unique(
            shared[:, 0] * num_predictions + shared[:, 1], return_inverse=True
        )
        pixels = np.bincount(inverse.reshape(-1), weights=shared[:, 2], minlength=len(codes))
        self._rows, self._columns = np.divmod(codes, num_predictions)
        first, order = _first(targets, num_targets)
        self.target_labels, self.crowd = first[:, 0], first[:, 1] > 0
        predicted, _ = _first(predictions, num_predictions)
        self._area = np.bincount(self._columns, weights=pixels, minlength=num_predictions)
        # A segment that is listed but has no pixel is no prediction.
        self.predicted_labels = np.where(self._area > 0, predicted[:, 0], -1)
        tubes = targets[:, 0].astype(np.int64)
        area = np.bincount(tubes, weights=targets[:, 3], minlength=num_targets)
        self.visibility = np.full(num_targets, np.nan)
        np.fmin.at(self.visibility, tubes, targets[:, 4])

        of_void = self._rows == 0
        self._ignored = np.zeros(num_predictions)
        self._ignored[self._columns[of_void]] = pixels[of_void]
        union = area[self._rows] + self._area[self._columns] - pixels - self._ignored[self._columns]
        same = self.target_labels[self._rows] == self.predicted_labels[self._columns]
        self._same = same & (self._rows > 0) & (self._columns > 0) & ~self.crowd[self._rows]
        self._iou = np.where(union > 0, pixels / np.maximum(union, 1), 0.0)
        self._ignore_crowds(pixels, order)

    def _ignore_crowds(self, pixels: np.ndarray, order: np.ndarray) -> None:
        """Add to what is ignored of predictions the last crowd of their class."""
        last = {self.target_labels[tube]: tube for tube in order if self.crowd[tube]}
        for label, tube in last.items():
            on_it = (self._rows == tube) & (self.predicted_labels[self._columns] == label)
            on_it &= self._columns > 0
            self._ignored[self._columns[on_it]] += pixels[on_it]

    def matches(self) -> list[tuple[int, int, float]]:
        """Tubes of annotation and prediction, and their IoU."""
        keep = self._same & (self._iou > _MATCH_IOU)
        found = self._rows[keep], self._columns[keep], self._iou[keep]
        return list(zip(*(values.tolist() for values in found), strict=True))

    def best_iou(self) -> np.ndarray:
        """(T + 1,) with a prediction of the same class; 0: none."""
        best = np.zeros(len(self.target_labels))
        np.maximum.at(best, self._rows[self._same], self._iou[self._same])
        return best

    def counts(self, num_classes: int) -> Counts:
        """Of this window."""
        counts = Counts.zeros(num_classes)
        keep = self._same & (self._iou > _MATCH_IOU)
        rows, columns = self._rows[keep], self._columns[keep]
        np.add.at(counts.iou, self.target_labels[rows], self._iou[keep])
        np.add.at(counts.tp, self.target_labels[rows], 1)
        missed = (self.target_labels >= 0) & ~self.crowd
        missed[rows] = False
        np.add.at(counts.fn, self.target_labels[missed], 1)
        wrong = self.predicted_labels >= 0
        wrong[columns] = False
        wrong &= self._ignored <= _IGNORED_SHARE * self._area
        np.add.at(counts.fp, self.predicted_labels[wrong], 1)
        return counts


def _number(frames: Iterable[Sequence[TubeSegment]], names: list[Hashable]) -> list[np.ndarray]:
    """Numbers of the tubes of each frame's segments, 0 in front; ``names`` gets new ones appended."""
    numbers: dict[Hashable, int] = {}
    result = []
    for segments in frames:
        of_frame = [0]
        for segment in segments:
            number = numbers.setdefault(segment.tube, len(numbers) + 1)
            if number == len(names):
                names.append(segment.tube)
            of_frame.append(number)
        result.append(np.array(of_frame, np.int64))
    return result


def _joined(arrays: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, list[int]]:
    """All rows, and where those of each frame begin; the last: where all end."""
    ends = np.cumsum([0, *map(len, arrays)]).tolist()
    return np.concatenate(arrays).reshape(-1, width), ends


def _first(segments: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(size, 2) int64 label and crowd of each tube's first segment, -1: none; tubes as they come."""
    tubes, first = np.unique(segments[:, 0].astype(np.int64), return_index=True)
    result = np.full((size, 2), -1, np.int64)
    result[tubes] = segments[first, 1:3]
    return result, tubes[np.argsort(first)]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
