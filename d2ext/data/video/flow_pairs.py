"""Pairs of frames with optical flow in FlyingChairs' form (arXiv 1504.06852):
``NNNNN_img1.ppm``, ``NNNNN_img2.ppm``, ``NNNNN_flow.flo``; the flow goes from the first image to the
second."""

import os
from typing import Any

from detectron2.utils.file_io import PathManager

from d2ext.data.coco_json import read_text
from d2ext.data.errors import DatasetError, shorten

# Without a split file, every so many-th pair is for validation: 635 of 22,872, as many as the published
# split has (640).
_EVERY = 36


def flow_pairs(
    folder: str, split: str | None = None, split_file: str | None = None
) -> list[dict[str, Any]]:
    """The pairs in a folder, by number.

    Args:
        folder: with three files a pair; images of any kind
        split: ``"train"``, ``"val"`` or None for all
        split_file: a line for each pair, in order: 1 train, 2 val; None or no such file: every 36th
            pair is for validation

    Returns:
        dicts with ``file_name``, ``image_id``, ``reference`` (``file_name`` of the second image) and
        ``flow_file_name``

    Raises:
        DatasetError: no pairs, incomplete ones, or a split file of another length
    """
    names = sorted(PathManager.ls(folder)) if PathManager.isdir(folder) else []
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        number, _, part = os.path.splitext(name)[0].rpartition("_")
        if part in ("img1", "img2", "flow"):
            parts.setdefault(number, {})[part] = os.path.join(folder, name)
    if not parts:
        raise DatasetError(
            f"There are no pairs in '{folder}': expected NNNNN_img1.ppm, NNNNN_img2.ppm and "
            "NNNNN_flow.flo."
        )
    incomplete = [number for number, files in parts.items() if len(files) < 3]
    if incomplete:
        raise DatasetError(
            f"{len(incomplete)} of {len(parts)} pairs in '{folder}' lack a file: {shorten(incomplete)}."
        )
    splits = _splits(len(parts), split_file)
    return [
        {
            "file_name": files["img1"],
            "image_id": i,
            "reference": {"file_name": files["img2"]},
            "flow_file_name": files["flow"],
        }
        for i, (files, own) in enumerate(zip(parts.values(), splits, strict=True))
        if split in (None, own)
    ]


def _splits(count: int, split_file: str | None) -> list[str]:
    """Which split each pair belongs to."""
    if split_file is None or not PathManager.isfile(split_file):
        return ["val" if i % _EVERY == _EVERY - 1 else "train" for i in range(count)]
    words = read_text(split_file).split()
    if len(words) != count or not set(words) <= {"1", "2"}:
        raise DatasetError(
            f"'{split_file}' must have a line for each of {count} pairs, 1 (train) or 2 (val); it has "
            f"{len(words)}."
        )
    return ["train" if word == "1" else "val" for word in words]
