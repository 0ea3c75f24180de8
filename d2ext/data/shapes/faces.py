"""Pictures of heads: the image, and what is annotated of a face."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2ext.data.shapes.face_mesh import (
    FACE_VERTICES,
    NUM_VERTICES,
    POINT_VERTICES,
    HeadShape,
    rotation,
)
from d2ext.data.shapes.face_paint import HeadLook, Light, Solid, head_solid, head_surface
from d2ext.data.shapes.face_raster import hides, render
from d2ext.data.shapes.items import Cover, ItemFrame

__all__ = ["MIN_POINTS_SIZE", "FaceFrame", "Head"]

# Faces whose box is lower than this, in pixels, have neither points nor mesh, as WIDER FACE's tiny ones.
MIN_POINTS_SIZE = 12.0
# A point that looks away from the camera by more than this (z of its normal) counts as hidden.
_TURNED_AWAY = 0.15


@dataclass(frozen=True)
class Head:
    """A head in the picture.

    Attributes:
        pose: yaw, pitch and roll as :func:`~d2ext.data.shapes.face_mesh.rotation` takes them.
        scale: pixels per head unit; a face is about two of them high.
        centre: x, y of the mean of the face's vertices, pixels.
        annotated: whether it counts as a face; heads seen from behind do not.
    """

    shape: HeadShape
    look: HeadLook
    pose: tuple[float, float, float]
    scale: float
    centre: tuple[float, float]
    annotated: bool = True

    @cached_property
    def solid(self) -> Solid:
        return head_solid(self.shape, self.look, rotation(*self.pose), self.scale, self.centre)

    def moved(self, centre: tuple[float, float]) -> "Head":
        """The same head elsewhere: quicker than a new one."""
        head = replace(self, centre=centre)
        shift = (centre[0] - self.centre[0], centre[1] - self.centre[1], 0.0)
        head.__dict__["solid"] = replace(self.solid, points=self.solid.points + shift)
        return head

    @property
    def vertices(self) -> np.ndarray:
        """(1103, 3) float64 x, y in pixels, z in pixels from the mean depth, near ones negative."""
        return self.solid.points[:NUM_VERTICES]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of the face from forehead to chin without ears, not cut to the picture."""
        face = self.solid.points[:FACE_VERTICES, :2]
        (x0, y0), (x1, y1) = face.min(axis=0).tolist(), face.max(axis=0).tolist()
        return x0, y0, x1, y1


class FaceFrame(ItemFrame[Head]):
    """A picture of heads with exact boxes, points and meshes; see :class:`ItemFrame`."""

    @property
    def faces(self) -> list[int]:
        """Places in `items` of the annotated heads."""
        return [i for i, item in enumerate(self.items) if isinstance(item, Head) and item.annotated]

    def box(self, item: int) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of a face: the extent of its vertices without those of the ears, also of hidden
        ones, cut to the picture."""
        x0, y0, x1, y1 = self._head(item).extent
        return max(x0, 0.0), max(y0, 0.0), min(x1, self.width), min(y1, self.height)

    def has_points(self, item: int) -> bool:
        """Whether a face is large enough for points and mesh."""
        _, y0, _, y1 = self._head(item).extent
        return y1 - y0 >= MIN_POINTS_SIZE

    def mesh(self, item: int) -> np.ndarray | None:
        """(1103, 3) float32, as :attr:`Head.vertices`; None if the face is too small."""
        return self._head(item).vertices.astype(np.float32) if self.has_points(item) else None

    def face_points(self, item: int) -> np.ndarray:
        """(5, 3) float64: x, y in pixels, and v as in COCO, in the order of
        :data:`~d2ext.data.shapes.face_mesh.POINT_NAMES`.

        v = 2: visible; 1: behind the head itself, its hair or hat, or something in front; 0: outside the
        picture or the face too small, then x = y = 0.
        """
        head = self._head(item)
        result = np.zeros((len(POINT_VERTICES), 3))
        if not self.has_points(item):
            return result
        solid, vertices = head.solid, list(POINT_VERTICES)
        probes = solid.points[vertices]
        hidden = hides(solid.points, solid.triangles, probes, head.scale)
        hidden |= solid.normals[vertices, 2] > _TURNED_AWAY
        behind_all = probes.copy()
        behind_all[:, 2] = math.inf
        for other in self.items[:item]:
            if isinstance(other, Head):
                points, triangles = other.solid.points, other.solid.triangles
                hidden |= hides(points, triangles, behind_all, other.scale)
        for row, (x, y, _), behind in zip(result, probes.tolist(), hidden.tolist(), strict=True):
            if 0 <= x < self.width and 0 <= y < self.height:
                row[:] = x, y, 1 if behind or self._covered(x, y, item) else 2
        return result

    def _covered(self, x: float, y: float, item: int) -> bool:
        """Whether something flat in front of an item hides what is at (x, y)."""
        for other in self.items[:item]:
            if isinstance(other, Cover):
                row, column = int(y) - other.raster.y0, int(x) - other.raster.x0
                mask = other.raster.mask
                if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]:
                    return True
        return False

    def _head(self, item: int) -> Head:
        head = self.items[item]
        if not isinstance(head, Head):
            raise ValueError(f"item {item} of the picture is no head")
        return head

    def _paint_solid(self, image: np.ndarray, item: Head) -> None:
        _paint_head(image, item, self.light)


def _paint_head(image: np.ndarray, head: Head, light: Light) -> None:
    """Blend a head over `image`, in place."""
    height, width = image.shape[:2]
    points = head.solid.points
    left, top = np.maximum(np.floor(points[:, :2].min(axis=0)), 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(points[:, :2].max(axis=0)), (width, height)).astype(int)
    if left >= right or top >= bottom:
        return
    size = 2 * head.scale
    cells = min(max(round(size / 28), 1), 6)
    surface = head_surface(head.solid, head.shape, head.look, light, cells)
    window = (left, top, int(right) - left, int(bottom) - top)
    color, alpha = render(surface, window, 3.0 if size < 40 else 2.0 if size < 100 else 1.5)
    part = image[top:bottom, left:right]
    part[:] = np.rint(color + (1 - alpha[:, :, None]) * part)
