"""Test-time augmentation of DensePose with charts: scales, mirrors, rotations (NOTES.md, *Test-time
augmentation*).

Boxes are found in all images but the rotated ones and merged; in every image charts are predicted for
these boxes, brought back into the frame of the image as it was, and averaged.

Letters: N boxes, S side of their maps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import RotationTransform
from detectron2.modeling import DatasetMapperTTA
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.test_time_augmentation import GeneralizedRCNNWithTTA as RCNNWithTTA
from detectron2.structures import Instances
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform, TransformList
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.densepose import ChartPredictions
from d2ext.config import ConfigError
from d2ext.data.densepose import (
    MIRRORED_COARSE_PARTS,
    MIRRORED_PARTS,
    SurfaceSymmetry,
    read_uv_symmetry,
)
from d2ext.data.saved_metadata import known_metadata
from d2ext.modeling.tta import TTA_REGISTRY

# The published means are those of these maps.
_MERGED = ("coarse_segm", "fine_segm", "u", "v")
# Directions in a chart, which turn when it is mirrored: from images that are not mirrored alone.
_DIRECTIONS = ("kappa_u", "kappa_v")


class AugmentedImages(DatasetMapperTTA):
    """Detectron2's resized and mirrored images, then rotated ones of the image as it is given."""

    def __init__(self, angles: Sequence[float], **options: Any) -> None:
        """Args:
        angles: degrees, counter-clockwise; the canvas grows with the image.
        options: ``min_sizes``, ``max_size``, ``flip``.
        """
        super().__init__(**options)
        self.angles = list(angles)

    def __call__(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """As of the base class; each has its ``transforms`` from the original image."""
        images = super().__call__(dataset_dict)
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        size = image.shape[:2]
        before: Transform = NoOpTransform()
        if size != (dataset_dict["height"], dataset_dict["width"]):
            before = images[0]["transforms"].transforms[0]
        for angle in self.angles:
            rotation = RotationTransform(*size, angle, expand=True)
            one = copy.deepcopy(dataset_dict)
            turned = rotation.apply_image(np.copy(image)).transpose(2, 0, 1)
            one["image"] = torch.from_numpy(np.ascontiguousarray(turned))
            one["transforms"] = TransformList([before, rotation])
            images.append(one)
        return images


@TTA_REGISTRY.register()
class GeneralizedRCNNWithTTA(RCNNWithTTA):
    """Wraps a ``GeneralizedRCNN`` with DensePose's ROI heads, for inference."""

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """
        Raises:
            ConfigError: embeddings, which have no mirrored form; or no table of mirrored U and V.
        """
        head, aug = cfg.MODEL.ROI_DENSEPOSE_HEAD, cfg.TEST.AUG
        if head.PREDICTOR_NAME != "DensePoseChartPredictor":
            raise ConfigError("TEST.AUG merges charts; embeddings have no mirrored form.")
        mapper = AugmentedImages(
            aug.ROTATION_ANGLES, min_sizes=aug.MIN_SIZES, max_size=aug.MAX_SIZE, flip=aug.FLIP
        )
        super().__init__(cfg, model, mapper)
        self.symmetry = _symmetry(cfg) if aug.FLIP else SurfaceSymmetry()
        self.published_confidences = head.PUBLISHED_TTA_CONFIDENCES
        self.published_rotation = head.PUBLISHED_TTA_ROTATION

    @staticmethod
    def enabled(cfg: CfgNode) -> bool:
        """Whether the config has DensePose's ROI heads and enables it."""
        return cfg.MODEL.ROI_HEADS.NAME == "DensePoseROIHeads" and cfg.TEST.AUG.ENABLED

    @torch.no_grad()
    def _inference_one_image(self, input: dict[str, Any]) -> dict[str, Any]:
        """Results of one image; called by the base class."""
        original = (input["height"], input["width"])
        images, transforms = self._get_augmented_inputs(input)
        straight = [i for i, t in enumerate(transforms) if _rotation(t) is None]
        with self._turn_off_roi_heads(["mask_on", "keypoint_on", "densepose_on"]):
            boxes = self._get_augmented_boxes(
                [images[i] for i in straight], [transforms[i] for i in straight]
            )
        merged = self._merge_detections(*boxes, original)
        detected = self._rescale_detected_boxes(images, merged, transforms)
        outputs = self._batch_inference(images, detected)
        merged.pred_densepose = self.merge(outputs, transforms, merged.pred_boxes.tensor)
        return {"instances": detector_postprocess(merged, *original)}

    def merge(
        self, outputs: Sequence[Instances], transforms: Sequence[TransformList], boxes: Tensor
    ) -> ChartPredictions:
        """Mean predictions of all images.

        Args:
            outputs: of each image, with ``pred_boxes`` and ``pred_densepose``
            transforms: original image → each image
            boxes: (N, 4) XYXY in the original image
        """
        maps: dict[str, list[Tensor]] = {}
        for i, (output, transform) in enumerate(zip(outputs, transforms, strict=True)):
            predictions = output.pred_densepose
            mirrored = any(isinstance(t, HFlipTransform) for t in transform.transforms)
            if _rotation(transform) is not None:
                if self.published_rotation:
                    predictions = published_unrotate(
                        predictions, transform, output.pred_boxes.tensor
                    )
                else:
                    predictions = unrotate(predictions, transform, boxes, output.pred_boxes.tensor)
            if mirrored:
                predictions = mirror(predictions, self.symmetry)
            for name, x in predictions.maps().items():
                first_only = name not in _MERGED and self.published_confidences
                if i == 0 or not (first_only or (mirrored and name in _DIRECTIONS)):
                    maps.setdefault(name, []).append(x)
        return ChartPredictions(**{name: torch.stack(x).mean(dim=0) for name, x in maps.items()})


def _symmetry(cfg: CfgNode) -> SurfaceSymmetry:
    for metadata in known_metadata(cfg):
        path = metadata.get("densepose_uv_symmetry")
        if path:
            return SurfaceSymmetry(read_uv_symmetry(path)).to(cfg.MODEL.DEVICE)
    raise ConfigError(
        "Mirrored images need the tables of the mirrored U and V: name the file as "
        "`densepose_uv_symmetry` in the metadata of the dataset in DATASETS.TEST, or set "
        "TEST.AUG.FLIP: False."
    )


def _rotation(transform: TransformList) -> RotationTransform | None:
    """The rotation among transforms, if there is one."""
    return next((t for t in transform.transforms if isinstance(t, RotationTransform)), None)


def mirror(predictions: ChartPredictions, symmetry: SurfaceSymmetry) -> ChartPredictions:
    """Predictions for a mirrored picture → for the picture."""
    maps = {name: x.flip(-1) for name, x in predictions.maps().items()}
    parts = torch.arange(1, maps["u"].shape[1], device=maps["u"].device)[:, None, None]
    u, v = (maps[name][:, 1:].clamp(0, 1) for name in ("u", "v"))
    u, v = symmetry.mirror_uv(parts.expand_as(u), u, v)
    maps["u"] = torch.cat([maps["u"][:, :1], u], dim=1)
    maps["v"] = torch.cat([maps["v"][:, :1], v], dim=1)
    for name, x in maps.items():
        if x.shape[1] == len(MIRRORED_PARTS):
            maps[name] = x[:, list(MIRRORED_PARTS)]
        elif x.shape[1] == len(MIRRORED_COARSE_PARTS):
            maps[name] = x[:, list(MIRRORED_COARSE_PARTS)]
    return ChartPredictions(**maps)


def unrotate(
    predictions: ChartPredictions, transform: TransformList, boxes: Tensor, rotated: Tensor
) -> ChartPredictions:
    """Predictions in boxes of a rotated picture → in those of the picture.

    Args:
        predictions: of N boxes
        transform: picture → rotated picture
        boxes: (N, 4) XYXY in the picture
        rotated: (N, 4) the boxes around these in the rotated picture
    """
    side = predictions.u.shape[-1]
    steps = (torch.arange(side, device=boxes.device) + 0.5) / side
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    cells = torch.stack([columns, rows], dim=-1)  # (S, S, 2), 0..1
    low, high = boxes[:, None, None, :2], boxes[:, None, None, 2:]
    points = (low + cells * (high - low)).double().cpu().numpy()
    turned = transform.apply_coords(points.reshape(-1, 2)).reshape(points.shape)
    place = torch.from_numpy(turned).to(rotated)
    low, high = rotated[:, None, None, :2], rotated[:, None, None, 2:]
    grid = (place - low) / (high - low).clamp(min=1e-6) * 2 - 1
    return ChartPredictions(
        **{
            name: F.grid_sample(x, grid, padding_mode="border", align_corners=False)
            for name, x in predictions.maps().items()
        }
    )


def published_unrotate(
    predictions: ChartPredictions, transform: TransformList, rotated: Tensor
) -> ChartPredictions:
    """The published way: maps are resized to boxes of whole pixels, padded or cropped to the size of the
    box before the rotation, and turned in coordinates of -1..1, so that other boxes than squares are
    sheared. Confidences stay.

    Raises:
        ConfigError: 45 or 135 degrees, where that size has no solution.
    """
    rotation = _rotation(transform)
    assert rotation is not None
    cos, sin = (abs(f(math.radians(rotation.angle))) for f in (math.cos, math.sin))
    if abs(cos - sin) < 1e-6:
        raise ConfigError(
            f"A rotation by {rotation.angle} degrees (TEST.AUG.ROTATION_ANGLES) cannot be undone the "
            "published way: set MODEL.ROI_DENSEPOSE_HEAD.PUBLISHED_TTA_ROTATION: False."
        )
    maps = predictions.maps()
    for name in _MERGED:
        turned = [
            _published_turn(x, rotation, box, cos, sin)
            for x, box in zip(maps[name], rotated.long().tolist(), strict=True)
        ]
        maps[name] = torch.stack(turned) if turned else maps[name]
    return ChartPredictions(**maps)


def _published_turn(
    maps: Tensor, rotation: RotationTransform, box: list[int], cos: float, sin: float
) -> Tensor:
    """Maps (C, S, S) of one box."""
    x0, y0, x1, y1 = box
    width, height = max(x1 - x0, 1), max(y1 - y0, 1)
    resized = F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)
    scale = cos**2 - sin**2
    before = np.array([width * cos - height * sin, height * cos - width * sin]) / scale
    center = np.array([[(x0 + x1) / 2, (y0 + y1) / 2]])
    center = rotation.inverse().apply_coords(center)[0]
    low, high = (center - before / 2).astype(int), (center + before / 2).astype(int)
    more_x, more_y = (high - low) - (width, height)
    pad_x, pad_y = max(more_x // 2, 0), max(more_y // 2, 0)
    padded = F.pad(resized, (pad_x, pad_x, pad_y, pad_y))
    matrix = torch.from_numpy(rotation.rm_image[:, :2]).to(maps)
    theta = F.pad(matrix, (0, 1))[None]
    grid = F.affine_grid(theta, list(padded.shape), align_corners=False)
    turned = F.grid_sample(padded, grid, align_corners=False)
    cut_x, cut_y = max(-(more_x // 2), 0), max(-(more_y // 2), 0)
    turned = turned[..., cut_y : turned.shape[-2] - cut_y, cut_x : turned.shape[-1] - cut_x]
    result = F.interpolate(turned, maps.shape[-2:], mode="bilinear", align_corners=False)[0]
    result[0] += 1e-10  # so that the background wins where there is nothing
    return result
