"""Landmark metrics: values worked out by hand, the published PCK table, and the evaluator."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, BoxMode, Instances

from d2ext.config import get_cfg
from d2ext.data.errors import DatasetError
from d2ext.data.landmarks import LANDMARK_DATASETS, landmark_metadata
from d2ext.evaluation import COCOEvaluator, LandmarkEvaluator, build_evaluator
from d2ext.evaluation.landmark_metrics import (
    area_under_curve,
    distances,
    failure_rate,
    instance_nme,
    pck,
    pck_counts,
    point_distance,
)
from d2ext.evaluation.landmarks import instance_norm
from tests.reference.fixture import Fixture, draw_tensor

NAN, INF = math.nan, math.inf


def test_distances():
    targets = np.array([[[0.0, 0, 2], [10, 10, 1], [5, 5, 0]], [[1, 1, 2], [2, 2, 2], [0, 0, 0]]])
    predicted = np.array([[[3.0, 4], [10, 10], [0, 0]], [[NAN, NAN], [2, 3], [NAN, 1]]])
    np.testing.assert_array_equal(distances(predicted, targets), [[5, 0, NAN], [INF, 1, NAN]])


def test_pck_by_hand():
    errors = np.array([[0.0, 5.0, NAN], [10.0, INF, 4.9]])
    norms = np.array([10.0, 20.0])
    # Half of the norm: 5 and 10. Equal counts, unless strict.
    hits, labelled = pck_counts(errors, norms, 0.5)
    assert hits.tolist() == [2, 1, 1] and labelled.tolist() == [2, 2, 1]
    assert pck(errors, norms, 0.5) == pytest.approx(4 / 5)
    assert pck(errors, norms, 0.5, strict=True) == pytest.approx(2 / 5)
    assert pck(errors, norms, 0.5, landmarks=[1]) == pytest.approx(1 / 2)
    # Instances without a norm do not count; nothing left is no number.
    assert pck(errors, np.array([NAN, 20.0]), 0.5) == pytest.approx(2 / 3)
    assert math.isnan(pck(errors, np.array([0.0, -1.0]), 0.5))


def test_nme_failures_and_area_by_hand():
    errors = np.array([[1.0, 3.0, NAN], [10.0, INF, 10.0], [NAN, NAN, NAN], [1.0, 1.0, 1.0]])
    norms = np.array([100.0, 100.0, 100.0, NAN])
    nmes = instance_nme(errors, norms)
    # (1 % + 3 %) / 2; (10 % + 100 % + 10 %) / 3; the others have no labelled point or no norm.
    np.testing.assert_allclose(nmes, [0.02, 0.4, NAN, NAN])
    assert failure_rate(nmes, 0.08) == 0.5 and failure_rate(nmes, 0.41) == 0
    # The curve is 0 below 0.02, then 1/2 up to 0.08: area 0.03, of 0.08.
    assert area_under_curve(nmes, 0.08) == pytest.approx(0.03 / 0.08)
    steps = np.linspace(0, 0.08, 80001)
    curve = [(nmes[:2] <= t).mean() for t in steps]
    assert area_under_curve(nmes, 0.08) == pytest.approx(np.mean(curve), abs=1e-4)
    assert math.isnan(failure_rate(np.array([NAN]), 0.1))
    assert math.isnan(area_under_curve(np.array([]), 0.1))


HOURGLASS_GROUPS = (
    *(range(16), (0, 5), (1, 4), (2, 3), (6,), (7,), (8,), (9,)),
    *((10, 15), (11, 14), (12, 13)),
)


def hourglass_people():
    """The 24 people of the published PCK table: targets, predictions, visible, norms."""
    targets = np.zeros((24, 16, 3))
    targets[..., :2] = 200 + 60 * draw_tensor("gt", (24, 1, 16, 2), 1)[:, 0]
    visible = draw_tensor("visible", (24, 1, 16), 1)[:, 0] > -0.5
    missing = draw_tensor("missing", (24, 1, 16), 1)[:, 0] > 1.0
    predicted = targets[..., :2] + 18 * draw_tensor("noise", (24, 1, 16, 2), 1)[:, 0]
    heads = 60 + 10 * np.abs(draw_tensor("normalize", (24,), 1).astype(np.float64))
    targets[..., 2] = 1
    targets[missing] = 0
    visible[missing] = False
    return targets, predicted, visible, heads


def published_pck():
    return Fixture(
        Path(__file__).resolve().parents[1] / "reference/hourglass/data_and_eval"
    ).expected


def test_the_published_pck_table():
    """PCK at 0.5 of the published stacked hourglass code: strict, all annotated joints, pooled sides."""
    targets, predicted, visible, heads = hourglass_people()
    expected = published_pck()
    for name, people in (("training", slice(0, 4)), ("validation", slice(4, 24))):
        for row, keep in enumerate((visible | ~visible, visible, ~visible)):
            selected = targets.copy()
            selected[~keep] = 0
            errors = distances(predicted, selected)[people]
            hits, labelled = pck_counts(errors, heads[people], 0.5, strict=True)
            for column, group in enumerate(HOURGLASS_GROUPS):
                place = row, column
                count = labelled[list(group)].sum()
                assert count == expected[f"pck_{name}_counts"][place]
                share = round(hits[list(group)].sum() / max(count, 1), 3)
                assert share == pytest.approx(expected[f"pck_{name}"][place], abs=1e-6)


@pytest.mark.parametrize("name, people", [("training", slice(0, 4)), ("validation", slice(4, 24))])
def test_the_published_pck_from_the_evaluator(name, people, tmp_path):
    """The same through a registered data set of MPII's kind, by the metric that it asks for."""
    targets, predicted, _, heads = (x[people] for x in hourglass_people())
    records = [
        {
            "image_id": i,
            "annotations": [
                annotation(points.tolist(), [0, 0, 400, 400], id=i, person_scale=head / 25)
            ],
        }
        for i, (points, head) in enumerate(zip(targets, heads, strict=True))
    ]
    dataset = "landmarks_test_hourglass"
    DatasetCatalog.register(dataset, lambda: records)
    MetadataCatalog.get(dataset).set(**landmark_metadata(LANDMARK_DATASETS["mpii"]))
    try:
        pairs = []
        for i, points in enumerate(predicted):
            output = Instances((400, 400))
            output.pred_keypoints = torch.from_numpy(np.pad(points, ((0, 0), (0, 1))))[None]
            pairs.append(({"image_id": i}, output))
        results = run(LandmarkEvaluator(dataset, output_dir=str(tmp_path)), *pairs)
        expected, counts = (published_pck()[f"pck_{name}{x}"][0] for x in ("", "_counts"))
        assert results["PCK_hourglass@0.5"] == pytest.approx(100 * expected[0], abs=0.051)
        table = json.loads((tmp_path / "landmark_results.json").read_text())["landmarks"]
        column = list(table["PCK_hourglass@0.5 (%)"].values())
        for group, share, count in zip(HOURGLASS_GROUPS, expected, counts, strict=True):
            if len(group) == 1 and count:
                assert column[group[0]] == pytest.approx(100 * share, abs=0.051)
        # An error of just half the unit is no hit.
        del records[1:]
        records[0]["annotations"][0].update(
            person_scale=1.0, keypoints=[100.0, 100, 2] + 45 * [0.0]
        )
        for error, hits in ((12.5, 0), (12.4, 100)):
            pairs[0][1].pred_keypoints = torch.full((1, 16, 3), 100.0)
            pairs[0][1].pred_keypoints[0, 0, 0] += error
            assert run(LandmarkEvaluator(dataset), pairs[0])["PCK_hourglass@0.5"] == hits
        del records[0]["annotations"][0]["person_scale"]
        assert "PCK_hourglass@0.5" not in run(LandmarkEvaluator(dataset), pairs[0])
        with pytest.raises(DatasetError, match="person_scale"):
            run(LandmarkEvaluator(dataset, ["pck_hourglass"]), pairs[0])
    finally:
        DatasetCatalog.remove(dataset)
        MetadataCatalog.remove(dataset)


