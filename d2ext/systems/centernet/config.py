"""Settings of CenterNet (points). Defaults are the published ctdet models for COCO."""

from typing import Any

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY
from d2ext.data.dataset_facts import DatasetFacts, follows_data


@follows_data("CenterNet")
def _centernet_keys(facts: DatasetFacts) -> dict[str, Any]:
    return {
        "MODEL.CENTERNET.NUM_CLASSES": facts.things,
        "MODEL.CENTERNET.POSE.FLIP_PAIRS": facts.flip_pairs,
    }


@CONFIG_REGISTRY.register()
def add_centernet_config(cfg: CfgNode) -> None:
    """Add CenterNet's keys to ``cfg``, in place."""
    centernet = cfg.MODEL.CENTERNET = CfgNode()
    # Classes of objects.
    centernet.NUM_CLASSES = 80
    # Features of the backbone that get heads, all trained; inference uses the last one.
    centernet.IN_FEATURES = ["deconv"]
    # Channels of the heads' hidden layers (published: resdcn 64, DLA and hourglass 256).
    centernet.HEAD_CHANNELS = 64
    # Standard deviation of the heads' initial weights, except the heat maps' (published: resdcn 0.001).
    # 0: PyTorch's initial weights.
    centernet.HEAD_INIT_STD = 0.0
    # Only this many first annotations of an image become targets (published: 128, poses 32).
    centernet.MAX_OBJECTS = 128
    # IoU that determines the radius of the Gaussians.
    centernet.MIN_OVERLAP = 0.7
    # Where the size of boxes is trained: "center": at the centre; "dense": at all cells under the
    # Gaussian; "class_specific": at the centre, in channels of the object's class.
    centernet.SIZE_TARGET = "center"
    # Predict where in its cell a centre lies (published: yes). False: in its middle.
    centernet.OFFSET = True

    # With MODEL.KEYPOINT_ON the model also predicts MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS joints of each
    # object, as offsets from its centre and as peaks of joint heat maps.
    pose = centernet.POSE = CfgNode()
    # Joints that swap in a mirror image.
    pose.FLIP_PAIRS = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16]]
    # Joints also as peaks of heat maps, and where in its cell a peak lies (published: both). Without
    # heat maps joints are the regressed ones.
    pose.HEATMAP = True
    pose.OFFSET = True
    # Where joint offsets are trained: "center" or "dense".
    pose.TARGET = "center"

    loss = centernet.LOSS = CfgNode()
    loss.HEATMAP_WEIGHT = 1.0
    loss.SIZE_WEIGHT = 0.1
    loss.OFFSET_WEIGHT = 1.0
    loss.JOINT_WEIGHT = 1.0
    loss.JOINT_HEATMAP_WEIGHT = 1.0
    loss.JOINT_OFFSET_WEIGHT = 1.0
    # Loss of heat maps: "focal", or "mse", the mean squared error of the maps before the sigmoid.
    loss.HEATMAP = "focal"
    # Loss of sizes and offsets at centres: "l1" (mean over values) or "smooth_l1" (over objects).
    loss.REGRESSION = "l1"

    test = centernet.TEST = CfgNode()
    # Number of peaks that become detections.
    test.TOP_K = 100
    # True: pad the image to the backbone's divisibility (all published COCO results). False: warp it
    # into INPUT_SIZE at its aspect ratio.
    test.KEEP_RESOLUTION = True
    # (height, width) of the network input without KEEP_RESOLUTION, pixels.
    test.INPUT_SIZE = [512, 512]
    # Average predictions with those for the mirror image.
    test.FLIP = False
    # Scales of the image; the results of several are merged by soft-NMS.
    test.SCALES = [1.0]
    # Soft-NMS also with one scale.
    test.SOFT_NMS = False
    # Limit of detections after merging scales, plus ties with the last one (poses: no limit, as
    # published).
    test.MAX_DETECTIONS = 100
    # Clip boxes to the image and order their corners. Published: no; boxes may extend beyond the image,
    # and early in training have negative sides.
    test.CLIP_BOXES = False
