"""The mesh of `shapes` bodies: charts, parts, bones, geodesics, files."""

import io
import math

import numpy as np
import pytest

from d2ext.data.densepose import MIRRORED_PARTS
from d2ext.data.densepose.parts import COARSE_PARTS
from d2ext.data.shapes.body_mesh import BONES, body_mesh, mirror_chart
from d2ext.data.shapes.body_pose import BodyPose, pose_vertices
from d2ext.data.shapes.body_tables import (
    body_geodesics,
    body_npz,
    chart_vertices,
    geodesics,
    geodesics_npy,
)

A_POSE = BodyPose(np.zeros((15, 3)), np.ones(15))
FLIP = np.array([-1.0, 1, 1])

# The mesh.


def test_mesh_is_closed_and_a_persons():
    mesh = body_mesh()
    edges = {(a, b) for t in mesh.triangles.tolist() for a, b in zip(t, t[1:] + t[:1], strict=True)}
    assert len(edges) == 3 * len(mesh.triangles)
    assert all((b, a) in edges for a, b in edges)
    assert set(mesh.triangles.reshape(-1)) == set(range(len(mesh.vertices)))
    assert len(mesh.vertices) - len(edges) // 2 + len(mesh.triangles) == 2  # a sphere, no holes
    assert mesh.vertices[:, 1].min() == -1.75 and -0.01 < mesh.vertices[:, 1].max() < 0
    a, b, c = (mesh.vertices[mesh.triangles[:, i]] for i in range(3))
    volume = np.einsum("ij,ij->i", np.cross(a, b), c).sum() / 6
    assert 0.055 < volume < 0.08  # outwards; people have as many tonnes
    np.testing.assert_allclose(mesh.weights.sum(axis=1), 1)


def test_mesh_is_its_mirror_image():
    mesh = body_mesh()
    np.testing.assert_allclose(mesh.vertices[mesh.mirror], mesh.vertices * FLIP, atol=1e-12)
    assert (mesh.mirror[mesh.mirror] == np.arange(len(mesh.mirror))).all()
    corners = {}
    for t, part, uv in zip(mesh.triangles.tolist(), mesh.parts.tolist(), mesh.uv, strict=True):
        corners[frozenset(t)] = part, dict(zip(t, uv, strict=True))
    for t, (part, uv) in corners.items():
        other, mirrored = corners[frozenset(mesh.mirror[list(t)].tolist())]
        assert other == MIRRORED_PARTS[part]
        for v in t:
            np.testing.assert_allclose(mirror_chart(part, uv[v]), mirrored[mesh.mirror[v]])


def test_charts_cover_their_squares_once():
    mesh = body_mesh()
    for part in range(1, 25):
        uv = mesh.uv[mesh.parts == part]
        np.testing.assert_array_equal(uv.min(axis=(0, 1)), 0)
        np.testing.assert_array_equal(uv.max(axis=(0, 1)), 1)
        (ux, uy), (vx, vy) = (uv[:, 1] - uv[:, 0]).T, (uv[:, 2] - uv[:, 0]).T
        area = (ux * vy - uy * vx) / 2
        assert (area > 0).all() or (area < 0).all()  # nothing is folded
        # All but the arms' holes in the torso and a sliver at the crown.
        assert np.abs(area).sum() == pytest.approx(1, abs=0.12 if part <= 2 else 0.02)
        if part > 2:  # charts of left and right differ
            place = np.array([0.2, 0.3])
            assert np.abs(mirror_chart(part, place) - place).max() > 0.05
    # Within a part a vertex has one place: charts do not jump.
    vertices, parts, uv = chart_vertices()
    places = {(p, v): c for p, v, c in zip(parts.tolist(), vertices.tolist(), uv, strict=True)}
    for t, part, c in zip(mesh.triangles.tolist(), mesh.parts.tolist(), mesh.uv, strict=True):
        np.testing.assert_allclose([places[part, v] for v in t], c, atol=1e-12)


def test_parts_are_where_their_names_say():
    mesh = body_mesh()
    centre = np.array(
        [mesh.vertices[mesh.triangles[mesh.parts == p]].mean(axis=(0, 1)) for p in range(1, 25)]
    )
    x, y, z = np.concatenate([np.zeros((1, 3)), centre]).T
    assert z[1] > 0.03 and z[2] < -0.03  # back and front of the torso
    # The person's left is the picture's right: hand 4, foot 5, then even, odd, head 24.
    for left, right in ((4, 3), (5, 6), (8, 7), (10, 9), (12, 11), (14, 13)):
        assert x[left] > 0.05 and x[right] < -0.05
    for left, right in ((15, 16), (17, 18), (19, 20), (21, 22), (24, 23)):
        assert x[left] > 0.01 and x[right] < -0.01
    for back, front in (
        (7, 9),
        (8, 10),
        (11, 13),
        (12, 14),
        (15, 17),
        (16, 18),
        (19, 21),
        (20, 22),
    ):
        assert z[back] > z[front] and COARSE_PARTS[back] == COARSE_PARTS[front]
    assert y[24] < y[15] < y[19] < y[4] and y[4] < y[12] < y[5]
    assert [COARSE_PARTS[p] for p in (2, 3, 4, 5, 6, 9, 10, 14, 17, 21, 23)] == [
        *(1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14)
    ]


