"""Vertices and triangles of meshes on the charts of a body."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from d2ext.data.densepose.charts import (
    ChartTriangles,
    ChartVertices,
    read_chart_triangles,
    read_chart_vertices,
)
from d2ext.data.errors import DatasetError
from d2ext.data.shapes.body_mesh import body_mesh
from d2ext.data.shapes.body_tables import body_npz, chart_vertices
from tests.reference.fixture import Fixture

REFERENCE = Path(__file__).parents[2] / "reference" / "densepose"


def test_vertices_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Fixture(REFERENCE / "result_structures")
    inputs, expected = fixture.manifest["inputs"], fixture.expected
    mesh = {k.removeprefix("input.mesh."): x for k, x in expected.items() if "mesh" in k}
    uv = np.stack([mesh["u"], mesh["v"]], axis=1).astype(np.float64)
    charts = ChartVertices(mesh["part"], uv, mesh["transform"] - 1)
    monkeypatch.setattr("d2ext.data.densepose.charts._CHUNK", 50)
    for k in (0, 1):
        parts, u, v = expected[f"points{k}.iuv"].astype(np.int64)
        vertices = charts.mesh_vertices(parts, u / 255, v / 255)
        assert np.array_equal(vertices + 1, expected[f"points{k}.base_vertex"])
    given = np.array(inputs["given_parts_of_points0"]).astype(np.int64)
    _, u, v = expected["points0.iuv"] / 255
    vertices = charts.mesh_vertices(given, u, v)
    assert np.array_equal(vertices + 1, expected["points0.base_vertex_with_given_parts"])
    parts, u, v = (np.array(inputs["annotation"][f"dp_{key}"]) for key in "IUV")
    vertices = charts.mesh_vertices(parts.astype(np.int64), u, v)
    assert np.array_equal(vertices + 1, expected["annotation.base_vertex"])


def test_published_files(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    subdivided = {
        "U_subdiv": [[0.1, 0.9, 0.5]],
        "V_subdiv": [[0.2, 0.8, 0.5]],
        "Part_ID_subdiv": [[3, 3, 4]],
    }
    scipy_io.savemat(tmp_path / "SMPL_subdiv.mat", subdivided)
    with pytest.raises(DatasetError, match="SMPL_SUBDIV_TRANSFORM"):
        read_chart_vertices(tmp_path / "SMPL_subdiv.mat")
    scipy_io.savemat(tmp_path / "SMPL_SUBDIV_TRANSFORM.mat", {"index": [[7, 0, 8]]})
    charts = read_chart_vertices(tmp_path / "SMPL_subdiv.mat")
    parts = np.array([3, 3, 4, 0, 5])
    found = charts.mesh_vertices(parts, np.full(5, 0.7), np.full(5, 0.6))
    assert found.tolist() == [-1, -1, 7, -1, -1]
    assert charts.mesh_vertices(np.array([3]), np.zeros(1), np.zeros(1)).tolist() == [6]

    processed = {
        "All_Faces": [[1, 2, 3], [2, 4, 3], [5, 6, 7]],
        "All_FaceIndices": [[1], [1], [2]],
        "All_U_norm": [[0.0], [1.0], [0.0], [1.0], [0.0], [1.0], [0.0]],
        "All_V_norm": [[0.0], [0.0], [1.0], [1.0], [0.0], [0.0], [1.0]],
        "All_vertices": [[1, 2, 3, 4, 2, 1, 5]],
    }
    scipy_io.savemat(tmp_path / "UV_Processed.mat", processed)
    triangles = read_chart_triangles(tmp_path / "UV_Processed.mat")
    places = triangles.locate(
        np.array([1, 1, 2, 2]), np.array([0.25, 1, 0.5, 0.9]), np.array([0.25, 1, 0.25, 0.9])
    )
    assert places.vertices.tolist() == [[0, 1, 2], [1, 3, 2], [1, 0, 4], [1, 0, 4]]
    # The last lies outside: its nearest corner, of two the first.
    expected = [[0.5, 0.25, 0.25], [0, 1, 0], [0.25, 0.5, 0.25], [0, 1, 0]]
    np.testing.assert_allclose(places.weights, expected, atol=1e-12)
    body = np.eye(5)[:, :3]
    np.testing.assert_allclose(places.positions(body)[0], [0.5, 0.25, 0.25])
    assert places.nearest.tolist() == [0, 3, 0, 0]
    assert triangles.positions is None
    with pytest.raises(DatasetError, match="no triangle on part 9"):
        triangles.locate(np.array([9]), np.zeros(1), np.zeros(1))
    with pytest.raises(DatasetError, match="no triangles"):
        read_chart_triangles(tmp_path / "SMPL_subdiv.mat")
    with pytest.raises(DatasetError, match="it is not the mesh"):
        read_chart_vertices(tmp_path / "UV_Processed.mat")


def test_points_of_the_shapes_body(tmp_path: Path) -> None:
    """Back from U, V of random points in random triangles to their places."""
    path = tmp_path / "body.npz"
    path.write_bytes(body_npz())
    triangles: ChartTriangles = read_chart_triangles(path)
    mesh, rng = body_mesh(), np.random.default_rng(0)
    # Each triangle lies on one chart.
    assert len(triangles.parts) == len(mesh.triangles)
    selected = rng.integers(len(mesh.triangles), size=500)
    weights = rng.dirichlet(np.ones(3), size=500)
    uv = np.einsum("nk,nkc->nc", weights, mesh.uv[selected])
    expected = np.einsum("nk,nkc->nc", weights, mesh.vertices[mesh.triangles[selected]])
    assert triangles.positions is not None
    found = triangles.locate(mesh.parts[selected], *uv.T).positions(triangles.positions)
    np.testing.assert_allclose(found, expected, atol=1e-5)

    charts = read_chart_vertices(path)
    vertices, parts, uv = chart_vertices()
    assert np.array_equal(charts.mesh_vertices(parts, *uv.T), vertices)
