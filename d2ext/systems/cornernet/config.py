"""Settings of CornerNet. Defaults are the published hourglass-104 for COCO.

The backbone's are in ``MODEL.CORNERNET_HOURGLASS`` (:mod:`d2ext.modeling.cornernet_hourglass`).
"""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


def corner_defaults() -> CfgNode:
    """The keys common to all detectors of corners, with CornerNet's values."""
    node = CfgNode()
    # Thing classes, without background.
    node.NUM_CLASSES = 80
    # Channels of the maps that corner pooling runs over.
    node.POOL_CHANNELS = 128
    # Channels of the hidden layer of each prediction, and side of its kernel in cells (Squeeze: 1).
    node.HEAD_CHANNELS = 256
    node.HEAD_KERNEL = 3
    # Norm after the convolutions of the pooling modules.
    node.NORM = "BN"

    loss = node.LOSS = CfgNode()
    # IoU with the object of a box whose corners are both off by the Gaussians' radius.
    loss.MIN_OVERLAP = 0.3
    loss.HEAT_WEIGHT = 1.0
    loss.PULL_WEIGHT = 0.1
    loss.PUSH_WEIGHT = 0.1
    loss.OFFSET_WEIGHT = 1.0

    test = node.TEST = CfgNode()
    # Factors on the image's sides, one pass of the network each.
    test.SCALES = [1.0]
    # Also detect on the mirror image.
    test.FLIP = True
    # Best corners of each kind that are paired.
    test.TOP_K = 100
    # Pairs whose embeddings are farther apart are rejected.
    test.MAX_DISTANCE = 0.5
    # Best pairs of each pass of the network that go into soft-NMS.
    test.MAX_PAIRS = 1000
    # Soft-NMS within each class: width of the Gaussian over IoU.
    test.NMS_SIGMA = 0.5
    # Soft-NMS discards a box when its score falls below this.
    test.SCORE_THRESH = 0.001
    # True: boxes also move towards those that they suppress, as published for several scales.
    test.NMS_MERGE = False
    # Exponent of the merging weights.
    test.NMS_MERGE_EXPONENT = 10.0
    # True: stale rows at the end of soft-NMS's array count as detections, as published.
    test.KEEP_STALE = True
    # Detections per image (more if the last ones' scores are equal).
    test.MAX_DETECTIONS = 100
    return node


@CONFIG_REGISTRY.register()
def add_cornernet_config(cfg: CfgNode) -> None:
    """Add CornerNet's keys to ``cfg``, in place."""
    cfg.MODEL.CORNERNET = corner_defaults()

    saccade = cfg.MODEL.CORNERNET.SACCADE = CfgNode()
    # The keys below belong to CornerNetSaccade. Side of the network's input, pixels.
    saccade.INPUT_SIZE = 255
    # Longer sides of the first views, which show the whole image, pixels.
    saccade.FIRST_SIZES = [192, 255]
    # Attention above this gives a location to crop.
    saccade.ATTENTION_THRESH = 0.3
    # For each attention map, coarsest first: magnification of its crops,
    saccade.ATTENTION_SCALES = [1, 2, 4]
    # and the smallest and largest longer side of its objects, pixels of the input.
    saccade.ATTENTION_RANGES = [[96, 256], [32, 96], [0, 32]]
    # Boxes of the first views above this score are candidates,
    saccade.FIRST_SCORE = 0.3
    # and above this one locations to crop too.
    saccade.CONFIDENT_SCORE = 0.5
    # Most crops of an image.
    saccade.MAX_CROPS = 30
    # Training: objects with a smaller longer side (pixels of the input), or with no more than this share
    # of the box in the crop, are neither positive nor negative.
    saccade.MIN_SIDE = 16
    saccade.MIN_SHARE = 0.5
    # Clip boxes to the image; the published code does not.
    saccade.CLIP_BOXES = False
