"""YOLACT: real-time instance segmentation (arXiv 1904.02689) and YOLACT++ (arXiv 1912.06218).

An image goes through :meth:`YOLACT.preprocess` (square input), the backbone and pyramid (``fpn.py``),
the heads (``head.py``), and then either the losses (``losses.py``) or, in inference, the choice of
detections (``postprocess.py``) and the assembly of their masks from prototypes
(:mod:`d2ext.layers`).

Letters: B images, S input side, A priors, C thing classes, k prototypes, D detection slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.prior_boxes import decode_boxes, prior_boxes
from d2ext.layers import assemble_binary_masks, assemble_masks
from d2ext.modeling.inference import InferenceNetwork
from d2ext.systems.yolact.head import MaskScorer, YOLACTHead, YOLACTPredictions
from d2ext.systems.yolact.losses import YOLACTCriterion, YOLACTTargets
from d2ext.systems.yolact.postprocess import NMS, Detections, pixel_boxes


class _Network(nn.Module):
    """Backbone and heads: images (B, 3, S, S) → what :class:`YOLACT` decodes, as plain tensors."""

    def __init__(self, backbone: Backbone, head: YOLACTHead, features: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.features = list(features)

    def forward(self, images: Tensor) -> YOLACTPredictions:
        pyramid = self.backbone(images)
        return self.head([pyramid[name] for name in self.features])


@META_ARCH_REGISTRY.register()
class YOLACT(nn.Module):
    """YOLACT and, with a mask scorer, YOLACT++."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: YOLACTHead,
        criterion: YOLACTCriterion,
        input_size: int,
        anchor_scales: Sequence[Sequence[float]],
        anchor_ratios: Sequence[float],
        square_anchors: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        freeze_batch_norm: bool = False,
        score_threshold: float = 0.05,
        nms: str = "fast",
        nms_threshold: float = 0.5,
        nms_top_k: int = 200,
        max_detections: int = 100,
        mask_threshold: float = 0.5,
        crop: str = "before",
        truncate_boxes: bool = True,
        inference_mode: str = "eager",
        inference_dtype: str = "float32",
        channels_last: bool = False,
        vis_period: int = 0,
    ) -> None:
        """Args:
        backbone: feature pyramid; all its levels are used, finest first.
        head: the heads on it.
        criterion: the losses; its ``mask_scorer`` makes the model a YOLACT++.
        input_size: S; every image is resized to S×S, whatever its aspect ratio.
        anchor_scales, anchor_ratios, square_anchors: see :func:`prior_boxes`.
        pixel_mean, pixel_std: per channel of ``input_format``, in 0..255.
        input_format: channel order of the images, for pictures only.
        freeze_batch_norm: keep statistics and affine of the bottom-up net's batch norms.
        score_threshold, nms, nms_threshold, nms_top_k, max_detections: see ``postprocess.py``.
        mask_threshold, crop: see :func:`assemble_binary_masks`.
        truncate_boxes: see :func:`pixel_boxes`.
        inference_mode, inference_dtype, channels_last: see :class:`InferenceNetwork`.
        vis_period: iterations between pictures of the training in TensorBoard; 0 for none.
        """
        super().__init__()
        if nms not in NMS:
            raise ValueError(f'MODEL.YOLACT.TEST.NMS is one of {sorted(NMS)}, not "{nms}".')
        if criterion.mask_scorer is not None and input_size < 4 * MaskScorer.MIN_SIDE:
            raise ValueError(
                f"Mask re-scoring needs prototypes of {MaskScorer.MIN_SIDE} cells a side, so an "
                f"input of {4 * MaskScorer.MIN_SIDE} pixels at least: MODEL.YOLACT.INPUT_SIZE is "
                f"{input_size}."
            )
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.input_size = input_size
        self.anchor_scales = [list(scales) for scales in anchor_scales]
        self.anchor_ratios = list(anchor_ratios)
        self.square_anchors = square_anchors
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.freeze_batch_norm = freeze_batch_norm
        self.score_threshold = score_threshold
        self.nms = nms
        self.nms_threshold = nms_threshold
        self.nms_top_k = nms_top_k
        self.max_detections = max_detections
        self.mask_threshold = mask_threshold
        self.crop = crop
        self.truncate_boxes = truncate_boxes
        self.vis_period = vis_period
        shapes = backbone.output_shape()
        self.features = sorted(shapes, key=lambda name: shapes[name].stride)
        self._priors: dict[tuple[Any, ...], Tensor] = {}
        # In a tuple, so that the copy of the weights which it keeps is no submodule.
        self._inference = (
            InferenceNetwork(
                _Network(backbone, head, self.features),
                self._decode,
                mode=inference_mode,
                dtype=inference_dtype,
                channels_last=channels_last,
            ),
        )
        if nms == "traditional" and inference_mode != "eager":
            raise ValueError(
                "Traditional NMS has data-dependent shapes: set MODEL.YOLACT.TEST.NMS to "
                '"fast" or "cross_class_fast", or MODEL.INFERENCE.MODE to "eager".'
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
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
        criterion = YOLACTCriterion(
            mask_scorer=MaskScorer(yolact.NUM_CLASSES) if yolact.MASK_RESCORING.ENABLED else None,
            **{key.lower(): value for key, value in yolact.LOSS.items()},
        )
        images_per_process = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        return {
            "backbone": backbone,
            "head": head,
            "criterion": criterion,
            "input_size": yolact.INPUT_SIZE,
            "anchor_scales": scales,
            "anchor_ratios": yolact.ANCHORS.ASPECT_RATIOS,
            "square_anchors": yolact.ANCHORS.SQUARE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "freeze_batch_norm": images_per_process < yolact.MIN_IMAGES_TO_TRAIN_BN,
            "score_threshold": yolact.TEST.SCORE_THRESH,
            "nms": yolact.TEST.NMS,
            "nms_threshold": yolact.TEST.NMS_THRESH,
            "nms_top_k": yolact.TEST.NMS_TOP_K,
            "max_detections": yolact.TEST.MAX_DETECTIONS,
            "mask_threshold": yolact.TEST.MASK_THRESH,
            "crop": yolact.TEST.CROP,
            "truncate_boxes": yolact.TEST.TRUNCATE_BOXES,
            "inference_mode": cfg.MODEL.INFERENCE.MODE,
            "inference_dtype": cfg.MODEL.INFERENCE.DTYPE,
            "channels_last": cfg.MODEL.INFERENCE.CHANNELS_LAST,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def mask_scorer(self) -> MaskScorer | None:
        """YOLACT++'s re-scoring net."""
        return self.criterion.mask_scorer

    @property
    def inference_network(self) -> InferenceNetwork:
        """Network and choice of detections as :meth:`inference` runs them; benchmarks time it."""
        return self._inference[0]

    def train(self, mode: bool = True) -> YOLACT:
        super().train(mode)
        if self.freeze_batch_norm:
            for module in getattr(self.backbone, "bottom_up", self.backbone).modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Detectron2's contract.

        Args:
            batched_inputs: for each image a dict with ``image`` (3, H, W) in 0..255, any size;
                ``height``, ``width`` of the wanted output (default: of the image); in training
                ``instances`` with ``gt_boxes``, ``gt_classes``, ``gt_masks``, and optionally
                ``crowd_instances`` with ``gt_boxes``, which are not trained on.

        Returns:
            In training the losses. Otherwise a list of ``{"instances": Instances}`` with
            ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks`` (N, height, width) bool,
            and ``mask_scores`` with mask re-scoring (the score of the mask; ``scores`` is the box's).

        Raises:
            KeyError: training inputs without ``instances``.
            ValueError: instances without masks.
        """
        images = self.preprocess(batched_inputs)
        if not self.training:
            return self.inference(images, batched_inputs)
        targets = [self._targets(inputs) for inputs in batched_inputs]
        pyramid = self.backbone(images)
        predictions = self.head([pyramid[name] for name in self.features])
        priors = self.priors(predictions.feature_sizes)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self._visualize_training(batched_inputs[0], predictions)
        return self.criterion(predictions, priors, targets)

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Images of any size → (B, 3, S, S): bilinear without antialiasing, normalised."""
        side = (self.input_size, self.input_size)
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        if len({image.shape for image in images}) == 1:
            batch = torch.stack(images).float()
            if batch.shape[-2:] != side:
                batch = F.interpolate(batch, side, mode="bilinear", align_corners=False)
        else:
            batch = torch.cat(
                [
                    F.interpolate(x[None].float(), side, mode="bilinear", align_corners=False)
                    for x in images
                ]
            )
        return (batch - self.pixel_mean) / self.pixel_std

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

    def _targets(self, inputs: dict[str, Any]) -> YOLACTTargets:
        """Ground truth of one image as the criterion takes it; objects without area left out."""
        if "instances" not in inputs:
            raise KeyError(
                "Training needs `instances` for each image: the data mapper did not provide them "
                "(is it built with is_train=True, and has the data set annotations?)."
            )
        instances = inputs["instances"].to(self.device)
        height, width = inputs["image"].shape[-2:]
        scale = torch.tensor([width, height, width, height], device=self.device)
        boxes = instances.gt_boxes.tensor.float() / scale
        if len(boxes) > 0 and not instances.has("gt_masks"):
            raise ValueError(
                "YOLACT trains on masks and these instances have none: the annotations need "
                "`segmentation`, and MODEL.MASK_ON must be True so that the mapper keeps it."
            )
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = self._bitmasks(instances, height, width)[keep]
        crowd = boxes.new_zeros((0, 4))
        if "crowd_instances" in inputs:
            crowd = inputs["crowd_instances"].gt_boxes.tensor.to(self.device).float() / scale
        return YOLACTTargets(boxes[keep], instances.gt_classes[keep], masks, crowd)

    def _bitmasks(self, instances: Instances, height: int, width: int) -> Tensor:
        """(n, height, width) float32."""
        if len(instances) == 0:
            return torch.zeros((0, height, width), device=self.device)
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, height, width).to(self.device)
        return masks.tensor.float()

    def _decode(self, predictions: YOLACTPredictions) -> tuple[Tensor, ...]:
        """Raw predictions → the fields of :class:`Detections`, and the prototypes."""
        scores = predictions.logits.float().softmax(dim=-1)[..., 1:]
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
        return (*detections, predictions.prototypes)

    @torch.no_grad()
    def inference(
        self, images: Tensor, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Detect on preprocessed images (B, 3, S, S); see :meth:`forward`."""
        *fields, prototypes = self.inference_network(images)
        detections = Detections(*fields)
        # One transfer for the whole batch; a filter per image would wait for the device each time.
        counts = (detections.scores >= 0).sum(dim=1).tolist()
        results = []
        for i, (inputs, count) in enumerate(zip(batched_inputs, counts, strict=True)):
            height, width = inputs.get("height"), inputs.get("width")
            size = (height or inputs["image"].shape[-2], width or inputs["image"].shape[-1])
            found = Detections(*(field[i, :count] for field in detections))
            results.append({"instances": self._instances(found, prototypes[i], *size)})
        return results

    def _instances(
        self, found: Detections, prototypes: Tensor, height: int, width: int
    ) -> Instances:
        """Detections of one image (fields without B) → instances at the size of the output."""
        result = Instances((height, width))
        result.pred_boxes = Boxes(
            pixel_boxes(found.boxes, height, width, truncate=self.truncate_boxes)
        )
        result.scores = found.scores
        result.pred_classes = found.classes
        result.pred_masks = assemble_binary_masks(
            prototypes,
            found.coefficients,
            found.boxes,
            (height, width),
            threshold=self.mask_threshold,
            crop=self.crop,
        )
        if self.mask_scorer is not None:
            soft = assemble_masks(prototypes, found.coefficients, found.boxes)
            quality = self.mask_scorer(soft.float())
            result.mask_scores = found.scores * quality.gather(1, found.classes[:, None])[:, 0]
        return result

    @torch.no_grad()
    def _visualize_training(self, inputs: dict[str, Any], predictions: YOLACTPredictions) -> None:
        """Log ground truth beside the best detections of the batch's first image."""
        from detectron2.utils.visualizer import Visualizer  # pulls in matplotlib

        image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), self.input_format)
        height, width = image.shape[:2]
        *fields, prototypes = self._decode(
            YOLACTPredictions(
                predictions.offsets[:1],
                predictions.logits[:1],
                predictions.coefficients[:1],
                predictions.prototypes[:1],
                None,
                predictions.feature_sizes,
            )
        )
        found = Detections(*(field[0, :20] for field in fields))
        found = Detections(*(field[found.scores >= 0] for field in found))
        detected = self._instances(found, prototypes[0], height, width).to("cpu")
        truth = inputs["instances"].to("cpu")
        truth_picture = Visualizer(image).overlay_instances(
            boxes=truth.gt_boxes, masks=truth.gt_masks if truth.has("gt_masks") else None
        )
        picture = Visualizer(image).overlay_instances(
            boxes=detected.pred_boxes, masks=detected.pred_masks.numpy()
        )
        both = torch.cat(
            [
                torch.from_numpy(truth_picture.get_image().copy()),
                torch.from_numpy(picture.get_image().copy()),
            ],
            dim=1,
        )
        name = "Left: ground truth. Right: detections"
        get_event_storage().put_image(name, both.permute(2, 0, 1).float() / 255)