def test_bones_move_what_they_should():
    def moved(bone, **angles):
        turned = np.zeros((15, 3))
        turned[BONES.index(bone)] = [
            math.radians(angles.get(n, 0)) for n in ("bent", "spread", "twist")
        ]
        return pose_vertices(BodyPose(turned, np.ones(15))) - rest

    rest, mesh = pose_vertices(A_POSE), body_mesh()
    np.testing.assert_allclose(rest, mesh.vertices, atol=1e-12)
    foot, hand = (
        np.unique(mesh.triangles[mesh.parts == 5]),
        np.unique(mesh.triangles[mesh.parts == 4]),
    )
    other = np.unique(mesh.triangles[mesh.parts == 6])
    leg = moved("left_upper_leg", bent=60)
    assert (leg[foot, 2] < -0.5).all() and np.abs(leg[other]).max() < 1e-9
    assert (moved("left_lower_leg", bent=-60)[foot, 2] > 0.2).all()
    assert (moved("left_lower_arm", bent=60)[hand, 2] < -0.15).all()
    assert (moved("left_upper_arm", spread=60)[hand, 1] < -0.3).all()
    assert (moved("left_upper_arm", twist=40)[hand] ** 2).sum(axis=1).max() < 0.05**2
    thick = pose_vertices(BodyPose(A_POSE.angles, np.full(15, 1.2)))
    assert np.ptp(thick[:, 2]) > 1.05 * np.ptp(rest[:, 2])


# Geodesics and the other tables.


def sphere(rows=12, columns=20):
    """Vertices and triangles of a sphere of radius 1."""
    polar = np.linspace(0, math.pi, rows + 1)[1:-1, None]
    round_ = np.arange(columns) * (2 * math.pi / columns)
    ring = [np.sin(polar) * np.cos(round_), np.sin(polar) * np.sin(round_)]
    grid = np.stack([*ring, np.cos(polar) + 0 * round_], axis=2).reshape(-1, 3)
    n, triangles = len(grid), []
    for c in range(columns):
        d = (c + 1) % columns
        triangles += [(n, c, d), (n + 1, n - columns + d, n - columns + c)]
        for r in range(0, n - columns, columns):
            triangles += [
                (r + c, r + columns + c, r + columns + d),
                (r + c, r + columns + d, r + d),
            ]
    return np.concatenate([grid, [(0, 0, 1), (0, 0, -1)]]), np.array(triangles)


def test_geodesics_of_a_sphere():
    vertices, triangles = sphere()
    exact = np.arccos(np.clip(vertices @ vertices.T, -1, 1))
    error = geodesics(vertices, triangles)[exact > 1e-3] / exact[exact > 1e-3] - 1
    # A polyhedron in a sphere is a little smaller; ways along edges alone are 8 % too long.
    assert error.min() > -0.03 and error.max() < 0.005 and abs(error.mean()) < 0.015
    edges = geodesics(vertices, triangles, 0)[exact > 1e-3] / exact[exact > 1e-3] - 1
    assert edges.mean() > 0.05
    np.testing.assert_allclose(
        geodesics(vertices * 3, triangles), 3 * geodesics(vertices, triangles), rtol=1e-5
    )


def test_geodesics_of_the_body():
    distance, mesh = body_geodesics(), body_mesh()
    assert distance.dtype == np.float32 and np.isfinite(distance).all()
    np.testing.assert_array_equal(distance, distance.T)
    np.testing.assert_allclose(distance[np.ix_(mesh.mirror, mesh.mirror)], distance, rtol=1e-4)
    straight = np.linalg.norm(mesh.vertices[:, None] - mesh.vertices[None], axis=2)
    assert (distance >= straight - 1e-5).all()
    assert ((distance == 0) == np.eye(len(distance), dtype=bool)).all()
    for over in range(0, len(distance), 97):
        assert (distance <= distance[over] + distance[:, over, None] + 1e-5).all()
    crown = mesh.vertices[:, 1].argmin()
    feet = np.unique(mesh.triangles[mesh.parts == 5])
    assert distance[crown, feet].min() > 1.7 and distance[crown, feet].max() < 2.2
    stored = np.load(io.BytesIO(geodesics_npy()))
    for i, j in ((1, 0), (2, 1), (900, 17), (1179, 1178)):
        assert stored[i * (i - 1) // 2 + j] == distance[i, j]
    assert stored.shape == (len(distance) * (len(distance) - 1) // 2,)


def test_mesh_file():
    content, mesh = np.load(io.BytesIO(body_npz())), body_mesh()
    np.testing.assert_allclose(content["vertices"], mesh.vertices, atol=1e-6)
    np.testing.assert_array_equal(content["vertex_transforms"], mesh.mirror)
    assert set(content["chart_vertices"]) == set(range(len(mesh.vertices)))
    features = content["features"]
    assert features.shape == (len(mesh.vertices), 64)
    np.testing.assert_allclose(features.T @ features, len(features) * np.eye(64), atol=0.1)
    # Smooth: the first ones hardly change along an edge, and tell hands and feet apart.
    steps = np.abs(features[mesh.triangles[:, 0]] - features[mesh.triangles[:, 1]])
    assert steps[:, :4].mean() < 0.15 < np.ptp(features[:, :4], axis=0).min()
