"""Writing `shapes` to disk, for tools that want files.

Single images come in the layout of COCO 2017::

    OUT/<split>2017/<12 digits>.jpg
    OUT/annotations/instances_<split>2017.json
    OUT/annotations/person_keypoints_<split>2017.json    (all things, as one class)
    OUT/annotations/panoptic_<split>2017.json
    OUT/panoptic_<split>2017/<12 digits>.png             (segment id = R + 256 G + 65536 B)
    OUT/panoptic_stuff_<split>2017/<12 digits>.png       (0 things, 1 and up stuff, 255 void)

Clips: :mod:`.export_video`. Detectron2's loaders read them as they are::

    register_coco_instances(NAME, shapes_metadata("instances"), JSON, IMAGES)
    register_coco_panoptic_separated(NAME, shapes_metadata("panoptic"), IMAGES, PANOPTIC,
                                     PANOPTIC_JSON, PANOPTIC_STUFF, INSTANCES_JSON)
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from d2ext.data.shapes.coco import (
    id_to_rgb,
    instances_json,
    keypoints_json,
    panoptic_json,
)
from d2ext.data.shapes.files import encode_png
from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.sets import ShapesSet

__all__ = ["check_free", "encode_jpeg", "export_images", "export_items", "publish"]

# JPEG quality at which neither thin lines nor textures visibly suffer.
_JPEG_QUALITY = 95

_Builder = Callable[[list[tuple[int, str, Frame]]], dict[str, Any]]


def encode_jpeg(image: np.ndarray) -> bytes:
    """JPEG of (H, W, 3) uint8 RGB."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()


def check_free(out: Path, targets: list[str], overwrite: bool) -> None:
    """FileExistsError if `out` is not a folder, or holds a target that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    taken = [target for target in targets if (out / target).exists()]
    if taken and not overwrite:
        raise FileExistsError(
            f"{out} already holds {', '.join(taken)}; pass --overwrite to replace them, "
            "or name another folder"
        )


def publish(temporary: Path, out: Path, targets: list[str]) -> None:
    """Move finished targets into `out`, replacing what stands there."""
    for target in targets:
        destination = out / target
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.is_dir():
            shutil.rmtree(destination)
        (temporary / target).replace(destination)


def _add(total: dict[str, dict[str, Any]], name: str, part: dict[str, Any]) -> None:
    """Append the images and annotations of one picture to those gathered for a file."""
    if name not in total:
        total[name] = part
    else:
        for key in ("images", "annotations"):
            total[name][key] += part[key]


def export_images(
    shapes: ShapesSet, out: Path, *, overwrite: bool = False, progress: bool = True
) -> list[str]:
    """Write single images with instances, keypoints and panoptic maps.

    The files are written beside their place and moved there when all are complete. Other splits in
    `out` stay.

    Returns:
        What was written, relative to `out`.

    Raises:
        FileExistsError: if something of this split is there and `overwrite` is not set.
    """
    year = f"{shapes.split}2017"
    folders = [year, f"panoptic_{year}", f"panoptic_stuff_{year}"]
    builders: dict[str, _Builder] = {
        f"annotations/instances_{year}.json": instances_json,
        f"annotations/person_keypoints_{year}.json": keypoints_json,
        f"annotations/panoptic_{year}.json": panoptic_json,
    }
    targets = folders + list(builders)
    check_free(out, targets, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=out) as name:
        temporary = Path(name)
        for folder in [*folders, "annotations"]:
            (temporary / folder).mkdir()
        annotations: dict[str, dict[str, Any]] = {}
        frames = tqdm(
            shapes.frames(), shapes.split, shapes.num_frames, unit="image", disable=not progress
        )
        for index, frame in enumerate(frames):
            stem = shapes.stem(index)
            (temporary / year / f"{stem}.jpg").write_bytes(encode_jpeg(frame.image))
            for folder, image in zip(
                folders[1:], (id_to_rgb(frame.panoptic), frame.sem_seg), strict=True
            ):
                (temporary / folder / f"{stem}.png").write_bytes(encode_png(image))
            for target, build in builders.items():
                _add(annotations, target, build([(index, f"{stem}.jpg", frame)]))
        for target, content in annotations.items():
            (temporary / target).write_text(json.dumps(content))
        publish(temporary, out, targets)
    return targets


def export_items(
    shapes: ShapesSet,
    out: Path,
    json_name: str,
    build_json: Callable[[Iterable[tuple[int, str, Any]]], dict[str, Any]],
    files: Mapping[str, Callable[[], bytes]],
    *,
    overwrite: bool,
    progress: bool,
) -> list[str]:
    """Write pictures and ``annotations/<json_name>_<split>2017.json``; else as :func:`export_images`.

    Args:
        build_json: (index, image's file name, picture) of all pictures → content of the JSON.
        files: name → content, of files beside it that are the same for all splits, and so replaced.
    """
    folder = f"{shapes.split}2017"
    json_file = f"annotations/{json_name}_{folder}.json"
    check_free(out, [folder, json_file], overwrite)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=out) as name:
        temporary = Path(name)
        for sub in (folder, "annotations"):
            (temporary / sub).mkdir()

        def written() -> Iterable[tuple[int, str, Frame]]:
            frames = tqdm(
                shapes.frames(), shapes.split, shapes.num, unit="image", disable=not progress
            )
            for index, frame in enumerate(frames):
                file_name = f"{shapes.stem(index)}.jpg"
                (temporary / folder / file_name).write_bytes(encode_jpeg(frame.image))
                yield index, file_name, frame

        (temporary / json_file).write_text(json.dumps(build_json(written())))
        targets = [folder, json_file]
        for file_name, content in files.items():
            targets.append(f"annotations/{file_name}")
            (temporary / targets[-1]).write_bytes(content())
        publish(temporary, out, targets)
    return targets
