"""Settings of VPSNet. Defaults are the published FuseTrack, without its faults.

It takes UPSNet's keys (``MODEL.UPSNET``) and those of the flow (``MODEL.FLOW``), too.
"""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY
from d2ext.data.dataset_facts import follows_data
from d2ext.systems.upsnet.config import upsnet_keys

follows_data("VPSNet")(upsnet_keys)


@CONFIG_REGISTRY.register()
def add_vpsnet_config(cfg: CfgNode) -> None:
    """Add VPSNet's keys to ``cfg``, in place."""
    vpsnet = cfg.MODEL.VPSNET = CfgNode()
    # Fuse the features with those of the frame before (the paper's "Fuse").
    vpsnet.FUSION = True
    # Give objects ids that last over the video (the paper's "Track").
    vpsnet.TRACK = True
    # Sides of the cost volume between the fused frames, in cells of stride 4: 2 * this + 1.
    vpsnet.MAX_DISPLACEMENT = 4
    # Channels of the fully connected layers of the track head.
    vpsnet.TRACK_FC_DIM = 1024
    # Cross entropy of the track head.
    vpsnet.MATCH_LOSS_WEIGHT = 0.5
    # What is added to the log-probability that a candidate is an object of the memory: these times the
    # log of its score, the IoU of their boxes, and 1 for the same class (also for "a new object").
    vpsnet.MATCH_WEIGHTS = [1.0, 2.0, 10.0]
    # Objects that a video's memory holds; beyond, the one not seen for longest is forgotten. 0: no
    # limit, as published.
    vpsnet.MAX_OBJECTS = 1000
    # Published faults (vpsnet/NOTES.md); configs with published numbers set them.
    # Zero flow moves features by up to half a cell: coordinates for align_corners=True, sampled without.
    vpsnet.PUBLISHED_WARP = False
    # Where nothing is detected, an empty box of no class is an object, which the tracker remembers.
    vpsnet.PUBLISHED_DUMMY = False
    # Where an instance has no pixel in the map, those after it get the id of the one before.
    vpsnet.PUBLISHED_ID_LOOKUP = False
