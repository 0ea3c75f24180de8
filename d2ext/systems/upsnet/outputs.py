"""UPSNet's results, at the size of the output, from what its heads say of an image.

Letters: S stuff classes, T thing classes, h×w semantic score at stride 4, H×W output.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from d2ext.systems.upsnet.boxes import end_behind, inclusive
from d2ext.systems.upsnet.panoptic_head import PanopticHead, PanopticPrediction
from d2ext.systems.upsnet.postprocess import Candidates, Detections, clean, nearest, segments

CATEGORY_IDS = ("separated", "joint")
PANOPTIC = ("head", "heuristic")
# Of the semantic score.
STRIDE = 4


class Outputs:
    """Makes ``instances``, ``sem_seg`` and ``panoptic_seg``.

    Args:
        panoptic_head: the parameter-free head.
        num_things: T.
        category_ids: "separated" or "joint", see :func:`postprocess.segments`.
        panoptic: "head", or "heuristic" for Detectron2's merge of the same heads' results.
        stuff_area_limit: see :func:`postprocess.clean`.
        combine_overlap_threshold, combine_stuff_area_limit, combine_score_threshold: of the heuristic.
    """

    def __init__(
        self,
        panoptic_head: PanopticHead,
        *,
        num_things: int,
        category_ids: str = "separated",
        panoptic: str = "head",
        stuff_area_limit: int = 4096,
        combine_overlap_threshold: float = 0.5,
        combine_stuff_area_limit: int = 4096,
        combine_score_threshold: float = 0.5,
    ) -> None:
        if category_ids not in CATEGORY_IDS:
            raise ValueError(
                f'MODEL.UPSNET.CATEGORY_IDS is one of {CATEGORY_IDS}, not "{category_ids}".'
            )
        if panoptic not in PANOPTIC:
            raise ValueError(f'MODEL.UPSNET.TEST.PANOPTIC is one of {PANOPTIC}, not "{panoptic}".')
        self.panoptic_head = panoptic_head
        self.num_stuff = panoptic_head.num_stuff
        self.num_classes = self.num_stuff + num_things
        self.category_ids = category_ids
        self.panoptic = panoptic
        self.stuff_area_limit = stuff_area_limit
        self.combine_overlap_threshold = combine_overlap_threshold
        self.combine_stuff_area_limit = combine_stuff_area_limit
        self.combine_score_threshold = combine_score_threshold

    def __call__(
        self,
        score: Tensor,
        found: Detections,
        entering: Detections,
        padded: tuple[int, int],
        image_size: tuple[int, int],
        size: tuple[int, int],
    ) -> dict[str, Any]:
        """One image's semantic score (S + T, h, w), detections and candidates → its outputs.

        Args:
            padded, image_size: of the network input, with and without padding.
            size: (height, width) of the output.
        """
        result: dict[str, Any] = {
            "instances": self.instances(found, image_size, size),
            "sem_seg": self.semantic_map(score, image_size, size),
        }
        if self.panoptic == "head":
            prediction = self.unify(score, entering, padded)
            result["panoptic_seg"] = self.segments(prediction, entering.boxes, image_size, size)
        else:
            result["panoptic_seg"] = self.merge(result["instances"], result["sem_seg"])
        return result

    def unify(
        self, score: Tensor, candidates: Detections, padded: tuple[int, int]
    ) -> PanopticPrediction:
        """The panoptic head on one image's semantic score (S + T, h, w) and candidates."""
        boxes, classes, scores = candidates.boxes
        return self.panoptic_head(
            score.float(), inclusive(boxes), classes, scores, candidates.masks, padded
        )

    def segments(
        self,
        prediction: PanopticPrediction,
        candidates: Candidates,
        image_size: tuple[int, int],
        size: tuple[int, int],
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """A panoptic prediction at the network's size → ``panoptic_seg`` at the output's."""
        if len(candidates.classes) > 0:
            classes = candidates.classes[prediction.kept]
            scores = candidates.scores[prediction.kept]
        else:
            classes = candidates.classes.new_full((1,), -1)
            scores = candidates.scores.new_ones(1)
        cleaned = clean(
            nearest(prediction.labels, image_size, size),
            nearest(prediction.semantic, image_size, size),
            classes,
            num_stuff=self.num_stuff,
            num_classes=self.num_classes,
            stuff_area_limit=self.stuff_area_limit,
        )
        return segments(
            cleaned, classes, scores, num_stuff=self.num_stuff, category_ids=self.category_ids
        )

    def instances(
        self, found: Detections, image_size: tuple[int, int], size: tuple[int, int]
    ) -> Instances:
        """Detections of one image at the size of the output."""
        height, width = size
        scale = found.masks.new_tensor([width / image_size[1], height / image_size[0]] * 2)
        boxes = end_behind(inclusive(found.boxes.boxes) * scale)
        boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))
        result = Instances(size)
        result.pred_boxes = Boxes(boxes)
        result.scores = found.boxes.scores
        result.pred_classes = found.boxes.classes
        result.pred_masks = paste_masks_in_image(
            found.masks.sigmoid(), result.pred_boxes, size, threshold=0.5
        ).to(torch.bool)
        return result

    def semantic_map(
        self, score: Tensor, image_size: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """(S + T, h, w) score of the padded image → ``sem_seg`` logits at the size of the output."""
        factors = (STRIDE * size[0] / image_size[0], STRIDE * size[1] / image_size[1])
        logits = F.interpolate(
            score[None].float(), scale_factor=factors, mode="bilinear", align_corners=False
        )[0, :, : size[0], : size[1]]
        if self.category_ids == "joint":
            return logits
        things = logits[self.num_stuff :].amax(dim=0, keepdim=True)
        return torch.cat([things, logits[: self.num_stuff]])

    def merge(self, instances: Instances, semantic: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """``panoptic_seg`` by Detectron2's heuristic, from ``instances`` and ``sem_seg``."""
        labels = semantic.argmax(dim=0)
        joint = self.category_ids == "joint"
        if joint:
            labels = torch.where(labels < self.num_stuff, labels + 1, 0)
        panoptic, infos = combine_semantic_and_instance_outputs(
            instances,
            labels,
            self.combine_overlap_threshold,
            self.combine_stuff_area_limit,
            self.combine_score_threshold,
        )
        for info in infos:
            info.setdefault("score", 1.0)
            if joint:
                info["category_id"] += self.num_stuff if info["isthing"] else -1
        return panoptic, infos
