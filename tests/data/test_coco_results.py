"""Detections in COCO's result format."""

import json

import pytest
from detectron2.data import Metadata

from d2ext.data import DatasetError
from d2ext.data.coco_results import category_ids, read_coco_results


@pytest.fixture
def read(tmp_path):
    def read(entries, *arguments, **options):
        path = tmp_path / "detections.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return read_coco_results(str(path), *arguments, **options)

    return read


def entry(score=None, image_id=3, bbox=(1, 2, 3, 4), **more):
    scored = {} if score is None else {"score": score}
    return {"image_id": image_id, "bbox": list(bbox), **scored, **more}


def test_boxes_of_each_image(read):
    entries = [entry(0.4), entry(0.9, "a", (5, 6, 0, 20)), entry(), entry(0.1)]
    sideless = [entry(0.9, bbox=(5, 6, 0, 0)), entry(0.9, bbox=(5, 6, -3, 20))]
    assert read([*entries, *sideless], 0.2) == {
        3: [([1, 2, 4, 6], 0.4), ([1, 2, 4, 6], 1.0)],
        "a": [([5, 6, 5, 26], 0.9)],
    }
    assert read([]) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotations": []}, "no list of detections"),
        ("[", "not valid JSON"),
        ([{"image_id": 3}], "no detection with image_id, bbox"),
        ([entry(bbox=(1, 2, 3))], "no detection with"),
        ([3], "no detection with"),
    ],
)
def test_problems(read, content, message):
    with pytest.raises(DatasetError, match=rf"(?s)detections\.json.*{message}|{message}"):
        read(content)


def test_only_detections_of_the_data_s_categories_count(read, caplog):
    def scores(entries, categories):
        caplog.clear()
        with caplog.at_level("WARNING", logger="d2ext"):
            result = read([entry(s, **more) for s, more in entries], categories=categories)
        return [s for _, s in result[3]]

    person, ball, unnamed = {"category_id": 1}, {"category_id": 35}, {}
    mixed = [(0.9, ball), (0.8, person), (0.7, unnamed), (0.6, person)]
    assert scores(mixed, {1: 0}) == [0.8, 0.7, 0.6] and not caplog.text
    assert scores(mixed, {35: 0, 2: 1}) == [0.9, 0.7]
    # Categories that the data set does not have are not its: all count, and the log says so.
    assert scores(mixed, {7: 0}) == scores(mixed, None) == [0.9, 0.8, 0.7, 0.6]
    assert "of categories 1, 35: the data set's own are not known" in caplog.text
    scores(mixed, {7: 0})
    assert "own are [7], of which it has none" in caplog.text
    assert scores([(0.5, unnamed), (0.4, unnamed)], {1: 0}) == [0.5, 0.4] and not caplog.text


def test_ids_of_categories():
    # COCO's own ids where the data set's file has not been read.
    assert category_ids(Metadata(thing_classes=["person"])) == {1}
    assert category_ids(Metadata(thing_classes=["sports ball", "face"])) == {37}
    mapping = {5: 0, 9: 1}
    own = Metadata(thing_classes=["person"], thing_dataset_id_to_contiguous_id=mapping)
    assert category_ids(own) == {5, 9}
    assert category_ids(Metadata(thing_classes=["face"])) is category_ids(Metadata()) is None
