"""Files that `d2ext predict` writes of single faces: aligned crops and meshes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.utils.file_io import PathManager

from d2ext.codecs.face_alignment import ARCFACE_SIZE, crop_matrices
from d2ext.config import ConfigError
from d2ext.data.faces import five_points, obj_text, read_topology
from d2ext.files import atomic_write
from d2ext.utils.drawing import write_picture


def add_face_arguments(parser: argparse.ArgumentParser) -> None:
    """What is written of each face."""
    add = parser.add_argument
    help_text = "write an aligned crop of each face, as recognition networks take it"
    add("--save-crops", type=Path, metavar="DIR", help=help_text)
    help_text = "write the mesh of each face, and all meshes into coco_results.json"
    add("--save-meshes", type=Path, metavar="DIR", help=help_text)


def mesh_triangles(cfg: CfgNode, metadata: Metadata) -> np.ndarray | None:
    """Triangles of the meshes that a config's model predicts, counter-clockwise from outside: of
    ``MODEL.RETINAFACE.MESH.FILE``, or of the data set's mesh.

    Returns:
        (T, 3) int64; None if neither is there, or has other vertices.

    Raises:
        DatasetError: a file that is no OBJ.
    """
    mesh = cfg.MODEL.RETINAFACE.MESH
    for path in (mesh.FILE, metadata.get("mesh_file")):
        if mesh.NUM_VERTICES and path and PathManager.isfile(path):
            vertices, triangles = read_topology(path)
            if len(vertices) == mesh.NUM_VERTICES:
                corners = (vertices - vertices.mean(axis=0))[triangles]
                # The sign of the volume tells which way round they are.
                inside_out = np.linalg.det(corners).sum() < 0
                return triangles[:, ::-1] if inside_out else triangles
    return None


class FaceWriter:
    """Writes a file for each face, ``<image's name>_<image's id>_<place of the face, from 1>``.

    Args:
        crops: folder of PNGs of 112 x 112 pixels; None: none are written.
        meshes: folder of Wavefront OBJs; None: none are written.
        triangles: (T, 3) of the meshes; None: vertices alone.
    """

    def __init__(
        self, crops: Path | None, meshes: Path | None, triangles: np.ndarray | None = None
    ) -> None:
        self._crops, self._meshes, self._triangles = crops, meshes, triangles
        self.saves_meshes = meshes is not None
        for folder in (crops, meshes):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)

    def write(self, image_id: int, file: str, image: np.ndarray, output: dict[str, Any]) -> None:
        """Write the faces of an image (H, W, 3, BGR); ``instances`` of the output are on the CPU.

        Raises:
            ConfigError: the model predicts no meshes, or no five points and none that give them.
        """
        name = f"{Path(file).stem}_{image_id}"
        instances = output.get("instances")
        if self._meshes is not None:
            if instances is None or not instances.has("pred_face_meshes"):
                raise ConfigError("--save-meshes: the model predicts no meshes.")
            for i, mesh in enumerate(instances.pred_face_meshes.numpy(), 1):
                with atomic_write(self._meshes / f"{name}_{i}.obj", "w") as obj:
                    obj.write(obj_text("pixels of the image", mesh, self._triangles, digits=3))
        if self._crops is not None:
            if instances is None or not instances.has("pred_keypoints"):
                raise ConfigError("--save-crops: the model predicts no points.")
            try:
                points = five_points(instances.pred_keypoints.numpy())
            except ValueError as error:
                raise ConfigError(f"--save-crops: {error}") from error
            matrices = crop_matrices(torch.from_numpy(points[:, :, :2])).numpy()
            for i, (matrix, v) in enumerate(zip(matrices, points[:, :, 2], strict=True), 1):
                if (v > 0).all():
                    crop = cv2.warpAffine(image, matrix, (ARCFACE_SIZE, ARCFACE_SIZE))
                    write_picture(self._crops / f"{name}_{i}.png", crop)
