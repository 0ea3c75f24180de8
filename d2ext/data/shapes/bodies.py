"""Pictures of persons: the image, and for every pixel which point of whose surface it shows."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

from d2ext.data.shapes.body_mesh import body_mesh
from d2ext.data.shapes.body_paint import (
    CHART,
    BodyLook,
    paint_charts,
    vertex_normals,
    vertex_shade,
)
from d2ext.data.shapes.body_pose import BodyPose, pose_vertices
from d2ext.data.shapes.body_raster import Shown, shown_points
from d2ext.data.shapes.face_paint import Light
from d2ext.data.shapes.items import Cover, ItemFrame

__all__ = ["Body", "BodyFrame", "SurfaceMap"]


@dataclass(frozen=True)
class Body:
    """A person in the picture, under weak perspective.

    Attributes:
        turn: (3, 3) before the camera, as :func:`~d2ext.data.shapes.body_pose.view` gives.
        scale: pixels per metre.
        centre: x, y of the pelvis, pixels.
        annotated: whether somebody marked points on the person; otherwise there are a box and a
            mask.
    """

    pose: BodyPose
    look: BodyLook
    turn: np.ndarray
    scale: float
    centre: tuple[float, float]
    annotated: bool = True

    @cached_property
    def _posed(self) -> tuple[np.ndarray, np.ndarray]:
        """(V, 3) vertices from the pelvis, pixels; (V, 3) normals; both before the camera."""
        vertices = pose_vertices(self.pose)
        normals = vertex_normals(vertices) @ self.turn.T
        return (vertices - body_mesh().joints[0]) @ self.turn.T * self.scale, normals

    @property
    def points(self) -> np.ndarray:
        """(V, 3) float64: x, y in pixels, z in pixels, larger is farther away."""
        return self._posed[0] + (*self.centre, 0.0)

    @property
    def normals(self) -> np.ndarray:
        """(V, 3) outwards, before the camera."""
        return self._posed[1]

    @cached_property
    def window(self) -> tuple[int, int, int, int]:
        """left, top, width, height of all of the person, also outside of the picture."""
        points = self.points[:, :2]
        left, top = np.floor(points.min(axis=0)).astype(int).tolist()
        right, bottom = np.ceil(points.max(axis=0)).astype(int).tolist()
        return left, top, max(right - left, 1), max(bottom - top, 1)

    @cached_property
    def shown(self) -> Shown:
        """What the pixels of the window show, if nothing is in front."""
        return shown_points(self.points, body_mesh().triangles, self.window)

    def moved(self, x: int, y: int) -> "Body":
        """The same person so many whole pixels away: quicker than a new one."""
        body = replace(self, centre=(self.centre[0] + x, self.centre[1] + y))
        left, top, width, height = self.window
        body.__dict__["window"] = (left + x, top + y, width, height)
        body.__dict__.update(shown=self.shown, _posed=self._posed)
        return body

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column in the picture, which may lie outside, of what is shown."""
        left, top, width, _ = self.window
        row, column = np.divmod(self.shown.pixels, width)
        return row + top, column + left


class SurfaceMap(NamedTuple):
    """The n visible pixels of a person."""

    rows: np.ndarray
    """(n,) int64 in the picture."""
    columns: np.ndarray
    """(n,) int64 in the picture."""
    parts: np.ndarray
    """(n,) int64 fine part 1..24."""
    uv: np.ndarray
    """(n, 2) float64 U, V in [0, 1] at the pixel's centre."""
    vertices: np.ndarray
    """(n,) int64: the nearest corner of the triangle that the pixel shows."""


class BodyFrame(ItemFrame[Body]):
    """A picture of persons; see :class:`ItemFrame`."""

    @cached_property
    def front(self) -> np.ndarray:
        """(H, W) uint8: place in `items` of what is in front, plus 1; 0 where none is."""
        front = np.zeros((self.height, self.width), np.uint8)
        for place in range(len(self.items) - 1, -1, -1):
            item = self.items[place]
            if isinstance(item, Cover):
                front[item.raster.window][item.raster.mask > 0] = place + 1
            else:
                rows, columns = item.places()
                within = self._within(rows, columns)
                front[rows[within], columns[within]] = place + 1
        return front

    def _within(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return (rows >= 0) & (rows < self.height) & (columns >= 0) & (columns < self.width)

    @cached_property
    def bodies(self) -> list[int]:
        """Places in `items` of the persons of whom something can be seen."""
        counts = np.bincount(self.front.reshape(-1), minlength=len(self.items) + 1)[1:]
        return [i for i, x in enumerate(self.items) if isinstance(x, Body) and counts[i]]

    def mask(self, item: int) -> np.ndarray:
        """(H, W) uint8: 1 where the item can be seen."""
        return (self.front == item + 1).astype(np.uint8)

    def surface(self, item: int) -> SurfaceMap:
        """What can be seen of a person.

        Raises:
            ValueError: it is something else
        """
        body = self.items[item]
        if not isinstance(body, Body):
            raise ValueError(f"item {item} of the picture is no person")
        mesh, shown = body_mesh(), body.shown
        rows, columns = body.places()
        seen = self._within(rows, columns)
        seen[seen] = self.front[rows[seen], columns[seen]] == item + 1
        triangles, weights = shown.triangles[seen], shown.weights[seen]
        nearest = mesh.triangles[triangles, weights.argmax(axis=1)]
        uv = np.einsum("nk,nkc->nc", weights, mesh.uv[triangles])
        return SurfaceMap(rows[seen], columns[seen], mesh.parts[triangles], uv, nearest)

    def _paint_solid(self, image: np.ndarray, item: Body) -> None:
        _paint_body(image, item, self.light)


def _paint_body(image: np.ndarray, body: Body, light: Light) -> None:
    """Blend a person over `image`, in place."""
    left, top, width, height = body.window
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, image.shape[1]), min(top + height, image.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    factor = 3 if height < 80 else 2
    window, mesh = (x0, y0, x1 - x0, y1 - y0), body_mesh()
    shown = shown_points(body.points, mesh.triangles, window, factor)
    uv = np.einsum("nk,nkc->nc", shown.weights, mesh.uv[shown.triangles])
    column, row = np.minimum((uv * CHART).astype(np.int64), CHART - 1).T
    color = paint_charts(body.look)[mesh.parts[shown.triangles], row, column]
    shade = vertex_shade(body.normals, light)[mesh.triangles[shown.triangles]]
    color *= np.einsum("nk,nk->n", shown.weights, shade)[:, None]
    canvas = np.zeros((window[3] * factor * window[2] * factor, 4), np.float32)
    canvas[shown.pixels, :3] = np.clip(color, 0, 255)
    canvas[shown.pixels, 3] = 1
    fine = canvas.reshape(window[3] * factor, window[2] * factor, 4)
    small = cv2.resize(fine, window[2:], interpolation=cv2.INTER_AREA)
    part = image[y0:y1, x0:x1]
    part[:] = np.rint(small[:, :, :3] + (1 - small[:, :, 3:]) * part)
