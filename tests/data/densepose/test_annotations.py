"""Annotated surface points: the structure, and its mirror image against the published code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2ext.data.densepose import (
    DensePoseAnnotations,
    SurfacePoints,
    SurfaceSymmetry,
    read_uv_symmetry,
)
from d2ext.data.errors import DatasetError
from tests.reference.fixture import Fixture, draw_tensor
from tests.systems.densepose.published import points_with_mask

REFERENCE = Path(__file__).parents[2] / "reference" / "densepose"


def _uv_tables(seed: int) -> np.ndarray:
    drawn = [draw_tensor(f"uv_symmetry.{x}", (24, 256, 256), seed) for x in "UV"]
    return np.clip(np.float32(0.5) + np.float32(0.25) * np.stack(drawn), 0, 1)


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture(REFERENCE / "annotation_flip")


@pytest.fixture(scope="module")
def symmetry(fixture: Fixture) -> SurfaceSymmetry:
    row, column = torch.meshgrid(torch.arange(15), torch.arange(20), indexing="ij")
    torus = (row * 20 + (-column) % 20).flatten()
    return SurfaceSymmetry(torch.from_numpy(_uv_tables(23)), {"torus_15x20": torus})


@pytest.fixture(scope="module")
def annotations(fixture: Fixture) -> DensePoseAnnotations:
    persons = fixture.manifest["inputs"]["persons"]
    masks = [fixture.expected[f"person{k}.before.segm"] for k in range(3)]
    return DensePoseAnnotations(
        [points_with_mask(p, m) for p, m in zip(persons, masks, strict=True)]
    )


@pytest.mark.parametrize("joined", [False, True])
def test_mirrored_as_published(
    fixture: Fixture, annotations: DensePoseAnnotations, symmetry: SurfaceSymmetry, joined: bool
) -> None:
    if joined:
        annotations = DensePoseAnnotations.cat([annotations[2:], annotations[:2]])
        annotations = annotations[torch.tensor([1, 2, 0])]
    flipped = annotations.mirrored(symmetry)
    points, names = flipped.points(), {"x": "x", "y": "y", "i": "parts", "u": "u", "v": "v"}
    for k in range(3):
        own = points.person == k
        for published, name in {**names, "vertex_ids": "vertices"}.items():
            expected = fixture.expected.get(f"person{k}.flip.{published}")
            if expected is not None:
                actual = getattr(points, name)[own].numpy()
                assert np.array_equal(actual, expected), (k, name)
        assert np.array_equal(flipped.masks[k], fixture.expected[f"person{k}.flip.segm"])
    assert (points.mesh >= 0).tolist() == (points.person == 2).tolist()


def test_twice_mirrored_points_return(annotations: DensePoseAnnotations) -> None:
    # Tables of a body whose charts are mirror images of each other in U, so that cutting loses a cell.
    grid = torch.arange(256) / 255
    u = (1 - grid).expand(24, 256, 256)
    v = grid[:, None].expand(24, 256, 256)
    symmetry = SurfaceSymmetry(torch.stack([u, v]))
    chart = annotations[:2]
    before, after = chart.points(), chart.mirrored(symmetry).mirrored(symmetry).points()
    assert torch.equal(before.parts, after.parts)
    assert torch.allclose(before.x, after.x, atol=1e-4) and torch.equal(before.y, after.y)
    assert (before.u - after.u).abs().max() <= 2 / 255
    assert (before.v - after.v).abs().max() <= 2 / 255
    torso = (before.parts == 1) | (before.parts == 2)
    once = chart.mirrored(symmetry).points()
    assert torso.any() and (once.u[torso] != before.u[torso]).all()


def test_travels_in_instances() -> None:
    mask = np.full((256, 256), 3)
    first = SurfacePoints([1.0, 2.0], [3.0, 4.0], [5, 0], [0.5, 0], [0.25, 0], mask=mask)
    second = SurfacePoints([7.0], [8.0], vertices=[9], mesh="cow")
    instances = Instances((20, 30), gt_boxes=Boxes(torch.zeros(3, 4)))
    instances.gt_densepose = DensePoseAnnotations([first, None, second])
    both = Instances.cat([instances[torch.tensor([2, 2, 0])], instances[1:2]]).to("cpu")
    found = both.gt_densepose
    assert found.has_points.tolist() == [True, True, True, False]
    assert found.has_masks.tolist() == [False, False, True, False]
    assert found.masks.flatten(1).amax(dim=1).tolist() == [0, 0, 3, 0]
    points = found.points()
    assert points.person.tolist() == [0, 1, 2, 2]
    assert points.x.tolist() == [7, 7, 1, 2] and points.vertices.tolist() == [9, 9, -1, -1]
    assert points.parts.tolist() == [-1, -1, 5, 0]
    assert found.meshes_among(["ant", "cow"])[1].tolist() == [1, 1, -1, -1]
    with pytest.raises(ValueError, match="cow"):
        found.meshes_among(["ant"])
    nobody = found[torch.zeros(4, dtype=torch.bool)]
    assert len(nobody) == len(nobody.points().x) == len(nobody.masks) == 0
    assert len(DensePoseAnnotations([])) == len(DensePoseAnnotations([]).points().x) == 0


def test_lacking_tables_are_named(annotations: DensePoseAnnotations) -> None:
    with pytest.raises(DatasetError, match="UV_symmetry_transforms"):
        annotations[:1].mirrored(SurfaceSymmetry())
    with pytest.raises(DatasetError, match="torus_15x20"):
        annotations.mirrored(SurfaceSymmetry(torch.zeros(2, 24, 256, 256)))


def test_tables_from_files(tmp_path: Path) -> None:
    u, v = _uv_tables(1)
    np.savez(tmp_path / "tables.npz", U_transforms=u, V_transforms=v)
    assert np.array_equal(read_uv_symmetry(tmp_path / "tables.npz"), [u, v])
    scipy_io = pytest.importorskip("scipy.io")
    cells = {}
    for name, tables in (("U_transforms", u), ("V_transforms", v)):
        cells[name] = np.empty((1, 24), dtype=object)
        cells[name][0] = list(tables)
    scipy_io.savemat(tmp_path / "tables.mat", cells)
    assert np.array_equal(read_uv_symmetry(tmp_path / "tables.mat"), [u, v])
    np.savez(tmp_path / "other.npz", U_transforms=u)
    with pytest.raises(DatasetError, match="V_transforms"):
        read_uv_symmetry(tmp_path / "other.npz")
