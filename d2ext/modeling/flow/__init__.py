"""Optical flow between two images: estimators behind one interface."""

from d2ext.modeling.flow.config import add_flow_config
from d2ext.modeling.flow.estimator import FLOW_REGISTRY, FlowEstimator, build_flow
from d2ext.modeling.flow.flownet2 import FlowNet2, FlowNet2C, FlowNet2S, FlowNet2SD
from d2ext.modeling.flow.model import OpticalFlow
from d2ext.modeling.flow.pyramid_flow import PyramidFlow
from d2ext.modeling.flow.raft import RAFTLarge, RAFTSmall
from d2ext.modeling.flow.weightless import DIS, Exact

__all__ = [
    "DIS",
    "FLOW_REGISTRY",
    "Exact",
    "FlowEstimator",
    "FlowNet2",
    "FlowNet2C",
    "FlowNet2S",
    "FlowNet2SD",
    "OpticalFlow",
    "PyramidFlow",
    "RAFTLarge",
    "RAFTSmall",
    "add_flow_config",
    "build_flow",
]
