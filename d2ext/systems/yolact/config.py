"""Settings of YOLACT and YOLACT++. Defaults are the published yolact_resnet50 for COCO."""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


@CONFIG_REGISTRY.register()
def add_yolact_config(cfg: CfgNode) -> None:
    """Add YOLACT's keys to ``cfg``, in place."""
    yolact = cfg.MODEL.YOLACT = CfgNode()
    # Thing classes, without background.
    yolact.NUM_CLASSES = 80
    # Side of the network input in pixels; every image is resized to this square.
    yolact.INPUT_SIZE = 550
    # Registered backbone below the feature pyramid.
    yolact.BOTTOM_UP = "build_resnet_backbone"
    # The bottom-up features that the pyramid takes, finest first.
    yolact.IN_FEATURES = ["res3", "res4", "res5"]
    # Channels of the pyramid.
    yolact.FPN_CHANNELS = 256
    # Levels added on top of the pyramid by strided convolutions (P6, P7).
    yolact.NUM_EXTRA_LEVELS = 2
    # Channels of the prototype net's and of the prediction head's hidden layers.
    yolact.HEAD_CHANNELS = 256
    # Prototypes per image, and mask coefficients per prior.
    yolact.NUM_PROTOTYPES = 32
    # Batch norms of the bottom-up net are trained if each process has at least this many images per
    # iteration, and frozen (statistics and affine) otherwise. 0: always trained.
    yolact.MIN_IMAGES_TO_TRAIN_BN = 6

    anchors = yolact.ANCHORS = CfgNode()
    # Side lengths in pixels of each level's prior boxes, finest level first.
    anchors.SCALES = [[24.0], [48.0], [96.0], [192.0], [384.0]]
    # Width / height.
    anchors.ASPECT_RATIOS = [1.0, 0.5, 2.0]
    # Height = width, as in the published models of YOLACT (not of YOLACT++ and Pascal).
    anchors.SQUARE = True

    loss = yolact.LOSS = CfgNode()
    loss.BOX_WEIGHT = 1.5
    loss.CLASS_WEIGHT = 1.0
    loss.MASK_WEIGHT = 6.125
    # 0 builds no semantic head; published checkpoints have one.
    loss.SEMANTIC_WEIGHT = 1.0
    loss.MASK_IOU_WEIGHT = 25.0
    # IoU from which a prior is positive, and below which it is background.
    loss.POSITIVE_IOU = 0.5
    loss.NEGATIVE_IOU = 0.4
    # A prior with more than this share of its area in a crowd region is neutral.
    loss.CROWD_IOA = 0.7
    # Mined negatives per positive.
    loss.NEGATIVES_PER_POSITIVE = 3
    # Most positives per image in the mask loss (700-pixel model: 300).
    loss.MAX_MASKS = 100
    # Objects of at most this many prototype cells are left out of the mask re-scoring loss.
    loss.MIN_MASK_IOU_AREA = 25
    # "local": each process divides by its own number of positives, as published. "global": by the
    # mean over processes, so that the number of processes does not change the result.
    loss.NORMALIZER = "local"

    test = yolact.TEST = CfgNode()
    # Priors whose best foreground score is not above this are dropped before NMS.
    test.SCORE_THRESH = 0.05
    # "fast" (per class), "cross_class_fast" or "traditional".
    test.NMS = "fast"
    test.NMS_THRESH = 0.5
    # Candidates for Fast NMS per class (cross-class: in all).
    test.NMS_TOP_K = 200
    # Detections per image (cross-class Fast NMS has no such limit, as published).
    test.MAX_DETECTIONS = 100
    # A pixel belongs to an object above this probability.
    test.MASK_THRESH = 0.5
    # Crop masks to the box "before" or "after" they are resized to the image.
    test.CROP = "before"
    # Truncate box coordinates to whole pixels, as the published evaluation does.
    test.TRUNCATE_BOXES = True

    # YOLACT++: predict the IoU of each mask and multiply the score by it.
    yolact.MASK_RESCORING = CfgNode()
    yolact.MASK_RESCORING.ENABLED = False
