"""DensePose's fields of annotations in COCO's form (NOTES.md, *Semantics*), relative to the box.

``dp_x``, ``dp_y`` (P numbers, 0..256), and ``dp_I`` (0..24), ``dp_U``, ``dp_V`` (0..1), or ``dp_vertex``
and ``ref_model``, the name of the mesh, or all of them; ``dp_masks``: RLEs of 256 x 256 for each of the
14 coarse parts, empty for one that cannot be seen, or a single one of all of the foreground.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from d2ext.data.coco_schema import Entry, Field, Findings, place, run_lengths, text
from d2ext.data.densepose.annotations import FRAME
from d2ext.data.densepose.parts import NUM_COARSE_PARTS, NUM_PARTS

# Rounding errors beyond a limit that are repaired.
_ROUNDING = 1e-3

_PLACES, _CHARTS = ("dp_x", "dp_y"), ("dp_I", "dp_U", "dp_V")
DENSEPOSE_FIELDS = (*_PLACES, *_CHARTS, "dp_vertex", "ref_model", "dp_masks")


def _numbers(
    low: float, high: float, what: str, whole: bool = False
) -> Callable[[Any], list[Any] | None]:
    """A function that reads a list of numbers from ``low`` to ``high``; None: it is empty."""

    def read(value: Any) -> list[Any] | None:
        numbers = None
        if isinstance(value, list):
            try:
                numbers = np.array(value)
            except ValueError:  # ragged
                numbers = None
        if numbers is None or numbers.ndim != 1 or (len(value) and numbers.dtype.kind not in "if"):
            raise ValueError(f"a list of {what}")
        if not len(value):
            return None
        rounding = 0 if whole else _ROUNDING
        # Written so that NaN is no such number.
        if not ((numbers >= low - rounding) & (numbers <= high + rounding)).all() or (
            whole and (numbers != numbers.astype(np.int64)).any()
        ):
            raise ValueError(f"a list of {what}")
        if whole:
            return numbers.astype(np.int64).tolist()
        clipped = numbers.clip(low, high)
        return value if (clipped == numbers).all() else clipped.tolist()

    return read


def part_masks(value: Any) -> list[Entry | None] | None:
    """14 RLEs, or one; None among them: the part cannot be seen. None: none has pixels."""
    masks = [value] if isinstance(value, dict) else value
    if not isinstance(masks, list) or len(masks) not in (0, 1, NUM_COARSE_PARTS):
        raise ValueError(
            f"a list of {NUM_COARSE_PARTS} RLEs, one for each coarse part (empty: it cannot be seen), "
            "or of one for all of the person"
        )
    result: list[Entry | None] = []
    for mask in masks:
        if mask in ([], {}, None):
            result.append(None)
            continue
        runs = run_lengths(mask.get("counts")) if isinstance(mask, dict) else None
        if runs is None or (runs < 0).any() or runs.sum() != FRAME * FRAME:
            raise ValueError(f"RLEs of {FRAME} x {FRAME} pixels, the frame of the box")
        if mask.get("size", [FRAME, FRAME]) != [FRAME, FRAME]:
            raise ValueError(f"RLEs whose 'size' is [{FRAME}, {FRAME}], the frame of the box")
        mask = {**mask, "size": [FRAME, FRAME]}
        result.append(mask if runs[1::2].any() else None)
    if not any(result):
        return None
    # An empty entry in the form of the file is no repair.
    return [given if mask is None else mask for given, mask in zip(masks, result, strict=True)]


_POSITIONS = _numbers(0, FRAME, f"numbers from 0 to {FRAME}, in the frame of the box")
_COORDINATES = _numbers(0, 1, "numbers from 0 to 1")
DENSEPOSE = {
    "dp_x": Field(_POSITIONS),
    "dp_y": Field(_POSITIONS),
    "dp_I": Field(_numbers(0, NUM_PARTS, f"parts from 0 (background) to {NUM_PARTS}", whole=True)),
    "dp_U": Field(_COORDINATES),
    "dp_V": Field(_COORDINATES),
    "dp_vertex": Field(_numbers(-1, 2**31, "vertices, counted from 0", whole=True)),
    "ref_model": Field(text),
    "dp_masks": Field(part_masks),
}


def check_points(annotations: list[Entry], findings: Findings) -> None:
    """Note what does not fit together; take away what says nothing without points, in place."""
    for annotation in annotations:
        given = [key for key in DENSEPOSE_FIELDS if key in annotation]
        lists = {key: len(annotation[key]) for key in given if key not in ("ref_model", "dp_masks")}
        if not lists:
            for key in given:
                del annotation[key]
            continue
        shown = place(annotation, ", ".join(f"{n} {key}" for key, n in lists.items()))
        if not all(key in lists for key in _PLACES):
            findings.problem("annotations have points on a surface without dp_x and dp_y", shown)
        elif len(set(lists.values())) > 1:
            findings.problem("annotations have dp_ lists of different lengths", shown)
        elif 0 < sum(key in lists for key in _CHARTS) < len(_CHARTS):
            findings.problem("annotations have some of dp_I, dp_U and dp_V, not all", shown)
        elif "dp_I" not in lists and "dp_vertex" not in lists:
            findings.problem(
                "annotations have dp_x and dp_y without dp_I, dp_U, dp_V or dp_vertex", shown
            )
        if "dp_vertex" in lists and "ref_model" not in annotation:
            findings.problem(
                "annotations have a dp_vertex without ref_model, the name of its mesh", shown
            )
        if annotation.get("bbox") is None:
            findings.problem("annotations have points on a surface, but no box around them", shown)


def compact(annotation: Entry) -> Entry:
    """The fields of a record: lists of numbers as arrays, which take a tenth of the memory."""
    result: Entry = {}
    for key in DENSEPOSE_FIELDS:
        if key in annotation:
            value = annotation[key]
            if key in ("dp_I", "dp_vertex"):
                value = np.array(value, np.int64)
            elif key not in ("ref_model", "dp_masks"):
                value = np.array(value, np.float32)
            result[key] = value
    return result


def coarse_parts(rles: Sequence[Any] | None) -> np.ndarray | None:
    """(256, 256) uint8 of ``dp_masks``: later parts cover earlier ones; None: no mask."""
    if not rles or not any(rles):
        return None
    result = np.zeros((FRAME, FRAME), np.uint8, order="F")  # as masks are decoded
    for part, rle in enumerate(rles, 1):
        if rle:
            if isinstance(rle["counts"], list):
                rle = mask_util.frPyObjects(rle, FRAME, FRAME)
            # The larger number is the later part. Ten times as fast as by a mask.
            np.maximum(result, mask_util.decode(rle) * np.uint8(part), out=result)
    return result
