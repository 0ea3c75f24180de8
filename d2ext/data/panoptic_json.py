"""Checking files in COCO's panoptic form before anything depends on them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from detectron2.utils.file_io import PathManager

from d2ext.data.coco_json import Entry, check_image_files, raise_problems
from d2ext.data.coco_schema import Findings, Id, check_ids
from d2ext.data.errors import shorten
from d2ext.data.panoptic import MAX_CLASSES, read_panoptic_json


@dataclass(frozen=True)
class PanopticSummary:
    """What is in a panoptic JSON file.

    Attributes:
        things, stuff: category id → name, ascending ids, which is the order of contiguous ids
        colors: category id → (R, G, B), of those categories that have one
        images: image id → the file's entry, of images that have an annotation
        annotations: image id → the file's entry
        left_out: images without annotation
    """

    things: dict[Id, str]
    stuff: dict[Id, str]
    colors: dict[Id, tuple[int, int, int]]
    images: dict[Any, Entry]
    annotations: dict[Any, Entry]
    left_out: list[Any]

    @classmethod
    def of(
        cls, categories: Iterable[Entry], images: Iterable[Entry], annotations: Iterable[Entry]
    ) -> "PanopticSummary":
        """Of the lists of a file."""
        annotated = {a["image_id"]: a for a in annotations}
        categories = sorted(categories, key=lambda c: c["id"])
        images = list(images)
        return cls(
            things={c["id"]: c["name"] for c in categories if c["isthing"]},
            stuff={c["id"]: c["name"] for c in categories if not c["isthing"]},
            colors={c["id"]: tuple(c["color"]) for c in categories if c.get("color")},
            images={i["id"]: i for i in images if i["id"] in annotated},
            annotations=annotated,
            left_out=[i["id"] for i in images if i["id"] not in annotated],
        )

    @property
    def num_segments(self) -> int:
        """Of all images."""
        return sum(len(a["segments_info"]) for a in self.annotations.values())

    def metadata(self) -> dict[str, Any]:
        """Class names, ids and colours of Detectron2's separated form."""
        # 0 stands for all things, unless a category has that id.
        used = {*self.things, *self.stuff}
        all_things = 0 if 0 not in used else -1
        metadata: dict[str, Any] = {
            "thing_classes": list(self.things.values()),
            "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(self.things)},
            "stuff_classes": ["things", *self.stuff.values()],
            "stuff_dataset_id_to_contiguous_id": {
                all_things: 0,
                **{c: i + 1 for i, c in enumerate(self.stuff)},
            },
        }
        if used <= set(self.colors):
            metadata["thing_colors"] = [self.colors[c] for c in self.things]
            metadata["stuff_colors"] = [(82, 18, 128), *(self.colors[c] for c in self.stuff)]
        return metadata


def check_panoptic_json(json_file: str, panoptic_root: str, image_root: str) -> PanopticSummary:
    """Read a panoptic JSON file and check that it is consistent and its files exist.

    The contents of the PNGs are not looked at: :mod:`d2ext.data.panoptic_to_detection` reads them.

    Args:
        json_file: with ``images``, ``annotations`` and ``categories``
        panoptic_root: folder of the PNGs
        image_root: folder that ``file_name`` of an image is relative to

    Raises:
        DatasetError: all problems in one message, with the first few examples of each
    """
    return check_panoptic_content(
        json_file, read_panoptic_json(json_file), panoptic_root, image_root
    )


def check_panoptic_content(
    json_file: str, content: Entry, panoptic_root: str, image_root: str
) -> PanopticSummary:
    """:func:`check_panoptic_json` of what :func:`read_panoptic_json` gives, or the like."""
    images, annotations, categories = (
        content[key] for key in ("images", "annotations", "categories")
    )
    problems = [*_check_categories(categories)] or [
        *check_image_files(images, image_root),
        *_check_pngs(annotations, panoptic_root),
    ]
    raise_problems(json_file, "a panoptic data set", problems)
    return PanopticSummary.of(categories, images, annotations)


def _check_categories(categories: list[Entry]) -> Iterable[str]:
    if len(categories) > MAX_CLASSES:
        yield f"there are {len(categories)} categories; label maps hold at most {MAX_CLASSES}"
    findings = Findings()
    for isthing, kind in ((1, "things"), (0, "stuff")):
        of_kind = [c for c in categories if c["isthing"] == isthing]
        check_ids(of_kind, kind, findings, "name")
        if not of_kind:
            yield (
                "no category is a thing ('isthing': 1). Data without things are semantic: give label "
                "maps by --train-sem-seg and --val-sem-seg instead"
                if isthing
                else "no category is stuff ('isthing': 0). Data without stuff are instances: give them "
                "by --train-json and --val-json instead, or add a category for the background"
            )
    yield from findings.lines()


def _check_pngs(annotations: list[Entry], root: str) -> list[str]:
    """All of them must be there: evaluation stops at the first one that is missing."""
    if not PathManager.isdir(root):
        return [f"the folder of panoptic PNGs '{root}' does not exist"]
    there = set(PathManager.ls(root))
    missing = [
        a["file_name"]
        for a in annotations
        if a["file_name"] not in there
        and not PathManager.isfile(os.path.join(root, a["file_name"]))
    ]
    if not missing:
        return []
    return [f"{len(missing)} of {len(annotations)} PNGs are not in '{root}': {shorten(missing)}"]
