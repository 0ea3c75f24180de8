"""Resampling as OpenCV does it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from d2ext.layers.opencv_resample import (
    resize_crops_like_opencv,
    resize_float_like_opencv,
    resize_like_opencv,
    warp_like_opencv,
)


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((40, 60), (20, 30)),
        ((40, 60), (50, 75)),
        ((33, 47), (100, 9)),
        ((1, 1), (5, 7)),
        ((9, 1), (3, 4)),
    ],
)
def test_resize(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = _noise(*old)
    expected = cv2.resize(image, new[::-1])
    actual = resize_like_opencv(_tensor(image), *new)
    assert actual.dtype == torch.uint8
    np.testing.assert_array_equal(actual.permute(1, 2, 0), expected)


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = _tensor(_noise(7, 9))
    assert torch.equal(resize_like_opencv(image, 7, 9), image)
    assert torch.equal(resize_like_opencv(image.float() + 0.2, 7, 9), image)


@pytest.mark.parametrize("size", [28, 7])
def test_resize_of_crops_of_masks(size: int) -> None:
    """Bytes of 0 and 1; crops of all sizes, down to one pixel."""
    rng = np.random.default_rng(0)
    masks = rng.random((4, 40, 60)) > 0.4
    masks[3] = True
    low = rng.integers(0, (60, 40), (60, 2))
    high = np.minimum(low + rng.integers(0, 60, (60, 2)), (59, 39))
    high[:10] = low[:10]
    boxes, index = np.concatenate([low, high], axis=1), rng.integers(0, 4, 60)
    actual = resize_crops_like_opencv(*map(torch.from_numpy, (masks, index, boxes)), size)
    assert actual.shape == (60, size, size) and actual.dtype == torch.bool
    wrong = 0
    for ours, number, (x1, y1, x2, y2) in zip(actual.numpy(), index, boxes, strict=True):
        crop = masks[number, y1 : y2 + 1, x1 : x2 + 1].astype(np.uint8)
        wrong += (ours != cv2.resize(crop, (size, size))).sum()
    assert wrong == 0 and 0.3 < actual.float().mean() < 0.9
    assert actual[index == 3].all()
    nothing = torch.zeros((0, 4), dtype=torch.int64)
    empty = resize_crops_like_opencv(torch.from_numpy(masks), nothing[:, 0], nothing, size)
    assert empty.shape == (0, size, size)


@pytest.mark.parametrize("angle", [0.0, 20.0])
@pytest.mark.parametrize("scale", [0.37, 1.0, 2.3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_warp(angle: float, scale: float, dtype: torch.dtype) -> None:
    image = _noise(50, 70)
    matrix = cv2.getRotationMatrix2D((30.5, 22.0), angle, scale)
    matrix[:, 2] += (44.3, 11.3)  # parts of the result lie outside
    expected = cv2.warpAffine(image, matrix, (80, 60), flags=cv2.INTER_LINEAR)
    inverse = cv2.invertAffineTransform(matrix).tolist()
    actual = warp_like_opencv(_tensor(image).to(dtype), inverse, 60, 80)
    assert actual.dtype == torch.uint8 and (expected == 0).any() and (expected > 0).any()
    difference = np.abs(actual.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001


def test_what_is_no_byte_is_made_one() -> None:
    image = torch.tensor([[[float("nan"), 300.0, -5.0, 12.4]]])
    identity = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert warp_like_opencv(image, identity, 1, 4)[0, 0].tolist() == [0, 255, 0, 12]


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (48, 64, 800 / 480),
        (427, 640, 800 / 427),
        (150, 2100, 1333 / 2100),
        (37, 41, 3.7),
        (37, 41, 0.31),
        (64, 32, 0.5),
        (102, 204, 1.001),  # no size changes, so that nothing does
        (2, 3, 10.0),
        (100, 2, 0.999),
    ],
)
def test_resize_of_floats_by_a_factor(height: int, width: int, scale: float) -> None:
    images = [_noise(height, width, seed).astype(np.float32) - 110.5 for seed in (0, 1)]
    expected = [cv2.resize(x, None, fx=scale, fy=scale) for x in images]
    size = expected[0].shape[:2]
    batch = torch.stack([_tensor(x) for x in images])
    actual = resize_float_like_opencv(batch, size, (scale, scale))
    assert actual.dtype == torch.float32
    # Without IPP (other processors) OpenCV rounds positions to float32.
    tolerance = 1e-4 if cv2.ipp.useIPP() else 0.1
    for ours, published in zip(actual, expected, strict=True):
        assert np.abs(ours.permute(1, 2, 0).numpy() - published).max() < tolerance


def test_resize_of_floats_in_low_precision_computes_in_float32() -> None:
    images = _tensor(_noise(30, 40))[None].to(torch.bfloat16)
    actual = resize_float_like_opencv(images, (50, 67), (5 / 3, 5 / 3))
    assert torch.equal(actual, resize_float_like_opencv(images.float(), (50, 67), (5 / 3, 5 / 3)))
    assert resize_float_like_opencv(images, (30, 40), (1.0, 1.0)).dtype == torch.float32


def test_images_of_a_batch_are_resampled_alike() -> None:
    images = torch.stack([_tensor(_noise(20, 30, seed)) for seed in (0, 1)])
    turned, upright = [[0.8, 0.2, 1.3], [-0.2, 0.8, 2.1]], [[0.8, 0.0, 1.3], [0.0, 0.7, -2.1]]
    for function, arguments in (
        (resize_like_opencv, (25, 17)),
        (warp_like_opencv, (turned, 16, 18)),
        (warp_like_opencv, (upright, 16, 18)),
    ):
        together = function(images, *arguments)
        assert together.shape[:2] == (2, 3) and not torch.equal(together[0], together[1])
        for one, image in zip(together, images, strict=True):
            assert torch.equal(one, function(image, *arguments))


@pytest.mark.parametrize("sides", [(0, 5, 4, 3), (6, 0, 4, 3), (6, 5, 0, 3), (6, 5, 4, 0)])
def test_sides_of_no_pixels_are_named(sides: tuple[int, int, int, int]) -> None:
    image, new = torch.zeros(3, *sides[:2]), sides[2:]
    for run in (
        lambda: resize_like_opencv(image, *new),
        lambda: resize_float_like_opencv(image[None], new, (0.5, 0.5)),
        lambda: warp_like_opencv(image, [[1, 0, 0], [0, 1, 0]], *new),
    ):
        with pytest.raises(ValueError, match="at least one pixel"):
            run()
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one pixel"):
        resize_crops_like_opencv(torch.zeros(1, 4, 4, dtype=torch.bool), *nothing, 0)
