"""Pictures of faces' meshes and five points, thin enough that a face can still be recognised."""

from __future__ import annotations

import math

import cv2
import numpy as np
from torch import Tensor

# RGB.
_MESH = (90, 255, 190)
_POINTS = ((255, 60, 60), (60, 120, 255), (60, 230, 60), (255, 70, 255), (255, 220, 0))
# Binary digits behind the point of OpenCV's coordinates; pixels beyond this are cut to it.
_SHIFT, _FAR = 4, 30000.0
# Opacity of lines. Where they lie next to each other they would hide the face: if the edges' mean length
# is below so many pixels, they get thinner and paler in proportion, down to these parts; dots smaller.
_OPACITY, _DENSE = 0.6, 12.0
_THINNEST, _PALEST = 0.25, 0.3


def draw_meshes(image: np.ndarray, meshes: Tensor, triangles: np.ndarray | None) -> np.ndarray:
    """Draw the triangles of meshes that face the camera as wires, or vertices as dots; a new image.

    Args:
        image: (H, W, 3) uint8, RGB.
        meshes: (N, V, 3) on the CPU, x right, y down, z away from the camera, pixels.
        triangles: (T, 3) vertices, counter-clockwise from outside; None: not known.
    """
    result = image.copy()
    for mesh in meshes[:, :, :2].nan_to_num(0.0).clamp(-_FAR, _FAR).double().numpy():
        left, top = np.maximum(np.floor(mesh.min(axis=0)) - 1, 0).astype(int)
        right, bottom = np.minimum(np.ceil(mesh.max(axis=0)) + 2, image.shape[1::-1]).astype(int)
        part = result[top:bottom, left:right]
        if part.size == 0:
            continue
        length = _edge_length(mesh, triangles)
        # Thinner than a pixel: drawn larger.
        factor = math.ceil(1 / min(max(length / _DENSE, _THINNEST), 1))
        lines = np.zeros((factor * part.shape[0], factor * part.shape[1]), np.uint8)
        # OpenCV's whole numbers are the centres of pixels.
        places = (mesh - (left, top)) * factor - 0.5
        places = np.rint(places * (1 << _SHIFT)).astype(np.int32)
        opacity = _OPACITY
        if triangles is None:
            for place in places.tolist():
                cv2.circle(lines, place, 1 << _SHIFT, 255, -1, cv2.LINE_AA, _SHIFT)
        else:
            a, b, c = mesh[triangles].transpose(1, 2, 0)
            facing = (b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0] < 0
            opacity *= min(max(length / _DENSE, _PALEST), 1)
            cv2.polylines(lines, places[triangles[facing]], True, 255, 1, cv2.LINE_AA, _SHIFT)
        lines = cv2.resize(lines, part.shape[1::-1], interpolation=cv2.INTER_AREA)
        alpha = (opacity / 255) * lines[:, :, None]
        part[:] = np.rint(part + alpha * (np.array(_MESH) - part.astype(float)))
    return result


def _edge_length(mesh: np.ndarray, triangles: np.ndarray | None) -> float:
    """Pixels; of vertices alone, what it would be if they lay evenly over their box."""
    if triangles is None:
        return float((np.ptp(mesh, axis=0).prod() / len(mesh)) ** 0.5)
    return float(np.linalg.norm(np.diff(mesh[triangles], axis=1), axis=2).mean())


def draw_five_points(image: np.ndarray, keypoints: Tensor) -> np.ndarray:
    """Mark eyes, nose and mouth corners by dots that grow with the face; a new image.

    Args:
        image: (H, W, 3) uint8, RGB.
        keypoints: (N, 5, 2 or more) on the CPU, pixels.
    """
    result = image.copy()
    for points in keypoints[:, :, :2].nan_to_num(0.0).clamp(-_FAR, _FAR).double().numpy():
        # The points span less than half of a face; its dots are a twentieth of that.
        radius = min(max(np.ptp(points, axis=0).max() / 20, 0.7), 3.0)
        for (x, y), color in zip(points - 0.5, _POINTS, strict=True):
            place = round(x * (1 << _SHIFT)), round(y * (1 << _SHIFT))
            size = round(radius * (1 << _SHIFT))
            cv2.circle(result, place, size, color, -1, cv2.LINE_AA, _SHIFT)
    return result
