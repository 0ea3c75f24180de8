"""Settings of the data path, beside Detectron2's ``INPUT``, ``DATASETS`` and ``DATALOADER``."""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


@CONFIG_REGISTRY.register()
def add_data_config(cfg: CfgNode) -> None:
    """Add the data keys to ``cfg``, in place."""
    # True: the first unusable sample (broken image, impossible annotation) ends the run with its
    # error. False: it is reported once and another sample takes its place; in evaluation it is
    # reported and left out, so it counts as an image without detections.
    cfg.INPUT.STRICT = False
    # How many unusable samples in a row are replaced before the run ends with an error; it also ends
    # when more than these, and more than 10 % of the samples, have turned out to be unusable
    cfg.INPUT.MAX_BAD_SAMPLES = 10

    # What makes samples of a data set, a name in d2ext.data.MAPPER_REGISTRY:
    #   "D2extDatasetMapper"     images, as with Detectron2's mapper
    #   "PoseMapper"             the same; keypoints that a crop leaves outside stay annotated
    #   "build_top_down_mapper"  landmarks: in training one annotated instance, cropped; in a test one
    #                            image with the boxes to crop (INPUT.LANDMARKS)
    #   "FaceMapper"             images of faces, with meshes where the data have them
    #   "DensePoseMapper"        images with points on the surface of persons
    #   "ClipMapper"             videos: in training a frame and a reference frame (INPUT.VIDEO)
    #   "FlowPairMapper"         pairs of images with optical flow
    cfg.INPUT.MAPPER = "D2extDatasetMapper"

    # Published fault of CornerNet and both CenterNets: crowd annotations train like single objects.
    cfg.INPUT.PUBLISHED_CROWDS = False
    # Degrees counter-clockwise, one of which DensePoseMapper turns a training image by
    cfg.INPUT.ROTATION_ANGLES = [0]

    # True: sem_seg of a training sample has a label for every class, stuff 0..S-1 and then things
    # S..S+T-1, and 255 for none, read from the panoptic annotation (see d2ext.data.panoptic).
    # False: the file that sem_seg_file_name names, as in Detectron2.
    cfg.INPUT.SEM_SEG_WITH_THINGS = False

    # Data sets of images that train beside DATASETS.TRAIN: an iteration also takes SOLVER.IMS_PER_BATCH
    # of these, with `joint: True`, for models that train on both (YolactEdge). Classes must be the same.
    cfg.DATASETS.TRAIN_JOINT = ()

    # What a training takes from the metadata of its data, so that predictions are named and drawn with
    # the saved config alone, where the data are not registered (d2ext.data.saved_metadata): names, the
    # data set's own ids as pairs [category id, class], (R, G, B) of each class
    cfg.DATASETS.THING_CLASSES = []
    cfg.DATASETS.STUFF_CLASSES = []
    cfg.DATASETS.THING_IDS = []
    cfg.DATASETS.STUFF_IDS = []
    cfg.DATASETS.THING_COLORS = []
    cfg.DATASETS.STUFF_COLORS = []
    # Keypoints: names, mirror pairs of names, and [name, name, (R, G, B)] of lines between them
    cfg.DATASETS.KEYPOINT_NAMES = []
    cfg.DATASETS.KEYPOINT_FLIP_MAP = []
    cfg.DATASETS.KEYPOINT_CONNECTION_RULES = []
    # Meshes of faces (OBJ, mirror partner of each vertex), and the surface of DensePose
    cfg.DATASETS.MESH_FILE = ""
    cfg.DATASETS.MESH_FLIP = []
    cfg.DATASETS.DENSEPOSE_MESH = ""
    cfg.DATASETS.DENSEPOSE_MESH_NAME = ""
    cfg.DATASETS.DENSEPOSE_UV_SYMMETRY = ""
    # Arguments of d2ext.data.custom.register_own_dataset for the data of --dataset, with which a saved
    # config trains on and evaluates; empty: they are none of one's own
    cfg.DATASETS.OWN = CfgNode(new_allowed=True)

    # Training augmentation
    cfg.INPUT.AUGMENTATION = c = CfgNode()
    # A recipe of d2ext.data.AUGMENTATION_REGISTRY:
    #   "default"  Detectron2's own (INPUT.MIN_SIZE_TRAIN, CROP, RANDOM_FLIP, ...)
    #   "ssd"      SSD's as published for YOLACT, by the keys below
    #   "centernet"  CenterNet's as published: mirror, affine crop to SIZE x SIZE, colours
    #   "cornernet"  CornerNet's as published: random window, resize to SIZE x SIZE, mirror, colours
    #   "cornernet_saccade"  the same with a crop around an object, to SIZE x SIZE
    #   "retinaface"  RetinaFace's as published: square crop, colours, padding, mirror, resize to
    #              SIZE x SIZE
    #   "upsnet"   UPSNet's as published: as "default", resized as floats by OpenCV
    #   "vpsnet"   VPSNet's as published: resized by a factor in RESIZE_SCALE, flipped
    #              (INPUT.RANDOM_FLIP), cropped (INPUT.CROP)
    #   "none"     images as they are
    c.NAME = "default"

    # The keys below belong to "ssd"; their defaults are the published values.
    # Side of the square that images are resized to, whatever their aspect ratio, pixels
    c.SIZE = 550
    # Colour of new area when an image is expanded: red, green, blue (whatever INPUT.FORMAT is), in
    # [0, 255]. The ImageNet mean in the rounding of the published code.
    c.MEAN = [123.68, 116.78, 103.94]
    # Probability of each of the four photometric changes
    c.PHOTOMETRIC_PROB = 0.5
    # Largest change of brightness, grey levels of [0, 255]
    c.BRIGHTNESS = 32.0
    # Smallest and largest factor on all channels
    c.CONTRAST = [0.5, 1.5]
    # Smallest and largest factor on the saturation (HSV)
    c.SATURATION = [0.5, 1.5]
    # Largest change of hue, degrees of 360
    c.HUE = 18.0
    # Probability of an expansion
    c.EXPAND_PROB = 0.5
    # Smallest and largest factor on the sides, at least 1
    c.EXPAND_RATIO = [1.0, 4.0]
    # Random crop that keeps instances whose box centre lies inside
    c.CROP_ENABLED = True
    # Options of the minimum overlap of window and boxes, beside "no crop" and "any crop"
    c.CROP_MIN_IOUS = [0.1, 0.3, 0.7, 0.9]
    # False: the overlap has no effect, as in the published code, whose test never rejects
    c.CROP_ENFORCE_IOU = False
    # Smallest and largest side of the window, fraction of the image's side
    c.CROP_SCALE = [0.3, 1.0]
    # Smallest and largest height / width of the window
    c.CROP_ASPECT_RATIO = [0.5, 2.0]
    # Windows that are tried before another option is drawn
    c.CROP_TRIALS = 50
    # Probability of a horizontal flip
    c.FLIP_PROB = 0.5

    # The keys below belong to "centernet", which also takes SIZE and FLIP_PROB; their defaults are the
    # published values.
    # Factors on brightness, contrast and saturation are uniform in 1 -+ this
    c.COLOR_JITTER = 0.4
    # Standard deviation of the lighting noise along the principal components of ImageNet's colours
    c.LIGHTING = 0.1
    c.AFFINE = CfgNode()
    # "crop": a random window; "shift": the whole image, moved and zoomed; "letterbox": the whole image;
    # "keep": the whole image at its own resolution, padded to multiples of DIVISIBILITY
    c.AFFINE.MODE = "crop"
    # Sides of the window of "crop" over the image's longer side, one of them is drawn
    c.AFFINE.SCALES = [0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    # Least distance of the window's centre from the image's edges, pixels; halved until it fits
    c.AFFINE.BORDER = 128
    # Standard deviations of "shift": of the centre over the longer side, of the window's factor
    c.AFFINE.SHIFT = 0.1
    c.AFFINE.ZOOM = 0.4
    # Published: 32, for the hourglass 128
    c.AFFINE.DIVISIBILITY = 32
    # Probability of a rotation, and the standard deviation of its angle, degrees. As published, rotated
    # images train joint heat maps and offsets alone: for poses (INPUT.MAPPER "PoseMapper").
    c.AFFINE.ROTATE_PROB = 0.0
    c.AFFINE.ROTATE = 25.0

    # The keys below belong to "cornernet", which also takes SIZE, CROP_ENABLED (off: the whole image),
    # FLIP_PROB, COLOR_JITTER and LIGHTING.
    # Pad the whole image to a square; False: resize it as it is, as published for CornerNet-Squeeze
    c.PAD_TO_SQUARE = True
    c.CENTER_CROP = CfgNode()
    # Side of the window over SIZE, one of them is drawn ("cornernet_saccade": factor on images
    # without objects)
    c.CENTER_CROP.SCALES = [0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    # Least distance of the window's centre from the image's edges, pixels; halved until it fits
    c.CENTER_CROP.BORDER = 128

    # The keys below belong to "retinaface", which also takes SIZE, MEAN, FLIP_PROB and the photometric
    # ones; their defaults are the published values.
    c.SQUARE_CROP = CfgNode()
    # Side of the window over the image's short side, one of them is drawn
    c.SQUARE_CROP.SCALES = [0.3, 0.45, 0.6, 0.8, 1.0]
    # Windows that are tried; then the whole image is padded to a square
    c.SQUARE_CROP.TRIALS = 250
    # Keypoints outside the window move to its border and are trained there, as published; False: they
    # become unlabelled
    c.SQUARE_CROP.PUBLISHED_CLIPPED_POINTS = False

    # Smallest and largest factor on both sides of an image, for "vpsnet"; the published values.
    c.RESIZE_SCALE = [0.8, 1.5]
