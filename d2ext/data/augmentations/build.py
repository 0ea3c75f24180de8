"""From ``cfg.INPUT.AUGMENTATION.NAME`` to a list of augmentations."""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from fvcore.common.registry import Registry

from d2ext.data.augmentations.affine import RandomAffineWarp
from d2ext.data.augmentations.canvas import RandomCanvasCrop, RandomPixelMirror, SquareCanvas
from d2ext.data.augmentations.crop import RandomCrop, RandomIoUCrop
from d2ext.data.augmentations.expand import RandomExpand
from d2ext.data.augmentations.lighting import RandomColorLighting
from d2ext.data.augmentations.photometric import RandomPhotometricDistortion
from d2ext.data.augmentations.resize import (
    RandomScale,
    ResizeShortestEdge,
    ResizeToSquare,
    ScaleShortestEdge,
)
from d2ext.data.augmentations.saccade import RandomObjectCrop
from d2ext.data.augmentations.square import (
    PadToSquare,
    RandomlyInterpolatedSquare,
    RandomSquareCrop,
)

Recipe = Callable[[CfgNode, bool], list[T.Augmentation]]


class RecipeRegistry(Registry):
    """Recipes by name: functions ``(cfg, is_train) -> list[Augmentation]``.

    All randomness must come from ``numpy.random`` or ``random``, which the loader seeds for each
    sample. A recipe is added with ``@AUGMENTATION_REGISTRY.register_as("name")``, or with
    ``@AUGMENTATION_REGISTRY.register()`` under the name of its function.
    """

    def register_as(self, name: str) -> Callable[[Recipe], Recipe]:
        """Decorator: register a recipe as ``name``."""

        def add(recipe: Recipe) -> Recipe:
            self._do_register(name, recipe)
            return recipe

        return add


AUGMENTATION_REGISTRY = RecipeRegistry("AUGMENTATION")


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The recipe that ``cfg.INPUT.AUGMENTATION.NAME`` names.

    Raises:
        ValueError: unknown name; the message lists the known ones
    """
    name = cfg.INPUT.AUGMENTATION.NAME
    if name not in AUGMENTATION_REGISTRY:
        known = ", ".join(sorted(key for key, _ in AUGMENTATION_REGISTRY))
        raise ValueError(f"INPUT.AUGMENTATION.NAME is '{name}'; known recipes: {known}.")
    return AUGMENTATION_REGISTRY.get(name)(cfg, is_train)


@AUGMENTATION_REGISTRY.register_as("default")
def build_default_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """What Detectron2's own mapper does: crop (``INPUT.CROP``), shortest-edge resize, flip."""
    augmentations = detection_utils.build_augmentation(cfg, is_train)
    augmentations = [_safe(augmentation) for augmentation in augmentations]
    if is_train and cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return augmentations


@AUGMENTATION_REGISTRY.register_as("none")
def build_no_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Training sees images as they are; test images are resized as with ``"default"``."""
    return [] if is_train else build_default_augmentation(cfg, False)


@AUGMENTATION_REGISTRY.register_as("upsnet")
def build_upsnet_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """As ``"default"``, but training images are resized as published for UPSNet: float32, by OpenCV.

    Test images are resized as with ``"default"`` (with ``INPUT.MIN_SIZE_TEST: 0``, not at all: the
    model resizes them itself).
    """
    augmentations = build_default_augmentation(cfg, is_train)
    if not is_train:
        return augmentations
    return [
        ScaleShortestEdge(x.short_edge_length, x.max_size, "range" if x.is_range else "choice")
        if isinstance(x, T.ResizeShortestEdge)
        else x
        for x in augmentations
    ]


@AUGMENTATION_REGISTRY.register_as("vpsnet")
def build_vpsnet_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The published VPSNet recipe: resize by ``RESIZE_SCALE``, flip, then ``INPUT.CROP``.

    Both frames of a pair go through the same. Images become float32. Test images: as ``"upsnet"``.
    """
    if not is_train:
        return build_default_augmentation(cfg, False)
    augmentations: list[T.Augmentation] = [RandomScale(cfg.INPUT.AUGMENTATION.RESIZE_SCALE)]
    flips = detection_utils.build_augmentation(cfg, True)
    augmentations += [x for x in flips if isinstance(x, T.RandomFlip)]
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return augmentations


@AUGMENTATION_REGISTRY.register_as("ssd")
def build_ssd_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The published YOLACT recipe: photometric distortion, expansion, crop, flip, square resize.

    Test images are resized as with ``"default"`` (with ``INPUT.MIN_SIZE_TEST: 0``, not at all: the
    model resizes them itself).
    """
    if not is_train:
        return build_default_augmentation(cfg, False)
    c = cfg.INPUT.AUGMENTATION
    augmentations: list[T.Augmentation] = [
        _photometric(cfg),
        RandomExpand(ratio=c.EXPAND_RATIO, fill=_fill(cfg), prob=c.EXPAND_PROB),
    ]
    if c.CROP_ENABLED:
        augmentations.append(
            RandomIoUCrop(
                min_ious=c.CROP_MIN_IOUS,
                scale=c.CROP_SCALE,
                aspect_ratio=c.CROP_ASPECT_RATIO,
                trials=c.CROP_TRIALS,
                enforce_iou=c.CROP_ENFORCE_IOU,
            )
        )
    # Published: flip, then resize. The two commute, and the small image is cheaper to flip.
    return [*augmentations, ResizeToSquare(c.SIZE), T.RandomFlip(prob=c.FLIP_PROB)]


@AUGMENTATION_REGISTRY.register_as("retinaface")
def build_retinaface_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The published RetinaFace recipe: square crop, photometric distortion, padding of what was not
    cropped, flip, resize to a square by a random interpolation.

    Images stay float32 in [0, 255] from the colours on, unclipped. Test images are resized as with
    ``"default"`` (with ``INPUT.MIN_SIZE_TEST: 0``, not at all: the model does what is published).
    """
    if not is_train:
        return build_default_augmentation(cfg, False)
    c = cfg.INPUT.AUGMENTATION
    crop = c.SQUARE_CROP
    return [
        RandomSquareCrop(crop.SCALES, crop.TRIALS, crop.PUBLISHED_CLIPPED_POINTS),
        _photometric(cfg),
        PadToSquare(_fill(cfg)),
        T.RandomFlip(prob=c.FLIP_PROB),
        RandomlyInterpolatedSquare(c.SIZE),
    ]


