"""Which files make up a data set of one's own, and the YAML file that names them.

::

    # fruits.yaml; paths are relative to this file
    name: fruits
    train: {json: train.json, images: train/}
    val: {json: val.json, images: val/}

    # cars.yaml; other formats than COCO's: yolo, voc, cvat, labelme, labelstudio
    name: cars
    format: yolo
    train: {json: cars/data.yaml, images: cars/images/train}

    # clips.yaml
    name: clips
    train: {video_json: instances.json, images: JPEGImages/}

    # faces.yaml
    name: faces
    landmarks: wflw
    train: {json: list_train.txt, images: WFLW_images/}

    # faces to detect, with five points: WIDER FACE's text, label.txt, or COCO-keypoint JSON
    name: crowd
    landmarks: faces
    train: {json: label.txt, images: images/}

    # persons.yaml; points on surfaces, in DensePose-COCO's form
    name: persons
    densepose: {mesh: body.npz, geodesics: distances.npy, uv_symmetry: mirror.npz}
    train: {json: train.json, images: train/}

    # streets.yaml
    name: streets
    train: {panoptic_json: train.json, panoptic_root: train_png/, images: train/}

    # fields.yaml
    name: fields
    classes: [soil, crop, weed]
    train: {sem_seg: train_labels/, images: train/}
"""

import os
from dataclasses import dataclass, fields
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from d2ext.data.densepose.register import SURFACE_FILES
from d2ext.data.errors import DatasetError, shorten

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Split:
    """Files of one part of a data set; which are given decides what it is for (:attr:`kind`).

    Attributes:
        images: folder of the images
        json: instances in COCO's form, or landmarks
        panoptic_json: COCO's panoptic form; instances and stuff maps are made of it unless given, too
        panoptic_root: folder of its PNGs; default: the JSON file's name without ``.json``
        sem_seg: folder of label maps
        video_json: videos in any form that :func:`~d2ext.data.video.register.read_videos` knows
    """

    images: str | None = None
    json: str | None = None
    panoptic_json: str | None = None
    panoptic_root: str | None = None
    sem_seg: str | None = None
    video_json: str | None = None

    @property
    def kind(self) -> str:
        """ "videos", "panoptic", "instances" or "semantic"; "none" without annotations."""
        if self.video_json is not None:
            return "videos"
        if self.panoptic_json is not None:
            return "panoptic"
        if self.json is not None:
            return "instances"
        return "none" if self.sem_seg is None else "semantic"


FILES = tuple(f.name for f in fields(Split))
_KEYS = ("name", "classes", "landmarks", "format", "densepose", *SPLITS)


def load_dataset_yaml(path: str) -> dict[str, Any]:
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
    _refuse_unknown_keys(path, content, _KEYS)
    result: dict[str, Any] = {"name": content["name"]}
    for split in SPLITS:
        if split not in content:
            continue
        part = content[split]
        if not isinstance(part, dict) or "images" not in part or len(part) < 2:
            raise DatasetError(f"Data set file '{path}': '{split}' is incomplete. {example}")
        _refuse_unknown_keys(path, part, FILES)
        for key, value in part.items():
            result[f"{split}_{key}"] = os.path.join(os.path.dirname(path), str(value))
    if "classes" in content:
        if not isinstance(content["classes"], list):
            raise DatasetError(f"Data set file '{path}': 'classes' is not a list of names.")
        result["semantic_classes"] = [str(c) for c in content["classes"]]
    if "densepose" in content:
        if not isinstance(content["densepose"], dict):
            raise DatasetError(f"Data set file '{path}': 'densepose' names no files. {example}")
        _refuse_unknown_keys(path, content["densepose"], SURFACE_FILES)
        for key, value in content["densepose"].items():
            result[f"densepose_{key}"] = os.path.join(os.path.dirname(path), str(value))
    for key in ("landmarks", "format"):
        if key in content:
            result[key] = str(content[key])
    return result


def _refuse_unknown_keys(path: str, content: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(str(key) for key in set(content) - set(known))
    if unknown:
        raise DatasetError(
            f"Data set file '{path}' has unknown keys: {shorten(unknown)}. "
            f"Known: {', '.join(known)}."
        )
