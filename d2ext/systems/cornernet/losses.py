"""Losses of CornerNet (arXiv 1808.01244, sections 3.2 to 3.4) and of CornerNet-Saccade's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d2ext.codecs.heatmaps import gather_at
from d2ext.modeling.embedding_losses import pull_push_loss
from d2ext.modeling.heatmap_losses import penalty_reduced_focal_loss, smooth_l1_at_cells
from d2ext.systems.cornernet.head import SaccadePredictions
from d2ext.systems.cornernet.targets import SaccadeTargets


class CornerNetCriterion:
    """Terms summed over kinds of points (corners, and centres if the targets have them) and averaged
    over stacks; has no parameters.

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
        self.weights = {
            "heat": heat_weight,
            "pull": pull_weight,
            "push": push_weight,
            "offset": offset_weight,
        }

    def terms(self, predictions: Any, targets: Any) -> dict[str, list[Tensor]]:
        """Unweighted losses of one stack: for each kind of point, or one for all."""
        points = (targets.top_left, targets.bottom_right, targets.center)
        kinds = [point for point in points if point is not None]
        pairs = list(zip(predictions[: len(kinds)], kinds, strict=True))
        first, second = (
            gather_at(maps.embedding, target.index)[..., 0]
            for maps, target in pairs
            if maps.embedding is not None
        )
        pull, push = pull_push_loss(first, second, targets.mask)
        return {
            "heat": [
                penalty_reduced_focal_loss(maps.heat, target.heat, target.valid)
                for maps, target in pairs
            ],
            "pull": [pull],
            "push": [push],
            "offset": [
                smooth_l1_at_cells(maps.offset, target.index, target.offset, targets.mask)
                for maps, target in pairs
            ],
        }

    def __call__(self, stacks: Sequence[Sequence[Any]], targets: Any) -> dict[str, Tensor]:
        """Predictions of every stack → ``loss_heat``, ``loss_pull``, ``loss_push``, ``loss_offset``."""
        terms = [self.terms(predictions, targets) for predictions in stacks]
        return {
            f"loss_{name}": sum(sum(stack[name]) for stack in terms) * (weight / len(stacks))
            for name, weight in self.weights.items()
        }


class SaccadeCriterion(CornerNetCriterion):
    """CornerNet's losses, and those of the attention maps."""

    def __init__(self, **weights: float) -> None:
        super().__init__(**weights)
        self.weights["attention"] = 1.0

    def terms(
        self, predictions: SaccadePredictions, targets: SaccadeTargets
    ) -> dict[str, list[Tensor]]:
        terms = super().terms(predictions, targets.corners)
        pairs = zip(predictions.attention, targets.attention, strict=True)
        terms["attention"] = [penalty_reduced_focal_loss(x, target) for x, target in pairs]
        return terms

    def __call__(self, stacks: Sequence[Any], targets: SaccadeTargets) -> dict[str, Tensor]:
        """CornerNet's four losses and ``loss_attention``.

        Published quirk: the attention losses are divided by the number of stacks twice.
        """
        losses = super().__call__(stacks, targets)
        return {**losses, "loss_attention": losses["loss_attention"] / len(stacks)}