def test_norms():
    annotation = {
        "bbox": [10.0, 20.0, 30.0, 40.0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "box_size": 7.0,
        "head_box": [0.0, 0.0, 6.0, 8.0],
        "person_scale": 2.0,
    }
    targets = np.zeros((2, 4, 3))
    targets[0] = [[0, 0, 2], [2, 0, 2], [1, 4, 1], [9, 9, 0]]
    targets[1] = targets[0]
    targets[1, 1, 2] = 0
    norms = {"eyes": ((0, 1), (2,))}
    norms_by_name = {
        name: instance_norm(name, [annotation] * 2, targets, norms).tolist()
        for name in ("box", "side", "diagonal", "box_size", "head", "hourglass")
    }
    assert norms_by_name == {
        "box": [pytest.approx(math.sqrt(1200))] * 2,
        "side": [40.0] * 2,
        "diagonal": [50.0] * 2,
        "box_size": [7.0] * 2,
        "head": [pytest.approx(6.0)] * 2,
        "hourglass": [50.0] * 2,
    }
    # An eye that is not labelled gives no norm.
    eyes = instance_norm("eyes", [annotation] * 2, targets, norms)
    np.testing.assert_array_equal(eyes, [4.0, NAN])
    np.testing.assert_array_equal(point_distance(targets, (0,), (1,)), [2.0, NAN])
    with pytest.raises(DatasetError, match="choose from box, side"):
        instance_norm("eye", [annotation], targets, norms)
    with pytest.raises(DatasetError, match="head_box"):
        instance_norm("head", [{"bbox": [0, 0, 1, 1]}], targets, norms)


def annotation(points, box, **extra):
    return {
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "area": (box[2] - box[0]) * (box[3] - box[1]),
        "keypoints": [float(v) for p in points for v in p],
        **extra,
    }


@pytest.fixture
def faces():
    """Two images with three faces of four points, the first two of which are the eyes."""
    name = "landmarks_test_faces"
    a = [(10, 10, 2), (30, 10, 2), (20, 20, 1), (0, 0, 0)]
    b = [(110, 10, 2), (150, 10, 2), (130, 30, 2), (130, 40, 2)]
    c = [(10, 10, 2), (20, 10, 2), (15, 15, 2), (15, 20, 2)]
    records = [
        {
            "file_name": "0.png",
            "image_id": 0,
            "height": 100,
            "width": 200,
            "annotations": [
                annotation(a, [0, 0, 40, 40], id=5, attributes={"blur": True}),
                annotation(b, [100, 0, 180, 80], id=6, attributes={"blur": False}),
                annotation([(0, 0, 0)] * 4, [0, 0, 5, 5], id=7),
            ],
        },
        {
            "file_name": "1.png",
            "image_id": 1,
            "height": 100,
            "width": 200,
            "annotations": [annotation(c, [0, 0, 30, 30], id=8)],
        },
        {"file_name": "2.png", "image_id": 2, "height": 100, "width": 200, "annotations": []},
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        thing_classes=["face"],
        keypoint_names=["left_eye", "right_eye", "nose", "chin"],
        evaluator_type="landmarks",
        landmark_norm="inter_ocular",
        landmark_norms={"inter_ocular": ((0,), (1,))},
        landmark_failure=0.1,
        keypoint_oks_sigmas=(0.1,) * 4,
    )
    yield name, records
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)


