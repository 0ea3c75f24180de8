"""Panoptic quality of one image: which predicted segment is which annotated segment.

The rules are panopticapi's (arXiv 1801.00868, section 4.1, and its evaluation script): a pair of the
same class with IoU > 0.5 is a match, pixels annotated as void do not count as part of a prediction,
crowds are neither matched nor missed, and a prediction more than half of which is void or crowd of its
class is not held against the model.

G: annotated segments, P: predicted segments, C: classes, by their label in a full map (stuff, then
things).
"""

from dataclasses import dataclass

import numpy as np

# A match has an IoU above this (in the paper; then it is unique).
_MATCH_IOU = 0.5
# A prediction with a larger share of void and crowd is ignored.
_IGNORED_SHARE = 0.5


@dataclass
class Counts:
    """What panoptic quality is computed from.

    Attributes:
        iou: (C,) float64, sum over matches
        tp, fp, fn: (C,) int64, matches, wrong predictions, missed segments
    """

    iou: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray

    @classmethod
    def zeros(cls, num_classes: int) -> "Counts":
        """Of ``num_classes`` classes."""
        counts = [np.zeros(num_classes, np.int64) for _ in range(3)]
        return cls(np.zeros(num_classes), *counts)

    def add(self, other: "Counts") -> None:
        """Add the counts of other images, in place."""
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn

    def quality(self) -> np.ndarray:
        """(C, 3) PQ, SQ, RQ in [0, 1] of each class; NaN for a class that never occurred."""
        total = self.tp + 0.5 * self.fp + 0.5 * self.fn
        with np.errstate(invalid="ignore", divide="ignore"):
            pq, rq = self.iou / total, self.tp / total
            sq = np.where(self.tp > 0, self.iou / self.tp, 0.0)
        result = np.stack([pq, sq, rq], axis=1)
        result[total == 0] = np.nan
        return result

    def mean_quality(
        self, selected: slice | np.ndarray = slice(None)
    ) -> tuple[float, float, float, int]:
        """PQ, SQ, RQ averaged over the classes that occurred, and how many these are.

        Args:
            selected: classes to average over

        Returns:
            NaN for the three if none occurred
        """
        quality = self.quality()[selected]
        quality = quality[~np.isnan(quality[:, 0])]
        if not len(quality):
            return float("nan"), float("nan"), float("nan"), 0
        pq, sq, rq = quality.mean(axis=0).tolist()
        return pq, sq, rq, len(quality)


@dataclass
class ImageMatches:
    """Result of :func:`match_segments`.

    Attributes:
        counts: for panoptic quality
        confusion: (C+1, C+1) int64 segments, row: annotated class, column: predicted class, where
            two segments overlap with IoU > 0.5 whatever their classes; row C: predictions without
            such an annotated partner, column C: annotated segments without one
        pixels: (C+1, C+1) int64 pixels, likewise; C is void
    """

    counts: Counts
    confusion: np.ndarray
    pixels: np.ndarray


def match_segments(
    targets: np.ndarray,
    target_labels: np.ndarray,
    crowd: np.ndarray,
    predicted: np.ndarray,
    predicted_labels: np.ndarray,
    num_classes: int,
) -> ImageMatches:
    """Match the segments of one image.

    Args:
        targets: H×W int, 0 void, i+1 the i-th segment
        target_labels: (G,) int in [0, C)
        crowd: (G,) bool
        predicted: H×W int, 0 void, i+1 the i-th predicted segment
        predicted_labels: (P,) int in [0, C)
        num_classes: C
    """
    num_targets, num_predicted = len(target_labels), len(predicted_labels)
    pairs = targets.astype(np.int64) * (num_predicted + 1) + predicted
    shared = np.bincount(pairs.reshape(-1), minlength=(num_targets + 1) * (num_predicted + 1))
    shared = shared.reshape(num_targets + 1, num_predicted + 1)

    inner = shared[1:, 1:]
    target_area, predicted_area = shared.sum(axis=1)[1:], shared.sum(axis=0)[1:]
    union = target_area[:, None] + predicted_area - inner - shared[0, 1:]
    iou = inner / np.maximum(union, 1)
    same = target_labels[:, None] == predicted_labels
    overlaps = (iou > _MATCH_IOU) & ~crowd[:, None]
    matched = overlaps & same

    ignored = _ignored(shared, target_labels, crowd, predicted_labels, same)
    counts = Counts.zeros(num_classes)
    rows, columns = np.nonzero(matched)
    np.add.at(counts.iou, target_labels[rows], iou[rows, columns])
    np.add.at(counts.tp, target_labels[rows], 1)
    missed = ~matched.any(axis=1) & ~crowd
    wrong = ~matched.any(axis=0) & ~ignored
    np.add.at(counts.fn, target_labels[missed], 1)
    np.add.at(counts.fp, predicted_labels[wrong], 1)

    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    rows, columns = np.nonzero(overlaps)
    np.add.at(confusion, (target_labels[rows], predicted_labels[columns]), 1)
    alone = target_labels[~overlaps.any(axis=1) & ~crowd]
    np.add.at(confusion, (alone, num_classes), 1)
    spurious = predicted_labels[~overlaps.any(axis=0) & ~ignored]
    np.add.at(confusion, (num_classes, spurious), 1)

    pixels = np.zeros_like(confusion)
    rows_of = np.concatenate([[num_classes], target_labels]).astype(np.int64)
    columns_of = np.concatenate([[num_classes], predicted_labels]).astype(np.int64)
    np.add.at(pixels, (rows_of[:, None], columns_of), shared)
    return ImageMatches(counts, confusion, pixels)


def _ignored(
    shared: np.ndarray,
    target_labels: np.ndarray,
    crowd: np.ndarray,
    predicted_labels: np.ndarray,
    same: np.ndarray,
) -> np.ndarray:
    """(P,) bool: predictions that lie mostly on void and on the crowd of their class.

    Of several crowds of a class, panopticapi counts the last that the JSON file lists.
    """
    void = shared[0, 1:]
    crowds = same & crowd[:, None]
    last = len(target_labels) - 1 - crowds[::-1].argmax(axis=0) if len(target_labels) else None
    on_crowd = np.zeros_like(void)
    if last is not None:
        columns = np.arange(len(predicted_labels))
        on_crowd = np.where(crowds.any(axis=0), shared[1:, 1:][last, columns], 0)
    area = shared.sum(axis=0)[1:]
    return (void + on_crowd) / np.maximum(area, 1) > _IGNORED_SHARE
