"""Panoptic segmentation of videos."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from d2ext.data.panoptic import read_segments
from d2ext.evaluation.stq import SegmentationTrackingQuality, VideoSegment, overlap_pixels

__all__ = ["VideoPanopticEvaluator"]

logger = logging.getLogger(__name__)


class VideoPanopticEvaluator(DatasetEvaluator):
    """Segmentation and Tracking Quality (:mod:`~d2ext.evaluation.stq`) on the annotated frames.

    They are those with ``pan_seg_file_name`` and ``segments_info``, whose things have ``track_id``.
    An annotated frame without a prediction (it could not be read) is one where nothing is predicted.
    """

    def __init__(self, dataset_name: str) -> None:
        """``dataset_name``: its records are videos."""
        self._name = dataset_name
        self._annotated = {
            frame["image_id"]: (
                video["video_id"],
                frame["pan_seg_file_name"],
                frame["segments_info"],
            )
            for video in DatasetCatalog.get(dataset_name)
            for frame in video["frames"]
            if "pan_seg_file_name" in frame
        }
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._quality = SegmentationTrackingQuality()
        self._seen: set[Any] = set()
        self._tracked = False

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some frames, annotated or not.

        Args:
            inputs: with ``image_id``.
            outputs: with ``panoptic_seg``: (H, W) ids and the list of their segments with ``id``,
                ``category_id``, ``isthing`` and, for things, ``track_id`` (-1: no id).
        """
        for one_input, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            self._tracked |= any("track_id" in s for s in segments)
            if one_input["image_id"] in self._annotated:
                self._update(one_input["image_id"], ids.cpu().numpy(), segments)

    def _update(
        self, image_id: Any, ids: np.ndarray | None, segments: Sequence[dict[str, Any]]
    ) -> None:
        """Add a frame; ids None: nothing is predicted."""
        video_id, file_name, annotated = self._annotated[image_id]
        targets = read_segments(file_name, annotated, allow_absent=True)
        shape = (len(annotated) + 1, len(segments) + 1)
        places = np.zeros_like(targets) if ids is None else _places(ids, segments)
        pixels = overlap_pixels(targets, places, shape)
        self._quality.update(
            video_id, pixels, [*map(_segment, annotated)], [*map(_segment, segments)]
        )
        self._seen.add(image_id)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Gather and score.

        Returns:
            ``{"video_panoptic_seg": {"STQ", "AQ", "IoU"}}``, 0..100; empty where no prediction has ids;
            None in all processes but the main one
        """
        gathered = comm.gather((self._quality, self._seen, self._tracked), dst=0)
        if not comm.is_main_process():
            return None
        if not self._annotated:
            logger.warning(
                "Data set '%s' has no annotated frame: there is nothing to compare with.",
                self._name,
            )
            return {}
        if not any(tracked for _, _, tracked in gathered):
            logger.warning("The predicted segments have no track_id: STQ is left out.")
            return {}
        for quality, seen, _ in gathered:
            self._quality.merge(quality)
            self._seen |= seen
        for image_id in self._annotated.keys() - self._seen:
            self._update(image_id, None, [])
        results = {name: 100 * value for name, value in self._quality.compute().items()}
        shown = ", ".join(f"{name} {value:.2f}" for name, value in results.items())
        logger.info("Panoptic videos of '%s': %s", self._name, shown)
        return {"video_panoptic_seg": results}


def _segment(segment: dict[str, Any]) -> VideoSegment:
    thing = bool(segment["isthing"])
    crowd = thing and bool(segment.get("iscrowd", 0))
    track = segment.get("track_id", -1)
    tracked = thing and not crowd and track >= 0
    # Things and stuff are numbered separately.
    return VideoSegment(
        (thing, int(segment["category_id"])), int(track) if tracked else None, crowd
    )


def _places(ids: np.ndarray, segments: Sequence[dict[str, Any]]) -> np.ndarray:
    """(H, W) ids -> 0: of no segment, i + 1: of the i-th."""
    ids = np.maximum(ids, 0)
    table = np.zeros(max(int(ids.max(initial=0)), *(s["id"] for s in segments), 0) + 1, np.uint16)
    for place, segment in enumerate(segments, 1):
        table[segment["id"]] = place
    return table[ids]
