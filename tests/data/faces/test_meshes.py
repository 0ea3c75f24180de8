"""Topology, and meshes under transforms."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.data import transforms as T
from fvcore.transforms.transform import TransformList

from d2ext.data.errors import DatasetError
from d2ext.data.faces.meshes import (
    check_mesh,
    mirror_permutation,
    read_topology,
    transform_meshes,
)

# A roof: left, right, top, and a vertex before them.
OBJ = "# roof\nv -1 0 0\nv 1 0 0\nv 0 2 0\nv 0 1 -1\nf 1 2 3\nf 1/1/1 -3//2 3 4\n"


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "head.obj").write_text(text)
    return str(tmp_path / "head.obj")


def test_obj(tmp_path: Path) -> None:
    vertices, triangles = read_topology(write(tmp_path, OBJ))
    assert vertices.shape == (4, 3) and vertices[3].tolist() == [0, 1, -1]
    assert triangles.tolist() == [[0, 1, 2], [0, 1, 2], [0, 2, 3]]
    with pytest.raises(DatasetError, match=r"Line 1 .* no line of an OBJ"):
        read_topology(write(tmp_path, "v 1 2\nf 1 2 3\n"))
    with pytest.raises(DatasetError, match="beyond its 1"):
        read_topology(write(tmp_path, "v 1 2 3\nf 1 2 3\n"))
    with pytest.raises(DatasetError, match="0 vertices"):
        read_topology(write(tmp_path, ""))


def test_mirror() -> None:
    assert mirror_permutation(np.array([[4, 0, 0], [6, 0, 0], [5, 2, 0.0]])) == [1, 0, 2]
    with pytest.raises(DatasetError, match="not symmetric"):
        mirror_permutation(np.array([[0, 0, 0], [6, 0, 0], [5, 2, 0.0]]))


MESHES = np.array([[[10, 20, -4], [30, 20, 2], [22, 40, 2.0]]])


def test_resize_and_flip() -> None:
    transforms = TransformList([T.ResizeTransform(50, 100, 25, 50), T.HFlipTransform(50)])
    result = transform_meshes(MESHES, transforms, [1, 0, 2])
    # The first is still the one on the left of the picture.
    assert result[0].tolist() == [[35, 10, 1], [45, 10, -2], [39, 20, 1]]
    assert MESHES[0, 0].tolist() == [10, 20, -4]


def test_rotation_is_no_mirror() -> None:
    turn = T.RotationTransform(100, 100, 180, expand=False)
    result = transform_meshes(MESHES, TransformList([turn]), [1, 0, 2])
    np.testing.assert_allclose(result[0], [[90, 80, -4], [70, 80, 2], [78, 60, 2]], atol=1e-6)


def test_check() -> None:
    assert check_mesh([1, 2, 3, 4, 5, 6], 2, "x").shape == (2, 3)
    with pytest.raises(DatasetError, match="mesh of x has 1 vertices, the topology 2"):
        check_mesh([1, 2, 3], 2, "x")
    with pytest.raises(DatasetError, match="not finite"):
        check_mesh([1, 2, float("nan")], 1, "x")
    with pytest.raises(DatasetError, match="no list of numbers"):
        check_mesh([1, 2, "c"], 1, "x")
