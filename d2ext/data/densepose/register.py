"""Data with points on surfaces in Detectron2's catalogs: from own files, and DensePose-COCO by name.

::

    register_densepose("my_train", "train.json", "train/", SurfaceFiles(uv_symmetry="mirror.npz"))

Under ``DETECTRON2_DATASETS``, read when they are first used, as Detectron2 has them:
``densepose_coco_2014_{train,minival,valminusminival}``, images in ``coco/train2014`` and
``coco/val2014``, annotations in ``coco/annotations/densepose_{train,minival,valminusminival}2014.json``;
those with vertices, ``..._cse``, in ``coco_cse/densepose_{...}2014_cse.json``; and the DensePose
project's files of the surface in ``densepose``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.coco_json import CocoFile, coco_records, load_coco_json, read_coco_json
from d2ext.data.dataset_facts import category_metadata
from d2ext.data.densepose.geodesics import open_geodesics
from d2ext.data.densepose.parts import read_uv_symmetry
from d2ext.data.densepose.surface_files import read_arrays, surface_file
from d2ext.data.errors import DatasetError, shorten

Record = dict[str, Any]

# The mesh of a person, subdivided from SMPL's.
SMPL_MESH, SMPL_VERTICES = "smpl_27554", 27554


@dataclass(frozen=True)
class SurfaceFiles:
    """Paths of the files of the surface that annotations are on; None: there is none.

    Attributes:
        mesh: an .npz or .pkl with ``vertices`` (V, 3) and more, as
            :func:`~d2ext.data.shapes.body_tables.body_npz` has it, for evaluation; its
            ``vertex_transforms`` are for mirrored images of embeddings
        geodesics: of :func:`~d2ext.data.densepose.open_geodesics`, for evaluation
        uv_symmetry: of :func:`~d2ext.data.densepose.read_uv_symmetry`, for mirrored images of charts
    """

    mesh: str | None = None
    geodesics: str | None = None
    uv_symmetry: str | None = None


SURFACE_FILES = tuple(f.name for f in fields(SurfaceFiles))


def has_points(file: CocoFile) -> bool:
    """Whether anything is annotated with points on a surface."""
    return any("dp_x" in annotation for annotation in file.annotations)


def densepose_metadata(
    annotations: Sequence[Record], files: SurfaceFiles, where: str
) -> dict[str, Any]:
    """The metadata of data with points on a surface, after a look at whether its files fit.

    Args:
        annotations: of :func:`~d2ext.data.coco_json.read_coco_json`
        files: of the surface
        where: the data are from, for messages

    Returns:
        ``evaluator_type``; and, as far as known, ``densepose_mesh_name``, the mesh of ``ref_model``, and
        ``densepose_mesh``, ``densepose_geodesics``, ``densepose_uv_symmetry``, the files' paths

    Raises:
        DatasetError: a file is not there, or is of another mesh than the annotations
    """
    given = {key: getattr(files, key) for key in SURFACE_FILES if getattr(files, key) is not None}
    metadata: dict[str, Any] = {"evaluator_type": "densepose"}
    metadata.update({f"densepose_{key}": path for key, path in given.items()})
    meshes = sorted({a["ref_model"] for a in annotations if "ref_model" in a})
    if len(meshes) == 1:
        metadata["densepose_mesh_name"] = meshes[0]
    elif meshes and (files.mesh or files.geodesics):
        raise DatasetError(
            f"The annotations of '{where}' are on {len(meshes)} meshes ({shorten(meshes)}), but a file "
            "of one is given: make a data set of each mesh."
        )
    counts: dict[str, int] = {}
    if files.mesh is not None:
        counts.update(_num_vertices(files.mesh))
    if files.geodesics is not None:
        path = surface_file(files.geodesics, "the distances over the surface, for evaluation")
        if not path.endswith(".pkl"):  # 1.5 GB, when they are needed
            counts[files.geodesics] = open_geodesics(files.geodesics).num_vertices
    if files.uv_symmetry is not None:
        read_uv_symmetry(files.uv_symmetry)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{path}' {count}" for path, count in counts.items())
        raise DatasetError(f"The files are of different meshes, by their vertices: {listed}.")
    for path, count in counts.items():
        highest = max((max(a["dp_vertex"]) for a in annotations if "dp_vertex" in a), default=-1)
        if highest >= count:
            raise DatasetError(
                f"'{where}' has annotations with vertex {highest} of {shorten(meshes)}, but the mesh of "
                f"'{path}' has {count} vertices: it is another one."
            )
    return metadata


def _num_vertices(path: str) -> dict[str, int]:
    """Of a mesh, by its path; empty: MATLAB's files, of which the evaluation reads what it needs."""
    purpose = "the mesh of the annotated surface"
    if surface_file(path, purpose).endswith(".mat"):
        return {}
    vertices = read_arrays(path, purpose).get("vertices")
    if vertices is None or vertices.ndim != 2:
        raise DatasetError(f"'{path}' has no `vertices` (V, 3): it is no mesh.")
    return {path: len(vertices)}


def register_densepose(
    name: str, json_file: str, images: str, files: SurfaceFiles | None = None
) -> None:
    """Register data with points on a surface, in COCO's form (:mod:`d2ext.data.densepose.fields`).

    Raises:
        DatasetError: files that cannot be used, nobody with points, or a name that is taken
    """
    if name in DatasetCatalog.list():
        raise DatasetError(f"Data set '{name}' is already registered. Choose another name.")
    file = read_coco_json(json_file, images)
    if not has_points(file):
        raise DatasetError(f"No annotation of '{json_file}' has points on a surface (dp_x, ...).")
    metadata = densepose_metadata(file.annotations, files or SurfaceFiles(), json_file)
    DatasetCatalog.register(name, partial(load_coco_json, json_file, images))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=images, **category_metadata(file.categories), **metadata
    )


def register_builtin_densepose() -> None:
    """Register DensePose-COCO, in the folder that ``DETECTRON2_DATASETS`` names now."""
    base = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    surface = {
        "densepose_mesh_name": SMPL_MESH,
        "densepose_mesh": os.path.join(base, "densepose", "SMPL_subdiv.mat"),
        "densepose_geodesics": os.path.join(base, "densepose", "Pdist_matrix.pkl"),
        "densepose_uv_symmetry": os.path.join(base, "densepose", "UV_symmetry_transforms.mat"),
    }
    for split in ("train", "minival", "valminusminival"):
        images = os.path.join(base, "coco", "train2014" if split == "train" else "val2014")
        for name, folder, end in (
            (f"densepose_coco_2014_{split}", ("coco", "annotations"), ""),
            (f"densepose_coco_2014_{split}_cse", ("coco_cse",), "_cse"),
        ):
            json_file = os.path.join(base, *folder, f"densepose_{split}2014{end}.json")
            DatasetCatalog.register(name, partial(_load_persons, json_file, images))
            MetadataCatalog.get(name).set(
                json_file=json_file,
                image_root=images,
                evaluator_type="densepose",
                thing_classes=["person"],
                thing_dataset_id_to_contiguous_id={1: 0},
                **surface,
            )


def _load_persons(json_file: str, images: str) -> list[Record]:
    file = read_coco_json(json_file, images)
    persons = [c for c in file.categories if c["name"] == "person"]
    ids = {c["id"] for c in persons}
    kept = [a for a in file.annotations if a["category_id"] in ids]
    return coco_records(replace(file, categories=persons, annotations=kept), images)
