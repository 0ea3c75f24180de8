"""CornerNet-Saccade (arXiv 1904.08900, section 3): first the whole image, small, then crops of it.

The network first runs on the whole image in two small sizes. Attention maps (``head.py``) and confident
boxes say where objects are and how large; :func:`suppress_locations` selects among these locations, the
network runs on crops around them, and soft-NMS merges all boxes.

Letters: B views, P pairs, N rows, M locations of an image, S side of the network's input in pixels.
A *view* is the network's input with a window of the image; a *location* is y, x (pixels of the image),
the scale of the crop there, and a score.
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

from d2ext.codecs.canvas import Canvas
from d2ext.codecs.corners import REJECTED
from d2ext.codecs.heatmaps import local_peaks
from d2ext.modeling.meta_arch import MetaArch, image_size
from d2ext.systems.cornernet.head import SaccadeHead, SaccadePredictions
from d2ext.systems.cornernet.losses import SaccadeCriterion
from d2ext.systems.cornernet.model import CornerNet
from d2ext.systems.cornernet.postprocess import to_instances
from d2ext.systems.cornernet.targets import SaccadeTargets, encode_saccade, read_boxes

# Boxes with a longer side above the first number of pixels have the second one in their crop
# (published code).
_BOX_SIDES = ((96.0, 192.0), (32.0, 64.0), (0.0, 24.0))
# Attention in views of more than twice the image's scale is not used, nor crops of more than four times
# (published code).
_MAX_SCALE, _MAX_NEXT_SCALE = 2.0, 4.0
# Locations closer than this many pixels of the view, and of scales within a fifth, are merged.
_LOCATION_DISTANCE, _SCALE_RATIO = 16.0, 0.2
# Views per batch.
_BATCH = 32


class SaccadeOptions(NamedTuple):
    """Options of the search; see ``MODEL.CORNERNET.SACCADE``."""

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
    """Which window of the image goes where in the network's input."""

    source: tuple[slice, slice]
    """Rows and columns of the image."""
    target: tuple[slice, slice]
    """Rows and columns of the input."""
    corner: tuple[float, float]
    """x, y of the window's corner in the image."""


def crop_around(y: int, x: int, side: int, size: int, height: int, width: int) -> Crop:
    """The window of ``side`` pixels around a pixel of the image, which fills an input of ``size``."""
    half, middle = side // 2, size // 2
    factor = size / side

    def axis(center: int, limit: int) -> tuple[slice, slice]:
        low, high = max(0, center - half), min(center + half, limit)
        before, after = int((center - low) * factor), int((high - center) * factor)
        return slice(low, high), slice(middle - before, middle + after)

    rows, columns = axis(y, height), axis(x, width)
    return Crop((rows[0], columns[0]), (rows[1], columns[1]), (float(x - half), float(y - half)))


def box_locations(rows: np.ndarray, min_score: float) -> np.ndarray:
    """Confident boxes → locations (M, 4) with score 1: their centres, at the scale of ``_BOX_SIDES``.

    Args:
        rows: (N, 5 or more) x1, y1, x2, y2, score.
    """
    rows = rows[rows[:, 4] > min_score]
    longer = np.maximum(rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1])
    longer = np.maximum(longer, 1e-3)
    targets = np.select(
        [longer > limit for limit, _ in _BOX_SIDES], [side for _, side in _BOX_SIDES]
    )
    centers = (rows[:, 1] + rows[:, 3]) / 2, (rows[:, 0] + rows[:, 2]) / 2
    return np.stack([*centers, targets / longer, np.ones(len(rows))], axis=1)


def attention_locations(
    attention: Sequence[np.ndarray],
    canvases: Sequence[Canvas],
    strides: Sequence[int],
    factors: Sequence[float],
    threshold: float,
    size: tuple[int, int],
) -> np.ndarray:
    """Peaks of attention maps → locations (M, 4) inside the image.

    Args:
        attention: for each level (B, h, w) probabilities, 0 except at peaks.
        canvases: of the B views.
        strides: pixels of the view per cell, for each level.
        factors: magnification of crops, for each level.
        size: (height, width) of the image.
    """
    locations = [np.zeros((0, 4))]
    for view, canvas in enumerate(canvases):
        for level, stride, factor in zip(attention, strides, factors, strict=True):
            scale = factor * canvas.scale
            if canvas.scale > _MAX_SCALE or scale > _MAX_NEXT_SCALE:
                continue
            rows, columns = np.where(level[view] > threshold)
            xs = columns * stride / canvas.scale + canvas.corner[0]
            ys = rows * stride / canvas.scale + canvas.corner[1]
            inside = (ys >= 0) & (ys < size[0]) & (xs >= 0) & (xs < size[1])
            scores = level[view, rows, columns]
            places = np.stack([ys, xs, np.full(len(ys), scale), scores], axis=1)
            locations.append(places[inside])
    return np.concatenate(locations)


