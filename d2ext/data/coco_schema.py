"""What the fields of files in COCO's form may hold: one table, read by :func:`normalize`.

Every field that anything reads later is listed in :data:`INSTANCES`, :data:`LANDMARKS` or
:data:`PANOPTIC` with the function that reads it. Such a function returns the value in the one form that
the rest of the house expects, or raises ``ValueError`` with what the value should be. A value in another
form that has only one meaning (160.0 for 160, "0" for 0, ``[x, y, ...]`` for ``[[x, y, ...]]``) is
repaired and counted; null is the same as nothing. Fields that are not listed stay as they are.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2ext.data.errors import shorten

Entry = dict[str, Any]
Id = int | str

# Sides of images and coordinates in pixels: beyond these, pycocotools runs out of memory.
_MAX_SIDE = 100_000
_MAX_COORDINATE = 1_000_000
_MAX_ID = 2**53


@dataclass(frozen=True)
class Field:
    """How a field is read, and whether an entry must have it."""

    read: Callable[[Any], Any]
    required: bool = False


@dataclass
class Findings:
    """What reading a file brought up.

    Attributes:
        repairs: what was repaired → how often
        left_out: why annotations are left out → their ids
        problems: what no repair can mend → places
    """

    repairs: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[Id]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, text: str, place: str) -> None:
        """Note a place where something is wrong."""
        self.problems.setdefault(text, []).append(place)

    def add(self, other: "Findings", of: str) -> None:
        """Take over the repairs and problems of a part of the file, ``of`` naming it."""
        self.repairs.update(other.repairs)
        for text, places in other.problems.items():
            self.problems.setdefault(text, []).extend(f"{place} of {of}" for place in places)

    def lines(self) -> list[str]:
        """The problems, each with the first places."""
        return [
            f"{len(places)} {text}: {shorten(places)}" for text, places in self.problems.items()
        ]


def integer(value: Any) -> int:
    """A whole number: 160.0 and "160" are 160."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,15}(\.0*)?\s*", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MAX_ID:
        raise ValueError("a whole number")
    return value


def identifier(value: Any) -> Id:
    """A whole number or a text."""
    if isinstance(value, str) and value.strip():
        return value
    try:
        return integer(value)
    except ValueError:
        raise ValueError("a number or a text") from None


