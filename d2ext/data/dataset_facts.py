"""What a data set says of itself, and the config keys that follow from it.

Names of classes and keypoints, mirror pairs, skeleton and the constants of keypoint similarity come
from a COCO-format file (:func:`category_metadata`) into Detectron2's metadata, and from there, for data
of every kind, into :class:`DatasetFacts` and the config.

Which keys of a config follow from which facts depends on the meta-architecture. Those of Detectron2 are
known; for any other one it is ``MODEL.<NAME>.NUM_CLASSES`` of the section of the same name, counting
things. A system that has others says so where it adds its keys::

    @follows_data("UPSNet")
    def upsnet_keys(facts: DatasetFacts) -> dict[str, Any]:
        return {
            "MODEL.ROI_HEADS.NUM_CLASSES": facts.things,
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": facts.full,
        }

``--dataset`` then sets these keys, and :func:`check_config_against_data` compares them with the data. A
part of a model that the data cannot train is switched off by False or 0, and says so::

    "MODEL.KEYPOINT_ON": None if facts.keypoints else False
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.utils.logger import log_first_n
from pycocotools.cocoeval import Params

from d2ext.data.dataset_dicts import check_same_classes, load_dataset
from d2ext.data.errors import DatasetError, shorten
from d2ext.data.panoptic import is_panoptic, panoptic_classes

# COCO's per-keypoint OKS constants lie between 0.025 and 0.107 and are those of a person's 17
# keypoints; others get a value in the middle unless the config or the data have their own.
_DEFAULT_OKS_SIGMA = 0.05
# The sides in a name: the words anywhere; the letters where they stand alone (L_Eye, eye.r, l1), before
# a capital (LEye) or as the last capital (eyeL).
_SIDES = re.compile(
    r"(?i:left|right)|(?<![A-Za-z])[LRlr](?![A-Za-z])"
    r"|(?<![A-Za-z])[LRlr](?=[A-Z][a-z])|(?<=[a-z0-9])[LR](?![A-Za-z])"
)
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
_COLORS = ((0, 200, 80), (255, 128, 0), (51, 153, 255))  # left, right, neither: as in COCO pictures

Names = list[str] | None
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Keypoints:
    """The keypoints of a category.

    Attributes:
        names: of the K keypoints
        flip_pairs: those that change places when the picture is mirrored
        skeleton: pairs to draw a line between
        sigmas: K constants of COCO's object keypoint similarity; empty: there are none
    """

    names: tuple[str, ...]
    flip_pairs: Pairs
    skeleton: Pairs = ()
    sigmas: tuple[float, ...] = ()


def mirror_pairs(names: Sequence[str]) -> Pairs:
    """Keypoints whose names differ by left and right, or L and R, in any case and place: ``L_Eye``,
    ``LeftEye``, ``eye-right``. Where a name has several sides, all change: the partner of
    ``left_eye_right``, the right corner of the left eye, is ``right_eye_left``."""
    place = {name.lower(): i for i, name in enumerate(names)}
    mirrored = [_SIDES.sub(lambda m: _OTHER_SIDE[m[0].lower()], name).lower() for name in names]
    partners = [place.get(name, i) for i, name in enumerate(mirrored)]
    return tuple((i, j) for i, j in enumerate(partners) if i < j and partners[j] == i)


def category_keypoints(category: dict[str, Any]) -> Keypoints:
    """Keypoints of a category of a COCO-format file: ``keypoints`` and, as far as it has them,
    ``skeleton`` (counted from 1), ``flip_pairs`` (from 0; else by names) and ``sigmas``.

    Raises:
        DatasetError: names that repeat, or the rest does not fit them
    """
    names = tuple(str(name) for name in category["keypoints"])
    where = f"category '{category.get('name')}'"
    if len(set(names)) != len(names):
        raise DatasetError(f"Names of keypoints of {where} occur repeatedly.")
    pairs = category.get("flip_pairs")
    try:
        flip_pairs = mirror_pairs(names) if pairs is None else _pairs(pairs)
        skeleton = tuple((a - 1, b - 1) for a, b in _pairs(category.get("skeleton") or ()))
        sigmas = tuple(float(v) for v in category.get("sigmas") or ())
    except (TypeError, ValueError) as e:
        raise DatasetError(
            f"'flip_pairs' and 'skeleton' of {where} are lists of pairs of whole numbers, 'sigmas' is "
            f"a list of numbers: {e}."
        ) from e
    indices = [i for pair in (*flip_pairs, *skeleton) for i in pair]
    if (
        not all(0 <= i < len(names) for i in indices)
        or len(sigmas) not in (0, len(names))
        or not all(0 < sigma < float("inf") for sigma in sigmas)
    ):
        raise DatasetError(
            f"'flip_pairs' (0-based), 'skeleton' (1-based) or 'sigmas' (above 0) of {where} do not fit "
            f"its {len(names)} keypoints."
        )
    _check_partners(where, [(names[a], names[b]) for a, b in flip_pairs])
    return Keypoints(names, flip_pairs, skeleton, sigmas)


def _pairs(values: Iterable[Iterable[Any]]) -> Pairs:
    return tuple((int(a), int(b)) for a, b in values)


def _check_partners(where: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Raise :class:`DatasetError` unless each keypoint changes places with one other at most."""
    partners: dict[str, set[str]] = {}
    for a, b in pairs:
        partners.setdefault(a, set()).add(b)
        partners.setdefault(b, set()).add(a)
    several = [f"{name} with {shorten(sorted(p))}" for name, p in partners.items() if len(p) > 1]
    if several:
        raise DatasetError(
            f"Keypoints of {where} change places with several others when mirrored: "
            f"{shorten(several)}. Give each one partner ('flip_pairs')."
        )


