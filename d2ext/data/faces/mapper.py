"""Samples of faces: five points and meshes beside boxes."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from fvcore.transforms.transform import TransformList

from d2ext.data.dataset_mapper import MAPPER_REGISTRY, D2extDatasetMapper
from d2ext.data.errors import AnnotationError, DatasetError
from d2ext.data.faces.meshes import check_mesh, topology_of, transform_meshes


@MAPPER_REGISTRY.register()
class FaceMapper(D2extDatasetMapper):
    """:class:`D2extDatasetMapper` that also gives ``gt_face_meshes`` (N, V, 3) float32, pixels of the
    network's image, and ``gt_mesh_valid`` (N,) bool, where the data have a topology (``mesh_flip`` of
    the metadata). Faces without a mesh have zeros there."""

    @configurable
    def __init__(self, *args: Any, mesh_flip: list[int] | None = None, **kwargs: Any) -> None:
        """
        Args:
            args, kwargs: of :class:`D2extDatasetMapper`
            mesh_flip: V indices, the partner of each vertex in a mirrored picture; None: no meshes
        """
        super().__init__(*args, **kwargs)
        self.mesh_flip = mesh_flip

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Arguments of the constructor; the topology is that of the training data."""
        arguments = super().from_config(cfg, is_train)
        if is_train:
            arguments["mesh_flip"] = topology_of(cfg.DATASETS.TRAIN).get("mesh_flip")
        return arguments

    def _add_fields(
        self,
        dataset_dict: dict[str, Any],
        instances: Instances,
        annotations: list[dict[str, Any]],
        transforms: TransformList,
    ) -> None:
        super()._add_fields(dataset_dict, instances, annotations, transforms)
        if self.mesh_flip is None:
            return
        vertices = len(self.mesh_flip)
        given = [a["mesh"] for a in annotations if a.get("mesh") is not None]
        valid = np.array([a.get("mesh") is not None for a in annotations], dtype=bool)
        meshes = np.zeros((len(annotations), vertices, 3))
        where = f"a face of '{dataset_dict['file_name']}'"
        try:
            given = [check_mesh(mesh, vertices, where) for mesh in given]
        except DatasetError as e:
            raise AnnotationError(str(e)) from e
        if given:
            meshes[valid] = transform_meshes(np.stack(given), transforms, self.mesh_flip)
        instances.gt_face_meshes = torch.from_numpy(meshes).float()
        instances.gt_mesh_valid = torch.from_numpy(valid)
