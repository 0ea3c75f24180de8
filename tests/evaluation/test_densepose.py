"""GPS, GPSm and mask AP as published, of charts and of embeddings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager

from d2ext import Predictor
from d2ext.codecs.densepose import ChartPredictions, decode_result, encode_result
from d2ext.data.densepose import GeodesicDistances
from d2ext.data.densepose.charts import ChartVertices
from d2ext.data.errors import DatasetError
from d2ext.data.shapes import DEFAULT_BODY_SETS, draw_bodies
from d2ext.evaluation.build import build_evaluator
from d2ext.evaluation.densepose import DensePoseEvaluator
from d2ext.evaluation.gps import (
    PART_K,
    SurfaceScorer,
    geodesic_distances,
    mesh_alignment,
    person_mask,
    pixels_of_points,
)
from d2ext.testing import tiny_config
from tests.reference.fixture import Fixture
from tests.systems.densepose.test_embeddings import Case as EmbeddingCase

REFERENCE = Path(__file__).parents[1] / "reference" / "densepose"
NAME = "surfaces_to_evaluate"


def parts_masks(rectangles: list[list[int]]) -> list[Any]:
    frames = np.zeros((15, 256, 256), np.uint8)
    for part, x0, y0, x1, y1 in rectangles:
        frames[:, y0:y1, x0:x1] = 0
        frames[part, y0:y1, x0:x1] = 1
    return [mask_util.encode(np.asfortranarray(f)) if f.any() else [] for f in frames[1:]]


@pytest.fixture
def register(tmp_path: Path):
    def add(content: dict[str, Any], **metadata: Any) -> None:
        for annotation in content["annotations"]:
            for mask in annotation.get("dp_masks", ()):
                if isinstance(mask, dict) and isinstance(mask["counts"], bytes):
                    mask["counts"] = mask["counts"].decode()
        path = tmp_path / "densepose.json"
        path.write_text(json.dumps(content))
        DatasetCatalog.register(NAME, list)
        MetadataCatalog.get(NAME).set(
            evaluator_type="densepose",
            json_file=str(path),
            thing_classes=["person"],
            thing_dataset_id_to_contiguous_id={1: 0},
            **metadata,
        )

    yield add
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


class Case:
    """The published evaluation alone: annotations, detections, a mesh."""

    def __init__(self) -> None:
        fixture = Fixture(REFERENCE / "gps_eval")
        self.inputs, self.expected = fixture.manifest["inputs"], fixture.expected
        self.content = {
            "images": self.inputs["images"],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [dict(a) for a in self.inputs["ground_truth"]],
        }
        for annotation in self.content["annotations"]:
            if "mask_rectangles" in annotation:
                annotation["dp_masks"] = parts_masks(annotation.pop("mask_rectangles"))
        mesh = {k.removeprefix("input.mesh."): x for k, x in self.expected.items() if "mesh" in k}
        uv = np.stack([mesh["u"], mesh["v"]], axis=1).astype(np.float64)
        self.charts = ChartVertices(mesh["part"], uv, mesh["transform"] - 1)
        self.geodesics = GeodesicDistances(mesh["geodesic"])
        self.arrays = [self.expected[f"input.dt.{i}"] for i in range(10)]

    def records(self) -> list[dict[str, Any]]:
        result = []
        for detection, array in zip(self.inputs["detections"], self.arrays, strict=True):
            image = np.zeros((240, 320), np.uint8)
            x, y = (int(side) for side in detection["bbox"][:2])
            window = image[y : y + array.shape[1], x : x + array.shape[2]]
            window[:] = array[0, : window.shape[0], : window.shape[1]] > 0
            rle = mask_util.encode(np.asfortranarray(image))
            rle["counts"] = rle["counts"].decode()
            text = encode_result(torch.from_numpy(array))
            stored = {"shape": list(array.shape), "data": text}
            result.append({**detection, "segmentation": rle, "densepose": stored})
        return result

    def evaluator(self, folder: Path | None = None, **options: Any) -> DensePoseEvaluator:
        return DensePoseEvaluator(
            NAME,
            None if folder is None else str(folder),
            chart_vertices=self.charts,
            geodesics={"smpl_27554": self.geodesics},
            **options,
        )


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_points_and_vertices_as_published(case: Case) -> None:
    person, expected = case.content["annotations"][0], case.expected
    keys = ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V")
    x, y, parts, u, v = (np.array(person[k]) for k in keys)
    parts = parts.astype(np.int64)
    nearest = case.charts.nearest(parts, u, v)
    assert np.array_equal(nearest + 1, expected["gt1.subdivided_vertex"])
    annotated = case.charts.vertices[nearest]
    assert np.array_equal(annotated + 1, expected["gt1.base_vertex"])
    np.testing.assert_array_equal(PART_K[parts].astype(np.float32), expected["gt1.normaliser"])
    box = case.inputs["detections"][1]["bbox"]
    columns, rows, inside = pixels_of_points(x, y, person["bbox"], box)
    label, u, v = case.arrays[1][:, rows[inside], columns[inside]].astype(np.float64)
    predicted = np.full(len(x), -1)
    predicted[inside] = case.charts.mesh_vertices(label.astype(np.int64), u / 255, v / 255)
    assert np.array_equal(predicted + 1, expected["dt1.base_vertex"])
    distances = geodesic_distances(case.geodesics, predicted, annotated)
    np.testing.assert_allclose(distances, expected["dt1.distance_to_gt1"], rtol=1e-6)


def test_points_at_the_edges_of_a_box() -> None:
    """Cut toward zero: what lies less than a pixel to the left of the box is in its first column."""
    x = np.array([-0.9, -1.01, 0.0, 99.9, 100.1]) * 255 / 200
    columns, _, inside = pixels_of_points(x, 0 * x, (0, 0, 200, 200), (0, 0, 100.7, 50))
    assert columns.tolist() == [0, -1, 0, 99, 100]
    assert inside.tolist() == [True, False, True, True, False]
    _, rows, inside = pixels_of_points(0 * x, x, (3, 5, 200, 200), (3, 5, 50, 100))
    assert rows.tolist() == [0, -1, 0, 99, 100] and inside.tolist() == [1, 0, 1, 1, 0]


def test_metrics_as_published(case: Case, register: Any, tmp_path: Path) -> None:
    register(case.content)
    evaluator = case.evaluator(tmp_path / "out")
    for record in case.records():
        evaluator.add_results([record])
    results = evaluator.evaluate()
    masks = {a["id"]: person_mask(a, 240, 320) for a in evaluator._coco_api.dataset["annotations"]}
    for image in (1, 2, 3):
        persons = [a["id"] for a in case.content["annotations"] if a["image_id"] == image]
        of_image = [r for r in evaluator._records if r["image_id"] == image]
        of_image.sort(key=lambda r: -r["score"])
        gps = [[r["gps"].get(i, 0.0) for i in persons] for r in of_image]
        np.testing.assert_allclose(gps, case.expected[f"gps.image{image}"], atol=1e-6)
        segmentations = [r["segmentation"] for r in of_image]
        iou = mask_util.iou(segmentations, [masks[i] for i in persons], [0] * len(persons))
        np.testing.assert_allclose(iou, case.expected[f"mask_iou.image{image}"], atol=1e-6)
    for task in ("gps", "gpsm", "segm"):
        metrics = results[f"densepose_{task}"]
        assert list(metrics) == case.inputs["metric_names"]
        np.testing.assert_allclose(
            list(metrics.values()), case.expected[f"metrics.{task}"], rtol=1e-6
        )
    assert {"bbox", "segm", "densepose_template"} < results.keys()
    # The file has the same results.
    written = json.loads((tmp_path / "out" / "densepose_results.json").read_text())
    assert [set(r) for r in written] == [set(case.records()[0])] * 10
    evaluator.reset()
    evaluator.add_results(written)
    np.testing.assert_equal(evaluator.evaluate(), results)  # NaN, too


def test_lower_thresholds_as_published(case: Case, register: Any) -> None:
    register(case.content)
    evaluator = case.evaluator(first_threshold=0.2)
    evaluator.add_results(case.records())
    results = evaluator.evaluate()
    for task in ("gps", "gpsm", "segm"):
        metrics = results[f"densepose_{task}"]
        assert list(metrics) == case.inputs["metric_names_from_0.2"]
        np.testing.assert_allclose(
            list(metrics.values()), case.expected[f"metrics20.{task}"], rtol=1e-6
        )


def test_curves_as_published(case: Case, register: Any) -> None:
    register(case.content)
    evaluator = case.evaluator()
    evaluator.add_results(case.records())

    def gps(detection: dict[str, Any], person: dict[str, Any]) -> float:
        return detection["gps"].get(person["id"], 0.0)

    scorer = SurfaceScorer(evaluator._coco_api, evaluator._records, gps)
    scorer.metrics()
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    np.testing.assert_allclose(precision[:, :, 0, :, 0], case.expected["precision.gps"], atol=1e-6)
    np.testing.assert_allclose(recall[:, 0, :, 0], case.expected["recall.gps"], atol=1e-6)


def test_ignored_regions_drop_detections(case: Case, register: Any) -> None:
    """PoseTrack's: nine tenths of a mask, seven of a box."""
    x, y, w, h = 10, 20, 40, 60  # a detection that finds no one, of a full mask
    array = np.full((3, h, w), 5, np.uint8)
    for share, kept in ((0.95, (False, False)), (0.8, (True, False)), (0.5, (True, True))):
        images = [dict(image) for image in case.content["images"]]
        sides = [x, x + w, x + w, x], [y, y, y + h * share - 1, y + h * share - 1]
        images[3].update(ignore_regions_x=[sides[0]], ignore_regions_y=[sides[1]])
        register({**case.content, "images": images})
        evaluator = case.evaluator()
        instances = Instances((240, 320), pred_boxes=Boxes(torch.tensor([[x, y, x + w, y + h]])))
        instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        instances.pred_densepose = constant_charts(array[0, 0, 0])
        evaluator.process([{"image_id": 4}], [{"instances": instances}])
        boxes = [p for of in evaluator._predictions for p in of["instances"]]
        assert (len(evaluator._records) == 1, len(boxes) == 1) == kept
        DatasetCatalog.remove(NAME)
        MetadataCatalog.pop(NAME)
    register(case.content)


