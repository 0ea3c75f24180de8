"""Own landmark data from a program's command line or a YAML file.

::

    tools/train_net.py --config-file landmarks/hourglass_2stack_wflw_256.yaml --dataset faces \\
        --landmarks wflw --train-json list_train.txt --train-images WFLW_images/ \\
        --val-json list_test.txt --val-images WFLW_images/

    # faces.yaml; paths are relative to this file
    name: faces
    landmarks: wflw
    train: {json: list_train.txt, images: WFLW_images/}
    val: {json: list_test.txt, images: WFLW_images/}
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from d2ext.data.errors import DatasetError
from d2ext.data.landmarks.datasets import LANDMARK_DATASETS
from d2ext.data.landmarks.register import register_landmarks

__all__ = ["add_landmark_arguments", "register_landmark_arguments", "register_own_landmarks"]

_SPLITS = ("train", "val")


def add_landmark_arguments(group: Any) -> None:
    """Add ``--landmarks`` to an argument group."""
    group.add_argument(
        "--landmarks",
        metavar="KIND",
        help="the data are landmarks, in any form of this set: "
        f"{', '.join(LANDMARK_DATASETS)}, or custom (COCO-keypoint JSON with the points' names)",
    )


def register_own_landmarks(name: str, kind: str, **files: str | None) -> list[str]:
    """Register ``<name>_train`` and ``<name>_val`` by
    :func:`~d2ext.data.landmarks.register_landmarks`.

    Args:
        files: ``train_json``, ``train_images``, ``val_json``, ``val_images``; either part may be
            left out.

    Returns:
        the registered names.

    Raises:
        DatasetError: incomplete or unusable files, or parts with different landmarks.
    """
    found = {}
    for split in _SPLITS:
        annotations, images = files.get(f"{split}_json"), files.get(f"{split}_images")
        if (annotations is None) != (images is None):
            raise DatasetError(
                f"Landmark data '{name}' needs both the annotations and the image folder of its "
                f"{split} part; got {annotations!r} and {images!r}."
            )
        if annotations is not None and images is not None:
            found[f"{name}_{split}"] = register_landmarks(
                f"{name}_{split}", kind, annotations, images
            )
    if not found:
        raise DatasetError(f"Landmark data '{name}' need files: --train-json, --train-images, ...")
    if len({one.keypoints for one in found.values()}) > 1:
        raise DatasetError(f"The train and val parts of '{name}' have different landmarks.")
    return list(found)


def register_landmark_arguments(args: argparse.Namespace) -> str | None:
    """Register the landmark data that a command line names.

    Args:
        args: with ``landmarks``, ``dataset``, ``dataset_yaml`` and the files' arguments.

    Returns:
        the data set's name, or None if the command line names no landmark data.

    Raises:
        DatasetError: contradictory arguments or unusable data.
    """
    kind = getattr(args, "landmarks", None)
    if args.dataset_yaml is not None:
        content = _landmark_yaml(args.dataset_yaml)
        if content is None and kind is None:
            return None
        if content is None or kind is not None:
            raise DatasetError(
                "--landmarks goes with --dataset; a --dataset-yaml says 'landmarks: KIND' itself."
            )
        register_own_landmarks(**content)
        return str(content["name"])
    if kind is None:
        return None
    if args.dataset is None:
        raise DatasetError("--landmarks needs a name for the data: add --dataset NAME.")
    files = {
        f"{s}_{key}": getattr(args, f"{s}_{key}") for s in _SPLITS for key in ("json", "images")
    }
    register_own_landmarks(args.dataset, kind, **files)
    return str(args.dataset)


def _landmark_yaml(path: str) -> dict[str, str] | None:
    """Arguments of :func:`register_own_landmarks`, or None if the file is for other data.

    Files that cannot be read are left to the reader of other data, which says what is wrong.
    """
    try:
        with PathManager.open(path, "r", encoding="utf-8") as f:
            content = yaml.safe_load(f)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(content, dict) or "landmarks" not in content:
        return None
    unknown = sorted(set(map(str, content)) - {"name", "landmarks", *_SPLITS})
    parts = [content[s] for s in _SPLITS if s in content]
    whole = all(isinstance(p, dict) and set(p) == {"json", "images"} for p in parts)
    if unknown or not parts or not whole or not isinstance(content.get("name"), str):
        raise DatasetError(
            f"Landmark data file '{path}' is not understood. Expected: name: NAME, landmarks: KIND, "
            "train: {json: FILE, images: FOLDER}, val: likewise."
        )
    result = {"name": content["name"], "kind": str(content["landmarks"])}
    for split in _SPLITS:
        for key, value in content.get(split, {}).items():
            result[f"{split}_{key}"] = os.path.join(os.path.dirname(path), str(value))
    return result
