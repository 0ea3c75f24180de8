"""RetinaFace's mesh branch (CVPR 2020, pp. 5203-5212): vertices of a fixed topology for each face.

No public code has it; the layer and the coding are ours. A linear layer predicts the vertices from the
context feature at one prior. It runs on gathered features only, of positive priors in training and of
detections after NMS: as a convolution over all cells it would cost several times the whole detector.

Vertices are x, y and z in pixels: z towards the camera negative, 0 at the mean of the head's depth.
Letters: V vertices, E edges, A priors, a priors at a cell, n gathered priors, c channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.prior_boxes import CENTER_VARIANCE
from d2ext.data.faces import read_topology


class MeshTopology(NamedTuple):
    """What training needs to know of a mesh."""

    mean: Tensor
    """(V, 3) vertices of a mean face, centred, of a box of area 1 on the image plane."""
    edges: Tensor
    """(E, 2) int64 indices of vertices."""


def mesh_topology(path: str) -> MeshTopology | None:
    """Topology from a Wavefront OBJ, with axes as an image's: x right, y down, z away from the camera.

    Returns:
        None if there is no such file: a trained model does without.

    Raises:
        DatasetError: no OBJ.
    """
    if not PathManager.isfile(path):
        return None
    vertices, triangles = (torch.from_numpy(x) for x in read_topology(path))
    low, high = vertices.amin(dim=0), vertices.amax(dim=0)
    center = torch.cat([(low + high)[:2] / 2, vertices[:, 2].mean()[None]])
    side = (high - low)[:2].prod().sqrt()
    pairs = torch.cat([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    return MeshTopology(
        ((vertices - center) / side).float(), pairs.sort(dim=1).values.unique(dim=0)
    )


def encode_meshes(meshes: Tensor, priors: Tensor) -> Tensor:
    """Meshes (n, V, 3) as offsets from their priors' centres, in prior sides over 0.1.

    Args:
        priors: (n, 4) centre form, square, in pixels as the meshes.
    """
    origin = F.pad(priors[:, None, :2], (0, 1))
    return (meshes - origin) / (CENTER_VARIANCE * priors[:, None, 2:3])


def decode_meshes(offsets: Tensor, priors: Tensor) -> Tensor:
    """Meshes from offsets (n, V, 3): the inverse of :func:`encode_meshes`."""
    return F.pad(priors[:, None, :2], (0, 1)) + offsets * CENTER_VARIANCE * priors[:, None, 2:3]


class MeshHead(nn.Module):
    """Context features at priors → offsets of vertices. The levels share its weights, the priors of a
    cell have their own.

    Args:
        channels: c.
        num_vertices: V.
        priors_per_cell: a.
        topology: the initial prediction is its mean face in the prior; None: a point at its centre.

    Attributes:
        mean: (V, 3) the mean face, which poses are relative to; None without topology.
    """

    def __init__(
        self,
        channels: int,
        num_vertices: int,
        priors_per_cell: int,
        topology: MeshTopology | None = None,
    ) -> None:
        super().__init__()
        self.num_vertices = num_vertices
        self.priors_per_cell = priors_per_cell
        self.output = nn.Linear(channels, priors_per_cell * num_vertices * 3)
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)
        # Not in checkpoints, which go without a topology.
        self.register_buffer("mean", None if topology is None else topology.mean, False)
        if topology is not None:
            if len(topology.mean) != num_vertices:
                raise ValueError(
                    f"MODEL.RETINAFACE.MESH.NUM_VERTICES is {num_vertices} and the mesh of "
                    f"MODEL.RETINAFACE.MESH.FILE has {len(topology.mean)}."
                )
            mean = topology.mean.flatten() / CENTER_VARIANCE
            self.output.bias.data.copy_(mean.repeat(priors_per_cell))

    def forward(self, vectors: Tensor, kinds: Tensor) -> Tensor:
        """vectors (n, c), which of a cell's priors each is for, (n,) int64 → (n, V, 3)."""
        # All kinds and then a selection: shapes do not depend on values.
        outputs = self.output(vectors).unflatten(1, (self.priors_per_cell, -1))
        index = kinds[:, None, None].expand(-1, 1, outputs.shape[2])
        return outputs.gather(1, index).unflatten(2, (-1, 3))[:, 0]
