"""Settings of UPSNet. Defaults are the published upsnet_resnet50 for COCO.

The files in ``configs/upsnet`` use Detectron2's keys where these exist: the backbone under
``MODEL.RESNETS`` and ``MODEL.FPN``, anchors, ``MODEL.RPN``, ``MODEL.ROI_HEADS``, ``MODEL.ROI_BOX_HEAD``,
``MODEL.ROI_MASK_HEAD``.
"""

from typing import Any

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY
from d2ext.data.dataset_facts import DatasetFacts, follows_data


@follows_data("UPSNet")
def upsnet_keys(facts: DatasetFacts) -> dict[str, Any]:
    return {
        "MODEL.ROI_HEADS.NUM_CLASSES": facts.things,
        "MODEL.UPSNET.NUM_STUFF": facts.stuff,
    }


@CONFIG_REGISTRY.register()
def add_upsnet_config(cfg: CfgNode) -> None:
    """Add UPSNet's keys to ``cfg``, in place."""
    upsnet = cfg.MODEL.UPSNET = CfgNode()
    # S, stuff classes. (Thing classes: MODEL.ROI_HEADS.NUM_CLASSES.)
    upsnet.NUM_STUFF = 53
    # Category ids of `panoptic_seg` and channels of `sem_seg`.
    #   "separated"  the sets *_panoptic_separated: things 0..T-1; stuff 1..S, 0 = all things
    #   "joint"      one numbering, as of Detectron2's cityscapes_fine_panoptic_val and of UPSNet itself:
    #                stuff 0..S-1, things S..S+T-1
    upsnet.CATEGORY_IDS = "separated"
    # Add the globally pooled res5 to the pyramid's coarsest level (published: COCO models).
    upsnet.GLOBAL_CONTEXT = True

    head = upsnet.SEMANTIC_HEAD = CfgNode()
    # Output channels of the shared convolutions (Cityscapes: [128, 128]).
    head.CHANNELS = [256, 128, 128]
    # False: plain 3x3 convolutions, for trials on the CPU.
    head.DEFORMABLE = True
    # Normalisation after each convolution, "" for none as published.
    head.NORM = ""

    loss = upsnet.LOSS = CfgNode()
    # Cross entropy of the semantic head (Cityscapes: 1).
    loss.SEMANTIC_WEIGHT = 0.2
    # The same inside annotated boxes; multiplies SEMANTIC_WEIGHT. 0: off (Cityscapes).
    loss.SEMANTIC_ROI_WEIGHT = 0.2
    # Cross entropy of the panoptic head (Cityscapes: 0.5).
    loss.PANOPTIC_WEIGHT = 0.1
    # Share of the instances that keep their channel in training; the others become unknown. 1: all,
    # and no unknown channel is trained.
    loss.KEEP_FRACTION = 0.7

    test = upsnet.TEST = CfgNode()
    # The model resizes an image itself, as published (OpenCV's arithmetic on floats): pixels of the
    # short side, and most pixels of the long one (COCO: 800, 1333; Cityscapes: 1024, 2048). MIN_SIZE 0:
    # the image as it is. Goes with INPUT.MIN_SIZE_TEST 0; above 0, Detectron2 resizes the image before,
    # by PIL on bytes, and the model leaves it so.
    test.MIN_SIZE = 0
    test.MAX_SIZE = 1333
    # "head": the parameter-free panoptic head; "heuristic": Detectron2's merge of the same boxes,
    # masks and semantic map, with MODEL.PANOPTIC_FPN.COMBINE.
    test.PANOPTIC = "head"
    # Least score of a candidate of the panoptic head.
    test.SCORE_THRESH = 0.6
    # IoU of the class-agnostic NMS among them.
    test.NMS_THRESH = 0.5
    # Most candidates.
    test.MAX_INSTANCES = 100
    # An instance is dropped if more than this share of its mask is covered by better ones of its class.
    test.OVERLAP_FRACTION = 0.3
    # The unknown channel, whose pixels become void.
    test.UNKNOWN = True
    # Stuff of fewer pixels, at the output's size, becomes void (Cityscapes: 2048).
    test.STUFF_AREA_LIMIT = 4096

    aug = upsnet.TEST.AUG = CfgNode()
    # Test-time augmentation of the semantic logits, boxes and masks; see tta.py. d2ext's tools wrap the
    # model for it; with a plain DefaultPredictor: `predictor.model = build_tta(cfg, predictor.model)`.
    aug.ENABLED = False
    # Short sides in pixels; empty: the model's own (TEST.MIN_SIZE, MAX_SIZE). The published code has
    # no multi-scale testing.
    aug.MIN_SIZES = []
    # Longest side in pixels, of these.
    aug.MAX_SIZE = 4000
    # Each scale also mirrored.
    aug.FLIP = True
