"""Exports of annotation tools, turned into COCO's form: YOLO, Pascal VOC, CVAT, Labelme, Label Studio.

The result is a file in the cache, which :mod:`d2ext.data.coco_json` reads as any other. What COCO's form
cannot say (lines, cuboids, tags, ...) is left out and counted in the log. The readers are ours, for
libraries lose what masks are made of: hotcoco CVAT's masks and the rotation of its boxes, globox all but
boxes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import yaml
from fvcore.common.registry import Registry
from pycocotools import mask as mask_util

from d2ext.data.cache import cache_folder
from d2ext.data.errors import DatasetError
from d2ext.data.image_io import upright_size
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

# Name of a form -> function (path of the export, Export) that fills the Export.
FORMATS: Registry = Registry("ANNOTATION_FORMAT")

Points = Sequence[Sequence[float]]
# Corners of the polygon that stands for an ellipse.
_ELLIPSE_CORNERS = 64
_MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    ET.ParseError,
    yaml.YAMLError,
)


def convert_to_coco(
    form: str, parts: Mapping[str, tuple[str, str]], name: str = "dataset"
) -> dict[str, str]:
    """Turn the parts of a data set into COCO files with the same categories.

    Args:
        form: a name in :data:`FORMATS`, of any case
        parts: "train", "val" → (file or folder of the export, folder of the images)
        name: of the data set; becomes part of the files' names

    Returns:
        "train", "val" → COCO file, in the cache

    Raises:
        DatasetError: unknown form, or a file that is not of this form; the message names it
    """
    known = sorted(key for key, _ in FORMATS)
    if form.lower() not in known:
        raise DatasetError(f"There is no annotation format '{form}'; known: {', '.join(known)}.")
    exports = {}
    for key, (path, images) in parts.items():
        for place in (path, images):
            if not Path(place).exists():
                raise DatasetError(f"There is no '{place}' ({key} part, format {form}).")
        exports[key] = Export(Path(images))
        with reading(path):
            FORMATS.get(form.lower())(Path(path), exports[key])
    used = sorted({a["label"] for export in exports.values() for a in export.annotations})
    listed = [label for export in exports.values() for label in export.labels]
    categories = {label: i for i, label in enumerate(dict.fromkeys([*listed, *used]), 1)}
    return {key: export.write(categories, f"{name}_{key}") for key, export in exports.items()}


@dataclass
class Export:
    """What was read of an export. ``labels``: names that it lists; ``keypoints``: further fields of the
    categories; ``left_out``: what COCO's form cannot say."""

    root: Path
    labels: list[str] = field(default_factory=list)
    keypoints: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    _files: dict[str, list[str]] = field(default_factory=dict)

    def locate(self, *names: str) -> str:
        """The image below ``root`` that a path in an export means: as it is, else by its last part.

        Args:
            names: the path, and further names that the file may have.
        """
        for name in names:
            if (self.root / name).is_file():
                return Path(name).as_posix()
        if not self._files:
            for file in self.root.rglob("*"):
                self._files.setdefault(file.name, []).append(file.relative_to(self.root).as_posix())
        for name in names:
            files = self._files.get(PureWindowsPath(name).name, [])
            if len(files) == 1:
                return files[0]
        return names[0]  # the reader of COCO files reports what is missing

    def add_image(self, name: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Add an image of ``size`` (height, width), by default what the file has."""
        height, width = size or upright_size(str(self.root / name))
        image = {"id": len(self.images) + 1, "file_name": name, "height": height, "width": width}
        self.images.append(image)
        return image

    def add(
        self,
        image: dict[str, Any],
        label: str,
        *,
        box: Sequence[float] | None = None,
        polygons: Sequence[Points] = (),
        mask: np.ndarray | None = None,
        **others: Any,
    ) -> None:
        """Add an object: a ``box`` (x, y, width, height), polygons or a ``mask`` (H, W), in pixels."""
        segmentation: Any = [
            [float(v) for point in p for v in point] for p in polygons if len(p) > 2
        ]
        if len(segmentation) < len(polygons):
            self.left_out["polygon of fewer than three points"] += len(polygons) - len(segmentation)
        height, width = image["height"], image["width"]
        entry = {"id": len(self.annotations) + 1, "image_id": image["id"], "label": label}
        entry |= {"iscrowd": 0, **others}
        if mask is not None:
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        elif segmentation:
            rle = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
        if segmentation:
            entry |= {"segmentation": segmentation, "area": float(mask_util.area(rle))}
            if mask is not None:
                box = mask_util.toBbox(rle).tolist()
            elif box is None:
                points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation])
                box = [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]
        if box is None:
            return
        entry["bbox"] = [float(v) for v in box]
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
        self.annotations.append(entry)

    def write(self, categories: Mapping[str, int], name: str) -> str:
        """Write the COCO file into the cache, under a name that its content decides."""
        if self.left_out:
            text = ", ".join(f"{count} x {what}" for what, count in self.left_out.most_common())
            logger.warning("'%s': left out of the annotations: %s.", name, text)
        entries = []
        for entry in self.annotations:
            entry = dict(entry)
            entry["category_id"] = categories[entry.pop("label")]
            entries.append(entry)
        classes = [{"id": i, "name": label, **self.keypoints} for label, i in categories.items()]
        text = json.dumps({"images": self.images, "annotations": entries, "categories": classes})
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = cache_folder("formats") / f"{name}-{digest}.json"
        if not path.is_file():
            with atomic_write(path, "w") as file:
                file.write(text)
        return str(path)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a malformed file raises becomes a DatasetError that names it."""
    try:
        yield
    except DatasetError:
        raise
    except _MALFORMED as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(f"'{path}' is not of the format that --format says: {what}.") from error


def export_files(path: Path, suffix: str) -> list[Path]:
    files = sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]
    if not files:
        raise DatasetError(f"There is no {suffix} file in '{path}'.")
    return files


def rectangle(box: Sequence[float], degrees: float, pivot: tuple[float, float]) -> Points:
    """Corners of a box (x, y, width, height) that is turned clockwise about a point."""
    x, y, w, h = box
    return _turn([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], degrees, pivot)


def ellipse(center: tuple[float, float], radii: tuple[float, float], degrees: float = 0) -> Points:
    angles = np.linspace(0, 2 * math.pi, _ELLIPSE_CORNERS, endpoint=False)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii + center
    return _turn(points.tolist(), degrees, center)


def _turn(points: Points, degrees: float, pivot: tuple[float, float]) -> Points:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    px, py = pivot
    return [(px + (x - px) * c - (y - py) * s, py + (x - px) * s + (y - py) * c) for x, y in points]
