"""CenterNet's losses (arXiv 1904.07850, sections 3 and 4).

Shapes: B images, h×w cells, C classes, J joints, S stacks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2ext.modeling.heatmap_losses import (
    dense_l1,
    l1_at_cells,
    penalty_reduced_focal_loss,
    smooth_l1_at_cells,
)
from d2ext.systems.centernet.head import Predictions
from d2ext.systems.centernet.targets import CenterNetTargets, dense_targets

_REGRESSIONS = {"l1": l1_at_cells, "smooth_l1": smooth_l1_at_cells}
_HEATMAPS = {
    "focal": penalty_reduced_focal_loss,
    # Published `--mse_loss`: the mean over all cells, of the maps before the sigmoid.
    "mse": lambda logits, target: nn.functional.mse_loss(logits.float(), target),
}
_SIZE_TARGETS = ("center", "dense", "class_specific")
_JOINT_TARGETS = ("center", "dense")


class CenterNetCriterion:
    """Weighted losses of all stacks' raw maps, averaged over the stacks; has no parameters.

    Args:
        heatmap_weight, size_weight, offset_weight: of detection.
        joint_weight, joint_heatmap_weight, joint_offset_weight: of poses.
        heatmap: of heat maps, "focal" or "mse".
        regression: of sizes and offsets at centres, "l1" (the mean over values) or "smooth_l1" (over
            objects).
        size_target: "center", "dense" or "class_specific".
        joint_target: "center" or "dense". Always L1.
    """

    def __init__(
        self,
        *,
        heatmap_weight: float = 1.0,
        size_weight: float = 0.1,
        offset_weight: float = 1.0,
        joint_weight: float = 1.0,
        joint_heatmap_weight: float = 1.0,
        joint_offset_weight: float = 1.0,
        heatmap: str = "focal",
        regression: str = "l1",
        size_target: str = "center",
        joint_target: str = "center",
    ) -> None:
        for value, allowed, key in (
            (heatmap, tuple(_HEATMAPS), "LOSS.HEATMAP"),
            (regression, tuple(_REGRESSIONS), "LOSS.REGRESSION"),
            (size_target, _SIZE_TARGETS, "SIZE_TARGET"),
            (joint_target, _JOINT_TARGETS, "POSE.TARGET"),
        ):
            if value not in allowed:
                raise ValueError(f'MODEL.CENTERNET.{key} is one of {allowed}, not "{value}".')
        self.heatmap = _HEATMAPS[heatmap]
        self.regression = _REGRESSIONS[regression]
        self.size_target = size_target
        self.joint_target = joint_target
        self.weights = {
            "loss_heatmap": heatmap_weight,
            "loss_size": size_weight,
            "loss_offset": offset_weight,
            "loss_joint": joint_weight,
            "loss_joint_heatmap": joint_heatmap_weight,
            "loss_joint_offset": joint_offset_weight,
        }

    def __call__(
        self, stacks: Sequence[Predictions], targets: CenterNetTargets
    ) -> dict[str, Tensor]:
        """The weighted losses; see :meth:`terms`."""
        totals: dict[str, Tensor] = {}
        for predictions in stacks:
            for name, value in self.terms(predictions, targets).items():
                share = value * (self.weights[name] / len(stacks))
                totals[name] = totals[name] + share if name in totals else share
        return totals

    def terms(self, predictions: Predictions, targets: CenterNetTargets) -> dict[str, Tensor]:
        """Unweighted losses of the maps that one stack has."""
        terms = {
            "loss_heatmap": self.heatmap(predictions["heatmap"], targets.heatmap),
            "loss_size": self._size_loss(predictions["size"], targets),
        }
        if "offset" in predictions:
            terms["loss_offset"] = self.regression(
                predictions["offset"], targets.index, targets.offset, targets.mask
            )
        joints = targets.joints
        if joints is not None:
            if "joint_heatmap" in predictions:
                terms["loss_joint_heatmap"] = self.heatmap(
                    predictions["joint_heatmap"], joints.heatmap
                )
            if "joint_offset" in predictions:
                terms["loss_joint_offset"] = self.regression(
                    predictions["joint_offset"], joints.index, joints.offset, joints.offset_mask
                )
            if self.joint_target == "dense":
                dense = dense_targets(targets, joints=True)
                terms["loss_joint"] = dense_l1(predictions["joints"], *dense)
            else:
                terms["loss_joint"] = l1_at_cells(
                    predictions["joints"], targets.index, joints.position, joints.position_mask
                )
        return terms

    def _size_loss(self, size: Tensor, targets: CenterNetTargets) -> Tensor:
        if self.size_target == "dense":
            return dense_l1(size, *dense_targets(targets, joints=False))
        if self.size_target == "center":
            return self.regression(size, targets.index, targets.size, targets.mask)
        # The object's class has the channels 2c and 2c + 1; the others do not count.
        num_classes = size.shape[1] // 2
        of_class = nn.functional.one_hot(targets.classes, num_classes).bool()[..., None]
        values = torch.where(of_class, targets.size[:, :, None], 0.0).flatten(2)
        mask = (of_class & targets.mask[..., None, None]).expand(-1, -1, -1, 2).flatten(2)
        return l1_at_cells(size, targets.index, values, mask)
