"""Optical flow files, and flow under geometric transforms."""

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, HFlipTransform, NoOpTransform, TransformList

from d2ext.data import ImageReadError
from d2ext.data.augmentations.affine import WarpTransform
from d2ext.data.augmentations.expand import ExpandTransform
from d2ext.data.augmentations.resize import BilinearResizeTransform
from d2ext.data.shapes.video import flow_bytes
from d2ext.data.video.flow import read_flow, transform_flow

HEIGHT, WIDTH = 6, 8


@pytest.fixture
def flow():
    flow = np.random.default_rng(0).normal(size=(HEIGHT, WIDTH, 2)).astype(np.float32)
    flow[1, 2] = np.nan
    return flow


def test_files_of_opencv_are_read(tmp_path, flow):
    flow[1, 2] = 0
    assert cv2.writeOpticalFlow(str(tmp_path / "x.flo"), flow)
    np.testing.assert_array_equal(read_flow(str(tmp_path / "x.flo")), flow)


def test_the_real_pair(real_data):
    flow = read_flow(str(real_data / "flow/RubberWhale/flow10.flo"))
    assert flow.shape == (388, 584, 2)
    known = ~np.isnan(flow).any(axis=2)
    assert known.mean() == pytest.approx(0.984, abs=5e-4)
    assert np.linalg.norm(flow[known], axis=1).mean() == pytest.approx(1.256, abs=5e-4)


@pytest.mark.parametrize("data", [b"", b"PIEH", b"x" * 40, flow_bytes(np.zeros((4, 5, 2)))[:-1]])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "x.flo").write_bytes(data)
    with pytest.raises(ImageReadError, match=r"x\.flo"):
        read_flow(str(tmp_path / "x.flo"))
    with pytest.raises(ImageReadError, match="Cannot read optical flow"):
        read_flow(str(tmp_path / "none.flo"))


def expected(flow, transform, height, width):
    """By the definition, pixel by pixel: where the transform puts a source pixel's centre and the place
    that its flow leads to."""
    result = np.full((height, width, 2), np.nan)
    for row in range(flow.shape[0]):
        for column in range(flow.shape[1]):
            here = np.array([[column + 0.5, row + 0.5]])
            there = here + flow[row, column]
            new = transform.apply_coords(here.copy())[0]
            x, y = np.floor(new + 1e-9).astype(int)
            if 0 <= x < width and 0 <= y < height:
                result[y, x] = transform.apply_coords(there.astype(float))[0] - new
    return result


@pytest.mark.parametrize(
    "transform, size",
    [
        (NoOpTransform(), (6, 8)),
        (HFlipTransform(WIDTH), (6, 8)),
        (CropTransform(2, 1, 5, 4), (4, 5)),
        (ExpandTransform(WIDTH, HEIGHT, 3, 2, 14, 11, fill=[0, 0, 0]), (11, 14)),
        (TransformList([HFlipTransform(WIDTH), CropTransform(0, 2, 3, 4)]), (4, 3)),
    ],
    ids=["none", "flip", "crop", "expand", "flip and crop"],
)
def test_pixels_keep_their_motion(flow, transform, size):
    moved, valid = transform_flow(flow, transform, *size)
    assert moved.shape == (2, *size) and moved.dtype == np.float32 and valid.shape == size
    want = expected(flow, transform, *size)
    np.testing.assert_array_equal(valid, ~np.isnan(want).any(axis=2))
    np.testing.assert_allclose(moved.transpose(1, 2, 0)[valid], want[valid], atol=1e-5)
    assert (moved[:, ~valid] == 0).all()


@pytest.mark.parametrize(
    "transform",
    [
        BilinearResizeTransform(HEIGHT, WIDTH, 18, 16),
        T.ResizeTransform(HEIGHT, WIDTH, 18, 16),
        # Of pixel indices: pixel 0 becomes pixels 0 and 1, whose middle is 0.5.
        WarpTransform(np.array([[2.0, 0, 0.5], [0, 3, 1.0]]), WIDTH, HEIGHT, 16, 18),
    ],
    ids=["bilinear", "detectron2", "warp"],
)
def test_resizing_scales_the_motion(flow, transform):
    moved, valid = transform_flow(flow, transform, 18, 16)
    want = np.repeat(np.repeat(flow, 3, axis=0), 2, axis=1) * [2, 3]
    np.testing.assert_array_equal(valid, ~np.isnan(want).any(axis=2))
    np.testing.assert_allclose(moved.transpose(1, 2, 0)[valid], want[valid], rtol=1e-6)


def test_rotation_turns_the_motion():
    flow = np.full((9, 9, 2), (2.0, 0.0), np.float32)
    turn = T.RotationTransform(9, 9, 90, expand=False)
    moved, valid = transform_flow(flow, turn, 9, 9)
    assert valid[1:-1, 1:-1].all()
    np.testing.assert_allclose(moved[0, 1:-1, 1:-1], 0, atol=1e-5)
    np.testing.assert_allclose(moved[1, 1:-1, 1:-1], -2, atol=1e-5)  # y points down
