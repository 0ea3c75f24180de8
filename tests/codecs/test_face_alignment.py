"""Similarities of points: poses of meshes, aligned crops."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from d2ext.codecs.face_alignment import (
    ARCFACE_POINTS,
    ARCFACE_SIZE,
    crop_matrices,
    face_poses,
    fit_similarity,
)
from d2ext.data.shapes.face_mesh import HeadShape, head_vertices, rotation

MEAN = torch.from_numpy(head_vertices(HeadShape()))


def _turned(head: np.ndarray, *degrees: float) -> torch.Tensor:
    """Vertices of a head, 60 pixels high, somewhere in a picture."""
    matrix = rotation(*(math.radians(x) for x in degrees))
    return torch.from_numpy(30 * head @ matrix.T + [100, 50, 7]).float()


def test_poses_of_the_mean_head() -> None:
    poses = [(y, p, r) for y in (-75, -30, 0, 45, 75) for p in (-30, 0, 20) for r in (-170, 0, 90)]
    meshes = torch.stack([_turned(MEAN.numpy(), *pose) for pose in poses])
    torch.testing.assert_close(
        face_poses(meshes, MEAN), torch.tensor(poses).float(), atol=1e-3, rtol=0
    )
    assert face_poses(meshes[:0], MEAN).shape == (0, 3)


def test_signs_are_those_of_the_picture() -> None:
    """Where the tip of the nose goes, seen from between the ears."""
    nose = int(MEAN[:, 2].argmin())
    for pose, expected in (((40, 0, 0), (1, 0)), ((0, 25, 0), (0, 1)), ((-40, 0, 0), (-1, 0))):
        moved = (_turned(MEAN.numpy(), *pose) - _turned(MEAN.numpy(), 0, 0, 0))[nose, :2]
        assert moved.abs().max() > 5
        assert (moved / moved.abs().max()).round().tolist() == list(expected), pose
    left, right = int(MEAN[:, 0].argmin()), int(MEAN[:, 0].argmax())
    tilted = _turned(MEAN.numpy(), 0, 0, 30)
    assert tilted[right, 1] > tilted[left, 1]  # clockwise


@pytest.mark.parametrize("yaw", [-75, 0, 75])
def test_poses_of_other_heads_that_pull_faces(yaw: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        names = ("jaw_width", "chin", "nose_height", "cheeks", "smile")
        values = {name: rng.uniform(-1, 1) for name in names}
        head = head_vertices(HeadShape(**values, mouth_open=0.5))
        (found,) = face_poses(_turned(head, yaw, 10, -20)[None], MEAN)
        assert (found - torch.tensor([yaw, 10.0, -20.0])).abs().max() < 5


def test_a_mesh_that_is_no_number_has_some_pose() -> None:
    meshes = torch.full((2, len(MEAN), 3), torch.nan)
    meshes[1] = torch.inf
    assert face_poses(meshes, MEAN).isfinite().all()


def test_known_similarities_come_back() -> None:
    rng = np.random.default_rng(0)
    template = torch.tensor(ARCFACE_POINTS, dtype=torch.float64)
    for angle in (0, 35, 90, 180, 270):  # also faces that stand on their heads
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        scale, shift = rng.uniform(0.2, 5), torch.from_numpy(rng.uniform(-300, 300, 2))
        matrix = scale * torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        points = template @ matrix.T + shift  # where the image has them
        inverse = torch.linalg.inv(matrix)
        expected = torch.cat([inverse, -(inverse @ shift)[:, None]], dim=1)
        (found,) = crop_matrices(points[None])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_never_mirrored_and_best() -> None:
    generator = torch.Generator().manual_seed(0)
    template = torch.tensor(ARCFACE_POINTS)
    mirrored = template * torch.tensor([-1, 1])
    points = torch.cat([mirrored[None], torch.rand(50, 5, 2, generator=generator) * 100])
    matrices = crop_matrices(points).float()
    assert (matrices[:, :, :2].det() >= 0).all()

    def error(matrices: torch.Tensor) -> torch.Tensor:
        moved = points @ matrices[:, :, :2].transpose(1, 2) + matrices[:, None, :, 2]
        return (moved - template).square().sum(dim=(1, 2))

    best = error(matrices)
    for _ in range(50):  # no similarity nearby is better
        a, b = (
            1 + 0.02 * torch.randn(2, generator=generator),
            0.02 * torch.randn(1, generator=generator),
        )
        turn = torch.stack([torch.stack([a[0], -b[0]]), torch.stack([b[0], a[0]])])
        others = turn @ matrices
        others[:, :, 2] += 0.1 * torch.randn(2, generator=generator)
        assert (error(others) >= best - 1e-2).all()


def test_points_in_one_place() -> None:
    matrices = crop_matrices(torch.full((1, 5, 2), 7.0))
    assert (
        matrices.isfinite().all()
        and fit_similarity(torch.zeros(5, 2), torch.rand(1, 5, 2)).scale == 0
    )
    size = (ARCFACE_SIZE, ARCFACE_SIZE)
    assert cv2.warpAffine(np.zeros((9, 9, 3), np.uint8), matrices[0].numpy(), size).shape == (
        112,
        112,
        3,
    )
    assert crop_matrices(torch.zeros(0, 5, 2)).shape == (0, 2, 3)
