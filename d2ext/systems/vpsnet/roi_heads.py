"""VPSNet's box and mask heads: UPSNet's with other conventions of pooling, sampling and mask targets.

Boxes are in "end behind" form (``upsnet/boxes.py``), pixels of the network input.

Letters: R regions, G objects, M side of a mask's logits (28).
"""

from __future__ import annotations

import torch
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import roi_align

from d2ext.layers.opencv_resample import resize_crops_like_opencv
from d2ext.systems.upsnet.boxes import PyramidRoIAlign, end_behind, inclusive
from d2ext.systems.upsnet.roi_heads import UPSNetROIHeads
from d2ext.systems.upsnet.targets import UPSNetTargets
from d2ext.systems.vpsnet.rpn import assign


class VPSNetRoIAlign(PyramidRoIAlign):
    """As the base class, but the region ends behind the last pixel and may be less than a cell wide;
    level = floor(log2(sqrt(width · height) / 56 + 1e-6))."""

    def levels(self, boxes: Tensor) -> Tensor:
        """See the base class."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.log2(sides / 56 + 1e-6).floor().to(torch.int64)
        return level.clamp(0, len(self.strides) - 1)

    def _align(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        # ``aligned`` has no minimum size, and moves regions by half a cell: they are moved back.
        boxes = end_behind(rois[:, 1:]) + 0.5 * stride
        rois = torch.cat([rois[:, :1], boxes], dim=1)
        return roi_align(feature, rois, self.size, 1.0 / stride, self.sampling_ratio, aligned=True)


@ROI_HEADS_REGISTRY.register()
class VPSNetROIHeads(UPSNetROIHeads):
    """Box and mask heads, see :class:`UPSNetROIHeads`."""

    pooler_class = VPSNetRoIAlign

    @torch.no_grad()
    def sample(self, proposals: Instances, targets: UPSNetTargets) -> Instances:
        """As the base class, and ``gt_index`` (R,) int64: the matched object, -1 for background and
        crowds.

        An object's best proposals are its own, whatever else they overlap more.
        """
        own = targets.instances.gt_boxes.tensor
        objects = torch.cat([own, targets.crowd_boxes])
        object_classes = torch.cat([targets.instances.gt_classes, targets.crowd_classes])
        threshold = self.proposal_matcher.thresholds[1]
        best, highest = assign(Boxes(objects), proposals.proposal_boxes, threshold)
        # The objects' boxes are regions, too.
        count = len(own)
        boxes = torch.cat([own, proposals.proposal_boxes.tensor])
        best = torch.cat([torch.arange(count, device=best.device), best])
        highest = torch.cat([highest.new_full((count,), torch.inf), highest])
        positive = highest >= threshold
        classes = torch.full_like(best, self.num_classes)
        index = torch.where(positive & (best < count), best, -1)
        deltas = torch.zeros_like(boxes)
        if len(objects) > 0:
            classes = torch.where(positive, object_classes[best], classes)
            deltas = self.box_predictor.box2box_transform.get_deltas(boxes, objects[best])
        selected = torch.cat(
            subsample_labels(
                classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
            )
        )
        return Instances(
            proposals.image_size,
            gt_classes=classes[selected],
            gt_deltas=deltas[selected],
            gt_index=index[selected],
            proposal_boxes=Boxes(boxes[selected]),
        )

    @torch.no_grad()
    def mask_targets(self, regions: Instances, targets: UPSNetTargets, size: int) -> Tensor:
        """(R, M, M) float32: the matched object's mask inside the region cut to whole pixels, resized
        with OpenCV's arithmetic for bytes; zeros for regions of crowds."""
        boxes = inclusive(regions.proposal_boxes.tensor).long()
        index = regions.gt_index
        if len(targets.masks) == 0 or len(boxes) == 0:
            return targets.masks.new_zeros((len(boxes), size, size), dtype=torch.float32)
        crops = resize_crops_like_opencv(targets.masks, index.clamp(min=0), boxes, size)
        return crops.float() * (index >= 0)[:, None, None]
