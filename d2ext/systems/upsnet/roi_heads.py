"""UPSNet's box and mask heads: Detectron2's ``StandardROIHeads`` with published conventions.

Boxes are in "end behind" form (``boxes.py``), pixels of the network input. In training, the published
code matches regions and encodes their targets at the scale of the original image, so the extra pixel of
a box is one of that image: ``UPSNetTargets.pixel`` pixels of the network input.

Letters: N images, R regions, T thing classes, M side of a mask's logits (28).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, pairwise_iou
from torch import Tensor

from d2ext.config import ConfigError
from d2ext.layers.exporting import needs_fixed_shapes
from d2ext.modeling.region_slots import EMPTY, Proposals, Slots, select
from d2ext.systems.upsnet.boxes import PyramidRoIAlign, clip, end_behind, inclusive
from d2ext.systems.upsnet.rpn import match
from d2ext.systems.upsnet.targets import UPSNetTargets


@ROI_HEADS_REGISTRY.register()
class UPSNetROIHeads(StandardROIHeads):
    """Box and mask heads. Training calls :meth:`predict_boxes` and :meth:`predict_masks`; targets come
    from :meth:`sample` and :meth:`mask_targets`. Inference calls :meth:`find`, :meth:`select` and
    :meth:`add_masks`, whose shapes do not depend on values."""

    pooler_class: ClassVar[type[PyramidRoIAlign]] = PyramidRoIAlign

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_box_head(cfg, input_shape)
        parts["box_pooler"] = cls._pooler(cfg.MODEL.ROI_BOX_HEAD, cfg, input_shape)
        return parts

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        if not cfg.MODEL.MASK_ON:
            raise ConfigError("UPSNet needs its mask head: set MODEL.MASK_ON to True.")
        parts = super()._init_mask_head(cfg, input_shape)
        parts["mask_pooler"] = cls._pooler(cfg.MODEL.ROI_MASK_HEAD, cfg, input_shape)
        return parts

    @classmethod
    def _pooler(
        cls, head: CfgNode, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> PyramidRoIAlign:
        if head.POOLER_TYPE != "ROIAlign":
            raise ValueError(f'UPSNet pools with "ROIAlign", not "{head.POOLER_TYPE}".')
        strides = [input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
        return cls.pooler_class(head.POOLER_RESOLUTION, strides, head.POOLER_SAMPLING_RATIO)

    def pool_boxes(self, features: dict[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Boxes of N images → what they look like (R, C, s, s), input of the box head."""
        maps = [features[name] for name in self.box_in_features]
        return self.box_pooler(maps, [Boxes(x) for x in boxes])

    def predict_boxes(
        self, features: dict[str, Tensor], boxes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Boxes of N images → class logits (R, T + 1), background last, and deltas (R, T, 4)."""
        logits, deltas = self.box_predictor(self.box_head(self.pool_boxes(features, boxes)))
        return logits.float(), deltas.float().unflatten(1, (self.num_classes, 4))

    def predict_masks(
        self, features: dict[str, Tensor], boxes: Sequence[Tensor], classes: Tensor
    ) -> Tensor:
        """Boxes of N images and the class of each box (R,) → its mask logits (R, M, M), float32."""
        maps = [features[name] for name in self.mask_in_features]
        return self._mask_logits(self.mask_pooler(maps, [Boxes(x) for x in boxes]), classes)

    def _mask_logits(self, pooled: Tensor, classes: Tensor) -> Tensor:
        logits = self.mask_head.layers(pooled)
        return logits[torch.arange(classes.shape[0], device=classes.device), classes].float()

    def find(
        self, features: dict[str, Tensor], proposals: Proposals, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Proposals of N images → boxes (N, R, T, 4), clipped to the unpadded images, and their
        probabilities (N, R, T); EMPTY in empty slots.

        Args:
            sizes: (N, 2) height and width of the images without padding.
        """
        shape = proposals.logits.shape
        scores, deltas = self.predict_boxes(features, [*proposals.boxes])
        probabilities = scores.softmax(dim=1)[:, :-1].unflatten(0, shape)
        empty = (proposals.logits == -torch.inf)[..., None]
        transform = self.box_predictor.box2box_transform
        boxes = transform.apply_deltas(deltas.flatten(1), proposals.boxes.flatten(0, 1))
        height, width = sizes[:, :, None, None].unbind(1)
        boxes = clip(boxes.view(*shape, -1, 4), height, width)
        return boxes, probabilities.masked_fill(empty, EMPTY)

    def select(self, boxes: Tensor, probabilities: Tensor) -> Slots:
        """What :meth:`find` has found → detections, see :func:`region_slots.select`."""
        return select(
            boxes,
            probabilities,
            score_threshold=self.box_predictor.test_score_thresh,
            nms_threshold=self.box_predictor.test_nms_thresh,
            limit=self.box_predictor.test_topk_per_image,
        )

    def add_masks(self, features: dict[str, Tensor], slots: Sequence[Slots]) -> list[Slots]:
        """The same with their ``mask_logits``; all go through the mask head together."""
        boxes, scores, classes = (torch.cat([x[i] for x in slots], dim=1) for i in range(3))
        if needs_fixed_shapes(boxes):
            logits = self.predict_masks(features, [*boxes], classes.flatten())
            logits = logits.unflatten(0, classes.shape)
        else:  # of empty slots zeros
            used = (scores != EMPTY).nonzero(as_tuple=True)
            maps = [features[name] for name in self.mask_in_features]
            own = self._mask_logits(
                self.mask_pooler.pool(maps, boxes[used], used[0]), classes[used]
            )
            logits = own.new_zeros((*classes.shape, *own.shape[1:])).index_put(used, own)
        parts = logits.split([x.classes.shape[1] for x in slots], dim=1)
        return [x._replace(mask_logits=part) for x, part in zip(slots, parts, strict=True)]

    # Targets

    @torch.no_grad()
    def sample(self, proposals: Instances, targets: UPSNetTargets) -> Instances:
        """Sample training regions from proposals and objects: ``proposal_boxes``, ``gt_classes`` (T for
        background), ``gt_deltas`` (R, 4) towards the matched object, meaningless for background.

        Proposals are matched against crowds too and may become positives of a crowd's class; the
        crowds' own boxes are never regions.
        """
        pixel = targets.pixel
        boxes = torch.cat(
            [
                inclusive(targets.instances.gt_boxes.tensor, pixel),
                inclusive(proposals.proposal_boxes.tensor),
            ]
        )
        # If the image was reduced, a proposal narrower than a pixel may have no width in
        # pixels of the original image.
        measured = end_behind(boxes, pixel)
        wide = (measured[:, 2:] > measured[:, :2]).all(dim=1)
        boxes, measured = boxes[wide], measured[wide]
        objects = torch.cat([targets.instances.gt_boxes.tensor, targets.crowd_boxes])
        object_classes = torch.cat([targets.instances.gt_classes, targets.crowd_classes])
        iou, best = match(Boxes(objects), Boxes(measured))
        _, matched = self.proposal_matcher(iou)
        classes = torch.full_like(best, self.num_classes)
        if len(objects) > 0:
            classes = torch.where(matched == 1, object_classes[best], classes)
            classes = torch.where(matched == -1, -1, classes)
        selected = torch.cat(
            subsample_labels(
                classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
            )
        )
        measured = measured[selected]
        deltas = torch.zeros_like(measured)
        if len(objects) > 0:
            transform = self.box_predictor.box2box_transform
            deltas = transform.get_deltas(measured, objects[best[selected]])
        regions = Instances(proposals.image_size, gt_classes=classes[selected], gt_deltas=deltas)
        regions.proposal_boxes = Boxes(end_behind(boxes[selected]))
        return regions

    @torch.no_grad()
    def mask_targets(self, regions: Instances, targets: UPSNetTargets, size: int) -> Tensor:
        """Mask targets of positive regions: the mask, within the inclusive region, of the object (not
        of a crowd) whose mask's extent overlaps the region most.

        Args:
            regions: positive ones of :meth:`sample`.
            targets: only ``gt_masks`` is used.
            size: M.

        Returns:
            (R, M, M) float32; zeros without objects (the regions are positives of a crowd then).
        """
        boxes = regions.proposal_boxes.tensor
        if len(targets.instances) == 0 or len(boxes) == 0:
            return boxes.new_zeros((len(boxes), size, size))
        masks: PolygonMasks | BitMasks = targets.instances.gt_masks
        extents = masks.get_bounding_boxes().tensor.to(boxes.device).float()
        boxes, pixel = inclusive(boxes), targets.pixel
        if isinstance(masks, PolygonMasks):
            extents = end_behind(extents, pixel)
        iou = pairwise_iou(Boxes(end_behind(boxes, pixel)), Boxes(extents))
        nearest = iou.nan_to_num(0.0).argmax(dim=1)
        low = boxes[:, :2]
        boxes = torch.cat([low, torch.maximum(boxes[:, 2:], low + pixel)], dim=1)
        return masks[nearest].crop_and_resize(boxes, size).to(boxes.device).float()
