"""Optical flow between two images: estimators behind one interface."""

from d2ext.modeling.flow.config import add_flow_config
from d2ext.modeling.flow.estimator import FLOW_REGISTRY, FlowEstimator, build_flow
from d2ext.modeling.flow.flownet2 import FlowNet2, FlowNet2C, FlowNet2S, FlowNet2SD

__all__ = [
    "FLOW_REGISTRY",
    "FlowEstimator",
    "FlowNet2",
    "FlowNet2C",
    "FlowNet2S",
    "FlowNet2SD",
    "add_flow_config",
    "build_flow",
]
