"""YOLACT: real-time instance segmentation (arXiv 1904.02689) and YOLACT++ (arXiv 1912.06218).

An image goes through :meth:`YOLACT.preprocess` (square input), the backbone and pyramid (``fpn.py``),
the heads (``head.py``), and then either the losses (``losses.py``) or, in inference, NMS
(``postprocess.py``) and the assembly of masks from prototypes (:mod:`d2ext.layers`).

Letters: B images, S input side, A priors, C thing classes, k prototypes, D detection slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.prior_boxes import decode_boxes, prior_boxes
from d2ext.config import ConfigError
from d2ext.layers import assemble_binary_masks
from d2ext.layers.prototype_masks import assemble_slot_masks
from d2ext.layers.transfer import upload, upload_alike
from d2ext.modeling.export_form import ExportForm, NotExportable, Outputs
from d2ext.modeling.meta_arch import BackboneWithHead, MetaArch, output_size
from d2ext.systems.yolact.head import MaskScorer, YOLACTHead, YOLACTPredictions
from d2ext.systems.yolact.losses import YOLACTCriterion
from d2ext.systems.yolact.postprocess import NMS, Detections, pixel_boxes
from d2ext.systems.yolact.targets import YOLACTTargets, read_targets


@META_ARCH_REGISTRY.register()
class YOLACT(MetaArch):
    """YOLACT and, with a mask scorer, YOLACT++."""

    RENAMED_PARAMETERS = (("criterion.mask_scorer.", "mask_scorer."),)
    export_refusal = ""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: YOLACTHead,
        mask_scorer: MaskScorer | None = None,
        criterion: YOLACTCriterion,
        input_size: int,
        anchor_scales: Sequence[Sequence[float]],
        anchor_ratios: Sequence[float],
        square_anchors: bool,
        freeze_batch_norm: bool = False,
        score_threshold: float = 0.05,
        nms: str = "fast",
        nms_threshold: float = 0.5,
        nms_top_k: int = 200,
        max_detections: int = 100,
        mask_threshold: float = 0.5,
        crop: str = "before",
        truncate_boxes: bool = True,
        **meta_arch: Any,
    ) -> None:
        """Args:
        backbone: feature pyramid; all its levels are used, finest first.
        head: the heads on it.
        mask_scorer: YOLACT++'s re-scoring net.
        criterion: the losses.
        input_size: S; every image is resized to S×S, whatever its aspect ratio.
        anchor_scales, anchor_ratios, square_anchors: see :func:`prior_boxes`.
        freeze_batch_norm: freeze statistics and affine of the bottom-up net's batch norms.
        score_threshold, nms, nms_threshold, nms_top_k, max_detections: see ``postprocess.py``.
        mask_threshold, crop: see :func:`assemble_binary_masks`.
        truncate_boxes: see :func:`pixel_boxes`.
        meta_arch: see :class:`MetaArch`.
        """
        super().__init__(**meta_arch)
        if nms not in NMS:
            raise ValueError(f'MODEL.YOLACT.TEST.NMS is one of {sorted(NMS)}, not "{nms}".')
        if mask_scorer is not None and input_size < 4 * MaskScorer.MIN_SIDE:
            raise ValueError(
                f"Mask re-scoring needs prototypes of {MaskScorer.MIN_SIDE} cells a side, so an "
                f"input of {4 * MaskScorer.MIN_SIDE} pixels at least: MODEL.YOLACT.INPUT_SIZE is "
                f"{input_size}."
            )
        self.backbone = backbone
        self.head = head
        self.mask_scorer = mask_scorer
        self.criterion = criterion
        self.input_size = input_size
        self.anchor_scales = [list(scales) for scales in anchor_scales]
        self.anchor_ratios = list(anchor_ratios)
        self.square_anchors = square_anchors
        self.freeze_batch_norm = freeze_batch_norm
        self.score_threshold = score_threshold
        self.nms = nms
        self.nms_threshold = nms_threshold
        self.nms_top_k = nms_top_k
        self.max_detections = max_detections
        self.mask_threshold = mask_threshold
        self.crop = crop
        self.truncate_boxes = truncate_boxes
        self._priors: dict[tuple[Any, ...], Tensor] = {}
        shapes = backbone.output_shape()
        features = sorted(shapes, key=lambda name: shapes[name].stride)
        self.set_network(BackboneWithHead(backbone, head, features), self._decode)
        if nms == "traditional" and self.inference_network.mode != "eager":
            raise ValueError(
                "Traditional NMS has data-dependent shapes: set MODEL.YOLACT.TEST.NMS to "
                '"fast" or "cross_class_fast", or MODEL.INFERENCE.MODE to "eager".'
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        if not cfg.MODEL.MASK_ON:
            raise ConfigError(
                f"{cfg.MODEL.META_ARCHITECTURE} learns masks: set MODEL.MASK_ON to True."
            )
        yolact = cfg.MODEL.YOLACT
        backbone = build_backbone(cfg)
        shapes = sorted(backbone.output_shape().values(), key=lambda shape: shape.stride)
        scales = yolact.ANCHORS.SCALES
        if len(scales) != len(shapes) or len({len(level) for level in scales}) != 1:
            raise ValueError(
                f"The pyramid has {len(shapes)} levels: MODEL.YOLACT.ANCHORS.SCALES needs as many "
                f"lists, all of the same length, not {scales}."
            )
        head = YOLACTHead(
            shapes,
            num_classes=yolact.NUM_CLASSES,
            num_prototypes=yolact.NUM_PROTOTYPES,
            channels=yolact.HEAD_CHANNELS,
            priors_per_cell=len(scales[0]) * len(yolact.ANCHORS.ASPECT_RATIOS),
            semantic=yolact.LOSS.SEMANTIC_WEIGHT > 0,
        )
        criterion = YOLACTCriterion(**{key.lower(): value for key, value in yolact.LOSS.items()})
        rescoring = yolact.MASK_RESCORING.ENABLED
        images_per_process = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "head": head,
            "mask_scorer": MaskScorer(yolact.NUM_CLASSES) if rescoring else None,
            "criterion": criterion,
            "input_size": yolact.INPUT_SIZE,
            "anchor_scales": scales,
            "anchor_ratios": yolact.ANCHORS.ASPECT_RATIOS,
            "square_anchors": yolact.ANCHORS.SQUARE,
            "freeze_batch_norm": images_per_process < yolact.MIN_IMAGES_TO_TRAIN_BN,
            "score_threshold": yolact.TEST.SCORE_THRESH,
            "nms": yolact.TEST.NMS,
            "nms_threshold": yolact.TEST.NMS_THRESH,
            "nms_top_k": yolact.TEST.NMS_TOP_K,
            "max_detections": yolact.TEST.MAX_DETECTIONS,
            "mask_threshold": yolact.TEST.MASK_THRESH,
            "crop": yolact.TEST.CROP,
            "truncate_boxes": yolact.TEST.TRUNCATE_BOXES,
        }

    def train(self, mode: bool = True) -> YOLACT:
        super().train(mode)
        if self.freeze_batch_norm:
            for module in getattr(self.backbone, "bottom_up", self.backbone).modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)
        return self

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Images of any size → (B, 3, S, S): bilinear without antialiasing, normalised."""
        side = (self.input_size, self.input_size)
        images = [x["image"] for x in batched_inputs]
        if len({(x.shape, x.dtype, x.device) for x in images}) == 1:
            batch = upload_alike(images, self.device).float()
            if batch.shape[-2:] != side:
                batch = F.interpolate(batch, side, mode="bilinear", align_corners=False)
        else:
            batch = torch.cat(
                [
                    F.interpolate(x[None].float(), side, mode="bilinear", align_corners=False)
                    for x in map(self.upload, batched_inputs)
                ]
            )
        return self.normalize(batch)

    def priors(self, feature_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(A, 4) prior boxes, centre form, on the model's device."""
        key = (tuple(feature_sizes), self.device)
        if key not in self._priors:
            self._priors[key] = prior_boxes(
                feature_sizes,
                self.anchor_scales,
                self.anchor_ratios,
                self.input_size,
                square=self.square_anchors,
            ).to(self.device)
        return self._priors[key]

    def encode_targets(
        self, batched_inputs: list[dict[str, Any]], images: Tensor
    ) -> list[YOLACTTargets]:
        """See :func:`read_targets`."""
        return [read_targets(inputs, self.device) for inputs in batched_inputs]

    def losses(
        self, predictions: YOLACTPredictions, targets: Sequence[YOLACTTargets]
    ) -> dict[str, Tensor]:
        """See :class:`YOLACTCriterion`."""
        priors = self.priors(predictions.feature_sizes)
        return self.criterion(predictions, priors, targets, self.mask_scorer)

    def _decode(self, predictions: YOLACTPredictions) -> tuple[Tensor, ...]:
        """Raw predictions → the fields of :class:`Detections`, the prototypes, and with mask re-scoring
        the masks' scores (B, D)."""
        scores = predictions.logits.softmax(dim=-1, dtype=torch.float32)[..., 1:]
        boxes = decode_boxes(predictions.offsets.float(), self.priors(predictions.feature_sizes))
        options: dict[str, Any] = {
            "score_threshold": self.score_threshold,
            "iou_threshold": self.nms_threshold,
            "max_detections": self.max_detections,
        }
        if self.nms == "traditional":
            options["input_size"] = self.input_size
        else:
            options["top_k"] = self.nms_top_k
        detections = NMS[self.nms](boxes, scores, predictions.coefficients, **options)
        decoded = (*detections, predictions.prototypes)
        return decoded if self.mask_scorer is None else (*decoded, self._mask_scores(*decoded))

    def _mask_scores(
        self,
        boxes: Tensor,
        scores: Tensor,
        classes: Tensor,
        coefficients: Tensor,
        prototypes: Tensor,
    ) -> Tensor:
        assert self.mask_scorer is not None
        masks = assemble_slot_masks(prototypes, coefficients, boxes)
        quality = self.mask_scorer(masks.flatten(0, 1)).unflatten(0, scores.shape)
        return scores * quality.gather(2, classes[..., None])[..., 0]

    def export_form(self) -> ExportForm:
        if self.nms == "traditional":
            raise NotExportable(
                "Traditional NMS gives another number of detections for each image: set "
                'MODEL.YOLACT.TEST.NMS to "fast" or "cross_class_fast".'
            )
        names = ("boxes", "scores", "classes", "coefficients", "prototypes", "mask_scores")

        def pack(decoded: tuple[Tensor, ...]) -> Outputs:
            outputs = dict(zip(names, decoded, strict=False))
            return outputs | {"count": (outputs["scores"] >= 0).sum(dim=1)}

        return ExportForm(
            pack=pack,
            unpack=lambda outputs: tuple(outputs[name] for name in names if name in outputs),
            size=(self.input_size, self.input_size),
            maps=("prototypes",),
            results="yolact",
            options={
                "threshold": self.mask_threshold,
                "crop": self.crop,
                "truncate": self.truncate_boxes,
            },
        )

    def postprocess(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Decoded predictions → for each image ``{"instances": Instances}`` with ``pred_boxes``,
        ``scores``, ``pred_classes``, ``pred_masks`` (N, height, width) bool, and with mask re-scoring
        ``mask_scores`` (the masks' scores; ``scores`` are the boxes')."""
        detections, (prototypes, *mask_scores) = Detections(*predictions[:4]), predictions[4:]
        sizes = [output_size(inputs) for inputs in batched_inputs]
        # What does not depend on the numbers of detections comes before the one wait for the device.
        boxes = self._pixel_boxes(detections.boxes, sizes)
        counts = (detections.scores >= 0).sum(dim=1).tolist()
        masks = self._masks(detections, prototypes, counts, sizes)
        results = []
        for i, count in enumerate(counts):
            instances = Instances(sizes[i])
            instances.pred_boxes = Boxes(boxes[i, :count])
            instances.scores = detections.scores[i, :count]
            instances.pred_classes = detections.classes[i, :count]
            instances.pred_masks = masks[i]
            if mask_scores:
                instances.mask_scores = mask_scores[0][i, :count]
            results.append({"instances": instances})
        return results

    def _pixel_boxes(self, boxes: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """:func:`pixel_boxes` of images (B, D, 4) of these sizes (height, width)."""
        options = {"truncate": self.truncate_boxes}
        if len(set(sizes)) == 1:
            return pixel_boxes(boxes, *sizes[0], **options)
        each = zip(boxes, sizes, strict=True)
        return torch.stack([pixel_boxes(own, *size, **options) for own, size in each])

    def _masks(
        self,
        detections: Detections,
        prototypes: Tensor,
        counts: Sequence[int],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """For each image the masks (count, height, width) of its first ``count`` detections; those of
        images of one size are assembled together."""
        options: dict[str, Any] = {"threshold": self.mask_threshold, "crop": self.crop}
        groups: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(sizes):
            groups.setdefault(size, []).append(i)
        boxes, coefficients = detections.boxes, detections.coefficients
        masks: dict[int, Tensor] = {}
        for size, members in groups.items():
            if len(members) == 1:
                i, count = members[0], counts[members[0]]
                arguments = prototypes[i], coefficients[i, :count], boxes[i, :count], size
                masks[i] = assemble_binary_masks(*arguments, **options)
                continue
            numbers = [counts[i] for i in members]
            # (2, n): the image and the slot of each detection.
            places = np.stack(
                [np.repeat(members, numbers), np.concatenate(list(map(np.arange, numbers)))]
            )
            image, slot = upload(torch.from_numpy(places), prototypes.device)
            together = assemble_binary_masks(
                prototypes, coefficients[image, slot], boxes[image, slot], size, image, **options
            )
            masks.update(zip(members, together.split(numbers), strict=True))
        return [masks[i] for i in range(len(sizes))]

    def draw_training(
        self,
        batched_inputs: list[dict[str, Any]],
        images: Tensor,
        targets: Any,
        predictions: YOLACTPredictions,
    ) -> tuple[str, Tensor]:
        """The first image's annotations beside its best detections."""
        first = {k: v[:1] for k, v in predictions._asdict().items() if isinstance(v, Tensor)}
        decoded = self._decode(predictions._replace(**first))
        best = tuple(x if i == 4 else x[:, :20] for i, x in enumerate(decoded))
        inputs = batched_inputs[0] | {"height": None, "width": None}
        return self.draw_pair(inputs, self.postprocess(best, [inputs])[0]["instances"], masks=True)
