"""Losses of embeddings (CSE, arXiv 2011.12438; NOTES.md, *Chart-based against CSE*).

Letters: R regions, K points in them, S side of the maps, V vertices of a mesh, D numbers of an
embedding, P pixels of a region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.densepose import EmbeddingPredictions
from d2ext.config import ConfigError
from d2ext.data.densepose.geodesics import open_geodesics
from d2ext.systems.densepose.embedder import normalize_embeddings
from d2ext.systems.densepose.losses import coarse_loss, zero_loss
from d2ext.systems.densepose.targets import DensePoseTargets


class Geodesics(dict[str, Tensor]):
    """(V, V) distances by mesh, read from their files when they are first asked for: a model that only
    predicts does not need them."""

    def __init__(self, files: Mapping[str, str]) -> None:
        """
        Args:
            files: by mesh, see :func:`~d2ext.data.densepose.open_geodesics`; "": there is none
        """
        super().__init__()
        self.files = dict(files)

    def __missing__(self, name: str) -> Tensor:
        if not self.files.get(name):
            raise ConfigError(
                f"The loss needs the distances between the vertices of {name}: name their file as "
                f"MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS.{name}.GEODESICS."
            )
        self[name] = torch.from_numpy(open_geodesics(self.files[name]).square())
        return self[name]


@dataclass(frozen=True)
class PixelCycle:
    """Pixels to vertices and back end where they began."""

    weight: float
    all_meshes: bool = False
    """Every mesh of the model, not only those of the batch."""
    num_pixels: int = 100
    """Random foreground pixels of each region; 0: all."""
    to_vertex: float = 0.05
    """Temperature from pixels to vertices."""
    to_pixel: float = 0.05
    """Temperature from vertices to pixels."""

    def __call__(
        self, predictions: EmbeddingPredictions, masks: Tensor, vertices: Mapping[str, Tensor]
    ) -> Tensor:
        """Mean over regions and meshes, without the weight.

        Args:
            predictions: of R regions
            masks: (R, S, S) bool: their persons
            vertices: (V, D) of the meshes that take part
        """
        values = []
        for maps, mask in zip(predictions.embedding.float(), masks, strict=True):
            pixels = mask.nonzero()
            if 0 < self.num_pixels < len(pixels):
                order = torch.randperm(len(pixels), device=pixels.device)
                pixels = pixels[order[: self.num_pixels]]
            own = normalize_embeddings(maps[:, pixels[:, 0], pixels[:, 1]].T)
            place = pixels.float()
            distance = (place[:, None] - place[None]).square().sum(dim=-1)
            for embeddings in vertices.values():
                similarity = own @ embeddings.T
                there = (similarity / self.to_vertex).softmax(dim=1)
                back = (similarity.T / self.to_pixel).softmax(dim=1)
                values.append(torch.linalg.norm(distance * (there @ back)))
        return torch.stack(values).mean() if values else zero_loss(predictions)


@dataclass(frozen=True)
class ShapeCycle:
    """Vertices to another mesh and back end where they began, for a random pair of meshes."""

    weight: float
    num_vertices: int = 4936
    """Random vertices of each mesh."""
    temperature: float = 0.05

    def __call__(self, vertices: Mapping[str, Tensor], geodesics: Mapping[str, Tensor]) -> Tensor:
        """Of a random pair, without the weight.

        Args:
            vertices: (V, D) embeddings by mesh
            geodesics: (V, V) distances by mesh
        """
        names = list(vertices)
        pair = [names[i] for i in torch.randperm(len(names))[:2].tolist()]
        embeddings, distances = [], []
        for name in pair:
            own = vertices[name]
            order = torch.randperm(len(own))
            selected = order[: self.num_vertices].sort().values.to(own.device)
            embeddings.append(own[selected])
            distances.append(geodesics[name][selected][:, selected].to(own.device))
        similarity = embeddings[0] @ embeddings[1].T / self.temperature
        there, back = similarity.softmax(dim=1), similarity.T.softmax(dim=1)
        first = torch.linalg.norm(distances[0] * (there @ back))
        return first + torch.linalg.norm(distances[1] * (back @ there))


@dataclass(frozen=True)
class EmbeddingLoss:
    """``loss_densepose_E<mesh>`` for each mesh (embeddings at the points), ``_S`` (coarse segmentation),
    and, if asked for, ``_pix2shape`` and ``_shape2shape``."""

    weight: float = 0.6
    """Of E, a mean over points."""
    coarse_weight: float = 5.0
    """Of S, a mean over pixels."""
    background_weight: float = 1.0
    """See :func:`coarse_loss`."""
    embedding_sigma: float = 0.01
    """Divisor of the squared distance of embeddings."""
    geodesic_sigma: float = 0.01
    """Divisor of the geodesic distance in metres, of soft targets."""
    soft: bool = False
    """Targets are soft: vertices near the annotated one, by geodesic distance."""
    geodesics: dict[str, Tensor] = field(default_factory=dict)
    """(V, V) by mesh, for soft targets and the cycle of shapes."""
    pixel_cycle: PixelCycle | None = None
    shape_cycle: ShapeCycle | None = None

    def __call__(
        self,
        predictions: EmbeddingPredictions,
        targets: DensePoseTargets,
        vertices: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            predictions: of R regions
            targets: for them
            vertices: (V, D) normalised embeddings by mesh

        Raises:
            ValueError: points on a mesh that the model does not have
        """
        unknown = set(targets.mesh_names) - set(vertices)
        if unknown:
            raise ValueError(
                f"Points are annotated on {sorted(unknown)}; the model has the meshes "
                f"{list(vertices)} (MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS)."
            )
        losses = {
            f"E{name}": self._mesh_loss(name, predictions, targets, vertices) for name in vertices
        }
        losses["S"] = self.coarse_weight * coarse_loss(predictions, targets, self.background_weight)
        if self.pixel_cycle is not None:
            losses["pix2shape"] = self._pixel_loss(self.pixel_cycle, predictions, targets, vertices)
        if self.shape_cycle is not None:
            value = self.shape_cycle(vertices, self.geodesics)
            losses["shape2shape"] = self.shape_cycle.weight * value
        return {f"loss_densepose_{name}": value for name, value in losses.items()}

    def _mesh_loss(
        self,
        name: str,
        predictions: EmbeddingPredictions,
        targets: DensePoseTargets,
        vertices: Mapping[str, Tensor],
    ) -> Tensor:
        points = targets.points.points
        names = targets.mesh_names
        mesh = names.index(name) if name in names else len(names)
        own = (points.mesh == mesh) & (points.vertices >= 0)
        if not own.any():
            return zero_loss(predictions) + vertices[name].sum() * 0
        selected = targets.points.select(own)
        embeddings = normalize_embeddings(selected.sample(predictions.embedding))
        logits = -_squared_distances(embeddings, vertices[name]) / self.embedding_sigma
        vertex = selected.points.vertices
        if not self.soft:
            return self.weight * F.cross_entropy(logits, vertex)
        distances = self._distances(name, logits.device)[vertex]
        return self.weight * F.cross_entropy(logits, (-distances / self.geodesic_sigma).softmax(1))

    def _distances(self, name: str, device: torch.device) -> Tensor:
        self.geodesics[name] = self.geodesics[name].to(device)
        return self.geodesics[name]

    @staticmethod
    def _pixel_loss(
        cycle: PixelCycle,
        predictions: EmbeddingPredictions,
        targets: DensePoseTargets,
        vertices: Mapping[str, Tensor],
    ) -> Tensor:
        present = set(targets.points.points.mesh.unique().tolist())
        names = [name for i, name in enumerate(targets.mesh_names) if i in present]
        used = vertices if cycle.all_meshes else {name: vertices[name] for name in names}
        if targets.masks is None or not used:
            return zero_loss(predictions)
        return cycle.weight * cycle(predictions, targets.masks, used)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(K, D), (V, D) → (K, V)."""
    return a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T


def build_cse_loss(cfg: CfgNode) -> EmbeddingLoss:
    """The losses of embeddings that a config describes.

    Raises:
        ConfigError: an unknown loss, or one that needs geodesics or meshes that are not there
    """
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    cse, pixel, shape = (
        head.CSE,
        head.CSE.PIX_TO_SHAPE_CYCLE_LOSS,
        head.CSE.SHAPE_TO_SHAPE_CYCLE_LOSS,
    )
    if cse.EMBED_LOSS_NAME not in ("EmbeddingLoss", "SoftEmbeddingLoss"):
        raise ConfigError(
            'CSE.EMBED_LOSS_NAME is "EmbeddingLoss" or "SoftEmbeddingLoss", not '
            f'"{cse.EMBED_LOSS_NAME}".'
        )
    soft = cse.EMBED_LOSS_NAME == "SoftEmbeddingLoss"
    if shape.ENABLED and len(cse.EMBEDDERS) < 2:
        raise ConfigError("CSE.SHAPE_TO_SHAPE_CYCLE_LOSS needs two meshes in CSE.EMBEDDERS.")
    return EmbeddingLoss(
        weight=cse.EMBED_LOSS_WEIGHT,
        coarse_weight=head.INDEX_WEIGHTS,
        background_weight=head.BACKGROUND_WEIGHT,
        embedding_sigma=cse.EMBEDDING_DIST_GAUSS_SIGMA,
        geodesic_sigma=cse.GEODESIC_DIST_GAUSS_SIGMA,
        soft=soft,
        geodesics=Geodesics(
            {name: mesh.get("GEODESICS", "") for name, mesh in cse.EMBEDDERS.items()}
        ),
        pixel_cycle=PixelCycle(
            pixel.WEIGHT,
            pixel.USE_ALL_MESHES_NOT_GT_ONLY,
            pixel.NUM_PIXELS_TO_SAMPLE,
            pixel.TEMPERATURE_PIXEL_TO_VERTEX,
            pixel.TEMPERATURE_VERTEX_TO_PIXEL,
        )
        if pixel.ENABLED
        else None,
        shape_cycle=ShapeCycle(shape.WEIGHT, shape.MAX_NUM_VERTICES, shape.TEMPERATURE)
        if shape.ENABLED
        else None,
    )