def constant_charts(part: int) -> ChartPredictions:
    fine = torch.zeros(1, 25, 4, 4)
    fine[:, part] = 1
    coarse = torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, 4, 4)
    uv = torch.full((1, 25, 4, 4), 0.5)
    return ChartPredictions(coarse_segm=coarse, fine_segm=fine, u=uv, v=uv)


def test_the_best_twenty_count(case: Case, register: Any, tmp_path: Path) -> None:
    register(case.content)
    evaluator = case.evaluator(tmp_path)
    instances = Instances((240, 320), pred_boxes=Boxes(torch.tensor([[9.0, 9, 30, 30]] * 25)))
    instances.scores = torch.linspace(0, 1, 25)
    instances.pred_classes = torch.zeros(25, dtype=torch.int64)
    instances.pred_densepose = ChartPredictions.cat([constant_charts(3)] * 25)
    evaluator.process([{"image_id": 3}], [{"instances": instances}])
    scores = [r["score"] for r in evaluator._records]
    assert scores == instances.scores.flip(0)[:20].tolist()
    assert sum(len(p["instances"]) for p in evaluator._predictions) == 25  # COCO's have 100
    evaluator.evaluate()
    written = json.loads((tmp_path / "densepose_results.json").read_text())
    assert decode_result(written[0]["densepose"]["data"])[:, 5, 5].tolist() == [3, 127, 127]


