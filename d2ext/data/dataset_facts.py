"""Keeping the class counts of a config and of its data sets together.

Which keys of a config count which classes depends on the meta-architecture. Those of Detectron2 are
known; for any other one it is ``MODEL.<NAME>.NUM_CLASSES`` of the section of the same name, counting
things. A system that counts otherwise says so where it adds its keys::

    @counts_classes("UPSNet")
    def upsnet_counts(classes: DatasetClasses) -> dict[str, list[str] | None]:
        return {
            "MODEL.ROI_HEADS.NUM_CLASSES": classes.things,
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": classes.full,
        }

``--dataset`` then sets these keys, and :func:`check_config_against_data` compares them with the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from d2ext.data.dataset_dicts import check_same_classes, load_dataset, shorten
from d2ext.data.errors import DatasetError
from d2ext.data.panoptic import is_panoptic, panoptic_classes

# COCO's per-keypoint OKS constants lie between 0.025 and 0.107 and exist for its 17 keypoints
# only; other keypoints get a value in the middle unless the config has their own.
_DEFAULT_OKS_SIGMA = 0.05

Names = list[str] | None


@dataclass(frozen=True)
class DatasetClasses:
    """Names of the classes of a data set; None if it has no classes of that kind.

    Attributes:
        things: classes of instances
        semantic: ``stuff_classes``, the classes of its semantic maps; "things" first in the
            separated form of panoptic data
        stuff: of panoptic data, stuff alone, without "things"
        full: of panoptic data, stuff and then things, the classes of a full label map
    """

    things: Names
    semantic: Names
    stuff: Names
    full: Names


CountFunction = Callable[[DatasetClasses], dict[str, Names]]
_counts: dict[str, CountFunction] = {}


def counts_classes(*architectures: str) -> Callable[[CountFunction], CountFunction]:
    """Decorator for a function that says which keys of the config count which classes.

    The function gets a :class:`DatasetClasses` and returns ``{key: names}``: the key's value must be
    the number of names; None leaves the key alone.

    Args:
        architectures: values of ``MODEL.META_ARCHITECTURE`` that it speaks for
    """

    def add(function: CountFunction) -> CountFunction:
        for architecture in architectures:
            _counts[architecture] = function
        return function

    return add


@counts_classes("GeneralizedRCNN")
def _count_rcnn(classes: DatasetClasses) -> dict[str, Names]:
    return {"MODEL.ROI_HEADS.NUM_CLASSES": classes.things}


@counts_classes("PanopticFPN")
def _count_panoptic_fpn(classes: DatasetClasses) -> dict[str, Names]:
    return {**_count_rcnn(classes), **_count_semantic(classes)}


@counts_classes("SemanticSegmentor")
def _count_semantic(classes: DatasetClasses) -> dict[str, Names]:
    return {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": classes.semantic}


@counts_classes("RetinaNet")
def _count_retinanet(classes: DatasetClasses) -> dict[str, Names]:
    return {"MODEL.RETINANET.NUM_CLASSES": classes.things}


@counts_classes("ProposalNetwork")
def _count_nothing(classes: DatasetClasses) -> dict[str, Names]:
    return {}


def set_class_counts(cfg: CfgNode, dataset_name: str) -> None:
    """Set every class count in ``cfg`` to that of a registered data set, in place.

    That is ``NUM_CLASSES`` of every section of ``cfg.MODEL`` (of ``SEM_SEG_HEAD`` only if the data
    has semantic classes), what the meta-architecture counts in its own way
    (:func:`counts_classes`), and the number of keypoints if the data has keypoints. With the latter,
    ``MODEL.LANDMARKS.FLIP_INDICES`` is emptied: the data set says what mirrors what.
    """
    classes = dataset_classes(dataset_name)
    for section, node in cfg.MODEL.items():
        if not isinstance(node, CfgNode) or "NUM_CLASSES" not in node:
            continue
        names = classes.semantic if section == "SEM_SEG_HEAD" else classes.things
        if names is not None:
            node.NUM_CLASSES = len(names)
    for key, names in _counted(cfg, classes).items():
        if names is not None:
            section, leaf = _section_of(cfg, key)
            section[leaf] = len(names)
    keypoints = MetadataCatalog.get(dataset_name).get("keypoint_names")
    if keypoints:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(keypoints)
        if "LANDMARKS" in cfg.MODEL:
            cfg.MODEL.LANDMARKS.NUM_KEYPOINTS = len(keypoints)
            cfg.MODEL.LANDMARKS.FLIP_INDICES = []
        if len(keypoints) not in (17, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)):
            known = MetadataCatalog.get(dataset_name).get("keypoint_oks_sigmas")
            cfg.TEST.KEYPOINT_OKS_SIGMAS = list(known or [_DEFAULT_OKS_SIGMA] * len(keypoints))


def check_config_against_data(cfg: CfgNode, *, train: bool = True) -> None:
    """Check that the class counts of the model are those of ``cfg.DATASETS``.

    Args:
        cfg: its meta-architecture says which counts matter
        train: False leaves ``cfg.DATASETS.TRAIN`` alone (evaluation only)

    Raises:
        DatasetError: a mismatch; the message says which key to set to which value
    """
    names = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    for name in names:
        for key, classes in _counted(cfg, dataset_classes(name)).items():
            if classes is not None:
                section, leaf = _section_of(cfg, key)
                _compare(key, section[leaf], name, classes, "classes")
        keypoints = MetadataCatalog.get(name).get("keypoint_names")
        if cfg.MODEL.META_ARCHITECTURE == "LandmarkNet" and keypoints:
            count = cfg.MODEL.LANDMARKS.NUM_KEYPOINTS
            _compare("MODEL.LANDMARKS.NUM_KEYPOINTS", count, name, keypoints, "keypoints")
        if cfg.MODEL.KEYPOINT_ON and keypoints:
            section = "ROI_KEYPOINT_HEAD"
            if cfg.MODEL.META_ARCHITECTURE == "LandmarkNet":
                section = "LANDMARKS"
            key = f"MODEL.{section}.NUM_KEYPOINTS"
            _compare(key, cfg.MODEL[section].NUM_KEYPOINTS, name, keypoints, "keypoints")
    if names:
        check_same_classes(names)


def dataset_classes(dataset_name: str) -> DatasetClasses:
    """The classes of a registered data set; many data sets know them only once loaded."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None and metadata.get("stuff_classes") is None:
        load_dataset(dataset_name)
    panoptic = panoptic_classes(dataset_name) if is_panoptic(dataset_name) else None
    return DatasetClasses(
        # The standard form of panoptic data lists stuff among its thing classes, too.
        things=metadata.get("thing_classes") if panoptic is None else panoptic.things,
        semantic=metadata.get("stuff_classes"),
        stuff=None if panoptic is None else panoptic.stuff,
        full=None if panoptic is None else panoptic.full,
    )


def _counted(cfg: CfgNode, classes: DatasetClasses) -> dict[str, Names]:
    """Keys that the meta-architecture reads, with the names that they count."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _counts:
        return _counts[architecture](classes)
    return {
        f"MODEL.{section}.NUM_CLASSES": classes.things
        for section, node in cfg.MODEL.items()
        if section.replace("_", "").lower() == architecture.lower()
        and isinstance(node, CfgNode)
        and "NUM_CLASSES" in node
    }


def _section_of(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    """The node that holds a key, and the key's last word."""
    *path, leaf = key.split(".")
    node = cfg
    for word in path:
        node = node[word]
    return node, leaf


def _compare(key: str, value: int, dataset_name: str, names: list[Any], what: str) -> None:
    if value != len(names):
        raise DatasetError(
            f"{key} is {value}, but data set '{dataset_name}' has {len(names)} {what} "
            f"({shorten(names)}). Set {key} to {len(names)} in the config or at the end of the "
            "command line; --dataset sets it by itself."
        )