@AUGMENTATION_REGISTRY.register_as("centernet")
def build_centernet_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The published CenterNet recipe: mirror, random affine crop to a square, colours, lighting.

    Images stay float32 in [0, 255] from the colours on, unclipped, as published. Test images are
    resized as with ``"default"`` (with ``INPUT.MIN_SIZE_TEST: 0``, not at all: the model does what is
    published).
    """
    if not is_train:
        return build_default_augmentation(cfg, False)
    c = cfg.INPUT.AUGMENTATION
    augmentations: list[T.Augmentation] = [
        RandomAffineWarp(
            size=(c.SIZE, c.SIZE),
            mode=c.AFFINE.MODE,
            scales=c.AFFINE.SCALES,
            border=c.AFFINE.BORDER,
            shift=c.AFFINE.SHIFT,
            zoom=c.AFFINE.ZOOM,
            flip_prob=c.FLIP_PROB,
            rotate_prob=c.AFFINE.ROTATE_PROB,
            rotate=c.AFFINE.ROTATE,
            divisibility=c.AFFINE.DIVISIBILITY,
        )
    ]
    return augmentations + _colors(cfg)


@AUGMENTATION_REGISTRY.register_as("cornernet")
def build_cornernet_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The published CornerNet recipe: random window, resize to a square, mirror, colours, lighting.

    Without the random window (``CROP_ENABLED``) the image is padded to a square, or, without
    ``PAD_TO_SQUARE``, resized as it is. Images stay float32 in
    [0, 255] from the colours on, unclipped, as published. Test images are resized as with
    ``"default"`` (with ``INPUT.MIN_SIZE_TEST: 0``, not at all, as published).
    """
    if not is_train:
        return build_default_augmentation(cfg, False)
    c = cfg.INPUT.AUGMENTATION
    window: list[T.Augmentation] = [SquareCanvas()] if c.PAD_TO_SQUARE else []
    if c.CROP_ENABLED:
        window = [RandomCanvasCrop(c.SIZE, c.CENTER_CROP.SCALES, c.CENTER_CROP.BORDER)]
    return [*window, ResizeToSquare(c.SIZE), RandomPixelMirror(c.FLIP_PROB), *_colors(cfg)]


@AUGMENTATION_REGISTRY.register_as("cornernet_saccade")
def build_cornernet_saccade_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The published CornerNet-Saccade recipe: crop around an object, mirror, colours, lighting.

    Otherwise as ``"cornernet"``.
    """
    if not is_train:
        return build_default_augmentation(cfg, False)
    c = cfg.INPUT.AUGMENTATION
    crop = RandomObjectCrop(c.SIZE, c.CENTER_CROP.SCALES)
    return [crop, RandomPixelMirror(c.FLIP_PROB), *_colors(cfg)]


def _photometric(cfg: CfgNode) -> T.Augmentation:
    """The photometric distortion of SSD."""
    c = cfg.INPUT.AUGMENTATION
    return RandomPhotometricDistortion(
        brightness=c.BRIGHTNESS,
        contrast=c.CONTRAST,
        saturation=c.SATURATION,
        hue=c.HUE,
        prob=c.PHOTOMETRIC_PROB,
        image_format=cfg.INPUT.FORMAT,
    )


def _fill(cfg: CfgNode) -> list[float]:
    """Colour of new area, in the order of ``cfg.INPUT.FORMAT``."""
    mean = list(cfg.INPUT.AUGMENTATION.MEAN)
    return mean if cfg.INPUT.FORMAT == "RGB" else mean[::-1]


def _colors(cfg: CfgNode) -> list[T.Augmentation]:
    """Colour jitter and lighting, if wanted."""
    c = cfg.INPUT.AUGMENTATION
    if c.COLOR_JITTER > 0 or c.LIGHTING > 0:
        return [RandomColorLighting(c.COLOR_JITTER, c.LIGHTING, cfg.INPUT.FORMAT)]
    return []


def _safe(augmentation: T.Augmentation) -> T.Augmentation:
    """Replace Detectron2's resize by the one that survives extreme shapes."""
    if type(augmentation) is T.ResizeShortestEdge:
        style = "range" if augmentation.is_range else "choice"
        return ResizeShortestEdge(
            augmentation.short_edge_length, augmentation.max_size, style, augmentation.interp
        )
    return augmentation
