"""Settings of RetinaFace. Defaults are the published MobileNet-0.25 for WIDER FACE.

With ``MODEL.KEYPOINT_ON`` the model also predicts ``MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS`` points of
each face.
"""

from typing import Any

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY
from d2ext.data.dataset_facts import DatasetFacts, follows_data


@follows_data("RetinaFace")
def retinaface_keys(facts: DatasetFacts) -> dict[str, Any]:
    """Classes, and points and meshes as far as the data have them."""
    return {
        "MODEL.RETINAFACE.NUM_CLASSES": facts.things,
        "MODEL.KEYPOINT_ON": None if facts.keypoints else False,
        "MODEL.RETINAFACE.MESH.NUM_VERTICES": facts.mesh_flip or 0,
        "MODEL.RETINAFACE.MESH.FILE": facts.mesh_file,
    }


@CONFIG_REGISTRY.register()
def add_retinaface_config(cfg: CfgNode) -> None:
    """Add RetinaFace's keys to ``cfg``, in place."""
    face = cfg.MODEL.RETINAFACE = CfgNode()
    # Classes, without background.
    face.NUM_CLASSES = 1
    # Registered backbone below the feature pyramid.
    face.BOTTOM_UP = "build_mobilenet_v1_backbone"
    # The bottom-up features that the pyramid takes, finest first.
    face.IN_FEATURES = ["stage1", "stage2", "stage3"]
    # Channels of the pyramid and of the context modules, a multiple of 4 (ResNet-50: 256). Up to 64 the
    # activations between are leaky ReLUs of slope 0.1, above plain ReLUs, as published.
    face.FPN_CHANNELS = 64
    # Levels added by 3x3 convolutions of stride 2 on the coarsest bottom-up feature (paper: 1).
    face.NUM_EXTRA_LEVELS = 0
    # Norm of the pyramid and of the context modules.
    face.NORM = "BN"
    # 3x3 convolutions of both are deformable (paper).
    face.DEFORMABLE = False
    # One set of heads for all levels (paper), instead of one for each.
    face.SHARED_HEADS = False

    anchors = face.ANCHORS = CfgNode()
    # Side lengths in pixels of each level's square prior boxes, finest level first; as many on each.
    anchors.SCALES = [[16.0, 32.0], [64.0, 128.0], [256.0, 512.0]]

    mesh = face.MESH = CfgNode()
    # Vertices of the mesh that is predicted for each face; 0: none, whatever the data have.
    mesh.NUM_VERTICES = 0
    # Wavefront OBJ of the topology, with vertices of a mean face (x right, y down, z away from the
    # camera). Training takes edges and the initial prediction from it, prediction the pose; a trained
    # model does without. Triangles, counter-clockwise from outside, are for pictures and files.
    # Empty: that of the training data.
    mesh.FILE = ""
    # Positive priors of an image whose meshes are trained, drawn at random from more.
    mesh.MAX_MESHES = 64

    loss = face.LOSS = CfgNode()
    # Factors of the terms (paper: 0.25, 1, 0.1).
    loss.BOX_WEIGHT = 2.0
    loss.CLASS_WEIGHT = 1.0
    loss.LANDMARK_WEIGHT = 1.0
    # Of the mesh: distance of the vertices, and difference of the edges' lengths, both over the root of
    # the face's area, means over vertices and coordinates, edges, and priors.
    loss.VERTEX_WEIGHT = 5.0
    loss.EDGE_WEIGHT = 5.0
    # IoU from which a prior is positive, and below which it is background (paper: 0.5, 0.3).
    loss.POSITIVE_IOU = 0.35
    loss.NEGATIVE_IOU = 0.35
    # A face whose best prior overlaps it less gets no prior by force.
    loss.FORCED_IOU = 0.2
    # Mined negatives per positive (paper: 3).
    loss.NEGATIVES_PER_POSITIVE = 7
    # Mined negatives where there are fewer positives; 0, as published: images without faces teach
    # nothing.
    loss.MIN_NEGATIVES = 0
    # The hardest negatives of each "image", or of the whole "batch".
    loss.MINING = "image"
    # Error at which smooth L1 becomes linear, of encoded boxes and points.
    loss.SMOOTH_L1_BETA = 1.0

    test = face.TEST = CfgNode()
    # The model resizes an image itself, as published (OpenCV's arithmetic on floats): pixels of the
    # short side, and most pixels of the long one (published: 1600, 2150). MIN_SIZE 0: the image as it
    # is. Goes with INPUT.MIN_SIZE_TEST 0.
    test.MIN_SIZE = 0
    test.MAX_SIZE = 2150
    # Priors that do not score above this are dropped before NMS.
    test.SCORE_THRESH = 0.02
    test.NMS_THRESH = 0.4
    # Most candidates for NMS, and most detections of an image.
    test.PRE_NMS_TOP_K = 5000
    test.MAX_DETECTIONS = 750
    # Clip boxes to the image. Published: no; faces at the border extend beyond it.
    test.CLIP_BOXES = False

    aug = test.AUG = CfgNode()
    # Test-time augmentation: detections of several views vote; see tta.py. d2ext's tools wrap the model
    # for it; with a plain DefaultPredictor: `predictor.model = build_tta(cfg, predictor.model)`.
    aug.ENABLED = False
    # Short sides in pixels (the paper's); empty: the model's own size (MIN_SIZE, MAX_SIZE).
    aug.MIN_SIZES = [500, 800, 1100, 1400, 1700]
    # Longest side in pixels, of these.
    aug.MAX_SIZE = 4000
    # Each size also mirrored.
    aug.FLIP = True
    # IoU with the best box of a face from which a box votes (paper).
    aug.VOTE_IOU = 0.4
