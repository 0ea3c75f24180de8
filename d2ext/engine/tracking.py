"""Ids for the instances of systems that give none: each frame's detections are matched to tracks.

The tracker is Norfair (BSD-3; package ``norfair-enough``, its maintained fork, for NumPy 1 and 2, with
no need of OpenCV). It alone lets masks and keypoints decide beside boxes, for it takes any distance and
points. IDF1 on 16 clips of `shapes` (ground truth with 6 % noise, 15 % of the detections dropped, false
ones added; in brackets without), recall of ids, and the time for 100 objects:

- Norfair: boxes 77.2 (90.4), with masks 77.8 (90.8), with keypoints 78.6 (90.2); recall 75; 22 to 65 ms
- ``trackers`` 2.6 (Apache 2.0): OC-SORT 81.5 (92.3), C-BIoU 80.4 (89.2), SORT 75.5 (88.8); recall 68 to
  72, for a track's first detection gets no id, which keeps false ones out (Norfair so: 80.3 with
  keypoints); boxes only; 15 ms
- ``detectron2.tracking``: at best 61.0 (75.4); adds lost objects to the output; no keypoints; 86 ms

N detections and M tracks of a frame, K keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.common.registry import Registry
from pycocotools.cocoeval import Params
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import ConfigError
from d2ext.modeling.video import begins

__all__ = ["TRACKER_REGISTRY", "NorfairTracker", "build_tracked", "build_tracker", "give_ids"]

TRACKER_REGISTRY = Registry("TRACKER")
TRACKER_REGISTRY.__doc__ = """
Trackers by the name that ``TEST.TRACKER`` and ``--tracker`` give. Each is made with the keyword argument
``keypoint_sigmas``, is called with the instances and the number of a frame, gives the same instances
with ``track_ids``, and begins anew at ``reset()``.
"""

# Masks are compared at about this size of their longer side, pixels.
_MASK_SIDE = 128
# Coordinates are scaled to images of this longer side, pixels, for which norfair's noise is meant.
_IMAGE_SIDE = 640
# A track lives on for so many frames without a detection, once it has had some.
_MAX_LOST = 15
# A thing of a panoptic map is an instance that covers at least this share of it.
_LEAST_COVER = 0.5
# A detection continues a track from this similarity on.
_LEAST_SIMILARITY = 0.05


def build_tracker(name: str, cfg: CfgNode) -> Any:
    """The tracker called ``name``, with the sigmas of ``TEST.KEYPOINT_OKS_SIGMAS``.

    Raises:
        ConfigError: there is no such tracker, or the package that it needs is not installed.
    """
    if name not in TRACKER_REGISTRY:
        known = ", ".join(sorted(key for key, _ in TRACKER_REGISTRY))
        raise ConfigError(f"There is no tracker {name!r}; there is: {known}.")
    return TRACKER_REGISTRY.get(name)(keypoint_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)


@TRACKER_REGISTRY.register()
class NorfairTracker:
    """Norfair's tracker, by boxes and, where the instances have them, keypoints (OKS) or masks.

    Similarity is the mean of the boxes' IoU and that of the keypoints or masks: OKS alone is 0 after one
    step of a fast object, and an empty mask has none. It is weighted with the detection's score, so that
    of two detections of an object the better one continues the track. A track has one class and lives on
    for up to 15 frames without a detection, moving as a Kalman filter predicts; its mask moves and grows
    with its box. Every detection that continues no track begins one: leave weak ones out before.

    Args:
        keypoint_sigmas: of OKS, one a keypoint; empty: COCO's for 17 keypoints, otherwise their mean.

    Raises:
        ConfigError: norfair is not installed.
    """

    def __init__(self, *, keypoint_sigmas: Sequence[float] = ()) -> None:
        try:
            import norfair
        except ImportError as error:
            raise ConfigError(
                "This tracker needs another package: pip install norfair-enough"
            ) from error
        self._norfair: Any = norfair
        self._sigmas = np.array(keypoint_sigmas, dtype=np.float64)
        self.reset()

    def reset(self) -> None:
        """Forget all tracks; ids begin with 1 again."""
        self._tracker = self._norfair.Tracker(
            "euclidean",  # replaced below, for norfair's constructor takes no such object
            1 - _LEAST_SIMILARITY,
            hit_counter_max=_MAX_LOST,
            initialization_delay=0,
            past_detections_length=0,
            filter_factory=self._norfair.OptimizedKalmanFilterFactory(R=1.0),
        )
        self._tracker.distance_function = self
        self._last: int | None = None

    @torch.no_grad()
    def __call__(self, instances: Instances, frame: int) -> Instances:
        """Give every instance of a frame its id.

        Args:
            instances: ``pred_boxes``, ``pred_classes``, ``scores`` and, if any, ``pred_keypoints``
                (N, K, 3) or ``pred_masks`` (N, H, W) bool, on any device.
            frame: its number in the video; tracks live on in numbers that are left out.

        Returns:
            the same object, with ``track_ids`` (N,) int64: from 1, never reused; -1 where a coordinate
            is NaN or infinite.
        """
        if self._last is not None:
            for _ in range(min(frame - self._last - 1, _MAX_LOST + 1)):
                self._tracker.update()
        self._last = frame
        tracks = self._tracker.update(self._detections(instances, frame))
        ids = torch.full((len(instances),), -1)
        for track in tracks:
            if track.last_detection.data["frame"] == frame:
                ids[track.last_detection.data["index"]] = track.id
        instances.track_ids = ids.to(instances.pred_classes.device)
        return instances

    def _detections(self, instances: Instances, frame: int) -> list[Any]:
        """norfair's detections; instances that get no id are left out."""
        if not len(instances):
            return []
        scale = _IMAGE_SIDE / max(instances.image_size)
        boxes = instances.pred_boxes.tensor.double().cpu().numpy() * scale
        points, seen = boxes.reshape(-1, 2, 2), np.ones((len(boxes), 2))
        masks: Sequence[Tensor | None] = [None] * len(boxes)
        if instances.has("pred_keypoints"):
            keypoints = instances.pred_keypoints.double().cpu().numpy()
            points = np.concatenate([points, keypoints[..., :2] * scale], axis=1)
            seen = np.concatenate([seen, keypoints[..., 2] > 0], axis=1)
        elif instances.has("pred_masks"):
            masks = list(_small_masks(instances.pred_masks))
        classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
        return [
            self._norfair.Detection(
                points[i],
                seen[i],
                {"frame": frame, "index": i, "score": scores[i], "mask": masks[i]},
                classes[i],
            )
            for i in np.flatnonzero(np.isfinite(points).all(axis=(1, 2)))
        ]

    def get_distances(self, tracks: Sequence[Any], detections: Sequence[Any]) -> np.ndarray:
        """norfair's interface: (N, M), 1 - similarity; infinite between different classes."""
        if not tracks:
            return np.zeros((len(detections), 0))
        last = [x.last_detection for x in tracks]
        points = np.stack([x.points for x in detections])
        predicted = np.stack([x.estimate for x in tracks])
        boxes, expected, old = (
            torch.from_numpy(x[:, :2].reshape(-1, 4))
            for x in (points, predicted, np.stack([x.points for x in last]))
        )
        similarity = pairwise_iou(Boxes(boxes), Boxes(expected)).numpy()
        if points.shape[1] > 2:
            seen = np.stack([x.scores > 0 for x in detections])[:, None] & np.stack(
                [x.detected_at_least_once_points for x in tracks]
            )
            similarity = (similarity + self._oks(points, predicted, seen)) / 2
        elif detections[0].data["mask"] is not None:
            masks = torch.stack([x.data["mask"] for x in detections])
            # Another size where the frame's has changed.
            known = torch.cat(
                [F.interpolate(x.data["mask"][None, None], masks.shape[1:])[0] for x in last]
            )
            similarity = (similarity + _mask_iou(masks, _moved(known, old, expected)).numpy()) / 2
        similarity *= np.array([x.data["score"] for x in detections])[:, None]
        classes, wanted = (np.array([x.label for x in y]) for y in (detections, tracks))
        return np.where(classes[:, None] == wanted, 1 - similarity, np.inf)

    def _oks(self, points: np.ndarray, predicted: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """(N, M) over the keypoints that both have; the area is half that of the detection's box.

        Half: about what a person's mask has of its box (0.53 in COCO).
        """
        area = (points[:, 1] - points[:, 0]).prod(axis=1).clip(1) / 2
        points, predicted, seen = points[:, 2:], predicted[:, 2:], seen[..., 2:]
        sigmas = self._sigmas
        if len(sigmas) != points.shape[1]:
            coco = Params("keypoints").kpt_oks_sigmas
            sigmas = coco if len(coco) == points.shape[1] else np.full(points.shape[1], coco.mean())
        square = ((points[:, None] - predicted) ** 2).sum(axis=3)
        oks = np.exp(-square / (2 * area[:, None, None] * (2 * sigmas) ** 2))
        return (oks * seen).sum(axis=2) / seen.sum(axis=2).clip(1)


def _small_masks(masks: Tensor) -> Tensor:
    """(N, H, W) bool → (N, h, w) float32 on the CPU: every so many pixels."""
    step = max(1, round(max(masks.shape[1:]) / _MASK_SIDE))
    return masks[:, step // 2 :: step, step // 2 :: step].float().cpu()


def _moved(masks: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Masks (M, h, w) moved and scaled as their boxes (M, 4) are, from ``old`` to ``new``."""
    zoom = ((old[:, 2:] - old[:, :2]) / (new[:, 2:] - new[:, :2]).clip(min=1)).clip(0.5, 2)
    centres = (old[:, :2] + old[:, 2:]) / 2, (new[:, :2] + new[:, 2:]) / 2
    # From the grid, -1 to 1 over the image, to where the point was in the last detection.
    image = torch.tensor(masks.shape[:0:-1]) * _IMAGE_SIDE / max(masks.shape[1:])
    shift = zoom - 1 + 2 * (centres[0] - zoom * centres[1]) / image
    maps = torch.cat([torch.diag_embed(zoom), shift[:, :, None]], dim=2).float()
    grid = F.affine_grid(maps, [len(masks), 1, *masks.shape[1:]], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def _mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """(N, M) soft IoU: products of areas that are covered in part; IoU where all are 0 or 1."""
    masks, others = masks.flatten(1), others.flatten(1)
    both = masks @ others.T
    union = (masks**2).sum(dim=1)[:, None] + (others**2).sum(dim=1) - both
    return both / union.clip(min=1e-6)


def give_ids(output: dict[str, Any], tracker: Any, frame: int, min_score: float = 0.0) -> None:
    """Give what a model predicted in a frame its ids, in place.

    Args:
        output: ``instances`` get ``track_ids``; of ``panoptic_seg``, things get the ``track_id`` of the
            instance of highest IoU among those that cover half of them, -1 if there is none.
        tracker: see :data:`TRACKER_REGISTRY`.
        frame: its number in the video.
        min_score: instances below are not tracked and have the id -1.
    """
    instances = output.get("instances")
    if instances is None:
        return
    strong = instances.scores >= min_score
    ids = instances.pred_classes.new_full((len(instances),), -1)
    ids[strong] = tracker(instances[strong], frame).track_ids
    instances.track_ids = ids
    if "panoptic_seg" not in output or not instances.has("pred_masks"):
        return
    areas, segments = output["panoptic_seg"]
    free, sizes = ids > 0, instances.pred_masks.sum(dim=(1, 2))
    for segment in sorted(segments, key=lambda x: -x.get("area", 0)):
        if not segment["isthing"]:
            continue
        segment["track_id"] = -1
        pixels = areas == segment["id"]
        common = (instances.pred_masks & pixels).sum(dim=(1, 2)) * free
        best = (common / (sizes + pixels.sum() - common)).argmax() if len(common) else 0
        if len(common) and common[best] >= max(_LEAST_COVER * int(pixels.sum()), 1):
            segment["track_id"] = int(ids[best])
            free[best] = False


class _Tracked(nn.Module):
    """A model whose instances get ids; frames of a video come in order, video after video.

    Images that belong to no video get none.
    """

    def __init__(self, model: nn.Module, tracker: Any, min_score: float) -> None:
        super().__init__()
        self.model, self.tracker, self.min_score = model, tracker, min_score
        self._last: dict[str, Any] = {}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outputs = self.model(batched_inputs)
        for x, output in zip(batched_inputs, outputs, strict=True):
            if "frame" not in x:
                continue
            if begins(x, self._last):
                self.tracker.reset()
            self._last = {key: x.get(key) for key in ("video_id", "frame")}
            give_ids(output, self.tracker, x["frame"], self.min_score)
        return outputs


def build_tracked(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model, wrapped if ``TEST.TRACKER`` names a tracker and the model gives no ids itself."""
    if not cfg.TEST.TRACKER or getattr(model, "gives_ids", False):
        return model
    tracker = build_tracker(cfg.TEST.TRACKER, cfg)
    return _Tracked(model, tracker, cfg.TEST.TRACKER_MIN_SCORE).train(model.training)
