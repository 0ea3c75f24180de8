"""WIDER FACE's text and label.txt."""

from pathlib import Path

import pytest

from d2ext.data.errors import DatasetError
from d2ext.data.faces.wider import read_wider

SPLIT = """0--Parade/a b.jpg
2
10 20 30 40 0 1 0 0 2 1
5 6 7 8 2 0 0 1 0 0
0--Parade/none.jpg
0
0 0 0 0 0 0 0 0 0 0
0--Parade/none_without_row.jpg
0
1--Crowd/c.jpg
3
1 2 3 4 0 0 0 0 0 0
1 2 3 4 0 0 0 0 0 0
9 9 0 4 0 0 0 0 0 0
"""
POINTS = "11 21 0 31 21 1 20 30 0 -1 -1 -1 30 40 0"
LABEL = f"""# 0--Parade/a.jpg
10 20 30 40 {POINTS} 0.82
5 6 7 8 {" ".join(["-1 -1 -1"] * 5)} 0.4
# 0--Parade/none.jpg
# val/b.jpg
1 2 3 4
"""


def read(tmp_path: Path, text: str) -> list[dict]:
    (tmp_path / "file.txt").write_text(text)
    return read_wider(str(tmp_path / "file.txt"), "images")


def test_split_file(tmp_path: Path) -> None:
    a, none, without_row, crowd = read(tmp_path, SPLIT)
    assert a["file_name"] == "images/0--Parade/a b.jpg"
    assert a["annotations"][0]["bbox"] == [10, 20, 40, 60]
    assert a["annotations"][0]["attributes"]["occlusion"] == 2
    assert [x["iscrowd"] for x in a["annotations"]] == [0, 1]  # invalid
    assert none["annotations"] == without_row["annotations"] == []
    # Named twice, and without width: one face less, and one for the loader to drop.
    assert [x["bbox"] for x in crowd["annotations"]] == [[1, 2, 4, 6], [9, 9, 9, 13]]
    assert [x["id"] for r in (a, crowd) for x in r["annotations"]] == [1, 2, 3, 4]


def test_label_file(tmp_path: Path) -> None:
    a, none, val = read(tmp_path, LABEL)
    face, without = a["annotations"]
    assert face["keypoints"] == [11, 21, 2, 31, 21, 1, 20, 30, 2, 0, 0, 0, 30, 40, 2]
    assert face["num_keypoints"] == 4 and face["attributes"] == {"blur": 0.82}
    assert "keypoints" not in without
    assert none["annotations"] == []
    assert val["annotations"][0]["bbox"] == [1, 2, 4, 6]


def test_names_alone(tmp_path: Path) -> None:
    records = read(tmp_path, "a/b.jpg\na/c.jpg\n")
    assert records[1] == {"file_name": "images/a/c.jpg", "image_id": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.jpg\n2\n1 2 3 4 0 0 0 0 0 0\nb.jpg\n0\n", r"Line 4 .* row of numbers: 'b\.jpg'"),
        ("a.jpg\n1\n1 2 3 4 0 0 0 0 0\n", "Line 3 .* ten whole numbers"),
        ("a.jpg\n1\n1 2 3 4.5 0 0 0 0 0 0\n", "Line 3 .* ten whole numbers"),
        ("a.jpg\nb.jpg\n1\n1 2 3 4 0 0 0 0 0 0\n", "Line 1 .* the number of its faces"),
        ("a.jpg\n2\n1 2 3 4 0 0 0 0 0 0\n", "ends before the 2 faces of line 2"),
        ("a.jpg\n1\n1 2 3 4 0 0 0 0 0 0\n5 6 7 8 0 0 0 0 0 0\n", "Line 4 .* name an image"),
        ("# a.jpg\n1 2 3\n", "Line 2 .* has 3 numbers; expected 20"),
        ("# a.jpg\n1 2 x 4\n", "Line 2 .* row of numbers"),
        ("# a.jpg\n1 2 nan 4\n", "Line 2 .* not finite"),
        ("#\n1 2 3 4\n", "Line 1 .* no image"),
    ],
)
def test_odd_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, text)
