"""Landmark accuracy as a Detectron2 evaluator: PCK, PCKh, NME, failure rate, AUC, per landmark.

Annotations come from the registered data set: every annotation that is no crowd and has a labelled
landmark and a box (:func:`~d2ext.data.landmarks.samples.usable_annotations`). Landmarks that are not
labelled never count. An instance, or a landmark, that was not predicted counts as missed (PCK), as an
error of the whole norm (NME) and so as a failure. Predictions of no annotation have no effect.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils import comm
from tabulate import tabulate

from d2ext.data.errors import DatasetError
from d2ext.data.landmarks.samples import instance_box, instance_points, usable_annotations
from d2ext.evaluation.landmark_metrics import (
    area_under_curve,
    distances,
    failure_rate,
    instance_nme,
    pck,
    pck_counts,
    point_distance,
)
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

METRICS = ("nme", "pck", "pckh", "pck_hourglass")
# MPII's head size is this share of the head rectangle's diagonal.
_HEAD_SHARE = 0.6
# The published stacked hourglass measures in units of 20 pixels per unit of its own scale, which is
# 1.25 times MPII's.
_HOURGLASS_UNIT = 25.0
_PCK_THRESHOLDS = (0.05, 0.1, 0.2)
_PCKH_THRESHOLDS = (0.1, 0.5)
_HOURGLASS_THRESHOLDS = (0.5,)
# Boxes must overlap by this much for a prediction without an id to belong to an annotation.
_MATCH_IOU = 0.5
# Sets of up to this many landmarks have each landmark's error among the results.
_LISTED = 20

Annotation = dict[str, Any]


class LandmarkEvaluator(DatasetEvaluator):
    """Evaluates ``pred_keypoints``. See the module's header for what counts.

    Predictions are matched with annotations, in this order of preference, by ``instance_ids`` of the
    output; by order, if the input had ``gt_boxes`` and there are as many; as the only pair; by
    the overlap of ``pred_boxes`` (IoU from 0.5 on, best pairs first).
    """

    def __init__(
        self,
        dataset_name: str,
        metrics: Sequence[str] | None = None,
        *,
        norm: str | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
    ) -> None:
        """
        Args:
            dataset_name: registered data set with landmarks.
            metrics: of :data:`METRICS`; by default ``landmark_metrics`` of its metadata, or "nme"
                and "pck"; of those "pck_hourglass" only if every annotation has its person's scale.
            norm: of NME, see :func:`instance_norm`; by default the metadata's ``landmark_norm``.
            distributed: gather the predictions of all processes.
            output_dir: where ``landmark_results.json`` is written.

        Raises:
            DatasetError: the data set has no landmarks to evaluate, unknown metrics or norm.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._name = dataset_name
        self._metadata = metadata
        self._distributed = distributed
        self._output_dir = output_dir
        wanted = metrics or metadata.get("landmark_metrics") or ("nme", "pck")
        self._metrics = tuple(m for m in wanted if m != "oks")
        unknown = sorted(set(self._metrics) - set(METRICS))
        if unknown:
            raise DatasetError(f"Unknown landmark metrics {unknown}; choose from {METRICS}.")
        self._annotations: dict[Any, list[Annotation]] = {}
        for record in DatasetCatalog.get(dataset_name):
            annotations = usable_annotations(record)
            if annotations:
                self._annotations[record["image_id"]] = annotations
        if not self._annotations:
            raise DatasetError(f"Data set '{dataset_name}' has no labelled landmark to evaluate.")
        every = list(itertools.chain.from_iterable(self._annotations.values()))
        names = metadata.get("keypoint_names")
        count = len(every[0]["keypoints"]) // 3 if not names else len(names)
        self._names = list(names) if names else [f"point_{i}" for i in range(count)]
        self._targets = np.stack([instance_points(a, count) for a in every])
        self._every = every
        if metrics is None and not all("person_scale" in a for a in every):
            self._metrics = tuple(m for m in self._metrics if m != "pck_hourglass")
        self._norms = self._choose_norms(norm)
        self._heads: np.ndarray | None = None
        if "pckh" in self._metrics:
            point_norms = metadata.get("landmark_norms") or {}
            self._heads = instance_norm(self._head_norm(), every, self._targets, point_norms)
        self._predictions: list[tuple[Any, int, np.ndarray]] = []
        # Of the last evaluation: (N,) NME of each instance, as a fraction of the data set's norm, in
        # the order of `annotations`.
        self.instance_nme: np.ndarray | None = None

    @property
    def annotations(self) -> list[Annotation]:
        """(N) annotations that are evaluated."""
        return self._every

    def _choose_norms(self, norm: str | None) -> dict[str, np.ndarray]:
        """(N,) norms of NME by name, the selected one first; raises for what cannot be computed."""
        if "nme" not in self._metrics:
            return {}
        point_norms = self._metadata.get("landmark_norms") or {}
        selected = norm or self._metadata.get("landmark_norm") or "box"
        if selected == "head":
            selected = self._head_norm()
        names = dict.fromkeys([selected, "box", "diagonal", *point_norms])
        return {n: instance_norm(n, self._every, self._targets, point_norms) for n in names}

    def _head_norm(self) -> str:
        """The norm of PCKh; raises if there is none."""
        if all("head_box" in a for a in self._every):
            return "head"
        if "head_points" not in (self._metadata.get("landmark_norms") or {}):
            raise DatasetError(
                f"PCKh of '{self._name}' needs head boxes: register it with head_boxes=."
            )
        logger.warning(
            "Data set '%s' has no head boxes; PCKh is relative to the distance from neck to head "
            "top, which is not the official head size.",
            self._name,
        )
        return "head_points"

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some images.

        Args:
            inputs: with ``image_id`` and, where boxes were given, ``instances``.
            outputs: with ``instances`` that have ``pred_keypoints`` (n, K, 3), in continuous image
                coordinates.

        Raises:
            ValueError: another number of landmarks than the data set's.
        """
        for one_input, output in zip(inputs, outputs, strict=True):
            image_id = one_input["image_id"]
            annotations = self._annotations.get(image_id)
            if annotations is None or "instances" not in output:
                continue
            instances = output["instances"].to("cpu")
            if len(instances) == 0:
                continue
            if not instances.has("pred_keypoints"):
                raise ValueError("The model's instances have no pred_keypoints to evaluate.")
            points = instances.pred_keypoints.detach().double().numpy()
            if points.shape[1] != len(self._names):
                raise ValueError(
                    f"The model predicts {points.shape[1]} landmarks, data set '{self._name}' has "
                    f"{len(self._names)}. Set MODEL.LANDMARKS.NUM_KEYPOINTS or evaluate on other data."
                )
            for place, row in match_instances(one_input, instances, annotations).items():
                self._predictions.append((image_id, place, points[row, :, :2].copy()))

    def evaluate(self) -> dict[str, Any] | None:
        """Gather and score.

        Returns:
            ``{"landmarks": {metric: value}}``, values in percent; None in all processes but the main
            one. With metric "nme": ``NME`` (of the data set's norm), ``FR@t``, ``AUC@t``,
            ``NME_<norm>`` for others, ``NME-<attribute>`` over instances that have it. "pck":
            ``PCK@t`` of the box's longer side. "pckh": ``PCKh@t``. "pck_hourglass":
            ``PCK_hourglass@0.5``, the published number of the stacked hourglass: errors below half of
            20 pixels per unit of its scale (norm ``hourglass``), all landmarks. ``missing``: instances
            without prediction, percent. For small sets also ``<metric>-<landmark>``.
        """
        predictions = self._predictions
        if self._distributed:
            gathered = comm.gather(predictions, dst=0)
            if not comm.is_main_process():
                return None
            predictions = list(itertools.chain(*gathered))
        predicted = np.full((*self._targets.shape[:2], 2), np.nan)
        keys = [(i, k) for i, of_image in self._annotations.items() for k in range(len(of_image))]
        place = {key: row for row, key in enumerate(keys)}
        for image_id, i, points in predictions:
            predicted[place[image_id, i]] = points
        errors = distances(predicted, self._targets)
        results = {"missing": 100 * float(np.isnan(predicted).all(axis=(1, 2)).mean())}
        table: dict[str, list[float]] = {}
        if "nme" in self._metrics:
            results.update(self._nme(errors, table))
        if "pck" in self._metrics:
            sides = instance_norm("side", self._every, self._targets, {})
            results.update(self._pck("PCK", errors, sides, _PCK_THRESHOLDS, (), table))
        if self._heads is not None:
            skipped = self._metadata.get("landmark_not_scored") or ()
            results.update(self._pck("PCKh", errors, self._heads, _PCKH_THRESHOLDS, skipped, table))
        if "pck_hourglass" in self._metrics:
            units = instance_norm("hourglass", self._every, self._targets, {})
            title = "PCK_hourglass"
            results.update(
                self._pck(title, errors, units, _HOURGLASS_THRESHOLDS, (), table, strict=True)
            )
        self._report(results, table)
        return OrderedDict(landmarks=results)

    def _nme(self, errors: np.ndarray, table: dict[str, list[float]]) -> dict[str, float]:
        limit = self._metadata.get("landmark_failure") or 0.1
        results = {}
        for number, (name, norms) in enumerate(self._norms.items()):
            nmes = instance_nme(errors, norms)
            mean = 100 * _mean(nmes)
            if number > 0:
                results[f"NME_{name}"] = mean
                continue
            self.instance_nme = nmes
            results["NME"] = mean
            results[f"FR@{limit:g}"] = 100 * failure_rate(nmes, limit)
            results[f"AUC@{limit:g}"] = 100 * area_under_curve(nmes, limit)
            for attribute in sorted({k for a in self._every for k in a.get("attributes", {})}):
                selected = np.array(
                    [bool(a.get("attributes", {}).get(attribute)) for a in self._every]
                )
                if selected.any():
                    results[f"NME-{attribute}"] = 100 * _mean(nmes[selected])
            relative = errors / np.where(norms > 0, norms, np.nan)[:, None]
            relative[np.isinf(relative)] = 1.0
            table[f"NME ({name}, %)"] = [100 * _mean(column) for column in relative.T]
        return results

    def _pck(
        self,
        title: str,
        errors: np.ndarray,
        norms: np.ndarray,
        thresholds: Sequence[float],
        skipped: Sequence[int],
        table: dict[str, list[float]],
        strict: bool = False,
    ) -> dict[str, float]:
        scored = [i for i in range(len(self._names)) if i not in skipped]
        results = {}
        for threshold in thresholds:
            results[f"{title}@{threshold:g}"] = 100 * pck(
                errors, norms, threshold, strict=strict, landmarks=scored
            )
            hits, labelled = pck_counts(errors, norms, threshold, strict=strict)
            table[f"{title}@{threshold:g} (%)"] = [
                100 * h / n if n else math.nan for h, n in zip(hits, labelled, strict=True)
            ]
        return results

    def _report(self, results: dict[str, float], table: dict[str, list[float]]) -> None:
        """Log and write everything; add the landmarks of small sets to ``results``."""
        rows = [
            [name, *(column[i] for column in table.values())] for i, name in enumerate(self._names)
        ]
        logger.info(
            "Landmarks of '%s', %d instances: %s\n%s",
            self._name,
            len(self._every),
            ", ".join(f"{key} {value:.2f}" for key, value in results.items()),
            tabulate(rows, headers=["landmark", *table], floatfmt=".2f", tablefmt="pipe"),
        )
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            path = os.path.join(self._output_dir, "landmark_results.json")
            by_name = {
                key: dict(zip(self._names, map(_jsonable, column), strict=True))
                for key, column in table.items()
            }
            content = {
                "dataset": self._name,
                "instances": len(self._every),
                "results": {key: _jsonable(value) for key, value in results.items()},
                "landmarks": by_name,
            }
            with atomic_write(path, "w") as f:
                json.dump(content, f, indent=1)
        if len(self._names) <= _LISTED and table:
            title, column = next(iter(table.items()))
            for name, value in zip(self._names, column, strict=True):
                results[f"{title.split(' ')[0]}-{name}"] = value


def instance_norm(
    name: str,
    annotations: Sequence[Annotation],
    targets: np.ndarray,
    point_norms: dict[str, tuple[Sequence[int], Sequence[int]]],
) -> np.ndarray:
    """The pixels that count as 1, for each instance.

    ===================  =========================================================================
    ``box``              square root of width times height of ``bbox``
    ``side``             longer side of ``bbox``
    ``diagonal``         diagonal of ``bbox``
    ``box_size``         ``box_size`` of the annotation (AFLW)
    ``head``             0.6 of the diagonal of ``head_box`` (MPII)
    ``hourglass``        25 pixels per unit of ``person_scale``, as in the published stacked hourglass
    of ``point_norms``   distance between two groups of landmarks, such as ``inter_ocular``
    ===================  =========================================================================

    Returns:
        (N,) float64; instances whose norm is NaN or not positive are left out of the metric.

    Raises:
        DatasetError: unknown name, or annotations without what it needs.
    """
    if name in point_norms:
        return point_distance(targets, *point_norms[name])
    key = {"box_size": "box_size", "head": "head_box", "hourglass": "person_scale"}.get(name)
    if key is not None:
        if not all(key in a for a in annotations):
            raise DatasetError(f"Norm '{name}' needs '{key}' in every annotation.")
        values = np.array([a[key] for a in annotations], dtype=np.float64)
        if name == "head":
            return _HEAD_SHARE * np.hypot(values[:, 2] - values[:, 0], values[:, 3] - values[:, 1])
        return values * _HOURGLASS_UNIT if name == "hourglass" else values
    boxes = np.array([instance_box(a) for a in annotations], dtype=np.float64)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    if name == "box":
        return np.sqrt(np.maximum(width, 0) * np.maximum(height, 0))
    if name == "side":
        return np.maximum(width, height)
    if name == "diagonal":
        return np.hypot(width, height)
    known = ["box", "side", "diagonal", "box_size", "head", "hourglass", *point_norms]
    raise DatasetError(f"Unknown norm '{name}'; choose from {', '.join(known)}.")


def match_instances(
    one_input: dict[str, Any], instances: Instances, annotations: Sequence[Annotation]
) -> dict[int, int]:
    """Which prediction belongs to which annotation; see :class:`LandmarkEvaluator`.

    Returns:
        place in ``annotations`` → row of ``instances``; annotations without prediction are not there.
    """
    if instances.has("instance_ids"):
        rows = {int(key): row for row, key in enumerate(instances.instance_ids)}
        ids = [int(a.get("id", i)) for i, a in enumerate(annotations)]
        return {place: rows[key] for place, key in enumerate(ids) if key in rows}
    given = one_input.get("instances")
    in_order = given is not None and given.has("gt_boxes") and len(given) == len(annotations)
    if len(instances) == len(annotations) and (in_order or len(annotations) == 1):
        return {place: place for place in range(len(annotations))}
    if not instances.has("pred_boxes"):
        raise ValueError(
            f"{len(instances)} predictions without instance_ids and pred_boxes cannot be matched with "
            f"{len(annotations)} annotations."
        )
    boxes = instances.pred_boxes.tensor.new_tensor([instance_box(a) for a in annotations]).reshape(
        -1, 4
    )
    overlap = pairwise_iou(Boxes(boxes), instances.pred_boxes)
    result: dict[int, int] = {}
    for index in overlap.flatten().argsort(descending=True, stable=True).tolist():
        place, row = divmod(index, len(instances))
        if overlap[place, row] < _MATCH_IOU:
            break
        if place not in result and row not in result.values():
            result[place] = row
    return result


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _jsonable(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
