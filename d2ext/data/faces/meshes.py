"""Meshes of faces: their topology, their form in JSON, and what transforms do to them.

**Form.** A COCO-keypoint file (five points, :data:`~d2ext.data.faces.points.FACE_POINTS`), in which

- the category names the topology: ``"mesh_file"``, a Wavefront OBJ relative to the JSON file, and,
  unless the OBJ is symmetric itself, ``"mesh_flip"``: for each vertex the one that takes its place in a
  mirrored picture;
- an annotation may have ``"mesh"``: 3 V numbers x, y, z for the V vertices of the OBJ in its order. x
  and y are counted as the keypoints of the file (COCO: pixel indices, 0.5 is added when they are read).
  z is in pixels of the same scale, towards the camera negative, and 0 at the mean of the head's depth.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from fvcore.transforms.transform import TransformList

from d2ext.data.coco_json import read_json, read_text
from d2ext.data.errors import DatasetError

# Mirrored vertices may lie this far apart, as a fraction of the mesh's extent.
_MIRROR_TOLERANCE = 0.01


def read_topology(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of a Wavefront OBJ; polygons become fans.

    Returns:
        (V, 3) float64, (F, 3) int64 indices from 0

    Raises:
        DatasetError: no OBJ, or faces of unknown vertices; with the line's number
    """
    vertices: list[list[float]] = []
    triangles: list[tuple[int, int, int]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        try:
            if words[:1] == ["v"]:
                x, y, z = (float(w) for w in words[1:4])
                vertices.append([x, y, z])
            elif words[:1] == ["f"]:
                corners = [int(w.split("/")[0]) for w in words[1:]]
                corners = [c - 1 if c > 0 else len(vertices) + c for c in corners]
                triangles += [(corners[0], b, c) for b, c in itertools.pairwise(corners[1:])]
        except ValueError as e:
            raise DatasetError(f"Line {number} of '{path}' is no line of an OBJ: {line!r}.") from e
    faces = np.array(triangles, dtype=np.int64).reshape(-1, 3)
    if not vertices or len(faces) == 0:
        raise DatasetError(f"'{path}' has {len(vertices)} vertices and {len(faces)} triangles.")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise DatasetError(f"'{path}' has triangles of vertices beyond its {len(vertices)}.")
    return np.array(vertices), faces


def obj_text(
    about: str, vertices: np.ndarray, triangles: np.ndarray | None, digits: int = 5
) -> str:
    """A Wavefront OBJ, the inverse of :func:`read_topology`; without triangles the vertices alone.
    ``about`` says in its first line what it is."""
    lines = [f"# {about}: x right, y down, z away from the camera"]
    lines += [f"v {x:.{digits}f} {y:.{digits}f} {z:.{digits}f}" for x, y, z in vertices.tolist()]
    if triangles is not None:
        lines += [f"f {a} {b} {c}" for a, b, c in (triangles + 1).tolist()]
    return "\n".join(lines) + "\n"


def mirror_permutation(vertices: np.ndarray) -> list[int]:
    """For each vertex of a symmetric mesh the one at its mirror place, across the middle of x.

    Args:
        vertices: (V, 3)

    Raises:
        DatasetError: the mesh is not symmetric
    """
    vertices = np.asarray(vertices, dtype=np.float64)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    mirrored = vertices * [-1, 1, 1] + [low[0] + high[0], 0, 0]
    flip = np.array([np.square(vertices - point).sum(axis=1).argmin() for point in mirrored])
    error = np.linalg.norm(vertices[flip] - mirrored, axis=1).max()
    if error > _MIRROR_TOLERANCE * (high - low).max() or not _is_mirror(flip):
        raise DatasetError(
            "The mesh is not symmetric in x, so that its vertices have no partners: give 'mesh_flip'."
        )
    return flip.tolist()


def _is_mirror(flip: np.ndarray) -> bool:
    return bool((flip[flip] == np.arange(len(flip))).all())


def mesh_metadata(json_file: str) -> dict[str, Any]:
    """``mesh_file`` and ``mesh_flip`` of a file in our form; empty if it has no topology.

    Raises:
        DatasetError: a topology that cannot be used
    """
    categories = [c for c in read_json(json_file).get("categories", []) if c.get("mesh_file")]
    if not categories:
        return {}
    path = os.path.join(os.path.dirname(json_file), categories[0]["mesh_file"])
    vertices, _ = read_topology(path)
    flip = categories[0].get("mesh_flip")
    if flip is None:
        return {"mesh_file": path, "mesh_flip": mirror_permutation(vertices)}
    if sorted(flip) != list(range(len(vertices))) or not _is_mirror(np.array(flip)):
        raise DatasetError(
            f"'mesh_flip' of '{json_file}' is no list of partners of the {len(vertices)} vertices of "
            f"'{path}'."
        )
    return {"mesh_file": path, "mesh_flip": [int(i) for i in flip]}


def topology_of(dataset_names: Sequence[str]) -> dict[str, Any]:
    """``mesh_file`` and ``mesh_flip`` of the first of several registered data sets that has meshes."""
    for name in dataset_names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("mesh_flip"):
            return {key: metadata.get(key) for key in ("mesh_file", "mesh_flip")}
    return {}


def attach_meshes(
    records: Sequence[dict[str, Any]], json_file: str, vertices: int | None, origin: float = 0.0
) -> None:
    """Give annotations their ``mesh``, (V, 3) float32, in place.

    Args:
        records: of :func:`~d2ext.data.landmarks.readers.read_coco` for the same file
        json_file: in our form
        vertices: V of the topology; None: there is none
        origin: index of the first pixel in the file

    Raises:
        DatasetError: meshes of another number of vertices, that are not finite, or without topology
    """
    entries = read_json(json_file)["annotations"]
    by_text = any(isinstance(entry["id"], str) for entry in entries)  # then the reader counts them
    meshes = {
        n + 1 if by_text else entry["id"]: entry["mesh"]
        for n, entry in enumerate(entries)
        if entry.get("mesh") is not None
    }
    if meshes and vertices is None:
        raise DatasetError(f"'{json_file}' has meshes, but no category of it names a 'mesh_file'.")
    for record in records:
        for annotation in record["annotations"]:
            if annotation["id"] in meshes:
                where = f"annotation {annotation['id']} of '{json_file}'"
                mesh = check_mesh(meshes[annotation["id"]], vertices, where)
                mesh[:, :2] += 0.5 - origin
                annotation["mesh"] = mesh


def check_mesh(mesh: Any, vertices: int | None, where: str) -> np.ndarray:
    """(V, 3) float32 of a flat list or an array.

    Raises:
        DatasetError: another number of vertices, or not finite
    """
    try:
        values = np.array(mesh, dtype=np.float32).reshape(-1)
    except (TypeError, ValueError) as e:
        raise DatasetError(f"The mesh of {where} is no list of numbers: {e}") from e
    if len(values) % 3 or (vertices is not None and len(values) != 3 * vertices):
        raise DatasetError(
            f"The mesh of {where} has {len(values) / 3:g} vertices, the topology {vertices}."
        )
    if not np.isfinite(values).all():
        raise DatasetError(f"The mesh of {where} has coordinates that are not finite.")
    return values.reshape(-1, 3)


def transform_meshes(
    meshes: np.ndarray, transforms: TransformList, flip: Sequence[int]
) -> np.ndarray:
    """Meshes in the transformed image.

    x and y go through ``apply_coords``, z through the scale, the root of the change of area; where the
    picture is mirrored, left and right vertices change places.

    Args:
        meshes: (N, V, 3) pixels
        transforms: affine for coordinates, as all are here
        flip: (V,) partner of each vertex

    Returns:
        (N, V, 3) float64; vertices outside the image stay
    """
    meshes = np.array(meshes, dtype=np.float64)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    origin, right, down = transforms.apply_coords(corners)
    area = float(np.linalg.det(np.stack([right - origin, down - origin])))
    moved = transforms.apply_coords(meshes[..., :2].reshape(-1, 2).copy())
    meshes[..., :2] = moved.reshape(*meshes.shape[:2], 2)
    meshes[..., 2] *= abs(area) ** 0.5
    return meshes[:, list(flip)] if area < 0 else meshes
