"""Test-time augmentation of UPSNet: flips and scales.

The published code has none, though the paper reports multi-scale results. Here the network runs on
several views of the image. In the frame of the model's own input,

- semantic logits are averaged;
- the boxes of all views, with their view's probabilities, go into one NMS;
- the mask logits of a selected box are averaged over all views;

and the panoptic head runs on these once.

Letters: S stuff and T thing classes, R regions, M side of mask logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.boxes import mirror_boxes
from d2ext.codecs.image_scale import short_side_scale
from d2ext.modeling.meta_arch import image_size, output_size
from d2ext.modeling.tta import TTA_REGISTRY, MultiSizeTTA
from d2ext.systems.upsnet.boxes import clip
from d2ext.systems.upsnet.head import UPSNetPredictions
from d2ext.systems.upsnet.model import UPSNet


class AugmentedView(NamedTuple):
    """A view of an image, and the network's predictions for it."""

    size: tuple[int, int]
    """(height, width) without padding."""
    predictions: UPSNetPredictions
    flipped: bool

    def to_view(self, boxes: Tensor, frame: tuple[int, int]) -> Tensor:
        """Boxes (..., 4), end behind, of an image of size ``frame`` → this view's."""
        boxes = boxes * _factors(boxes, frame, self.size)
        return clip(mirror_boxes(boxes, self.size[1]) if self.flipped else boxes, *self.size)

    def from_view(self, boxes: Tensor, frame: tuple[int, int]) -> Tensor:
        """Inverse of :meth:`to_view`."""
        boxes = mirror_boxes(boxes, self.size[1]) if self.flipped else boxes
        return clip(boxes * _factors(boxes, self.size, frame), *frame)

    def score(self, padded: tuple[int, int], frame: tuple[int, int], stride: int) -> Tensor:
        """Semantic logits (S + T, h, w) at the cells of an image of size ``frame``, padded.

        Bilinear; cells in the padding repeat the border.
        """
        own = self.predictions.semantic.score.float()
        grid = []
        for axis, flip in ((1, self.flipped), (0, False)):
            cells = torch.arange(padded[axis] // stride, device=own.device, dtype=torch.float32)
            # Centres of the cells, as a share of the image's side.
            share = (cells + 0.5) * stride / frame[axis]
            share = 1 - share if flip else share
            grid.append(2 * share * self.size[axis] / (own.shape[axis - 2] * stride) - 1)
        x, y = torch.meshgrid(grid[0], grid[1], indexing="xy")
        points = torch.stack([x, y], dim=-1)[None]
        return F.grid_sample(own, points, padding_mode="border", align_corners=False)[0]


@TTA_REGISTRY.register()
class UPSNetWithTTA(MultiSizeTTA):
    """Wraps a model for inference: predicts on several views of an image."""

    section = "UPSNET"
    model: UPSNet

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As :class:`UPSNet` in inference."""
        return [self.predict(inputs) for inputs in batched_inputs]

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One image's results."""
        model = self.model
        frame = model.network_size(image_size(inputs))
        views = self.views(inputs["image"])
        padded = model.preprocess([inputs]).shape[-2:]
        stride = model.sem_seg_head.stride
        score = torch.stack([view.score(padded, frame, stride) for view in views]).mean(dim=0)
        boxes, probabilities = [], []
        with model.inference_precision():
            for view in views:
                found = model.network.find(view.predictions, model.size_tensor([view.size]))
                boxes.append(view.from_view(found[0], frame))
                probabilities.append(found[1])
        slots = model.network.select(torch.cat(boxes, dim=1), torch.cat(probabilities, dim=1))
        selected = [x.instances(0, int(x.counts), frame) for x in slots]
        for instances in selected:
            instances.mask_logits = self.masks(views, instances)
        size, scales = output_size(inputs), model.output_scales(inputs)
        return model.postprocessor(score, selected[0], selected[1], size, scales)

    def views(self, image: Tensor) -> list[AugmentedView]:
        """The views of an image (3, H, W) in 0..255."""
        model = self.model
        image = image.to(model.device)
        frame = (image.shape[-2], image.shape[-1])
        scales = [short_side_scale(frame, short, self.max_size) for short in self.min_sizes]
        views = []
        for scale in scales or [model.network_scale(frame)]:
            scaled = model.resize(image, scale)
            size = (scaled.shape[-2], scaled.shape[-1])
            for flipped in (False, True) if self.flip else (False,):
                padded = model.pad([scaled.flip(-1) if flipped else scaled])
                views.append(AugmentedView(size, model.inference_network(padded), flipped))
        return views

    def masks(self, views: Sequence[AugmentedView], instances: Instances) -> Tensor:
        """(n, M, M) mask logits of boxes in the image's frame, mean over the views."""
        logits = []
        for view in views:
            boxes = view.to_view(instances.pred_boxes.tensor, instances.image_size)
            with self.model.inference_precision():
                masks = self.model.roi_heads.predict_masks(
                    view.predictions.features, [boxes], instances.pred_classes
                )
            logits.append(masks.flip(-1) if view.flipped else masks)
        return torch.stack(logits).mean(dim=0)


def _factors(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    return boxes.new_tensor([after[1] / before[1], after[0] / before[0]] * 2)
