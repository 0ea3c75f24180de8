"""CenterNet: objects as points (arXiv 1904.07850), detection and human pose.

An image goes through :meth:`CenterNet.preprocess` (``preprocess.py``), the backbone and the heads
(``head.py``), and then either the losses (``targets.py``, ``losses.py``) or, in inference, the decoding
of peaks (``postprocess.py``).

Letters: B images, H×W pixels of the network input, h×w cells of the output, C classes, J joints,
K detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2ext.codecs.heatmaps import maps_on_image
from d2ext.modeling.inference import InferenceNetwork
from d2ext.systems.centernet.head import CenterNetHead, Predictions, head_channels
from d2ext.systems.centernet.losses import CenterNetCriterion
from d2ext.systems.centernet.postprocess import Detections, decode, merge_mirrored, merge_scales
from d2ext.systems.centernet.preprocess import Placement, placement
from d2ext.systems.centernet.targets import CenterNetTargets, ObjectAnnotations, encode_targets

# Detectron2's keypoints are half a pixel more than COCO's, which the published code uses as they are.
_KEYPOINT_SHIFT = 0.5


class _Network(nn.Module):
    """Backbone and the last stack's heads: images (B, 3, H, W) → raw maps."""

    def __init__(self, backbone: Backbone, head: CenterNetHead, feature: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature = feature

    def forward(self, images: Tensor) -> Predictions:
        return self.head.predict(self.backbone(images)[self.feature])


@META_ARCH_REGISTRY.register()
class CenterNet(nn.Module):
    """CenterNet for boxes and, with joints, for poses."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: CenterNetHead,
        criterion: CenterNetCriterion,
        in_features: Sequence[str],
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        num_joints: int = 0,
        flip_pairs: Sequence[Sequence[int]] = (),
        max_objects: int = 128,
        min_overlap: float = 0.7,
        top_k: int = 100,
        keep_resolution: bool = True,
        input_size: tuple[int, int] = (512, 512),
        flip_test: bool = False,
        test_scales: Sequence[float] = (1.0,),
        soft_nms: bool = False,
        max_detections: int = 100,
        clip_boxes: bool = False,
        inference_mode: str = "eager",
        inference_dtype: str = "float32",
        channels_last: bool = False,
        vis_period: int = 0,
    ) -> None:
        """Args:
        backbone: computes ``in_features``, all of one stride.
        head: the heads on them.
        criterion: the losses.
        in_features: what is trained; the last one is used in inference.
        num_classes: C.
        pixel_mean, pixel_std: per channel of ``input_format``, in 0..255.
        input_format: channel order of the images, for pictures only.
        num_joints: J; 0: no poses.
        flip_pairs: joints that change places in a mirror image.
        max_objects, min_overlap: see :func:`encode_targets`.
        top_k: K.
        keep_resolution: pad the image; otherwise warp it into ``input_size`` (height, width).
        flip_test: average with the mirror image.
        test_scales: sizes of the image; several are merged by soft-NMS.
        soft_nms: soft-NMS also with one scale.
        max_detections: limit after soft-NMS; of detection only, as published.
        clip_boxes: cut boxes to the image and order their corners.
        inference_mode, inference_dtype, channels_last: see :class:`InferenceNetwork`.
        vis_period: iterations between pictures of the training in TensorBoard; 0 for none.
        """
        super().__init__()
        divisibility = backbone.size_divisibility
        if not keep_resolution and any(side % divisibility or side < 1 for side in input_size):
            raise ValueError(
                f"This backbone needs MODEL.CENTERNET.TEST.INPUT_SIZE in multiples of {divisibility}, "
                f"not {tuple(input_size)}."
            )
        if not test_scales or min(test_scales) <= 0:
            raise ValueError(
                f"MODEL.CENTERNET.TEST.SCALES needs positive numbers, not {list(test_scales)}."
            )
        if any(not 0 <= joint < num_joints for pair in flip_pairs for joint in pair):
            raise ValueError(
                f"MODEL.CENTERNET.POSE.FLIP_PAIRS names joints beyond the model's {num_joints}: "
                f"{[list(pair) for pair in flip_pairs]}."
            )
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.in_features = list(in_features)
        self.num_classes = num_classes
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.num_joints = num_joints
        self.flip_pairs = [list(pair) for pair in flip_pairs]
        self.max_objects = max_objects
        self.min_overlap = min_overlap
        self.top_k = top_k
        self.keep_resolution = keep_resolution
        self.input_size = (int(input_size[0]), int(input_size[1]))
        self.flip_test = flip_test
        self.test_scales = list(test_scales)
        self.soft_nms = soft_nms
        self.max_detections = max_detections
        self.clip_boxes = clip_boxes
        self.vis_period = vis_period
        # In a tuple, so that the copy of the weights which it keeps is no submodule.
        self._inference = (
            InferenceNetwork(
                _Network(backbone, head, self.in_features[-1]),
                self._decode,
                mode=inference_mode,
                dtype=inference_dtype,
                channels_last=channels_last,
            ),
        )

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
            "backbone": backbone,
            "head": head,
            "criterion": criterion,
            "in_features": centernet.IN_FEATURES,
            "num_classes": centernet.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "num_joints": num_joints,
            "flip_pairs": pose.FLIP_PAIRS if num_joints else (),
            "max_objects": centernet.MAX_OBJECTS,
            "min_overlap": centernet.MIN_OVERLAP,
            "top_k": test.TOP_K,
            "keep_resolution": test.KEEP_RESOLUTION,
            "input_size": test.INPUT_SIZE,
            "flip_test": test.FLIP,
            "test_scales": test.SCALES,
            "soft_nms": test.SOFT_NMS,
            "max_detections": test.MAX_DETECTIONS,
            "clip_boxes": test.CLIP_BOXES,
            "inference_mode": cfg.MODEL.INFERENCE.MODE,
            "inference_dtype": cfg.MODEL.INFERENCE.DTYPE,
            "channels_last": cfg.MODEL.INFERENCE.CHANNELS_LAST,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def inference_network(self) -> InferenceNetwork:
        """Backbone, heads and decoding as inference runs them."""
        return self._inference[0]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: Detectron2's: ``image`` (3, H, W) in 0..255, uint8 or float; when training
                ``instances``; in inference optionally ``height``, ``width`` of the output.

        Returns:
            when training a dict of scalar losses; otherwise for each image ``{"instances": ...}`` with
            the fields listed in ``postprocess.py``.
        """
        if not self.training:
            return self.detect(batched_inputs)
        images = self.training_images(batched_inputs)
        targets = self.encode(batched_inputs, images.shape[-2:])
        features = self.backbone(images)
        stacks = self.head([features[name] for name in self.in_features])
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self._visualize_training(batched_inputs[0], targets, stacks[-1])
        return self.criterion(stacks, targets)

    def _normalize(self, images: Tensor) -> Tensor:
        return (images.float() - self.pixel_mean) / self.pixel_std

    def training_images(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """(B, 3, H, W): normalised images at the top left of a common, divisible size.

        The recipe's images have one such size already; zeros stand (before they are normalised, as
        everywhere in the published code) where others end.
        """
        images = [x["image"].to(self.device) for x in batched_inputs]
        unit = self.backbone.size_divisibility
        height, width = (-(-max(x.shape[i] for x in images) // unit) * unit for i in (1, 2))
        if all(x.shape[-2:] == (height, width) for x in images):
            return self._normalize(torch.stack(images))
        batch = torch.zeros((len(images), 3, height, width), device=self.device)
        for canvas, image in zip(batch, images, strict=True):
            canvas[:, : image.shape[1], : image.shape[2]] = image
        return self._normalize(batch)

    def encode(
        self, batched_inputs: list[dict[str, Any]], input_size: tuple[int, int]
    ) -> CenterNetTargets:
        """Targets for network inputs of ``input_size`` (H, W)."""
        stride = self.head.stride
        return encode_targets(
            [self._annotations(x) for x in batched_inputs],
            (input_size[0] // stride, input_size[1] // stride),
            self.num_classes,
            max_objects=self.max_objects,
            min_overlap=self.min_overlap,
            device=self.device,
        )

    def _annotations(self, inputs: dict[str, Any]) -> ObjectAnnotations:
        if "instances" not in inputs:
            raise KeyError(
                "Training needs `instances` for each image: the data mapper did not provide them "
                "(is it built with is_train=True, and has the data set annotations?)."
            )
        instances = inputs["instances"]
        stride = self.head.stride
        boxes = instances.gt_boxes.tensor.float() / stride
        if self.num_joints == 0:
            return ObjectAnnotations(boxes, instances.gt_classes)
        if not instances.has("gt_keypoints"):
            raise ValueError(
                "This CenterNet learns poses and the instances have no keypoints: the data set needs "
                "`keypoints`, and MODEL.KEYPOINT_ON must be True so that the mapper keeps them."
            )
        joints = instances.gt_keypoints.tensor.float().clone()
        if joints.shape[1] != self.num_joints:
            raise ValueError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {self.num_joints}, and the annotations "
                f"have {joints.shape[1]} keypoints."
            )
        joints[..., :2] = (joints[..., :2] - _KEYPOINT_SHIFT) / stride
        return ObjectAnnotations(boxes, instances.gt_classes, joints)

    def _decode(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """Raw maps → the fields of :class:`Detections`, without ``joints`` where there are none."""
        maps = self._probabilities(predictions)
        return tuple(field for field in decode(maps, self.top_k) if field is not None)

    def _probabilities(self, predictions: Predictions) -> Predictions:
        """Raw maps → float32, heat maps as probabilities, mirror images merged."""
        maps = {name: value.float() for name, value in predictions.items()}
        for name in maps:
            if name.endswith("heatmap"):
                maps[name] = maps[name].sigmoid()
        return merge_mirrored(maps, self.flip_pairs) if self.flip_test else maps

    def placement(self, size: tuple[int, int], test_scale: float) -> Placement:
        """How an image of ``size`` (height, width) is shown to the network."""
        return placement(
            (int(size[0]), int(size[1])),
            test_scale,
            stride=self.head.stride,
            divisibility=self.backbone.size_divisibility,
            fixed_size=None if self.keep_resolution else self.input_size,
        )

    def preprocess(
        self, batched_inputs: list[dict[str, Any]], test_scale: float | None = None
    ) -> Tensor:
        """Images that share a canvas → the network's input, (B, 3, H, W) and, if wanted, mirror images.

        Around the images there are zeros, before the normalisation as published.

        Args:
            test_scale: default: the first of the test scales.
        """
        test_scale = self.test_scales[0] if test_scale is None else test_scale
        canvases = []
        for inputs in batched_inputs:
            image = inputs["image"].to(self.device, non_blocking=True)
            canvases.append(self.placement(image.shape[-2:], test_scale).draw(image))
        images = self._normalize(torch.stack(canvases))
        return torch.cat([images, images.flip(3)]) if self.flip_test else images

    @torch.no_grad()
    def detect(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Images of any sizes, at all scales → results; see :meth:`forward`."""
        found: list[list[Detections]] = [[] for _ in batched_inputs]
        for test_scale in self.test_scales:
            for members in self._groups(batched_inputs, test_scale):
                group = [batched_inputs[i] for i in members]
                fields = self.inference_network(self.preprocess(group, test_scale))
                detections = self._to_images(Detections(*fields), group, test_scale)
                for i, own in zip(members, detections, strict=True):
                    found[i].append(own)
        return [self._result(x, own) for x, own in zip(batched_inputs, found, strict=True)]

    @torch.no_grad()
    def inference(
        self, images: Tensor, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Detect on what :meth:`preprocess` made, at the first scale only."""
        fields = self.inference_network(images)
        found = self._to_images(Detections(*fields), batched_inputs, self.test_scales[0])
        return [self._result(x, [own]) for x, own in zip(batched_inputs, found, strict=True)]

    def _groups(self, batched_inputs: list[dict[str, Any]], test_scale: float) -> list[list[int]]:
        """Numbers of the images that have one canvas and so go through the network together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, inputs in enumerate(batched_inputs):
            canvas = self.placement(inputs["image"].shape[-2:], test_scale).canvas
            groups.setdefault(canvas, []).append(i)
        return list(groups.values())

    def _to_images(
        self, found: Detections, batched_inputs: list[dict[str, Any]], test_scale: float
    ) -> list[Detections]:
        """Detections of a batch in cells → of each image in its pixels."""
        points = [found.boxes, found.centers, *([] if found.joints is None else [found.joints])]
        sizes = [x.shape[2] for x in points]
        joined = torch.cat(points, dim=2)
        results = []
        for row, inputs in enumerate(batched_inputs):
            back = self.placement(inputs["image"].shape[-2:], test_scale).back
            boxes, centers, *joints = back.apply(joined[row]).split(sizes, dim=1)
            results.append(
                Detections(
                    boxes,
                    found.scores[row],
                    found.classes[row],
                    centers,
                    joints[0] if joints else None,
                )
            )
        return results

    def _result(self, inputs: dict[str, Any], scales: list[Detections]) -> dict[str, Instances]:
        """What was found on one image, at each scale, in its pixels → the output."""
        found = scales[0]
        if self.soft_nms or len(scales) > 1:
            found = merge_scales(scales, None if self.num_joints else self.max_detections)
        size = inputs["image"].shape[-2:]
        output_size = (inputs.get("height") or size[0], inputs.get("width") or size[1])
        return {"instances": self._instances(found, size, output_size)}

    @torch.no_grad()
    def heatmaps(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """What the network sees where, at the first test scale; see ``d2ext.utils.drawing``.

        Returns:
            for each image ``centers`` and, with poses, ``joints``: (height, width) of the output, in
            0..1, the maximum over classes or joints.
        """
        test_scale = self.test_scales[0]
        results: list[dict[str, Tensor]] = [{} for _ in batched_inputs]
        for members in self._groups(batched_inputs, test_scale):
            group = [batched_inputs[i] for i in members]
            maps = self._probabilities(self.inference_network.network(self.preprocess(group)))
            for row, i in enumerate(members):
                inputs = batched_inputs[i]
                size = tuple(inputs["image"].shape[-2:])
                back = self.placement(size, test_scale).back
                shift = (back.x_shift, back.y_shift)
                for name, source in (("centers", "heatmap"), ("joints", "joint_heatmap")):
                    if source in maps:
                        heat = maps[source][row].amax(dim=0, keepdim=True)
                        heat = maps_on_image(heat, back.scale, shift, size)
                        output_size = (inputs.get("height", size[0]), inputs.get("width", size[1]))
                        if output_size != size:
                            heat = nn.functional.interpolate(heat[None], output_size)[0]
                        results[i][name] = heat[0]
        return results

    def _instances(
        self, found: Detections, size: tuple[int, int], output_size: tuple[int, int]
    ) -> Instances:
        """Detections in pixels of the image of ``size`` → instances in an image of ``output_size``."""
        scale_x, scale_y = output_size[1] / size[1], output_size[0] / size[0]
        boxes, centers, joints = (
            None if x is None else _scale_points(x, scale_x, scale_y)
            for x in (found.boxes, found.centers, found.joints)
        )
        assert boxes is not None
        result = Instances((int(output_size[0]), int(output_size[1])))
        if self.clip_boxes:
            boxes = _clip(boxes, *output_size)
        result.pred_boxes = Boxes(boxes)
        result.scores = found.scores
        result.pred_classes = found.classes
        result.centers = centers
        if joints is not None:
            points = joints.unflatten(1, (-1, 2)) + _KEYPOINT_SHIFT
            result.pred_keypoints = torch.cat([points, torch.ones_like(points[..., :1])], dim=2)
        return result

    @torch.no_grad()
    def _visualize_training(
        self, inputs: dict[str, Any], targets: CenterNetTargets, predictions: Predictions
    ) -> None:
        """Log the heat map of the batch's first image: target beside prediction."""
        image = convert_image_to_rgb(
            inputs["image"].clamp(0, 255).permute(1, 2, 0), self.input_format
        )
        pictures = []
        for heat in (targets.heatmap[0], predictions["heatmap"][0].float().sigmoid()):
            strength = nn.functional.interpolate(
                heat.amax(dim=0)[None, None], scale_factor=self.head.stride, mode="nearest"
            )[0, 0, : image.shape[0], : image.shape[1]].cpu()
            grey = torch.from_numpy(image.astype("float32")) / 255
            red = torch.tensor([1.0, 0.0, 0.0])
            pictures.append(grey * (1 - strength[..., None]) + red * strength[..., None])
        name = "Left: target heat map. Right: prediction"
        get_event_storage().put_image(name, torch.cat(pictures, dim=1).permute(2, 0, 1))


def _scale_points(points: Tensor, scale_x: float, scale_y: float) -> Tensor:
    """Coordinates (N, 2n) x, y, x, y, ... times a factor for each axis."""
    if scale_x == scale_y == 1:
        return points
    pairs = points.unflatten(1, (-1, 2))
    return torch.stack([pairs[..., 0] * scale_x, pairs[..., 1] * scale_y], dim=-1).flatten(1)


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) in the image, corners ordered; NaN becomes 0."""
    x, y = boxes[:, 0::2].nan_to_num(0.0), boxes[:, 1::2].nan_to_num(0.0)
    return torch.stack(
        [
            x.amin(dim=1).clamp(0, width),
            y.amin(dim=1).clamp(0, height),
            x.amax(dim=1).clamp(0, width),
            y.amax(dim=1).clamp(0, height),
        ],
        dim=1,
    )
