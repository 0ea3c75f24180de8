"""Settings of landmark networks. Defaults are the published stacked hourglass for MPII."""

from typing import Any

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY
from d2ext.data.dataset_facts import DatasetFacts, follows_data


@follows_data("LandmarkNet")
def _landmarks_keys(facts: DatasetFacts) -> dict[str, Any]:
    return {
        "MODEL.LANDMARKS.NUM_KEYPOINTS": facts.keypoints,
        "MODEL.LANDMARKS.FLIP_INDICES": facts.flip_indices,
    }


@CONFIG_REGISTRY.register()
def add_landmarks_config(cfg: CfgNode) -> None:
    """Add the keys of landmark networks to ``cfg``, in place."""
    landmarks = cfg.MODEL.LANDMARKS = CfgNode()
    # K, the landmarks of an instance: 16 in MPII, 17 in COCO, 68 in 300W, 98 in WFLW, 8 in shapes.
    landmarks.NUM_KEYPOINTS = 16
    # (height, width) of the network's input in pixels; a stacked hourglass of depth 4 needs multiples
    # of 64.
    landmarks.INPUT_SIZE = [256, 256]
    # A head of LANDMARK_HEAD_REGISTRY: "HeatmapHead", "IntegralHead", "RegressionHead", "SimCCHead".
    landmarks.HEAD = "HeatmapHead"
    # The head's input, a feature of the backbone; "": a stacked hourglass's maps if the head learns
    # maps, otherwise the last feature.
    landmarks.IN_FEATURE = ""
    # For each landmark the one that it becomes in a mirror image, for TEST.FLIP. keypoint_names and
    # keypoint_flip_map of the first data set in DATASETS that has them take precedence.
    landmarks.FLIP_INDICES = []

    landmarks.CROP = CfgNode()
    # How boxes become crops. "affine": exact. "hourglass": corners truncated to whole pixels, as in
    # the published stacked hourglass.
    landmarks.CROP.METHOD = "affine"
    # Boxes are widened to the input's aspect ratio, then enlarged by this factor (published: 1.25;
    # 1.0 for boxes that are enlarged already).
    landmarks.CROP.PADDING = 1.25
    # Most instances of a batch that are trained on, selected at random, if the data mapper does not
    # crop images.
    landmarks.CROP.MAX_TRAINED = 64

    target = landmarks.TARGET = CfgNode()
    # Shape of a landmark on its map: "gaussian" or "cauchy".
    target.SHAPE = "gaussian"
    # Width in cells. Published: 1 (stacked hourglass), 2 (simple baselines, HRNet), 1.5 (HRNet, faces).
    target.SIGMA = 1.0
    # "exact": at the point; "rounded": at its cell; "window": at the point, cut off around its cell;
    # "hourglass": as published for it; landmarks that are not annotated are trained to an empty map.
    target.CENTER = "hourglass"
    # The shape is cut off beyond this many SIGMA; 3 leaves 6 * SIGMA + 1 cells a side, rounded down.
    # 0: not cut off.
    target.WINDOW = 0.0
    # How cells map to pixels: "continuous", "index" (the usual way) or "udp".
    target.CELL_GEOMETRY = "continuous"

    # From maps to points: "argmax", "quarter", "hourglass", "dark", "dark_udp", "taylor", "centroid".
    landmarks.DECODER = "hourglass"
    # Side of the blur of "dark" and "dark_udp": 11 for SIGMA 2, 17 for 3, 7 for 1.5.
    landmarks.DECODER_BLUR = 11

    loss = landmarks.LOSS = CfgNode()
    # Loss of maps: "mse", "adaptive_wing" or "cross_entropy".
    loss.MAPS = "mse"
    # Loss of coordinates (regression, integral): "l1", "smooth_l1" or "wing", in pixels of the input.
    loss.POINTS = "l1"

    # Transposed convolutions (4x4, stride 2, norm, ReLU), as in simple baselines, between a head that
    # learns maps and a backbone other than a stacked hourglass.
    upsample = landmarks.UPSAMPLE = CfgNode()
    # Layers; each doubles the resolution.
    upsample.NUM_LAYERS = 3
    upsample.CHANNELS = 256
    upsample.NORM = "BN"

    # "RegressionHead": the feature is averaged to POOL x POOL cells before the last layer (1: global).
    landmarks.REGRESSION = CfgNode()
    landmarks.REGRESSION.POOL = 1
    # Width of a hidden layer; 0: none.
    landmarks.REGRESSION.HIDDEN = 0

    # "SimCCHead"
    landmarks.SIMCC = CfgNode()
    # Bins per pixel.
    landmarks.SIMCC.RATIO = 2.0
    # Width of the labels in bins (published: 6 for 256x192).
    landmarks.SIMCC.SIGMA = 6.0
    # Refine by a fraction of a bin: one Newton step on the logits.
    landmarks.SIMCC.REFINE = False

    test = landmarks.TEST = CfgNode()
    # Average with the prediction for the mirrored crop.
    test.FLIP = False
    # Shift the mirrored maps one cell to the right, as published with CELL_GEOMETRY "index".
    test.FLIP_SHIFT = False
    # Crops per batch of the network; limits the memory.
    test.MAX_CROPS = 64
    # Give each instance pred_keypoint_heatmaps (K, h, w).
    test.HEATMAPS = False
    # An instance's score is its box's times the mean of its landmarks' scores above this (published:
    # 0.2).
    test.KEYPOINT_THRESH = 0.2
    # Truncate image coordinates to whole pixels, as the published stacked hourglass does.
    test.TRUNCATE = False
