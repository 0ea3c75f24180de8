"""Faces: box AP, also by face size, and the errors of points and meshes of the faces that are found.

A detection and a face belong together as in COCO's evaluation: by falling score, each takes the free
face that it overlaps most, from an IoU of 0.5 on. Points and meshes are compared for *all* faces that
are found so, at whatever score; recall says how many that is. Crowd annotations are no faces here.
COCO's metrics count 100 detections an image, as defined; AP50 by size counts all.

Errors are distances in pixels over √(w·h) of the annotated box. The NME of a face's points is the mean
over its labelled points (v > 0, hidden ones count too), in x and y; that of its mesh is the mean over
all vertices, in x, y and z. Beside each stands a baseline that knows only the predicted box: the mean of
the annotated points, or meshes, of this data set, each relative to its box, pasted into it. A model that
does not beat it has learnt nothing but boxes.

Sizes are √(w·h) in pixels of the original image.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_ioa, pairwise_iou
from detectron2.utils import comm
from tabulate import tabulate

from d2ext.data.faces.meshes import check_mesh
from d2ext.evaluation.coco import COCOEvaluator
from d2ext.evaluation.landmark_metrics import distances, failure_rate, instance_nme

logger = logging.getLogger(__name__)

# Name → sizes that it holds. The smallest prior of RetinaFace is 16 pixels.
SIZES: dict[str, tuple[float, float]] = {
    "all": (0, math.inf),
    "from16": (16, math.inf),
    "0to16": (0, 16),
    "16to32": (16, 32),
    "32to64": (32, 64),
    "64to128": (64, 128),
    "from128": (128, math.inf),
}
_KINDS = {"points": "mean points", "mesh": "mean mesh"}


@dataclass(frozen=True)
class Faces:
    """The annotated faces of an image.

    Attributes:
        first: number of the first one, counted over the data set.
        boxes: (M, 4) float64 XYXY.
        points: (M, K, 3) float64 x, y, v; v = 0: not labelled.
        meshes: M times (V, 3) or None.
        crowds: (C, 4) XYXY.
    """

    first: int
    boxes: np.ndarray
    points: np.ndarray
    meshes: list[np.ndarray | None]
    crowds: np.ndarray


def match_faces(
    boxes: np.ndarray, scores: np.ndarray, faces: np.ndarray, threshold: float = 0.5
) -> dict[int, int]:
    """Which detection finds which face.

    Args:
        boxes: (N, 4) XYXY of detections.
        scores: (N,).
        faces: (M, 4) XYXY.
        threshold: IoU.

    Returns:
        index of a face → index of its detection.
    """
    result: dict[int, int] = {}
    if not len(boxes) or not len(faces):
        return result
    overlaps = pairwise_iou(Boxes(boxes), Boxes(faces)).numpy().copy()
    for i in np.argsort(-scores, kind="stable").tolist():
        face = int(overlaps[i].argmax())
        if overlaps[i, face] >= threshold:
            result[face] = i
            overlaps[:, face] = -1
    return result


def in_box(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Coordinates relative to boxes: x and y over the sides, z over √(w·h).

    Args:
        points: (N, K, 2 or 3) pixels.
        boxes: (N, 4) XYXY.
    """
    low, unit = _frames(boxes, points.shape[2])
    return (points - low) / unit


