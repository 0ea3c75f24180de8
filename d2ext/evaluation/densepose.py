"""DensePose: AP and AR by geodesic point similarity (:mod:`d2ext.evaluation.gps`), of charts and of
embeddings, beside those of boxes and masks; and how good it is to know nothing but boxes.

Pixels of a detection are compared where points are annotated. Charts give the vertex whose U, V are
nearest on their part, for predictions and annotations alike; embeddings the vertex whose embedding is
nearest, and annotations say theirs (``dp_vertex``).

The baseline, ``densepose_template``, knows only the predicted boxes: the mean body of this data set's
points, laid into each. A model that does not beat it by far has learnt nothing but boxes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import Tensor

from d2ext.codecs.densepose import (
    ChartPredictions,
    EmbeddingPredictions,
    charts_in_boxes,
    decode_result,
    masks_in_boxes,
    paste_masks,
    quantize,
    stored_result,
    vertices_at,
)
from d2ext.data.coco_json import read_json
from d2ext.data.densepose.charts import ChartVertices, read_chart_vertices
from d2ext.data.densepose.geodesics import GeodesicDistances, open_geodesics
from d2ext.data.densepose.parts import NUM_PARTS
from d2ext.data.errors import DatasetError
from d2ext.evaluation.coco import COCOEvaluator
from d2ext.evaluation.gps import (
    MAX_DETECTIONS,
    PART_K,
    TEMPLATE_SIDE,
    VERTEX_K,
    SurfaceScorer,
    geodesic_distances,
    geodesic_point_similarity,
    mean_template,
    person_mask,
    pixels_of_points,
)

logger = logging.getLogger(__name__)

RESULTS = "densepose_results.json"
# The mesh whose points keep the k of their part with embeddings.
_BODY = "smpl_27554"
# Share of a detection within ignored regions (PoseTrack) from which it is dropped.
_IGNORED_BOX, _IGNORED_MASK = 0.7, 0.9
_TASKS = {
    "densepose_gps": "GPS",
    "densepose_gpsm": "GPSm",
    "densepose_segm": "mask IoU",
    "densepose_template": "GPS, mean body",
}

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Person:
    """An annotated person with P points."""

    id: int
    box: list[float]
    """x, y, w, h."""
    x: np.ndarray
    """(P,) in the frame of the box."""
    y: np.ndarray
    parts: np.ndarray | None
    """(P,) int64: 0..24; None: not on charts."""
    chart_vertices: np.ndarray | None
    """(P,) int64: vertices by U and V; -1: none."""
    vertices: np.ndarray | None
    """(P,) int64: annotated vertices; -1: none."""
    mesh: str | None


class DensePoseEvaluator(COCOEvaluator):
    """GPS, GPSm and mask AP and AR, and COCO's of boxes and masks; see the module's header.

    Writes ``densepose_results.json``: of the best 20 detections of each class in an image the published
    record: ``image_id``, ``category_id``, ``bbox`` (XYWH), ``score``, ``segmentation`` (RLE), and with
    charts ``densepose``: ``shape`` (3, h, w) and ``data``, text of
    :func:`~d2ext.codecs.densepose.encode_result`. :meth:`add_results` takes them again.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        first_threshold: float = 0.5,
        k: float = 0.0,
        chart_vertices: ChartVertices | None = None,
        geodesics: Mapping[str, GeodesicDistances] | None = None,
    ) -> None:
        """
        Args:
            dataset_name: registered, in a JSON file. Its metadata name the files ``densepose_mesh``
                (:func:`~d2ext.data.densepose.charts.read_chart_vertices`), for charts, and
                ``densepose_geodesics``, of the mesh ``densepose_mesh_name``, or a dict of files by mesh.
            output_dir: where results are written.
            distributed: gather the predictions of all processes.
            first_threshold: of GPS, GPSm and IoU; the last one is 0.95 (published: 0.5, also 0.2).
            k: normaliser of all points, metres; 0: by part, as published.
            chart_vertices, geodesics: instead of the files.

        Raises:
            DatasetError: no person has points, or files are missing
        """
        metadata = MetadataCatalog.get(dataset_name)
        super().__init__(
            dataset_name,
            ("bbox", "segm"),
            distributed,
            output_dir,
            use_fast_impl=False,
            # From the cache, where it is drawn (`shapes`).
            content=read_json(PathManager.get_local_path(metadata.json_file)),
        )
        self._name, self._k, self._first_threshold = dataset_name, k, first_threshold
        self._charts = chart_vertices
        on_charts = any("dp_I" in a for a in self._coco_api.dataset.get("annotations") or ())
        if chart_vertices is None and on_charts and metadata.get("densepose_mesh"):
            self._charts = read_chart_vertices(metadata.densepose_mesh)
        self._mesh_name = metadata.get("densepose_mesh_name") or _BODY
        self._geodesics = dict(geodesics or {})
        files = metadata.get("densepose_geodesics") or {}
        self._files = files if isinstance(files, Mapping) else {self._mesh_name: files}
        # Vertex of each part, U and V in bytes; -2: not looked up yet.
        self._bytes = np.full((NUM_PARTS + 1) << 16, -2)
        self._persons = self._read_persons()
        self._ignored = {
            image["id"]: _regions(image)
            for image in self._coco_api.dataset["images"]
            if image.get("ignore_regions_x")
        }
        self._template = self._mean_body()
        self.reset()

    def _read_persons(self) -> dict[Any, list[Person]]:
        annotated = [a for a in self._coco_api.dataset.get("annotations", ()) if a.get("dp_x")]
        if not annotated:
            raise DatasetError(f"Data set '{self._name}' has no person with points (dp_x, dp_y).")
        on_charts = [a for a in annotated if "dp_I" in a]
        vertices: list[np.ndarray] = []
        if on_charts and self._charts is not None:
            parts, u, v = (_joined(on_charts, key) for key in ("dp_I", "dp_U", "dp_V"))
            ends = np.cumsum([len(a["dp_I"]) for a in on_charts])[:-1]
            vertices = np.split(self._charts.mesh_vertices(parts.astype(np.int64), u, v), ends)
        by_charts = {a["id"]: x for a, x in zip(on_charts, vertices, strict=False)}
        persons: dict[Any, list[Person]] = {}
        for a in annotated:
            person = Person(
                id=a["id"],
                box=a["bbox"],
                x=np.asarray(a["dp_x"], np.float64),
                y=np.asarray(a["dp_y"], np.float64),
                parts=np.asarray(a["dp_I"], np.float64).astype(np.int64) if "dp_I" in a else None,
                chart_vertices=by_charts.get(a["id"]),
                vertices=np.asarray(a["dp_vertex"], np.int64) if "dp_vertex" in a else None,
                mesh=a.get("ref_model"),
            )
            persons.setdefault(a["image_id"], []).append(person)
        return persons

    def _mean_body(self) -> np.ndarray | None:
        """(64, 64) int64, vertices of the mean body in its box; None without charts."""
        persons = [p for of in self._persons.values() for p in of if p.chart_vertices is not None]
        if not persons or self._charts is None:
            return None
        annotations = self._coco_api.dataset["annotations"]
        on_charts = [a for a in annotations if a.get("dp_x") and "dp_I" in a]
        columns = ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V")
        parts, u, v = mean_template(*(_joined(on_charts, key) for key in columns))
        return self._charts.mesh_vertices(parts.ravel(), u.ravel(), v.ravel()).reshape(parts.shape)

    def reset(self) -> None:
        """Forget all predictions."""
        super().reset()
        self._records: list[Annotation] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some images.

        Args:
            inputs: with ``image_id``.
            outputs: with ``instances``: ``pred_boxes``, ``scores``, ``pred_classes``,
                ``pred_densepose``; on any device.

        Raises:
            ValueError: there is no ``pred_densepose``
        """
        for one_input, output in zip(inputs, outputs, strict=True):
            instances, image_id = output["instances"], one_input["image_id"]
            if not instances.has("pred_densepose"):
                raise ValueError("The model's instances have no pred_densepose to evaluate.")
            self._process_image(image_id, instances)

    def _process_image(self, image_id: Any, instances: Instances) -> None:
        instances = instances[instances.scores.argsort(descending=True, stable=True)]
        predictions, boxes = instances.pred_densepose, instances.pred_boxes.tensor
        quantized: list[Tensor] | None = None
        if isinstance(predictions, ChartPredictions):
            quantized = [quantize(r).cpu() for r in charts_in_boxes(predictions, boxes)]
            masks = [q[0] > 0 for q in quantized]
        else:
            masks = [m.cpu() for m in masks_in_boxes(predictions, boxes)]
        others = Instances(instances.image_size)
        for name in ("pred_boxes", "scores", "pred_classes"):
            others.set(name, instances.get(name).to("cpu"))
        others.pred_masks = paste_masks(masks, others.pred_boxes.tensor, instances.image_size)
        ignored = self._ignored.get(image_id)
        seen = others
        if ignored is not None:
            seen = others[torch.from_numpy(_outside(others, ignored))]
        super().process([{"image_id": image_id}], [{"instances": seen}])

        category = self._category_ids()
        counts: dict[int, int] = {}
        records, selected = [], []
        for i, (label, score) in enumerate(
            zip(others.pred_classes.tolist(), others.scores.tolist(), strict=True)
        ):
            counts[label] = counts.get(label, 0) + 1
            if counts[label] > MAX_DETECTIONS:
                continue
            box = others.pred_boxes.tensor[i]
            rle = mask_util.encode(np.asfortranarray(others.pred_masks[i].numpy(), np.uint8))
            record = {
                "image_id": image_id,
                "category_id": category(label),
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "score": score,
                "segmentation": {**rle, "counts": rle["counts"].decode("ascii")},
            }
            if quantized is not None:
                if self._output_dir:
                    record["densepose"] = stored_result(quantized[i])
                record["gps"] = self._chart_gps(record, quantized[i].numpy())
            records.append(record)
            selected.append(i)
        if isinstance(predictions, EmbeddingPredictions):
            self._embedding_gps(records, predictions[torch.tensor(selected, dtype=torch.int64)])
        self._add(records)

    def add_results(self, records: Iterable[Annotation]) -> None:
        """Take detections as ``densepose_results.json`` has them, in place of :meth:`process`; boxes and
        masks are scored with them."""
        for record in records:
            record = dict(record)
            label = decode_result(record["densepose"]["data"]).numpy()
            record["gps"] = self._chart_gps(record, label)
            self._add([record])
            entry = {k: record[k] for k in ("image_id", "bbox", "score", "segmentation")}
            self._fields.add("segm")
            index = self._class_indices()[record["category_id"]]
            entry["category_id"] = index
            self._predictions.append({"image_id": record["image_id"], "instances": [entry]})

    def _class_indices(self) -> dict[int, int]:
        """By category id."""
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        return mapping or {c["id"]: c["id"] for c in self._coco_api.dataset["categories"]}

    def _add(self, records: list[Annotation]) -> None:
        for record in records:
            ignored = self._ignored.get(record["image_id"])
            if ignored is not None and _share(record["segmentation"], ignored) >= _IGNORED_MASK:
                continue
            record["template"] = self._template_gps(record)
            self._records.append(record)

    def _near(self, record: Annotation) -> list[Person]:
        """The persons of an image of whom a detection can have points: others have a GPS of 0."""
        x, y, w, h = record["bbox"]
        return [
            p
            for p in self._persons.get(record["image_id"], ())
            # A pixel of slack, for what is cut to integers.
            if p.box[0] <= x + w + 1
            and x <= p.box[0] + p.box[2] + 1
            and p.box[1] <= y + h + 1
            and y <= p.box[1] + p.box[3] + 1
        ]

    def _chart_gps(self, record: Annotation, quantized: np.ndarray) -> dict[int, float]:
        """GPS by person; ``quantized`` (3, h, w) uint8."""
        result = {}
        for person in self._near(record):
            if person.chart_vertices is None:
                raise DatasetError(
                    f"Evaluating charts on '{self._name}' needs points with dp_I, dp_U, dp_V and the "
                    "mesh's vertices on the charts: metadata `densepose_mesh`."
                )
            columns, rows, inside = pixels_of_points(person.x, person.y, person.box, record["bbox"])
            vertices = np.full(len(inside), -1)
            values = quantized[:, rows[inside], columns[inside]].astype(np.int64)
            vertices[inside] = self._vertices_of_bytes(values)
            result[person.id] = self._gps(person, vertices, person.chart_vertices, self._mesh_name)
        return result

    def _vertices_of_bytes(self, values: np.ndarray) -> np.ndarray:
        """(3, n) part, 255 U, 255 V → (n,) vertices, each kept for the next time."""
        codes = (values[0] << 16) + (values[1] << 8) + values[2]
        unknown = np.unique(codes[self._bytes[codes] == -2])
        assert self._charts is not None
        u, v = (unknown >> 8 & 255) / 255, (unknown & 255) / 255
        self._bytes[unknown] = self._charts.mesh_vertices(unknown >> 16, u, v)
        return self._bytes[codes]

    def _embedding_gps(self, records: list[Annotation], predictions: EmbeddingPredictions) -> None:
        """Add ``gps`` to the records, one for each prediction."""
        boxes = torch.tensor([r["bbox"] for r in records]).reshape(-1, 4)
        queries: dict[str, list[tuple[int, Person, tuple[np.ndarray, ...]]]] = {}
        for i, record in enumerate(records):
            record["gps"] = {}
            for person in self._near(record):
                if person.vertices is None or person.mesh is None:
                    raise DatasetError(
                        f"Evaluating embeddings on '{self._name}' needs points with dp_vertex and "
                        "ref_model."
                    )
                pixels = pixels_of_points(person.x, person.y, person.box, record["bbox"])
                queries.setdefault(person.mesh, []).append((i, person, pixels))
        for mesh, pairs in queries.items():
            if predictions.vertices is None or mesh not in predictions.vertices:
                raise DatasetError(
                    f"'{self._name}' has points on the mesh {mesh}; the model has the meshes "
                    f"{sorted(predictions.vertices or ())}."
                )
            inside = np.concatenate([pixels[2] for _, _, pixels in pairs])
            index = np.concatenate([np.full(len(p.x), i) for i, p, _ in pairs])
            columns, rows = (np.concatenate([x[2][k] for x in pairs]) for k in (0, 1))
            predicted = np.full(len(inside), -1)
            predicted[inside] = (
                vertices_at(
                    predictions,
                    boxes[:, 2:],
                    *(torch.from_numpy(x[inside]) for x in (index, columns, rows)),
                    predictions.vertices[mesh],
                )
                .cpu()
                .numpy()
            )
            ends = np.cumsum([len(p.x) for _, p, _ in pairs])[:-1]
            for (i, person, _), own in zip(pairs, np.split(predicted, ends), strict=True):
                assert person.vertices is not None
                records[i]["gps"][person.id] = self._gps(person, own, person.vertices, mesh, True)

    def _template_gps(self, record: Annotation) -> dict[int, float]:
        result: dict[int, float] = {}
        if self._template is None:
            return result
        for person in self._near(record):
            if person.chart_vertices is not None:
                columns, rows, inside = pixels_of_points(
                    person.x, person.y, person.box, record["bbox"]
                )
                vertices = np.full(len(inside), -1)
                places = (
                    ((x[inside] + 0.5) * TEMPLATE_SIDE / max(int(side), 1)).astype(np.int64)
                    for x, side in ((rows, record["bbox"][3]), (columns, record["bbox"][2]))
                )
                vertices[inside] = self._template[tuple(places)]
                result[person.id] = self._gps(
                    person, vertices, person.chart_vertices, self._mesh_name
                )
        return result

    def _gps(
        self,
        person: Person,
        predicted: np.ndarray,
        annotated: np.ndarray,
        mesh: str,
        embedded: bool = False,
    ) -> float:
        k: np.ndarray | float = self._k or VERTEX_K
        if not self._k and person.parts is not None and (not embedded or mesh == _BODY):
            k = PART_K[person.parts]
        distances = geodesic_distances(self._table(mesh), predicted, annotated)
        return geodesic_point_similarity(distances, k)

    def _table(self, mesh: str) -> GeodesicDistances:
        if mesh not in self._geodesics:
            if not self._files.get(mesh):
                raise DatasetError(
                    f"Evaluating on '{self._name}' needs the distances between the vertices of {mesh}: "
                    "metadata `densepose_geodesics`."
                )
            self._geodesics[mesh] = open_geodesics(self._files[mesh])
        return self._geodesics[mesh]

    def evaluate(self, img_ids: list[Any] | None = None) -> dict[str, Any]:
        """Gather, write and score.

        Args:
            img_ids: images to evaluate on; by default all.

        Returns:
            empty in all processes but the main one, else percent: ``bbox`` and ``segm``, COCO's;
            ``densepose_gps``, ``densepose_gpsm``, ``densepose_segm`` (IoU with the masks of the parts)
            and ``densepose_template`` (GPS of the mean body in the predicted boxes), see
            :meth:`~d2ext.evaluation.gps.SurfaceScorer.metrics`.
        """
        results = super().evaluate(img_ids)
        records = self._records
        if self._distributed:
            gathered = comm.gather(records, dst=0)
            if not comm.is_main_process():
                return {}
            records = list(itertools.chain(*gathered))
        hidden = "gps", "template"
        self._write_json(
            RESULTS, [{k: x for k, x in r.items() if k not in hidden} for r in records]
        )

        @cache
        def mask(person: int) -> dict[str, Any]:
            annotation = self._coco_api.anns[person]
            image = self._coco_api.imgs[annotation["image_id"]]
            return person_mask(annotation, image["height"], image["width"])

        def iou(detection: Annotation, person: Annotation) -> float:
            overlap = mask_util.iou([detection["segmentation"]], [mask(person["id"])], [0])
            return float(overlap[0, 0])

        def gps(detection: Annotation, person: Annotation) -> float:
            return detection["gps"].get(person["id"], 0.0)

        similarities = {
            "densepose_gps": gps,
            "densepose_gpsm": lambda d, p: (gps(d, p) * iou(d, p)) ** 0.5,
            "densepose_segm": iou,
        }
        if self._template is not None:
            similarities["densepose_template"] = lambda d, p: d["template"].get(p["id"], 0.0)
        for task, similarity in similarities.items():
            scorer = SurfaceScorer(self._coco_api, records, similarity, self._first_threshold)
            if img_ids is not None:
                scorer.params.imgIds = img_ids
            results[task] = scorer.metrics()
        rows = [[_TASKS[task], *results[task].values()] for task in similarities]
        headers = ["", *results["densepose_gps"]]
        table = tabulate(rows, headers=headers, floatfmt=".2f")
        logger.info("Surfaces of %s, percent:\n%s", self._name, table)
        return results


def _joined(annotations: list[Annotation], key: str) -> np.ndarray:
    """The numbers under a key of all annotations, float64."""
    return np.concatenate([np.asarray(a[key], np.float64) for a in annotations])


def _regions(image: dict[str, Any]) -> dict[str, Any]:
    """RLE of what is ignored in an image: polygons ``ignore_regions_x``, ``ignore_regions_y``."""
    drawn = np.zeros((image["height"], image["width"]), np.uint8)
    for x, y in zip(image["ignore_regions_x"], image["ignore_regions_y"], strict=True):
        polygon = np.stack([x, y], axis=1)
        cv2.fillPoly(drawn, [np.round(polygon).astype(np.int32)], 1)
    return mask_util.encode(np.asfortranarray(drawn))


def _share(segmentation: Any, regions: Any) -> float:
    """Of a mask within others, 0..1."""
    return float(mask_util.iou([segmentation], [regions], [1])[0, 0])


def _outside(instances: Instances, regions: Any) -> np.ndarray:
    """(N,) bool: boxes that do not lie in ignored regions."""
    drawn = mask_util.decode(regions)
    keep = np.ones(len(instances), dtype=bool)
    for i, box in enumerate(instances.pred_boxes.tensor.tolist()):
        x0, y0, x1, y1 = (max(int(side), 0) for side in box)
        part = drawn[y0:y1, x0:x1]
        keep[i] = part.size == 0 or part.mean() < _IGNORED_BOX
    return keep
