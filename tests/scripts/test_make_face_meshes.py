"""scripts/make_face_meshes.py: labels in d2ext's form, whatever finds the meshes."""

from __future__ import annotations

import importlib.util
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2ext.data.faces import load_faces, mirror_permutation, read_topology

ROOT = Path(__file__).resolve().parents[2]
# A grid of 18 rows and 27 columns has the numbers that the five points are taken from.
ROWS, COLUMNS = 18, 27


def grid_triangles() -> np.ndarray:
    """Mirror images of each other left and right of the middle column, turned alike."""
    triangles = []
    for row in range(ROWS - 1):
        for column in range(COLUMNS - 1):
            a = row * COLUMNS + column
            b, c, d = a + 1, a + COLUMNS, a + COLUMNS + 1
            left = column < COLUMNS // 2
            triangles += [(a, b, c), (b, d, c)] if left else [(a, b, d), (a, d, c)]
    return np.array(triangles)


def grid(x0: float, y0: float, width: float, height: float) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 1, COLUMNS), np.linspace(0, 1, ROWS))
    z = 4 * (x - 0.5) ** 2
    mesh = np.stack([x0 + width * x, y0 + height * y, 5 * z], axis=-1).reshape(-1, 3)
    return mesh - (0, 0, mesh[:, 2].mean())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with faces where an image is white instead of mediapipe's."""
    path = ROOT / "scripts/make_face_meshes.py"
    spec = importlib.util.spec_from_file_location("make_face_meshes", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def meshes(image: np.ndarray) -> np.ndarray:
        ys, xs = np.nonzero(image.mean(axis=2) > 200)
        found = [grid(xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)] if len(xs) else []
        return np.array(found).reshape(-1, ROWS * COLUMNS, 3)

    @contextmanager
    def open_mesher(model: str, max_faces: int) -> Any:
        yield meshes, grid_triangles()

    monkeypatch.setattr(module, "open_mesher", open_mesher)
    middle = (COLUMNS // 2, COLUMNS + COLUMNS // 2)
    monkeypatch.setattr(module.mirror_partners, "__defaults__", (middle,))
    return module


def write_photos(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    for name, box in (("sub/a.png", (60, 70, 90, 110)), ("b.png", None)):
        image = np.zeros((120, 100, 3), np.uint8)
        if box:
            image[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(image).save(folder / name)


def test_faces_of_photos(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_photos(tmp_path / "photos")
    words = [str(tmp_path / "photos"), str(tmp_path / "faces.json"), "--model", "m"]
    script.main([*words, "--draw", str(tmp_path / "drawn")])
    assert "2 images, 1 faces, 1 meshes" in capsys.readouterr().out
    records = load_faces(str(tmp_path / "faces.json"), str(tmp_path / "photos"))
    (face,) = records[1]["annotations"]
    assert records[1]["file_name"].endswith("photos/sub/a.png") and not records[0]["annotations"]
    np.testing.assert_allclose(face["bbox"], [60, 70, 90, 110])
    np.testing.assert_allclose(face["mesh"], grid(60, 70, 30, 40), atol=0.01)
    np.testing.assert_allclose(face["keypoints"][6:8], face["mesh"][1, :2], atol=0.01)  # the nose
    vertices, triangles = read_topology(str(tmp_path / "faces.obj"))
    np.testing.assert_array_equal(triangles, grid_triangles())
    (category,) = json.loads((tmp_path / "faces.json").read_text())["categories"]
    expected = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)[:, ::-1].ravel().tolist()
    assert category["mesh_flip"] == mirror_permutation(vertices) == expected
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_known_faces_keep_boxes_and_points(script: Any, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    points = " ".join(["31 42 0"] * 5)
    text = f"# sub/a.png\n62 68 30 40 {points} 0\n1 2 30 9\n# b.png\n10 10 50 50\n"
    (tmp_path / "label.txt").write_text(text)
    words = [str(tmp_path / "photos"), str(tmp_path / "faces.json"), "--model", "m"]
    script.main([*words, "--annotations", str(tmp_path / "label.txt"), "--min-size", "20"])
    records = load_faces(str(tmp_path / "faces.json"), str(tmp_path / "photos"))
    first, tiny = records[0]["annotations"]
    assert first["bbox"] == [62, 68, 92, 108] and first["keypoints"] == [31, 42, 2] * 5
    # The crop begins elsewhere; the mesh is in pixels of the photo.
    np.testing.assert_allclose(first["mesh"], grid(60, 70, 30, 40), atol=0.01)
    assert "mesh" not in tiny and "keypoints" not in tiny
    assert "mesh" not in records[1]["annotations"][0]


def test_mean_face_looks_to_the_front(script: Any) -> None:
    partners = script.mirror_partners(grid_triangles())
    front = grid(0, 0, 40, 60)
    angle = 0.4
    yaw = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    )
    mean = script.mean_face([front, (front - front.mean(axis=0)) @ yaw.T * 3 + 7], partners)
    expected = script.mean_face([front], partners)
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    np.testing.assert_allclose(mean[partners] * (-1, 1, 1), mean, atol=1e-9)


def test_without_mediapipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("m", ROOT / "scripts/make_face_meshes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(__import__("sys").modules, "mediapipe", None)
    with pytest.raises(SystemExit, match="pip install mediapipe"):
        module.main([str(tmp_path), str(tmp_path / "x.json"), "--model", "m"])