def from_box(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Inverse of :func:`in_box`; ``points`` may be (K, 2 or 3), the same in each box."""
    low, unit = _frames(boxes, points.shape[-1])
    return low + points * unit


def _frames(boxes: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1, D) origin and unit."""
    sides = boxes[:, 2:] - boxes[:, :2]
    depth = np.sqrt(sides.prod(axis=1, keepdims=True))
    low = np.concatenate([boxes[:, :2], 0 * depth], axis=1)[:, None, :dimensions]
    return low, np.concatenate([sides, depth], axis=1)[:, None, :dimensions]


class FaceEvaluator(DatasetEvaluator):
    """COCO's box AP, AP50 by face size, NME of points and meshes; see the module's header."""

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        failure: float = 0.1,
    ) -> None:
        """
        Args:
            dataset_name: registered; annotations may have ``keypoints`` and ``mesh``.
            output_dir: where COCO's results are written.
            distributed: gather the predictions of all processes.
            failure: a face fails if its NME is above this fraction.

        Raises:
            DatasetError: meshes of another number of vertices than the topology's
        """
        metadata = MetadataCatalog.get(dataset_name)
        records = DatasetCatalog.get(dataset_name)
        self._name, self._distributed, self._failure = dataset_name, distributed, failure
        self._num_points = len(metadata.get("keypoint_names") or ())
        flip = metadata.get("mesh_flip")
        self._faces: dict[Any, Faces] = {}
        first = 0
        for record in records:
            faces = _faces(record, first, self._num_points, flip and len(flip))
            self._faces[record["image_id"]] = faces
            first += len(faces.boxes)
        every = list(self._faces.values())
        self._boxes = np.concatenate([f.boxes for f in every])
        self._points = np.concatenate([f.points for f in every])
        self._has_mesh = np.array([m is not None for f in every for m in f.meshes], dtype=bool)
        self._mean_points = _mean_points(self._points, self._boxes)
        self._mean_mesh = _mean_mesh([m for f in every for m in f.meshes], self._boxes)
        self._coco = COCOEvaluator(
            dataset_name,
            ("bbox",),
            distributed,
            output_dir,
            use_fast_impl=False,
            content=_coco_content(records, metadata),
        )
        # Of each face that was found: its number and its errors, by kind and baseline.
        self._found: list[tuple[int, dict[str, float]]] = []
        # Of the detections of each image (N, 3): score, size, number of the face or -1. Those on
        # crowds are left out.
        self._detections: list[np.ndarray] = []
        self._seen: set[str] = set()

    def reset(self) -> None:
        """Forget all predictions."""
        self._coco.reset()
        self._found, self._detections, self._seen = [], [], set()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some images.

        Args:
            inputs: with ``image_id``.
            outputs: with ``instances``: ``pred_boxes``, ``scores``, ``pred_classes`` and, where
                predicted, ``pred_keypoints`` (N, K, 3) and ``pred_face_meshes`` (N, V, 3).

        Raises:
            ValueError: another number of points or vertices than the data set's.
        """
        for one_input, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes_alone = Instances(
                instances.image_size,
                **{k: instances.get(k) for k in ("pred_boxes", "scores", "pred_classes")},
            )
            self._coco.process([one_input], [{"instances": boxes_alone}])
            faces = self._faces[one_input["image_id"]]
            boxes = instances.pred_boxes.tensor.detach()
            pairs = match_faces(boxes, instances.scores.detach().numpy(), faces.boxes)
            selected, rows = list(pairs), list(pairs.values())
            self._detections.append(_detection_rows(instances, faces, pairs))
            errors: list[dict[str, float]] = [{} for _ in pairs]
            arguments = faces, selected, boxes.double().numpy()[rows], errors
            if instances.has("pred_keypoints") and self._mean_points is not None:
                points = instances.pred_keypoints.detach().double().numpy()[rows, :, :2]
                self._point_errors(points, *arguments)
            if instances.has("pred_face_meshes") and self._mean_mesh is not None:
                meshes = instances.pred_face_meshes.detach().double().numpy()[rows]
                self._mesh_errors(meshes, *arguments)
            self._found += [(faces.first + i, e) for i, e in zip(selected, errors, strict=True)]

    def _point_errors(
        self,
        points: np.ndarray,
        faces: Faces,
        selected: list[int],
        boxes: np.ndarray,
        errors: list[dict[str, float]],
    ) -> None:
        self._check("keypoints", points.shape[1], self._num_points)
        self._seen.add("points")
        targets, norms = faces.points[selected], _size(faces.boxes[selected])
        assert self._mean_points is not None
        pasted = from_box(self._mean_points, boxes)
        for key, predicted in (("points", points), ("mean points", pasted)):
            nmes = instance_nme(distances(predicted, targets), norms)
            for error, nme in zip(errors, nmes.tolist(), strict=True):
                error[key] = nme

    def _mesh_errors(
        self,
        meshes: np.ndarray,
        faces: Faces,
        selected: list[int],
        boxes: np.ndarray,
        errors: list[dict[str, float]],
    ) -> None:
        assert self._mean_mesh is not None
        self._check("vertices", meshes.shape[1], len(self._mean_mesh))
        self._seen.add("mesh")
        norms = _size(faces.boxes[selected])
        pasted = from_box(self._mean_mesh, boxes)
        for row, (i, norm) in enumerate(zip(selected, norms.tolist(), strict=True)):
            target = faces.meshes[i]
            if target is not None:
                for key, predicted in (("mesh", meshes[row]), ("mean mesh", pasted[row])):
                    error = np.linalg.norm(predicted - target, axis=1).mean()
                    errors[row][key] = float(error) / norm

    def _check(self, what: str, predicted: int, annotated: int) -> None:
        if predicted != annotated:
            raise ValueError(
                f"The model predicts {predicted} {what} of a face, data set '{self._name}' has "
                f"{annotated}."
            )

    def evaluate(self) -> dict[str, Any] | None:
        """Gather and score.

        Returns:
            None in all processes but the main one, else, in percent, ``bbox``: COCO's; ``faces``:
            ``AP50-<size>`` and ``recall-<size>`` (of :data:`SIZES`; NaN where there are none); where
            predicted and annotated ``points`` and ``mesh``: ``NME-<size>``, ``baseline-<size>``,
            ``recall-<size>`` (over faces with labelled points, or with a mesh) and ``failures-<size>``
            (of those found).
        """
        boxes = self._coco.evaluate()
        found, rows, seen = self._found, self._detections, self._seen
        if self._distributed:
            gathered = comm.gather((found, rows, seen), dst=0)
            if not comm.is_main_process():
                return None
            found, rows = (list(itertools.chain(*(g[i] for g in gathered))) for i in (0, 1))
            seen = set().union(*(g[2] for g in gathered))
        is_found = np.zeros(len(self._boxes), dtype=bool)
        is_found[[number for number, _ in found]] = True
        sizes = {name: self._of_size(name) for name in SIZES}
        recall = {f"recall-{k}": _percent(is_found[of_size]) for k, of_size in sizes.items()}
        detections = np.concatenate([np.zeros((0, 3)), *rows])
        by_size = {f"AP50-{name}": self._ap50(detections, name, k) for name, k in sizes.items()}
        results = OrderedDict(bbox=boxes["bbox"], faces={**by_size, **recall})
        annotated = {"points": (self._points[..., 2] > 0).any(axis=1), "mesh": self._has_mesh}
        for kind in (kind for kind in _KINDS if kind in seen):
            errors = {key: np.full(len(self._boxes), np.nan) for key in (kind, _KINDS[kind])}
            for number, of_face in found:
                for key, values in errors.items():
                    values[number] = of_face.get(key, np.nan)
            scores = {}
            for name, of_size in sizes.items():
                there = of_size & annotated[kind]
                scores[f"NME-{name}"] = _percent(errors[kind][there])
                scores[f"baseline-{name}"] = _percent(errors[_KINDS[kind]][there])
                scores[f"recall-{name}"] = _percent(is_found[there])
                scores[f"failures-{name}"] = 100 * failure_rate(errors[kind][there], self._failure)
            results[kind] = scores
        self._report(results, sizes)
        return results

    def _ap50(self, detections: np.ndarray, name: str, of_size: np.ndarray) -> float:
        """Percent, over all classes as one. As with COCO's areas, faces of other sizes count neither
        way, nor do detections of other sizes that find nothing."""
        scores, sizes, faces = detections.T
        low, high = SIZES[name]
        hits = faces >= 0
        counts = (sizes >= low) & (sizes < high)
        counts[hits] = of_size[faces[hits].astype(np.int64)]
        return 100 * average_precision(scores[counts], hits[counts], int(of_size.sum()))

    def _of_size(self, name: str) -> np.ndarray:
        low, high = SIZES[name]
        size = _size(self._boxes)
        return (size >= low) & (size < high)

    def _report(self, results: dict[str, Any], sizes: dict[str, np.ndarray]) -> None:
        kinds = [kind for kind in _KINDS if kind in results]
        headers = ["size", "faces", "AP50", "recall"]
        for kind in kinds:
            headers += [f"{kind} NME", _KINDS[kind], f"> {100 * self._failure:g} %"]
        table = []
        for name, of_size in sizes.items():
            row = [name, int(of_size.sum())]
            row += [results["faces"][f"{metric}-{name}"] for metric in ("AP50", "recall")]
            for kind in kinds:
                row += [results[kind][f"{key}-{name}"] for key in ("NME", "baseline", "failures")]
            table.append(row)
        text = tabulate(table, headers=headers, floatfmt=".2f")
        logger.info("Faces of %s, percent; NME of those found:\n%s", self._name, text)
        for kind in kinds:
            logger.info(
                "%s: NME %.2f %% at recall %.2f %%; %s pasted into the predicted boxes: %.2f %%.",
                kind,
                *(results[kind][f"{key}-all"] for key in ("NME", "recall")),
                _KINDS[kind],
                results[kind]["baseline-all"],
            )


def average_precision(scores: np.ndarray, hits: np.ndarray, faces: int) -> float:
    """COCO's: the mean of the precision envelope at 101 recalls.

    Args:
        scores: (N,) of the detections that count.
        hits: (N,) bool, it finds a face.
        faces: how many there are to find.

    Returns:
        0 to 1; NaN if there are none.
    """
    if faces == 0:
        return float("nan")
    found = hits[np.argsort(-scores, kind="stable")].cumsum()
    precision = found / np.arange(1, len(found) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(envelope[np.searchsorted(found / faces, np.linspace(0, 1, 101))].mean())


def _detection_rows(instances: Instances, faces: Faces, pairs: dict[int, int]) -> np.ndarray:
    """(N, 3) score, size, number of the face or -1; without those that count neither way: on a crowd
    by half, or without area."""
    boxes = instances.pred_boxes.tensor.detach()
    rows = np.column_stack([instances.scores.detach().numpy(), _size(boxes.double().numpy())])
    numbers = np.full(len(rows), -1.0)
    numbers[list(pairs.values())] = [faces.first + i for i in pairs]
    counts = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).numpy()
    if len(faces.crowds):
        on_crowd = pairwise_ioa(Boxes(faces.crowds), Boxes(boxes)).numpy().max(axis=0) >= 0.5
        counts &= ~on_crowd | (numbers >= 0)
    return np.column_stack([rows, numbers])[counts]


def _faces(record: dict[str, Any], first: int, num_points: int, vertices: int | None) -> Faces:
    crowds = [a for a in record.get("annotations", ()) if a.get("iscrowd", 0)]
    annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
    boxes = _boxes(annotations)
    usable = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    annotations = [a for a, keep in zip(annotations, usable, strict=True) if keep]
    points = np.zeros((len(annotations), num_points, 3))
    for row, annotation in zip(points, annotations, strict=True):
        if num_points and annotation.get("keypoints") is not None:
            row[:] = np.reshape(annotation["keypoints"], (num_points, 3))
    where = f"a face of '{record['file_name']}'"
    meshes = [
        None if a.get("mesh") is None else check_mesh(a["mesh"], vertices, where)
        for a in annotations
    ]
    return Faces(first, boxes[usable], points, meshes, _boxes(crowds))


def _boxes(annotations: list[dict[str, Any]]) -> np.ndarray:
    """(N, 4) float64 XYXY."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _size(boxes: np.ndarray) -> np.ndarray:
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1))


