"""CornerNet (arXiv 1808.01244) and CornerNet-Squeeze (arXiv 1904.08900): boxes as pairs of corners.

An image is centred on a canvas whose sides fit the hourglass (:meth:`CornerNet.preprocess`), with its
mirror image, and goes through backbone and heads (``head.py``). Then come either the losses
(``losses.py``, targets from :mod:`d2ext.codecs.corners`) or, in inference, the pairing of corners
(:mod:`d2ext.codecs.corners`) and soft-NMS (``postprocess.py``).

Letters: B images, C thing classes, P pairs, H×W pixels of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.corners import PointMaps, decode_corners, encode_corners
from d2ext.codecs.heatmaps import maps_on_image
from d2ext.modeling.inference import InferenceNetwork
from d2ext.systems.cornernet.head import CornerNetHead, CornerNetwork
from d2ext.systems.cornernet.losses import CornerNetCriterion
from d2ext.systems.cornernet.postprocess import (
    SuppressionOptions,
    View,
    image_rows,
    rows_of_pairs,
    suppress,
    to_instances,
)


def canvas_side(side: int, unit: int) -> int:
    """The smallest multiple of ``unit`` less one that is not below ``side`` (published: side | 127)."""
    return -(-(side + 1) // unit) * unit - 1


def _image_size(inputs: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the model's image."""
    height, width = inputs["image"].shape[-2:]
    return height, width


def _first_of(predictions: Any) -> Any:
    """The first image's part of predictions, nested tuples of tensors."""
    if isinstance(predictions, Tensor):
        return predictions[:1]
    if isinstance(predictions, tuple):
        parts = [_first_of(part) for part in predictions]
        return type(predictions)(*parts) if hasattr(predictions, "_fields") else tuple(parts)
    return predictions


