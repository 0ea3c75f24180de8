"""Own data in COCO format: registered, checked and written into a config with one call each.

From Python::

    register_own_dataset("fruits", "train.json", "train/", "val.json", "val/")
    apply_dataset_to_config(cfg, "fruits")     # data sets fruits_train and fruits_val, class counts
    check_config_against_data(cfg)

A program takes the same from its command line by :func:`add_dataset_arguments` and
:func:`register_from_arguments`. As a file::

    # fruits.yaml; paths are relative to this file
    name: fruits
    train: {json: train.json, images: train/}
    val: {json: val.json, images: val/}
"""

import argparse
import logging
import os
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from d2ext.data.class_counts import check_config_against_data, set_class_counts
from d2ext.data.coco_json import CocoSummary, check_coco_json
from d2ext.data.dataset_dicts import shorten
from d2ext.data.errors import DatasetError
from d2ext.data.landmarks.own import add_landmark_arguments, register_landmark_arguments

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Split:
    """One part of a data set. Further kinds of ground truth (panoptic, semantic) become further
    fields here and further keys of the YAML form."""

    json: str
    images: str


# What register_own_dataset has registered, by name of the data set.
_registered: dict[str, dict[str, Split]] = {}


def register_own_dataset(
    name: str,
    train_json: str | None = None,
    train_images: str | None = None,
    val_json: str | None = None,
    val_images: str | None = None,
) -> list[str]:
    """Check COCO-format data and register it as ``<name>_train`` and ``<name>_val``.

    Either part may be left out. Registering the same again is harmless.

    Args:
        name: of the data set
        train_json, val_json: annotation files in COCO format
        train_images, val_images: folders of the images

    Returns:
        the registered names

    Raises:
        DatasetError: files that cannot be used, different classes in the two parts, or a name that
            is taken
    """
    splits = {}
    for split, json_file, images in (
        ("train", train_json, train_images),
        ("val", val_json, val_images),
    ):
        if (json_file is None) != (images is None):
            raise DatasetError(
                f"Data set '{name}' needs both the JSON file and the image folder of its {split} "
                f"part; got {json_file!r} and {images!r}."
            )
        if json_file is not None and images is not None:
            splits[split] = Split(json_file, images)
    if not name or not splits:
        raise DatasetError(
            f"Data set '{name}' needs a name and the JSON file and image folder of at least one "
            "part, train or val."
        )
    if _registered.get(name) != splits:
        names = [f"{name}_{split}" for split in splits]
        taken = [n for n in names if n in DatasetCatalog.list()]
        if taken:
            raise DatasetError(
                f"Data set '{taken[0]}' is already registered with other files. Choose another "
                f"name than '{name}'."
            )
        summaries = {key: check_coco_json(s.json, s.images) for key, s in splits.items()}
        _check_same_categories(name, summaries)
        for key, part in splits.items():
            metadata = _metadata(summaries[key])
            register_coco_instances(f"{name}_{key}", metadata, part.json, part.images)
            logger.info(
                f"Data set '{name}_{key}': {summaries[key].num_images} images, "
                f"{summaries[key].num_annotations} annotations, {len(summaries[key].classes)} "
                f"classes ({shorten(summaries[key].classes)})."
            )
        _registered[name] = splits
    return [f"{name}_{split}" for split in splits]


