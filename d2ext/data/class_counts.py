"""Keeping the class counts of a config and of its data sets together."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from d2ext.data.dataset_dicts import check_same_classes, load_dataset, shorten
from d2ext.data.errors import DatasetError

# Sections of cfg.MODEL whose NUM_CLASSES a meta-architecture of Detectron2 reads. For any other
# meta-architecture it is the section of the same name (MODEL.YOLACT for "YOLACT").
_SECTIONS = {
    "GeneralizedRCNN": ("ROI_HEADS",),
    "PanopticFPN": ("ROI_HEADS", "SEM_SEG_HEAD"),
    "ProposalNetwork": (),
    "RetinaNet": ("RETINANET",),
    "SemanticSegmentor": ("SEM_SEG_HEAD",),
}
# Sections that count semantic classes (stuff_classes of the data), not objects.
_SEMANTIC = ("SEM_SEG_HEAD",)
# COCO's per-keypoint OKS constants lie between 0.025 and 0.107 and exist for its 17 keypoints
# only; other keypoints get a value in the middle unless the config has their own.
_DEFAULT_OKS_SIGMA = 0.05


def set_class_counts(cfg: CfgNode, dataset_name: str) -> None:
    """Set every class count in ``cfg`` to that of a registered data set, in place.

    That is ``NUM_CLASSES`` of every section of ``cfg.MODEL`` (of ``SEM_SEG_HEAD`` only if the data
    has semantic classes), and the number of keypoints if it has keypoints.
    """
    classes = _classes(dataset_name, "thing_classes")
    stuff = _classes(dataset_name, "stuff_classes")
    for section, node in cfg.MODEL.items():
        if not isinstance(node, CfgNode) or "NUM_CLASSES" not in node:
            continue
        names = stuff if section in _SEMANTIC else classes
        if names is not None:
            node.NUM_CLASSES = len(names)
    keypoints = MetadataCatalog.get(dataset_name).get("keypoint_names")
    if keypoints:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(keypoints)
        if "LANDMARKS" in cfg.MODEL:
            cfg.MODEL.LANDMARKS.NUM_KEYPOINTS = len(keypoints)
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
        for section in _sections(cfg):
            kind = "stuff_classes" if section in _SEMANTIC else "thing_classes"
            classes = _classes(name, kind)
            if classes is not None:
                key = f"MODEL.{section}.NUM_CLASSES"
                _compare(key, cfg.MODEL[section].NUM_CLASSES, name, classes, "classes")
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


def _sections(cfg: CfgNode) -> list[str]:
    """Sections of ``cfg.MODEL`` whose ``NUM_CLASSES`` the meta-architecture reads."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _SECTIONS:
        return list(_SECTIONS[architecture])
    return [
        section
        for section, node in cfg.MODEL.items()
        if section.replace("_", "").lower() == architecture.lower()
        and isinstance(node, CfgNode)
        and "NUM_CLASSES" in node
    ]


def _classes(dataset_name: str, kind: str) -> list[str] | None:
    """``thing_classes`` or ``stuff_classes``; many data sets know them only once loaded."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None and metadata.get("stuff_classes") is None:
        load_dataset(dataset_name)
    return metadata.get(kind)


def _compare(key: str, value: int, dataset_name: str, names: list[Any], what: str) -> None:
    if value != len(names):
        raise DatasetError(
            f"{key} is {value}, but data set '{dataset_name}' has {len(names)} {what} "
            f"({shorten(names)}). Set {key} to {len(names)} in the config or at the end of the "
            "command line; --dataset sets it by itself."
        )
