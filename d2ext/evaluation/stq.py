"""Segmentation and Tracking Quality of panoptic videos ("STEP", arXiv 2102.11859).

STQ = sqrt(AQ x IoU). IoU: mean of the class IoUs over all pixels that are labelled. AQ: how well the
tracks of things lie over those of the annotations, whatever their class says.

Published quirk, kept because the published numbers have it: as soon as one labelled pixel has no
prediction, "no prediction" counts as one more class, with IoU 0.

Letters: P predicted segments of a frame, G target segments.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["SegmentationTrackingQuality", "VideoSegment"]


class VideoSegment(NamedTuple):
    """A segment of a frame.

    Attributes:
        category: any name or number, not the same for a thing and stuff
        track_id: of a thing; None: stuff, a crowd of the annotations, a predicted thing without an id
        iscrowd: of the annotations: no track is compared there
    """

    category: Hashable
    track_id: Hashable | None = None
    iscrowd: bool = False


class _Sequence:
    """Pixels of a video, counted by class and by track; a track is (category, track id)."""

    def __init__(self) -> None:
        # (category of the target, of the prediction or None) -> pixels
        self.categories: Counter[tuple[Hashable, Hashable]] = Counter()
        self.targets: Counter[Hashable] = Counter()
        self.predictions: Counter[Hashable] = Counter()
        self.common: Counter[tuple[Hashable, Hashable]] = Counter()


class SegmentationTrackingQuality:
    """Adds up frames; the memory grows with the number of tracks, not of frames."""

    def __init__(self) -> None:
        self._sequences: defaultdict[Hashable, _Sequence] = defaultdict(_Sequence)

    def update(
        self,
        video_id: Hashable,
        pixels: np.ndarray,
        targets: Sequence[VideoSegment],
        predictions: Sequence[VideoSegment],
    ) -> None:
        """Add a frame.

        Args:
            video_id: frames of a video may come in any order
            pixels: (G + 1, P + 1) counts of pixels, see :func:`overlap_pixels`; row 0: not labelled
                (void), column 0: nothing predicted
            targets, predictions: G, P segments; several may belong to one track
        """
        sequence = self._sequences[video_id]
        target_tracks = [(s.category, s.track_id) for s in targets]
        for row, column in zip(*np.nonzero(pixels), strict=True):
            count = int(pixels[row, column])
            target = targets[row - 1] if row else None
            prediction = predictions[column - 1] if column else None
            if target is not None:
                category = prediction.category if prediction is not None else None
                sequence.categories[target.category, category] += count
                if target.iscrowd:
                    continue
                if target.track_id is not None:
                    sequence.targets[target_tracks[row - 1]] += count
            if prediction is not None and prediction.track_id is not None:
                track = (prediction.category, prediction.track_id)
                sequence.predictions[track] += count
                if target is not None and target.track_id is not None:
                    sequence.common[target_tracks[row - 1], track] += count

    def merge(self, other: "SegmentationTrackingQuality") -> None:
        """Add the videos of another process; no video may be in both."""
        self._sequences.update(other._sequences)

    def compute(self) -> dict[str, float]:
        """STQ, AQ, IoU of all videos: 0..1; NaN where the annotations have nothing for it."""
        sequences = list(self._sequences.values())
        association, iou = _association(sequences), _class_iou(sequences)
        return {"STQ": math.sqrt(association * iou), "AQ": association, "IoU": iou}


def overlap_pixels(
    targets: np.ndarray, predictions: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Pixels that places of two maps have in common.

    Args:
        targets, predictions: (H, W) whole numbers from 0
        shape: G + 1, P + 1: numbers that may occur

    Returns:
        (G + 1, P + 1) int64
    """
    if targets.shape != predictions.shape:
        raise ValueError(
            f"The predicted panoptic map is {predictions.shape}, the frame's {targets.shape} (H, W)."
        )
    pairs = targets.astype(np.int64) * shape[1] + predictions
    return np.bincount(pairs.reshape(-1), minlength=shape[0] * shape[1]).reshape(shape)


def _association(sequences: Sequence[_Sequence]) -> float:
    total, count = 0.0, 0
    for sequence in sequences:
        count += len(sequence.targets)
        for (target, prediction), common in sequence.common.items():
            size = sequence.targets[target]
            union = size + sequence.predictions[prediction] - common
            total += common * common / union / size
    return total / count if count else math.nan


def _class_iou(sequences: Sequence[_Sequence]) -> float:
    common: Counter[Hashable] = Counter()
    either: Counter[Hashable] = Counter()
    for sequence in sequences:
        for (target, prediction), count in sequence.categories.items():
            either[target] += count
            if prediction == target:
                common[target] += count
            else:
                either[prediction] += count  # None, too: see the head of this file
    ious = [common[category] / count for category, count in either.items()]
    return sum(ious) / len(ious) if ious else math.nan
