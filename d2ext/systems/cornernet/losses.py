"""CornerNet's losses (arXiv 1808.01244, sections 3.2 to 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from d2ext.codecs.corners import CornerTargets, PointMaps, PointTargets
from d2ext.codecs.heatmaps import gather_at
from d2ext.modeling.embedding_losses import pull_push_loss
from d2ext.modeling.heatmap_losses import penalty_reduced_focal_loss, smooth_l1_at_cells


class CornerNetCriterion(nn.Module):
    """Sums the terms over points and averages them over stacks.

    Args:
        heat_weight, pull_weight, push_weight, offset_weight: factors of the terms.
    """

    def __init__(
        self,
        *,
        heat_weight: float = 1.0,
        pull_weight: float = 0.1,
        push_weight: float = 0.1,
        offset_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights = {
            "heat": heat_weight,
            "pull": pull_weight,
            "push": push_weight,
            "offset": offset_weight,
        }

    def points(
        self, predictions: Sequence[PointMaps], targets: CornerTargets
    ) -> list[tuple[PointMaps, PointTargets]]:
        """Predictions beside their targets."""
        return list(zip(predictions, (targets.top_left, targets.bottom_right), strict=True))

    def terms(
        self, predictions: Sequence[PointMaps], targets: CornerTargets
    ) -> dict[str, list[Tensor]]:
        """Unweighted losses of one stack: of each kind of point, or one for all."""
        pairs = self.points(predictions, targets)
        tags = [
            gather_at(maps.embedding, target.index)[..., 0]
            for maps, target in pairs
            if maps.embedding is not None
        ]
        first, second = tags
        pull, push = pull_push_loss(first, second, targets.mask)
        return {
            "heat": [penalty_reduced_focal_loss(maps.heat, target.heat) for maps, target in pairs],
            "pull": [pull],
            "push": [push],
            "offset": [
                smooth_l1_at_cells(maps.offset, target.index, target.offset, targets.mask)
                for maps, target in pairs
            ],
        }

    def forward(
        self, stacks: Sequence[Sequence[PointMaps]], targets: CornerTargets
    ) -> dict[str, Tensor]:
        """Predictions of every stack → ``loss_heat``, ``loss_pull``, ``loss_push``, ``loss_offset``."""
        terms = [self.terms(predictions, targets) for predictions in stacks]
        return {
            f"loss_{name}": sum(sum(stack[name]) for stack in terms) * (weight / len(stacks))
            for name, weight in self.weights.items()
        }
