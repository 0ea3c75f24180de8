"""Settings of DensePose R-CNN; names and defaults of Detectron2's project, as far as they matter.

Detector, pyramid and box head: Detectron2's own keys, with ``MODEL.ROI_HEADS.NAME: DensePoseROIHeads``.
"""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


@CONFIG_REGISTRY.register()
def add_densepose_config(cfg: CfgNode) -> None:
    """Add DensePose's keys to ``cfg``, in place."""
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD = CfgNode()
    # A head of DENSEPOSE_HEAD_REGISTRY: "DensePoseV1ConvXHead", "DensePoseDeepLabHead", or, small, for
    # regions of the image and training from random weights, "DensePoseUNetHead".
    head.NAME = "DensePoseV1ConvXHead"
    # Its convolutions (of a U-Net: levels), their channels and the side of their kernels.
    head.NUM_STACKED_CONVS = 8
    head.CONV_HEAD_DIM = 512
    head.CONV_HEAD_KERNEL = 3
    # Features of the backbone that it sees, finest first, "image" among them if the backbone gives it;
    # []: MODEL.ROI_HEADS.IN_FEATURES.
    head.IN_FEATURES = []
    # Pooling of regions; cells on a side (legacy: 14).
    head.POOLER_TYPE = "ROIAlign"
    head.POOLER_RESOLUTION = 28
    head.POOLER_SAMPLING_RATIO = 2
    # One map at the stride of the finest of these features is pooled, made of all of them, instead of
    # the one that a region's size asks for (legacy: False).
    head.DECODER_ON = True
    # Channels of the decoder.
    head.DECODER_CONV_DIMS = 256
    # Norm of its convolutions, "" for none.
    head.DECODER_NORM = ""

    # A predictor of DENSEPOSE_PREDICTOR_REGISTRY: "DensePoseChartPredictor" (parts, U, V) or
    # "DensePoseEmbeddingPredictor" (CSE).
    head.PREDICTOR_NAME = "DensePoseChartPredictor"
    # Kernel of the transposed convolutions (stride 2), and the bilinear upsampling after them.
    head.DECONV_KERNEL = 4
    head.UP_SCALE = 2
    # Coarse segmentation: 2, foreground; 15, background and parts (legacy).
    head.NUM_COARSE_SEGM_CHANNELS = 2
    # It is trained by instance masks (gt_masks) instead of the annotated parts.
    head.COARSE_SEGM_TRAINED_BY_MASKS = False

    # Targets are laid on the maps half a cell up and to the left of where results are read; False: where
    # they are read.
    head.PUBLISHED_GRID = False
    # IoU of a proposal and its person's box above which its surface trains.
    head.FG_IOU_THRESHOLD = 0.7
    # Weights of the losses: coarse segmentation, parts, and U and V (with a confidence: 0.0005).
    head.INDEX_WEIGHTS = 5.0
    # Weight of a pixel of the background in the coarse segmentation, beside 1 of a person's. Less makes
    # persons larger, so that fewer of their points are missed.
    head.BACKGROUND_WEIGHT = 1.0
    head.PART_WEIGHTS = 1.0
    # Weight of the parts at all pixels of dp_masks, coarse ones; 0, as published: parts are learned at
    # the points only.
    head.PART_MASK_WEIGHTS = 0.0
    head.POINT_REGRESSION_WEIGHTS = 0.01

    confidence = head.UV_CONFIDENCE = CfgNode()
    # Predict how far off U and V are.
    confidence.ENABLED = False
    # "iid_iso": one variance (WC1); "indep_aniso": a larger one in a predicted direction (WC2).
    confidence.TYPE = "iid_iso"
    # Least variance, of U and V in 0..1.
    confidence.EPSILON = 0.01

    confidence = head.SEGM_CONFIDENCE = CfgNode()
    # A factor on the logits of the segmentations (WC1M, WC2M).
    confidence.ENABLED = False
    # Least factor.
    confidence.EPSILON = 0.01

    # Faults of the published test-time augmentation (TEST.AUG; its FLIP needs the tables of the mirrored
    # U and V, `densepose_uv_symmetry` of the dataset's metadata).
    # Confidences are the first image's; False: means of all images.
    head.PUBLISHED_TTA_CONFIDENCES = False
    # Rotated maps are turned back by way of boxes of whole pixels, sheared unless these are square;
    # False: each cell is looked up where the rotation takes it.
    head.PUBLISHED_TTA_ROTATION = False
    # Degrees counter-clockwise of rotated images.
    cfg.TEST.AUG.ROTATION_ANGLES = []

    cse = head.CSE = CfgNode()
    # D, numbers of an embedding.
    cse.EMBED_SIZE = 16
    # Meshes by name, each with the keys
    #   TYPE               "vertex_feature": features times a learned matrix; "vertex_direct": learned
    #   NUM_VERTICES
    #   FEATURE_DIM        numbers of a vertex's features
    #   FEATURES_TRAINABLE whether these are learned too
    #   IS_TRAINABLE       whether any of it is learned
    #   INIT_FILE          features or embeddings to begin with: a published .pkl, or .npz; "": a
    #                      checkpoint has them
    #   GEODESICS          file of distances between vertices, metres, for losses that need them: .npy,
    #                      .npz or .pkl, (V, V) or the strictly lower triangle by rows; "": none
    #   SYMMETRY           file of the mirror vertices, for mirrored images in training: a published .pkl
    #                      or .npz with vertex_transforms; "": `densepose_mesh` of the data has them, if
    #                      it is this mesh
    cse.EMBEDDERS = CfgNode(new_allowed=True)
    # "EmbeddingLoss": the annotated vertex; "SoftEmbeddingLoss": vertices near it too.
    cse.EMBED_LOSS_NAME = "EmbeddingLoss"
    cse.EMBED_LOSS_WEIGHT = 0.6
    # Divisors of the squared distance of embeddings and of the geodesic distance (animals: 0.1).
    cse.EMBEDDING_DIST_GAUSS_SIGMA = 0.01
    cse.GEODESIC_DIST_GAUSS_SIGMA = 0.01

    cycle = cse.PIX_TO_SHAPE_CYCLE_LOSS = CfgNode()
    # Pixels to vertices and back end where they began.
    cycle.ENABLED = False
    cycle.WEIGHT = 0.0001
    # All meshes, not only those of the batch.
    cycle.USE_ALL_MESHES_NOT_GT_ONLY = False
    # Random pixels of each region; 0: all.
    cycle.NUM_PIXELS_TO_SAMPLE = 100
    cycle.TEMPERATURE_PIXEL_TO_VERTEX = 0.05
    cycle.TEMPERATURE_VERTEX_TO_PIXEL = 0.05

    cycle = cse.SHAPE_TO_SHAPE_CYCLE_LOSS = CfgNode()
    # Vertices to another mesh and back, for a random pair of meshes.
    cycle.ENABLED = False
    cycle.WEIGHT = 0.025
    # Random vertices of each mesh.
    cycle.MAX_NUM_VERTICES = 4936
    cycle.TEMPERATURE = 0.05
