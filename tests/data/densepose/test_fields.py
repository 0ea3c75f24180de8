"""DensePose's fields in COCO's form: what is read, what is refused, and what the message says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2ext.data.coco_json import coco_records, read_coco_json
from d2ext.data.densepose.fields import coarse_parts
from d2ext.data.errors import DatasetError
from tests.data.densepose.persons import MESH, content, rle, write_persons

Annotations = list[dict[str, Any]]


def _read(tmp_path: Path, change: Callable[[Annotations], Any] | None = None) -> Annotations:
    file = read_coco_json(*write_persons(tmp_path, change))
    records = coco_records(file, str(tmp_path))
    return [a for record in records for a in record["annotations"]]


def test_records_have_what_the_file_has(tmp_path: Path) -> None:
    for read, given in zip(_read(tmp_path), content()["annotations"], strict=True):
        for key in ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V", "dp_vertex"):
            assert np.array_equal(read[key], np.array(given[key], np.float32)), key
        assert read["dp_I"].dtype == read["dp_vertex"].dtype == np.int64
        assert read["ref_model"] == MESH and read["dp_masks"] == given["dp_masks"]


def test_later_parts_cover_earlier_ones() -> None:
    parts: list[Any] = [[]] * 14
    parts[1] = rle(slice(0, 9), slice(0, 20))
    parts[4] = rle(slice(4, 6), slice(10, 30))
    expected = np.zeros((256, 256), np.uint8)
    expected[:9, :20] = 2
    expected[4:6, 10:30] = 5
    result = coarse_parts(parts)
    assert result is not None and result.dtype == np.uint8
    assert np.array_equal(result, expected)
    assert coarse_parts([[]] * 14) is None


def _without_points(a: Annotations) -> None:
    for key in ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V", "dp_vertex"):
        del a[0][key]
        a[1][key] = []


def test_other_forms_are_read(tmp_path: Path) -> None:
    whole = rle(slice(0, 256), slice(0, 9))

    def change(a: Annotations) -> None:
        a[0]["dp_masks"] = whole
        a[0]["dp_U"][3] = 1.0000001
        a[0]["dp_vertex"][2] = -1
        a[1]["dp_masks"] = [None, {}, *[[]] * 12]
        del a[1]["dp_vertex"], a[1]["ref_model"]
        for key in ("dp_I", "dp_U", "dp_V"):
            del a[2][key]

    first, second, third = _read(tmp_path, change)
    assert first["dp_masks"] == [whole] and first["dp_U"][3] == 1
    assert "dp_masks" not in second and "dp_vertex" not in second and len(second["dp_I"]) == 16
    assert "dp_I" not in third and len(third["dp_vertex"]) == 16

    persons = _read(tmp_path, _without_points)
    assert [any(k.startswith("dp_") for k in a) for a in persons] == [False, False, True]
    assert "ref_model" not in persons[0]


# What is wrong → what the message says.
WRONG: dict[str, tuple[Callable[[Annotations], Any], str]] = {
    "lengths": (lambda a: a[0]["dp_x"].pop(), "different lengths.*15 dp_x, 16 dp_y"),
    "vertices too few": (lambda a: a[0]["dp_vertex"].pop(), "different lengths"),
    "thirteen masks": (lambda a: a[0]["dp_masks"].pop(), "14 RLEs, one for each coarse part"),
    "two masks": (lambda a: a[0].update(dp_masks=[[], []]), "14 RLEs"),
    "mask of another size": (
        lambda a: a[0]["dp_masks"].__setitem__(0, {"size": [9, 9], "counts": [81]}),
        "256 x 256 pixels",
    ),
    "mask turned": (
        lambda a: a[0]["dp_masks"][0].update(size=[128, 512]),
        r"'size' is \[256, 256\]",
    ),
    "mask of text": (lambda a: a[0]["dp_masks"].__setitem__(0, "there"), "256 x 256"),
    "part 25": (lambda a: a[0]["dp_I"].__setitem__(0, 25), "parts from 0 .* to 24"),
    "half a part": (lambda a: a[0]["dp_I"].__setitem__(0, 2.5), "parts from 0"),
    "U of bytes": (lambda a: a[0].update(dp_U=[128.0] * 16), "'dp_U' .* 0 to 1"),
    "V below 0": (lambda a: a[0]["dp_V"].__setitem__(0, -0.1), "'dp_V' .* 0 to 1"),
    "V is no number": (lambda a: a[0]["dp_V"].__setitem__(0, float("nan")), "'dp_V'"),
    "in pixels": (lambda a: a[0]["dp_x"].__setitem__(0, 300), "'dp_x' .* 0 to 256"),
    "left of the box": (lambda a: a[0]["dp_y"].__setitem__(0, -3), "'dp_y' .* 0 to 256"),
    "texts": (lambda a: a[0].update(dp_x=["a"] * 16), "'dp_x'"),
    "ragged": (lambda a: a[0]["dp_x"].__setitem__(0, [1, 2]), "'dp_x'"),
    "one number": (lambda a: a[0].update(dp_x=3), "'dp_x'"),
    "vertex -2": (lambda a: a[0]["dp_vertex"].__setitem__(0, -2), "vertices, counted from 0"),
    "no mesh": (lambda a: a[0].pop("ref_model"), "without ref_model"),
    "no y": (lambda a: a[0].pop("dp_y"), "without dp_x and dp_y"),
    "no U": (lambda a: a[0].pop("dp_U"), "some of dp_I, dp_U and dp_V"),
    "no box": (lambda a: a[0].pop("bbox"), "no box around them"),
    "places alone": (
        lambda a: [a[0].pop(k) for k in ("dp_I", "dp_U", "dp_V", "dp_vertex")],
        "without dp_I, dp_U, dp_V or dp_vertex",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, what: str) -> None:
    change, message = WRONG[what]
    with pytest.raises(DatasetError, match=rf"persons\.json(?s:.*){message}") as error:
        _read(tmp_path, change)
    assert "id 1 (" in str(error.value)
    assert str(error.value).count("\n  - ") == 1  # nothing that only follows from it
