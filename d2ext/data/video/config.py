"""Settings of samples that are pairs of frames."""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


@CONFIG_REGISTRY.register()
def add_video_data_config(cfg: CfgNode) -> None:
    """Add ``INPUT.VIDEO`` to ``cfg``, in place."""
    cfg.INPUT.VIDEO = c = CfgNode()
    # The reference of a training sample is a frame whose number is the target's plus one of these,
    # smallest and largest, inclusive; those outside of the video do not count. Published for YolactEdge.
    c.REFERENCE_OFFSETS = [-5, -2]
    # "any": every frame of the video can be the reference. "annotated": only annotated ones, which the
    # offsets then count, 0 left out: [-1, 1] is the annotated neighbour, before or after. Published for
    # VPSNet.
    c.REFERENCES = "any"
    # True: samples carry the optical flow from the target to the reference, as far as it is known
    c.FLOW = False
