"""Own data: registered, checked and written into a config with one call each.

From Python::

    register_own_dataset("fruits", "train.json", "train/", "val.json", "val/")
    apply_dataset_to_config(cfg, "fruits")     # data sets fruits_train and fruits_val, class counts
    check_config_against_data(cfg)

Kinds of annotation:

- instances in COCO's form (``json``), with masks, keypoints or points on surfaces (DensePose);
- landmarks (``json`` and ``landmarks``, the set whose points they are), in any form of that set;
- faces to detect (``json`` and ``landmarks``, one of :data:`~d2ext.data.faces.FACE_KINDS`);
- COCO's panoptic form (``panoptic_json``, ``panoptic_root``): instances and stuff maps, which panoptic
  models read beside it, are made of it once, unless given (``json``, ``sem_seg``);
- label maps (``sem_seg``), with the names of the classes;
- videos (``video_json``): YouTube-VIS' form, COCO's with videos, panoptic clips, or folders of masks.

A program takes the same from its command line by :func:`add_dataset_arguments` and
:func:`register_from_arguments`, or from a YAML file (:mod:`d2ext.data.dataset_files`).
"""

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.coco_json import (
    check_same_categories,
    coco_records,
    load_coco_json,
    read_coco_json,
)
from d2ext.data.dataset_dicts import load_dataset
from d2ext.data.dataset_facts import (
    category_metadata,
    check_config_against_data,
    set_config_from_data,
)
from d2ext.data.dataset_files import FILES, SPLITS, Split, load_dataset_yaml
from d2ext.data.densepose.register import (
    SURFACE_FILES,
    SurfaceFiles,
    densepose_metadata,
    has_points,
)
from d2ext.data.errors import DatasetError
from d2ext.data.faces.register import FACE_KINDS, register_faces
from d2ext.data.formats import FORMATS, convert_to_coco
from d2ext.data.landmarks.datasets import LANDMARK_DATASETS
from d2ext.data.landmarks.register import register_landmarks
from d2ext.data.register_panoptic import register_panoptic
from d2ext.data.register_semantic import check_classes, parse_classes, register_semantic
from d2ext.data.saved_metadata import save_metadata
from d2ext.data.summary import forget, summarize
from d2ext.data.video.register import register_own_videos

__all__ = [
    "add_dataset_arguments",
    "apply_dataset_to_config",
    "check_config_against_data",
    "load_dataset_yaml",
    "register_from_arguments",
    "register_own_dataset",
    "register_saved",
]

logger = logging.getLogger(__name__)

_Splits = dict[str, Split]

# What register_own_dataset has registered, by name of the data set.
_registered: dict[str, tuple[_Splits, list[str] | None, str | None, SurfaceFiles]] = {}
# With which arguments, as far as given: what register_saved needs, from a config.
_arguments: dict[str, dict[str, Any]] = {}


