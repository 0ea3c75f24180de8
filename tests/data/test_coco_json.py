"""The reader of COCO-format files, its checks and the dicts it makes."""

import logging
import uuid

import pycocotools.mask as mask_util
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json as detectron2_load

from d2ext.data import DatasetError
from d2ext.data.coco_json import LANDMARKS, load_coco_json, read_coco_json, read_json
from tests.data.coco_files import save, write_coco
from tests.data.scenes import paint_scene


@pytest.fixture
def coco(tmp_path):
    json_file, images, content = write_coco(tmp_path / "set")

    def check(change):
        result = change(content)
        # A change either edits the content or returns what the file shall hold instead.
        save(tmp_path / "set", result if isinstance(result, dict | list | str) else content)
        return read_coco_json(json_file, images)

    check.folder = tmp_path / "set"
    return check


def test_file(coco):
    file = coco(lambda content: None)
    assert file.classes == {2: "apple", 7: "pear", 9: "fig"} and list(file.classes) == [2, 7, 9]
    assert (len(file.images), len(file.annotations)) == (3, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "not valid JSON"),
        (lambda c: "", "not valid JSON"),
        (lambda c: [], "holds a list"),
        (lambda c: {"images": [], "annotations": []}, "'images' is empty"),
        (lambda c: {**c, "images": {"a": 1}}, "malformed 'images'"),
        (lambda c: {"images": c["images"], "annotations": []}, "has no 'categories'"),
        (lambda c: {**c, "categories": []}, "'categories' is empty"),
        (lambda c: c["images"][0].pop("width"), r"1 images have no 'width': id 100"),
        (lambda c: c["annotations"][2].pop("id"), r"1 annotations have no 'id'"),
        (lambda c: c["annotations"][2].update(id=0), r"1 values of 'id'.*0 \(2 times\)"),
        (lambda c: c["images"][1].update(id=100), r"'id' occur repeatedly in 'images'"),
        (lambda c: c["categories"][1].update(name="pear"), r"'name'.*pear \(2 times\)"),
        (
            lambda c: c["annotations"][4].update(image_id=9999),
            r"1 annotations have a image_id.*id 11 \(image_id 9999\)",
        ),
        (
            lambda c: [a.update(category_id=1) for a in c["annotations"]] and None,
            r"9 annotations have a category_id.*id 0 \(category_id 1\).*4 more",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            r"four numbers.*id 0 \(\[1, 2, 3\]\)",
        ),
        (lambda c: c["annotations"][0].update(bbox=[]), "not four numbers"),
        (lambda c: c["annotations"][0].update(ignore=1), "use 'iscrowd'"),
        (lambda c: c["annotations"][0].update(keypoints=[1, 2, 2]), "'keypoints' of other"),
    ],
)
def test_problems(coco, change, message):
    with pytest.raises(DatasetError, match=message):
        coco(change)


def test_all_problems_in_one_message(coco):
    def change(content):
        content["annotations"][0]["image_id"] = 5
        content["annotations"][1]["category_id"] = 5

    with pytest.raises(DatasetError, match=r"(?s)image_id 5.*\n.*category_id 5"):
        coco(change)


def test_missing_files(tmp_path, coco):
    with pytest.raises(DatasetError, match=r"none\.json' does not exist"):
        read_coco_json(str(tmp_path / "none.json"), str(tmp_path))
    with pytest.raises(DatasetError, match=r"image folder '.*none' does not exist"):
        read_coco_json(str(coco.folder / "data.json"), str(tmp_path / "none"))
    for i in range(2):
        (coco.folder / f"{i}.png").unlink()
    with pytest.raises(DatasetError, match=r"2 of 3 images looked for are not in.*0\.png, 1"):
        coco(lambda content: None)


def test_few_missing_files_are_a_warning(coco, caplog):
    def change(content):
        first = content["images"][0]
        content["images"] += [{**first, "id": 1000 + i} for i in range(30)]
        content["images"].append({**first, "id": 1, "file_name": "gone.png"})

    with caplog.at_level(logging.WARNING):
        assert len(coco(change).images) == 34
    assert any("1 of 34 images" in r.getMessage() for r in caplog.records)


def test_what_is_fine(coco):
    """Missing boxes, crowds, RLE and images without annotations are usable."""

    def change(content):
        del content["annotations"][0]["bbox"]
        rle = mask_util.encode(paint_scene(60, 80).masks[0].astype("uint8", order="F"))
        rle["counts"] = rle["counts"].decode()
        content["annotations"][1].update(iscrowd=1, segmentation=rle)
        content["annotations"] = content["annotations"][:3]

    assert len(coco(change).annotations) == 3


def by_detectron2(json_file, images):
    name = f"test_coco_json_{uuid.uuid4().hex}"  # without a name, category ids stay
    try:
        return detectron2_load(json_file, images, name)
    finally:
        MetadataCatalog.pop(name)


def without_additions(records, as_there):
    """Records without what Detectron2's reader does not give: ids and computed boxes."""
    for record, other in zip(records, as_there, strict=True):
        for annotation, there in zip(record["annotations"], other["annotations"], strict=True):
            del annotation["id"]
            if "bbox" not in there:
                del annotation["bbox"]
    return records


def test_records_are_those_of_detectron2_s_reader(tmp_path):
    """With keypoints, RLE, a crowd, an annotation without box, and an image without annotations."""
    json_file, images, content = write_coco(tmp_path / "set")
    content["categories"] = [{**c, "keypoints": ["a", "b"]} for c in content["categories"]]
    rle = mask_util.encode(paint_scene(60, 80).masks[0].astype("uint8", order="F"))
    content["annotations"][1].update(
        iscrowd=1, segmentation={**rle, "counts": rle["counts"].decode()}
    )
    content["annotations"][2]["keypoints"] = [3, 4, 2, 5.25, 6, 1]
    del content["annotations"][4]["bbox"]
    content["images"].insert(0, {"id": 500, "file_name": "0.png", "height": 60, "width": 80})
    save(tmp_path / "set", content)
    records = load_coco_json(json_file, images)
    expected = by_detectron2(json_file, images)
    assert without_additions(records, expected) == expected
    assert records[0]["annotations"][2]["keypoints"] == [3.5, 4.5, 2, 5.75, 6.5, 1]
    assert [r["image_id"] for r in records] == [100, 101, 102, 500]


@pytest.mark.real_data
def test_records_of_coco(real_data):
    json_file = str(real_data / "coco/annotations/instances_val2017.json")
    images = str(real_data / "coco/val2017")
    records = load_coco_json(json_file, images)
    expected = by_detectron2(json_file, images)
    assert len(records) > 10 and without_additions(records, expected) == expected


def test_landmark_files_need_less(tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1}],
    }
    (tmp_path / "set").mkdir()
    save(tmp_path / "set", content)
    file = read_coco_json(str(tmp_path / "set/data.json"), schema=LANDMARKS)
    assert (len(file.images), len(file.annotations), file.categories) == (1, 1, [])
    with pytest.raises(DatasetError, match="has no 'categories'"):
        read_coco_json(str(tmp_path / "set/data.json"))


def test_files_of_a_path_handler():
    metadata = MetadataCatalog.get("shapes_val_panoptic")
    assert read_json(metadata.panoptic_json)["annotations"]
    assert len(read_coco_json(metadata.json_file).classes) == len(metadata.thing_classes)