def keypoint_metadata(keypoints: Keypoints) -> dict[str, Any]:
    """Detectron2's metadata of keypoints, and ``keypoint_oks_sigmas``."""
    names = keypoints.names

    def color(*ends: str) -> tuple[int, int, int]:
        sides = {side[0].lower()[0] for side in map(_SIDES.search, ends) if side}
        return _COLORS[0] if "l" in sides else _COLORS[1] if sides else _COLORS[2]

    lines = [(names[a], names[b]) for a, b in keypoints.skeleton]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [(names[a], names[b]) for a, b in keypoints.flip_pairs],
        "keypoint_connection_rules": [(a, b, color(a, b)) for a, b in lines],
        "keypoint_oks_sigmas": keypoints.sigmas,
    }


def category_metadata(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Detectron2's metadata of the categories of a COCO-format file, by ascending id."""
    metadata: dict[str, Any] = {
        "thing_classes": [c["name"] for c in categories],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }
    for category in categories:
        if category.get("keypoints"):  # all have the same
            return {**metadata, **keypoint_metadata(category_keypoints(category))}
    return metadata


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a registered data set; None: it has nothing of that kind.

    Attributes:
        things: classes of instances
        semantic: ``stuff_classes``, the classes of its semantic maps; "things" first in the
            separated form of panoptic data
        stuff: of panoptic data, stuff alone, without "things"
        full: of panoptic data, stuff and then things, the classes of a full label map
        keypoints: their names
        flip_indices: which keypoint takes the place of each in a mirrored picture; empty: not known
        flip_pairs: the same as [i, j] lists
        sigmas: of keypoint similarity, as the data give them
        mesh_flip: which vertex takes the place of each in a mirrored picture, of meshes of faces
        mesh_file: their topology, a Wavefront OBJ
    """

    things: Names
    semantic: Names
    stuff: Names = None
    full: Names = None
    keypoints: Names = None
    flip_indices: list[int] | None = None
    sigmas: list[float] | None = None
    mesh_flip: list[int] | None = None
    mesh_file: str | None = None

    @property
    def flip_pairs(self) -> list[list[int]] | None:
        if self.flip_indices is None:
            return None
        return [[i, j] for i, j in enumerate(self.flip_indices) if i < j]


def dataset_facts(dataset_name: str) -> DatasetFacts:
    """The facts of a registered data set; many data sets know them only once loaded."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None and metadata.get("stuff_classes") is None:
        load_dataset(dataset_name)
    return metadata_facts(metadata)


def metadata_facts(metadata: Metadata) -> DatasetFacts:
    """The facts that metadata hold."""
    panoptic = panoptic_classes(metadata) if is_panoptic(metadata) else None
    # Some sets have names of keypoints, and no keypoint.
    names = metadata.get("keypoint_names") if metadata.get("keypoints_labelled", True) else None
    has_mirrors = metadata.get("keypoint_flip_map") is not None
    sigmas = metadata.get("keypoint_oks_sigmas")
    return DatasetFacts(
        # The standard form of panoptic data lists stuff among its thing classes, too.
        things=metadata.get("thing_classes") if panoptic is None else panoptic.things,
        semantic=metadata.get("stuff_classes"),
        stuff=None if panoptic is None else panoptic.stuff,
        full=None if panoptic is None else panoptic.full,
        keypoints=list(names) if names else None,
        flip_indices=(flip_indices(metadata) if has_mirrors else []) if names else None,
        sigmas=list(sigmas) if sigmas else None,
        mesh_flip=metadata.get("mesh_flip"),
        mesh_file=metadata.get("mesh_file"),
    )


def flip_indices(dataset: str | Metadata) -> list[int]:
    """For each keypoint of a data set, by its registered name or its metadata, which one takes its place
    in a mirrored picture.

    Raises:
        DatasetError: the metadata have no ``keypoint_names``, or pairs of unknown names, or several of
            one keypoint
    """
    metadata = MetadataCatalog.get(dataset) if isinstance(dataset, str) else dataset
    dataset_name = metadata.get("name")
    names = metadata.get("keypoint_names")
    if not names:
        raise DatasetError(
            f"Data set '{dataset_name}' has no landmarks: its metadata has no keypoint_names. Register "
            "it with d2ext.data.landmarks.register_landmarks."
        )
    partner = {name: name for name in names}
    pairs = metadata.get("keypoint_flip_map", ())
    _check_partners(f"data set '{dataset_name}'", pairs)
    for a, b in pairs:
        if a not in partner or b not in partner:
            raise DatasetError(
                f"Data set '{dataset_name}': keypoint_flip_map has unknown names {a, b}."
            )
        partner[a], partner[b] = b, a
    place = {name: i for i, name in enumerate(names)}
    return [place[partner[name]] for name in names]


def oks_sigmas(facts: DatasetFacts, given: Sequence[float] = ()) -> list[float]:
    """Constants of keypoint similarity: the data's own, or else those given, if they fit. COCO's belong
    to keypoints with the names of COCO's alone; others get a constant, and the log says so.

    Returns:
        K numbers; none for COCO's, which its evaluation knows, and without keypoints
    """
    names = facts.keypoints or []
    is_coco = [name.lower() for name in names] == list(COCO_PERSON_KEYPOINT_NAMES)
    if facts.sigmas or not names:
        return facts.sigmas or []
    if len(given) == len(names) and (is_coco or not _are_coco_sigmas(given)):
        return list(given)
    if is_coco:
        return []
    _warn_once(
        f"The data have no 'sigmas' of their {len(names)} keypoints ({shorten(names)}): keypoint AP "
        f"takes {_DEFAULT_OKS_SIGMA} for each. Give them in the category or as "
        "TEST.KEYPOINT_OKS_SIGMAS; other constants give another AP."
    )
    return [_DEFAULT_OKS_SIGMA] * len(names)


def _warn_once(message: str) -> None:
    """A config is made several times in a process."""
    log_first_n(logging.WARNING, message, name=__name__, key="message")


def _are_coco_sigmas(values: Sequence[float]) -> bool:
    coco = Params(iouType="keypoints").kpt_oks_sigmas
    return len(values) == len(coco) and np.allclose(values, coco)


KeyFunction = Callable[[DatasetFacts], dict[str, Any]]
_keys: dict[str, KeyFunction] = {}


def follows_data(*architectures: str) -> Callable[[KeyFunction], KeyFunction]:
    """Decorator for a function that says which keys of the config follow from which facts.

    The function gets :class:`DatasetFacts` and returns ``{key: value}``. A key whose last word begins
    with ``NUM_`` gets the length of the value, a list, unless it is 0: that part is off. False or 0:
    the data have nothing for it, so it goes off. None leaves a key alone.

    Args:
        architectures: values of ``MODEL.META_ARCHITECTURE`` that it speaks for
    """

    def add(function: KeyFunction) -> KeyFunction:
        for architecture in architectures:
            _keys[architecture] = function
        return function

    return add


@follows_data("GeneralizedRCNN")
def _rcnn(facts: DatasetFacts) -> dict[str, Any]:
    return {"MODEL.ROI_HEADS.NUM_CLASSES": facts.things}


@follows_data("PanopticFPN")
def _panoptic_fpn(facts: DatasetFacts) -> dict[str, Any]:
    return {**_rcnn(facts), **_semantic_segmentor(facts)}


@follows_data("SemanticSegmentor")
def _semantic_segmentor(facts: DatasetFacts) -> dict[str, Any]:
    return {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": facts.semantic}


@follows_data("RetinaNet")
def _retinanet(facts: DatasetFacts) -> dict[str, Any]:
    return {"MODEL.RETINANET.NUM_CLASSES": facts.things}


@follows_data("ProposalNetwork")
def _proposal_network(facts: DatasetFacts) -> dict[str, Any]:
    return {}


def set_config_from_data(cfg: CfgNode, dataset_name: str) -> None:
    """Set every key of ``cfg`` that follows from a registered data set, in place.

    That is ``NUM_CLASSES`` of every section of ``cfg.MODEL`` (of
    ``SEM_SEG_HEAD`` only if the data has semantic classes), what the meta-architecture says
    (:func:`follows_data`; parts go off only for a data set of ``cfg.DATASETS.TRAIN``), and with
    keypoints their number and the constants of their similarity (:func:`oks_sigmas`).
    """
    facts = dataset_facts(dataset_name)
    for section, node in cfg.MODEL.items():
        if not isinstance(node, CfgNode) or "NUM_CLASSES" not in node:
            continue
        names = facts.semantic if section == "SEM_SEG_HEAD" else facts.things
        if names is not None:
            node.NUM_CLASSES = len(names)
    for key, value in _keys_of(cfg, facts).items():
        section, leaf = section_of(cfg, key)
        if _is_off(value) and section[leaf]:
            if dataset_name not in cfg.DATASETS.TRAIN:  # a trained model keeps what it has
                continue
            _warn_once(
                f"{key} is now {value}, instead of {section[leaf]}: data set '{dataset_name}' has "
                "nothing for it. To keep this part of the model, untrained, set the key at the end of "
                "the command line."
            )
        if leaf.startswith("NUM_") and value:
            value = len(value)
            if section[leaf] == 0:
                _warn_once(
                    f"{key} stays 0: the {value} of data set '{dataset_name}' are not learned."
                )
                continue
        if value is not None:
            section[leaf] = value
    if facts.keypoints is not None:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(facts.keypoints)
        cfg.TEST.KEYPOINT_OKS_SIGMAS = oks_sigmas(facts, cfg.TEST.KEYPOINT_OKS_SIGMAS)


def check_config_against_data(cfg: CfgNode, *, train: bool = True) -> None:
    """Check that the counts of the model are those of ``cfg.DATASETS``.

    Args:
        cfg: its meta-architecture says which counts matter
        train: False leaves ``cfg.DATASETS.TRAIN`` alone (evaluation only)

    Raises:
        DatasetError: a mismatch; the message says which key to set to which value
    """
    dataset_names = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    if train:
        _check_trainable(cfg)
    for name in dataset_names:
        for key, value, names in _counts(cfg, dataset_facts(name)):
            if value != len(names):
                what = key.rpartition("NUM_")[2].lower()
                listed = f" ({shorten(names)})" if isinstance(names[0], str) else ""
                raise DatasetError(
                    f"{key} is {value}, but data set '{name}' has {len(names)} {what}{listed}. Set "
                    f"{key} to {len(names)} in the config or at the end of the command line; --dataset "
                    "sets it by itself."
                )
    if dataset_names:
        check_same_classes(dataset_names)


def check_names(cfg: CfgNode, metadata: Metadata) -> None:
    """Check that metadata name as many classes and keypoints as the model of ``cfg`` has.

    Raises:
        DatasetError: they do not
    """
    for key, value, names in _counts(cfg, metadata_facts(metadata)):
        if value != len(names) and isinstance(names[0], str):
            raise DatasetError(
                f"{key} is {value}, but '{metadata.get('name')}' has {len(names)} names "
                f"({shorten(names)}), so they belong to another model. Predict with the config that the "
                "training saved (--run FOLDER), or give the names (--class-names)."
            )


def _check_trainable(cfg: CfgNode) -> None:
    """Raise :class:`DatasetError` if a part of the model is on that no data set trains."""
    off = [
        {k: v for k, v in _keys_of(cfg, dataset_facts(name)).items() if _is_off(v)}
        for name in cfg.DATASETS.TRAIN
    ]
    for key, value in off[0].items() if off else ():
        section, leaf = section_of(cfg, key)
        if section[leaf] and all(key in others for others in off):
            raise DatasetError(
                f"{key} is {section[leaf]}, but {', '.join(cfg.DATASETS.TRAIN)} have nothing for it. "
                f"Set {key} to {value}; --dataset sets it by itself."
            )


def _is_off(value: Any) -> bool:
    """Whether a function of :func:`follows_data` says that the data have nothing for a key."""
    return isinstance(value, int) and not value


def _counts(cfg: CfgNode, facts: DatasetFacts) -> Iterator[tuple[str, int, list[Any]]]:
    """Key, its value in the config unless that is 0, and what it counts."""
    keys = _keys_of(cfg, facts)
    if cfg.MODEL.KEYPOINT_ON and not any(key.endswith("NUM_KEYPOINTS") for key in keys):
        keys["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = facts.keypoints
    for key, names in keys.items():
        section, leaf = section_of(cfg, key)
        if leaf.startswith("NUM_") and names and section[leaf]:
            yield key, section[leaf], names


def _keys_of(cfg: CfgNode, facts: DatasetFacts) -> dict[str, Any]:
    """Keys that the meta-architecture reads, with the facts that they follow."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _keys:
        return _keys[architecture](facts)
    return {
        f"MODEL.{section}.NUM_CLASSES": facts.things
        for section, node in cfg.MODEL.items()
        if section.replace("_", "").lower() == architecture.lower()
        and isinstance(node, CfgNode)
        and "NUM_CLASSES" in node
    }


def section_of(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    """The node that holds a key, and the key's last word."""
    *path, leaf = key.split(".")
    node = cfg
    for word in path:
        node = node[word]
    return node, leaf
