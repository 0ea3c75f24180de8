"""Published VPSNet checkpoints, FuseTrack and Fuse → :class:`VPSNet`'s state dict.

Detectron2 has the background last among the classes and no boxes and masks for it; published checkpoints
have it first.
"""

from __future__ import annotations

from torch import Tensor

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    background_last,
    register_converter,
)
from d2ext.checkpoint.flow import flownet2_rules
from d2ext.checkpoint.torchvision import resnet_rules

# Published levels of the neck are counted from the finest, res2.
_FUSION = {
    "tAtt_1": "temporal_embedding",
    "tAtt_2": "temporal_reference",
    "fea_fusion": "temporal_fusion",
    **{f"sAtt_{i}": f"spatial{i}" for i in range(1, 5)},
    **{f"sAtt_add_{i}": f"spatial_add{i}" for i in (1, 2)},
}
_RULES = (
    *flownet2_rules(source=r"flownet2\."),
    *resnet_rules(r"backbone\.", r"backbone\.layer", "backbone.bottom_up.", first_stage=1),
    Rule(
        r"neck\.lateral_convs\.(\d)\.conv\.(\w+)",
        lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}.{m[2]}",
    ),
    Rule(
        r"neck\.fpn_convs\.(\d)\.conv\.(\w+)",
        lambda m: f"backbone.fpn_output{int(m[1]) + 2}.{m[2]}",
    ),
    Rule(
        r"extra_neck\.liteflownet\.flow_estimator\.convs\.(\d)(?:\.0)?\.(\w+)",
        r"fusion.residual_flow.\1.\2",
    ),
    Rule(r"extra_neck\.tcea_fusion\.(\w+)\.(\w+)", lambda m: f"fusion.{_FUSION[m[1]]}.{m[2]}"),
    Rule(r"extra_neck\.refine\.conv\.(\w+)", r"fusion.refine.\1"),
    Rule(
        r"panopticFPN\.deform_convs\.0\.(\d)\.conv_offset\.(\w+)",
        lambda m: f"sem_seg_head.layers.{int(m[1]) // 3}.offset.{m[2]}",
    ),
    Rule(
        r"panopticFPN\.deform_convs\.0\.([036])\.conv\.(\w+)",
        lambda m: f"sem_seg_head.layers.{int(m[1]) // 3}.{m[2]}",
    ),
    Rule(
        r"panopticFPN\.deform_convs\.0\.([147])\.(\w+)",
        lambda m: f"sem_seg_head.layers.{int(m[1]) // 3}.norm.{m[2]}",
    ),
    Rule(r"panopticFPN\.conv_pred\.conv\.(\w+)", r"sem_seg_head.score.\1"),
    Rule(r"rpn_head\.rpn_conv\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
    Rule(r"rpn_head\.rpn_cls\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    Rule(r"rpn_head\.rpn_reg\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    Rule(
        r"bbox_head\.shared_fcs\.(\d)\.(\w+)",
        lambda m: f"roi_heads.box_head.fc{int(m[1]) + 1}.{m[2]}",
    ),
    Rule(r"bbox_head\.fc_cls\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
    Rule(r"bbox_head\.fc_reg\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    Rule(r"track_head\.fcs\.(\d)\.(\w+)", lambda m: f"track_head.fc{int(m[1]) + 1}.{m[2]}"),
    Rule(
        r"mask_head\.convs\.(\d)\.conv\.(\w+)",
        lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}",
    ),
    Rule(r"mask_head\.upsample\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
    Rule(r"mask_head\.conv_logits\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
)
# Entries whose rows are classes, and the rows of each class.
_CLASS_ROWS = {"bbox_head.fc_cls": 1, "bbox_head.fc_reg": 4, "mask_head.conv_logits": 1}


@register_converter("vpsnet")
def convert_vpsnet(state_dict: StateDict) -> dict[str, Tensor]:
    """Published VPSNet checkpoint → :class:`VPSNet`'s state dict, that of FlowNet2 included if it is
    there.

    The background's rows of the box regression (``bbox_head.fc_reg``) and of the masks
    (``mask_head.conv_logits``) are dropped.

    Raises:
        ConversionError: the names are not those of a VPSNet checkpoint.
    """
    if "panopticFPN.conv_pred.conv.weight" not in state_dict:
        raise ConversionError(
            'A VPSNet checkpoint has "panopticFPN.conv_pred.conv.weight" and this one has not: it '
            "belongs to another system, or is already converted."
        )
    return apply_rules(background_last(state_dict, _CLASS_ROWS, "bbox_head.fc_cls"), _RULES)