def instances(points, boxes=None, ids=None) -> Instances:
    result = Instances((100, 200))
    points = torch.tensor(points, dtype=torch.float32).reshape(-1, 4, 2)
    result.pred_keypoints = torch.cat([points, torch.ones(len(points), 4, 1)], dim=2)
    result.scores = torch.ones(len(points))
    result.pred_classes = torch.zeros(len(points), dtype=torch.int64)
    if boxes is not None:
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    if ids is not None:
        result.instance_ids = torch.tensor(ids)
    return result


A = [(12.0, 10), (30, 10), (20, 20), (77, 77)]  # one error of 2: 10 % of the 20 between the eyes
B = [(110.0, 10), (150, 14), (130, 30), (130, 40)]  # one of 4: 10 % of 40


def given_boxes(count):
    boxes = Instances((100, 200))
    boxes.gt_boxes = Boxes(torch.zeros(count, 4))
    return boxes


def run(evaluator, *pairs):
    evaluator.reset()
    for one_input, output in pairs:
        evaluator.process([one_input], [{"instances": output}])
    return evaluator.evaluate()["landmarks"]


def test_evaluator_by_hand(faces, tmp_path, caplog):
    name, _ = faces
    evaluator = LandmarkEvaluator(name, output_dir=str(tmp_path / "new"))
    with caplog.at_level(logging.INFO):
        results = run(
            evaluator,
            ({"image_id": 0, "instances": given_boxes(2)}, instances([A, B])),
            ({"image_id": 2}, instances([A])),  # nobody is annotated there
        )
    # Faces: 10 % / 3 and 10 % / 4; the third was not detected: 100 %.
    assert results["NME"] == pytest.approx((10 / 3 + 10 / 4 + 100) / 3)
    assert results["FR@0.1"] == pytest.approx(100 / 3)
    assert results["AUC@0.1"] == pytest.approx(((1 - 1 / 3) + (1 - 1 / 4)) / 3 * 100)
    assert results["missing"] == pytest.approx(100 / 3)
    assert results["NME-blur"] == pytest.approx(10 / 3)
    assert results["NME_box"] == pytest.approx((200 / 40 / 3 + 400 / 80 / 4 + 100) / 3)
    assert results["NME_diagonal"] == pytest.approx(
        (200 / math.sqrt(3200) / 3 + 400 / math.sqrt(12800) / 4 + 100) / 3
    )
    # Of 11 labelled landmarks, the 4 of the third face are missed; errors 2 of 40 and 4 of 80 are on
    # the limit of 0.05.
    assert results["PCK@0.05"] == results["PCK@0.2"] == pytest.approx(700 / 11)
    assert results["NME-left_eye"] == pytest.approx((10 + 0 + 100) / 3)
    assert results["NME-chin"] == pytest.approx((0 + 100) / 2)
    assert "| left_eye" in caplog.text
    written = json.loads((tmp_path / "new/landmark_results.json").read_text())
    assert written["results"]["NME"] == results["NME"] and written["instances"] == 3
    assert written["landmarks"]["PCK@0.1 (%)"]["nose"] == pytest.approx(200 / 3)
    assert evaluator.instance_nme == pytest.approx([1 / 30, 1 / 40, 1.0])
    assert [a["id"] for a in evaluator.annotations] == [5, 6, 8]


