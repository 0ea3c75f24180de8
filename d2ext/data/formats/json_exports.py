"""JSON: Labelme and Label Studio."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from d2ext.data.formats.export import (
    FORMATS,
    Export,
    Points,
    ellipse,
    export_files,
    reading,
    rectangle,
)


@FORMATS.register()
def labelme(path: Path, export: Export) -> None:
    """Labelme: a JSON file for each image. Polygons of one ``group_id`` are one object."""
    for file in export_files(path, ".json"):
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8-sig"))
            size = (content["imageHeight"], content["imageWidth"])
            image = export.add_image(export.locate(content["imagePath"]), size)
            groups: dict[tuple[str, Any], list[Points]] = {}
            for number, shape in enumerate(content["shapes"]):
                kind, points = shape.get("shape_type", "polygon"), shape["points"]
                label, group = shape["label"], shape.get("group_id")
                if kind == "polygon":
                    key = (label, f"shape {number}" if group is None else group)
                    groups.setdefault(key, []).append(points)
                elif kind == "rectangle":
                    (x0, y0), (x1, y1) = np.min(points, axis=0), np.max(points, axis=0)
                    export.add(image, label, box=(x0, y0, x1 - x0, y1 - y0))
                elif kind == "circle":
                    radius = math.dist(points[0], points[1])
                    export.add(image, label, polygons=[ellipse(points[0], (radius, radius))])
                elif kind == "mask":
                    part = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
                    left, top = (round(v) for v in points[0])
                    mask = np.zeros((image["height"], image["width"]), np.uint8)
                    mask[top : top + part.shape[0], left : left + part.shape[1]] = part > 0
                    export.add(image, label, mask=mask)
                else:
                    export.left_out[kind] += 1
            for (label, _), polygons in groups.items():
                export.add(image, label, polygons=polygons)


@FORMATS.register()
def labelstudio(path: Path, export: Export) -> None:
    """Label Studio's JSON: a list of tasks; of several annotations of a task the first counts."""
    for file in export_files(path, ".json"):
        with reading(file):
            tasks = json.loads(file.read_text(encoding="utf-8-sig"))
            if not isinstance(tasks, list) or any("annotations" not in task for task in tasks):
                raise ValueError("not the export that Label Studio calls 'JSON'")
            for task in tasks:
                _add_task(export, task)


def _add_task(export: Export, task: dict[str, Any]) -> None:
    done = [a["result"] for a in task["annotations"] if not a.get("was_cancelled")]
    if not done:
        export.left_out["image without a finished annotation"] += 1
        return
    if done[1:]:
        export.left_out["further annotation of an image"] += len(done) - 1
    address = next(v for v in task["data"].values() if isinstance(v, str))
    if "image" in task["data"]:
        address = task["data"]["image"]
    split = urlsplit(address)
    name = parse_qs(split.query).get("d", [unquote(split.path)])[0]  # d: of local files
    _, _, plain = Path(name).name.partition("-")  # uploads are called <8 letters>-<name>
    sizes = [(r["original_height"], r["original_width"]) for r in done[0] if "original_width" in r]
    image = export.add_image(
        export.locate(name.lstrip("/"), plain or name), next(iter(sizes), None)
    )
    scale = np.array([image["width"], image["height"]]) / 100
    for result in done[0]:
        kind, value = result["type"], result["value"]
        label = next(iter(value.get(kind, ())), None)
        if kind == "rectanglelabels" and label:
            x, y = np.array([value["x"], value["y"]]) * scale
            w, h = np.array([value["width"], value["height"]]) * scale
            if degrees := value.get("rotation"):
                export.add(image, label, polygons=[rectangle((x, y, w, h), degrees, (x, y))])
            else:
                export.add(image, label, box=(x, y, w, h))
        elif kind == "polygonlabels" and label:
            export.add(image, label, polygons=[(np.array(value["points"]) * scale).tolist()])
        elif kind == "ellipselabels" and label:
            center = np.array([value["x"], value["y"]]) * scale
            radii = np.array([value["radiusX"], value["radiusY"]]) * scale
            corners = ellipse(tuple(center), tuple(radii), value.get("rotation", 0))
            export.add(image, label, polygons=[corners])
        elif kind == "brushlabels" and label:
            pixels = _brush(value["rle"]).reshape(image["height"], image["width"], 4)
            export.add(image, label, mask=pixels[:, :, 3] > 0)
        else:
            export.left_out[kind] += 1


def _brush(data: Sequence[int]) -> np.ndarray:
    """Unpack Label Studio's run lengths (of the package rle-pack): bytes of an RGBA picture, (n,).

    After the header (count, word length, four lengths of run lengths) come runs: a bit that says whether
    one word is repeated, two bits that choose the length of the run's length, that, and the words.
    """
    bits = "".join(f"{byte:08b}" for byte in data)
    at = 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    count, word = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    result = np.zeros(count, np.uint8)
    i = 0
    while i < count:
        repeated = take(1)
        end = i + 1 + take(lengths[take(2)])
        if repeated:
            result[i:end] = take(word)
        else:
            result[i:end] = [take(word) for _ in range(end - i)]
        i = end
    return result
