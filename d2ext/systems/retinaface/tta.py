"""RetinaFace's test-time augmentation: several sizes, each also mirrored, and box voting.

As in the paper (arXiv 1905.00641; retinaface/NOTES.md, "WIDER FACE protocol"). The model predicts on
each view by itself, NMS included. Of the union the best box and those that overlap it are one face, then
the best of the rest and those that overlap it, and so on. A face has the best score; its box is the mean
of the votes, weighted by their scores. So are points and vertices, of which the paper does not say it:
they belong to the box, and their noise is averaged, too.

Letters: N detections of all views of an image, G faces.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from d2ext.codecs.boxes import mirror_boxes
from d2ext.codecs.face_alignment import face_poses
from d2ext.config import ConfigError
from d2ext.data.dataset_facts import flip_indices
from d2ext.data.errors import DatasetError
from d2ext.data.faces import mirror_permutation, read_topology
from d2ext.data.saved_metadata import known_metadata
from d2ext.modeling.tta import TTA_REGISTRY, MultiSizeTTA
from d2ext.systems.retinaface.model import RetinaFace


@TTA_REGISTRY.register()
class RetinaFaceWithTTA(MultiSizeTTA):
    """Wraps a model for inference: predicts on several views of an image."""

    section = "RETINAFACE"
    model: RetinaFace

    @configurable
    def __init__(
        self,
        model: RetinaFace,
        *,
        vote_iou: float,
        point_partners: Sequence[int] | None = None,
        vertex_partners: Sequence[int] | None = None,
        **sizes: Any,
    ) -> None:
        """Args:
        model: predicts on each view.
        vote_iou: see :func:`vote`.
        point_partners, vertex_partners: with ``flip``, the point and the vertex that takes the place
            of each one in a mirrored picture; of a model with points, with meshes.
        sizes: see the base class.
        """
        super().__init__(model, **sizes)
        self.vote_iou = vote_iou
        # By name of the field.
        self.partners = {"pred_keypoints": point_partners, "pred_face_meshes": vertex_partners}

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        options, head, flip = super().from_config(cfg, model), model.head, cls._keys(cfg).FLIP
        if flip and head.num_points:
            options["point_partners"] = _point_partners(cfg, head.num_points)
        if flip and head.mesh is not None:
            options["vertex_partners"] = _vertex_partners(cfg, head.mesh.num_vertices)
        return options

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """As :class:`RetinaFace` in inference."""
        views: list[list[Instances]] = [[] for _ in batched_inputs]
        mirrored = [x | {"image": x["image"].flip(-1)} for x in batched_inputs]
        for model in self.models():
            for own, output in zip(views, model(batched_inputs), strict=True):
                own.append(output["instances"])
            for own, output in zip(views, model(mirrored) if self.flip else [], strict=self.flip):
                own.append(self.mirror(output["instances"]))
        return [{"instances": self.merge(Instances.cat(own))} for own in views]

    def models(self) -> list[RetinaFace]:
        """The model at each size; they share everything else."""
        models = [self.model] if not self.min_sizes else []
        for short in self.min_sizes:
            models.append(copy.copy(self.model))
            models[-1].min_size, models[-1].max_size = short, self.max_size
        return models

    def mirror(self, instances: Instances) -> Instances:
        """Detections on a mirrored image → those on the image. Poses stay, see :meth:`merge`."""
        result, width = Instances(instances.image_size), instances.image_size[1]
        for name, value in instances.get_fields().items():
            if isinstance(value, Boxes):
                value = Boxes(mirror_boxes(value.tensor, width))
            elif name in self.partners:
                value = value[:, self.partners[name]]
                value[..., 0] = width - value[..., 0]
            result.set(name, value)
        return result

    def merge(self, detections: Instances) -> Instances:
        """Detections (N) of all views of an image → its faces, best first."""
        first, group = vote(detections, self.vote_iou, self.model.max_detections)
        detections, group = detections[group >= 0], group[group >= 0]
        scores = detections.scores
        weights = scores / scores.new_zeros(len(first)).index_add_(0, group, scores)[group]

        def mean(values: Tensor) -> Tensor:
            """(N, ...) → (G, ...)."""
            weighted = values * weights.view(-1, *[1] * (values.ndim - 1))
            return values.new_zeros((len(first), *values.shape[1:])).index_add_(0, group, weighted)

        first.pred_boxes = Boxes(mean(detections.pred_boxes.tensor))
        for name in self.partners:
            if first.has(name):
                first.set(name, mean(detections.get(name)))
        if first.has("pred_face_poses"):
            assert self.model.head.mesh is not None
            mean_face = self.model.head.mesh.mean
            first.pred_face_poses = face_poses(first.pred_face_meshes, mean_face)
        return first


def vote(detections: Instances, iou: float = 0.4, max_faces: int = 750) -> tuple[Instances, Tensor]:
    """Which detections are one face: the best one, and those of its class that overlap it by at least
    ``iou``, counted in whole pixels as in NMS; then again of the rest.

    Returns:
        the best detection of each face, (G) by falling score; of each detection the number of its face,
        (N,) int64, or -1 beyond ``max_faces``.
    """
    boxes = detections.pred_boxes.tensor.cpu().double() + torch.tensor([0, 0, 1, 1])
    classes, group = detections.pred_classes.cpu(), torch.full((len(boxes),), -1)
    rest = detections.scores.cpu().argsort(descending=True, stable=True)
    first: list[int] = []
    while len(rest) and len(first) < max_faces:
        best = rest[0]
        same = pairwise_iou(Boxes(boxes[best][None]), Boxes(boxes[rest]))[0] >= iou
        same &= classes[rest] == classes[best]
        same[0] = True  # also if it has no area
        group[rest[same]] = len(first)
        first.append(int(best))
        rest = rest[~same]
    device = detections.scores.device
    return detections[torch.tensor(first, dtype=torch.int64, device=device)], group.to(device)


def _point_partners(cfg: CfgNode, count: int) -> list[int]:
    """The mirror partner of each point, from the first data set that has as many."""
    for metadata in known_metadata(cfg):
        if len(metadata.get("keypoint_names") or ()) == count:
            return flip_indices(metadata)
    raise ConfigError(
        "MODEL.RETINAFACE.TEST.AUG.FLIP needs to know left from right: name a data set in "
        f"DATASETS.TEST whose metadata have the keypoint_names and keypoint_flip_map of {count} points."
    )


def _vertex_partners(cfg: CfgNode, count: int) -> list[int]:
    """The mirror partner of each vertex: of the first data set that has as many, or because the mean
    face is symmetric."""
    for metadata in known_metadata(cfg):
        if len(metadata.get("mesh_flip") or ()) == count:
            return list(metadata.mesh_flip)
    try:
        return mirror_permutation(read_topology(cfg.MODEL.RETINAFACE.MESH.FILE)[0])
    except DatasetError as error:
        raise ConfigError(
            "MODEL.RETINAFACE.TEST.AUG.FLIP needs to know each vertex's mirror partner: set it to "
            f"False, or name the data set in DATASETS. ({error})"
        ) from error
