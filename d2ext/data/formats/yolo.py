"""YOLO: text files with fractions of the image's size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from d2ext.data.errors import DatasetError
from d2ext.data.formats.export import FORMATS, Export, reading
from d2ext.data.image_io import is_image


@FORMATS.register()
def yolo(path: Path, export: Export) -> None:
    """YOLO: a text file for each image, with fractions of its size: boxes, polygons or poses.

    Names come from the ``data.yaml`` (``path``, or in the folder or beside it), ``classes.txt`` or
    ``obj.names``. The text files lie in ``labels`` where images lie in ``images``, below ``path``, or
    beside the images. An image without a text file has no objects.
    """
    facts = _yolo_facts(path, export.root)
    names = facts["names"]
    export.labels = list(names.values())
    shape = facts.get("kpt_shape")
    if shape:
        points = facts.get("kpt_names") or [f"point_{i + 1}" for i in range(shape[0])]
        export.keypoints = {"keypoints": points[0] if isinstance(points, dict) else points}
        export.keypoints["skeleton"] = []
        if flip := facts.get("flip_idx"):
            export.keypoints["flip_pairs"] = [[i, j] for i, j in enumerate(flip) if i < j]
    folder = path.parent if path.is_file() else path
    labelled = 0
    for file in sorted(f for f in export.root.rglob("*") if f.is_file() and is_image(str(f))):
        name = file.relative_to(export.root)
        text = next((t for t in _yolo_labels(file, name, folder) if t.is_file()), None)
        with reading(file):
            image = export.add_image(name.as_posix())
        if text is None:
            continue
        labelled += 1
        with reading(text):
            for number, line in enumerate(text.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    _add_yolo(export, image, line, names, shape, f"'{text}', line {number}")
    if not labelled:
        raise DatasetError(
            f"None of the {len(export.images)} images in '{export.root}' has a text file of labels: "
            f"'{folder}' must be the folder that has them, or its data.yaml."
        )


def _yolo_facts(path: Path, images: Path) -> dict[str, Any]:
    """The content of ``data.yaml``, at least ``names``: number → name."""
    folders = [] if path.is_file() else [path, path.parent, images, images.parent]
    patterns = ("*.yaml", "*.yml", "classes.txt", "obj.names", "_darknet.labels")
    files = [f for folder in folders for pattern in patterns for f in sorted(folder.glob(pattern))]
    for file in [path] if path.is_file() else files:
        content = file.read_text(encoding="utf-8-sig")
        facts = {"names": [x.strip() for x in content.splitlines() if x.strip()]}
        if file.suffix in (".yaml", ".yml"):
            facts = yaml.safe_load(content)
        if isinstance(facts, dict) and facts.get("names"):
            names = facts["names"]
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            return facts | {"names": {int(i): str(label) for i, label in pairs}}
    raise DatasetError(
        f"'{path}' has no names of classes: name the data.yaml, or put a classes.txt there."
    )


def _yolo_labels(file: Path, name: Path, folder: Path) -> Iterable[Path]:
    """Where the text file of an image may lie."""
    before, separator, after = file.resolve().as_posix().rpartition("/images/")
    mirrored = [Path(f"{before}/labels/{after}")] if separator else []
    places = [*mirrored, folder / name, folder / "labels" / name, folder / name.name, file]
    return (place.with_suffix(".txt") for place in places)


def _add_yolo(
    export: Export,
    image: dict[str, Any],
    line: str,
    names: Mapping[int, str],
    shape: Sequence[int] | None,
    where: str,
) -> None:
    number, *values = (float(word) for word in line.split())
    if number not in names:
        raise DatasetError(f"{where}: class {number:g} is none of the {len(names)} names.")
    if values and not -0.1 <= min(values[:4]) <= max(values[:4]) <= 1.1:
        raise DatasetError(f"{where}: coordinates must be fractions of the image's size, in 0..1.")
    scale = np.array([image["width"], image["height"]])
    label = names[int(number)]
    x, y, w, h = (np.reshape(values[:4], (2, 2)) * scale).ravel() if len(values) >= 4 else [0] * 4
    box = (x - w / 2, y - h / 2, w, h)
    if len(values) == 4:
        export.add(image, label, box=box)
    elif shape and len(values) == 4 + shape[0] * shape[1]:
        points = np.reshape(values[4:], shape)
        seen = points[:, 2] if shape[1] == 3 else 2.0 * points.any(axis=1)
        triples = np.column_stack([points[:, :2] * scale, seen])
        others = {"keypoints": triples.ravel().tolist(), "num_keypoints": int((seen > 0).sum())}
        export.add(image, label, box=box, **others)
    elif len(values) >= 6 and len(values) % 2 == 0:
        export.add(image, label, polygons=[(np.reshape(values, (-1, 2)) * scale).tolist()])
    else:
        raise DatasetError(
            f"{where}: {len(values)} numbers after the class; expected 4 of a box, an even number "
            "from 6 on of a polygon, or those of a pose as kpt_shape in data.yaml says."
        )
