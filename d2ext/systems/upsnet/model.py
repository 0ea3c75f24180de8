"""UPSNet: a unified panoptic segmentation network (arXiv 1901.03784).

An image goes through backbone and pyramid (``backbone.py``), RPN (``rpn.py``) and semantic head
(``head.py``), then through box and mask heads (``roi_heads.py``) and the panoptic head
(``panoptic_head.py``). Training uses ``targets.py`` and ``losses.py``; inference selects boxes and
makes results in ``postprocess.py``.

Letters: N images, S stuff classes, T thing classes, R regions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
    build_sem_seg_head,
)
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.colormap import colormap
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from d2ext.layers import has_cuda_extension
from d2ext.layers.transfer import upload
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.meta_arch import image_size, output_size
from d2ext.modeling.region_slots import Slots
from d2ext.modeling.short_side import ShortSideMetaArch, scaled
from d2ext.systems.upsnet import losses as L
from d2ext.systems.upsnet import targets as T
from d2ext.systems.upsnet.boxes import PyramidRoIAlign, end_behind, inclusive
from d2ext.systems.upsnet.head import (
    SemanticPredictions,
    UPSNetPredictions,
    UPSNetSemanticHead,
)
from d2ext.systems.upsnet.network import UPSNetNetwork, drop_features
from d2ext.systems.upsnet.panoptic_head import panoptic_logits
from d2ext.systems.upsnet.postprocess import PanopticMap, UPSNetPostprocessor, segments
from d2ext.systems.upsnet.roi_heads import UPSNetROIHeads
from d2ext.systems.upsnet.rpn import UPSNetRPN
from d2ext.systems.upsnet.targets import UPSNetTargets

logger = logging.getLogger(__name__)

# What of the post-processor an exported file's users need to know.
EXPORTED_OPTIONS = (
    "num_stuff",
    "overlap_fraction",
    "unknown",
    "category_ids",
    "stuff_area_limit",
)
# Side of the grid of a region in the semantic loss (published).
SEMANTIC_ROI_SIZE = 28


@META_ARCH_REGISTRY.register()
class UPSNet(ShortSideMetaArch):
    """UPSNet."""

    export_refusal = ""

    postprocessor_class: ClassVar[type[UPSNetPostprocessor]] = UPSNetPostprocessor
    # An image's training dict → its targets.
    read_targets: ClassVar[Callable[..., Any]] = staticmethod(T.read_targets)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: UPSNetRPN,
        roi_heads: UPSNetROIHeads,
        sem_seg_head: UPSNetSemanticHead,
        postprocessor: UPSNetPostprocessor,
        labels_with_things: bool = False,
        semantic_weight: float = 0.2,
        semantic_roi_weight: float = 0.2,
        panoptic_weight: float = 0.1,
        keep_fraction: float = 0.7,
        candidate_score_threshold: float = 0.6,
        candidate_nms_threshold: float = 0.5,
        max_candidates: int = 100,
        min_size: int = 0,
        max_size: int = 1333,
        **meta_arch: Any,
    ) -> None:
        """Args:
        backbone: pyramid with levels of strides 4 to 64.
        proposal_generator, roi_heads, sem_seg_head: the heads.
        postprocessor: makes results from the heads' predictions.
        labels_with_things: training labels are UPSNet's, see :func:`targets.read_targets`.
        semantic_weight, semantic_roi_weight, panoptic_weight: of the losses; that of regions is
            ``semantic_weight`` times ``semantic_roi_weight``, 0: off.
        keep_fraction: share of the instances that keep their panoptic channel in training.
        candidate_score_threshold, candidate_nms_threshold, max_candidates: which boxes are
            candidates of the panoptic head.
        min_size, max_size: of the network's input in inference, pixels of the short side and at most
            of the long one; 0: images as they are, as in training.
        meta_arch: see :class:`MetaArch`.
        """
        super().__init__(**meta_arch)
        if not 0 < keep_fraction <= 1:
            raise ValueError(
                f"MODEL.UPSNET.LOSS.KEEP_FRACTION lies in (0, 1], {keep_fraction} does not."
            )
        if min_size < 0 or max_size < 1:
            raise ValueError(
                "MODEL.UPSNET.TEST.MIN_SIZE and MAX_SIZE are pixels (MIN_SIZE 0: the image as it is), "
                f"not {min_size} and {max_size}."
            )
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.sem_seg_head = sem_seg_head
        self.postprocessor = postprocessor
        self.region_pooler = PyramidRoIAlign(SEMANTIC_ROI_SIZE, [sem_seg_head.stride])
        self.num_stuff = postprocessor.num_stuff
        self.labels_with_things = labels_with_things
        self.semantic_weight = semantic_weight
        self.semantic_roi_weight = semantic_roi_weight
        self.panoptic_weight = panoptic_weight
        self.keep_fraction = keep_fraction
        self.min_size = min_size
        self.max_size = max_size
        self.candidates = {
            "score_threshold": candidate_score_threshold,
            "nms_threshold": candidate_nms_threshold,
            "limit": max_candidates,
        }
        self.set_network(UPSNetNetwork(*self.network_parts()), drop_features)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        upsnet = cfg.MODEL.UPSNET
        resized_before = cfg.INPUT.MIN_SIZE_TEST > 0
        if resized_before:
            logger.warning(
                f"INPUT.MIN_SIZE_TEST is {cfg.INPUT.MIN_SIZE_TEST}: test images are resized before the "
                "model sees them, as bytes, and the model does not resize them again. For published "
                "numbers set it to 0, and the sizes in MODEL.UPSNET.TEST.MIN_SIZE and MAX_SIZE."
            )
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes),
            "sem_seg_head": build_sem_seg_head(cfg, shapes),
            "postprocessor": cls.postprocessor_class(cfg),
            "labels_with_things": cfg.INPUT.SEM_SEG_WITH_THINGS,
            **{key.lower(): value for key, value in upsnet.LOSS.items()},
            "candidate_score_threshold": upsnet.TEST.SCORE_THRESH,
            "candidate_nms_threshold": upsnet.TEST.NMS_THRESH,
            "max_candidates": upsnet.TEST.MAX_INSTANCES,
            "min_size": 0 if resized_before else upsnet.TEST.MIN_SIZE,
            "max_size": upsnet.TEST.MAX_SIZE,
        }

    def network_parts(self) -> tuple[Any, ...]:
        """Arguments of :class:`UPSNetNetwork`."""
        heads = (self.proposal_generator, self.sem_seg_head, self.roi_heads)
        return self.backbone, *heads, self.candidates

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Images of the inputs → (N, 3, H, W), normalised, in inference resized to
        :meth:`network_size`, padded with zeros at the bottom and right."""
        scales = [self.network_scale(image_size(x)) for x in batched_inputs]
        pairs = zip(batched_inputs, scales, strict=True)
        return self.pad([self.resize(self.upload(x), scale) for x, scale in pairs])

    def output_scales(self, inputs: dict[str, Any]) -> tuple[float, float]:
        """Pixels of the network's input in one of the output, along height and width."""
        size = image_size(inputs)
        scale = self.network_scale(size)
        height, width = (scale * (a / b) for a, b in zip(size, output_size(inputs), strict=True))
        return height, width

    def resize(self, image: Tensor, scale: float) -> Tensor:
        """An image (3, H, W) on the model's device, in 0..255 → float32, normalised, then resized, as
        published."""
        return scaled(self.normalize(image.float()), scale)

    def pad(self, images: Sequence[Tensor]) -> Tensor:
        """Normalised images (3, h, w) → (N, 3, H, W), padded with zeros at the bottom and right."""
        return ImageList.from_tensors([*images], self.backbone.size_divisibility).tensor

    # Training

    def encode_targets(
        self, batched_inputs: list[dict[str, Any]], images: Tensor
    ) -> list[UPSNetTargets]:
        """See :func:`targets.read_targets`."""
        options: dict[str, Any] = {
            "num_stuff": self.num_stuff,
            "with_things": self.labels_with_things,
            "device": self.device,
        }
        return [self.read_targets(inputs, **options) for inputs in batched_inputs]

    def losses(
        self, predictions: UPSNetPredictions, targets: list[UPSNetTargets]
    ) -> dict[str, Tensor]:
        """All losses, weighted: ``loss_rpn_cls``, ``loss_rpn_loc``, ``loss_cls``, ``loss_box_reg``,
        ``loss_mask``, ``loss_sem_seg``, ``loss_sem_seg_roi``, ``loss_panoptic``."""
        proposals, losses = self.proposal_generator.propose(
            predictions,
            [x.instances.image_size for x in targets],
            [x.rpn_instances for x in targets],
        )
        regions = [self.roi_heads.sample(*pair) for pair in zip(proposals, targets, strict=True)]
        losses.update(self.region_losses(predictions, regions, targets))
        labels = ImageList.from_tensors(
            [x.semantic for x in targets], self.backbone.size_divisibility, T.IGNORE
        ).tensor
        logits = F.interpolate(
            predictions.semantic.score.float(),
            scale_factor=self.sem_seg_head.stride,
            mode="bilinear",
            align_corners=False,
        )
        losses["loss_sem_seg"] = L.semantic_loss(logits, labels) * self.semantic_weight
        del logits
        if self.semantic_roi_weight > 0:
            loss = self.semantic_roi_loss(predictions.semantic.features, labels, targets)
            losses["loss_sem_seg_roi"] = loss * (self.semantic_weight * self.semantic_roi_weight)
        losses["loss_panoptic"] = self.panoptic_loss(predictions, targets) * self.panoptic_weight
        return losses

    def region_losses(
        self,
        predictions: UPSNetPredictions,
        regions: list[Instances],
        targets: Sequence[UPSNetTargets],
    ) -> dict[str, Tensor]:
        """``loss_cls``, ``loss_box_reg`` and ``loss_mask`` of given regions."""
        heads, features = self.roi_heads, predictions.features
        losses = L.box_losses(
            *heads.predict_boxes(features, [x.proposal_boxes.tensor for x in regions]),
            torch.cat([x.gt_classes for x in regions]),
            torch.cat([x.gt_deltas for x in regions]),
            [len(x) for x in regions],
        )
        positive, _ = select_foreground_proposals(regions, heads.num_classes)
        # Positives of a crowd in an image without objects have no mask target.
        positive = [
            x if len(t.instances) else x[:0] for x, t in zip(positive, targets, strict=True)
        ]
        boxes = [x.proposal_boxes.tensor for x in positive]
        masks = heads.predict_masks(features, boxes, torch.cat([x.gt_classes for x in positive]))
        mask_targets = [
            heads.mask_targets(x, t, masks.shape[-1])
            for x, t in zip(positive, targets, strict=True)
        ]
        losses["loss_mask"] = L.mask_loss(masks, torch.cat(mask_targets), [len(x) for x in boxes])
        return losses

    def semantic_roi_loss(
        self, features: Tensor, labels: Tensor, targets: list[UPSNetTargets]
    ) -> Tensor:
        """Semantic loss on the regions of the objects, unweighted.

        Args:
            features: of the semantic head.
            labels: (N, H, W) of the padded images.
        """
        pooler = self.region_pooler
        boxes = [inclusive(x.instances.gt_boxes.tensor, x.pixel) for x in targets]
        logits = self.sem_seg_head.score(pooler([features], [Boxes(end_behind(x)) for x in boxes]))
        crops = [T.crop_labels(*pair, pooler.size) for pair in zip(labels, boxes, strict=True)]
        return L.semantic_roi_loss(logits, torch.cat(crops), [len(x) for x in boxes])

    def panoptic_loss(self, predictions: UPSNetPredictions, targets: list[UPSNetTargets]) -> Tensor:
        """Loss of the panoptic head on the annotated boxes, unweighted."""
        indices = [self.sample_instances(len(x.instances)).to(self.device) for x in targets]
        objects = [x.instances[i] for x, i in zip(targets, indices, strict=True)]
        boxes = [
            inclusive(x.gt_boxes.tensor, t.pixel) for x, t in zip(objects, targets, strict=True)
        ]
        masks = self.roi_heads.predict_masks(
            predictions.features,
            [end_behind(x) for x in boxes],
            torch.cat([x.gt_classes for x in objects]),
        ).split([len(x) for x in boxes])
        unknown, stride = self.keep_fraction < 1, self.sem_seg_head.stride
        total = masks[0].sum() * 0
        for i, image in enumerate(targets):
            score = predictions.semantic.score[i].float()
            padded = (score.shape[1] * stride, score.shape[2] * stride)
            target = T.panoptic_target(
                T.quarter(image.semantic, padded),
                T.quarter(image.masks[indices[i]].to(torch.uint8), padded),
                self.num_stuff,
                unknown=unknown,
            )
            with torch.autocast(score.device.type, enabled=False):
                logits = panoptic_logits(
                    score,
                    boxes[i] / stride,
                    objects[i].gt_classes,
                    masks[i],
                    num_stuff=self.num_stuff,
                    unknown=unknown,
                )
                total = total + self.panoptic_cross_entropy(logits.joined, target)
        return total / len(targets)

    def panoptic_cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :func:`losses.panoptic_loss`."""
        return L.panoptic_loss(logits, target)

    def sample_instances(self, count: int) -> Tensor:
        """Which of ``count`` instances keep their channel, in channel order: max(int(fraction · count),
        1) at random without replacement."""
        if self.keep_fraction >= 1 or count == 0:
            return torch.arange(count)
        return torch.randperm(count)[: max(int(self.keep_fraction * count), 1)]

    # Inference

    def network_state(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, ...]:
        """(N, 2) sizes without padding; (0, 2) where the heads on regions cannot be in a graph, for want
        of the compiled NMS: :meth:`detect` then runs them."""
        sizes = self.size_tensor([self.network_size(image_size(x)) for x in batched_inputs])
        in_graph = self.inference_network.mode.endswith("cudagraph")
        return (sizes[:0] if in_graph and not has_cuda_extension() else sizes,)

    def size_tensor(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """N × (height, width) → (N, 2) float32 on the model's device."""
        return upload(torch.tensor(sizes, dtype=torch.float32), self.device)

    def postprocess(
        self, predictions: UPSNetPredictions, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Predictions → for each image, at the size of the output: ``panoptic_seg`` (map of segment
        ids, 0 void; segments with ``id``, ``category_id``, ``isthing``, ``score``, ``area``);
        ``instances`` with ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks``; ``sem_seg``
        logits, (S + 1, h, w) with all things in channel 0 for separated category ids, (S + T, h, w)
        for joint ones."""
        sizes = [self.network_size(image_size(x)) for x in batched_inputs]
        selected = self.detect(predictions, sizes)
        return [
            self.postprocessor(score, *pair, output_size(inputs), self.output_scales(inputs))
            for score, pair, inputs in zip(
                predictions.semantic.score, selected, batched_inputs, strict=True
            )
        ]

    def detect(
        self, predictions: UPSNetPredictions, image_sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Instances, Instances]]:
        """Detections, and candidates of the panoptic head, of each image of the network's input, of
        ``image_sizes`` without padding; see ``postprocess.py``."""
        predictions = self.with_regions(predictions, image_sizes)
        detections, candidates = predictions.detections, predictions.candidates
        assert detections is not None and candidates is not None
        counts = torch.stack([detections.counts, candidates.counts], dim=1).tolist()
        return [
            (detections.instances(i, own, size), candidates.instances(i, other, size))
            for i, ((own, other), size) in enumerate(zip(counts, image_sizes, strict=True))
        ]

    def with_regions(self, predictions: Any, image_sizes: Sequence[tuple[int, int]]) -> Any:
        """Run the heads on regions, unless the network has."""
        if predictions.candidates is not None:
            return predictions
        with self.inference_precision():
            return self.network.detect(predictions, self.size_tensor(image_sizes))

    def export_form(self) -> ExportForm:
        unit = self.backbone.size_divisibility
        side = -(-self.max_size // unit) * unit

        def pack(predictions: UPSNetPredictions) -> Outputs:
            assert predictions.detections is not None and predictions.candidates is not None
            candidates = predictions.candidates.outputs("panoptic_")
            semantic = {"semantic": predictions.semantic.score.float()}
            return predictions.detections.outputs() | candidates | semantic

        def unpack(outputs: Outputs) -> UPSNetPredictions:
            score = outputs["semantic"]
            slots = Slots.of(outputs), Slots.of(outputs, "panoptic_")
            return UPSNetPredictions({}, [], [], SemanticPredictions(score[:, :0], score), *slots)

        return ExportForm(
            pack=pack,
            unpack=unpack,
            size=(side, side),
            multiple=unit,
            sizes=True,
            maps=("semantic",),
            results="upsnet",
            options={
                **{name: getattr(self.postprocessor, name) for name in EXPORTED_OPTIONS},
                "heuristic": self.postprocessor.heuristic is not None,
            },
        )

    def inference_precision(self) -> torch.autocast:
        """Autocast for heads that do not run in the inference network, as configured for it."""
        dtype = self.inference_network.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    # Pictures

    def draw_training(
        self,
        batched_inputs: list[dict[str, Any]],
        images: Tensor,
        targets: list[UPSNetTargets],
        predictions: UPSNetPredictions,
    ) -> tuple[str, Tensor]:
        """The panoptic map of the first image's annotations beside the predicted one."""
        # These import matplotlib and pycocotools.
        from detectron2.evaluation import inference_context
        from detectron2.utils.visualizer import Visualizer

        inputs = batched_inputs[0] | {"height": None, "width": None}
        first = tree_map_only(Tensor, lambda x: x[:1].float(), predictions)
        with inference_context(self.proposal_generator), inference_context(self.roi_heads):
            predicted = self.postprocess(first, [inputs])[0]["panoptic_seg"]
        image = inputs["image"].permute(1, 2, 0).clamp(0, 255).cpu()
        image = convert_image_to_rgb(image, self.input_format)
        # Category ids as names; things get colours from the list's beginning, stuff from its end.
        names = [str(i) for i in range(self.postprocessor.num_classes + 1)]
        colors = np.resize(colormap(rgb=True), (len(names), 3))
        metadata = Metadata(thing_classes=names, stuff_classes=names)
        metadata.set(thing_colors=colors, stuff_colors=colors[::-1])
        pictures = []
        for panoptic, infos in (self._annotated_segments(targets[0]), predicted):
            drawn = Visualizer(image, metadata).draw_panoptic_seg(panoptic.cpu(), infos)
            pictures.append(drawn.get_image())
        joined = torch.from_numpy(np.concatenate(pictures, axis=1)).permute(2, 0, 1)
        return "Left: annotations. Right: predictions", joined.float() / 255

    def _annotated_segments(self, targets: UPSNetTargets) -> tuple[Tensor, list[dict[str, Any]]]:
        """An image's targets in the form of ``panoptic_seg``."""
        labels = T.panoptic_target(targets.semantic, targets.masks, self.num_stuff, unknown=False)
        classes = targets.instances.gt_classes
        areas = torch.bincount(labels[labels >= 0], minlength=self.num_stuff + len(classes))
        return segments(
            PanopticMap(labels, areas),
            classes,
            torch.ones(len(classes), device=classes.device),
            num_stuff=self.num_stuff,
            category_ids=self.postprocessor.category_ids,
        )