def test_matching(faces):
    name, _ = faces
    evaluator = LandmarkEvaluator(name, ["pck"])
    box = [[100, 0, 180, 80], [0, 0, 40, 40]]

    def score(output, **more):
        return run(evaluator, ({"image_id": 0, **more}, output))["PCK@0.2"]

    both = pytest.approx(700 / 11)
    assert score(instances([B, A], ids=[6, 5])) == both
    assert score(instances([B, A, A], ids=[6, 5, 99])) == both
    assert score(instances([B, A], boxes=box)) == both
    assert score(instances([A, B]), instances=given_boxes(2)) == both
    assert score(instances([B, A], boxes=box), instances=given_boxes(3)) == both  # not in order
    # The wrong order is not repaired, and boxes that overlap nothing belong to nobody.
    assert score(instances([B, A]), instances=given_boxes(2)) == 0
    assert score(instances([A, B], boxes=[[150, 60, 190, 90]] * 2)) == 0
    # Two predictions for one face: the better box has it.
    boxes = [[0, 0, 40, 30], [0, 0, 40, 40]]
    assert score(instances([B, A], boxes=boxes)) == pytest.approx(300 / 11)
    with pytest.raises(ValueError, match="cannot be matched"):
        score(instances([B, A]))
    # A single face needs no box.
    results = run(
        evaluator, ({"image_id": 1}, instances([[(10, 10), (20, 10), (15, 15), (15, 20)]]))
    )
    assert results["PCK@0.05"] == pytest.approx(400 / 11)


def test_nothing_predicted(faces):
    name, _ = faces
    results = run(LandmarkEvaluator(name), ({"image_id": 0}, instances([])))
    assert results["NME"] == results["missing"] == 100 and results["PCK@0.2"] == 0


def test_wrong_use_is_a_clear_error(faces):
    name, records = faces
    evaluator = LandmarkEvaluator(name)
    output = instances([A])
    output.pred_keypoints = torch.zeros(1, 17, 3)
    with pytest.raises(ValueError, match=r"17 landmarks, data set .* has 4"):
        evaluator.process([{"image_id": 1}], [{"instances": output}])
    output.remove("pred_keypoints")
    with pytest.raises(ValueError, match="no pred_keypoints"):
        evaluator.process([{"image_id": 1}], [{"instances": output}])
    with pytest.raises(DatasetError, match=r"Unknown landmark metrics \['ap'\]"):
        LandmarkEvaluator(name, ["ap"])
    with pytest.raises(DatasetError, match="head boxes: register it with head_boxes"):
        LandmarkEvaluator(name, ["pckh"])
    with pytest.raises(DatasetError, match="Unknown norm"):
        LandmarkEvaluator(name, norm="eyes")
    for record in records:
        record["annotations"] = []
    with pytest.raises(DatasetError, match="no labelled landmark"):
        LandmarkEvaluator(name)


def test_pckh(faces):
    name, records = faces
    for record in records:
        for one in record["annotations"]:
            one["head_box"] = [0, 0, 6, 8]  # 0.6 of the diagonal: 6
    MetadataCatalog.get(name).set(landmark_metrics=("pckh",), landmark_not_scored=(0,))
    results = run(LandmarkEvaluator(name), ({"image_id": 0}, instances([A, B], ids=[5, 6])))
    # Without the left eye there are 8 landmarks; of the 5 of the first two faces, 4 off by 4 of 6.
    assert (
        results["PCKh@0.5"] == pytest.approx(400 / 8) and results["PCKh@0.1"] == results["PCKh@0.5"]
    )
    # The left eye's own value is there nevertheless: off by 2 of 6, right, missing.
    assert results["PCKh@0.1-left_eye"] == pytest.approx(100 / 3)


