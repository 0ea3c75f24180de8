"""Settings of CenterNet with triplets. Defaults are the published models' for COCO.

The backbone's are in ``MODEL.CORNERNET_HOURGLASS`` (:mod:`d2ext.modeling.cornernet_hourglass`).
"""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY
from d2ext.systems.cornernet.config import corner_defaults


@CONFIG_REGISTRY.register()
def add_centernet_triplets_config(cfg: CfgNode) -> None:
    """Add the system's keys to ``cfg``, in place. Those of CornerNet have the same meaning."""
    node = cfg.MODEL.CENTERNET_TRIPLETS = corner_defaults()
    # The published radii are larger than this overlap implies (see gaussian_radius).
    node.LOSS.MIN_OVERLAP = 0.7
    # Best points of each of the three kinds.
    node.TEST.TOP_K = 70
