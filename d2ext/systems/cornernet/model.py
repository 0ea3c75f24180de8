"""CornerNet (arXiv 1808.01244) and CornerNet-Squeeze (arXiv 1904.08900): boxes as pairs of corners.

An image is centred on a canvas whose sides fit the hourglass (:meth:`CornerNet.canvas`) and goes, in
inference with its mirror image, through backbone and heads (``head.py``). Then come either the losses
(``losses.py``, targets from :mod:`d2ext.codecs.corners`) or, in inference, the pairing of corners
(:mod:`d2ext.codecs.corners`) and soft-NMS (``postprocess.py``).

Letters: B images, C thing classes, P pairs, H×W pixels of the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from torch import Tensor

from d2ext.codecs.canvas import Canvas, centered
from d2ext.codecs.corners import REJECTED, decode_corners, encode_corners
from d2ext.layers.opencv_resample import resize_like_opencv
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.meta_arch import BackboneWithHead, image_size, output_size
from d2ext.modeling.multi_scale import MultiScaleMetaArch
from d2ext.systems.cornernet.head import CornerNetHead
from d2ext.systems.cornernet.losses import CornerNetCriterion
from d2ext.systems.cornernet.postprocess import (
    SuppressionOptions,
    image_slots,
    in_slots,
    rows_of_pairs,
    suppress,
    suppress_slots,
    to_instances,
    without_rejected,
)
from d2ext.systems.cornernet.targets import read_boxes


def canvas_side(side: int, unit: int) -> int:
    """The smallest number >= ``side`` that is one less than a multiple of ``unit`` (published:
    side | 127)."""
    return -(-(side + 1) // unit) * unit - 1


@META_ARCH_REGISTRY.register()
class CornerNet(MultiScaleMetaArch):
    """CornerNet on any hourglass; CornerNet-Squeeze is a config of it."""

    export_refusal = ""
    RENAMED_PARAMETERS = (("network.backbone.", "backbone."), ("network.head.", "head."))

    # What subclasses replace: the key of their settings in cfg.MODEL, their parts and targets, and
    # whether corners at the border are rejected (see decode_corners).
    config_key: ClassVar[str] = "CORNERNET"
    head_class: ClassVar[type[CornerNetHead]] = CornerNetHead
    criterion_class: ClassVar[type[CornerNetCriterion]] = CornerNetCriterion
    encode: ClassVar[Any] = staticmethod(encode_corners)
    reject_border: ClassVar[bool] = False
    # Pixels by which a pair may exceed the scaled image, see image_slots.
    margin: ClassVar[float] = math.inf

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: CornerNetHead,
        criterion: CornerNetCriterion,
        num_classes: int,
        min_overlap: float = 0.3,
        scales: Sequence[float] = (1.0,),
        flip: bool = True,
        top_k: int = 100,
        max_distance: float = 0.5,
        max_pairs: int = 1000,
        suppression: SuppressionOptions | None = None,
        **meta_arch: Any,
    ) -> None:
        """Args:
        backbone: gives ``stack1``, ``stack2``, ... of one stride.
        head: predictions on each of them.
        criterion: the losses.
        num_classes: C.
        min_overlap: see :func:`encode_corners`.
        scales, flip: see :class:`MultiScaleMetaArch`.
        top_k, max_distance, max_pairs: see :func:`decode_corners`.
        suppression: see :func:`suppress`.
        meta_arch: see :class:`MetaArch`.
        """
        super().__init__(scales=scales, flip=flip, **meta_arch)
        if min(top_k, max_pairs) < 1:
            raise ValueError(
                f"TEST.TOP_K and TEST.MAX_PAIRS are at least 1; not {top_k} and {max_pairs}."
            )
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.num_classes = num_classes
        self.min_overlap = min_overlap
        self.top_k = top_k
        self.max_distance = max_distance
        self.max_pairs = max_pairs
        self.suppression = suppression or SuppressionOptions()
        self.stride = backbone.output_shape()["stack1"].stride
        self.set_network(BackboneWithHead(backbone, head, head.in_features), self._decode)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL[cls.config_key]
        loss, test = node.LOSS, node.TEST
        backbone = build_backbone(cfg)
        if "stack1" not in backbone.output_shape():
            raise ValueError(
                "Detectors of corners need a stacked hourglass: set MODEL.BACKBONE.NAME to "
                f'"build_cornernet_hourglass_backbone", not "{cfg.MODEL.BACKBONE.NAME}".'
            )
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "head": cls.head_class(
                backbone.output_shape(),
                num_classes=node.NUM_CLASSES,
                pool_channels=node.POOL_CHANNELS,
                hidden=node.HEAD_CHANNELS,
                kernel=node.HEAD_KERNEL,
                norm=node.NORM,
            ),
            "criterion": cls.criterion_class(
                heat_weight=loss.HEAT_WEIGHT,
                pull_weight=loss.PULL_WEIGHT,
                push_weight=loss.PUSH_WEIGHT,
                offset_weight=loss.OFFSET_WEIGHT,
            ),
            "num_classes": node.NUM_CLASSES,
            "min_overlap": loss.MIN_OVERLAP,
            "scales": test.SCALES,
            "flip": test.FLIP,
            "top_k": test.TOP_K,
            "max_distance": test.MAX_DISTANCE,
            "max_pairs": test.MAX_PAIRS,
            "suppression": SuppressionOptions(
                sigma=test.NMS_SIGMA,
                score_threshold=test.SCORE_THRESH,
                merge=test.NMS_MERGE,
                merge_exponent=test.NMS_MERGE_EXPONENT,
                keep_stale=test.KEEP_STALE,
                max_detections=test.MAX_DETECTIONS,
            ),
        }

    def canvas(self, size: tuple[int, int], scale: float) -> Canvas:
        """As published: the canvas' sides are the next ones that are a multiple (of 128, for the
        published hourglasses) less one, and the centre pixels coincide."""
        height, width = (max(1, int(side * scale)) for side in size)
        unit = self.backbone.size_divisibility
        canvas = canvas_side(height, unit), canvas_side(width, unit)
        return centered((height, width), canvas, scale)

    def draw(self, images: Tensor, canvas: Canvas) -> Tensor:
        """See the base class. Published quirk: where an image's side equals the canvas' (so that it is
        odd), its last row or column stays zero."""
        # The published code resizes bytes.
        if images.shape[-2:] != canvas.content:
            images = resize_like_opencv(images, *canvas.content)
        rows, columns = (
            inner // 2 + outer // 2
            for inner, outer in zip(canvas.content, canvas.size, strict=True)
        )
        return canvas.draw(images[..., :rows, :columns])

    def training_batch(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, Any]:
        """Normalised images (B, 3, H, W), centred on a common canvas, and their targets."""
        unit = self.backbone.size_divisibility
        height, width = (
            canvas_side(max(sides), unit)
            for sides in zip(*(image_size(x) for x in batched_inputs), strict=True)
        )
        canvases = [
            centered(image_size(x), (height, width)).draw(self.upload(x).float())
            for x in batched_inputs
        ]
        images = self.normalize(torch.stack(canvases))
        return images, self.encode_targets(batched_inputs, images)

    def encode_targets(self, batched_inputs: list[dict[str, Any]], images: Tensor) -> Any:
        """See :func:`encode_corners`. Crowds are not trained on, unless ``INPUT.PUBLISHED_CROWDS``."""
        height, width = images.shape[-2:]
        boxes, classes = read_boxes(batched_inputs, (height, width), self.device)
        return self.encode(
            boxes,
            classes,
            num_classes=self.num_classes,
            input_size=(height, width),
            output_size=(-(-height // self.stride), -(-width // self.stride)),
            min_overlap=self.min_overlap,
        )

    def losses(self, predictions: list[Any], targets: Any) -> dict[str, Tensor]:
        """See :class:`CornerNetCriterion`; ``predictions`` of every stack."""
        return self.criterion(predictions, targets)

    def _decode(self, predictions: Any) -> tuple[Tensor, ...]:
        """Raw predictions → rows (B, P, COLUMNS) of pairs, in cells."""
        pairs = decode_corners(
            *predictions[:2],
            k=self.top_k,
            max_distance=self.max_distance,
            max_pairs=self.max_pairs,
            reject_border=self.reject_border,
        )
        return (rows_of_pairs(pairs),)

    def export_form(self) -> ExportForm:
        views = 2 if self.flip else 1
        names = ("boxes", "scores", "corner_scores", "classes", "distances")

        def pack(decoded: tuple[Tensor, ...]) -> Outputs:
            rows, *centers = (x.unflatten(0, (views, -1)).transpose(0, 1) for x in decoded)
            outputs = dict(zip(names, rows.split([4, 1, 2, 1, 1], dim=-1), strict=True))
            for name in ("scores", "classes", "distances"):
                outputs[name] = outputs[name].squeeze(-1)
            outputs["classes"] = outputs["classes"].long()
            outputs["count"] = (outputs["scores"] > REJECTED).sum(dim=-1)
            return outputs | ({"centers": centers[0]} if centers else {})

        def unpack(outputs: Outputs) -> tuple[Tensor, ...]:
            columns = [outputs[name] for name in names]
            columns = [x if x.dim() == 4 else x[..., None].float() for x in columns]
            parts = [torch.cat(columns, dim=-1)]
            parts += [outputs["centers"]] if "centers" in outputs else []
            return tuple(x.transpose(0, 1).flatten(0, 1) for x in parts)

        unit = self.backbone.size_divisibility
        return ExportForm(
            pack=pack,
            unpack=unpack,
            size=(canvas_side(511, unit), canvas_side(511, unit)),
            multiple=unit,
            less=1,
            mirror=self.flip,
            results="cornernet",
            options={
                "stride": self.stride,
                **({"margin": self.margin} if math.isfinite(self.margin) else {}),
                **self.suppression._asdict(),
            },
        )

    def detections(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]], scale: float
    ) -> list[tuple[Tensor, ...]]:
        """Results of :meth:`_decode` for B images and B mirror images → for each image :meth:`_rows`,
        see :func:`in_slots`; on the CPU without rejected pairs."""
        on_device = in_slots(predictions[0], self.suppression)
        parts = predictions if on_device else tuple(x.cpu() for x in predictions)
        passes = []
        for i, x in enumerate(batched_inputs):
            canvas = self.canvas(image_size(x), scale)
            rows, *others = self._rows(canvas, *(part[i :: len(batched_inputs)] for part in parts))
            passes.append((rows if on_device else without_rejected(rows), *others))
        return passes

    def _rows(self, canvas: Canvas, *decoded: Tensor) -> tuple[Tensor, ...]:
        """One image's part of :meth:`_decode`'s result → rows (N, COLUMNS) in pixels of the image, with
        rejected pairs."""
        return (image_slots(decoded[0], canvas, self.stride, self.margin),)

    def results(
        self, batched_inputs: list[dict[str, Any]], passes: list[list[tuple[Tensor, ...]]]
    ) -> list[dict[str, Any]]:
        """See the base class; rows that are on the device together, with one wait for it."""
        if not in_slots(passes[0][0][0], self.suppression):
            return super().results(batched_inputs, passes)
        rows, counts = suppress_slots([self._candidates(x) for x in passes], self.suppression)
        instances = [
            self._instances(own, image_size(x), output_size(x))
            for own, x in zip(rows, batched_inputs, strict=True)
        ]
        each = zip(instances, counts.tolist(), strict=True)
        return [{"instances": own[:count]} for own, count in each]

    def result(
        self, inputs: dict[str, Any], passes: list[tuple[Tensor, ...]]
    ) -> dict[str, Instances]:
        """The rows of all passes → ``instances`` with the fields listed in ``postprocess.py``."""
        rows = suppress(self._candidates(passes), self.suppression).to(self.device)
        return {"instances": self._instances(rows, image_size(inputs), output_size(inputs))}

    def _candidates(self, passes: list[tuple[Tensor, ...]]) -> Tensor:
        """Input of soft-NMS: the rows of all passes."""
        return torch.cat([rows for rows, *_ in passes])

    def _instances(
        self, rows: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
    ) -> Instances:
        """Rows of one image → its instances at the size of the output."""
        return to_instances(rows, image_size, output_size)

    def shown_maps(self, inputs: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        predictions = self.network(self.preprocess([inputs])[:1])
        to_image = self.canvas(image_size(inputs), self.scales[0]).affine(self.stride)
        names = ("top_left", "bottom_right", "centers")
        return [
            (name, maps.heat[0].float().sigmoid(), to_image)
            for name, maps in zip(names, predictions, strict=False)
        ]

    def draw_training(
        self,
        batched_inputs: list[dict[str, Any]],
        images: Tensor,
        targets: Any,
        predictions: list[Any],
    ) -> tuple[str, Tensor]:
        """The first image's annotations beside the last stack's best detections."""
        inputs, size = batched_inputs[0], image_size(batched_inputs[0])
        canvas = centered(size, (images.shape[-2], images.shape[-1]))
        decoded = (x[:1].float().cpu() for x in self._decode(predictions[-1]))
        rows = suppress(self._candidates([self._rows(canvas, *decoded)]), self.suppression)
        return self.draw_pair(inputs, self._instances(rows[:20], size, size))