def suppress_locations(locations: np.ndarray) -> np.ndarray:
    """Drop locations near a better one of about the same scale; best first.

    Published quirk: locations that are near in one axis count as near.
    """
    # As published, the sort is not stable: equal scores are in NumPy's order, reversed.
    locations = locations[np.argsort(locations[:, 3])[::-1]]
    selected = []
    while len(locations):
        best = locations[0]
        selected.append(best)
        distance = np.abs(locations[:, :2] - best[:2]).min(axis=1)
        ratio = best[2] / locations[:, 2]
        far = distance > _LOCATION_DISTANCE / best[2]
        other = (ratio > 1 + _SCALE_RATIO) | (ratio < 1 - _SCALE_RATIO)
        keep = far | other
        keep[0] = False
        locations = locations[keep]
    return np.stack(selected) if selected else np.zeros((0, 4))


@META_ARCH_REGISTRY.register()
class CornerNetSaccade(CornerNet):
    """CornerNet-Saccade on any hourglass that gives its levels."""

    export_refusal = "what it looks at next depends on what it has seen"

    head_class = SaccadeHead
    criterion_class = SaccadeCriterion
    reject_border = True

    @configurable
    def __init__(self, *, options: SaccadeOptions | None = None, **corner_net: Any) -> None:
        """Args:
        options: of the search.
        corner_net: see :class:`CornerNet`; ``backbone`` with ``out_levels``, ``head`` with attention.
        """
        super().__init__(**corner_net)
        self.options = options or SaccadeOptions()
        levels = self.head.num_levels
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
        # Pixels of a view per cell of the attention maps.
        self.attention_strides = [self.stride * 2**i for i in reversed(range(levels))]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        saccade = cfg.MODEL.CORNERNET.SACCADE
        options = SaccadeOptions(
            input_size=saccade.INPUT_SIZE,
            first_sizes=tuple(saccade.FIRST_SIZES),
            attention_threshold=saccade.ATTENTION_THRESH,
            attention_scales=tuple(saccade.ATTENTION_SCALES),
            attention_ranges=tuple((low, high) for low, high in saccade.ATTENTION_RANGES),
            first_score=saccade.FIRST_SCORE,
            confident_score=saccade.CONFIDENT_SCORE,
            max_crops=saccade.MAX_CROPS,
            min_side=saccade.MIN_SIDE,
            min_share=saccade.MIN_SHARE,
            clip_boxes=saccade.CLIP_BOXES,
        )
        return {**super().from_config(cfg), "options": options}

    def preprocess(
        self, batched_inputs: list[dict[str, Any]], scale: float | None = None
    ) -> Tensor:
        """The first views of each image, (B, 3, S, S); ``scale`` has no meaning here."""
        views = [
            self._views(self.upload(x), self._first_locations(image_size(x)))[0]
            for x in batched_inputs
        ]
        return torch.cat(views)

    def encode_targets(
        self, batched_inputs: list[dict[str, Any]], images: Tensor
    ) -> SaccadeTargets:
        """See :func:`encode_saccade`; without ``gt_visible_shares`` objects are wholly visible."""
        height, width = images.shape[-2:]
        boxes, classes = read_boxes(batched_inputs, (height, width), self.device)
        shares = [
            x["instances"].gt_visible_shares.to(self.device)
            if x["instances"].has("gt_visible_shares")
            else own.new_ones(len(own))
            for x, own in zip(batched_inputs, boxes, strict=True)
        ]
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

    def _decode(self, predictions: SaccadePredictions) -> tuple[Tensor, ...]:
        """Raw predictions → rows (B, P, COLUMNS) in cells, and L attention maps (B, h, w)."""
        (rows,) = super()._decode(predictions)
        peaks = [local_peaks(x.float().sigmoid())[:, 0] for x in predictions.attention]
        return (rows, *peaks)

    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without further scales: the first views of all images at once, see :meth:`postprocess`."""
        return MetaArch.inference(self, batched_inputs)

    def postprocess(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Boxes of the first views and of crops at the locations that these give → ``instances`` with
        the fields listed in ``postprocess.py``."""
        views = [x.cpu().chunk(len(batched_inputs)) for x in predictions]
        results = []
        for inputs, (first, *attention) in zip(
            batched_inputs, zip(*views, strict=True), strict=True
        ):
            image = self.upload(inputs)
            rows, locations = self.first_look(first, attention, image_size(inputs))
            if len(locations):
                crops, canvases = self._views(image, locations)
                more = self._rows_on_image(self._look(crops), canvases)
                rows = torch.cat([rows, more[more[:, 4] > REJECTED]])
            results.append(self.result(inputs, [(rows,)]))
        return results

    def first_look(
        self, rows: Tensor, attention: Sequence[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, np.ndarray]:
        """Decoded predictions for the first views of an image of ``size`` → boxes, and where to crop.

        Returns:
            rows (N, COLUMNS) in pixels of the image, and locations (M, 4), best first.
        """
        canvases = [crop[1] for crop in self._crops(self._first_locations(size), size)]
        rows = self._rows_on_image(rows, canvases)
        rows = rows[rows[:, 4] > self.options.first_score]
        locations = attention_locations(
            [x.numpy() for x in attention],
            canvases,
            self.attention_strides,
            self.options.attention_scales,
            self.options.attention_threshold,
            size,
        )
        confident = box_locations(rows.numpy(), self.options.confident_score)
        locations = suppress_locations(np.concatenate([locations, confident]))
        return rows, locations[: self.options.max_crops]

    def _first_locations(self, size: tuple[int, int]) -> np.ndarray:
        """(B, 3): the whole image of ``size`` (height, width) in each of the first sizes."""
        height, width = size
        scales = [np.float32(side / max(size)) for side in self.options.first_sizes]
        return np.array([[height // 2, width // 2, scale] for scale in scales], dtype=np.float32)

    def _crops(self, locations: np.ndarray, size: tuple[int, int]) -> list[tuple[Crop, Canvas]]:
        """The windows at locations (M, 3 or 4) of an image of ``size`` (height, width)."""
        input_size = self.options.input_size
        # As published, in the locations' precision (float32 for the first views): a view of the whole
        # image is then exactly as large as the image, not a pixel less.
        sides = np.divide(input_size, locations[:, 2], dtype=locations.dtype).astype(np.int64)
        crops = []
        for (y, x, scale, *_), side in zip(locations, sides, strict=True):
            crop = crop_around(int(y), int(x), max(1, int(side)), input_size, *size)
            content = tuple(s.stop - s.start for s in crop.target)
            canvas = Canvas((input_size, input_size), content, float(scale), crop.corner)
            crops.append((crop, canvas))
        return crops

    def _views(self, image: Tensor, locations: np.ndarray) -> tuple[Tensor, list[Canvas]]:
        """Views (M, 3, S, S) of the image (3, h, w) at locations (M, 3 or 4)."""
        image, size = image.float(), self.options.input_size
        crops = self._crops(locations, (image.shape[-2], image.shape[-1]))
        views = torch.zeros((len(crops), 3, size, size), device=self.device)
        for view, (crop, canvas) in zip(views, crops, strict=True):
            window = image[:, crop.source[0], crop.source[1]]
            if min(canvas.content) > 0 and window.numel() > 0:
                view[:, crop.target[0], crop.target[1]] = F.interpolate(
                    window[None], canvas.content, mode="bilinear", align_corners=False
                )[0]
        return self.normalize(views), [canvas for _, canvas in crops]

    def _look(self, views: Tensor) -> Tensor:
        """Run the network on views (B, 3, S, S) in batches → rows (B, P, COLUMNS) on the CPU."""
        rows = []
        for chunk in views.split(_BATCH):
            count = len(chunk)
            if self.inference_network.mode != "eager":
                # Few batch sizes, so that few graphs are captured.
                chunk = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, -count % 8 if count > 2 else 0))
            rows.append(self.inference_network(chunk)[0][:count].cpu())
        return torch.cat(rows)

    def _rows_on_image(self, rows: Tensor, canvases: Sequence[Canvas]) -> Tensor:
        """Rows (B, P, COLUMNS) in cells of B views → (N, COLUMNS) in pixels of the image."""
        boxes = [c.to_image(x[:, :4], self.stride) for c, x in zip(canvases, rows, strict=True)]
        return torch.cat([torch.stack(boxes), rows[..., 4:]], dim=-1).flatten(0, 1)

    def _instances(
        self, rows: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
    ) -> Instances:
        return to_instances(rows, image_size, output_size, clip=self.options.clip_boxes)

    def shown_maps(self, inputs: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        """Maps of the last of the first views, with ``attention`` of all levels."""
        location = self._first_locations(image_size(inputs))[-1:]
        views, (canvas,) = self._views(self.upload(inputs), location)
        top_left, bottom_right, attention = self.network(views)
        shown = [
            ("top_left", top_left.heat, self.stride),
            ("bottom_right", bottom_right.heat, self.stride),
        ]
        shown += [
            ("attention", maps, stride)
            for maps, stride in zip(attention, self.attention_strides, strict=True)
        ]
        return [(name, x[0].float().sigmoid(), canvas.affine(stride)) for name, x, stride in shown]
