"""CornerNet-Saccade (arXiv 1904.08900, section 3): look at the whole image small, then at places.

The whole image is looked at in two small sizes. Attention maps (``saccade_head.py``) and confident boxes
say where objects are and how large; :func:`suppress_locations` chooses among these places, crops
around them are looked at in turn, and soft-NMS joins all boxes.

Letters: B views, P pairs, N rows, M locations of an image, S side of the network's input in pixels.
A *location* is y, x (pixels of the image), the scale at which to look, and a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.corners import decode_corners
from d2ext.codecs.heatmaps import local_peaks
from d2ext.modeling.cornernet_hourglass import CornerNetHourglass
from d2ext.systems.cornernet.model import CornerNet, _image_size
from d2ext.systems.cornernet.postprocess import rows_of_pairs, suppress, to_instances
from d2ext.systems.cornernet.saccade_head import (
    SaccadeCriterion,
    SaccadeHead,
    SaccadeNetwork,
    SaccadePredictions,
    SaccadeTargets,
    encode_saccade,
)

# Longer sides in pixels of large, medium and small boxes (more than), and the side at which the box is
# looked at again (published code).
_BOX_SIDES = ((96.0, 192.0), (32.0, 64.0), (0.0, 24.0))
# Attention at views larger than twice the image, and views larger than four times, lead nowhere
# (published code).
_MAX_SCALE, _MAX_NEXT_SCALE = 2.0, 4.0
# Locations closer than this many pixels of the view, and of scales within a fifth, are one.
_LOCATION_DISTANCE, _SCALE_RATIO = 16.0, 0.2
# Views that go through the network at once.
_BATCH = 32


class SaccadeOptions(NamedTuple):
    """Of the search; see ``MODEL.CORNERNET.SACCADE``."""

    input_size: int = 255
    first_sizes: tuple[float, ...] = (192, 255)
    attention_threshold: float = 0.3
    attention_scales: tuple[float, ...] = (1, 2, 4)
    attention_ranges: tuple[tuple[float, float], ...] = ((96, 256), (32, 96), (0, 32))
    first_score: float = 0.3
    confident_score: float = 0.5
    max_crops: int = 30
    min_side: int = 16
    min_share: float = 0.5
    clip_boxes: bool = False


class Crop(NamedTuple):
    """How a window of the image lies in the network's input."""

    source: tuple[slice, slice]
    """Rows and columns of the image."""
    target: tuple[slice, slice]
    """Rows and columns of the input."""
    offset: tuple[float, float]
    """y, x of the window's corner in the image."""


def crop_around(y: int, x: int, side: int, size: int, height: int, width: int) -> Crop:
    """The window of ``side`` pixels around a pixel of the image, which fills an input of ``size``."""
    half, middle = side // 2, size // 2
    factor = size / side

    def axis(center: int, limit: int) -> tuple[slice, slice]:
        low, high = max(0, center - half), min(center + half, limit)
        before, after = int((center - low) * factor), int((high - center) * factor)
        return slice(low, high), slice(middle - before, middle + after)

    rows, columns = axis(y, height), axis(x, width)
    return Crop((rows[0], columns[0]), (rows[1], columns[1]), (float(y - half), float(x - half)))


def box_locations(rows: np.ndarray, min_score: float) -> np.ndarray:
    """Confident boxes → locations (M, 4) with score 1: their centres, scaled to a good size.

    Args:
        rows: (N, 5 or more) x1, y1, x2, y2, score.
    """
    rows = rows[rows[:, 4] > min_score]
    longer = np.maximum(rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1])
    longer = np.maximum(longer, 1e-3)
    wanted = np.select(
        [longer > limit for limit, _ in _BOX_SIDES], [side for _, side in _BOX_SIDES]
    )
    centers = (rows[:, 1] + rows[:, 3]) / 2, (rows[:, 0] + rows[:, 2]) / 2
    return np.stack([*centers, wanted / longer, np.ones(len(rows))], axis=1)