def register_own_dataset(
    name: str,
    train_json: str | None = None,
    train_images: str | None = None,
    val_json: str | None = None,
    val_images: str | None = None,
    *,
    train_panoptic_json: str | None = None,
    train_panoptic_root: str | None = None,
    train_sem_seg: str | None = None,
    train_video_json: str | None = None,
    val_panoptic_json: str | None = None,
    val_panoptic_root: str | None = None,
    val_sem_seg: str | None = None,
    val_video_json: str | None = None,
    semantic_classes: Sequence[str] | None = None,
    landmarks: str | None = None,
    format: str | None = None,
    densepose_mesh: str | None = None,
    densepose_geodesics: str | None = None,
    densepose_uv_symmetry: str | None = None,
) -> list[str]:
    """Check data and register them as ``<name>_train`` and ``<name>_val``.

    Either part may be left out. Registering the same again is harmless.

    Args:
        name: of the data set
        train_json, ..., val_video_json: files of the parts, see :class:`Split`
        semantic_classes: names of the classes, in the order of the labels; only for data that have
            nothing but label maps, and for videos with masks of several classes
        landmarks: kind of the landmarks, see :func:`~d2ext.data.landmarks.register_landmarks`, or of
            faces, see :func:`~d2ext.data.faces.load_faces`
        format: what wrote the ``json`` files or folders, if not COCO's form: a name in
            :data:`d2ext.data.formats.FORMATS`
        densepose_mesh, densepose_geodesics, densepose_uv_symmetry: files of the surface that points of
            the annotations are on, see :class:`~d2ext.data.densepose.register.SurfaceFiles`

    Returns:
        the registered names

    Raises:
        DatasetError: files that cannot be used, different classes or landmarks in the two parts, or a
            name that is taken
    """
    train = (
        *(train_images, train_json, train_panoptic_json, train_panoptic_root),
        *(train_sem_seg, train_video_json),
    )
    val = (
        *(val_images, val_json, val_panoptic_json, val_panoptic_root),
        *(val_sem_seg, val_video_json),
    )
    given = {"train": Split(*map(_absolute, train)), "val": Split(*map(_absolute, val))}
    splits = {key: split for key, split in given.items() if split != Split()}
    if not name or not splits:
        raise DatasetError(
            f"Data set '{name}' needs a name and the JSON file and image folder of at least one "
            "part, train or val."
        )
    classes = None if semantic_classes is None else check_classes(semantic_classes)
    surface = SurfaceFiles(
        *map(_absolute, (densepose_mesh, densepose_geodesics, densepose_uv_symmetry))
    )
    _check_complete(name, splits, classes, landmarks)
    if format is not None:
        splits = _converted(name, splits, format)
    names = [f"{name}_{key}" for key in splits]
    if _registered.get(name) != (splits, classes, landmarks, surface):
        taken = [n for n in names if n in DatasetCatalog.list()]
        if taken:
            raise DatasetError(
                f"Data set '{taken[0]}' is already registered with other files. Choose another "
                f"name than '{name}'."
            )
        try:
            _registrar(splits, classes, landmarks, surface)(name, splits)
        except DatasetError:
            for n in names:  # of two parts both or none
                if n in DatasetCatalog.list():
                    DatasetCatalog.remove(n)
                    MetadataCatalog.pop(n, None)
                    forget(n)
            raise
        _registered[name] = (splits, classes, landmarks, surface)
    arguments: dict[str, Any] = {
        **{f"{key}_{k}": v for key, split in given.items() for k, v in asdict(split).items()},
        **{f"densepose_{key}": value for key, value in asdict(surface).items()},
        **{"semantic_classes": classes, "landmarks": landmarks, "format": format},
    }
    _arguments[name] = {"name": name} | {k: v for k, v in arguments.items() if v is not None}
    return names


def _absolute(path: str | None) -> str | None:
    """A path that a saved config finds from any folder."""
    return path if path is None or "://" in path else os.path.abspath(path)


def register_saved(cfg: CfgNode, *, train: bool = True) -> None:
    """Register the data that a training was given (``cfg.DATASETS.OWN``), as far as the names in
    ``cfg.DATASETS`` are not registered yet.

    Args:
        cfg: of a training
        train: False: the files that it is trained on need not be there any more

    Raises:
        DatasetError: files that cannot be used
    """
    wanted = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    name = str(cfg.DATASETS.OWN.get("name", ""))
    own = {f"{name}_{split}" for split in SPLITS} & set(wanted) - set(DatasetCatalog.list())
    if not name or not own:
        return
    left_out = () if f"{name}_train" in own else tuple(f"train_{key}" for key in FILES)
    register_own_dataset(**{k: _text(v) for k, v in cfg.DATASETS.OWN.items() if k not in left_out})


def _text(value: Any) -> Any:
    """YAML's numbers, of files and classes that are called so, as the texts that they are."""
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else str(value)


def _converted(name: str, splits: _Splits, form: str) -> _Splits:
    """The parts with COCO files in place of another tool's export."""
    if any(split.kind != "instances" for split in splits.values()):
        raise DatasetError("--format is for instances: give --train-json and --val-json.")
    parts = {key: (str(split.json), str(split.images)) for key, split in splits.items()}
    files = convert_to_coco(form, parts, name)
    return {key: replace(split, json=files[key]) for key, split in splits.items()}


