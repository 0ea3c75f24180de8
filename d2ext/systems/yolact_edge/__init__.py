"""YolactEdge (arXiv 2012.12259): YOLACT on videos, with features carried over from key frames."""

from d2ext.systems.yolact_edge import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.yolact_edge.flow import FlowNet, Refinement
from d2ext.systems.yolact_edge.model import YolactEdge, YolactEdgeMemory

__all__ = ["FlowNet", "Refinement", "YolactEdge", "YolactEdgeMemory"]