def attention_locations(
    attention: Sequence[np.ndarray],
    scales: Sequence[float],
    offsets: Sequence[tuple[float, float]],
    strides: Sequence[int],
    factors: Sequence[float],
    threshold: float,
    size: tuple[int, int],
) -> np.ndarray:
    """Peaks of attention maps → locations (M, 4) inside the image.

    Args:
        attention: for each level (B, h, w) probabilities, 0 beside peaks.
        scales, offsets: of the B views.
        strides: pixels of the view per cell, for each level.
        factors: how much closer to look, for each level.
        size: (height, width) of the image.
    """
    found = [np.zeros((0, 4))]
    for view, (scale, offset) in enumerate(zip(scales, offsets, strict=True)):
        for level, stride, factor in zip(attention, strides, factors, strict=True):
            if scale > _MAX_SCALE or factor * scale > _MAX_NEXT_SCALE:
                continue
            rows, columns = np.where(level[view] > threshold)
            ys, xs = rows * stride / scale + offset[0], columns * stride / scale + offset[1]
            inside = (ys >= 0) & (ys < size[0]) & (xs >= 0) & (xs < size[1])
            scores = level[view, rows, columns]
            place = np.stack([ys, xs, np.full(len(ys), factor * scale), scores], axis=1)
            found.append(place[inside])
    return np.concatenate(found)


def suppress_locations(locations: np.ndarray) -> np.ndarray:
    """Best first, drop locations near a better one and of about its scale.

    Published quirk: near in one axis is near.
    """
    # As published, without a stable sort: equal scores come in NumPy's order, reversed.
    locations = locations[np.argsort(locations[:, 3])[::-1]]
    kept = []
    while len(locations):
        best = locations[0]
        kept.append(best)
        distance = np.abs(locations[:, :2] - best[:2]).min(axis=1)
        ratio = best[2] / locations[:, 2]
        far = distance > _LOCATION_DISTANCE / best[2]
        other = (ratio > 1 + _SCALE_RATIO) | (ratio < 1 - _SCALE_RATIO)
        stays = far | other
        stays[0] = False
        locations = locations[stays]
    return np.stack(kept) if kept else np.zeros((0, 4))


