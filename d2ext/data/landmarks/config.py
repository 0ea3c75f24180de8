"""Settings of top-down landmark samples: one crop per annotated instance."""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


@CONFIG_REGISTRY.register()
def add_landmark_data_config(cfg: CfgNode) -> None:
    """Add ``INPUT.LANDMARKS`` to ``cfg``, in place."""
    cfg.INPUT.LANDMARKS = c = CfgNode()
    # How box and crop correspond, see d2ext.data.landmarks.geometry: "continuous" (as the model crops
    # test images), "index" or "udp". The crop's size and padding are the model's:
    # MODEL.LANDMARKS.INPUT_SIZE and CROP.PADDING.
    c.CROP_GEOMETRY = "continuous"
    # Memory in MiB in which each worker of the training loader keeps images once it has read them
    c.CACHE_MB = 0
    # Boxes of test images: "annotations", "image" (the whole image is the crop), or the path of a
    # JSON list of detections in COCO's result format, of which those of the data set's category count
    c.TEST_BOXES = "annotations"
    # Detections of that file with a lower score are left out
    c.TEST_MIN_SCORE = 0.0
    # Training augmentation:
    #   "default"    the keys below, as the pose and face toolkits have it
    #   "hourglass"  the stacked hourglass for MPII as published, with its quirks; no key below counts
    #   "none"       crops as they are in a test
    c.RECIPE = "default"

    # Standard deviation of the rotation, degrees; draws are limited to twice of it
    c.ROTATION = 30.0
    # Probability of a rotation
    c.ROTATION_PROB = 0.6
    # Standard deviation of the factor on the crop's side, which is drawn about 1 and limited to
    # 1 - SCALE and 1 + SCALE
    c.SCALE = 0.25
    # Largest shift of the crop, fraction of its side
    c.SHIFT = 0.0
    # Probability of a horizontal flip (with left and right exchanged)
    c.FLIP_PROB = 0.5
    # Probability that the crop is about the points of the upper or of the lower half alone
    c.HALF_BODY_PROB = 0.0
    # Half-body crops are made of instances with more labelled points than this
    c.HALF_BODY_MIN_POINTS = 8
    # Names of the points of the upper half; empty: all above the hips of COCO, PoseTrack and MPII
    c.UPPER_BODY = []
    # Probability that a rectangle of the crop is covered
    c.CUTOUT_PROB = 0.0
    # Smallest and largest side of the rectangle, fraction of the crop's side
    c.CUTOUT_SIZE = [0.1, 0.4]
    # Probability of a change of colours
    c.COLOR_PROB = 0.0
    # Largest change of brightness, grey levels of [0, 255]
    c.BRIGHTNESS = 32.0
    # Smallest and largest factor on all channels, and on the saturation
    c.CONTRAST = [0.6, 1.4]
    c.SATURATION = [0.6, 1.4]
    # Largest change of hue, degrees of 360
    c.HUE = 18.0
