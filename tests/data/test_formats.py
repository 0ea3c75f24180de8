"""Exports of annotation tools: all of one scene, each equal to its COCO form."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as mask_util

from d2ext.data import DataError
from d2ext.data.custom import register_own_dataset
from d2ext.data.formats import convert_to_coco
from d2ext.tools import train
from tests.engine import toy

# (file, width, height), and the objects of the first: a box of one class, a quadrangle of the other.
IMAGES = (("a.png", 40, 20), ("b.png", 30, 30))
BOX = (10.0, 4.0, 20.0, 8.0)
QUAD = [[2.0, 2.0], [12.0, 2.0], [12.0, 12.0], [2.0, 10.0]]
MASK = np.zeros((20, 40), np.uint8)
MASK[3:9, 5:17] = 1
MASK[4, 6] = 0
CORNERS = (BOX[0], BOX[1], BOX[0] + BOX[2], BOX[1] + BOX[3])


def yolo(folder: Path) -> Path:
    labels = folder / "labels"
    labels.mkdir()
    quad = " ".join(f"{x / 40} {y / 20}" for x, y in QUAD)
    (labels / "a.txt").write_text(f"0 0.5 0.4 0.5 0.4\n1 {quad}\n")
    (labels / "b.txt").write_text("")
    (folder / "data.yaml").write_text("train: images\nnames: {0: cat, 1: dog}\n")
    return folder / "data.yaml"


def darknet(folder: Path) -> Path:
    """Text files beside the images, names in classes.txt."""
    (folder / "images/a.txt").write_text("0 0.5 0.4 0.5 0.4\n")
    (folder / "images/classes.txt").write_text("cat\ndog\n")
    return folder / "images"


def voc(folder: Path) -> Path:
    names = ("xmin", "ymin", "xmax", "ymax")
    corners = (CORNERS[0] + 1, CORNERS[1] + 1, *CORNERS[2:])  # counted from 1, inclusive
    box = "".join(f"<{n}>{int(v)}</{n}>" for n, v in zip(names, corners, strict=True))
    objects = f"<object><name>cat</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
    (folder / "Annotations").mkdir()
    for (name, width, height), content in zip(IMAGES, (objects, ""), strict=True):
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation><filename>{name}</filename>{size}{content}</annotation>"
        (folder / "Annotations" / name).with_suffix(".xml").write_text(text)
    return folder


def voc_list(folder: Path) -> Path:
    sets = voc(folder) / "ImageSets/Main"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("a\nb -1\n")
    return sets / "train.txt"


def cvat(folder: Path) -> Path:
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in QUAD)
    x0, y0, x1, y1 = CORNERS
    part = MASK[3:9, 5:17].ravel()
    edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(part)]
    runs = ", ".join(str(v) for v in [0, *np.diff(edges)])
    shapes = (
        f'<box label="cat" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}"/>'
        f'<polygon label="dog" points="{points}"/>'
        f'<mask label="dog" rle="{runs}" left="5" top="3" width="12" height="6"/>'
        f'<box label="cat" rotation="90" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}"/>'
        '<polyline label="dog" points="1,1;2,2"/>'
    )
    labels = "".join(f"<label><name>{name}</name></label>" for name in ("cat", "dog"))
    text = f"<annotations><meta><task><labels>{labels}</labels></task></meta>"
    for number, ((name, width, height), content) in enumerate(
        zip(IMAGES, (shapes, ""), strict=True)
    ):
        start = f'<image id="{number}" name="{name}" width="{width}" height="{height}">'
        text += f"{start}{content}</image>"
    (folder / "annotations.xml").write_text(text + "</annotations>")
    return folder / "annotations.xml"


def cvat_coco(folder: Path) -> Path:
    content = expected(QUAD, MASK)
    content["annotations"][2]["iscrowd"] = 1
    (folder / "instances_default.json").write_text(json.dumps(content))
    return folder / "instances_default.json"


def labelme(folder: Path) -> Path:
    (folder / "json").mkdir()
    part = io.BytesIO()
    Image.fromarray(MASK[3:9, 5:17].astype(bool)).save(part, "PNG")
    shapes = [
        {"label": "cat", "points": [CORNERS[2:], CORNERS[:2]], "shape_type": "rectangle"},
        {"label": "dog", "points": QUAD, "shape_type": "polygon", "group_id": None},
        {
            "label": "dog",
            "points": [[5, 3], [16, 8]],
            "shape_type": "mask",
            "mask": base64.b64encode(part.getvalue()).decode(),
        },
        {"label": "dog", "points": [[1, 1]], "shape_type": "point"},
    ]
    for (name, width, height), content in zip(IMAGES, (shapes, []), strict=True):
        file = (folder / "json" / name).with_suffix(".json")
        entry = {"imagePath": f"..\\images\\{name}", "imageWidth": width, "imageHeight": height}
        file.write_text(json.dumps(entry | {"shapes": content}))
    return folder / "json"


def brush(mask: np.ndarray) -> list[int]:
    """rle-pack, without repeated runs but one: words of 8 bits, lengths of 16."""
    values = np.stack([mask * 255] * 4, axis=2).ravel().tolist()
    bits = f"{len(values):032b}{7:05b}" + f"{15:04b}" * 4
    bits += f"100{3:016b}{values[0]:08b}"  # four times the first
    bits += f"000{len(values) - 5:016b}" + "".join(f"{v:08b}" for v in values[4:])
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def labelstudio(folder: Path) -> Path:
    def result(kind: str, label: str, size: tuple[int, int] = (40, 20), **value: Any) -> Any:
        width, height = size
        return {
            "type": kind,
            "original_width": width,
            "original_height": height,
            "value": {kind: [label], **value},
        }

    x, y, w, h = BOX
    percent = {"x": x * 2.5, "y": y * 5, "width": w * 2.5, "height": h * 5}
    quad = [[px * 2.5, py * 5] for px, py in QUAD]
    shapes = [
        result("rectanglelabels", "cat", **percent, rotation=0),
        result("polygonlabels", "dog", points=quad),
        result("brushlabels", "dog", rle=brush(MASK)),
        {"type": "choices", "value": {"choices": ["sunny"]}},
    ]
    tasks = [
        {"data": {"image": "/data/upload/1/0a1b2c3d-a.png"}, "annotations": [{"result": shapes}]},
        {"data": {"image": "/data/local-files/?d=x%2Fb.png"}, "annotations": [{"result": []}]},
    ]
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder / "export.json"


def expected(quad: Any = None, mask: Any = None) -> dict[str, Any]:
    """The COCO form: the box, then the others as far as a tool has them."""
    x, y, w, h = BOX
    annotations: list[dict[str, Any]] = [{"category_id": 1, "bbox": [x, y, w, h], "area": w * h}]
    if quad is not None:
        polygon = np.ravel(quad).tolist()
        area = float(mask_util.area(mask_util.frPyObjects([polygon], 20, 40))[0])
        bbox = [2.0, 2.0, 10.0, 10.0]
        annotations.append(
            {"category_id": 2, "bbox": bbox, "area": area, "segmentation": [polygon]}
        )
    if mask is not None:
        rle = mask_util.encode(np.asfortranarray(mask))
        rle = {"size": rle["size"], "counts": rle["counts"].decode()}
        annotation = {"category_id": 2, "bbox": [5.0, 3.0, 12.0, 6.0], "area": float(mask.sum())}
        annotations.append(annotation | {"segmentation": rle})
    for number, annotation in enumerate(annotations, 1):
        annotation |= {"id": number, "image_id": 1, "iscrowd": 0}
    return {
        "images": [
            {"id": i, "file_name": name, "width": width, "height": height}
            for i, (name, width, height) in enumerate(IMAGES, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number, (name, width, height) in enumerate(IMAGES):
        pixels = np.full((height, width, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    return tmp_path


@pytest.mark.parametrize(
    ("write", "form", "quad", "mask"),
    [
        (yolo, "yolo", QUAD, None),
        (darknet, "yolo", None, None),
        (voc, "voc", None, None),
        (voc_list, "voc", None, None),
        (cvat, "cvat", QUAD, MASK),
        (cvat_coco, "cvat", QUAD, MASK),
        (labelme, "labelme", QUAD, MASK),
        (labelstudio, "labelstudio", QUAD, MASK),
    ],
)
def test_equals_the_coco_form(
    folder: Path, write: Callable[[Path], Path], form: str, quad: Any, mask: Any
) -> None:
    path = write(folder)
    (file,) = convert_to_coco(form, {"train": (str(path), str(folder / "images"))}).values()
    content, right = json.loads(Path(file).read_text()), expected(quad, mask)
    assert content["images"] == right["images"]
    names = [c["name"] for c in content["categories"]]
    assert names == ["cat", "dog"][: 1 if form == "voc" else 2]
    got = content["annotations"]
    if write is cvat:  # turned by a right angle about its centre
        turned = got.pop()
        assert turned["bbox"] == pytest.approx([16, -2, 8, 20]) and "segmentation" in turned
    if write is labelme:  # of a file, boxes and masks come first
        got = [got[i] | {"id": n} for n, i in enumerate((0, 2, 1), 1)]
    assert len(got) == len(right["annotations"])
    for a, b in zip(got, right["annotations"], strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if key == "segmentation" and isinstance(value, list):
                np.testing.assert_allclose(a[key], value, atol=1e-6)
            elif key in ("bbox", "area"):
                assert a[key] == pytest.approx(value)
            else:
                assert a[key] == value, key


def test_trained_with_one_command(folder: Path, tmp_path: Path) -> None:
    for name, _, _ in IMAGES:  # what the toy takes
        Image.new("RGB", (toy.SIDE, toy.SIDE)).save(folder / "images" / name)
    files = ["json", str(yolo(folder)), "images", str(folder / "images")]
    data = [f"--{split}-{files[i]}={files[i + 1]}" for split in ("train", "val") for i in (0, 2)]
    options = toy.options(tmp_path / "run", SOLVER__MAX_ITER=2, SOLVER__STEPS="()")
    start = options.index("DATASETS.TRAIN")
    del options[start : start + 4]
    assert train.run(["--dataset", "exported", "--format", "yolo", *data, *options]) == 0
    assert len(DatasetCatalog.get("exported_train")) == 2
    assert (tmp_path / "run/inference/coco_instances_results.json").is_file()


def test_parts_share_their_classes(folder: Path) -> None:
    one, other = labelme(folder), folder / "other"
    other.mkdir()
    entry = {"imagePath": "b.png", "imageWidth": 30, "imageHeight": 30}
    shape = {"label": "ant", "points": [[1, 1], [5, 5]], "shape_type": "rectangle"}
    (other / "b.json").write_text(json.dumps(entry | {"shapes": [shape]}))
    images = str(folder / "images")
    register_own_dataset("labelme_parts", str(one), images, str(other), images, format="labelme")
    for part, expected_classes in (("val", {0}), ("train", {1, 2})):  # ant, cat, dog
        records = DatasetCatalog.get(f"labelme_parts_{part}")
        classes = {entry["category_id"] for r in records for entry in r["annotations"]}
        assert classes == expected_classes


def test_poses(folder: Path) -> None:
    (folder / "labels").mkdir()
    (folder / "labels/a.txt").write_text("0 0.5 0.4 0.5 0.4 0.25 0.5 2 0 0 0\n")
    (folder / "data.yaml").write_text("names: [cat]\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\n")
    (file,) = convert_to_coco("yolo", {"val": (str(folder), str(folder / "images"))}).values()
    content = json.loads(Path(file).read_text())
    assert content["annotations"][0]["keypoints"] == [10, 10, 2, 0, 0, 0]
    assert content["annotations"][0]["num_keypoints"] == 1
    assert content["categories"][0]["keypoints"] == ["point_1", "point_2"]
    assert content["categories"][0]["flip_pairs"] == [[0, 1]]


def test_what_is_left_out_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        convert_to_coco("cvat", {"val": (str(cvat(folder)), str(folder / "images"))})
    assert "1 x polyline" in caplog.text


@pytest.mark.parametrize(
    ("form", "file", "content", "message"),
    [
        ("yolo", "labels/a.txt", "7 0.5 0.4 0.5 0.4\n", r"a\.txt', line 1: class 7"),
        ("yolo", "labels/a.txt", "\n0 200 100 30 20\n", r"a\.txt', line 2: .*fractions"),
        ("yolo", "labels/a.txt", "0 0.5 0.4 0.5 0.4 0.9\n", r"a\.txt', line 1: 5 numbers"),
        ("yolo", "labels/a.txt", "0 half\n", r"a\.txt'"),
        ("yolo", "data.yaml", "names: {a: b}\n", r"data\.yaml' is not"),
        ("voc", "Annotations/a.xml", "<annotation><object/></annotation>", r"a\.xml'"),
        ("voc", "Annotations/a.xml", "<annotation>", r"a\.xml'"),
        ("cvat", "annotations.xml", "<annotations><track/></annotations>", "of a video"),
        ("cvat", "annotations.xml", '<annotations><image name="a"/></annotations>', "no 'height'"),
        ("labelme", "json/a.json", '{"shapes": []}', "no 'imageHeight'"),
        ("labelstudio", "export.json", '[{"image": "a.png", "label": []}]', "calls 'JSON'"),
        ("excel", "a", "", "known: cvat, labelme"),
    ],
)
def test_malformed_files_are_named(
    folder: Path, form: str, file: str, content: str, message: str
) -> None:
    writers = {"yolo": yolo, "voc": voc, "cvat": cvat, "labelme": labelme}
    path = writers.get(form, labelstudio)(folder)
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        convert_to_coco(form, {"train": (str(path), str(folder / "images"))})