@META_ARCH_REGISTRY.register()
class CornerNetSaccade(CornerNet):
    """CornerNet-Saccade on any hourglass that gives its levels."""

    @configurable
    def __init__(self, *, options: SaccadeOptions | None = None, **corner_net: Any) -> None:
        """Args:
        options: of the search.
        corner_net: see :class:`CornerNet`; ``backbone`` with ``out_levels``, ``head`` with attention.
        """
        super().__init__(**corner_net)
        self.options = options or SaccadeOptions()
        levels = len(self.network.level_names[0])
        sizes = {len(self.options.attention_scales), len(self.options.attention_ranges)}
        if sizes != {levels}:
            raise ValueError(
                f"The hourglass has {levels} levels: MODEL.CORNERNET.SACCADE.ATTENTION_SCALES and "
                f"ATTENTION_RANGES need as many entries, not {sorted(sizes)}."
            )
        unit, size = self.backbone.size_divisibility, self.options.input_size
        if (size + 1) % unit:
            raise ValueError(
                f"MODEL.CORNERNET.SACCADE.INPUT_SIZE is a multiple of {unit} less one, not {size}."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.CORNERNET
        c = node.SACCADE
        arguments = cls._arguments(cfg, node, SaccadeHead, SaccadeCriterion)
        options = SaccadeOptions(
            input_size=c.INPUT_SIZE,
            first_sizes=tuple(c.FIRST_SIZES),
            attention_threshold=c.ATTENTION_THRESH,
            attention_scales=tuple(c.ATTENTION_SCALES),
            attention_ranges=tuple((low, high) for low, high in c.ATTENTION_RANGES),
            first_score=c.FIRST_SCORE,
            confident_score=c.CONFIDENT_SCORE,
            max_crops=c.MAX_CROPS,
            min_side=c.MIN_SIDE,
            min_share=c.MIN_SHARE,
            clip_boxes=c.CLIP_BOXES,
        )
        return {**arguments, "options": options}

    @classmethod
    def _head_arguments(cls, backbone: CornerNetHourglass) -> dict[str, Any]:
        shapes = backbone.output_shape()
        levels = [name for name in shapes if name.startswith("stack1_s")]
        if not levels:
            raise ValueError("CornerNetSaccade needs MODEL.CORNERNET_HOURGLASS.OUT_LEVELS True.")
        return {"level_channels": [shapes[name].channels for name in levels]}

    def _network(self, backbone: CornerNetHourglass, head: SaccadeHead) -> SaccadeNetwork:
        return SaccadeNetwork(backbone, head)

    def _targets(
        self, boxes: list[Tensor], classes: list[Tensor], canvas: tuple[int, ...], inputs: list[Any]
    ) -> SaccadeTargets:
        shares = []
        for x, own in zip(inputs, boxes, strict=True):
            instances = x["instances"]
            visible = instances.has("gt_visible_shares")
            shares.append(
                instances.gt_visible_shares.to(self.device) if visible else own.new_ones(len(own))
            )
        height, width = canvas
        return encode_saccade(
            boxes,
            classes,
            shares,
            num_classes=self.num_classes,
            input_size=(height, width),
            output_size=(-(-height // self.stride), -(-width // self.stride)),
            attention_ranges=self.options.attention_ranges,
            min_overlap=self.min_overlap,
            min_side=self.options.min_side,
            min_share=self.options.min_share,
        )

    # ------------------------------------------------------------------ inference

    def _decode(self, predictions: Any) -> tuple[Tensor, ...]:
        """Raw predictions → rows (B, P, COLUMNS) in cells, and L attention maps (B, h, w)."""
        assert isinstance(predictions, SaccadePredictions)
        pairs = decode_corners(
            *predictions[:2],
            k=self.top_k,
            kernel=self.peak_kernel,
            max_distance=self.max_distance,
            max_pairs=self.max_pairs,
            reject_border=True,
        )
        peaks = [local_peaks(x.float().sigmoid())[:, 0] for x in predictions.attention]
        return (rows_of_pairs(pairs), *peaks)

    def preprocess(
        self, batched_inputs: list[dict[str, Any]], scale: float | None = None
    ) -> Tensor:
        """The first views of one image, (B, 3, S, S)."""
        image = self._image(batched_inputs[0])
        return self._cut(image, self._first_locations(*image.shape[-2:]))[0]

    def _image(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["image"].to(self.device, non_blocking=True).float()

    def _first_locations(self, height: int, width: int) -> np.ndarray:
        """(B, 3): the whole image in each of the first sizes."""
        scales = [np.float32(size / max(height, width)) for size in self.options.first_sizes]
        return np.array([[height // 2, width // 2, scale] for scale in scales], dtype=np.float32)

    def _cut(
        self, image: Tensor, locations: np.ndarray
    ) -> tuple[Tensor, list[tuple[float, float]]]:
        """Views of the image (3, h, w) at locations (M, 3 or 4), and the views' corners."""
        size = self.options.input_size
        views = torch.zeros((len(locations), 3, size, size), device=self.device)
        offsets = []
        # As published, in the precision of the locations (float32 of the first ones): a view of the
        # whole image is as large as the image, not a pixel less.
        sides = np.divide(size, locations[:, 2], dtype=locations.dtype).astype(np.int64)
        for view, (y, x), side in zip(views, locations[:, :2], sides, strict=True):
            crop = crop_around(
                int(y), int(x), max(1, int(side)), size, image.shape[-2], image.shape[-1]
            )
            offsets.append(crop.offset)
            rows, columns = crop.target
            shape = rows.stop - rows.start, columns.stop - columns.start
            window = image[:, crop.source[0], crop.source[1]]
            if min(shape) > 0 and window.numel() > 0:
                view[:, rows, columns] = F.interpolate(
                    window[None], shape, mode="bilinear", align_corners=False
                )[0]
        return self._normalize(views), offsets

    def _look(self, views: Tensor) -> list[Tensor]:
        """The network on views (B, 3, S, S), some at a time; what :meth:`_decode` gives, on the CPU."""
        parts = []
        for chunk in views.split(_BATCH):
            count = len(chunk)
            if self.inference_network.mode != "eager":
                # Few different batch sizes, so that few graphs are captured.
                chunk = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, -count % 8 if count > 2 else 0))
            parts.append([x[:count].cpu() for x in self.inference_network(chunk)])
        return [torch.cat(x) for x in zip(*parts, strict=True)]

    def _to_image(
        self, rows: Tensor, scales: np.ndarray, offsets: list[tuple[float, float]]
    ) -> Tensor:
        """Rows (B, P, COLUMNS) in cells of B views → in pixels of the image."""
        size = self.options.input_size
        pixels = rows[..., :4] / (-(-size // self.stride) / size)
        boxes = pixels / torch.from_numpy(scales.astype(np.float32))[:, None, None]
        corner = torch.tensor([[x, y, x, y] for y, x in offsets], dtype=torch.float32)
        return torch.cat([boxes + corner[:, None], rows[..., 4:]], dim=-1)

    @torch.no_grad()
    def detect(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detect on one image after the other."""
        return [self._search(inputs) for inputs in batched_inputs]

    @torch.no_grad()
    def inference(
        self, images: Tensor, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Detect, the first views of the first image being there already."""
        first = self._search(batched_inputs[0], images)
        return [first, *self.detect(batched_inputs[1:])]

    def _search(
        self, inputs: dict[str, Any], first_views: Tensor | None = None
    ) -> dict[str, Instances]:
        image = self._image(inputs)
        height, width = image_size = _image_size(inputs)
        rows, locations = self.first_pass(image, first_views)
        if len(locations):
            views, offsets = self._cut(image, locations)
            found = self._to_image(self._look(views)[0], locations[:, 2], offsets).flatten(0, 1)
            rows = torch.cat([rows, found[found[:, 4] > -1]])
        rows = suppress(rows, self.suppression)
        output_size = (inputs.get("height") or height, inputs.get("width") or width)
        clip = self.options.clip_boxes
        return {"instances": to_instances(rows.to(self.device), image_size, output_size, clip=clip)}

    def first_pass(self, image: Tensor, views: Tensor | None = None) -> tuple[Tensor, np.ndarray]:
        """The small views of an image (3, h, w) → boxes, and where to look.

        Returns:
            rows (N, COLUMNS) in pixels of the image, and locations (M, 4), best first.
        """
        height, width = image.shape[-2:]
        first = self._first_locations(height, width)
        cut, offsets = self._cut(image, first)
        found, *attention = self._look(cut if views is None else views)
        rows = self._to_image(found, first[:, 2], offsets).flatten(0, 1)
        rows = rows[rows[:, 4] > self.options.first_score]
        strides = [self.stride * 2**level for level in reversed(range(self.backbone.depth))]
        locations = attention_locations(
            [x.numpy() for x in attention],
            first[:, 2].tolist(),
            offsets,
            strides,
            self.options.attention_scales,
            self.options.attention_threshold,
            (height, width),
        )
        confident = box_locations(rows.numpy(), self.options.confident_score)
        locations = suppress_locations(np.concatenate([locations, confident]))
        return rows, locations[: self.options.max_crops]

    def _shown_maps(
        self, inputs: dict[str, Any]
    ) -> list[tuple[str, Tensor, float, tuple[float, float]]]:
        """Of the last of the first views; ``attention`` of all levels."""
        image = self._image(inputs)
        location = self._first_locations(*image.shape[-2:])[-1:]
        views, offsets = self._cut(image, location)
        predictions = self.network(views)
        scale = float(location[0, 2])
        shift = offsets[0][1], offsets[0][0]
        size = self.options.input_size
        named = [("top_left", predictions[0].heat), ("bottom_right", predictions[1].heat)]
        named += [("attention", logits) for logits in predictions.attention]
        return [(name, maps, size / maps.shape[-1] / scale, shift) for name, maps in named]