def _registrar(
    splits: _Splits, classes: list[str] | None, landmarks: str | None, surface: SurfaceFiles
) -> Callable[[str, _Splits], None]:
    """What registers the parts of a data set, which are all of one kind."""
    kind = next(iter(splits.values())).kind
    if surface != SurfaceFiles() and (kind != "instances" or landmarks is not None):
        raise DatasetError("Files of a surface (--densepose-...) go with --train-json, --val-json.")
    if landmarks in FACE_KINDS:
        return partial(_register_faces, kind=landmarks)
    if landmarks is not None:
        return partial(_register_landmarks, kind=landmarks)
    if kind == "videos":
        return partial(_register_videos, classes=classes)
    if classes is not None:
        return partial(_register_semantic, classes=classes)
    if kind == "panoptic":
        return _register_panoptic
    return partial(_register_instances, surface=surface)


def _check_complete(
    name: str, splits: _Splits, classes: list[str] | None, landmarks: str | None
) -> None:
    for key, split in splits.items():
        flag = f"--{key}"
        if split.kind == "none" or split.images is None:
            raise DatasetError(
                f"Data set '{name}' needs both the JSON file and the image folder of its {key} "
                f"part; got {split.json!r} and {split.images!r}. (Panoptic data: {flag}-panoptic-"
                f"json, {flag}-panoptic-root and {flag}-images; semantic data: {flag}-sem-seg and "
                f"{flag}-images.)"
            )
        if split.kind == "instances" and split.sem_seg is not None:
            raise DatasetError(
                f"The {key} part of data set '{name}' has instances and label maps, but no panoptic "
                f"file that says which belong together: give {flag}-panoptic-json and {flag}-"
                "panoptic-root."
            )
        if split.kind == "videos":
            if (split.json, split.panoptic_json, split.sem_seg) != (None, None, None):
                raise DatasetError(
                    f"{flag}-video-json holds all annotations of the {key} part of '{name}': give "
                    f"no others but, for panoptic clips, {flag}-panoptic-root."
                )
        elif split.panoptic_root is not None and split.panoptic_json is None:
            raise DatasetError(
                f"{flag}-panoptic-root needs {flag}-panoptic-json, the JSON file of its PNGs."
            )
    kinds = {key: split.kind for key, split in splits.items()}
    if len(set(kinds.values())) > 1:
        raise DatasetError(
            f"The train part of data set '{name}' is for {kinds['train']}, the val part for "
            f"{kinds['val']}: give both the same kind of annotation."
        )
    (kind,) = set(kinds.values())
    if kind == "semantic" and classes is None:
        raise DatasetError(
            f"The label maps of data set '{name}' need the names of their classes, in the order of "
            "the labels: --semantic-classes a,b,c or a file with one name per line."
        )
    if kind not in ("semantic", "videos") and classes is not None:
        raise DatasetError(
            f"Data set '{name}' takes its classes from the JSON file: leave out the semantic classes."
        )
    if kind != "instances" and landmarks is not None:
        raise DatasetError(
            f"The landmarks of data set '{name}' are given by --train-json and --val-json, with the "
            "image folders; they go with no other annotation."
        )


def _register_instances(name: str, splits: _Splits, *, surface: SurfaceFiles) -> None:
    categories = {}
    for key, split in splits.items():
        assert split.json is not None and split.images is not None  # _check_complete
        file = read_coco_json(split.json, split.images)
        categories[key] = file.classes
        kind = {"evaluator_type": "coco"}
        if has_points(file):
            kind = densepose_metadata(file.annotations, surface, split.json)
        elif surface != SurfaceFiles():
            raise DatasetError(
                f"No annotation of '{split.json}' has points on a surface (dp_x, ...), but files of one "
                "are given (--densepose-...): leave them out, or give the annotations for them."
            )
        DatasetCatalog.register(f"{name}_{key}", partial(load_coco_json, split.json, split.images))
        MetadataCatalog.get(f"{name}_{key}").set(
            json_file=split.json,
            image_root=split.images,
            **kind,
            **category_metadata(file.categories),
        )
        summarize(f"{name}_{key}", coco_records(file, split.images))
    check_same_categories(name, categories)


