"""The WIDER FACE protocol, against the fixture, naive loops and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from d2ext.data.errors import DatasetError
from d2ext.evaluation.build import build_evaluator
from d2ext.evaluation.wider_face import (
    SETTINGS,
    WiderFaceEvaluator,
    WiderImage,
    count_matches,
    find_wider_mat,
    match_image,
    pixel_iou,
    read_wider_mat,
    read_wider_results,
    wider_curves,
    wider_detections,
    write_wider_results,
)
from tests.reference.fixture import Fixture

FIXTURE = Fixture(Path(__file__).parents[1] / "reference" / "retinaface" / "wider_eval")


def fixture_images() -> tuple[dict[str, WiderImage], dict[str, np.ndarray]]:
    images, detections = {}, {}
    for event in FIXTURE.manifest["inputs"]["data"]:
        for image in event["images"]:
            key = f"{event['event']}/{image['name']}"
            boxes = np.array(image["gt"], dtype=np.float64).reshape(-1, 4)
            counts = {s: np.isin(np.arange(len(boxes)) + 1, image[s]) for s in SETTINGS}
            images[key] = WiderImage(boxes, counts)
            detections[key] = np.array(image["pred"], dtype=np.float64).reshape(-1, 5)
    return images, detections


def test_published_curves() -> None:
    images, detections = fixture_images()
    curves = wider_curves(detections, images)
    assert list(curves) == list(SETTINGS)
    for curve, expected in zip(curves.values(), FIXTURE.expected["ap"], strict=True):
        assert curve.ap == pytest.approx(expected, abs=1e-7)
    for setting, curve in curves.items():
        proposes = FIXTURE.expected[f"precision_{setting}"]
        np.testing.assert_allclose(curve.precision, proposes, atol=1e-7)
        np.testing.assert_allclose(curve.recall, FIXTURE.expected[f"recall_{setting}"], atol=1e-7)


def test_published_matching() -> None:
    images, detections = fixture_images()
    for e in range(2):
        of_event = [key for key in images if key.startswith(f"{e}--")]
        for j, key in enumerate(of_event):
            if len(detections[key]) == 0:
                continue
            faces = match_image(pixel_iou(detections[key][:, :4], images[key].boxes))
            finds, proposed = count_matches(faces, images[key].counts["medium"])
            expected = FIXTURE.expected[f"medium_recalled_{e}_{j}"]
            np.testing.assert_array_equal(finds.cumsum(), expected)
            expected = FIXTURE.expected[f"medium_counts_as_proposal_{e}_{j}"]
            np.testing.assert_array_equal(np.where(proposed, 1, -1), expected)


def image_of(boxes: list[list[float]], counts: list[bool]) -> WiderImage:
    return WiderImage(np.array(boxes, float).reshape(-1, 4), {"all": np.array(counts, bool)})


def test_0_over_0() -> None:
    images = {"a": image_of([[0, 0, 9, 9], [50, 50, 9, 9]], [False, True])}
    # The best detection is on a face that does not count: at first nothing is proposed.
    rows = np.array([[0, 0, 9, 9, 0.9], [50, 50, 9, 9, 0.5]])
    curve = wider_curves({"a": rows}, images)["all"]
    assert curve.precision[0] == 1 and curve.recall[0] == 0
    assert curve.ap == 1
    assert wider_curves({"a": rows[1:]}, images)["all"].ap == 1  # one score: no range
    assert wider_curves({}, images)["all"].ap == 0
    none = wider_curves({"a": rows}, {"a": image_of([[0, 0, 9, 9]], [False])})["all"]
    assert np.isnan(none.ap)
    # Detections of an image without faces are left out, but their scores are of the set.
    empty = {**images, "b": image_of([], [])}
    assert wider_curves({"a": rows, "b": rows}, empty)["all"].ap == 1


def test_second_hit_is_wrong_and_order_is_of_scores() -> None:
    images = {"a": image_of([[0, 0, 9, 9]], [True])}
    rows = np.array([[0, 0, 9, 9, 0.1], [0, 0, 9, 8, 0.9]])  # rising scores
    curve = wider_curves({"a": rows}, images)["all"]
    assert curve.precision[0] == 1 and curve.precision[-1] == 0.5 and curve.ap == 1
    with pytest.raises(ValueError, match="unknown images: 'b'"):
        wider_curves({"b": rows}, images)


def test_text_files(tmp_path: Path) -> None:
    _, detections = fixture_images()
    write_wider_results(detections, str(tmp_path))
    lines = (tmp_path / "0--Synthetic" / "0_Synthetic_0.txt").read_text().splitlines()
    assert lines[:3] == ["0_Synthetic_0", "12", "254 228 62 62 0.84019"]
    again = read_wider_results(str(tmp_path))
    assert again.keys() == detections.keys()
    for key, rows in detections.items():
        np.testing.assert_array_equal(again[key], rows)
    bad = tmp_path / "1--Synthetic" / "1_Synthetic_2.txt"
    bad.write_text("name\n1\n1 2 3 x 0.5\n")
    with pytest.raises(DatasetError, match=r"Line 3 of '.*' is not 'x y w h score'"):
        read_wider_results(str(tmp_path))
    bad.write_text("name\n2\n1 2 3 4 0.5\n")
    with pytest.raises(DatasetError, match="number of detections \\(1 follow\\)"):
        read_wider_results(str(tmp_path))
    with pytest.raises(DatasetError, match=r"no \.txt"):
        read_wider_results(str(tmp_path / "nothing"))


def instances(boxes: list[list[float]], scores: list[float]) -> Instances:
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.tensor(scores),
    )


def test_coordinates_are_cut() -> None:
    rows = wider_detections(instances([[1.9, -1.9, 5.2, 7.9], [1, 1, 2, 2]], [0.25, 0.5]))
    assert rows.tolist() == [[1, 1, 1, 1, 0.5], [1, -1, 4, 8, 0.25]]


@pytest.fixture
def registered(tmp_path: Path):
    def face(x: float, crowd: int = 0, height: float = 20) -> dict:
        box = [x, 10, x + 20, 10 + height]
        return {
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 0,
            "iscrowd": crowd,
        }

    records = [
        {
            "file_name": str(tmp_path / "images" / "0--Parade" / "a.jpg"),
            "image_id": 0,
            "annotations": [face(10), face(50, crowd=1), face(80, height=8)],
        },
        {"file_name": str(tmp_path / "images" / "0--Parade" / "b.jpg"), "image_id": 1},
    ]
    DatasetCatalog.register("wider_test", lambda: records)
    MetadataCatalog.get("wider_test").set(
        image_root=str(tmp_path / "images"),
        dataset_root=str(tmp_path),
        evaluator_type="wider_face",
    )
    yield records
    DatasetCatalog.remove("wider_test")
    MetadataCatalog.pop("wider_test")


def test_evaluator_without_official_files(registered, tmp_path: Path, caplog) -> None:
    evaluator = WiderFaceEvaluator("wider_test", str(tmp_path / "out"))
    assert "one setting 'all'" in caplog.text
    evaluator.reset()
    hits = instances([[10, 10, 30, 30], [50, 10, 70, 30], [0, 60, 9, 69]], [0.6, 0.9, 0.3])
    evaluator.process(registered, [{"instances": hits}, {"instances": instances([], [])}])
    results = evaluator.evaluate()
    assert results == {"wider_face": {"AP-all": 100.0}}
    assert "8 to 11 points" in caplog.text
    path = tmp_path / "out" / "wider_face" / "0--Parade" / "a.txt"
    outputs = [{"instances": instances([[0.1, 0.2, 0.9, 0.9]], [0.5])}]
    assert path.read_text() == (
        "a\n3\n50 10 20 20 0.899999976\n10 10 20 20 0.600000024\n0 60 9 9 0.300000012\n"
    )
    evaluator.reset()
    evaluator.process(registered[:1], outputs)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        evaluator.evaluate()


def write_mat(folder: Path, counted: dict[str, list[int]]) -> None:
    scipy_io = pytest.importorskip("scipy.io")

    def cells(*values: object) -> np.ndarray:
        array = np.empty((len(values), 1), dtype=object)
        for i, value in enumerate(values):
            array[i, 0] = value
        return array

    folder.mkdir()
    names, boxes = cells("a", "b"), cells(np.array([[10, 10, 20, 20], [50, 10, 20, 20]]), [])
    content = {
        "event_list": cells("0--Parade"),
        "file_list": cells(names),
        "face_bbx_list": cells(boxes),
    }
    scipy_io.savemat(folder / "wider_face_val.mat", content)
    for setting, numbers in counted.items():
        rows = cells(cells(np.array(numbers, np.uint8).reshape(-1, 1), np.zeros((0, 1))))
        scipy_io.savemat(folder / f"wider_{setting}_val.mat", {"gt_list": rows})


def test_evaluator_with_official_files(registered, tmp_path: Path) -> None:
    write_mat(tmp_path / "ground_truth", {"easy": [2], "medium": [], "hard": [1, 2]})
    evaluator = WiderFaceEvaluator("wider_test")
    evaluator.reset()
    hits = instances([[50, 10, 70, 30], [0, 60, 9, 69]], [0.6, 0.05])
    evaluator.process(registered, [{"instances": hits}, {"instances": instances([], [])}])
    results = evaluator.evaluate()["wider_face"]
    assert results["AP-easy"] == 100 and results["AP-hard"] == 50
    assert np.isnan(results["AP-medium"])


def test_broken_official_file(tmp_path: Path) -> None:
    write_mat(tmp_path / "gt", {setting: [1] for setting in SETTINGS})
    (tmp_path / "gt" / "wider_easy_val.mat").write_bytes(b"no")
    assert find_wider_mat(str(tmp_path)) is None
    assert find_wider_mat(str(tmp_path / "gt")) is not None
    with pytest.raises(DatasetError, match=r"wider_easy_val\.mat' is no file of WIDER"):
        read_wider_mat(str(tmp_path / "gt"))


def test_registered(registered) -> None:
    from d2ext import get_cfg

    assert isinstance(build_evaluator(get_cfg(), "wider_test", ""), WiderFaceEvaluator)
