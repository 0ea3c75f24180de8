"""Affine maps between images, network inputs and output maps (CenterNet, arXiv 1904.07850)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Matrices = TypeVar("Matrices", Tensor, np.ndarray)


def affine_matrix(
    center: Sequence[float] | np.ndarray,
    side: float,
    size: tuple[int, int],
    rotation: float = 0.0,
) -> np.ndarray:
    """Map of a window of the image onto the result, with one scale for both axes.

    Args:
        center: (x, y) of the window in the image, pixels.
        side: its width in pixels, positive. (Published code that gives width and height uses the
            width only.)
        size: (width, height) of the result in pixels; ``center`` goes to its middle.
        rotation: of the window, in degrees, clockwise where y points down.

    Returns:
        (2, 3) float64, image to result: (x, y, 1) → (x', y').
    """
    width, height = size
    angle = np.deg2rad(rotation)
    scale = width / side
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[cosine, sine], [-sine, cosine]])
    shift: np.ndarray = np.array([width / 2, height / 2]) - linear @ np.asarray(
        center, dtype=np.float64
    )
    return np.concatenate([linear, shift[:, None]], axis=1)


def invert_affine(matrices: Matrices) -> Matrices:
    """Maps (..., 2, 3), a tensor or an array → the (..., 2, 3) maps back."""
    if isinstance(matrices, Tensor):
        inverse = torch.linalg.inv(matrices[..., :2])
        return torch.cat([inverse, -inverse @ matrices[..., 2:]], dim=-1)
    linear = np.linalg.inv(matrices[..., :2])
    return np.concatenate([linear, -linear @ matrices[..., 2:]], axis=-1)