def _register_landmarks(name: str, splits: _Splits, *, kind: str) -> None:
    points = set()
    for key, split in splits.items():
        assert split.json is not None and split.images is not None  # _check_complete
        points.add(register_landmarks(f"{name}_{key}", kind, split.json, split.images).keypoints)
        summarize(f"{name}_{key}", load_dataset(f"{name}_{key}"))
    if len(points) > 1:
        raise DatasetError(f"The train and val parts of '{name}' have different landmarks.")


def _register_faces(name: str, splits: _Splits, *, kind: str) -> None:
    topologies = set()
    for key, split in splits.items():
        assert split.json is not None and split.images is not None  # _check_complete
        register_faces(f"{name}_{key}", split.json, split.images, kind=kind)
        topologies.add(tuple(MetadataCatalog.get(f"{name}_{key}").get("mesh_flip") or ()))
        summarize(f"{name}_{key}", load_dataset(f"{name}_{key}"))
    if len(topologies - {()}) > 1:
        raise DatasetError(f"The train and val parts of '{name}' have different meshes.")


def _register_panoptic(name: str, splits: _Splits) -> None:
    categories = {}
    for key, split in splits.items():
        assert split.images is not None and split.panoptic_json is not None  # _check_complete
        panoptic = register_panoptic(
            f"{name}_{key}",
            split.images,
            split.panoptic_json,
            split.panoptic_root,
            json=split.json,
            sem_seg=split.sem_seg,
        )
        categories[key] = {
            i: f"{n} ({'thing' if i in panoptic.things else 'stuff'})"
            for i, n in {**panoptic.things, **panoptic.stuff}.items()
        }
        summarize(f"{name}_{key}", load_dataset(f"{name}_{key}"))
    check_same_categories(name, categories)


def _register_semantic(name: str, splits: _Splits, *, classes: list[str]) -> None:
    for key, split in splits.items():
        assert split.images is not None and split.sem_seg is not None  # _check_complete
        register_semantic(f"{name}_{key}", split.images, split.sem_seg, classes)


def _register_videos(name: str, splits: _Splits, *, classes: list[str] | None) -> None:
    categories = {}
    for key, split in splits.items():
        assert split.images is not None and split.video_json is not None  # _check_complete
        categories[key] = register_own_videos(
            f"{name}_{key}", split.video_json, split.images, split.panoptic_root, classes
        )
    check_same_categories(name, categories)


def apply_dataset_to_config(cfg: CfgNode, name: str) -> None:
    """Make a config train and evaluate on a registered data set, in place.

    Sets ``DATASETS.TRAIN`` and ``TEST`` to ``<name>_train`` and ``<name>_val`` (as far as they
    exist; built-in sets such as ``shapes``, ``coco_2017`` or ``coco_2017_panoptic_separated`` work,
    too), empties ``TRAIN_JOINT``, switches ``INPUT.PUBLISHED_CROWDS`` and ``TEST.PUBLISHED_ROUNDING``
    off, and sets the keys that follow from the data
    (:func:`~d2ext.data.dataset_facts.set_config_from_data`) and, where masks are RLE,
    ``INPUT.MASK_FORMAT``.

    Raises:
        DatasetError: neither is registered
    """
    names = {split: _find(name, split) for split in SPLITS}
    if not any(names.values()):
        raise DatasetError(
            f"There is no data set '{name}': neither '{name}_train' nor '{name}_val' is "
            "registered. Give its files: --train-json, --train-images, --val-json, --val-images."
        )
    cfg.DATASETS.TRAIN = (names["train"],) if names["train"] else ()
    cfg.DATASETS.TRAIN_JOINT = ()  # of the config's own data
    cfg.DATASETS.TEST = (names["val"],) if names["val"] else ()
    # Faults belong to published numbers.
    cfg.INPUT.PUBLISHED_CROWDS = cfg.TEST.PUBLISHED_ROUNDING = False
    given, name = name, names["train"] or names["val"] or name
    set_config_from_data(cfg, name)
    save_metadata(cfg, name)
    cfg.DATASETS.OWN = CfgNode(_arguments.get(given, {}), new_allowed=True)
    if MetadataCatalog.get(name).get("mask_format") == "bitmask":
        cfg.INPUT.MASK_FORMAT = "bitmask"


