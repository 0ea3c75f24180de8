"""The look at the whole of own data: what is refused, what is warned of, what the table says."""

import copy
import json
import logging
import uuid

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ext.data import DatasetError
from d2ext.data.custom import register_own_dataset
from d2ext.data.summary import evenly, forget, report
from tests.data.coco_files import save, write_coco


@pytest.fixture
def register(tmp_path):
    """Write a data set of 12 images, change it, register it; returns the name."""
    name = f"summary_{uuid.uuid4().hex}"

    def add(change=lambda content, folder: None):
        path, folder, content = write_coco(tmp_path / "set", count=12)
        content = copy.deepcopy(content)
        change(content, tmp_path / "set")
        save(tmp_path / "set", content)
        return register_own_dataset(name, path, folder)[0]

    yield add
    if f"{name}_train" in DatasetCatalog.list():
        DatasetCatalog.remove(f"{name}_train")
        MetadataCatalog.pop(f"{name}_train", None)
        forget(f"{name}_train")


def all_crowd(content, folder):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def corners(content, folder):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]


def corners_without_masks(content, folder):
    corners(content, folder)
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def fractions(content, folder):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / 80, y / 60, w / 80, h / 60]
        polygons = [(np.reshape(p, (-1, 2)) / (80, 60)).ravel() for p in annotation["segmentation"]]
        annotation["segmentation"] = [p.tolist() for p in polygons]


def fractions_of_points(content, folder):
    for category in content["categories"]:
        category["keypoints"] = ["left", "right"]
    for annotation in content["annotations"]:
        annotation["keypoints"] = [0.2, 0.3, 2, 0, 0, 0]


def downloads_failed(content, folder):
    for image in content["images"]:
        (folder / image["file_name"]).write_text("<html>404</html>")


def turned(content, folder):
    """Every second photograph was taken upright, and annotated lying."""
    for image in content["images"][::2]:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.open(folder / image["file_name"])
        image["file_name"] = image["file_name"].replace("png", "jpg")
        picture.save(folder / image["file_name"], exif=exif)


def other_images(content, folder):
    for image in content["images"]:
        cv2.imwrite(str(folder / image["file_name"]), np.zeros((50, 50, 3), np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (all_crowd, r"All 36 annotations .* are crowds.*Set 'iscrowd' to 0"),
        (
            corners,
            r"boxes .* do not fit their masks, but would as x0, y0, x1, y1: annotation \d+ of",
        ),
        (corners_without_masks, r"boxes .* reach beyond their image, but would as x0, y0, x1, y1"),
        (fractions, "of the boxes .* seem to be fractions of the images' sides"),
        (fractions_of_points, "of the keypoints .* seem to be fractions"),
        (downloads_failed, r"None of 12 images .* can be read; the first: .*0\.png"),
        (turned, r"6 of 12 images .* EXIF orientation.*0\.jpg.*exiftool"),
        (other_images, "None of 12 images .* has the width and height"),
    ],
)
def test_what_cannot_be_meant_is_an_error(register, change, message):
    with pytest.raises(DatasetError, match=message):
        register(change)


def test_few_mistakes_are_told(register, tmp_path, caplog):
    def change(content, folder):
        (folder / "3.png").write_bytes(b"")
        cv2.imwrite(str(folder / "4.png"), np.zeros((50, 50, 3), np.uint8))
        content["annotations"][7]["bbox"] = [1, 1, 4, 4]
        content["annotations"][8]["iscrowd"] = 1
        for category in content["categories"]:
            category["keypoints"] = ["left", "right"]
        content["categories"].append({"id": 11, "name": "kiwi"})

    with caplog.at_level(logging.INFO, "d2ext"):
        name = register(change)
        report([name, "shapes_train"], str(tmp_path / "run"))  # not a second time
    text = caplog.text
    assert text.count("images looked at |") == 1 and "1 (kiwi)" in text
    assert "1 of 12 images looked at cannot be read" in text and "3.png" in text
    assert "1 of 12 images looked at have another size" in text and "4.png" in text
    assert "1 of 35 boxes looked at do not fit their mask: annotation 21 of" in text
    assert "no annotation has one that is labelled" in text
    assert "is there anything to see" not in text
    (written,) = json.loads((tmp_path / "run" / "dataset_summary.json").read_text()).values()
    assert (written["instances"], written["crowds"], written["images"]) == (35, 1, 12)
    assert written["classes"] == {"apple": 12, "pear": 12, "fig": 12, "kiwi": 0}
    assert written["values"][0] == 0 and len(written["warnings"]) == 4


def test_black_images_are_told(register, caplog):
    def change(content, folder):
        for image in content["images"]:
            cv2.imwrite(str(folder / image["file_name"]), np.full((60, 80), 3, np.uint8))

    register(change)
    assert "lie between 3 and 3 of 255" in caplog.text


def test_good_data_have_no_warnings(register, caplog):
    register()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_an_unused_root_category_is_left_out(register, caplog):
    name = register(lambda c, folder: c["categories"].insert(0, {"id": 0, "name": "fig"}))
    assert MetadataCatalog.get(name).thing_classes == ["apple", "pear", "fig"]
    assert "'fig' (id 0) repeats the name" in caplog.text


def write_semantic(folder, values):
    """Images and maps; map i has the labels values[i]."""
    for i, labels in enumerate(values):
        pattern = np.resize(np.array(labels, np.uint8), (8, 8))
        for part, picture in (("images", np.full((8, 8, 3), 9 * i)), ("labels", pattern)):
            (folder / part).mkdir(exist_ok=True)
            cv2.imwrite(str(folder / part / f"{i:03d}.png"), picture)
    return {"train_images": str(folder / "images"), "train_sem_seg": str(folder / "labels")}


def test_label_maps(tmp_path, monkeypatch):
    files = {"semantic_classes": ["background", "lesion"]}
    with pytest.raises(
        DatasetError, match=r"no.* a label but 0 \(background\).* 255, which 2 maps"
    ):
        register_own_dataset(
            "sem_a", **files, **write_semantic(tmp_path, [[0, 255], [0, 255], [0]])
        )
    with pytest.raises(DatasetError, match=r"043\.png' has labels 7"):
        register_own_dataset("sem_b", **files, **write_semantic(tmp_path, [[0, 1]] * 43 + [[0, 7]]))
    with pytest.raises(DatasetError, match="name the background, too"):
        register_own_dataset(
            "sem_e", semantic_classes=["lesion"], **write_semantic(tmp_path, [[0, 255]])
        )
    # The second class need not be among the maps that are looked at.
    monkeypatch.setattr("d2ext.data.register_semantic.CHECKED_IMAGES", 5)
    try:
        register_own_dataset("sem_c", **files, **write_semantic(tmp_path, [[0]] * 43 + [[0, 1]]))
    finally:
        DatasetCatalog.remove("sem_c_train")
        MetadataCatalog.pop("sem_c_train", None)
        forget("sem_c_train")


def test_label_maps_of_turned_photographs(tmp_path):
    files = write_semantic(tmp_path, [[0, 1]] * 2)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.zeros((8, 6, 3), np.uint8)).save(tmp_path / "images" / "000.png", exif=exif)
    cv2.imwrite(str(tmp_path / "labels" / "000.png"), np.eye(8, 6, dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"1 of 2 images .* EXIF orientation"):
        register_own_dataset("sem_d", semantic_classes=["a", "b"], **files)


def test_evenly():
    assert evenly(range(10), 20) == range(10) and not evenly([], 5)
    assert list(evenly(range(10), 4)) == [0, 3, 6, 9]