def test_mpii_without_head_boxes_says_what_it_does(caplog):
    name = "landmarks_test_mpii"
    points = [(i, 2 * i, 2) for i in range(16)]
    record = {"image_id": 0, "annotations": [annotation(points, [0, 0, 20, 40], id=1)]}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(**landmark_metadata(LANDMARK_DATASETS["mpii"]))
    try:
        with caplog.at_level(logging.WARNING):
            evaluator = LandmarkEvaluator(name)
        assert "has no head boxes" in caplog.text
        output = Instances((100, 200))
        # Neck to head top is sqrt(5) = 2.24 pixels; half of it 1.12.
        moved = torch.tensor(points, dtype=torch.float32)
        moved[0, 0] += 1.1
        moved[1, 0] += 1.2
        moved[6, 0] += 50  # the pelvis does not count
        output.pred_keypoints = moved[None]
        results = run(evaluator, ({"image_id": 0}, output))
        assert results["PCKh@0.5"] == pytest.approx(100 * 13 / 14)
        # Other metrics of the same data need no head.
        assert "PCKh@0.5" not in run(LandmarkEvaluator(name, ["pck"]), ({"image_id": 0}, output))
        nme = run(LandmarkEvaluator(name, ["nme"]), ({"image_id": 0}, output))
        assert nme["NME"] == pytest.approx(100 * (1.1 + 1.2 + 50) / 16 / math.sqrt(5))
        assert "NME" not in results and results["PCK@0.2"] == pytest.approx(100 * 15 / 16)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def test_build_evaluator_chooses_by_metadata(faces, tmp_path):
    name, _ = faces
    cfg = get_cfg()
    evaluator = build_evaluator(cfg, name, str(tmp_path))
    assert isinstance(evaluator, LandmarkEvaluator)
    MetadataCatalog.get(name).set(landmark_metrics=("oks", "pck"))
    evaluator = build_evaluator(cfg, name, str(tmp_path))
    assert isinstance(evaluator, DatasetEvaluators)
    landmark, coco = evaluator._evaluators
    assert isinstance(landmark, LandmarkEvaluator) and isinstance(coco, COCOEvaluator)
    evaluator.reset()
    box = [[0, 0, 40, 40], [100, 0, 180, 80]]
    points = [(10.0, 10), (30, 10), (20, 20), (0, 0)]
    pairs = [
        ({"image_id": 0}, instances([points, B], boxes=box, ids=[5, 6])),
        ({"image_id": 1}, instances([], boxes=torch.zeros(0, 4).tolist())),
        ({"image_id": 2}, instances([], boxes=torch.zeros(0, 4).tolist())),
    ]
    for one_input, output in pairs:
        if len(output) == 0:
            output.pred_boxes = Boxes(torch.zeros(0, 4))
        evaluator.process([one_input], [{"instances": output}])
    results = evaluator.evaluate()
    # Face b: 4 pixels off at one of 4 points: exp(-16 / (2 * 6400 * 0.2^2)) = 0.969. Two of three
    # faces are hit at every threshold.
    assert 60 < results["keypoints"]["AP"] < 70
    assert results["landmarks"]["PCK@0.2"] == pytest.approx(700 / 11)


@pytest.mark.parametrize("kind", ["coco", "wflw"])
def test_perfect_predictions_on_real_annotations(kind, real_data, tmp_path):
    from d2ext.data.landmarks import register_landmarks

    root = real_data / "landmarks" / kind
    name = f"landmarks_test_{kind}"
    register_landmarks(name, kind, str(root / f"{kind}_keypoints.json"), str(root / "images"))
    try:
        evaluator = build_evaluator(get_cfg(), name, str(tmp_path))
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            annotations = [a for a in record["annotations"] if a["num_keypoints"]]
            output = Instances((record["height"], record["width"]))
            output.pred_keypoints = torch.tensor([a["keypoints"] for a in annotations]).reshape(
                len(annotations), -1, 3
            )
            output.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in annotations]))
            output.scores = torch.ones(len(annotations))
            output.pred_classes = torch.zeros(len(annotations), dtype=torch.int64)
            evaluator.process([record], [{"instances": output}])
        results = evaluator.evaluate()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)
    assert results["landmarks"]["PCK@0.05"] == 100
    if kind == "coco":
        assert results["keypoints"]["AP"] == pytest.approx(100)
    else:
        assert results["landmarks"]["NME"] == pytest.approx(0, abs=1e-4)
        assert results["landmarks"]["AUC@0.1"] == pytest.approx(100, abs=1e-2)
