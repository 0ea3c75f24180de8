"""Track mask AP of YouTube-VIS ("Video Instance Segmentation", arXiv 1905.04804).

COCO's protocol with tracks as objects and videos as images; what differs is the IoU of two tracks (sum
of intersections over sum of unions, over all frames), the area of a track (mean over the frames in which
it has a mask) and the limits of areas. So this is pycocotools' evaluation with these three replaced.

Libraries were compared on a fixture of the official code. ``trackeval`` 1.3.0 (``TrackMAP``) matches a
crowd track only once and has no limits of 1 and 10 tracks a video: AP 12.934 for 12.959. ``hotcoco``
1.3.0 evaluates no tracks. Both are therefore not used here.

Letters: P predicted tracks, G target tracks.
"""

import contextlib
import io
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["Track", "average_precision", "evaluate_tracks", "track_iou", "track_results"]

_HUGE = 1e5**2
# All, small, medium, large: pixels; of the official code, larger than COCO's.
_AREAS = [[0, _HUGE], [0, 128**2], [128**2, 256**2], [256**2, _HUGE]]
_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class Track:
    """An object over the frames of a video.

    Attributes:
        video_id, category_id: whose and what
        masks: frame -> compressed RLE; a frame where the object is not visible is not there
        score: of a predicted track, 0..1
        iscrowd: of a target: predictions that match it do not count
    """

    video_id: Hashable
    category_id: int
    masks: dict[int, dict[str, Any]] = field(default_factory=dict)
    score: float = 1.0
    iscrowd: int = 0

    @property
    def area(self) -> float:
        """Mean over the frames with a mask, in pixels; 0 if there is none."""
        return float(mask_util.area(list(self.masks.values())).mean()) if self.masks else 0.0


def track_iou(
    predictions: Sequence[dict[int, dict[str, Any]]], targets: Sequence[dict[int, dict[str, Any]]]
) -> np.ndarray:
    """IoU of tracks of one video, each with each; each is a dict of frame -> RLE.

    Returns:
        (P, G) float64
    """
    common = np.zeros((len(predictions), len(targets)))
    areas = [np.zeros(len(predictions)), np.zeros(len(targets))]
    for frame in sorted({frame for track in (*predictions, *targets) for frame in track}):
        places = [[i for i, t in enumerate(ts) if frame in t] for ts in (predictions, targets)]
        rows, columns = places
        d = [predictions[i][frame] for i in rows]
        g = [targets[i][frame] for i in columns]
        sizes = [mask_util.area(masks).astype(np.float64) for masks in (d, g)]
        for total, place, size in zip(areas, places, sizes, strict=True):
            total[place] += size
        if d and g:
            iou = mask_util.iou(d, g, [0] * len(g))
            # A whole number of pixels, which the IoU and the two areas determine.
            pixels = np.rint(iou * (sizes[0][:, None] + sizes[1]) / (1 + iou))
            common[np.ix_(rows, columns)] += pixels
    union = areas[0][:, None] + areas[1] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


class _TrackEval(COCOeval):
    """``image_id`` is the place of the video; ``masks`` of an annotation are those of a track."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        targets, predictions = self._gts[imgId, catId], self._dts[imgId, catId]
        if not targets or not predictions:
            return []
        order = np.argsort([-d["score"] for d in predictions], kind="mergesort")
        selected = [predictions[i]["masks"] for i in order[: self.params.maxDets[-1]]]
        return track_iou(selected, [g["masks"] for g in targets])


def evaluate_tracks(
    targets: Sequence[Track], predictions: Sequence[Track], categories: Sequence[int]
) -> COCOeval:
    """Compare tracks; see :func:`track_results` for numbers.

    Args:
        targets, predictions: of all videos; predictions in videos without targets are wrong ones
        categories: ids

    Returns:
        pycocotools' evaluation, summarized: ``stats`` (12,), and in ``eval`` ``precision``
        (10 IoUs, 101 recalls, categories, 4 areas, 1/10/100 tracks) and ``recall`` without recalls;
        its images are videos in the order of their first track here
    """
    videos = {t.video_id: None for t in (*targets, *predictions)}
    places = {video: place for place, video in enumerate(videos)}
    scorer = _TrackEval(
        _tracks_as_coco(targets, places, categories),
        _tracks_as_coco(predictions, places, categories),
        "bbox",  # pycocotools would look for one mask in each annotation
    )
    scorer.params.areaRng = _AREAS
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def track_results(scorer: COCOeval, class_names: Sequence[str]) -> dict[str, float]:
    """AP, AP50, AP75, AR1, AR10, ... and, for several classes, AP-<class>: 0..100, NaN where there is no
    target. ``class_names`` are in the order of the categories' ids."""
    results = {
        name: 100 * float(value) if value >= 0 else float("nan")
        for name, value in zip(_NAMES, scorer.stats, strict=True)
    }
    if len(class_names) > 1:
        precision = scorer.eval["precision"][:, :, :, 0, -1]
        for place, name in enumerate(class_names):
            results[f"AP-{name}"] = average_precision(precision[:, :, place])
    return results


def average_precision(precision: np.ndarray) -> float:
    """Mean of what exists (not -1) of ``precision`` of pycocotools: 0..100, NaN if nothing does."""
    precision = precision[precision > -1]
    return 100 * float(precision.mean()) if precision.size else float("nan")


def _tracks_as_coco(
    tracks: Sequence[Track], places: dict[Hashable, int], categories: Sequence[int]
) -> COCO:
    api = COCO()
    api.dataset = {
        "images": [{"id": place} for place in places.values()],
        "categories": [{"id": category} for category in categories],
        "annotations": [
            {
                "id": number,  # 0 means "no match"
                "image_id": places[track.video_id],
                "category_id": track.category_id,
                "masks": track.masks,
                "area": track.area,
                "iscrowd": track.iscrowd,
                "score": track.score,
            }
            for number, track in enumerate(tracks, 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api