def _percent(values: np.ndarray) -> float:
    """Mean of what is a number; NaN if nothing is."""
    values = values[~np.isnan(values)]
    return 100 * float(values.mean()) if len(values) else float("nan")


def _mean_points(points: np.ndarray, boxes: np.ndarray) -> np.ndarray | None:
    """(K, 2) relative to the box, over labelled ones; None if none is."""
    labelled = points[..., 2] > 0
    if not labelled.any():
        return None
    relative = np.where(labelled[..., None], in_box(points[..., :2], boxes), 0.0)
    return relative.sum(axis=0) / np.maximum(labelled.sum(axis=0), 1)[:, None]


def _mean_mesh(meshes: list[np.ndarray | None], boxes: np.ndarray) -> np.ndarray | None:
    """(V, 3) relative to the box; None without meshes."""
    total, count = np.zeros(()), 0
    for mesh, box in zip(meshes, boxes, strict=True):
        if mesh is not None:
            total = total + in_box(mesh[None].astype(np.float64), box[None])[0]
            count += 1
    return total / count if count else None


def _coco_content(records: list[dict[str, Any]], metadata: Any) -> dict[str, Any]:
    """The boxes in COCO's form; sizes of images, which COCO's metrics do not read, reach around them."""
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {
        i: i for i in range(len(metadata.thing_classes))
    }
    of_class = {contiguous: category for category, contiguous in ids.items()}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        faces = [
            (a, box)
            for a, box in zip(
                record.get("annotations", ()), _boxes(record.get("annotations", ())), strict=True
            )
            if (box[2:] > box[:2]).all()
        ]
        far = max((math.ceil(box.max()) + 1 for _, box in faces), default=1)
        images.append(
            {
                "id": record["image_id"],
                "file_name": record["file_name"],
                **{key: max(record.get(key, 1), far) for key in ("height", "width")},
            }
        )
        for annotation, (x0, y0, x1, y1) in faces:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": of_class[annotation["category_id"]],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                }
            )
    names = metadata.thing_classes
    categories = [{"id": category, "name": names[i]} for i, category in sorted(of_class.items())]
    return {"images": images, "annotations": annotations, "categories": categories}