def test_k_by_part_or_for_all(case: Case, register: Any) -> None:
    """Embeddings have that of the part on the human body only."""
    register(case.content)
    evaluator = case.evaluator()
    (person,) = evaluator._persons[2]
    assert person.chart_vertices is not None and person.parts is not None
    other = np.roll(person.chart_vertices, 1)
    args = person, other, person.chart_vertices
    by_part = evaluator._gps(*args, "smpl_27554")
    distances = geodesic_distances(case.geodesics, other, person.chart_vertices)
    expected = np.exp(-(distances**2) / (2 * PART_K[person.parts] ** 2)).mean()
    assert by_part == pytest.approx(expected) and 0.01 < by_part < 0.99
    assert evaluator._gps(*args, "smpl_27554", embedded=True) == by_part
    evaluator._geodesics["cat"] = case.geodesics
    for_all = np.exp(-(distances**2) / (2 * 0.255**2)).mean()
    assert evaluator._gps(*args, "cat", embedded=True) == pytest.approx(for_all)
    assert case.evaluator(k=0.255)._gps(*args, "smpl_27554") == pytest.approx(for_all)
    with pytest.raises(DatasetError, match="distances between the vertices of dog"):
        evaluator._gps(*args, "dog")


@torch.no_grad()
def test_embeddings_as_published(register: Any) -> None:
    case = EmbeddingCase()
    inputs, expected = case.fixture.manifest["inputs"], case.fixture.expected
    annotations = []
    for i, (pair, person) in enumerate(
        zip(inputs["gps_pairs"], inputs["targets"]["proposals"][0], strict=False), 1
    ):
        points = {k: x for k, x in person["densepose"].items() if k.startswith(("dp_", "ref"))}
        box = pair["gt_box_xywh"]
        of = {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
        annotations.append({**of, "area": box[2] * box[3], **points})
    register(
        {
            "images": [{"id": 1, "width": 220, "height": 210, "file_name": "1.jpg"}],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": annotations,
        }
    )
    geodesics = {k: GeodesicDistances(x.numpy()) for k, x in case.geodesics.items()}
    evaluator = DensePoseEvaluator(NAME, geodesics=geodesics)
    boxes = torch.tensor([pair["detection_box_xywh"] for pair in inputs["gps_pairs"]])
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances((210, 220), pred_boxes=Boxes(boxes))
    instances.scores = torch.tensor([0.6, 0.9])
    instances.pred_classes = torch.zeros(2, dtype=torch.int64)
    predictions = case.predictor(case.features)[:2]
    instances.pred_densepose = predictions
    with pytest.raises(DatasetError, match=r"mesh .*; the model has the meshes \[\]"):
        evaluator.process([{"image_id": 1}], [{"instances": instances}])
    evaluator.reset()
    vertices = case.embedder()
    instances.pred_densepose = dataclasses.replace(predictions, vertices=vertices)
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    second, first = evaluator._records  # best first
    np.testing.assert_allclose([first["gps"][1], second["gps"][2]], expected["gps"], rtol=1e-5)
    assert evaluator.evaluate().keys() == {
        *("bbox", "segm", "densepose_gps", "densepose_gpsm", "densepose_segm")
    }
    by_mesh, mean = mesh_alignment(vertices, geodesics, inputs["key_vertices"])
    names = [mesh["name"] for mesh in inputs["meshes"]]
    np.testing.assert_allclose(
        [by_mesh[n] for n in names], expected["mesh_alignment.per_mesh"], rtol=1e-5
    )
    np.testing.assert_allclose(mean, expected["mesh_alignment.mean"], rtol=1e-5)


def test_the_surface_itself_and_the_mean_body() -> None:
    """What the pictures of `shapes` show, as predictions: all points are right but for what cutting to
    pixels and bytes moves. The mean body in the same boxes is far from that."""
    name, count = "shapes_val_bodies", 20
    evaluator = DensePoseEvaluator(name, k=0.255)
    shapes = DEFAULT_BODY_SETS[1]
    images = evaluator._coco_api.dataset["images"][:count]
    for i, image in enumerate(images):
        frame = draw_bodies(shapes.seed, shapes.split, i, 256, 256)
        for item in frame.bodies:
            surface, mask = frame.surface(item), frame.mask(item)
            if not mask.any():
                continue
            x, y, w, h = cv2.boundingRect(mask)
            array = np.zeros((3, h, w), np.uint8)
            values = np.vstack([surface.parts, surface.uv.T * 255])
            array[:, surface.rows - y, surface.columns - x] = values
            rle = mask_util.encode(np.asfortranarray(mask))
            rle["counts"] = rle["counts"].decode()
            record = {
                "image_id": image["id"],
                "category_id": 1,
                "bbox": [x, y, w, h],
                "score": 1.0,
                "segmentation": rle,
                "densepose": {"data": encode_result(torch.from_numpy(array))},
            }
            evaluator.add_results([record])
    results = evaluator.evaluate([image["id"] for image in images])
    boxes = {p.id: p.box for of in evaluator._persons.values() for p in of}
    own = [g for r in evaluator._records for i, g in r["gps"].items() if boxes[i] == r["bbox"]]
    assert (
        len(own) > 20 and np.mean(own) > 0.998
    )  # 0.9987: the frame is 255, but that of points 256
    assert results["densepose_gps"]["AP"] > 99
    assert results["densepose_segm"]["AP"] > 99
    template = results["densepose_template"]
    assert template["AP"] < 15 and 25 < template["AP50"] < 60, template


def test_file_to_predictor_to_results_and_back(tmp_path: Path) -> None:
    """The evaluator that a config gets, fed by the model from the data set's files, and by what it
    wrote."""
    cfg = tiny_config("DensePose")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.INPUT.FORMAT = "BGR"
    cfg.DENSEPOSE_EVALUATION.GPS_K = 0.255
    name = "shapes_val_bodies"
    cfg.DATASETS.TEST = (name,)
    predictor = Predictor(cfg)
    evaluator = build_evaluator(cfg, name, str(tmp_path))
    assert isinstance(evaluator, DensePoseEvaluator)
    records = DatasetCatalog.get(name)[:3]
    for record in records:
        path = PathManager.get_local_path(record["file_name"])
        evaluator.process([record], [predictor(path)])
    ids = [record["image_id"] for record in records]
    results = evaluator.evaluate(ids)
    assert results["densepose_gps"]["AP"] >= 0
    written = json.loads((tmp_path / "densepose_results.json").read_text())
    assert {r["image_id"] for r in written} == set(ids)
    again = DensePoseEvaluator(name, k=0.255)
    again.add_results(written)
    second = again.evaluate(ids)
    np.testing.assert_equal(second["densepose_gpsm"], results["densepose_gpsm"])
    gps = [[r["gps"] for r in e._records] for e in (evaluator, again)]
    assert gps[0] == gps[1] and any(x > 0 for g in gps[0] for x in g.values())
    by_part = DensePoseEvaluator(name)
    by_part.add_results(written)
    assert [r["gps"] for r in by_part._records] != gps[0]
