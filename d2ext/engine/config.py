"""Settings of the training engine that Detectron2 does not have."""

from detectron2.config import CfgNode

from d2ext.config import CONFIG_REGISTRY


@CONFIG_REGISTRY.register()
def add_engine_config(cfg: CfgNode) -> None:
    """Add the training keys to ``cfg``, in place."""
    solver = cfg.SOLVER
    # "SGD" (BASE_LR, MOMENTUM, NESTEROV, WEIGHT_DECAY), "Adam" or "AdamW" (ADAM_BETAS).
    solver.OPTIMIZER = "SGD"
    # Decay rates of Adam's running means of the gradient and of its square.
    solver.ADAM_BETAS = (0.9, 0.999)
    # Micro-batches per optimizer step, run one after the other to save memory. IMS_PER_BATCH stays
    # the number of images per optimizer step over all processes; it must be a multiple of
    # (processes x ACCUMULATION_STEPS).
    solver.ACCUMULATION_STEPS = 1
    # Type of mixed-precision arithmetic when SOLVER.AMP.ENABLED: "float16" (with loss scaling) or
    # "bfloat16" (without). On the CPU it is always "bfloat16".
    solver.AMP.DTYPE = "float16"
    # An iteration whose loss or gradient is NaN or infinite updates nothing and is logged (the
    # published YOLACT does so). Stop after this many of them in a row; 1: at the first.
    solver.NON_FINITE_LOSS_LIMIT = 20
    # How many periodic checkpoints to keep, the newest; 0 keeps all.
    solver.CHECKPOINT_MAX_TO_KEEP = 0
    # Iterations between two lines of the log, of metrics.json and of TensorBoard. Losses there are
    # medians over this many iterations.
    solver.LOG_PERIOD = 20
    # Where else scalars, pictures and the config go: any of "Wandb", "MLflow", "ClearML", whose packages
    # must be installed; see d2ext.engine.experiments.
    solver.LOGGERS = ()
    # For models with parameters that get no gradient in some iterations; costs some speed. Used
    # with several processes only.
    solver.FIND_UNUSED_PARAMETERS = False
    # Processes exchange gradients in float16: half of the bytes, where the network between machines is
    # slow.
    solver.COMPRESS_GRADIENTS = False
    # Threads of PyTorch's operators in each process when MODEL.DEVICE is "cpu"; 0: as PyTorch
    # chooses. A network of small tensors is faster with 1, since threads then wait for each other
    # longer than they compute, and leave cores to the loader's workers.
    solver.CPU_THREADS = 0

    # Training runs the network (of models that are not d2ext's, and of those with several steps an
    # iteration, the backbone) as torch.compile makes it: faster on GPUs, after a minute or more.
    solver.COMPILE = False
    # Training runs the network as CUDA graphs: faster where kernels are shorter than their launch, as
    # with small networks and batches. For d2ext's models with one step an iteration, images of at most
    # four shapes, and ACCUMULATION_STEPS 1.
    solver.CUDA_GRAPH = False

    # Pairs of how names of parameters begin and a factor on their learning rate, such as
    # [["roi_heads.", 4.0]]: parts of a model that learn from random weights may want rates of their own.
    solver.LR_FACTORS = []

    # Store activations and weights channels-last (NHWC); faster convolutions on tensor cores.
    cfg.MODEL.CHANNELS_LAST = False
    # Accept MODEL.WEIGHTS for training whatever little of it fits the model.
    cfg.MODEL.WEIGHTS_ALLOW_PARTIAL = False

    # Exponential moving average of the weights. When enabled it is what is evaluated and what
    # checkpoints hold under "model"; the weights that the optimizer sees are stored beside it.
    cfg.MODEL_EMA = CfgNode()
    cfg.MODEL_EMA.ENABLED = False
    # Share of the old average that an update keeps, per optimizer step.
    cfg.MODEL_EMA.DECAY = 0.9998
    # Start with a shorter memory: after n updates the share is min(DECAY, (1 + n) / (10 + n)).
    cfg.MODEL_EMA.WARMUP = True

    # Metric by which the best checkpoint (model_best.pth) is selected at every evaluation, for
    # example "segm/AP"; with several test sets "<data set>/segm/AP". Empty: none is written.
    cfg.TEST.BEST_METRIC = ""
    # "max" or "min": which value of BEST_METRIC is best.
    cfg.TEST.BEST_MODE = "max"
    # A training ends after so many evaluations in a row without a better BEST_METRIC; 0: never.
    cfg.TEST.EARLY_STOPPING = 0
    # True: evaluation also writes where quality is lost (d2ext evaluate --analyze). AP of boxes, masks
    # and keypoints: types of errors, confusions, sizes, scores, the worst images (needs hotcoco).
    # Panoptic quality: per class, image and clip, between classes, and where ids change.
    cfg.TEST.ANALYZE = False
    # What computes panoptic quality: "panopticapi", or the faster "hotcoco" (pip install hotcoco),
    # which gives the same numbers.
    cfg.TEST.PANOPTIC_BACKEND = "panopticapi"
    # Windows of Video Panoptic Quality, in frames; 0: single frames. Where every fifth frame is
    # annotated, as in Cityscapes-VPS, these are 1 to 4 annotated frames.
    cfg.TEST.VPQ_WINDOWS = (0, 5, 10, 15)
    # COCO's keypoint evaluation leaves out an instance whose keypoints are as similar as this (OKS) to
    # those of one with a better score: 0.9 in the published top-down systems. 0: keep all.
    cfg.TEST.KEYPOINT_OKS_NMS = 0.0
    # Published fault of CornerNet and both CenterNets: boxes and scores of results are rounded to two
    # decimals before COCO's evaluation, which makes equal scores.
    cfg.TEST.PUBLISHED_ROUNDING = False
    # COCO's evaluation of boxes also says how many are false (FD, FD5, FD25, FD50, FDs, FDm, FDl), as
    # published for CenterNet with triplets.
    cfg.TEST.FALSE_DISCOVERY = False
    # COCO's evaluation leaves out annotations narrower or lower than this share of their image. The
    # YOLACT authors' own evaluation (not the one by COCO's files): 4 / 550.
    cfg.TEST.MIN_TARGET_SIDE = 0.0
    # Further overlaps (IoU, or OKS of keypoints) of 0.5, 0.55, ..., 0.95 at which COCO's evaluation says
    # AP: 0.7 gives "AP70".
    cfg.TEST.AP_AT = ()
    surface = cfg.DENSEPOSE_EVALUATION = CfgNode()
    # First threshold of GPS, GPSm and mask IoU; the others follow in steps of 0.05 to 0.95 (also
    # published: 0.2).
    surface.MIN_IOU_THRESHOLD = 0.5
    # Distance in metres that GPS is measured by, of all points; 0: by the point's part, as published
    # (0.107, hands, to 0.351, torso).
    surface.GPS_K = 0.0
    # What gives the instances of a model that gives none their ids in evaluation on videos, a name in
    # d2ext.engine.tracking.TRACKER_REGISTRY ("NorfairTracker"). Empty: they get none.
    cfg.TEST.TRACKER = ""
    # Instances of a lower score get no id: each that continues no track would begin one.
    cfg.TEST.TRACKER_MIN_SCORE = 0.3