def _find(name: str, split: str) -> str | None:
    """``shapes_panoptic``, ``train`` → ``shapes_train_panoptic``: the registered name, if any."""
    words = name.split("_")
    for end in range(len(words), 0, -1):
        candidate = "_".join([*words[:end], split, *words[end:]])
        if candidate in DatasetCatalog.list():
            return candidate
    return None


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset`` and what belongs to it; see :func:`register_from_arguments`."""
    group = parser.add_argument_group(
        "own data",
        "data to train and evaluate on instead of the config's data sets: instances (json), panoptic "
        "annotations (panoptic-json, panoptic-root) or label maps (sem-seg, semantic-classes)",
    )
    group.add_argument(
        "--dataset", metavar="NAME", help="name for the data below, or a known one such as 'shapes'"
    )
    for split, purpose in (("train", "train on"), ("val", "evaluate on")):
        for key, metavar, text in (
            ("images", "DIR", f"images to {purpose}"),
            ("json", "FILE", "their instances in COCO's form; see also --format"),
            ("panoptic-json", "FILE", "their annotations in COCO's panoptic form"),
            ("panoptic-root", "DIR", "PNGs of the panoptic form (default: FILE without .json)"),
            ("sem-seg", "DIR", "their label maps"),
            (
                "video-json",
                "FILE",
                "videos: YouTube-VIS, COCO, panoptic clips, or a folder of masks",
            ),
        ):
            group.add_argument(f"--{split}-{key}", metavar=metavar, help=text)
    group.add_argument(
        "--semantic-classes",
        metavar="NAMES",
        help="classes of label maps or MOTS masks: a,b,c or a file with one name per line",
    )
    group.add_argument(
        "--dataset-yaml", metavar="FILE", help="a YAML file with all of this (name, train, val)"
    )
    group.add_argument(
        "--format",
        metavar="NAME",
        help=f"what wrote the json files or folders ({', '.join(name for name, _ in FORMATS)}), if it "
        "is not COCO's form",
    )
    group.add_argument(
        "--landmarks",
        metavar="KIND",
        help="the data are landmarks, in any form of this set: "
        f"{', '.join(LANDMARK_DATASETS)}, or custom (COCO-keypoint JSON with the points' names). "
        f"{', '.join(FACE_KINDS)}: faces to detect, with five points",
    )
    for key, what in (
        ("mesh", "mesh of the surface that points in the json files are on (DensePose)"),
        ("geodesics", "distances between its vertices, to evaluate"),
        ("uv-symmetry", "its U and V in a mirrored image, to mirror images in training"),
    ):
        group.add_argument(f"--densepose-{key}", metavar="FILE", help=what)


def register_from_arguments(args: argparse.Namespace) -> str | None:
    """Register the data that the command line names.

    Call it in every process of a distributed run.

    Args:
        args: of a parser with :func:`add_dataset_arguments`

    Returns:
        the name for :func:`apply_dataset_to_config`, or None if the arguments name no data

    Raises:
        DatasetError: contradictory arguments or unusable data
    """
    files = {f"{split}_{key}": getattr(args, f"{split}_{key}") for split in SPLITS for key in FILES}
    others = ("semantic_classes", "landmarks", "format", *(f"densepose_{k}" for k in SURFACE_FILES))
    files |= {key: getattr(args, key) for key in others}
    given = [f"--{key.replace('_', '-')}" for key, value in files.items() if value is not None]
    if args.dataset_yaml is not None:
        if given or args.dataset is not None:
            raise DatasetError("--dataset-yaml holds the whole data set: give no other data.")
        arguments: dict[str, Any] = load_dataset_yaml(args.dataset_yaml)
        register_own_dataset(**arguments)
        return arguments["name"]
    if args.dataset is None:
        if given:
            raise DatasetError(f"{', '.join(given)} need a name for the data: add --dataset NAME.")
        return None
    if given:
        if args.semantic_classes is not None:
            files["semantic_classes"] = parse_classes(args.semantic_classes)
        register_own_dataset(args.dataset, **files)
    return args.dataset
