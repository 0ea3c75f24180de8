"""Crops by affine maps and at whole pixels, against OpenCV and the published crops."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from d2ext.layers import affine_crops, truncated_crops
from tests.reference.fixture import Fixture, draw_image

REFERENCE = Path(__file__).parents[1] / "reference" / "hourglass" / "data_and_eval"


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    return draw_image(height, width, seed)


def tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def test_against_opencv() -> None:
    """Rotated, mirrored and half outside; OpenCV rounds positions to 1/32 pixel."""
    image = picture()
    matrices = []
    for angle, scale, x, y in ((0.3, 1.5, 10.0, -5.0), (-1.2, 0.7, 60.0, 50.0), (0.0, -1.0, 40, 3)):
        cos, sin = scale * math.cos(angle), abs(scale) * math.sin(angle)
        matrices.append([[cos, -sin, x], [sin, abs(cos), y]])
    crops = affine_crops(tensor(image)[None], torch.tensor([matrices]), (40, 50))[0]
    assert crops.shape == (3, 3, 40, 50) and crops.dtype == torch.float32
    for crop, matrix in zip(crops, np.array(matrices), strict=True):
        indices = matrix.copy()
        indices[:, 2] += indices[:, :2].sum(axis=1) * 0.5 - 0.5
        expected = cv2.warpAffine(
            image.astype(np.float32),
            indices,
            (50, 40),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        )
        difference = np.abs(crop.permute(1, 2, 0).numpy() - expected)
        assert difference.mean() < 0.1 and np.median(difference) < 0.05
        assert (expected == 0).all(axis=2).any()  # a part lies outside


def test_identity_and_border() -> None:
    image = tensor(picture(7, 9)).float()
    identity = torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]])
    torch.testing.assert_close(affine_crops(image[None], identity, (7, 9))[0, 0], image)
    half = identity.clone()
    half[..., 0, 2] = 0.5  # half a pixel to the right: the last column mixes with black
    shifted = affine_crops(image[None], half, (7, 9))[0, 0]
    torch.testing.assert_close(shifted[..., :-1], (image[..., 1:] + image[..., :-1]) / 2)
    torch.testing.assert_close(shifted[..., -1], image[..., -1] / 2)


def test_many_images_and_crops_are_each_their_own() -> None:
    images = torch.stack([tensor(picture(seed=i)) for i in range(3)])
    matrices = torch.rand(3, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    matrices[..., 2] *= 30
    together = affine_crops(images, matrices, (8, 6))
    assert together.shape == (3, 4, 3, 8, 6)
    for i in range(3):
        for j in range(4):
            alone = affine_crops(images[i : i + 1], matrices[i : i + 1, j : j + 1], (8, 6))
            torch.testing.assert_close(alone[0, 0], together[i, j])


@pytest.mark.parametrize("number", range(3))
def test_published_crops(number: int) -> None:
    fixture = Fixture(REFERENCE)
    center, scale = (
        ((186.4, 205.9), 1.613),
        ((15.45, 380.85), 1.217),
        ((330.2, 30.4), 0.7731),
    )[number]
    image = tensor(draw_image(400, 360, 3)[:, :, ::-1])
    (x, y), half = center, 100 * scale
    boxes = torch.tensor([[[x - half, y - half, x + half, y + half]]], dtype=torch.float64)
    found = truncated_crops(image[None], boxes, (256, 256))[0, 0]
    assert fixture.compare(f"crop_{number}", found.numpy()) < 1e-4
    # The exact crop is another one.
    matrix = torch.tensor([[[[2 * half / 256, 0, x - half], [0, 2 * half / 256, y - half]]]])
    exact = affine_crops(image[None], matrix, (256, 256))[0, 0]
    assert fixture.compare(f"crop_{number}", exact.numpy()) > 1e-3


def test_truncated_crops_of_nothing() -> None:
    image = tensor(picture())[None]
    boxes = torch.tensor([[[5.2, 5.2, 5.9, 5.9], [-90.0, -90.0, -20.0, -20.0]]])
    crops = truncated_crops(image, boxes, (8, 8))
    assert crops.isfinite().all() and crops[0, 1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_types_and_strides(dtype: torch.dtype) -> None:
    image = tensor(picture()).to(dtype)[None]
    matrices = torch.tensor([[[[1.1, 0.1, 3.0], [0.0, 0.9, 5.0]]]], dtype=torch.float64)
    expected = affine_crops(image.float(), matrices.float(), (9, 7))
    strided = image.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(affine_crops(strided, matrices, (9, 7)), expected)


def test_empty() -> None:
    images = torch.zeros(2, 3, 5, 5)
    assert affine_crops(images, torch.zeros(2, 0, 2, 3), (4, 6)).shape == (2, 0, 3, 4, 6)
    assert truncated_crops(images[:0], torch.zeros(0, 3, 4), (4, 6)).shape == (0, 3, 3, 4, 6)
    assert affine_crops(images[..., :0], torch.zeros(2, 1, 2, 3), (4, 6)).eq(0).all()


def test_wrong_shapes_are_told() -> None:
    images = torch.zeros(2, 3, 5, 5)
    for function, places in (
        (affine_crops, torch.zeros(2, 2, 3)),
        (affine_crops, torch.zeros(1, 4, 2, 3)),
        (affine_crops, torch.zeros(2, 4, 3, 3)),
        (truncated_crops, torch.zeros(2, 4, 2)),
    ):
        with pytest.raises(ValueError, match="Crops take images"):
            function(images, places, (4, 4))
    with pytest.raises(ValueError, match="Crops take images"):
        affine_crops(images[0], torch.zeros(2, 4, 2, 3), (4, 4))
