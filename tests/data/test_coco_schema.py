"""The schema of COCO's files: what has only one meaning is read as such, the rest is one clear error."""

import json
import logging
import math
import uuid

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2ext.data import DatasetError
from d2ext.data.coco_json import coco_file, coco_records, evaluation_content, read_coco_json
from d2ext.data.coco_schema import run_lengths
from d2ext.evaluation import COCOEvaluator
from tests.data.coco_files import write_coco

H, W = 60, 80


def each(content, change, key="annotations"):
    for entry in content[key]:
        change(entry)


def pairs(flat):
    return [list(p) for p in zip(flat[0::2], flat[1::2], strict=True)]


def as_runs(annotation, **change):
    (polygon,) = annotation["segmentation"]
    rle = mask_util.frPyObjects([polygon], H, W)[0]
    runs = run_lengths(rle["counts"]).tolist()
    annotation["segmentation"] = {"size": [H, W], "counts": runs, **change}


def without_size(annotation):
    as_runs(annotation)
    del annotation["segmentation"]["size"]


def text_ids(content):
    each(content, lambda a: a.update(id=f"ann_{a['id']}", image_id=f"im_{a['image_id']}"))
    each(content, lambda i: i.update(id=f"im_{i['id']}"), "images")


def as_text(entry):
    entry.update({k: str(v) for k, v in entry.items() if isinstance(v, int)})


# Changes of a file that mean the same as the unchanged one.
READ = {
    "ids from 0": lambda c: [a.update(id=i) for i, a in enumerate(c["annotations"])],
    "ids are text": text_ids,
    "other type of id": lambda c: each(c, lambda a: a.update(image_id=str(a["image_id"]))),
    "no iscrowd": lambda c: each(c, lambda a: a.pop("iscrowd")),
    "null": lambda c: each(c, lambda a: a.update(iscrowd=None, keypoints=None, area=None)),
    "numbers as text": lambda c: each(c, as_text),
    "sizes are floats": lambda c: each(c, lambda i: i.update(width=80.0, height="60"), "images"),
    "no area": lambda c: each(c, lambda a: a.pop("area")),
    "area is no number": lambda c: each(c, lambda a: a.update(area=math.nan)),
    "no box": lambda c: each(c, lambda a: a.pop("bbox")),
    "boxes of zeros": lambda c: each(c, lambda a: a.update(bbox=[0, 0, 0, 0])),
    "flat polygon": lambda c: each(c, lambda a: a.update(segmentation=a["segmentation"][0])),
    "pairs": lambda c: each(c, lambda a: a.update(segmentation=pairs(a["segmentation"][0]))),
    "lists of pairs": lambda c: each(
        c, lambda a: a.update(segmentation=[pairs(a["segmentation"][0])])
    ),
    "run lengths": lambda c: each(c, as_runs),
    "rle without size": lambda c: each(c, without_size),
    "empty keypoints": lambda c: each(c, lambda a: a.update(keypoints=[], num_keypoints=0)),
    "names are numbers": lambda c: [k.update(name=i) for i, k in enumerate(c["categories"])],
    "byte order mark": lambda c: "\ufeff" + json.dumps(c),
}


@pytest.fixture
def scored(tmp_path):
    """Scores of the unchanged annotations as predictions on a changed file."""
    json_file, images, content = write_coco(tmp_path / "set")
    # Boxes as polygons have them, so that those computed are the same.
    for a in content["annotations"]:
        a["segmentation"] = a["segmentation"][:1]
        x, y = a["segmentation"][0][0::2], a["segmentation"][0][1::2]
        a["bbox"] = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    right = json.loads(json.dumps(content))
    name = f"schema_{uuid.uuid4().hex}"

    def run(change):
        result = change(content)
        text = result if isinstance(result, str) else json.dumps(content)
        (tmp_path / "set/data.json").write_text(text, encoding="utf-8")
        file = read_coco_json(json_file, images)
        DatasetCatalog.register(name, lambda: coco_records(file, images))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(file.classes)},
        )
        order = sorted(c["id"] for c in right["categories"])
        evaluator = COCOEvaluator(name, distributed=False)
        evaluator.reset()
        for image, there in zip(right["images"], file.images, strict=True):
            objects = [a for a in right["annotations"] if a["image_id"] == image["id"]]
            instances = Instances((H, W))
            boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32)
            boxes[:, 2:] += boxes[:, :2]
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.linspace(0.9, 0.8, len(objects))
            instances.pred_classes = torch.tensor([order.index(a["category_id"]) for a in objects])
            masks = [
                mask_util.decode(mask_util.merge(mask_util.frPyObjects(a["segmentation"], H, W)))
                for a in objects
            ]
            instances.pred_masks = torch.from_numpy(np.array(masks, bool))
            evaluator.process([{"image_id": there["id"]}], [{"instances": instances}])
        return {task: values["AP"] for task, values in evaluator.evaluate().items()}

    yield run
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_what_has_one_meaning_scores_as_it_should(scored, change):
    assert scored(change) == pytest.approx({"bbox": 100, "segm": 100})


def test_an_object_with_only_a_box_is_scored_as_a_box(scored):
    """It is no miss among the masks, whether a mask is predicted there or not."""
    assert scored(lambda c: c["annotations"][0].update(segmentation=[])) == pytest.approx(
        {"bbox": 100, "segm": 100}
    )


