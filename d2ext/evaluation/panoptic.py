"""Detectron2's panoptic evaluator, made to survive what happens in practice."""

import contextlib
import io
import itertools
import json
import logging
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator as _COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from tabulate import tabulate

from d2ext.data.panoptic import read_panoptic_json, read_segments
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

_GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}
# From this many images on, panopticapi's processes pay.
_PARALLEL_FROM = 200


class COCOPanopticEvaluator(_COCOPanopticEvaluator):
    """Panoptic quality by panopticapi, or by hotcoco, which computes the same in a tenth of the time.

    Beside what Detectron2's evaluator does:

    - the model's output is left as it is, so that other evaluators can read it, too;
    - images of equal names in different folders do not overwrite each other;
    - an image without a prediction (it could not be read) counts as void instead of ending the
      evaluation;
    - where no thing or no stuff occurs, the numbers of that group are NaN, not an error.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, backend: str = "panopticapi"
    ) -> None:
        """
        Args:
            dataset_name: a panoptic data set
            output_dir: where ``predictions.json`` is written
            backend: "panopticapi" or "hotcoco"
        """
        if backend not in ("panopticapi", "hotcoco"):
            raise ValueError(
                f"TEST.PANOPTIC_BACKEND is {backend!r}; choose 'panopticapi' or 'hotcoco'."
            )
        super().__init__(dataset_name, output_dir)
        self._backend = backend
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some images: ``panoptic_seg``, a map and its segments."""
        for one_input, output in zip(inputs, outputs, strict=True):
            segments, info = output["panoptic_seg"]
            # The base class changes them in place, and takes only True itself for true.
            info = None if info is None else [_plain(segment) for segment in info]
            super().process([one_input], [{"panoptic_seg": (segments.cpu().clone(), info)}])
            self._predictions[-1]["file_name"] = f"{one_input['image_id']}.png".replace("/", "_")

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """Gather, write and score the predictions.

        Returns:
            ``{"panoptic_seg": {metric: 0..100}}``: PQ, SQ, RQ, and the same with ``_th`` for things
            and ``_st`` for stuff; None in all processes but the main one
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = {p["image_id"]: p for p in itertools.chain(*gathered)}
        annotation_folder = PathManager.get_local_path(self._metadata.panoptic_root)
        content = read_panoptic_json(self._metadata.panoptic_json)
        _add_areas(content["annotations"], annotation_folder)
        with tempfile.TemporaryDirectory(prefix="panoptic_eval") as folder:
            annotation_file = os.path.join(folder, "annotations.json")
            Path(annotation_file).write_text(json.dumps(content), encoding="utf-8")
            content["annotations"] = self._write_maps(
                content, predictions, annotation_folder, folder
            )
            predictions_file = os.path.join(self._output_dir or folder, "predictions.json")
            with atomic_write(predictions_file, "w") as f:
                json.dump(content, f)
            score = _score_hotcoco if self._backend == "hotcoco" else _score_panopticapi
            groups = score(annotation_file, predictions_file, annotation_folder, folder)
        results: dict[str, float] = {}
        for group, suffix in _GROUPS.items():
            for metric in ("pq", "sq", "rq"):
                results[metric.upper() + suffix] = 100 * groups[group][metric]
        _log_table(groups)
        return OrderedDict({"panoptic_seg": results})

    def _write_maps(
        self,
        annotations: dict[str, Any],
        predictions: dict[Any, dict[str, Any]],
        annotation_folder: str,
        folder: str,
    ) -> list[dict[str, Any]]:
        """Write the PNGs of all images; returns their entries for the JSON file."""
        entries, absent = [], []
        for annotation in annotations["annotations"]:
            prediction = dict(predictions.get(annotation["image_id"], {}))
            if not prediction:
                absent.append(annotation["image_id"])
                with Image.open(os.path.join(annotation_folder, annotation["file_name"])) as image:
                    void = Image.fromarray(np.zeros((image.height, image.width, 3), np.uint8))
                name = f"{annotation['image_id']}.png".replace("/", "_")
                prediction = {
                    "image_id": annotation["image_id"],
                    "file_name": name,
                    "segments_info": [],
                }
                void.save(os.path.join(folder, name))
            else:
                Path(folder, prediction["file_name"]).write_bytes(prediction.pop("png_string"))
            entries.append(prediction)
        if absent:
            logger.error(
                f"{len(absent)} of {len(entries)} images have no prediction and count as void: "
                f"{', '.join(map(str, absent[:5]))}."
            )
        return entries


def _add_areas(annotations: list[dict[str, Any]], folder: str) -> None:
    """Complete the segments, in place: ``area`` from the PNG where it is missing, ``iscrowd`` 0."""
    computed = 0
    for annotation in annotations:
        segments = annotation["segments_info"]
        if not all("area" in segment for segment in segments):
            computed += 1
            path = os.path.join(folder, annotation["file_name"])
            places = read_segments(path, segments, allow_absent=True)
            areas = np.bincount(places.reshape(-1), minlength=len(segments) + 1)[1:].tolist()
            for segment, area in zip(segments, areas, strict=True):
                segment["area"] = area
        for segment in segments:
            segment.setdefault("iscrowd", 0)
    if computed:
        logger.info(f"Areas of segments are computed from the PNGs of {computed} images.")


def _plain(segment: dict[str, Any]) -> dict[str, Any]:
    """What is scored of a segment, in Python's own types."""
    result: dict[str, Any] = {key: int(segment[key]) for key in ("id", "category_id")}
    if segment.get("isthing") is not None:
        result["isthing"] = bool(segment["isthing"])
    return result