def text(value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return value


def name(value: Any) -> str:
    """A text, or a number as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return text(value)


def side(value: Any) -> int:
    """Height or width of an image."""
    try:
        result = integer(value)
    except ValueError:
        result = 0
    if not 0 < result <= _MAX_SIDE:
        raise ValueError("the size of the image in pixels")
    return result


def flag(value: Any) -> int:
    """0 or 1."""
    try:
        result = integer(int(value) if isinstance(value, bool) else value)
    except ValueError:
        result = -1
    if result not in (0, 1):
        raise ValueError("0 or 1")
    return result


def segment_id(value: Any) -> int:
    """The id of a panoptic segment: three bytes, 0 is void."""
    result = integer(value)
    if not 0 < result < 256**3:
        raise ValueError(f"a number from 1 to {256**3 - 1}")
    return result


def area(value: Any) -> float | None:
    """A number of pixels; None: to be computed."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    known = not isinstance(value, bool) and math.isfinite(number) and number >= 0
    return (value if isinstance(value, int | float) else number) if known else None


def share(value: Any) -> float | None:
    """A number from 0 to 1; None: not known."""
    number = area(value)
    return number if number is not None and number <= 1 else None


def box(value: Any) -> list[float] | None:
    """x, y, width, height in pixels; None: without width or height, or not finite."""
    numbers = _array(value)
    if numbers is None or numbers.shape != (4,):
        raise ValueError("four numbers (x, y, width, height)")
    # Written so that NaN is no box.
    if not (numbers[2] > 0 and numbers[3] > 0 and (abs(numbers) <= _MAX_COORDINATE).all()):
        return None
    return _as_list(value, numbers)


def segmentation(value: Any) -> Any:
    """Polygons ``[[x, y, ...], ...]`` or an RLE; None: there is none.

    ``[x, y, ...]`` and ``[[x, y], ...]`` are one polygon.
    """
    if isinstance(value, dict) and value:
        return _rle(value)
    if not isinstance(value, list | dict):
        raise ValueError(_POLYGONS)
    if not value:
        return None
    if not isinstance(value[0], list):
        return [_polygon(value)]
    if all(isinstance(p, list) and len(p) == 2 for p in value) and _array(value) is not None:
        return [_polygon(value)]
    return [_polygon(p) for p in value]


_POLYGONS = "polygons [[x, y, ...], ...] of finite numbers, or an RLE"


def _polygon(value: Any) -> list[float]:
    points = _array(value)
    if points is None or (points.ndim == 2 and points.shape[1] != 2) or points.ndim > 2:
        if value == []:
            return []
        raise ValueError(_POLYGONS)
    if not (abs(points) <= _MAX_COORDINATE).all():
        raise ValueError(_POLYGONS)
    return _as_list(value, points)


def _rle(value: Entry) -> Entry:
    counts, size = value.get("counts"), value.get("size")
    runs = run_lengths(counts)
    if runs is None or (runs < 0).any():
        raise ValueError("an RLE whose 'counts' are run lengths")
    if isinstance(counts, list):
        counts = counts if all(type(c) is int for c in counts) else runs.tolist()
    result = {**value, "counts": counts}
    if size is not None:
        if not isinstance(size, list) or len(size) != 2:
            raise ValueError("an RLE whose 'size' is [height, width]")
        result["size"] = [side(v) for v in size]
    return result


def run_lengths(counts: Any) -> np.ndarray | None:
    """(R,) int64 run lengths of an RLE's ``counts``, zeros first; None: they are no such thing.

    Compressed counts are LEB128-like: five bits in each character from "0" on, the sixth says that more
    follow; from the third run on, the difference to the last but one (pycocotools' ``rleFrString``).
    """
    if isinstance(counts, list):
        numbers = _array(counts)
        if numbers is None or numbers.ndim != 1 or not (abs(numbers) < _MAX_ID).all():
            return None
        runs = numbers.astype(np.int64)
        return runs if (runs == numbers).all() else None
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode()
    if not isinstance(counts, bytes) or not counts:
        return None
    chars = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((chars & 32) == 0)
    if chars.min() < 0 or chars.max() > 63 or not len(ends) or ends[-1] != len(chars) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 8:
        return None
    shifts = 5 * (np.arange(len(chars)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((chars & 31) << shifts, starts)
    runs -= ((chars[ends] & 16) > 0).astype(np.int64) << (shifts[ends] + 5)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def keypoints(value: Any) -> list[float] | None:
    """Flat x, y, v, ...; points whose place is no number are not labelled; None: there are none."""
    what = (
        "three numbers for each keypoint: x, y, and v = 0 (not labelled), 1 (hidden) or 2 (visible)"
    )
    if not isinstance(value, list):
        raise ValueError(what)
    nested = bool(value) and all(isinstance(p, list) for p in value)
    flat = [v for p in value for v in p] if nested else value
    if any(isinstance(v, str) for v in flat):
        numbers = _array(flat)
        flat = flat if numbers is None else numbers.tolist()
    if len(flat) % 3 or not all(v is None or _is_number(v) for v in flat):
        raise ValueError(what)
    result = list(flat)
    for i in range(0, len(flat), 3):
        x, y, v = flat[i : i + 3]
        if v not in (0, 1, 2) and not (v is None or math.isnan(v)):
            raise ValueError(what)
        # Written so that NaN is no coordinate.
        known = all(c is not None and abs(c) <= _MAX_COORDINATE for c in (x, y))
        if v in (1, 2) and not known and not any(c is None or c != c for c in (x, y)):
            raise ValueError(what)
        if not known or v not in (0, 1, 2):
            result[i : i + 3] = [0, 0, 0]
        elif type(v) is not int:
            result[i + 2] = int(v)
    return result or None


def names(value: Any) -> list[str]:
    """Names, each once."""
    if not isinstance(value, list):
        raise ValueError("a list of names")
    result = [name(v) for v in value]
    if len(set(result)) != len(result):
        raise ValueError("a list of different names")
    return result


def pairs(value: Any) -> list[list[int]]:
    """Pairs of indices."""
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        raise ValueError("a list of pairs")
    return [[integer(i) for i in p] for p in value]


def sigmas(value: Any) -> list[float]:
    """Positive numbers."""
    numbers = _array(value) if value != [] else np.zeros(0)
    if numbers is None or numbers.ndim != 1 or not (numbers > 0).all() or np.isinf(numbers).any():
        raise ValueError("a list of positive numbers")
    return _as_list(value, numbers)


def color(value: Any) -> list[int] | None:
    """R, G, B from 0 to 255; None: none that can be used."""
    try:
        result = [integer(v) for v in value]
    except (TypeError, ValueError):
        return None
    return result if len(result) == 3 and all(0 <= v <= 255 for v in result) else None


def segments(value: Any) -> list[Entry]:
    """The segments of an image; their fields are read after it."""
    if not isinstance(value, list) or not all(isinstance(s, dict) for s in value):
        raise ValueError("a list of objects")
    return value


Schema = Mapping[str, Mapping[str, Field]]

_IMAGE = {
    "id": Field(identifier, True),
    "file_name": Field(text, True),
    "height": Field(side, True),
    "width": Field(side, True),
}
_ANNOTATION = {
    "id": Field(identifier, True),
    "image_id": Field(identifier, True),
    "category_id": Field(identifier, True),
    "iscrowd": Field(flag),
    "bbox": Field(box),
    "area": Field(area),
    "segmentation": Field(segmentation),
    "keypoints": Field(keypoints),
}
_CATEGORY = {
    "id": Field(identifier, True),
    "name": Field(name, True),
    "keypoints": Field(names),
    "skeleton": Field(pairs),
    "flip_pairs": Field(pairs),
    "sigmas": Field(sigmas),
}


def _optional(fields: Mapping[str, Field], *keys: str) -> dict[str, Field]:
    return {k: Field(f.read, f.required and k not in keys) for k, f in fields.items()}


INSTANCES: Schema = {"images": _IMAGE, "annotations": _ANNOTATION, "categories": _CATEGORY}
# Landmark files, also those of pose toolkits, may lack sizes and names of categories: the kind of
# landmarks is known.
LANDMARKS: Schema = {
    "images": _optional(_IMAGE, "height", "width"),
    "annotations": _optional(_ANNOTATION, "category_id"),
    "categories": _optional(_CATEGORY, "id", "name"),
}
SEGMENT = {
    "id": Field(segment_id, True),
    "category_id": Field(identifier, True),
    "iscrowd": Field(flag),
    "area": Field(area),
    "track_id": Field(identifier),
    "visibility": Field(share),
}
PANOPTIC: Schema = {
    "images": {**_IMAGE, "video_id": Field(identifier), "frame_id": Field(integer)},
    "annotations": {
        "image_id": Field(identifier, True),
        "file_name": Field(text, True),
        "segments_info": Field(segments, True),
    },
    "categories": {
        "id": Field(identifier, True),
        "name": Field(name, True),
        "isthing": Field(flag, True),
        "color": Field(color),
    },
}


def normalize(
    entries: list[Entry], what: str, fields: Mapping[str, Field], findings: Findings
) -> list[Entry]:
    """Copies of a file's entries whose listed fields are in the one form that is expected.

    Args:
        entries: of one list of the file
        what: they are, in the plural, for messages
        fields: of the schema
        findings: gets what was repaired and what is wrong
    """
    return [_normalize_entry(entry, what, fields, findings) for entry in entries]


def _normalize_entry(
    entry: Entry, what: str, fields: Mapping[str, Field], findings: Findings
) -> Entry:
    result = dict(entry)
    for key, rule in fields.items():
        value = entry.get(key)
        if value is not None:
            try:
                value = rule.read(value)
            except ValueError as error:
                shown = shorten([repr(entry[key])])
                shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
                findings.problem(f"{what} have a {key!r} that is not {error}", place(entry, shown))
                del result[key]
                continue
            if value is not entry[key] and not _same(value, entry[key]):
                findings.repairs[f"'{key}' of {what}"] += 1
        if value is not None:
            result[key] = value
            continue
        result.pop(key, None)
        if rule.required:
            findings.problem(f"{what} have no '{key}'", place(entry))
    return result


def place(entry: Entry, shown: str = "") -> str:
    """``id 3 (shown)``: where something is wrong."""
    where = f"id {entry.get('id')}"
    if entry.get("id") is None:
        where = ", ".join(f"{k}: {str(v)[:40]}" for k, v in list(entry.items())[:2])
    return f"{where} ({shown})" if shown else where


def check_ids(entries: list[Entry], what: str, findings: Findings, key: str = "id") -> None:
    """Note ids that occur repeatedly, or are partly numbers and partly text."""
    ids = [entry[key] for entry in entries if key in entry]
    for value, count in Counter(map(str, ids)).items():
        if count > 1:
            repeated = f"values of '{key}' occur repeatedly in '{what}'"
            findings.problem(repeated, f"{value} ({count} times)")
    if len({type(i) for i in ids}) > 1:
        findings.problem(
            f"values of '{key}' in '{what}' are text, others are numbers; write all as numbers",
            shorten([repr(i) for i in ids if isinstance(i, str)]),
        )


def link(
    entries: list[Entry], what: str, key: str, owners: list[Entry], of: str, findings: Findings
) -> None:
    """Make ``key`` of entries the ``id`` of an owner, in place: "1" is 1 where the owner's id is 1."""
    known = {owner["id"] for owner in owners if "id" in owner}
    by_text = {str(i): i for i in known}
    for entry in entries:
        value = entry.get(key)
        if value is None or value in known:
            continue
        if str(value) in by_text:
            entry[key] = by_text[str(value)]
            findings.repairs[f"'{key}' of {what}"] += 1
        else:
            findings.problem(
                f"{what} have a {key} that is not in '{of}'", place(entry, f"{key} {value!r}")
            )


def _same(a: Any, b: Any) -> bool:
    """Equal in value and, of single values, type."""
    return a == b and (type(a) is type(b))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _array(value: Any) -> np.ndarray | None:
    """Numbers, also as text, float64; None: something else, ragged, or nothing."""
    if not isinstance(value, list) or not value:
        return None
    try:
        array = np.array(value)
        return array.astype(np.float64) if array.dtype.kind in "ifU" else None
    except ValueError:  # ragged, or text that is no number
        return None


def _as_list(value: list[Any], numbers: np.ndarray) -> list[Any]:
    """The value itself if it is a flat list of numbers, else :func:`_array` of it as one."""
    plain = numbers.ndim == 1 and not any(isinstance(v, str) for v in value)
    return value if plain else numbers.reshape(-1).tolist()
