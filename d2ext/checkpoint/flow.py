"""Weights of networks for optical flow: NVIDIA's FlowNet2, torchvision's RAFT, d2ext's own.

All parameters of the published files are used. The result has the names of an ``OpticalFlow`` model,
whose estimator is its part ``flow``.
"""

from __future__ import annotations

from torch import Tensor, nn

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    register_converter,
    unwrap,
)
from d2ext.checkpoint.io import CheckpointError, load_untrusted

__all__ = ["flownet2_rules", "load_flow_weights"]

_PREFIX = "flow."
_NETWORKS = "(flownetc|flownets_1|flownets_2|flownets_d|flownetfusion)"
# A layer of any of them, which may be the first of an nn.Sequential.
_LAYER = (
    r"((?:inter_)?conv(?:\d(?:_1)?|_redir)|deconv\d|predict_flow\d|upsampled_flow\d_to_\d)"
    r"(?:\.0)?\.(weight|bias)"
)
_RAFT_PARTS = "(feature_encoder|context_encoder|corr_block|update_block|mask_predictor)"


def flownet2_rules(source: str = "", target: str = _PREFIX) -> tuple[Rule, ...]:
    """How the published names of FlowNet2 become ours.

    Args:
        source: regular expression before the published names, without groups; in VPSNet's files
            ``flownet2\\.``.
        target: prefix of our names.
    """
    return (Rule(rf"{source}{_NETWORKS}\.{_LAYER}", rf"{target}\1.\2.\3"),)


@register_converter("flownet2")
def convert_flownet2(state_dict: StateDict) -> dict[str, Tensor]:
    """NVIDIA's FlowNet2, or its FlowNet2-C, -S or -SD alone → ``OpticalFlow`` with that estimator."""
    alone = Rule(_LAYER, rf"{_PREFIX}network.\1.\2")
    return apply_rules(state_dict, (*flownet2_rules(), alone))


@register_converter("raft")
def convert_raft(state_dict: StateDict) -> dict[str, Tensor]:
    """torchvision's RAFT, large or small → ``OpticalFlow`` with ``RAFTLarge`` or ``RAFTSmall``."""
    return apply_rules(state_dict, (Rule(rf"{_RAFT_PARTS}\.(.*)", rf"{_PREFIX}network.\1.\2"),))


def load_flow_weights(estimator: nn.Module, path: str) -> None:
    """Load an estimator's weights (``MODEL.FLOW.WEIGHTS``), in place.

    Args:
        estimator: as ``d2ext.modeling.flow.build_flow`` makes it.
        path: FlowNet2 as NVIDIA, RAFT as torchvision published it, or a checkpoint of a model of d2ext
            that has an estimator (``OpticalFlow``, ``VPSNet``).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is unreadable, or of another estimator.
    """
    try:
        published = unwrap(load_untrusted(path))
        state = {name: value for name, value in published.items() if name.startswith(_PREFIX)}
        if not state:
            raft = any(name.startswith("feature_encoder.") for name in published)
            state = (convert_raft if raft else convert_flownet2)(published)
    except ConversionError as error:
        raise CheckpointError(
            f"MODEL.FLOW.WEIGHTS {path!r} is no network for optical flow that d2ext knows (FlowNet2 as "
            f"NVIDIA published it, RAFT as torchvision did, or d2ext's own): {error}"
        ) from error
    try:
        estimator.load_state_dict({k.removeprefix(_PREFIX): v for k, v in state.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"MODEL.FLOW.WEIGHTS {path!r} is of another estimator than MODEL.FLOW.NAME, "
            f"{type(estimator).__name__}. {str(error)[:500]}"
        ) from error