def load_dataset_yaml(path: str) -> dict[str, str]:
    """Read the YAML form of a data set (see the top of this file).

    Returns:
        arguments of :func:`register_own_dataset`; relative paths are resolved against the file's
        folder

    Raises:
        DatasetError: no such file, not YAML, or unknown or missing keys
    """
    try:
        with PathManager.open(path, "r", encoding="utf-8") as f:
            content = yaml.safe_load(f)
    except FileNotFoundError as e:
        raise DatasetError(f"Data set file '{path}' does not exist.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DatasetError(f"Data set file '{path}' is not valid YAML: {e}") from e
    example = "Expected: name: NAME, train: {json: FILE, images: FOLDER}, val: likewise."
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise DatasetError(f"Data set file '{path}' has no 'name'. {example}")
    _refuse_unknown_keys(path, content, ("name", *_SPLITS))
    result = {"name": content["name"]}
    for split in _SPLITS:
        if split not in content:
            continue
        part = content[split]
        if not isinstance(part, dict) or not {"json", "images"} <= set(part):
            raise DatasetError(f"Data set file '{path}': '{split}' is incomplete. {example}")
        _refuse_unknown_keys(path, part, ("json", "images"))
        for key in ("json", "images"):
            result[f"{split}_{key}"] = os.path.join(os.path.dirname(path), str(part[key]))
    return result


def apply_dataset_to_config(cfg: CfgNode, name: str) -> None:
    """Make a config train and evaluate on a registered data set, in place.

    Sets ``DATASETS.TRAIN`` and ``TEST`` to ``<name>_train`` and ``<name>_val`` (as far as they
    exist; built-in sets such as ``shapes`` or ``coco_2017`` work, too) and every class count.

    Raises:
        DatasetError: neither is registered
    """
    known = {split: f"{name}_{split}" in DatasetCatalog.list() for split in _SPLITS}
    if not any(known.values()):
        raise DatasetError(
            f"There is no data set '{name}': neither '{name}_train' nor '{name}_val' is "
            "registered. Give its files: --train-json, --train-images, --val-json, --val-images."
        )
    cfg.DATASETS.TRAIN = (f"{name}_train",) if known["train"] else ()
    cfg.DATASETS.TEST = (f"{name}_val",) if known["val"] else ()
    set_class_counts(cfg, f"{name}_train" if known["train"] else f"{name}_val")


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset`` and what belongs to it; see :func:`register_from_arguments`."""
    group = parser.add_argument_group(
        "own data", "COCO-format data to train and evaluate on instead of the config's data sets"
    )
    group.add_argument(
        "--dataset", metavar="NAME", help="name for the data below, or a known one such as 'shapes'"
    )
    group.add_argument("--train-json", metavar="FILE", help="annotations to train on")
    group.add_argument("--train-images", metavar="DIR", help="their images")
    group.add_argument("--val-json", metavar="FILE", help="annotations to evaluate on")
    group.add_argument("--val-images", metavar="DIR", help="their images")
    group.add_argument(
        "--dataset-yaml", metavar="FILE", help="a YAML file with all of this (name, train, val)"
    )
    add_landmark_arguments(group)


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
    files = {
        key: getattr(args, key) for key in ("train_json", "train_images", "val_json", "val_images")
    }
    given = [f"--{key.replace('_', '-')}" for key, value in files.items() if value is not None]
    landmarks = register_landmark_arguments(args)
    if landmarks is not None:
        return landmarks
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
        register_own_dataset(args.dataset, **files)
    return args.dataset


def _check_same_categories(name: str, summaries: dict[str, CocoSummary]) -> None:
    if len(summaries) < 2:
        return
    train, val = summaries["train"], summaries["val"]
    a = dict(zip(train.category_ids, train.classes, strict=True))
    b = dict(zip(val.category_ids, val.classes, strict=True))
    if a != b:
        differing = [
            f"id {i}: {a.get(i, 'none')} / {b.get(i, 'none')}"
            for i in sorted({*a, *b})
            if a.get(i) != b.get(i)
        ]
        raise DatasetError(
            f"The train and val parts of data set '{name}' have different 'categories' "
            f"({shorten(differing)}). Give both files the same list; classes without annotations "
            "are allowed."
        )


def _metadata(summary: CocoSummary) -> dict[str, Any]:
    """Detectron2's metadata; the same values that loading the file sets, known before."""
    metadata: dict[str, Any] = {
        "thing_classes": summary.classes,
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(summary.category_ids)},
    }
    names = summary.keypoint_names
    if names:
        metadata["keypoint_names"] = names
        metadata["keypoint_flip_map"] = [
            (n, n.replace("left", "right"))
            for n in names
            if "left" in n and n.replace("left", "right") in names
        ]
        metadata["keypoint_connection_rules"] = [
            (names[a], names[b], (102, 204, 255)) for a, b in summary.skeleton
        ]
    return metadata


def _refuse_unknown_keys(path: str, content: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(str(key) for key in set(content) - set(known))
    if unknown:
        raise DatasetError(
            f"Data set file '{path}' has unknown keys: {shorten(unknown)}. "
            f"Known: {', '.join(known)}."
        )


__all__ = [
    "add_dataset_arguments",
    "apply_dataset_to_config",
    "check_config_against_data",
    "load_dataset_yaml",
    "register_from_arguments",
    "register_own_dataset",
]
