"""Box AP by size, NME of points and meshes, and their baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from d2ext import get_cfg
from d2ext.data.faces import face_metadata
from d2ext.evaluation.build import build_evaluator
from d2ext.evaluation.faces import FaceEvaluator, from_box, in_box, match_faces

NAME = "faces_to_evaluate"
# Relative to the box: x, y of the five points; the mesh is a triangle.
FIVE = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
MESH = np.array([[0.0, 0.5, 0.2], [1.0, 0.5, 0.2], [0.5, 0.5, -0.4]])


def face(x: float, y: float, w: float, h: float, shift: float = 0.0, **more: Any) -> dict[str, Any]:
    """``shift``: of all points and vertices to the right, over w."""
    box = np.array([[x, y, x + w, y + h]], dtype=float)
    points = from_box(FIVE + [shift, 0], box)[0]
    return {
        "bbox": box[0].tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "keypoints": np.column_stack([points, np.full(5, 2)]).ravel().tolist(),
        "mesh": from_box(MESH + [shift, 0, 0], box)[0].ravel().tolist(),
        **more,
    }


@pytest.fixture
def register():
    def add(*images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        records = [
            {
                "file_name": f"{i}.png",
                "image_id": i,
                "height": 200,
                "width": 200,
                "annotations": faces,
            }
            for i, faces in enumerate(images)
        ]
        DatasetCatalog.register(NAME, lambda: records)
        MetadataCatalog.get(NAME).set(
            evaluator_type="faces", mesh_flip=[1, 0, 2], mesh_file="head.obj", **face_metadata()
        )
        return records

    yield add
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


def predict(faces: list[dict[str, Any]], scores: list[float] | None = None) -> dict[str, Any]:
    """Predictions that are these annotations."""
    n = len(faces)
    meshes = [np.reshape(f["mesh"], (3, 3)) for f in faces]
    return {
        "instances": Instances(
            (200, 200),
            pred_boxes=Boxes(torch.tensor([f["bbox"] for f in faces]).reshape(-1, 4)),
            scores=torch.tensor([0.9] * n if scores is None else scores),
            pred_classes=torch.zeros(n, dtype=torch.int64),
            pred_keypoints=torch.tensor([f["keypoints"] for f in faces]).reshape(-1, 5, 3),
            pred_face_meshes=torch.tensor(np.array(meshes).reshape(-1, 3, 3)),
        )
    }


def evaluate(records, *outputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    evaluator = FaceEvaluator(NAME, **options)
    evaluator.reset()
    evaluator.process(records, list(outputs))
    return evaluator.evaluate()


def test_errors_and_baselines(register) -> None:
    # In the mean of the two faces the points are where no shift puts them.
    faces = [face(10, 10, 20, 20, shift=0.1), face(100, 100, 40, 40, shift=-0.1)]
    records = register(faces)
    predicted = [face(10, 10, 20, 20, shift=0.15), face(100, 100, 40, 40, shift=-0.1)]
    results = evaluate(records, predict(predicted))
    assert results["bbox"]["AP"] == pytest.approx(100)
    for kind in ("points", "mesh"):
        scores = results[kind]
        assert scores["NME-all"] == pytest.approx(2.5)
        assert scores["baseline-all"] == pytest.approx(10)
        assert scores["NME-16to32"] == pytest.approx(5)
        assert scores["NME-32to64"] == pytest.approx(0, abs=1e-5)
        assert scores["recall-all"] == 100 and scores["failures-all"] == 0
        assert np.isnan(scores["NME-from128"])
    results = evaluate(records, predict(predicted), failure=0.04)
    assert results["points"]["failures-all"] == 50


def test_depth_counts(register) -> None:
    records = register([face(10, 10, 20, 20)])
    predicted = face(10, 10, 20, 20)
    mesh = np.reshape(predicted["mesh"], (3, 3)) + [0, 0, 4]
    results = evaluate(records, predict([{**predicted, "mesh": mesh}]))
    assert results["mesh"]["NME-all"] == pytest.approx(20)
    assert results["mesh"]["baseline-all"] == pytest.approx(0, abs=1e-6)
    assert results["points"]["NME-all"] == pytest.approx(0, abs=1e-5)


def test_the_baseline_is_pasted_into_the_predicted_box(register) -> None:
    records = register([face(10, 10, 20, 20)])
    results = evaluate(records, predict([face(12, 10, 20, 20)]))
    assert results["points"]["baseline-all"] == pytest.approx(10)
    assert results["points"]["NME-all"] == pytest.approx(10)


def test_recall_by_size(register) -> None:
    faces = [face(10, 10, 10, 10), face(50, 50, 16, 16), face(100, 100, 40, 40)]
    records = register(faces, [])
    # Of the second image, which has no face, one is wrong.
    results = evaluate(records, predict(faces[1:], [0.3, 0.9]), predict(faces[:1], [0.5]))
    scores = results["faces"]
    assert scores["recall-all"] == pytest.approx(200 / 3) and scores["recall-0to16"] == 0
    assert scores["AP50-from16"] == pytest.approx(100)  # the wrong one is small
    assert scores["AP50-0to16"] == 0 and scores["AP50-16to32"] == pytest.approx(100)
    assert scores["AP50-all"] == pytest.approx((34 * 100 + 33 * 200 / 3) / 101)
    assert results["points"]["recall-from16"] == 100
    assert np.isnan(scores["AP50-64to128"])


def test_unlabelled_points_hidden_points_crowds(register) -> None:
    hidden = face(60, 10, 20, 20)
    keypoints = np.reshape(hidden["keypoints"], (5, 3))
    keypoints[1:] = 0
    keypoints[0, 2] = 1
    faces = [
        {**face(10, 10, 20, 20), "keypoints": [0] * 15, "mesh": None},
        {**hidden, "keypoints": keypoints.ravel().tolist()},
        {**face(110, 10, 20, 20), "iscrowd": 1},
        {k: v for k, v in face(150, 10, 20, 20).items() if k not in ("keypoints", "mesh")},
        face(150, 150, 0, 20),
    ]
    records = register(faces)
    predicted = predict([face(x, 10, 20, 20, shift=0.1) for x in (10, 60, 110, 150)])
    results = evaluate(records, predicted)
    assert results["faces"]["recall-all"] == 100 and results["bbox"]["AP"] == pytest.approx(100)
    assert results["points"]["NME-all"] == pytest.approx(10)  # of one point
    assert results["mesh"]["NME-all"] == pytest.approx(10)
    nothing = evaluate(records, predict([]))
    assert nothing["bbox"]["AP"] == 0 and nothing["faces"]["AP50-all"] == 0
    assert nothing["points"]["recall-all"] == 0 and np.isnan(nothing["points"]["NME-all"])


def test_no_points_at_all_and_boxes_alone(register) -> None:
    bare = {k: v for k, v in face(10, 10, 20, 20).items() if k not in ("keypoints", "mesh")}
    records = register([bare])
    assert set(evaluate(records, predict([face(10, 10, 20, 20)]))) == {"bbox", "faces"}
    output = predict([face(10, 10, 20, 20)])
    output["instances"].remove("pred_keypoints")
    output["instances"].remove("pred_face_meshes")
    assert set(evaluate(records, output)) == {"bbox", "faces"}


def test_1000_faces(register) -> None:
    faces = [face(6 * x, 7 * y, 5, 6) for x in range(32) for y in range(28)][:1000]
    faces += [face(0.5 + x, 196, 0.5, 2) for x in range(1000 - len(faces))]
    records = register(faces)
    results = evaluate(records, predict(faces))
    assert results["faces"]["AP50-all"] == pytest.approx(100)
    assert results["points"]["recall-all"] == 100


def test_other_numbers_of_points_and_vertices(register) -> None:
    records = register([face(10, 10, 20, 20)])
    for field, value in (("pred_keypoints", 4), ("pred_face_meshes", 2)):
        output = predict([face(10, 10, 20, 20)])
        output["instances"].set(field, output["instances"].get(field)[:, :value])
        with pytest.raises(ValueError, match=rf"predicts {value} .* has \d"):
            evaluate(records, output)


def test_matching_is_by_score() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10.0]])
    faces = np.array([[0, 0, 10, 10], [0, 0, 10, 8.0]])
    assert match_faces(boxes, np.array([0.5, 0.9, 0.1]), faces) == {0: 1, 1: 0}
    assert match_faces(boxes[:0], np.zeros(0), faces) == {}


def test_box_coordinates() -> None:
    boxes = np.array([[10, 20, 30, 100.0]])
    points = np.array([[[20, 40, 8.0]]])
    np.testing.assert_allclose(in_box(points, boxes), [[[0.5, 0.25, 0.2]]])
    np.testing.assert_allclose(from_box(in_box(points, boxes), boxes), points)


def test_registered(register) -> None:
    register([face(10, 10, 20, 20)])
    assert isinstance(build_evaluator(get_cfg(), NAME, ""), FaceEvaluator)


def test_ap50_is_coco_s(register) -> None:
    draw = np.random.default_rng(0)
    images = []
    for _ in range(6):
        places = draw.uniform(0, 150, (8, 4)) * [1, 1, 0.2, 0.2] + [0, 0, 3, 3]
        images.append(
            [face(*place, iscrowd=int(i == 7)) for i, place in enumerate(places.tolist())]
        )
    records = register(*images)
    outputs = []
    for faces in images:
        boxes = np.array([f["bbox"] for f in faces * 2])
        boxes += draw.normal(0, 2, boxes.shape)
        outputs.append(predict(faces * 2, draw.uniform(0, 1, len(boxes)).tolist()))
        outputs[-1]["instances"].pred_boxes = Boxes(torch.from_numpy(boxes).float())
    results = evaluate(records, *outputs)
    assert 20 < results["bbox"]["AP50"] < 90
    assert results["faces"]["AP50-all"] == pytest.approx(results["bbox"]["AP50"], abs=1e-6)


def test_size_is_of_the_face(register) -> None:
    records = register([face(10, 10, 16, 16)])
    results = evaluate(records, predict([face(10, 10, 15, 16)]))
    assert results["faces"]["AP50-from16"] == 100 and np.isnan(results["faces"]["AP50-0to16"])