def _score_panopticapi(
    annotation_file: str, predictions_file: str, annotation_folder: str, folder: str
) -> dict[str, Any]:
    from panopticapi.evaluation import pq_compute_multi_core, pq_compute_single_core

    annotations, predictions = (
        json.loads(Path(file).read_text(encoding="utf-8"))
        for file in (annotation_file, predictions_file)
    )
    categories = {c["id"]: c for c in annotations["categories"]}
    pairs = list(zip(annotations["annotations"], predictions["annotations"], strict=True))
    with contextlib.redirect_stdout(io.StringIO()):
        if len(pairs) < _PARALLEL_FROM:
            stat = pq_compute_single_core(0, pairs, annotation_folder, folder, categories)
        else:
            stat = pq_compute_multi_core(pairs, annotation_folder, folder, categories)
    groups = {}
    for group, isthing in (("All", None), ("Things", 1), ("Stuff", 0)):
        counted = [
            stat[i].tp + stat[i].fp + stat[i].fn
            for i, c in categories.items()
            if isthing is None or c["isthing"] == isthing
        ]
        groups[group] = stat.pq_average(categories, isthing)[0] if any(counted) else _nothing()
    return groups


def _score_hotcoco(
    annotation_file: str, predictions_file: str, annotation_folder: str, folder: str
) -> dict[str, Any]:
    try:
        from hotcoco.panoptic import pq_compute
    except ImportError as error:
        raise ImportError(
            "TEST.PANOPTIC_BACKEND is 'hotcoco', which is not installed: pip install hotcoco, or "
            "set it to 'panopticapi'."
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        results = pq_compute(annotation_file, predictions_file, annotation_folder, folder)
    return {group: results[group] if results[group]["n"] else _nothing() for group in _GROUPS}


def _nothing() -> dict[str, Any]:
    return {"pq": float("nan"), "sq": float("nan"), "rq": float("nan"), "n": 0}


def _log_table(groups: dict[str, Any]) -> None:
    rows = [
        [group, *(100 * values[k] for k in ("pq", "sq", "rq")), values["n"]]
        for group, values in groups.items()
    ]
    headers = ["", "PQ", "SQ", "RQ", "#categories"]
    table = tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="center")
    logger.info(f"Panoptic evaluation:\n{table}")
