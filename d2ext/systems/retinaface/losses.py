"""RetinaFace's losses (arXiv 1905.00641, section 3.1; retinaface/NOTES.md, "Loss").

Letters: B images, A priors, P points, V mesh vertices, E edges, M priors whose meshes are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.canvas import scale_points
from d2ext.codecs.prior_boxes import PriorMatches, encode_boxes, encode_points, mine_negatives
from d2ext.systems.retinaface.head import RetinaFacePredictions
from d2ext.systems.retinaface.mesh import MeshHead, decode_meshes
from d2ext.systems.retinaface.targets import RetinaFaceTargets, match_priors

_MINING = ("image", "batch")


@dataclass(kw_only=True)
class RetinaFaceCriterion:
    """Matches priors with faces and sums up the losses; has no parameters.

    Args:
        box_weight ... edge_weight: factors of the terms.
        positive_iou, negative_iou, forced_iou: see :func:`match_priors`.
        negatives_per_positive, min_negatives: see :func:`mine_negatives`.
        mining: "image" or "batch", among which priors the hardest negatives are selected.
        smooth_l1_beta: error at which smooth L1 becomes linear.
        max_meshes: most positives of an image whose meshes are trained; a random selection of more.
        edges: (E, 2) of the mesh; None: it is not known.
    """

    box_weight: float = 2.0
    class_weight: float = 1.0
    landmark_weight: float = 1.0
    vertex_weight: float = 5.0
    edge_weight: float = 5.0
    positive_iou: float = 0.35
    negative_iou: float = 0.35
    forced_iou: float = 0.2
    negatives_per_positive: int = 7
    min_negatives: int = 0
    mining: str = "image"
    smooth_l1_beta: float = 1.0
    max_meshes: int = 64
    edges: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mining not in _MINING:
            raise ValueError(
                f'MODEL.RETINAFACE.LOSS.MINING is "image" or "batch", not "{self.mining}".'
            )

    def match(self, priors: Tensor, targets: Sequence[RetinaFaceTargets]) -> list[PriorMatches]:
        """Match the priors (A, 4) with each image's faces."""
        return [
            match_priors(
                priors,
                target.boxes,
                target.classes,
                positive_iou=self.positive_iou,
                negative_iou=self.negative_iou,
                forced_iou=self.forced_iou,
            )
            for target in targets
        ]

    def mine(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Negatives that are trained, (B, A) bool, of logits (B, A, classes + 1), labels (B, A)."""
        shape = labels.shape
        minimum = self.min_negatives
        if self.mining == "batch":
            minimum *= len(labels)
            logits, labels = logits.flatten(0, 1)[None], labels.flatten()[None]
        mined = mine_negatives(logits, labels, self.negatives_per_positive, minimum)
        return mined.reshape(shape)

    def __call__(
        self,
        predictions: RetinaFacePredictions,
        priors: Tensor,
        targets: Sequence[RetinaFaceTargets],
        mesh_head: MeshHead | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            predictions: of the network.
            priors: (A, 4) centre form.
            targets: one per image.
            mesh_head: the mesh branch; None: no such loss.

        Returns:
            ``loss_box``, ``loss_class`` and, as far as the model predicts them, ``loss_landmark``,
            ``loss_vertex``, ``loss_edge``: scalars, weighted. The first two are divided by the number of
            positives of the batch, the third by that of positives whose face has points; at least by 1.
        """
        matches = self.match(priors, targets)
        labels = torch.stack([m.labels for m in matches])
        image_of, prior_of = (labels > 0).nonzero(as_tuple=True)
        counts = torch.tensor([0, *(len(t.boxes) for t in targets[:-1])], device=labels.device)
        # Index of a positive's face in the concatenation of all faces.
        face_of = torch.stack([m.objects for m in matches])[image_of, prior_of]
        face_of = face_of + counts.cumsum(0)[image_of]
        positive_priors = priors[prior_of]
        normalizer = max(len(image_of), 1)

        boxes = torch.cat([target.boxes for target in targets])[face_of]
        box_loss = self._smooth_l1(
            predictions.offsets[image_of, prior_of], encode_boxes(boxes, positive_priors)
        ).sum()
        trained = self.mine(predictions.logits, labels) | (labels > 0)
        class_loss = F.cross_entropy(
            predictions.logits[trained].float(), labels[trained], reduction="sum"
        )
        losses = {
            "loss_box": box_loss * (self.box_weight / normalizer),
            "loss_class": class_loss * (self.class_weight / normalizer),
        }
        if predictions.points is not None:
            points = torch.cat([target.points for target in targets])[face_of]
            annotated = torch.cat([target.annotated for target in targets])[face_of]
            errors = self._smooth_l1(
                predictions.points[image_of, prior_of], encode_points(points, positive_priors)
            )
            # Where nothing is annotated the target may be far away: 0, whatever the error.
            errors = errors.masked_fill(~annotated[..., None], 0.0)
            faces = annotated.any(dim=1).sum().clamp(min=1)
            losses["loss_landmark"] = errors.sum() * (self.landmark_weight / faces)
        if mesh_head is not None:
            height, width = predictions.input_size
            has_mesh = torch.cat([target.has_mesh for target in targets])[face_of]
            chosen = self._choose_meshes(image_of, has_mesh)
            vertex_loss, edge_loss = self._mesh_losses(
                self._predict_meshes(
                    mesh_head,
                    predictions,
                    image_of[chosen],
                    prior_of[chosen],
                    scale_points(positive_priors[chosen], (width, height)),
                ),
                torch.cat([target.meshes for target in targets])[face_of[chosen]],
                scale_points(boxes[chosen], (width, height)),
            )
            losses["loss_vertex"] = vertex_loss * self.vertex_weight
            losses["loss_edge"] = edge_loss * self.edge_weight
        return losses

    def _choose_meshes(self, image_of: Tensor, has_mesh: Tensor) -> Tensor:
        """Indices (M,) into the positives: at most ``max_meshes`` of each image, drawn at random."""
        shuffled = torch.randperm(len(image_of), device=image_of.device)
        shuffled = shuffled[has_mesh[shuffled]]
        images, order = image_of[shuffled].sort(stable=True)
        # Place of each among those of its image.
        place = torch.arange(len(images), device=images.device) - torch.searchsorted(images, images)
        return shuffled[order][place < self.max_meshes]

    @staticmethod
    def _predict_meshes(
        head: MeshHead,
        predictions: RetinaFacePredictions,
        image_of: Tensor,
        prior_of: Tensor,
        priors: Tensor,
    ) -> Tensor:
        """Meshes (M, V, 3) in pixels, of priors (M, 4) in pixels."""
        assert predictions.vectors is not None
        vectors = predictions.vectors[image_of, prior_of // head.priors_per_cell]
        return decode_meshes(head(vectors, prior_of % head.priors_per_cell).float(), priors)

    def _mesh_losses(self, meshes: Tensor, target: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Means of both terms for meshes (M, V, 3) and faces' boxes (M, 4), in pixels."""
        size = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
        count = max(len(meshes), 1)
        vertex = ((meshes - target).abs().mean(dim=(1, 2)) / size).sum() / count
        if self.edge_weight == 0:
            return vertex, meshes.sum() * 0.0
        if self.edges is None:
            raise ValueError(
                "The edge loss needs the mesh's topology: set MODEL.RETINAFACE.MESH.FILE to an OBJ file "
                "that exists, or MODEL.RETINAFACE.LOSS.EDGE_WEIGHT to 0."
            )
        edges = self.edges.to(meshes.device)
        lengths = [_lengths(x, edges) for x in (meshes, target)]
        edge = ((lengths[0] - lengths[1]).abs().mean(dim=1) / size).sum() / count
        return vertex, edge

    def _smooth_l1(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(
            predicted.float(), target, beta=self.smooth_l1_beta, reduction="none"
        )


def _lengths(meshes: Tensor, edges: Tensor) -> Tensor:
    """Lengths (M, E) of the edges (E, 2) of meshes (M, V, 3)."""
    first, second = edges.unbind(dim=1)
    # Its gradient takes an eighth of the time that indexing's does on a CPU.
    difference = meshes.index_select(1, first) - meshes.index_select(1, second)
    # The gradient of the root is infinite at 0; a millionth of a pixel hurts nobody.
    return difference.square().sum(dim=2).clamp(min=1e-12).sqrt()
