"""Published UPSNet checkpoints → :class:`UPSNet`'s state dict.

Detectron2 has the background last among the classes and no boxes and masks for it; published checkpoints
have it first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    background_last,
    register_converter,
)

_BLOCK = r"resnet_backbone\.res(\d)\.layers\.(\d+)"
_OUR_BLOCK = r"backbone.bottom_up.res\1.\2"
_RULES = (
    # Counters of batch norms, unused because these are never trained.
    Rule(r"resnet_backbone\..*num_batches_tracked", None),
    Rule(r"resnet_backbone\.conv1\.conv1\.weight", "backbone.bottom_up.stem.conv1.weight"),
    Rule(r"resnet_backbone\.conv1\.bn1\.(\w+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
    Rule(rf"{_BLOCK}\.(conv\d)\.weight", rf"{_OUR_BLOCK}.\3.weight"),
    Rule(rf"{_BLOCK}\.conv2_offset\.(\w+)", rf"{_OUR_BLOCK}.conv2.offset.\3"),
    Rule(rf"{_BLOCK}\.bn(\d)\.(\w+)", rf"{_OUR_BLOCK}.conv\3.norm.\4"),
    Rule(rf"{_BLOCK}\.downsample\.0\.weight", rf"{_OUR_BLOCK}.shortcut.weight"),
    Rule(rf"{_BLOCK}\.downsample\.1\.(\w+)", rf"{_OUR_BLOCK}.shortcut.norm.\3"),
    Rule(r"fpn\.fpn_p(\d)_1x1\.(\w+)", r"backbone.fpn_lateral\1.\2"),
    Rule(r"fpn\.fpn_p(\d)\.(\w+)", r"backbone.fpn_output\1.\2"),
    Rule(r"fpn\.fpn_gap\.(\w+)", r"backbone.fpn_context.\1"),
    Rule(r"rpn\.conv_proposal\.0\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
    Rule(r"rpn\.cls_score\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    Rule(r"rpn\.bbox_pred\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    Rule(r"rcnn\.fc6\.0\.(\w+)", r"roi_heads.box_head.fc1.\1"),
    Rule(r"rcnn\.fc7\.0\.(\w+)", r"roi_heads.box_head.fc2.\1"),
    Rule(r"rcnn\.(cls_score|bbox_pred)\.(\w+)", r"roi_heads.box_predictor.\1.\2"),
    Rule(r"mask_branch\.mask_conv(\d)\.0\.(\w+)", r"roi_heads.mask_head.mask_fcn\1.\2"),
    Rule(r"mask_branch\.mask_deconv1\.0\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
    Rule(r"mask_branch\.mask_score\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
    Rule(
        r"fcn_head\.fcn_subnet\.conv\.(\d)\.0\.conv_offset\.(\w+)",
        r"sem_seg_head.layers.\1.offset.\2",
    ),
    Rule(r"fcn_head\.fcn_subnet\.conv\.(\d)\.0\.conv\.(\w+)", r"sem_seg_head.layers.\1.\2"),
    Rule(r"fcn_head\.score\.(\w+)", r"sem_seg_head.score.\1"),
)
# Entries whose rows are classes, with the background first, and the rows of each class.
_CLASS_ROWS = {"rcnn.cls_score": 1, "rcnn.bbox_pred": 4, "mask_branch.mask_score": 1}

# How the published code starts on Cityscapes from COCO: for each Cityscapes class (background, person,
# rider, car, truck, bus, train, motorcycle, bicycle) the row of COCO that it begins with; None: random.
_CITYSCAPES_CLASSES = (0, 1, None, 3, 8, 6, 7, 4, 2)
# The same for the 19 semantic classes, in the order of the train ids.
_CITYSCAPES_SEMANTIC = (
    *(20, 43, 49, 51, 37, None, 62, None, 36, None, 39),
    *(53, None, 55, 60, 58, 59, 56, 54),
)
# Standard deviation of random rows, that of Detectron's class layers.
_RANDOM_STD = 0.01


@register_converter("upsnet")
def convert_upsnet(state_dict: StateDict) -> dict[str, Tensor]:
    """Published UPSNet checkpoint of any backbone and data set → :class:`UPSNet`'s state dict.

    The counters of the batch norms are dropped, and the background's rows of the box regression
    (``rcnn.bbox_pred``) and of the masks (``mask_branch.mask_score``).

    Raises:
        ConversionError: the names are not those of an UPSNet checkpoint.
    """
    if "fcn_head.score.weight" not in state_dict:
        raise ConversionError(
            'An UPSNet checkpoint has "fcn_head.score.weight" and this one has not: it belongs to '
            "another system, or is already converted. (ImageNet weights of a caffe-style ResNet "
            "need no conversion: set MODEL.WEIGHTS to them.)"
        )
    return apply_rules(background_last(state_dict, _CLASS_ROWS, "rcnn.cls_score"), _RULES)


@register_converter("upsnet_coco_to_cityscapes")
def start_cityscapes(state_dict: StateDict) -> dict[str, Tensor]:
    """Published UPSNet checkpoint for COCO → initial weights for Cityscapes.

    Rows of classes that both have are copied, the others are random (normal, seed 0). Load it with
    ``MODEL.WEIGHTS_ALLOW_PARTIAL`` if the two configs' layers differ.
    """
    generator = torch.Generator().manual_seed(0)
    changed = dict(state_dict)
    layers: dict[str, tuple[tuple[int | None, ...], int]] = {
        name: (_CITYSCAPES_CLASSES, rows) for name, rows in _CLASS_ROWS.items()
    }
    layers["fcn_head.score"] = (_CITYSCAPES_SEMANTIC, 1)
    for name, (classes, rows) in layers.items():
        weight = state_dict.get(f"{name}.weight")
        if weight is None or len(weight) < 63 * rows:
            raise ConversionError(
                f'This is no UPSNet checkpoint for COCO: see its "{name}.weight".'
            )
        for leaf in ("weight", "bias"):
            value = changed[f"{name}.{leaf}"]
            parts = []
            for own in classes:
                if own is not None:
                    parts.append(value[own * rows : (own + 1) * rows])
                else:
                    random = torch.randn((rows, *value.shape[1:]), generator=generator)
                    parts.append(random * (_RANDOM_STD if leaf == "weight" else 0.0))
            changed[f"{name}.{leaf}"] = torch.cat(parts)
    return convert_upsnet(changed)
