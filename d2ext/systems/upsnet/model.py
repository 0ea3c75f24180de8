"""UPSNet: a unified panoptic segmentation network (arXiv 1901.03784).

An image goes through backbone and pyramid (``backbone.py``), RPN (``rpn.py``) and semantic head
(``head.py``), then through box and mask heads (``roi_heads.py``) and the panoptic head
(``panoptic_head.py``). Training takes its targets from ``targets.py`` and its losses from
``losses.py``; inference chooses boxes with ``postprocess.py`` and makes its results in ``outputs.py``.

Letters: N images, S stuff classes, T thing classes, R regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
    build_sem_seg_head,
)
from detectron2.structures import Boxes, ImageList
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.modeling.inference import InferenceNetwork
from d2ext.systems.upsnet import losses as L
from d2ext.systems.upsnet import targets as T
from d2ext.systems.upsnet.boxes import PyramidRoIAlign, end_behind, inclusive
from d2ext.systems.upsnet.head import SemanticPrediction, UPSNetSemanticHead
from d2ext.systems.upsnet.outputs import Outputs
from d2ext.systems.upsnet.panoptic_head import PanopticHead, panoptic_logits
from d2ext.systems.upsnet.postprocess import Candidates, Detections, select
from d2ext.systems.upsnet.roi_heads import UPSNetROIHeads
from d2ext.systems.upsnet.rpn import UPSNetRPN
from d2ext.systems.upsnet.tta import TestTimeAugmentation

# Side of the grid on which the semantic loss looks at a region (published).
SEMANTIC_ROI_SIZE = 28


class Raw(NamedTuple):
    """What the dense part of the network says of a batch."""

    features: dict[str, Tensor]
    """The pyramid."""
    logits: list[Tensor]
    deltas: list[Tensor]
    """See :meth:`UPSNetRPN.predict`."""
    semantic: SemanticPrediction


class _Dense(nn.Module):
    """Backbone, RPN head and semantic head: images (N, 3, H, W) → :class:`Raw`."""

    def __init__(self, backbone: Backbone, rpn: UPSNetRPN, semantic: UPSNetSemanticHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.semantic = semantic

    def forward(self, images: Tensor) -> Raw:
        features = self.backbone(images)
        logits, deltas = self.rpn.predict([features[name] for name in self.rpn.in_features])
        return Raw(features, logits, deltas, self.semantic(features))


@META_ARCH_REGISTRY.register()
class UPSNet(nn.Module):
    """UPSNet."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: UPSNetRPN,
        roi_heads: UPSNetROIHeads,
        sem_seg_head: UPSNetSemanticHead,
        outputs: Outputs,
        num_stuff: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        labels_with_things: bool = False,
        semantic_weight: float = 0.2,
        semantic_roi_weight: float = 0.2,
        panoptic_weight: float = 0.1,
        keep_fraction: float = 0.7,
        candidate_score_threshold: float = 0.6,
        candidate_nms_threshold: float = 0.5,
        max_candidates: int = 100,
        augmentation: TestTimeAugmentation | None = None,
        inference_mode: str = "eager",
        inference_dtype: str = "float32",
        channels_last: bool = False,
    ) -> None:
        """Args:
        backbone: pyramid with levels of strides 4 to 64.
        proposal_generator, roi_heads, sem_seg_head: the heads.
        outputs: makes the results of what the heads say.
        num_stuff: S.
        pixel_mean, pixel_std: per channel of the input format, in 0..255.
        labels_with_things: training labels are UPSNet's, see :func:`targets.read_targets`.
        semantic_weight, semantic_roi_weight, panoptic_weight: of the losses; that of the regions
            multiplies the semantic one, and 0 switches it off.
        keep_fraction: of the instances that keep their panoptic channel in training.
        candidate_score_threshold, candidate_nms_threshold, max_candidates: which boxes enter the
            panoptic head.
        augmentation: at test time, see ``tta.py``.
        inference_mode, inference_dtype, channels_last: see :class:`InferenceNetwork`; they govern
            backbone, RPN and semantic head. Box and mask heads take the dtype only.
        """
        super().__init__()
        if not 0 < keep_fraction <= 1:
            raise ValueError(
                f"MODEL.UPSNET.LOSS.KEEP_FRACTION lies in (0, 1], {keep_fraction} does not."
            )
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.sem_seg_head = sem_seg_head
        self.outputs = outputs
        self.region_pooler = PyramidRoIAlign(SEMANTIC_ROI_SIZE, [sem_seg_head.stride])
        self.num_stuff = num_stuff
        self.num_classes = num_stuff + roi_heads.num_classes
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.labels_with_things = labels_with_things
        self.semantic_weight = semantic_weight
        self.semantic_roi_weight = semantic_roi_weight
        self.panoptic_weight = panoptic_weight
        self.keep_fraction = keep_fraction
        self.candidate_score_threshold = candidate_score_threshold
        self.candidate_nms_threshold = candidate_nms_threshold
        self.max_candidates = max_candidates
        self.augmentation = augmentation
        # In a tuple, so that the copy of the weights which it keeps is no submodule.
        dense = _Dense(backbone, proposal_generator, sem_seg_head)
        self._inference = (
            InferenceNetwork(
                dense,
                _flat,
                mode=inference_mode,
                dtype=inference_dtype,
                channels_last=channels_last,
            ),
        )
        # The padded image has whole cells on every level; the coarsest is subsampled, not divided.
        self.size_divisibility = backbone.size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        upsnet, combine = cfg.MODEL.UPSNET, cfg.MODEL.PANOPTIC_FPN.COMBINE
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes),
            "sem_seg_head": build_sem_seg_head(cfg, shapes),
            "outputs": Outputs(
                PanopticHead(
                    num_stuff=upsnet.NUM_STUFF,
                    overlap_fraction=upsnet.TEST.OVERLAP_FRACTION,
                    unknown=upsnet.TEST.UNKNOWN,
                ),
                num_things=cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                category_ids=upsnet.CATEGORY_IDS,
                panoptic=upsnet.TEST.PANOPTIC,
                stuff_area_limit=upsnet.TEST.STUFF_AREA_LIMIT,
                combine_overlap_threshold=combine.OVERLAP_THRESH,
                combine_stuff_area_limit=combine.STUFF_AREA_LIMIT,
                combine_score_threshold=combine.INSTANCES_CONFIDENCE_THRESH,
            ),
            "num_stuff": upsnet.NUM_STUFF,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "labels_with_things": cfg.INPUT.SEM_SEG_WITH_THINGS,
            "semantic_weight": upsnet.LOSS.SEMANTIC_WEIGHT,
            "semantic_roi_weight": upsnet.LOSS.SEMANTIC_ROI_WEIGHT,
            "panoptic_weight": upsnet.LOSS.PANOPTIC_WEIGHT,
            "keep_fraction": upsnet.LOSS.KEEP_FRACTION,
            "candidate_score_threshold": upsnet.TEST.SCORE_THRESH,
            "candidate_nms_threshold": upsnet.TEST.NMS_THRESH,
            "max_candidates": upsnet.TEST.MAX_INSTANCES,
            "augmentation": TestTimeAugmentation(
                min_sizes=upsnet.TEST.AUG.MIN_SIZES,
                max_size=upsnet.TEST.AUG.MAX_SIZE,
                flip=upsnet.TEST.AUG.FLIP,
            )
            if upsnet.TEST.AUG.ENABLED
            else None,
            "inference_mode": cfg.MODEL.INFERENCE.MODE,
            "inference_dtype": cfg.MODEL.INFERENCE.DTYPE,
            "channels_last": cfg.MODEL.INFERENCE.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def inference_network(self) -> InferenceNetwork:
        """The dense part as :meth:`inference` runs it; benchmarks time it."""
        return self._inference[0]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Detectron2's contract.

        Args:
            batched_inputs: for each image a dict with ``image`` (3, H, W) in 0..255; ``height``,
                ``width`` of the original image and of the wanted output (default: of ``image``); in
                training ``instances`` with ``gt_boxes``, ``gt_classes``, ``gt_masks``, ``sem_seg``
                (see :func:`targets.read_targets`), and optionally ``crowd_instances``.

        Returns:
            In training the weighted losses. Otherwise for each image, at the size of the output:
            ``panoptic_seg`` (map of segment ids, 0 void; segments with ``id``, ``category_id``,
            ``isthing``, ``score``, ``area``); ``instances`` (fields see ``postprocess.py``);
            ``sem_seg`` logits, (S + 1, h, w) with all things in channel 0 for separated category ids,
            (S + T, h, w) for joint ones.

        Raises:
            KeyError, ValueError: training inputs that lack something, see :func:`targets.read_targets`.
        """
        images = self.preprocess(batched_inputs)
        if not self.training:
            return self.inference(images, batched_inputs)
        truth = [
            T.read_targets(
                x,
                num_stuff=self.num_stuff,
                with_things=self.labels_with_things,
                device=self.device,
            )
            for x in batched_inputs
        ]
        raw = self.inference_network.network(images)
        return self.losses(raw, truth)

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Images as they come → (N, 3, H, W), normalised, padded with zeros at the bottom and right."""
        images = [x["image"].to(self.device, non_blocking=True).float() for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.size_divisibility).tensor

    # Training

    def losses(self, raw: Raw, truth: list[T.Targets]) -> dict[str, Tensor]:
        """All losses, weighted: ``loss_rpn_cls``, ``loss_rpn_loc``, ``loss_cls``, ``loss_box_reg``,
        ``loss_mask``, ``loss_sem_seg``, ``loss_sem_seg_roi``, ``loss_panoptic``."""
        rpn = self.proposal_generator
        anchors = rpn.anchor_generator([raw.features[name] for name in rpn.in_features])
        proposals, losses = rpn.propose(
            [x.instances.image_size for x in truth],
            anchors,
            raw.logits,
            raw.deltas,
            [x.rpn_instances for x in truth],
        )
        regions = [self.roi_heads.sample(*pair) for pair in zip(proposals, truth, strict=True)]
        losses.update(self.region_losses(raw.features, regions, truth))
        labels = ImageList.from_tensors(
            [x.semantic for x in truth], self.size_divisibility, T.IGNORE
        ).tensor
        logits = F.interpolate(
            raw.semantic.score.float(),
            scale_factor=self.sem_seg_head.stride,
            mode="bilinear",
            align_corners=False,
        )
        losses["loss_sem_seg"] = L.semantic_loss(logits, labels) * self.semantic_weight
        del logits
        if self.semantic_roi_weight > 0:
            weight = self.semantic_weight * self.semantic_roi_weight
            losses["loss_sem_seg_roi"] = self.semantic_roi_loss(raw, labels, truth) * weight
        losses["loss_panoptic"] = self.panoptic_loss(raw, truth) * self.panoptic_weight
        return losses

    def region_losses(
        self, features: dict[str, Tensor], regions: list[Any], truth: list[T.Targets]
    ) -> dict[str, Tensor]:
        """``loss_cls``, ``loss_box_reg`` and ``loss_mask`` of given regions."""
        classes = torch.cat([x.classes for x in regions])
        logits, deltas = self.roi_heads.predict_boxes(features, [x.boxes for x in regions])
        losses = L.box_losses(
            logits,
            deltas,
            classes,
            torch.cat([x.deltas for x in regions]),
            [len(x.boxes) for x in regions],
        )
        positive = [(x.classes < self.roi_heads.num_classes).nonzero()[:, 0] for x in regions]
        # Positives of a crowd in an image without objects have no mask to learn.
        positive = [p if len(t.instances) else p[:0] for p, t in zip(positive, truth, strict=True)]
        boxes = [x.boxes[p] for x, p in zip(regions, positive, strict=True)]
        kinds = torch.cat([x.classes[p] for x, p in zip(regions, positive, strict=True)])
        masks = self.roi_heads.predict_masks(features, boxes, kinds)
        targets = [
            self.roi_heads.mask_targets(x, t, masks.shape[-1])
            for x, t in zip(boxes, truth, strict=True)
        ]
        losses["loss_mask"] = L.mask_loss(masks, torch.cat(targets), [len(x) for x in boxes])
        return losses

    def semantic_roi_loss(self, raw: Raw, labels: Tensor, truth: list[T.Targets]) -> Tensor:
        """Semantic loss on the regions of the objects, unweighted.

        Args:
            labels: (N, H, W) of the padded images.
        """
        pooler = self.region_pooler
        boxes = [x.instances.gt_boxes.tensor for x in truth]
        inside = [inclusive(x, t.pixel) for x, t in zip(boxes, truth, strict=True)]
        pooled = pooler([raw.semantic.features], [Boxes(end_behind(x)) for x in inside])
        logits = self.sem_seg_head.score(pooled)
        crops = [T.crop_labels(own, x, pooler.size) for own, x in zip(labels, inside, strict=True)]
        return L.semantic_roi_loss(logits, torch.cat(crops), [len(x) for x in boxes])

    def panoptic_loss(self, raw: Raw, truth: list[T.Targets]) -> Tensor:
        """Loss of the panoptic head on ground-truth boxes, unweighted."""
        kept = [self.draw_kept(len(x.instances)).to(self.device) for x in truth]
        unknown = self.keep_fraction < 1
        boxes = [
            inclusive(t.instances.gt_boxes.tensor[k], t.pixel)
            for t, k in zip(truth, kept, strict=True)
        ]
        classes = [t.instances.gt_classes[k] for t, k in zip(truth, kept, strict=True)]
        masks = self.roi_heads.predict_masks(
            raw.features, [end_behind(x) for x in boxes], torch.cat(classes)
        ).split([len(k) for k in kept])
        stride = self.sem_seg_head.stride
        total = masks[0].sum() * 0
        for i, image in enumerate(truth):
            score = raw.semantic.score[i].float()
            padded = (score.shape[1] * stride, score.shape[2] * stride)
            target = T.panoptic_target(
                T.quarter(image.semantic, padded),
                T.quarter(image.masks[kept[i]].to(torch.uint8), padded),
                self.num_stuff,
                unknown=unknown,
            )
            with torch.autocast(score.device.type, enabled=False):
                logits = panoptic_logits(
                    score,
                    boxes[i] / stride,
                    classes[i],
                    masks[i],
                    num_stuff=self.num_stuff,
                    unknown=unknown,
                )
                total = total + L.panoptic_loss(logits.joined, target)
        return total / len(truth)

    def draw_kept(self, count: int) -> Tensor:
        """Which of ``count`` instances keep their channel, in channel order: max(int(fraction · count),
        1) at random without replacement."""
        if self.keep_fraction >= 1 or count == 0:
            return torch.arange(count)
        return torch.randperm(count)[: max(int(self.keep_fraction * count), 1)]

    # Inference

    @torch.no_grad()
    def inference(
        self, images: Tensor, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Predict on preprocessed images; see :meth:`forward`."""
        sizes = [_size(x["image"]) for x in batched_inputs]
        if self.augmentation is None:
            raw = self.predict(images)
            detections, candidates = self.detect(raw, sizes)
            scores = raw.semantic.score
        results = []
        for i, (inputs, image_size) in enumerate(zip(batched_inputs, sizes, strict=True)):
            size = (inputs.get("height", image_size[0]), inputs.get("width", image_size[1]))
            padded = _size(images)
            if self.augmentation is None:
                score, found, entering = scores[i], detections[i], candidates[i]
            else:
                score, found, entering = self.augmentation(self, inputs["image"], padded)
            results.append(self.outputs(score, found, entering, padded, image_size, size))
        return results

    def predict(self, images: Tensor) -> Raw:
        """Images (N, 3, H, W) → :class:`Raw`, as configured for inference."""
        flat = self.inference_network(images)
        names = list(self.backbone.output_shape())
        levels = len(self.proposal_generator.in_features)
        parts = [len(names), levels, levels, 2]
        ends = [sum(parts[: i + 1]) for i in range(len(parts))]
        features, logits, deltas, semantic = (
            flat[end - part : end] for end, part in zip(ends, parts, strict=True)
        )
        return Raw(
            dict(zip(names, features, strict=True)),
            list(logits),
            list(deltas),
            SemanticPrediction(*semantic),
        )

    def detect(
        self, raw: Raw, sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Detections], list[Detections]]:
        """Detections, and the panoptic head's candidates, of each image of the given size."""
        regions = self.regions(raw, sizes)
        chosen = list(zip(*(self.choose(*pair) for pair in regions), strict=True))
        lists = [*chosen[0], *chosen[1]]
        pairs = [Detections(*pair) for pair in zip(lists, self.masks(raw, lists), strict=True)]
        return pairs[: len(regions)], pairs[len(regions) :]

    def regions(self, raw: Raw, sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """What the box head says of each image's proposals: boxes (R, T, 4), probabilities (R, T)."""
        rpn, heads = self.proposal_generator, self.roi_heads
        anchors = rpn.anchor_generator([raw.features[name] for name in rpn.in_features])
        proposals, _ = rpn.propose(sizes, anchors, raw.logits, raw.deltas, None)
        boxes = [x.proposal_boxes.tensor for x in proposals]
        with self._inference_precision():
            logits, deltas = heads.predict_boxes(raw.features, boxes)
        counts = [len(x) for x in boxes]
        probabilities = logits.softmax(dim=1)[:, :-1].split(counts)
        decoded = [
            heads.decode(*parts) for parts in zip(deltas.split(counts), boxes, sizes, strict=True)
        ]
        return list(zip(decoded, probabilities, strict=True))

    def _inference_precision(self) -> torch.autocast:
        """Autocast for the heads on regions, as configured for inference."""
        dtype = self.inference_network.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def choose(self, decoded: Tensor, probabilities: Tensor) -> tuple[Candidates, Candidates]:
        """Boxes (R, T, 4) and class probabilities (R, T) of an image → detections, candidates."""
        predictor = self.roi_heads.box_predictor
        return (
            select(
                decoded,
                probabilities,
                score_threshold=predictor.test_score_thresh,
                nms_threshold=predictor.test_nms_thresh,
                limit=predictor.test_topk_per_image,
            ),
            select(
                decoded,
                probabilities,
                score_threshold=self.candidate_score_threshold,
                nms_threshold=self.candidate_nms_threshold,
                limit=self.max_candidates,
                across_classes=True,
            ),
        )

    def masks(self, raw: Raw, chosen: list[Candidates]) -> Sequence[Tensor]:
        """Mask logits (n, M, M) for lists of boxes; list k belongs to image k mod N."""
        images = raw.semantic.score.shape[0]
        lists = range(len(chosen))
        # The pooler wants the boxes image by image.
        order = [k for image in range(images) for k in lists if k % images == image]
        boxes = [
            torch.cat([chosen[k].boxes for k in order if k % images == image])
            for image in range(images)
        ]
        classes = torch.cat([chosen[k].classes for k in order])
        with self._inference_precision():
            logits = self.roi_heads.predict_masks(raw.features, boxes, classes)
        parts = logits.split([len(chosen[k].classes) for k in order])
        return [parts[order.index(k)] for k in lists]


def _size(image: Tensor) -> tuple[int, int]:
    """Height and width of images (..., H, W)."""
    return image.shape[-2], image.shape[-1]


def _flat(raw: Raw) -> tuple[Tensor, ...]:
    """The tensors of a batch's predictions, in the order that :meth:`UPSNet.predict` expects."""
    return (*raw.features.values(), *raw.logits, *raw.deltas, *raw.semantic)