@META_ARCH_REGISTRY.register()
class CornerNet(nn.Module):
    """CornerNet on any hourglass; CornerNet-Squeeze is a config of it."""

    # See encode_corners.
    radius_variant = "cornernet"
    center_divisor: float | None = None

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: CornerNetHead,
        criterion: CornerNetCriterion,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        min_overlap: float = 0.3,
        scales: Sequence[float] = (1.0,),
        flip: bool = True,
        top_k: int = 100,
        peak_kernel: int = 3,
        max_distance: float = 0.5,
        max_pairs: int = 1000,
        suppression: SuppressionOptions | None = None,
        inference_mode: str = "eager",
        inference_dtype: str = "float32",
        channels_last: bool = False,
        vis_period: int = 0,
    ) -> None:
        """Args:
        backbone: gives ``stack1``, ``stack2``, ... of one stride.
        head: predictions on each of them.
        criterion: the losses.
        num_classes: C.
        pixel_mean, pixel_std: per channel of ``input_format``, in 0..255.
        input_format: channel order of the images, for pictures only.
        min_overlap: see :func:`encode_corners`.
        scales: of the image in inference, one pass each.
        flip: also pass the mirror image.
        top_k, peak_kernel, max_distance, max_pairs: see :func:`decode_corners`.
        suppression: see :func:`suppress`.
        inference_mode, inference_dtype, channels_last: see :class:`InferenceNetwork`.
        vis_period: iterations between pictures of the training in TensorBoard; 0 for none.
        """
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ValueError(f"TEST.SCALES holds positive factors, at least one; not {scales}.")
        if min(top_k, max_pairs) < 1 or peak_kernel % 2 == 0:
            raise ValueError(
                "TEST.TOP_K and TEST.MAX_PAIRS are at least 1 and TEST.PEAK_KERNEL is odd; not "
                f"{top_k}, {max_pairs} and {peak_kernel}."
            )
        suppression = suppression or SuppressionOptions()
        if suppression.method not in ("gaussian", "linear", "hard"):
            raise ValueError(
                f'TEST.NMS is "gaussian", "linear" or "hard", not "{suppression.method}".'
            )
        self.network = self._network(backbone, head)
        self.criterion = criterion
        self.num_classes = num_classes
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.min_overlap = min_overlap
        self.scales = [float(scale) for scale in scales]
        self.flip = flip
        self.top_k = top_k
        self.peak_kernel = peak_kernel
        self.max_distance = max_distance
        self.max_pairs = max_pairs
        self.suppression = suppression
        self.vis_period = vis_period
        self.stride = backbone.output_shape()["stack1"].stride
        # In a tuple, so that the copy of the weights which it keeps is no submodule.
        self._inference = (
            InferenceNetwork(
                self.network,
                self._decode,
                mode=inference_mode,
                dtype=inference_dtype,
                channels_last=channels_last,
            ),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return cls._arguments(cfg, cfg.MODEL.CORNERNET, CornerNetHead, CornerNetCriterion)

    @classmethod
    def _arguments(
        cls,
        cfg: CfgNode,
        node: CfgNode,
        head: type[CornerNetHead],
        criterion: type[CornerNetCriterion],
    ) -> dict[str, Any]:
        """Constructor arguments from ``cfg`` and the system's own node of it."""
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if "stack1" not in shapes:
            raise ValueError(
                "Detectors of corners need a stacked hourglass: set MODEL.BACKBONE.NAME to "
                f'"build_cornernet_hourglass_backbone", not "{cfg.MODEL.BACKBONE.NAME}".'
            )
        stacks = [name for name in shapes if name.removeprefix("stack").isdigit()]
        test = node.TEST
        return {
            "backbone": backbone,
            "head": head(
                channels=shapes["stack1"].channels,
                num_stacks=len(stacks),
                num_classes=node.NUM_CLASSES,
                pool_channels=node.POOL_CHANNELS,
                hidden=node.HEAD_CHANNELS,
                kernel=node.HEAD_KERNEL,
                norm=node.NORM,
                **cls._head_arguments(backbone),
            ),
            "criterion": criterion(
                heat_weight=node.LOSS.HEAT_WEIGHT,
                pull_weight=node.LOSS.PULL_WEIGHT,
                push_weight=node.LOSS.PUSH_WEIGHT,
                offset_weight=node.LOSS.OFFSET_WEIGHT,
            ),
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "min_overlap": node.LOSS.MIN_OVERLAP,
            "scales": test.SCALES,
            "flip": test.FLIP,
            "top_k": test.TOP_K,
            "peak_kernel": test.PEAK_KERNEL,
            "max_distance": test.MAX_DISTANCE,
            "max_pairs": test.MAX_PAIRS,
            "suppression": SuppressionOptions(
                method=test.NMS,
                sigma=test.NMS_SIGMA,
                iou_threshold=test.NMS_THRESH,
                score_threshold=test.SCORE_THRESH,
                merge=test.NMS_MERGE,
                merge_exponent=test.NMS_MERGE_EXPONENT,
                keep_stale=test.KEEP_STALE,
                max_detections=test.MAX_DETECTIONS,
            ),
            "inference_mode": cfg.MODEL.INFERENCE.MODE,
            "inference_dtype": cfg.MODEL.INFERENCE.DTYPE,
            "channels_last": cfg.MODEL.INFERENCE.CHANNELS_LAST,
            "vis_period": cfg.VIS_PERIOD,
        }

    @classmethod
    def _head_arguments(cls, backbone: Backbone) -> dict[str, Any]:
        """What the head needs to know of the backbone, beside its output."""
        return {}

    def _network(self, backbone: Backbone, head: CornerNetHead) -> CornerNetwork:
        return CornerNetwork(backbone, head)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def backbone(self) -> Backbone:
        return self.network.backbone

    @property
    def head(self) -> CornerNetHead:
        return self.network.head

    @property
    def inference_network(self) -> InferenceNetwork:
        """Network and pairing as :meth:`inference` runs them; benchmarks time it."""
        return self._inference[0]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Detectron2's contract.

        Args:
            batched_inputs: for each image a dict with ``image`` (3, H, W) in 0..255, any size;
                ``height``, ``width`` of the wanted output (default: of the image); in training
                ``instances`` with ``gt_boxes`` and ``gt_classes``. Crowds are not trained on.

        Returns:
            In training the losses. Otherwise a list of ``{"instances": Instances}``; its fields are
            listed in ``postprocess.py``.

        Raises:
            KeyError: training inputs without ``instances``.
        """
        if not self.training:
            return self.detect(batched_inputs)
        images, targets = self.training_batch(batched_inputs)
        stacks = self.network.predictions(images, all_stacks=True)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self._visualize_training(batched_inputs[0], images[:1], stacks[-1])
        return self.criterion(stacks, targets)

    # ------------------------------------------------------------------ training

    def training_batch(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, Any]:
        """Normalised images (B, 3, H, W), centred on a common canvas, and their targets."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        unit = self.backbone.size_divisibility
        canvas = tuple(
            canvas_side(max(image.shape[axis] for image in images), unit) for axis in (1, 2)
        )
        batch = torch.zeros((len(images), 3, *canvas), device=self.device)
        boxes, classes = [], []
        for i, (image, inputs) in enumerate(zip(images, batched_inputs, strict=True)):
            height, width = image.shape[-2:]
            top, left = canvas[0] // 2 - height // 2, canvas[1] // 2 - width // 2
            batch[i, :, top : top + height, left : left + width] = image
            instances = self._instances(inputs)
            # As published, cut at the last pixel's index; what lies outside loses its area.
            own = instances.gt_boxes.tensor.to(self.device, non_blocking=True)
            xs = own[:, 0::2].clamp(0, width - 1) + left
            ys = own[:, 1::2].clamp(0, height - 1) + top
            boxes.append(torch.stack([xs[:, 0], ys[:, 0], xs[:, 1], ys[:, 1]], dim=1))
            classes.append(instances.gt_classes.to(self.device, non_blocking=True))
        return self._normalize(batch), self._targets(boxes, classes, canvas, batched_inputs)

    def _instances(self, inputs: dict[str, Any]) -> Instances:
        if "instances" not in inputs:
            raise KeyError(
                "Training needs `instances` for each image: the data mapper did not provide them "
                "(is it built with is_train=True, and has the data set annotations?)."
            )
        return inputs["instances"]

    def _targets(
        self,
        boxes: list[Tensor],
        classes: list[Tensor],
        canvas: tuple[int, ...],
        batched_inputs: list[dict[str, Any]],
    ) -> Any:
        """boxes (n, 4) in pixels of the canvas, for each image → what the criterion takes."""
        height, width = canvas
        return encode_corners(
            boxes,
            classes,
            num_classes=self.num_classes,
            input_size=(height, width),
            output_size=(-(-height // self.stride), -(-width // self.stride)),
            min_overlap=self.min_overlap,
            radius_variant=self.radius_variant,
            center_divisor=self.center_divisor,
        )

    def _normalize(self, images: Tensor) -> Tensor:
        return (images - self.pixel_mean) / self.pixel_std

    # ------------------------------------------------------------------ inference

    def view(self, size: tuple[int, int], scale: float) -> View:
        """How an image of ``size`` (height, width) lies on the canvas.

        As published: the scaled image's sides grow to the next multiple (of 128, for the published
        hourglasses) less one, and its centre pixel comes to the canvas' centre pixel.
        """
        height, width = (max(1, int(side * scale)) for side in size)
        unit = self.backbone.size_divisibility
        canvas = canvas_side(height, unit), canvas_side(width, unit)
        top, left = canvas[0] // 2 - height // 2, canvas[1] // 2 - width // 2
        return View(scale, (height, width), canvas, top, left)

    def preprocess(
        self, batched_inputs: list[dict[str, Any]], scale: float | None = None
    ) -> Tensor:
        """Images of one size → the network's input, (B, 3, H, W) and, if wanted, B mirror images.

        Around the images there are zeros, before the normalisation. Published quirk: where an image
        is as large as the canvas, and its side odd therefore, its last row or column stays zero.

        Args:
            scale: one of the test scales; default: the first of them.
        """
        scale = self.scales[0] if scale is None else scale
        view = self.view(_image_size(batched_inputs[0]), scale)
        height, width = view.size
        rows = min(height, height // 2 + view.canvas[0] // 2)
        columns = min(width, width // 2 + view.canvas[1] // 2)
        images = torch.zeros((len(batched_inputs), 3, *view.canvas), device=self.device)
        for i, inputs in enumerate(batched_inputs):
            image = inputs["image"].to(self.device, non_blocking=True)
            if image.shape[-2:] != view.size:
                image = F.interpolate(
                    image[None].float(), view.size, mode="bilinear", align_corners=False
                )[0].round()  # the published code resizes bytes
            place = images[i, :, view.top :, view.left :]
            place[:, :rows, :columns] = image[:, :rows, :columns]
        images = self._normalize(images)
        return torch.cat([images, images.flip(-1)]) if self.flip else images

    def _decode(self, predictions: tuple[PointMaps, ...]) -> tuple[Tensor, ...]:
        """Raw predictions → rows (B, P, COLUMNS) of pairs, in cells."""
        pairs = decode_corners(
            *predictions[:2],
            k=self.top_k,
            kernel=self.peak_kernel,
            max_distance=self.max_distance,
            max_pairs=self.max_pairs,
        )
        return (rows_of_pairs(pairs),)

    @torch.no_grad()
    def detect(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Images of any sizes, at all scales → results; see :meth:`forward`."""
        results: list[dict[str, Instances]] = [{}] * len(batched_inputs)
        sizes = [_image_size(inputs) for inputs in batched_inputs]
        for size in dict.fromkeys(sizes):
            chosen = [i for i, other in enumerate(sizes) if other == size]
            group = [batched_inputs[i] for i in chosen]
            passes = [
                self.inference_network(self.preprocess(group, scale)) for scale in self.scales
            ]
            for i, result in zip(chosen, self._finish(group, passes), strict=True):
                results[i] = result
        return results

    @torch.no_grad()
    def inference(
        self, images: Tensor, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Detect on what :meth:`preprocess` made, at the first scale only."""
        return self._finish(batched_inputs, [self.inference_network(images)])

    def _finish(
        self, batched_inputs: list[dict[str, Any]], passes: list[tuple[Tensor, ...]]
    ) -> list[dict[str, Instances]]:
        """What the passes found on images of one size → results.

        Args:
            passes: at each scale what :meth:`_decode` gives for B images and B mirror images.
        """
        image_size = _image_size(batched_inputs[0])
        on_host = [[x.cpu() for x in found] for found in passes]
        views = [
            self.view(image_size, scale) for scale, _ in zip(self.scales, passes, strict=False)
        ]
        results = []
        for i, inputs in enumerate(batched_inputs):
            own = [tuple(x[i :: len(batched_inputs)] for x in found) for found in on_host]
            rows = suppress(self._candidates(list(zip(own, views, strict=True))), self.suppression)
            height, width = inputs.get("height"), inputs.get("width")
            output_size = (height or image_size[0], width or image_size[1])
            found = self._to_instances(rows.to(self.device), image_size, output_size)
            results.append({"instances": found})
        return results

    def _candidates(self, passes: list[tuple[tuple[Tensor, ...], View]]) -> Tensor:
        """What the passes of one image found → rows (N, COLUMNS) in pixels of the image."""
        return torch.cat([image_rows(found[0], view, self.stride) for found, view in passes])

    def _to_instances(
        self, rows: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
    ) -> Instances:
        """Detections of one image → its instances at the size of the output."""
        return to_instances(rows, image_size, output_size)

    @torch.no_grad()
    def heatmaps(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """What the network sees where, at the first test scale; see :mod:`d2ext.utils.heatmaps`.

        Returns:
            for each image maps by name (``top_left``, ``bottom_right``, ...), (height, width) of the
            output, in 0..1, the maximum over classes.
        """
        results = []
        for inputs in batched_inputs:
            size = _image_size(inputs)
            height, width = inputs.get("height") or size[0], inputs.get("width") or size[1]
            shown: dict[str, Tensor] = {}
            for name, heat, scale, shift in self._shown_maps(inputs):
                heat = heat.float().sigmoid().amax(dim=1)
                heat = maps_on_image(heat, scale, shift, size)
                if (height, width) != size:
                    heat = F.interpolate(heat[None], (height, width))[0]
                shown[name] = torch.maximum(shown.get(name, heat[0]), heat[0])
            results.append(shown)
        return results

    def _shown_maps(
        self, inputs: dict[str, Any]
    ) -> list[tuple[str, Tensor, float, tuple[float, float]]]:
        """Name, logits (1, C, h, w), pixels of the image per cell, and the map's corner (x, y) there."""
        view = self.view(_image_size(inputs), self.scales[0])
        predictions = self.network(self.preprocess([inputs])[:1])
        cell = view.canvas[0] / -(-view.canvas[0] // self.stride) / view.scale
        shift = -view.left / view.scale, -view.top / view.scale
        return [
            (name, maps.heat, cell, shift)
            for name, maps in zip(
                ("top_left", "bottom_right", "centers"), predictions, strict=False
            )
        ]

    @torch.no_grad()
    def _visualize_training(
        self, inputs: dict[str, Any], image: Tensor, predictions: tuple[PointMaps, ...]
    ) -> None:
        """Log ground truth beside the best detections of the batch's first image."""
        from detectron2.utils.visualizer import Visualizer  # pulls in matplotlib

        height, width = _image_size(inputs)
        rows, columns = image.shape[-2:]
        place = rows // 2 - height // 2, columns // 2 - width // 2
        view = View(1.0, (height, width), (rows, columns), *place)
        found = tuple(x.float().cpu() for x in self._decode(_first_of(predictions)))
        best = suppress(self._candidates([(found, view)]), self.suppression)[:20]
        detected = self._to_instances(best, (height, width), (height, width))
        picture = convert_image_to_rgb(
            inputs["image"].permute(1, 2, 0).clamp(0, 255), self.input_format
        )
        both = [
            Visualizer(picture).overlay_instances(boxes=boxes.to("cpu")).get_image()
            for boxes in (inputs["instances"].gt_boxes, detected.pred_boxes)
        ]
        joined = torch.cat([torch.from_numpy(x.copy()) for x in both], dim=1)
        get_event_storage().put_image(
            "Left: ground truth. Right: detections", joined.permute(2, 0, 1).float() / 255
        )