def normalized(change):
    """What is read of one annotation and its category."""
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}],
        "annotations": [{"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    change(content["annotations"][0], content["categories"][0])
    return coco_file("x.json", content)


def with_points(annotation, category, points, **others):
    category.update(keypoints=["a", "b"], **others)
    annotation.update(keypoints=points)


def test_keypoints():
    def read(points, **others):
        return normalized(lambda a, c: with_points(a, c, points, **others))

    file = read([math.nan, 1, 2, 5, 6, 1.0])
    assert file.annotations[0]["keypoints"] == [0, 0, 0, 5, 6, 1]
    assert evaluation_content(file)["annotations"][0]["num_keypoints"] == 1
    assert read([[1, 2, 2], [None, None, 0]]).annotations[0]["keypoints"] == [1, 2, 2, 0, 0, 0]
    assert read([0] * 6, skeleton=[[0, 1]]).categories[0]["skeleton"] == [[1, 2]]
    assert "skeleton" not in read([0] * 6, skeleton=None).categories[0]
    boxless = normalized(lambda a, c: [with_points(a, c, [3, 4, 2, 9, 8, 1]), a.pop("bbox")])
    assert boxless.annotations[0]["bbox"] == [3, 4, 6, 4]


def test_repairs_and_what_is_left_out_are_counted(caplog):
    def change(annotation, _):
        annotation.update(bbox=[0, 0, 0, 0], iscrowd="0")

    with caplog.at_level(logging.INFO):
        assert normalized(change).annotations == []
        normalized(lambda a, _: a.update(iscrowd="0"))
    assert "2 repairs: 1 'iscrowd' of annotations, 1 areas computed" in caplog.text
    assert "left out: 1 (neither box nor mask): id 3." in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [200, 5, 10, 10]},
        {"bbox": [-20, 5, 10, 10]},
        {"bbox": None, "segmentation": [[90, 1, 99, 1, 99, 9]]},
        {"bbox": None, "segmentation": [[1, 1, 5, 5]]},
        {"bbox": None, "segmentation": {"counts": [W * H]}},
        {"bbox": [1, 1, math.nan, 5]},
    ],
)
def test_what_describes_nothing_is_left_out(change):
    assert normalized(lambda a, _: a.update(change)).annotations == []
    # With a box of its own, an object stays when its mask is empty.
    kept = normalized(lambda a, _: a.update({**change, "bbox": [1, 2, 10, 20]})).annotations
    assert len(kept) == 1 and "segmentation" not in kept[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, c: a.update(iscrowd=2), r"'iscrowd' that is not 0 or 1: id 3 \(2\)"),
        (lambda a, c: a.update(bbox=[1, 2, "x", 4]), "not four numbers"),
        (lambda a, c: a.update(segmentation=[[1, 2, math.inf, 3, 4, 5]]), "polygons.*finite.*id 3"),
        (lambda a, c: a.update(segmentation=[1, [2]]), "not polygons"),
        (lambda a, c: a.update(segmentation={"counts": "~"}), "'counts' are run lengths"),
        (lambda a, c: a.update(segmentation={"counts": [1.5]}), "'counts' are run lengths"),
        (
            lambda a, c: a.update(segmentation={"counts": [W * H - 5, 4]}),
            r"id 3 \(4799, image 4800",
        ),
        (
            lambda a, c: a.update(segmentation={"size": [W, H], "counts": [W * H]}),
            r"another height and width.*id 3 \(\[80, 60\], image \[60, 80\]",
        ),
        (lambda a, c: with_points(a, c, [1, 2, 3] * 2), "'keypoints' that is not"),
        (lambda a, c: with_points(a, c, [math.inf, 2, 2] * 2), "'keypoints' that is not"),
        (lambda a, c: with_points(a, c, [0] * 6, flip_pairs=3), "'flip_pairs'.*list of pairs"),
        (lambda a, c: with_points(a, c, [0] * 6, sigmas=[1, -1]), "'sigmas'.*positive"),
        (lambda a, c: c.update(keypoints=["a", "a"]), "different names"),
        (lambda a, c: c.update(name=["x"]), "'name' that is not a text"),
        (lambda a, c: a.update(id={}), "'id' that is not a number or a text"),
    ],
)
def test_the_rest_is_one_error_with_the_place(change, message):
    with pytest.raises(DatasetError, match=rf"(?s)x\.json.*{message}.*Correct the file"):
        normalized(change)


def test_run_lengths():
    """Of pycocotools' compressed form, many and long runs among them."""
    rng = np.random.default_rng(0)
    for density, size in ((0.5, (33, 47)), (0.001, (300, 500)), (1.0, (9, 9)), (0.0, (9, 9))):
        mask = np.asfortranarray(rng.random(size) < density, np.uint8)
        runs = run_lengths(mask_util.encode(mask)["counts"])
        expected = np.repeat(np.arange(len(runs)) % 2, runs)
        np.testing.assert_array_equal(expected, mask.reshape(-1, order="F"))
    assert run_lengths("o") is None and run_lengths("") is None and run_lengths([[1]]) is None
