"""How well ids stay with their objects: IDF1 (arXiv 1609.01775), HOTA (arXiv 2009.07736), MOTA.

The metrics are those of ``trackeval``, the official code of HOTA, from ids and similarities alone:
boxes, masks and keypoints differ only in the similarity. The package is optional. Its metadata ask for
the newest NumPy and for a second OpenCV; its metrics import NumPy and SciPy only and run with NumPy 1.26
and 2. ``trackers`` 2.6.1 has these metrics, too, derived from the same code, behind more requirements.

Letters: P predictions and G targets of a frame, K keypoints. Both are dicts in COCO's form: ``bbox``
(XYWH), ``category_id``, ``track_id`` and, where they are compared, ``segmentation`` and ``keypoints``.
"""

from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util

__all__ = ["INSTALL", "IdentityFrame", "compare_frame", "identity_available", "identity_metrics"]

# Pairs below it are no matches for IDF1 and MOTA; HOTA averages over 0.05 to 0.95.
_THRESHOLD = 0.5
# A prediction without a match is left out where more than this part of it is crowd, as in MOTS.
_IN_CROWD = 0.5
_PERCENT = ("IDF1", "IDP", "IDR", "HOTA", "DetA", "AssA", "LocA", "MOTA")
INSTALL = "pip install scipy && pip install --no-deps trackeval"


class IdentityFrame(NamedTuple):
    """A frame: ids of G targets and P predictions, all different, and how similar they are.

    Attributes:
        target_ids: (G,) constant over the video
        predicted_ids: (P,)
        similarity: (G, P) in 0..1
    """

    target_ids: Sequence[Hashable]
    predicted_ids: Sequence[Hashable]
    similarity: np.ndarray


def identity_available() -> bool:
    """Whether the package is installed."""
    return find_spec("trackeval") is not None and find_spec("scipy") is not None


def identity_metrics(videos: Sequence[Sequence[IdentityFrame]]) -> dict[str, float]:
    """Metrics over all videos, each a list of its frames in order.

    Returns:
        IDF1, IDP, IDR, HOTA, DetA, AssA, LocA, MOTA (at most 100, may be negative) in percent, and
        IDSW, the number of times that an object gets another id; NaN if there is no target at all

    Raises:
        ImportError: the package is not installed; the message says what to install.
    """
    if not identity_available():
        raise ImportError(f"IDF1 and HOTA need the package trackeval: {INSTALL}.")
    from trackeval.metrics import CLEAR, HOTA, Identity

    options = {"THRESHOLD": _THRESHOLD, "PRINT_CONFIG": False}
    metrics = [Identity(options), HOTA(), CLEAR(options)]
    sequences = [_sequence(frames) for frames in videos]
    if not any(sequence["num_gt_dets"] for sequence in sequences):
        return dict.fromkeys((*_PERCENT, "IDSW"), float("nan"))
    results: dict[str, Any] = {}
    for metric in metrics:
        each = {i: metric.eval_sequence(sequence) for i, sequence in enumerate(sequences)}
        results.update(metric.combine_sequences(each))
    percent = {name: 100 * float(np.mean(results[name])) for name in _PERCENT}
    return {**percent, "IDSW": float(results["IDSW"])}


def _sequence(frames: Sequence[IdentityFrame]) -> dict[str, Any]:
    """A video in the form that trackeval's metrics read: ids count from 0."""
    result: dict[str, Any] = {
        "num_timesteps": len(frames),
        "similarity_scores": [
            np.asarray(f.similarity, dtype=np.float64).reshape(
                len(f.target_ids), len(f.predicted_ids)
            )
            for f in frames
        ],
    }
    for key, lists in (
        ("gt", [f.target_ids for f in frames]),
        ("tracker", [f.predicted_ids for f in frames]),
    ):
        places: dict[Hashable, int] = {}
        numbered = [[places.setdefault(i, len(places)) for i in ids] for ids in lists]
        result[f"{key}_ids"] = [np.array(ids, dtype=np.int64) for ids in numbered]
        result[f"num_{key}_ids"] = len(places)
        result[f"num_{key}_dets"] = sum(map(len, numbered))
    return result


def compare_frame(
    kind: str,
    targets: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    *,
    to_rle: Callable[[dict[str, Any]], Any],
    sigmas: Sequence[float],
) -> IdentityFrame:
    """Ids and similarities of a frame.

    Crowds, and targets without what is compared, are not in it, nor are predictions that lie in one of
    them and match nothing else. Different classes are not similar.

    Args:
        kind: "segm": IoU of masks; "bbox": IoU of boxes; "keypoints": OKS
        targets, predictions: each ``track_id`` once, of a target once for each class
        to_rle: compressed RLE of an entry's ``segmentation``
        sigmas: (K,) constants of OKS
    """
    scored = [t for t in targets if _is_scored(kind, t)]
    others = [t for t in targets if not _is_scored(kind, t)]
    same_class = _same_class(scored, predictions)
    if not scored or not predictions:
        similarity = np.zeros(same_class.shape)
    elif kind == "keypoints":
        similarity = _keypoint_similarity(scored, predictions, np.array(sigmas)) * same_class
    else:
        shapes = [[_shape(kind, x, to_rle) for x in entries] for entries in (scored, predictions)]
        similarity = mask_util.iou(*shapes, [0] * len(predictions)) * same_class
    if others and predictions:
        shapes = [[_shape(kind, x, to_rle) for x in entries] for entries in (predictions, others)]
        inside = mask_util.iou(*shapes, [1] * len(others)).T * _same_class(others, predictions)
        keep = inside.max(axis=0) <= _IN_CROWD
        keep |= similarity.max(axis=0, initial=0) >= _THRESHOLD
        predictions = [p for p, stays in zip(predictions, keep, strict=True) if stays]
        similarity = similarity[:, keep]
    return IdentityFrame(
        [(t["track_id"], t["category_id"]) for t in scored],
        [p["track_id"] for p in predictions],
        similarity,
    )


def _is_scored(kind: str, target: dict[str, Any]) -> bool:
    if kind == "keypoints" and not target["num_keypoints"]:
        return False
    return not target["iscrowd"] and (kind != "segm" or "segmentation" in target)


def _shape(kind: str, entry: dict[str, Any], to_rle: Callable[[dict[str, Any]], Any]) -> Any:
    """What overlaps: the mask, or the box."""
    if kind != "segm":
        return np.array(entry["bbox"], dtype=np.float64)
    if "segmentation" not in entry:  # of what is not scored
        x, y, w, h = entry["bbox"]
        entry = {**entry, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    return to_rle(entry)


def _keypoint_similarity(
    targets: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]], sigmas: np.ndarray
) -> np.ndarray:
    """(G, P) COCO's OKS: over the labelled keypoints of each target, with its area."""
    rows = []
    points = np.array([r["keypoints"] for r in predictions], dtype=np.float64)
    points = points.reshape(len(predictions), -1, 3)[..., :2]
    for target in targets:
        xyv = np.array(target["keypoints"], dtype=np.float64).reshape(-1, 3)
        squares = np.square(points - xyv[:, :2]).sum(axis=-1)
        scale = 2 * (target["area"] + np.spacing(1)) * np.square(2 * sigmas)
        rows.append(np.exp(-squares / scale)[:, xyv[:, 2] > 0].mean(axis=1))
    return np.stack(rows)


def _same_class(
    targets: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]
) -> np.ndarray:
    classes = [np.array([x["category_id"] for x in entries]) for entries in (targets, predictions)]
    return classes[0][:, None] == classes[1]
