"""One picture of `shapes` with its exact annotations."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from d2ext.data.shapes.classes import STUFF_IDS, THING_IDS, Outline
from d2ext.data.shapes.masks import mask_to_polygons, mask_to_rle
from d2ext.data.shapes.raster import (
    Raster,
    apply,
    compose,
    draw_details,
    fixed_point,
    invert,
    rasterize,
)
from d2ext.data.shapes.textures import (
    STORED_PER_PIXEL,
    light_field,
    noise_field,
    stuff_texture,
    thing_texture,
)

__all__ = [
    "SEGMENT_ID_FACTOR",
    "VOID",
    "Background",
    "Frame",
    "Layer",
    "Region",
    "Segment",
    "paint_layer",
]

VOID = 255  # label of pixels that belong to no class, in semantic maps
# Panoptic segment id = category id x this + number of the thing (0 for stuff), at most 2^24.
SEGMENT_ID_FACTOR = 1000
# What is visible of a thing or of a stuff class with fewer pixels than this is void.
_MIN_THING_AREA, _MIN_STUFF_AREA = 12, 40


@dataclass(frozen=True)
class Layer:
    """The look of a thing, or of clutter, apart from where it is.

    Attributes:
        category: contiguous class index; -1: clutter, which is void.
        outline: geometry in the thing's own frame.
        texture: index of a grey tile.
        texture_matrix: the thing's own frame -> texture pixels.
        ramp: (256, 1, 3) uint8 colours of the tile's grey values.
        tones: colours of marks: white, ink, accent.
        edge: thickness of the traced outline relative to the thing's radius; 0: none.
        crowd: whether the thing is one of a group that is annotated as one crowd region.
    """

    category: int
    outline: Outline
    texture: int
    texture_matrix: np.ndarray
    ramp: np.ndarray
    tones: list[list[int]]
    edge: float
    crowd: bool = False


@dataclass(frozen=True)
class Region:
    """A piece of the background; a later region covers earlier ones.

    Attributes:
        category: contiguous stuff class index.
        polygon: (n, 2) in world coordinates; None: everywhere.
        texture_matrix: world -> texture pixels.
        ramp: (256, 1, 3) uint8 colours of the tile's grey values.
    """

    category: int
    polygon: np.ndarray | None
    texture_matrix: np.ndarray
    ramp: np.ndarray


@dataclass(frozen=True)
class Background:
    """Stuff regions, and the light and sensor noise over the whole picture.

    Attributes:
        regions: bottom to top; no class twice.
        light: strength of the uneven light, 0 to 1.
        light_window: (row, column) of the part of the light's field that is shown, each below 256.
        noise: strength of the sensor noise, 0 to 1.
    """

    regions: list[Region]
    light: float
    light_window: tuple[int, int]
    noise: float


@dataclass(frozen=True)
class Segment:
    """The visible part of a thing, or of all things of a crowd.

    Attributes:
        number: the thing's place in the stack of layers plus 1; stable within a clip (track id).
        category: contiguous class index.
        layer: index of the layer; -1: crowd.
        x0, y0: where the mask lies in the image.
        mask: (h, w) uint8, cut to the visible part's bounding box.
        area: number of mask pixels.
    """

    number: int
    category: int
    layer: int
    x0: int
    y0: int
    mask: np.ndarray
    area: int

    @property
    def id(self) -> int:
        """Its id in the panoptic map."""
        return THING_IDS[self.category] * SEGMENT_ID_FACTOR + self.number


class Frame:
    """A scene seen once: the image and its exact annotations, each computed when first asked for.

    Args:
        height, width: of the image in pixels.
        layers: things and clutter, front to back.
        matrices: for each layer, its own frame -> image.
        background: what lies behind them.
        camera: world -> image.
        noise_window: (row, column) of the part of the noise field that is shown, each below 256.
        rasters: what :func:`rasterize` gives for each layer, if the caller has it already.
    """

    def __init__(
        self,
        height: int,
        width: int,
        layers: list[Layer],
        matrices: list[np.ndarray],
        background: Background,
        camera: np.ndarray,
        noise_window: tuple[int, int],
        rasters: list[Raster | None] | None = None,
    ) -> None:
        if len(layers) + len(background.regions) > 255:
            raise ValueError("a scene holds at most 255 layers and regions together")
        self.height, self.width = height, width
        self.layers, self.matrices = layers, matrices
        self.background, self.camera = background, camera
        self.noise_window = noise_window
        if rasters is None:
            rasters = [
                rasterize(layer.outline, matrix, height, width)
                for layer, matrix in zip(layers, matrices, strict=True)
            ]
        self.rasters = rasters

    @cached_property
    def owner(self) -> np.ndarray:
        """(H, W) uint8: index of the front-most layer plus 1; 0 where the background shows."""
        owner = np.zeros((self.height, self.width), np.uint8)
        for index, raster in enumerate(self.rasters):
            if raster is not None:
                window = owner[raster.window]
                np.copyto(window, index + 1, where=(raster.mask > window))
        return owner

    @cached_property
    def stuff(self) -> np.ndarray:
        """(H, W) uint8: index of the background's region, also behind things."""
        label = np.zeros((self.height, self.width), np.uint8)
        for index, region in enumerate(self.background.regions):
            if region.polygon is not None:
                points = fixed_point(apply(self.camera, region.polygon), 0, 0)
                cv2.fillPoly(label, [points], index, shift=4)
        return label

    @cached_property
    def segments(self) -> list[Segment]:
        """Things that can be seen, front to back, then the crowds by class."""
        segments = []
        crowds: dict[int, list[int]] = {}
        for index, (layer, raster) in enumerate(zip(self.layers, self.rasters, strict=True)):
            if raster is None or layer.category < 0:
                continue
            if layer.crowd:
                crowds.setdefault(layer.category, []).append(index)
                continue
            visible = cv2.compare(self.owner[raster.window], index + 1, cv2.CMP_EQ)
            segment = _segment(visible, raster.x0, raster.y0, index + 1, layer.category, index)
            if segment is not None:
                segments.append(segment)
        for category, members in sorted(crowds.items()):
            visible = np.isin(self.owner, [index + 1 for index in members]).astype(np.uint8)
            segment = _segment(visible, 0, 0, members[0] + 1, category, -1)
            if segment is not None:
                segments.append(segment)
        return segments

    @cached_property
    def _source(self) -> np.ndarray:
        """(H, W) uint8: the layer's index plus 1, or 255 minus the region's index."""
        source = cv2.bitwise_not(self.stuff)
        cv2.copyTo(self.owner, self.owner, source)
        return source

    @cached_property
    def _ids(self) -> np.ndarray:
        """(256,) int32: panoptic id of each value of :attr:`_source`."""
        ids = np.zeros(256, np.int32)
        for segment in self.segments:
            for index in self._members(segment):
                ids[index + 1] = segment.id
        area = cv2.calcHist([self._source], [0], None, [256], [0, 256]).reshape(-1)
        for index, region in enumerate(self.background.regions):
            if area[255 - index] >= _MIN_STUFF_AREA:
                ids[255 - index] = STUFF_IDS[region.category] * SEGMENT_ID_FACTOR
        return ids

    @cached_property
    def panoptic(self) -> np.ndarray:
        """(H, W) int32 segment ids: ``category id * 1000 + number`` (stuff: 0); 0: void."""
        return cv2.LUT(self._source, self._ids)

    @property
    def semantic(self) -> np.ndarray:
        """(H, W) uint8: category id - 1, things before stuff; 255: void."""
        return self._categories([VOID, *range(len(THING_IDS) + len(STUFF_IDS))])

    @property
    def sem_seg(self) -> np.ndarray:
        """(H, W) uint8 as Panoptic FPN wants it: 0 things, 1 and up stuff; 255: void."""
        return self._categories([VOID, *(0 for _ in THING_IDS), *range(1, len(STUFF_IDS) + 1)])

    @cached_property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""
        return self._lit(self._paint())

    def _paint(self) -> np.ndarray:
        """The picture before light and noise."""
        image = self._paint_background()
        for layer, matrix, raster in reversed(
            list(zip(self.layers, self.matrices, self.rasters, strict=True))
        ):
            if raster is not None:
                paint_layer(image, layer, matrix, raster)
        return image

    def _lit(self, image: np.ndarray) -> np.ndarray:
        """With uneven light and sensor noise."""
        height, width = self.height, self.width
        for strength, field, (row, column) in (
            (self.background.light, light_field(height, width), self.background.light_window),
            (self.background.noise, noise_field(height, width), self.noise_window),
        ):
            window = field[row : row + height, column : column + width]
            image = cv2.addWeighted(image, 1.0, window, strength, -128.0 * strength)
        return image

    def keypoints(self, segment: Segment) -> np.ndarray:
        """(8, 3) float64: x, y in continuous image coordinates, and v as in COCO.

        v = 2: visible; 1: behind another thing or clutter; 0: outside the image or of a crowd, then
        x = y = 0.
        """
        if segment.layer < 0:
            return np.zeros((8, 3))
        points = apply(self.matrices[segment.layer], self.layers[segment.layer].outline.keypoints)
        result = np.concatenate([points, np.full((len(points), 1), 2.0)], axis=1)
        for row in result:
            x, y = int(np.floor(row[0])), int(np.floor(row[1]))
            if not (0 <= x < self.width and 0 <= y < self.height):
                row[:] = 0
            elif 0 < self.owner[y, x] <= segment.layer:  # a layer in front of the thing
                row[2] = 1
        return result

    def outline_extent(self, segment: Segment) -> tuple[np.ndarray, np.ndarray, float]:
        """Extent of a thing's whole outline, also of what is hidden or outside the image.

        Returns:
            low, high: (2,) float64 x, y in continuous image coordinates
            area: of the outline in pixels, as it would cover them if nothing were in front of it
        """
        matrix, outline = self.matrices[segment.layer], self.layers[segment.layer].outline
        points = [apply(matrix, contour) for part in outline.parts for contour in part]
        low = np.min([contour.min(axis=0) for contour in points], axis=0)
        high = np.max([contour.max(axis=0) for contour in points], axis=0)
        # Drawn as the picture is, on a canvas that holds all of it.
        shift = np.floor(low) - 1
        width, height = (np.ceil(high - shift) + 1).astype(int).tolist()
        moved = matrix.copy()
        moved[:2, 2] -= shift
        raster = rasterize(outline, moved, height, width)
        return low, high, 0.0 if raster is None else float(raster.area)

    def annotation(self, segment: Segment, mask_format: str) -> dict[str, Any]:
        """bbox (x, y, w, h), area, iscrowd and segmentation, as COCO has them.

        Args:
            mask_format: ``"polygon"`` or ``"rle"`` (compressed). A crowd's mask is always RLE, as
                in COCO.
        """
        crowd = segment.layer < 0
        height, width = segment.mask.shape
        if mask_format == "polygon" and not crowd:
            mask: Any = mask_to_polygons(segment.mask, segment.x0, segment.y0)
        else:
            mask = mask_to_rle(segment.mask, segment.x0, segment.y0, self.height, self.width)
        return {
            "bbox": [float(segment.x0), float(segment.y0), float(width), float(height)],
            "area": segment.area,
            "iscrowd": int(crowd),
            "segmentation": mask,
        }

    def panoptic_segments(self) -> list[dict[str, Any]]:
        """COCO's ``segments_info`` (category ids as in files), things before stuff.

        Things have ``visibility``, the share of their pixels in the image that nothing hides.
        """
        infos: list[dict[str, Any]] = []
        for segment in self.segments:
            height, width = segment.mask.shape
            infos.append(
                {
                    "id": segment.id,
                    "category_id": THING_IDS[segment.category],
                    "area": segment.area,
                    "bbox": [segment.x0, segment.y0, width, height],
                    "iscrowd": int(segment.layer < 0),
                }
            )
            raster = self.rasters[segment.layer] if segment.layer >= 0 else None
            if raster is not None:
                infos[-1]["visibility"] = round(segment.area / raster.area, 4)
        for index, region in enumerate(self.background.regions):
            category = STUFF_IDS[region.category]
            if category * SEGMENT_ID_FACTOR in self._ids:
                visible = cv2.compare(self._source, 255 - index, cv2.CMP_EQ)
                infos.append(
                    {
                        "id": category * SEGMENT_ID_FACTOR,
                        "category_id": category,
                        "area": cv2.countNonZero(visible),
                        "bbox": list(cv2.boundingRect(visible)),
                        "iscrowd": 0,
                    }
                )
        return infos

    def _members(self, segment: Segment) -> list[int]:
        if segment.layer >= 0:
            return [segment.layer]
        return [
            index
            for index, layer in enumerate(self.layers)
            if layer.crowd and layer.category == segment.category
        ]

    def _categories(self, labels: list[int]) -> np.ndarray:
        """(H, W) uint8; `labels` holds the label of each category id, that of void first."""
        table = np.array(labels, np.uint8)[self._ids // SEGMENT_ID_FACTOR]
        return cv2.LUT(self._source, table)

    def _paint_background(self) -> np.ndarray:
        image = np.empty((self.height, self.width, 3), np.uint8)
        to_world = invert(self.camera)
        for index, region in enumerate(self.background.regions):
            shown = cv2.compare(self.stuff, index, cv2.CMP_EQ)
            x0, y0, width, height = cv2.boundingRect(shown)
            if not width:
                continue
            matrix = compose(region.texture_matrix, to_world)
            tile = stuff_texture(region.category)
            window = slice(y0, y0 + height), slice(x0, x0 + width)
            color = _textured(tile, region.ramp, matrix, x0, y0, height, width)
            cv2.copyTo(color, shown[window], image[window])
        return image


def _segment(
    visible: np.ndarray, x0: int, y0: int, number: int, category: int, layer: int
) -> Segment | None:
    """A segment from a mask (nonzero: visible) at (x0, y0); None if too little is visible."""
    area = cv2.countNonZero(visible)
    if area < _MIN_THING_AREA:
        return None
    x, y, width, height = cv2.boundingRect(visible)
    mask = cv2.threshold(visible[y : y + height, x : x + width], 0, 1, cv2.THRESH_BINARY)[1]
    return Segment(number, category, layer, x0 + x, y0 + y, mask, area)


def _textured(
    tile: np.ndarray,
    ramp: np.ndarray,
    matrix: np.ndarray,
    x0: int,
    y0: int,
    height: int,
    width: int,
) -> np.ndarray:
    """(height, width, 3) window at (x0, y0) of a coloured tile; `matrix`: image -> texture."""
    stored = matrix * STORED_PER_PIXEL
    stored[:, 2] += stored[:, :2] @ np.array([x0 + 0.5, y0 + 0.5]) - 0.5
    grey = cv2.warpAffine(
        tile,
        stored,
        (width, height),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_WRAP,
    )
    return cv2.applyColorMap(grey, ramp)


def paint_layer(image: np.ndarray, layer: Layer, matrix: np.ndarray, raster: Raster) -> None:
    """Blend a layer over `image`, in place."""
    x0, y0 = raster.x0, raster.y0
    to_texture = compose(layer.texture_matrix, invert(matrix))
    tile = thing_texture(layer.texture)
    color = _textured(tile, layer.ramp, to_texture, x0, y0, *raster.mask.shape)
    # Half of the traced line falls outside the thing and is cut off by alpha.
    radius = float(np.hypot(*matrix[:, 0]))
    edge = max(1, round(2 * layer.edge * radius)) if layer.edge else 0
    draw_details(color, layer.outline, raster, layer.tones, edge)
    weight = raster.alpha * np.float32(1 / 255)
    window = image[raster.window]
    window[:] = cv2.blendLinear(color, np.ascontiguousarray(window), weight, 1 - weight)
