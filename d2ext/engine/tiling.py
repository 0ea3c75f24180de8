"""Large images tile by tile: what lies on the seams of the tiles comes out once and whole.

Letters: N instances of all tiles of an image, H, W its size. Boxes are x0, y0, x1, y1 in its pixels.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2ext.config import ConfigError
from d2ext.utils.drawing import select
from d2ext.utils.memory import available_memory

logger = logging.getLogger(__name__)

# Pieces are of one object if they overlap this much where both of their tiles see them (IoU).
_SAME = 0.5
# A piece is cut if it ends beyond an edge of its tile or this near to it: part of the tile's side, and
# pixels.
_EDGE, _EDGE_PIXELS = 0.01, 2.0
# Fields of points (N, K, 2 or more): x, y, ...
_POINTS = ("pred_keypoints", "pred_face_meshes")

Tile = tuple[int, int, int, int]


class _Pieces(NamedTuple):
    """What was predicted on all tiles."""

    instances: Instances  # N, without masks, in pixels of the image
    masks: list[Tensor]  # (h, w) bool each, of its tile; none if the model gives none
    tile_of: list[int]


class TiledPredictor:
    """Predicts on overlapping tiles and merges the instances.

    A piece that is cut off by its tile's edge and lies clear inside another tile is left to that one. Of
    pieces that agree where their tiles overlap the best is kept; where all of them are cut, for the
    object is longer than the overlap, boxes and masks are put together.

    Args:
        predict: predicts on a list of images (H×W×3 uint8, BGR), such as a ``BatchPredictor``.
        size: side of the tiles, pixels; a smaller image is one tile.
        overlap: part of ``size`` that neighbours share at least, in [0, 1).
        batch_size: tiles per pass.
        threshold: leaves out instances of a lower score, see :func:`d2ext.utils.drawing.select`.
    """

    def __init__(
        self,
        predict: Callable[[list[np.ndarray]], list[dict[str, Any]]],
        size: int,
        overlap: float = 0.2,
        *,
        batch_size: int = 1,
        threshold: float = 0.0,
    ) -> None:
        self._predict, self._size, self._overlap = predict, size, overlap
        self._batch_size, self._threshold = batch_size, threshold
        self._dropped: set[str] = set()

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """``instances`` of each image, best first, on the CPU.

        Raises:
            ConfigError: the model gives no instances.
            MemoryError: the masks of an image do not fit.
        """
        return [{"instances": self._merged(image)} for image in images]

    def _merged(self, image: np.ndarray) -> Instances:
        height, width = image.shape[:2]
        tiles = [
            (x, y, min(x + self._size, width), min(y + self._size, height))
            for y in _starts(height, self._size, self._overlap)
            for x in _starts(width, self._size, self._overlap)
        ]
        pieces = self._pieces(image, tiles)
        boxes = pieces.instances.pred_boxes.tensor.numpy()
        cut = np.array([_is_cut(boxes[i], tiles[t], image) for i, t in enumerate(pieces.tile_of)])
        groups = _groups(pieces, boxes, cut, tiles, image)
        merged, parts = [], []
        scores = pieces.instances.scores
        for group in groups:
            whole = [i for i in group if not cut[i]]
            best = max(whole or group, key=lambda i: float(scores[i]))
            merged.append(best)
            parts.append([best] if whole else group)
        order = sorted(range(len(groups)), key=lambda k: -float(scores[groups[k]].max()))
        parts = [parts[k] for k in order]
        result = pieces.instances[torch.tensor([merged[k] for k in order], dtype=torch.int64)]
        result.scores = (
            torch.stack([scores[groups[k]].max() for k in order]) if order else scores[:0]
        )
        corners = [[*boxes[p, :2].min(0), *boxes[p, 2:].max(0)] for p in parts]
        result.pred_boxes = Boxes(torch.tensor(np.array(corners, np.float32).reshape(-1, 4)))
        if pieces.masks or not order:
            result.pred_masks = _whole_masks(pieces, parts, tiles, (height, width))
        return result

    def _pieces(self, image: np.ndarray, tiles: Sequence[Tile]) -> _Pieces:
        instances: list[Instances] = []
        masks: list[Tensor] = []
        for start in range(0, len(tiles), self._batch_size):
            batch = tiles[start : start + self._batch_size]
            outputs = self._predict([image[y0:y1, x0:x1] for x0, y0, x1, y1 in batch])
            for tile, output in zip(batch, outputs, strict=True):
                self._check(output)
                own = select(output["instances"], self._threshold)
                if own.has("pred_masks"):
                    masks += list(own.pred_masks.bool())
                    own.remove("pred_masks")
                instances.append(_moved(own, tile, image))
        counts = [len(x) for x in instances]
        tile_of = np.repeat(np.arange(len(tiles)), counts).tolist()
        return _Pieces(Instances.cat(instances), masks, tile_of)

    def _check(self, output: dict[str, Any]) -> None:
        if "instances" not in output:
            raise ConfigError(
                f"Tiles are merged by instances; this model gives {', '.join(output)}."
            )
        if output["instances"].has("pred_densepose"):
            raise ConfigError(
                "Surfaces of persons are not merged from tiles: predict without them."
            )
        if others := {*output} - {"instances"} - self._dropped:
            self._dropped |= others
            logger.warning(
                "Of tiles instances are merged, %s is left out.", ", ".join(sorted(others))
            )


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """Where tiles begin along one side: evenly spaced, sharing at least ``overlap``."""
    step = max(int(size * (1 - overlap)), 1)
    count = 1 + max(math.ceil((length - size) / step), 0)
    return [round(x) for x in np.linspace(0, max(length - size, 0), count)]


def _moved(instances: Instances, tile: Tile, image: np.ndarray) -> Instances:
    """Instances of a tile in pixels of the image."""
    result = Instances((image.shape[0], image.shape[1]))
    offset = torch.tensor(tile[:2], dtype=torch.float32)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = Boxes(value.tensor + offset.repeat(2))
        elif name in _POINTS:
            value = value.clone()
            value[..., :2] += offset
        result.set(name, value)
    return result


def _is_cut(box: np.ndarray, tile: Tile, image: np.ndarray) -> bool:
    """Whether a box ends at an edge of the tile inside the image, or beyond it: some models guess what
    they do not see."""
    near = max(_EDGE * max(tile[2] - tile[0], tile[3] - tile[1]), _EDGE_PIXELS)
    ends = (0, 0, image.shape[1], image.shape[0])
    inner = (box[0] - tile[0], box[1] - tile[1], tile[2] - box[2], tile[3] - box[3])
    return any(
        space < near for space, edge, end in zip(inner, tile, ends, strict=True) if edge != end
    )


def _groups(
    pieces: _Pieces, boxes: np.ndarray, cut: np.ndarray, tiles: Sequence[Tile], image: np.ndarray
) -> list[list[int]]:
    """Indices of the pieces of each object; without those that another tile sees better."""
    members: dict[int, list[int]] = {}
    for i, own in enumerate(pieces.tile_of):
        better = cut[i] and any(
            _inside(boxes[i], tile) and not _is_cut(boxes[i], tile, image)
            for t, tile in enumerate(tiles)
            if t != own
        )
        if not better:
            members.setdefault(own, []).append(i)
    pairs = []
    for a, b in itertools.combinations(members, 2):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = tiles[a], tiles[b]
        region = (max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1))
        if region[0] < region[2] and region[1] < region[3]:
            for i, j in itertools.product(members[a], members[b]):
                if (agreement := _agreement(pieces, boxes, i, j, region)) >= _SAME:
                    pairs.append((agreement, i, j))
    group_of = {i: [i] for own in members.values() for i in own}
    for _, i, j in sorted(pairs, reverse=True):
        a_tiles, b_tiles = ({pieces.tile_of[k] for k in group_of[x]} for x in (i, j))
        if not a_tiles & b_tiles:  # no two of one tile: the model says that they differ
            joint = group_of[i] + group_of[j]
            group_of.update(dict.fromkeys(joint, joint))
    return list({id(group): group for group in group_of.values()}.values())


def _inside(box: np.ndarray, tile: Tile) -> bool:
    return bool((box[:2] >= tile[:2]).all() and (box[2:] <= tile[2:]).all())


def _agreement(pieces: _Pieces, boxes: np.ndarray, i: int, j: int, region: Tile) -> float:
    """IoU of the boxes of two pieces of a class where both tiles see."""
    if pieces.instances.pred_classes[i] != pieces.instances.pred_classes[j]:
        return 0.0
    x0, y0, x1, y1 = region
    seen = np.clip(boxes[[i, j]], (x0, y0, x0, y0), (x1, y1, x1, y1))
    sides = np.minimum(*seen[:, 2:]) - np.maximum(*seen[:, :2])
    if (sides <= 0).any():
        return 0.0
    areas = (seen[:, 2:] - seen[:, :2]).prod(axis=1)
    return float(sides.prod() / (areas.sum() - sides.prod()))


def _whole_masks(
    pieces: _Pieces, parts: Sequence[Sequence[int]], tiles: Sequence[Tile], size: tuple[int, int]
) -> Tensor:
    """(groups, H, W) bool; raises MemoryError where that does not fit."""
    height, width = size
    if len(parts) * height * width > available_memory():
        raise MemoryError(f"{len(parts)} masks of {width}x{height} pixels")
    result = torch.zeros(len(parts), height, width, dtype=torch.bool)
    for mask, part in zip(result, parts, strict=True):
        for i in part:
            x0, y0, x1, y1 = tiles[pieces.tile_of[i]]
            mask[y0:y1, x0:x1] |= pieces.masks[i]
    return result
