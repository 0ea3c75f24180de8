"""Small models and inputs, for the tests of d2ext and of those who build on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

from d2ext.config import get_cfg
from d2ext.data.densepose import DensePoseAnnotations, SurfacePoints

# Thing classes of every tiny model.
NUM_CLASSES = 3
# Stuff classes of the tiny panoptic models, contiguous ids 1 to NUM_STUFF; 0 stands for all things
# (Detectron2's "separated" form).
NUM_STUFF = 2
# Keypoints of every object: left, right and top end of its ellipse; the first two swap when mirrored.
NUM_KEYPOINTS = 3
KEYPOINT_FLIP_PAIRS = [(0, 1)]


class TinyModel(NamedTuple):
    """How the tiny model of a meta-architecture is built and what it predicts."""

    configure: Callable[[CfgNode], None]
    """Changes a default config into the model's, in place."""
    tasks: tuple[str, ...]
    """Kinds of predictions: "bbox", "segm", "keypoints", "panoptic", "densepose"."""


def _tiny_yolact(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "YOLACT"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_MEAN = [123.68, 116.78, 103.94]
    cfg.MODEL.PIXEL_STD = [58.40, 57.12, 57.38]
    cfg.MODEL.BACKBONE.NAME = "build_yolact_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.YOLACT.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.YOLACT.INPUT_SIZE = 64
    cfg.MODEL.YOLACT.FPN_CHANNELS = 16
    cfg.MODEL.YOLACT.HEAD_CHANNELS = 16
    cfg.MODEL.YOLACT.NUM_PROTOTYPES = 8
    cfg.MODEL.YOLACT.NUM_EXTRA_LEVELS = 0
    cfg.MODEL.YOLACT.ANCHORS.SCALES = [[12.0], [24.0], [48.0]]
    cfg.MODEL.YOLACT.TEST.SCORE_THRESH = 0.0
    cfg.MODEL.YOLACT.TEST.NMS_TOP_K = 20
    cfg.MODEL.YOLACT.TEST.MAX_DETECTIONS = 10
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TEST = 0


def _tiny_yolact_edge(cfg: CfgNode) -> None:
    _tiny_yolact(cfg)
    cfg.MODEL.META_ARCHITECTURE = "YolactEdge"
    cfg.MODEL.YOLACT_EDGE.STAGE = "video"
    cfg.MODEL.YOLACT_EDGE.FLOW_CHANNELS = 8


def _tiny_hourglass(cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME = "build_cornernet_hourglass_backbone"
    cfg.MODEL.CORNERNET_HOURGLASS.CHANNELS = [16, 16, 24]
    cfg.MODEL.CORNERNET_HOURGLASS.BLOCKS = [1, 1, 1]
    cfg.MODEL.CORNERNET_HOURGLASS.STEM_CHANNELS = 16
    cfg.MODEL.CORNERNET_HOURGLASS.OUT_CHANNELS = 16
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 0


def _tiny_cornernet(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "CornerNet"
    _tiny_hourglass(cfg)
    cfg.MODEL.CORNERNET.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.CORNERNET.POOL_CHANNELS = 8
    cfg.MODEL.CORNERNET.HEAD_CHANNELS = 16
    cfg.MODEL.CORNERNET.TEST.TOP_K = 20


def _tiny_centernet_triplets(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "CenterNetTriplets"
    _tiny_hourglass(cfg)
    cfg.MODEL.CENTERNET_TRIPLETS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.CENTERNET_TRIPLETS.POOL_CHANNELS = 8
    cfg.MODEL.CENTERNET_TRIPLETS.HEAD_CHANNELS = 16


def _tiny_centernet(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "CenterNet"
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deconv_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.DECONV.CHANNELS = [32, 32, 16]
    cfg.MODEL.CENTERNET.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.CENTERNET.HEAD_CHANNELS = 16
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = NUM_KEYPOINTS
    cfg.MODEL.CENTERNET.POSE.FLIP_PAIRS = [list(pair) for pair in KEYPOINT_FLIP_PAIRS]
    cfg.MODEL.CENTERNET.TEST.TOP_K = 10
    cfg.MODEL.CENTERNET.TEST.CLIP_BOXES = True
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 0


def _tiny_upsnet(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "UPSNet"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.PIXEL_STD = [58.0, 58.0, 58.0]
    cfg.MODEL.BACKBONE.NAME = "build_upsnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "DetectronAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128]]
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "UPSNetRPN"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.RPN.CONV_DIMS = [16]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    cfg.MODEL.ROI_HEADS.NAME = "UPSNetROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlign"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIAlign"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 2
    cfg.MODEL.SEM_SEG_HEAD.NAME = "UPSNetSemanticHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.UPSNET.NUM_STUFF = NUM_STUFF
    cfg.MODEL.UPSNET.SEMANTIC_HEAD.CHANNELS = [16, 16]
    cfg.MODEL.UPSNET.TEST.SCORE_THRESH = 0.2
    cfg.MODEL.UPSNET.TEST.STUFF_AREA_LIMIT = 0
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TEST = 0


def _tiny_vpsnet(cfg: CfgNode) -> None:
    _tiny_upsnet(cfg)
    cfg.MODEL.META_ARCHITECTURE = "VPSNet"
    # Batch norms would keep the statistics of random weights.
    cfg.MODEL.RESNETS.NORM = "GN"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RoundedAnchorGenerator"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "VPSNetRPN"
    cfg.MODEL.ROI_HEADS.NAME = "VPSNetROIHeads"
    cfg.MODEL.UPSNET.LOSS.KEEP_FRACTION = 1.0
    cfg.MODEL.UPSNET.TEST.UNKNOWN = False
    cfg.MODEL.VPSNET.TRACK_FC_DIM = 16
    cfg.MODEL.FLOW.NAME = "DIS"


def _tiny_landmarks(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "LandmarkNet"
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.PIXEL_MEAN = [0.0, 0.0, 0.0]
    cfg.MODEL.PIXEL_STD = [255.0, 255.0, 255.0]
    cfg.MODEL.BACKBONE.NAME = "NewellHourglass"
    cfg.MODEL.NEWELL_HOURGLASS.CHANNELS = 16
    cfg.MODEL.NEWELL_HOURGLASS.STEM_CHANNELS = [8, 16, 16]
    cfg.MODEL.NEWELL_HOURGLASS.DEPTH = 2
    cfg.MODEL.LANDMARKS.NUM_KEYPOINTS = NUM_KEYPOINTS
    cfg.MODEL.LANDMARKS.INPUT_SIZE = [32, 48]
    cfg.MODEL.LANDMARKS.TARGET.CENTER = "exact"
    cfg.MODEL.LANDMARKS.DECODER = "taylor"
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 0


def _tiny_retinaface(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "RetinaFace"
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.PIXEL_MEAN = [104.0, 117.0, 123.0]
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    cfg.MODEL.BACKBONE.NAME = "build_retinaface_fpn_backbone"
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = NUM_KEYPOINTS
    cfg.MODEL.RETINAFACE.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.RETINAFACE.FPN_CHANNELS = 16
    cfg.MODEL.RETINAFACE.ANCHORS.SCALES = [[8.0, 12.0], [16.0, 24.0], [32.0, 48.0]]
    cfg.MODEL.RETINAFACE.TEST.MAX_DETECTIONS = 10
    cfg.MODEL.RETINAFACE.TEST.CLIP_BOXES = True
    cfg.INPUT.FORMAT = "BGR"
    cfg.INPUT.MIN_SIZE_TEST = 0


def _tiny_densepose(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.PIXEL_STD = [58.0, 58.0, 58.0]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    # Batch norms would keep the statistics of random weights.
    cfg.MODEL.RESNETS.NORM = "GN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.CONV_DIMS = [16]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    cfg.MODEL.ROI_HEADS.NAME = "DensePoseROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    head.NUM_STACKED_CONVS = 1
    head.CONV_HEAD_DIM = 16
    head.POOLER_RESOLUTION = 7
    head.DECODER_CONV_DIMS = 16
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.INPUT.MAPPER = "DensePoseMapper"
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 0


def _tiny_cornernet_saccade(cfg: CfgNode) -> None:
    _tiny_cornernet(cfg)
    cfg.MODEL.META_ARCHITECTURE = "CornerNetSaccade"
    cfg.MODEL.CORNERNET_HOURGLASS.OUT_LEVELS = True
    cfg.MODEL.CORNERNET.TEST.KEEP_STALE = False
    cfg.MODEL.CORNERNET.SACCADE.INPUT_SIZE = 63
    cfg.MODEL.CORNERNET.SACCADE.FIRST_SIZES = [48, 63]
    cfg.MODEL.CORNERNET.SACCADE.ATTENTION_SCALES = [1, 2]
    cfg.MODEL.CORNERNET.SACCADE.ATTENTION_RANGES = [[32, 64], [0, 32]]
    cfg.MODEL.CORNERNET.SACCADE.FIRST_SCORE = -1.0
    cfg.MODEL.CORNERNET.SACCADE.CLIP_BOXES = True


_TINY: dict[str, TinyModel] = {
    "CenterNet": TinyModel(_tiny_centernet, ("bbox", "keypoints")),
    "CenterNetTriplets": TinyModel(_tiny_centernet_triplets, ("bbox",)),
    "CornerNet": TinyModel(_tiny_cornernet, ("bbox",)),
    "CornerNetSaccade": TinyModel(_tiny_cornernet_saccade, ("bbox",)),
    "DensePose": TinyModel(_tiny_densepose, ("bbox", "densepose")),
    "LandmarkNet": TinyModel(_tiny_landmarks, ("keypoints",)),
    "RetinaFace": TinyModel(_tiny_retinaface, ("bbox", "keypoints")),
    "UPSNet": TinyModel(_tiny_upsnet, ("bbox", "segm", "panoptic")),
    "VPSNet": TinyModel(_tiny_vpsnet, ("bbox", "segm", "panoptic")),
    "YOLACT": TinyModel(_tiny_yolact, ("bbox", "segm")),
    "YolactEdge": TinyModel(_tiny_yolact_edge, ("bbox", "segm")),
}


def tiny_architectures() -> list[str]:
    """Meta-architectures that :func:`tiny_config` knows: all that d2ext registers, and "DensePose",
    which is Detectron2's ``GeneralizedRCNN`` with ROI heads of d2ext's."""
    return sorted(_TINY)


def tiny_tasks(architecture: str) -> tuple[str, ...]:
    """What the tiny model of ``architecture`` predicts; see :class:`TinyModel`."""
    return _TINY[architecture].tasks


def tiny_config(architecture: str) -> CfgNode:
    """Config of a model that trains and predicts within a second on one CPU core.

    Args:
        architecture: one of :func:`tiny_architectures`.
    """
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    _TINY[architecture].configure(cfg)
    return cfg


# Points on a grid in a box, each with the chart that its place says.
_SIDES = torch.arange(16, 256, 32.0)
_GRID = SurfacePoints(
    x=_SIDES.repeat(8),
    y=_SIDES.repeat_interleave(8),
    parts=3 + (_SIDES.repeat(8) > 128).long(),
    u=_SIDES.repeat(8) / 256,
    v=_SIDES.repeat_interleave(8) / 256,
    mask=torch.ones(256, 256, dtype=torch.uint8),
)


def random_inputs(
    count: int = 2,
    *,
    objects: int = 3,
    height: int = 60,
    width: int = 80,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Training inputs in Detectron2's form: noise images with bright ellipses as objects.

    Each has boxes, classes, masks and keypoints of its objects, points on charts (left half of the box
    part 3, right half part 4, U and V from side to side) of all but the first, and ``sem_seg`` (upper
    half stuff 1, lower half stuff 2, things 0; int64).

    Args:
        count: images.
        objects: of every image; 0 gives images without instances.
        height, width: of every image, in pixels.
        seed: of the generator; the same arguments give the same inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(height)[:, None] + 0.5
    columns = torch.arange(width)[None, :] + 0.5
    inputs = []
    for i in range(count):
        image = torch.rand((3, height, width), generator=generator) * 80
        masks = torch.zeros((objects, height, width), dtype=torch.bool)
        keypoints = torch.full((objects, NUM_KEYPOINTS, 3), 2.0)
        for j in range(objects):
            cy, cx, ry, rx = torch.rand(4, generator=generator).tolist()
            cy, cx = height * (0.2 + 0.6 * cy), width * (0.2 + 0.6 * cx)
            ry, rx = height * (0.08 + 0.15 * ry), width * (0.08 + 0.15 * rx)
            masks[j] = ((rows - cy) / ry) ** 2 + ((columns - cx) / rx) ** 2 <= 1
            image[j % 3][masks[j]] = 255
            keypoints[j, :, :2] = torch.tensor([[cx - rx, cy], [cx + rx, cy], [cx, cy - ry]])
        instances = Instances((height, width))
        instances.gt_masks = BitMasks(masks)
        instances.gt_boxes = (
            instances.gt_masks.get_bounding_boxes() if objects else Boxes(torch.zeros(0, 4))
        )
        instances.gt_classes = torch.randint(0, NUM_CLASSES, (objects,), generator=generator)
        instances.gt_keypoints = Keypoints(keypoints)
        instances.gt_densepose = DensePoseAnnotations([None, *[_GRID] * objects][:objects])
        instances.gt_ids = torch.arange(objects) + 1
        sem_seg = (rows >= height / 2).long().expand(height, width) + 1
        inputs.append(
            {
                "image": image.to(torch.uint8),
                # The frame before, for models of videos.
                "reference": {
                    "image": image.roll((2, 3), dims=(1, 2)).to(torch.uint8),
                    "instances": instances,
                },
                "instances": instances,
                "sem_seg": sem_seg.masked_fill(masks.any(dim=0), 0),
                "height": height,
                "width": width,
                "image_id": i,
                "file_name": f"{i}.png",
            }
        )
    return inputs
