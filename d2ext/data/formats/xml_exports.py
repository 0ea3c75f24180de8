"""XML: Pascal VOC and CVAT."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2ext.data.errors import DatasetError
from d2ext.data.formats.export import FORMATS, Export, ellipse, export_files, reading, rectangle


@FORMATS.register()
def voc(path: Path, export: Export) -> None:
    """Pascal VOC: a folder of XML files; or a list of them (``ImageSets/Main/train.txt``).

    Corners count from 1 and belong to the box. Objects marked "difficult" count neither way in
    evaluation, as in VOC's own: they become crowds.
    """
    if path.suffix == ".txt":
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        folder = path.resolve().parents[2] / "Annotations"
        files = [folder / f"{line[0]}.xml" for line in words if line]
    else:
        files = export_files(
            path / "Annotations" if (path / "Annotations").is_dir() else path, ".xml"
        )
    for file in files:
        with reading(file):
            root = ET.parse(file).getroot()
            name = root.findtext("filename") or file.stem
            stems = [f"{file.stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
            height, width = (int(root.findtext(f"size/{k}") or 0) for k in ("height", "width"))
            size = (height, width) if height > 0 and width > 0 else None
            image = export.add_image(export.locate(name, *stems), size)
            for entry in root.iter("object"):
                box = entry.find("bndbox")
                label = entry.findtext("name")
                if box is None or not label:
                    raise ValueError("an object has no name or bndbox")
                edges = (float(box.findtext(k) or "") for k in ("xmin", "ymin", "xmax", "ymax"))
                x, y, right, bottom = edges
                x, y = max(x - 1, 0), max(y - 1, 0)
                crowd = int(entry.findtext("difficult") == "1")
                export.add(image, label.strip(), box=(x, y, right - x, bottom - y), iscrowd=crowd)


@FORMATS.register()
def cvat(path: Path, export: Export) -> None:
    """CVAT's XML "for images"; or its COCO file, which marks masks as crowds that are none."""
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        export.images = content["images"]
        classes = {c["id"]: c for c in content["categories"]}
        export.labels = [c["name"] for _, c in sorted(classes.items())]
        keys = ("keypoints", "skeleton")
        export.keypoints = next(
            ({k: c[k] for k in keys if k in c} for c in classes.values() if c.get("keypoints")), {}
        )
        for entry in content["annotations"]:
            own = {"label": classes[entry.pop("category_id")]["name"], "iscrowd": 0}
            export.annotations.append(entry | own)
        return
    root = ET.parse(path).getroot()
    if root.find("track") is not None:
        raise DatasetError(
            f"'{path}' is of a video: export it from CVAT as 'CVAT for images' or, "
            "with its tracks, as 'COCO' for --train-video-json and --val-video-json."
        )
    for label in root.iter("label"):
        if (name := label.findtext("name")) and label.find("parent") is None:
            export.labels.append(name)
    for entry in root.iter("image"):
        size = (int(entry.attrib["height"]), int(entry.attrib["width"]))
        image = export.add_image(export.locate(entry.attrib["name"]), size)
        for shape in entry:
            _add_cvat(export, image, shape.tag, shape.attrib)


def _add_cvat(export: Export, image: dict[str, Any], kind: str, shape: Mapping[str, str]) -> None:
    def numbers(*keys: str) -> list[float]:
        return [float(shape[key]) for key in keys]

    if kind == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        box = (left, top, right - left, bottom - top)
        if degrees := float(shape.get("rotation", 0)):
            corners = rectangle(box, degrees, ((left + right) / 2, (top + bottom) / 2))
            export.add(image, shape["label"], polygons=[corners])
        else:
            export.add(image, shape["label"], box=box)
    elif kind == "polygon":
        points = [[float(v) for v in p.split(",")] for p in shape["points"].split(";")]
        export.add(image, shape["label"], polygons=[points])
    elif kind == "ellipse":
        cx, cy, rx, ry = numbers("cx", "cy", "rx", "ry")
        turn = float(shape.get("rotation", 0))
        export.add(image, shape["label"], polygons=[ellipse((cx, cy), (rx, ry), turn)])
    elif kind == "mask":
        left, top, width, height = (int(v) for v in numbers("left", "top", "width", "height"))
        runs = [int(v) for v in shape["rle"].split(",")]  # of 0, 1, 0, ..., row by row
        values = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        mask[top : top + height, left : left + width] = values
        export.add(image, shape["label"], mask=mask)
    else:
        export.left_out[kind] += 1
