"""Embeddings of the vertices of meshes (CSE, arXiv 2011.12438).

Parameters are called what Detectron2's DensePose checkpoints call them.

Letters: V vertices of a mesh, K numbers of a vertex's features, D of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import ConfigError
from d2ext.data.densepose.surface_files import read_arrays

# Least norm that embeddings are divided by.
_EPSILON = 1e-6


def normalize_embeddings(embeddings: Tensor) -> Tensor:
    """(..., D) divided by its norm over D."""
    return F.normalize(embeddings, dim=-1, eps=_EPSILON)


class VertexEmbedder(nn.Module):
    """Embeddings of one mesh: learned (``vertex_direct``), or features times a learned matrix."""

    def __init__(
        self,
        vertices: int,
        embed_size: int,
        feature_size: int | None = None,
        features_trainable: bool = False,
    ) -> None:
        """Args:
        vertices: V.
        embed_size: D.
        feature_size: K; None: the embeddings themselves are learned.
        features_trainable: whether the features are learned too.
        """
        super().__init__()
        if feature_size is not None:
            features = torch.zeros(vertices, feature_size)
            if features_trainable:
                self.features = nn.Parameter(features)
            else:
                self.register_buffer("features", features)
        rows = vertices if feature_size is None else feature_size
        self.embeddings = nn.Parameter(torch.empty(rows, embed_size))
        # Of norms about 1. Zeros, as published, would make gradients of the first step, divided by the
        # norm, a million times larger than later ones; Adam remembers them.
        nn.init.normal_(self.embeddings, std=(embed_size * (feature_size or 1)) ** -0.5)
        self._trained_before = False

    def forward(self) -> Tensor:
        """(V, D), normalised.

        Raises:
            ConfigError: in the first iteration of a training, if all features are zero
        """
        if self.training and not self._trained_before:
            self._trained_before = True
            if hasattr(self, "features") and not self.features.any():
                raise ConfigError(
                    "The features of a mesh are all zero, so that nothing is learned: name their file "
                    "as MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS.<mesh>.INIT_FILE, or start from a "
                    "checkpoint that has them."
                )
        embeddings = self.embeddings
        if hasattr(self, "features"):
            embeddings = self.features @ embeddings
        return normalize_embeddings(embeddings)

    @torch.no_grad()
    def load(self, path: str) -> None:
        """Read ``features`` and ``embeddings``, those that are there, from a published .pkl or an .npz.

        Raises:
            ConfigError: the file has neither, or not of this size.
        """
        content = read_arrays(path)
        own = dict([*self.named_parameters(), *self.named_buffers()])
        given = {name: value for name, value in content.items() if name in own}
        if not given:
            raise ConfigError(
                f"'{path}' has {sorted(content)}, none of {sorted(own)}: it is no embedder."
            )
        for name, value in given.items():
            if value.shape != own[name].shape:
                raise ConfigError(
                    f"The {name} in '{path}' have the shape {value.shape}, the mesh in the config "
                    f"{tuple(own[name].shape)} (NUM_VERTICES, FEATURE_DIM, EMBED_SIZE)."
                )
            own[name].copy_(torch.from_numpy(value))


class Embedder(nn.Module):
    """Embeddings of all meshes of a model, each under ``embedder_<mesh>``."""

    @configurable
    def __init__(self, embedders: dict[str, VertexEmbedder]) -> None:
        """Args:
        embedders: by name of the mesh.
        """
        super().__init__()
        self.mesh_names = sorted(embedders)
        for name, embedder in embedders.items():
            self.add_module(f"embedder_{name}", embedder)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        cse = cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE
        embedders = {}
        for name, mesh in cse.EMBEDDERS.items():
            if mesh.TYPE not in ("vertex_feature", "vertex_direct"):
                raise ConfigError(
                    f'CSE.EMBEDDERS.{name}.TYPE is "vertex_feature" or "vertex_direct", not '
                    f'"{mesh.TYPE}".'
                )
            by_features = mesh.TYPE == "vertex_feature"
            embedder = VertexEmbedder(
                mesh.NUM_VERTICES,
                cse.EMBED_SIZE,
                mesh.FEATURE_DIM if by_features else None,
                by_features and mesh.get("FEATURES_TRAINABLE", False),
            )
            if mesh.get("INIT_FILE"):
                embedder.load(mesh.INIT_FILE)
            embedder.requires_grad_(mesh.get("IS_TRAINABLE", True))
            embedders[name] = embedder
        if not embedders:
            raise ConfigError("Embeddings need a mesh: MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS.")
        return {"embedders": embedders}

    def forward(self) -> dict[str, Tensor]:
        """(V, D) embeddings by mesh, in the order of the names."""
        return {name: getattr(self, f"embedder_{name}")() for name in self.mesh_names}
