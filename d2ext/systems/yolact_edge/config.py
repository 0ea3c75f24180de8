"""Settings of YolactEdge beside YOLACT's (``MODEL.YOLACT``)."""

from typing import Any

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY
from d2ext.data.dataset_facts import DatasetFacts, follows_data


@follows_data("YolactEdge")
def yolact_edge_keys(facts: DatasetFacts) -> dict[str, Any]:
    """The class count is that of YOLACT's head."""
    return {"MODEL.YOLACT.NUM_CLASSES": facts.things}


@CONFIG_REGISTRY.register()
def add_yolact_edge_config(cfg: CfgNode) -> None:
    """Add YolactEdge's keys to ``cfg``, in place."""
    edge = cfg.MODEL.YOLACT_EDGE = CfgNode()
    # What is trained:
    #   "image"  YOLACT's network on single images; it has no flow net and no memory
    #   "flow"   the flow net alone, on pairs of images with known flow (INPUT.MAPPER FlowPairMapper)
    #   "video"  flow net, refinement and heads on pairs of frames (INPUT.MAPPER ClipMapper); backbone,
    #            laterals and their sums are frozen
    # In inference "flow" and "video" are the same.
    edge.STAGE = "image"
    # A frame is a key frame, which goes through the whole network, if its number (from 0) is KEY_PHASE
    # plus a multiple of KEY_INTERVAL, lies before KEY_PHASE, or is the first of its video. The interval
    # counts frames, not time.
    edge.KEY_INTERVAL = 5
    edge.KEY_PHASE = 0
    # Evaluate in KEY_INTERVAL passes with key frames shifted by one each, as published: means over them.
    edge.TEST_ALL_PHASES = False
    # A frame also becomes a key frame if the mean cosine similarity to the key frame, of what the flow
    # net's first convolution makes of each frame, is below this (-1..1), as where the scene is cut.
    # -1: never, as published.
    edge.MIN_SIMILARITY = -1.0
    # Refine the features that were carried over with the frame's own lateral (published: SPA).
    edge.REFINEMENT = True
    # Channels of the flow net on its finest level; each coarser one has twice as many.
    edge.FLOW_CHANNELS = 64
    # Weight of the loss that compares features that were carried over with the frame's own. 0: none, as
    # in yolact_edge_vid_minimal.
    edge.WARP_WEIGHT = 1.0
    # Faults of the published code. WARP_CONVS: in that loss, P5 goes through P3's output convolution.
    # FLOW_INIT: the flow net starts from Xavier weights without biases, so that nearly nothing is
    # carried over. False: it starts by carrying features over as they are.
    edge.PUBLISHED_WARP_CONVS = False
    edge.PUBLISHED_FLOW_INIT = False
