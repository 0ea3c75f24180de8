"""Detectron2's DensePose checkpoints, charts and embeddings → the state dict of our model.

Names are the same. Files of the model zoo hold NumPy arrays in a pickle, which is read as data
(:mod:`d2ext.checkpoint.io`).
"""

from __future__ import annotations

from torch import Tensor

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    register_converter,
)

_RULES = (
    # Constants of the config, which files of older versions hold.
    Rule(r"pixel_(mean|std)", None),
    Rule(r"proposal_generator\.anchor_generator\.cell_anchors\.\d+", None),
    Rule(
        r"((?:backbone|proposal_generator\.rpn_head"
        r"|roi_heads\.(?:box_head|box_predictor|decoder|densepose_head|densepose_predictor|embedder))"
        r"\..+)",
        r"\1",
    ),
)


@register_converter("densepose")
def convert_densepose(state_dict: StateDict) -> dict[str, Tensor]:
    """Detectron2's DensePose checkpoint of any config → ours.

    Raises:
        ConversionError: the names are not those of a DensePose checkpoint.
    """
    if not any(name.startswith("roi_heads.densepose_predictor.") for name in state_dict):
        raise ConversionError(
            'A DensePose checkpoint of Detectron2 has "roi_heads.densepose_predictor.*" and this one '
            "has not: it belongs to another system. (The original Caffe2 models are not read.)"
        )
    return apply_rules(state_dict, _RULES)
