"""CenterNet: objects as points (arXiv 1904.07850), detection and human pose.

An image goes through :meth:`CenterNet.preprocess` (``preprocess.py``), the backbone and the heads
(``head.py``), and then either the losses (``targets.py``, ``losses.py``) or, in inference, the decoding
of peaks (``postprocess.py``).

Letters: B images, H×W pixels of the network input, h×w cells of the output, C classes, J joints,
K detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2ext.codecs.boxes import clip_boxes
from d2ext.codecs.canvas import Canvas, scale_points
from d2ext.layers.opencv_resample import resize_like_opencv
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.meta_arch import BackboneWithHead, image_size, output_size
from d2ext.modeling.multi_scale import MultiScaleMetaArch
from d2ext.systems.centernet.head import CenterNetHead, Predictions, head_channels
from d2ext.systems.centernet.losses import CenterNetCriterion
from d2ext.systems.centernet.postprocess import (
    CenterDetections,
    decode,
    merge_mirrored,
    merge_scales,
    probabilities,
)
from d2ext.systems.centernet.preprocess import padded_canvas, warped_canvas
from d2ext.systems.centernet.targets import (
    KEYPOINT_SHIFT,
    CenterNetTargets,
    encode_targets,
    read_annotations,
)


@META_ARCH_REGISTRY.register()
class CenterNet(MultiScaleMetaArch):
    """CenterNet for boxes and, with joints, for poses."""

    export_refusal = ""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: CenterNetHead,
        criterion: CenterNetCriterion,
        in_features: Sequence[str],
        num_classes: int,
        num_joints: int = 0,
        flip_pairs: Sequence[Sequence[int]] = (),
        max_objects: int = 128,
        min_overlap: float = 0.7,
        top_k: int = 100,
        keep_resolution: bool = True,
        input_size: tuple[int, int] = (512, 512),
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        soft_nms: bool = False,
        max_detections: int = 100,
        clip_boxes: bool = False,
        **meta_arch: Any,
    ) -> None:
        """Args:
        backbone: computes ``in_features``, all of one stride.
        head: the heads on them.
        criterion: the losses.
        in_features: features with heads; all are trained, inference uses the last one.
        num_classes: C.
        num_joints: J; 0: no poses.
        flip_pairs: joints that swap in a mirror image.
        max_objects, min_overlap: see :func:`encode_targets`.
        top_k: K.
        keep_resolution: pad the image; otherwise warp it into ``input_size`` (height, width).
        flip, scales: see :class:`MultiScaleMetaArch`; predictions are averaged with those for the mirror
            image, results of several scales merged by soft-NMS.
        soft_nms: soft-NMS also with one scale.
        max_detections: limit after soft-NMS; not for poses, as published.
        clip_boxes: clip boxes to the image and order their corners.
        meta_arch: see :class:`MetaArch`.
        """
        super().__init__(scales=scales, flip=flip, **meta_arch)
        divisibility = backbone.size_divisibility
        if not keep_resolution and any(side % divisibility or side < 1 for side in input_size):
            raise ValueError(
                f"This backbone needs MODEL.CENTERNET.TEST.INPUT_SIZE in multiples of {divisibility}, "
                f"not {tuple(input_size)}."
            )
        if any(not 0 <= joint < num_joints for pair in flip_pairs for joint in pair):
            raise ValueError(
                f"MODEL.CENTERNET.POSE.FLIP_PAIRS names joints beyond the model's {num_joints}: "
                f"{[list(pair) for pair in flip_pairs]}."
            )
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.num_classes = num_classes
        self.num_joints = num_joints
        self.flip_pairs = [list(pair) for pair in flip_pairs]
        self.max_objects = max_objects
        self.min_overlap = min_overlap
        self.top_k = top_k
        self.keep_resolution = keep_resolution
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.soft_nms = soft_nms
        self.max_detections = max_detections
        self.clip_boxes = clip_boxes
        self.set_network(BackboneWithHead(backbone, head, in_features), self._decode)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        centernet = cfg.MODEL.CENTERNET
        pose, test = centernet.POSE, centernet.TEST
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in centernet.IN_FEATURES if name not in shapes]
        if missing or not centernet.IN_FEATURES:
            raise ValueError(
                f"MODEL.CENTERNET.IN_FEATURES is {list(centernet.IN_FEATURES)}, but the backbone has "
                f"{sorted(shapes)}."
            )
        num_joints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
        head = CenterNetHead(
            [shapes[name] for name in centernet.IN_FEATURES],
            channels=head_channels(
                centernet.NUM_CLASSES,
                class_specific_size=centernet.SIZE_TARGET == "class_specific",
                num_joints=num_joints,
                offset=centernet.OFFSET,
                joint_heatmap=pose.HEATMAP,
                joint_offset=pose.OFFSET,
            ),
            hidden=centernet.HEAD_CHANNELS,
            init_std=centernet.HEAD_INIT_STD,
        )
        criterion = CenterNetCriterion(
            size_target=centernet.SIZE_TARGET,
            joint_target=pose.TARGET,
            **{key.lower(): value for key, value in centernet.LOSS.items()},
        )
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "head": head,
            "criterion": criterion,
            "in_features": centernet.IN_FEATURES,
            "num_classes": centernet.NUM_CLASSES,
            "num_joints": num_joints,
            "flip_pairs": pose.FLIP_PAIRS if num_joints else (),
            "max_objects": centernet.MAX_OBJECTS,
            "min_overlap": centernet.MIN_OVERLAP,
            "top_k": test.TOP_K,
            "keep_resolution": test.KEEP_RESOLUTION,
            "input_size": test.INPUT_SIZE,
            "flip": test.FLIP,
            "scales": test.SCALES,
            "soft_nms": test.SOFT_NMS,
            "max_detections": test.MAX_DETECTIONS,
            "clip_boxes": test.CLIP_BOXES,
        }

    def canvas(self, size: tuple[int, int], scale: float) -> Canvas:
        """See :func:`padded_canvas` and :func:`warped_canvas`."""
        if self.keep_resolution:
            return padded_canvas(size, scale, self.backbone.size_divisibility)
        return warped_canvas(size, scale, self.input_size)

    def draw(self, images: Tensor, canvas: Canvas) -> Tensor:
        if images.shape[-2:] != canvas.content:
            images = resize_like_opencv(images, *canvas.content)
        return canvas.draw(images)

    def training_batch(
        self, batched_inputs: list[dict[str, Any]]
    ) -> tuple[Tensor, CenterNetTargets]:
        """Normalised images (B, 3, H, W), padded at the bottom right to a common, divisible size, and
        targets.

        In the published recipe all images already have one such size; others are padded with zeros
        before the normalisation, as everywhere in the published code.
        """
        images = [self.upload(x).float() for x in batched_inputs]
        padded = ImageList.from_tensors(images, self.backbone.size_divisibility).tensor
        return self.normalize(padded), self.encode_targets(batched_inputs, padded)

    def encode_targets(
        self, batched_inputs: list[dict[str, Any]], images: Tensor
    ) -> CenterNetTargets:
        """See :func:`encode_targets`."""
        stride = self.head.stride
        return encode_targets(
            [read_annotations(x, stride, self.num_joints) for x in batched_inputs],
            (images.shape[-2] // stride, images.shape[-1] // stride),
            self.num_classes,
            max_objects=self.max_objects,
            min_overlap=self.min_overlap,
            device=self.device,
        )

    def losses(
        self, predictions: list[Predictions], targets: CenterNetTargets
    ) -> dict[str, Tensor]:
        """See :class:`CenterNetCriterion`."""
        return self.criterion(predictions, targets)

    def _decode(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """Raw maps → the fields of :class:`CenterDetections`, ``joints`` only with poses."""
        maps = probabilities(predictions)
        if self.flip:
            maps = merge_mirrored(maps, self.flip_pairs)
        return tuple(field for field in decode(maps, self.top_k) if field is not None)

    def export_form(self) -> ExportForm:
        def pack(decoded: tuple[Tensor, ...]) -> Outputs:
            return dict(zip(CenterDetections._fields, decoded, strict=False))

        unit = self.backbone.size_divisibility
        return ExportForm(
            pack=pack,
            unpack=lambda x: tuple(x[name] for name in CenterDetections._fields if name in x),
            size=(unit * -(-512 // unit),) * 2 if self.keep_resolution else self.input_size,
            multiple=unit if self.keep_resolution else 0,
            mirror=self.flip,
            results="centernet",
            options={
                "stride": self.head.stride,
                "clip": self.clip_boxes,
                "soft_nms": self.soft_nms,
            },
        )

    def detections(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]], scale: float
    ) -> list[CenterDetections]:
        results = []
        for i, inputs in enumerate(batched_inputs):
            canvas = self.canvas(image_size(inputs), scale)
            cells = CenterDetections(*(field[i] for field in predictions))
            results.append(cells.map_points(partial(canvas.to_image, stride=self.head.stride)))
        return results

    def result(
        self, inputs: dict[str, Any], passes: list[CenterDetections]
    ) -> dict[str, Instances]:
        """``instances`` with the fields listed in ``postprocess.py``."""
        detections = passes[0]
        if self.soft_nms or len(passes) > 1:
            detections = merge_scales(passes, None if self.num_joints else self.max_detections)
        size, (height, width) = output_size(inputs), image_size(inputs)
        if size != (height, width):
            scale = size[1] / width, size[0] / height
            detections = detections.map_points(partial(scale_points, scale=scale))
        boxes = detections.boxes
        if self.clip_boxes:
            boxes = clip_boxes(boxes.nan_to_num(0.0), size)
        result = Instances(size)
        result.pred_boxes = Boxes(boxes)
        result.scores = detections.scores
        result.pred_classes = detections.classes
        result.centers = detections.centers
        if detections.joints is not None:
            points = detections.joints.unflatten(1, (-1, 2)) + KEYPOINT_SHIFT
            result.pred_keypoints = torch.cat([points, torch.ones_like(points[..., :1])], dim=2)
        return {"instances": result}

    def shown_maps(self, inputs: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        maps = probabilities(self.network(self.preprocess([inputs])))
        if self.flip:
            maps = merge_mirrored(maps, self.flip_pairs)
        to_image = self.canvas(image_size(inputs), self.scales[0]).affine(self.head.stride)
        names = {"centers": "heatmap", "joints": "joint_heatmap"}
        return [(name, maps[key][0], to_image) for name, key in names.items() if key in maps]

    def draw_training(
        self,
        batched_inputs: list[dict[str, Any]],
        images: Tensor,
        targets: CenterNetTargets,
        predictions: list[Predictions],
    ) -> tuple[str, Tensor]:
        """The heat map of the first image: target beside prediction."""
        image = convert_image_to_rgb(
            batched_inputs[0]["image"].clamp(0, 255).permute(1, 2, 0), self.input_format
        )
        grey = torch.from_numpy(image.astype("float32")) / 255
        pictures = []
        for heat in (targets.heatmap[0], predictions[-1]["heatmap"][0].float().sigmoid()):
            strength = nn.functional.interpolate(
                heat.amax(dim=0)[None, None], scale_factor=self.head.stride, mode="nearest"
            )[0, 0, : image.shape[0], : image.shape[1], None].cpu()
            pictures.append(grey * (1 - strength) + torch.tensor([1.0, 0.0, 0.0]) * strength)
        return "Left: target heat map. Right: prediction", torch.cat(pictures, 1).permute(2, 0, 1)
