"""Settings of the estimators of optical flow."""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


@CONFIG_REGISTRY.register()
def add_flow_config(cfg: CfgNode) -> None:
    """Add ``MODEL.FLOW`` to ``cfg``, in place."""
    flow = cfg.MODEL.FLOW = CfgNode()
    # What estimates optical flow:
    #   "FlowNet2", "FlowNet2C", "FlowNet2S", "FlowNet2SD"   arXiv 1612.01925; the first is VPSNet's
    #   "RAFTLarge", "RAFTSmall"   torchvision's, arXiv 2003.12039
    #   "PyramidFlow"   small; trained on `shapes` by configs/flow
    #   "DIS"     OpenCV's, without weights, on the CPU; arXiv 1603.03590
    #   "Exact"   the data set's own (INPUT.MAPPER ClipMapper, INPUT.VIDEO.FLOW True)
    flow.NAME = "FlowNet2"
    # File of its weights: as published (NVIDIA's FlowNet2, torchvision's RAFT), or of an `OpticalFlow`
    # model of d2ext. Empty: MODEL.WEIGHTS has them, too.
    flow.WEIGHTS = ""
