"""UPSNet beside Detectron2's Panoptic FPN, and UPSNet's two ways to merge its heads' results.

Panoptic FPN merges by rules (arXiv 1901.02446), UPSNet by its panoptic head (arXiv 1901.03784); the
third arm merges the results of the same UPSNet by the rules.
"""

from __future__ import annotations

from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison

_UPSNET = "upsnet/upsnet_shapes.yaml"
_GROUPS = {"": "", "_th": " things", "_st": " stuff"}


@COMPARISONS.register()
def panoptic() -> Comparison:
    """Both with the same backbone and budget on the built-in `shapes`."""
    rules = ("MODEL.UPSNET.TEST.PANOPTIC", "heuristic")
    columns = {
        f"panoptic_seg/{metric}{group}": metric + title
        for group, title in _GROUPS.items()
        for metric in ("PQ", "SQ", "RQ")
    }
    return Comparison(
        summary="UPSNet and Panoptic FPN: panoptic, segmentation and recognition quality",
        arms={
            "panoptic_fpn": Arm("Panoptic FPN", "baselines/panoptic_fpn_shapes.yaml"),
            "upsnet": Arm("UPSNet, panoptic head", _UPSNET),
            "upsnet_rules": Arm("UPSNet, merged by rules", _UPSNET, rules, trained_by="upsnet"),
        },
        columns={**columns, "segm/AP": "mask AP", "sem_seg/mIoU": "mIoU"},
    )
