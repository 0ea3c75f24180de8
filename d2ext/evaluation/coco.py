"""COCO's metrics for boxes, masks and keypoints."""

import contextlib
import copy
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from d2ext.codecs.landmark_crops import has_side, pad_boxes
from d2ext.data.coco_json import (
    INSTANCES,
    LANDMARKS,
    coco_file,
    evaluation_content,
    read_json,
)
from d2ext.evaluation.instance_analysis import InstanceAnalysis
from d2ext.evaluation.oks_nms import oks_nms
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

_FIELDS = {"pred_masks": "segm", "pred_keypoints": "keypoints"}


class COCOEvaluator(Detectron2COCOEvaluator):
    """Detectron2's COCO evaluator, with these differences:

    - ``Instances`` may have ``mask_scores`` (mask re-scoring): these rank the masks, ``scores`` the
      boxes and keypoints.
    - Detections whose box has no area are left out, as in the published YOLACT; those with keypoints
      only if it has neither width nor height, since points in a row are an object, too.
    - No detection at all gives AP 0 where annotations exist (Detectron2: NaN), for each
      task whose field the model predicts.
    - Annotations are what the loader has, checked and repaired (:mod:`d2ext.data.coco_json`), not the
      JSON file as it is. Masks are not scored where an object has only a box, if others have masks.
    - A data set that is not in a JSON file is converted anew for each evaluator; ``content`` gives its
      annotations instead.
    - ``track_ids`` of instances are ``track_id`` of the results.
    - With ``oks_nms_threshold``, instances whose keypoints are those of a better one are left out of
      all results (:func:`~d2ext.evaluation.oks_nms.oks_nms`), as in the published top-down systems.
    - Results are written under a temporary name and renamed: ``coco_instances_results.json`` in
      COCO's result format and, with mask scores, ``coco_instances_results_segm.json``, the same
      with them as scores. A results file is written whether or not annotations exist.

    Boxes of COCO results are XYWH in pixels; metrics range from 0 to 100.

    Args:
        dataset_name: registered data set, in COCO's JSON format or Detectron2's dicts.
        tasks: of "bbox", "segm", "keypoints"; by default what the model predicts.
        distributed: gather the predictions of all processes.
        output_dir: folder for the results; needed for data sets that are not in a JSON file.
        oks_nms_threshold: published: 0.9; 0: keep all.
        oks_nms_crop: (h, w) of a top-down network's crops and the padding of its boxes: the areas are
            those of the crops, as published; None: of the boxes.
        published_rounding: see ``TEST.PUBLISHED_ROUNDING``.
        false_discovery: add :func:`false_discovery` to the results of boxes.
        min_target_side: annotations narrower or lower than this share of their image are left out.
        ap_at: overlaps of 0.5, 0.55, ..., 0.95 whose AP is among the results ("AP70").
        content: what to compare with, in COCO's form, instead of the data set's JSON file.
        analysis_dir: folder for the analysis (:mod:`~d2ext.evaluation.instance_analysis`); None: none.
        max_dets_per_image, use_fast_impl, kpt_oks_sigmas: see Detectron2's evaluator.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[str, ...] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        oks_nms_threshold: float = 0.0,
        oks_nms_crop: tuple[tuple[int, int], float] | None = None,
        published_rounding: bool = False,
        false_discovery: bool = False,
        min_target_side: float = 0.0,
        ap_at: Sequence[float] = (),
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        content: dict[str, Any] | None = None,
        analysis_dir: str | None = None,
    ) -> None:
        # Not Detectron2's constructor, which reads the file as it is.
        self._logger = logger
        self._distributed = distributed
        self._use_fast_impl = use_fast_impl
        self._max_dets_per_image = [1, 10, max_dets_per_image or 100]
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._kpt_oks_sigmas = kpt_oks_sigmas
        annotations = _read_annotations(dataset_name, output_dir, content)
        self._do_evaluation = annotations["annotations"] is not None
        if self._do_evaluation and min_target_side > 0:
            annotations["annotations"] = _large_enough(annotations, min_target_side)
        self._coco_api = _coco_api(annotations)
        self._tasks: tuple[str, ...] | list[str] | None = tasks
        self._output_dir = output_dir
        self._results: dict[str, dict[str, float]] = {}
        self._fields: set[str] = set()
        self._oks_nms_threshold = oks_nms_threshold
        self._oks_nms_crop = oks_nms_crop
        self._published_rounding = published_rounding
        self._false_discovery = false_discovery
        self._ap_at = ap_at
        self._analysis = None if analysis_dir is None else InstanceAnalysis(analysis_dir)
        self._image_files: dict[Any, str] = {}  # of images that this process saw, by their ids

    def reset(self) -> None:
        """Forget all predictions."""
        super().reset()
        self._fields = set()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some images.

        Args:
            inputs: with ``image_id``.
            outputs: with ``instances``: ``pred_boxes`` (XYXY, pixels), ``scores``, ``pred_classes``
                and, where predicted, ``pred_masks`` (N, H, W) bool, ``pred_keypoints`` (N, K, 3),
                ``mask_scores`` (N,).
        """
        for one_input, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:
                super().process([one_input], [output])
                continue
            instances = output["instances"].to("cpu")
            self._fields.update(task for field, task in _FIELDS.items() if instances.has(field))
            if self._oks_nms_threshold > 0 and instances.has("pred_keypoints"):
                instances = instances[self._different_poses(instances)]
            image_id = one_input["image_id"]
            results = _to_coco(instances, image_id)
            if self._published_rounding:
                for result in results:
                    result["score"] = round(result["score"], 2)
                    result["bbox"] = [round(v, 2) for v in result["bbox"]]
            self._predictions.append({"image_id": image_id, "instances": results})
            if self._analysis is not None and "file_name" in one_input:
                self._image_files[image_id] = one_input["file_name"]

    def _different_poses(self, instances: Instances) -> torch.Tensor:
        """Indices of the instances that :func:`oks_nms` selects.

        Raises:
            ValueError: another number of keypoints than of constants.
        """
        boxes, points = instances.pred_boxes.tensor, instances.pred_keypoints[..., :2]
        sigmas = torch.tensor(self._kpt_oks_sigmas or Params("keypoints").kpt_oks_sigmas)
        if len(sigmas) != points.shape[1]:
            raise ValueError(
                f"TEST.KEYPOINT_OKS_NMS needs a constant for each of {points.shape[1]} keypoints; "
                f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)}."
            )
        if self._oks_nms_crop is not None:
            boxes = pad_boxes(boxes, *self._oks_nms_crop)
        return oks_nms(
            points,
            instances.scores,
            Boxes(boxes).area(),
            sigmas,
            self._oks_nms_threshold,
            instances.pred_classes,
        )

    def evaluate(self, img_ids: list[Any] | None = None) -> dict[str, Any]:
        """Gather, write and score the predictions.

        Args:
            img_ids: images to evaluate on; by default all of the data set.

        Returns:
            ``{task: {metric: 0..100}}``, with "AP-<class>" for each class; empty in all processes
            but the main one.
        """
        if self._distributed:
            self._fields = set().union(*comm.all_gather(self._fields))
            if self._analysis is not None:
                for files in comm.all_gather(self._image_files):
                    self._image_files.update(files)
            gathered = comm.gather(self._predictions, dst=0)
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain(*gathered))
        else:
            predictions = self._predictions
        self._results = {}
        if any("proposals" in x for x in predictions):
            self._eval_box_proposals(predictions)
        else:
            self._eval_predictions(predictions, img_ids=img_ids)
            if self._analysis is not None:
                self._analysis.write()
        return copy.deepcopy(self._results)

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[Any] | None = None
    ) -> None:
        results = [x for p in predictions for x in p["instances"]]
        tasks = self._tasks or ["bbox", *sorted(self._fields)]
        by_mask = [
            {**x, "score": x["mask_score"]} if "mask_score" in x else dict(x) for x in results
        ]
        rescored = any("mask_score" in x for x in results)
        for result in itertools.chain(results, by_mask):
            result.pop("mask_score", None)
        # Before the evaluation, which adds entries to the results.
        self._write("coco_instances_results.json", by_mask if tasks == ["segm"] else results)
        if rescored and "segm" in tasks:
            self._write("coco_instances_results_segm.json", by_mask)

        if not results:
            self._logger.warning("The model detected nothing in %d images.", len(predictions))
            if self._do_evaluation:
                for task in sorted(tasks):
                    self._results[task] = self._score_nothing(task, img_ids)
            return
        # The base class maps class indices to category ids, in place, and evaluates `_tasks`; it
        # would write the file of the second call over that of the first.
        all_tasks, folder, annotations = self._tasks, self._output_dir, self._coco_api
        try:
            self._output_dir = None
            for ranked, group in (
                (results, [t for t in tasks if t != "segm"]),
                (by_mask, [t for t in tasks if t == "segm"]),
            ):
                if group:
                    self._tasks = group
                    if group == ["segm"]:
                        self._coco_api = _with_masks(annotations)
                    super()._eval_predictions([{"instances": ranked}], img_ids=img_ids)
        finally:
            self._tasks, self._output_dir, self._coco_api = all_tasks, folder, annotations

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is not None and class_names is not None:
            # The scorer's order is that of the category ids, and metadata may name more classes
            # (a panoptic set's stuff).
            categories = self._coco_api.loadCats(coco_eval.params.catIds)
            class_names = [category["name"] for category in categories]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        for overlap in self._ap_at if coco_eval is not None else ():
            (place,) = np.flatnonzero(np.isclose(coco_eval.params.iouThrs, overlap))
            precision = coco_eval.eval["precision"][place, :, :, 0, -1]
            results[f"AP{100 * overlap:.0f}"] = 100 * _mean(precision)
        if self._false_discovery and iou_type == "bbox" and coco_eval is not None:
            rates = false_discovery(coco_eval)
            shown = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
            self._logger.info("False discovery (%%): %s", shown)
            results.update(rates)
        if self._analysis is not None and coco_eval is not None:
            self._analysis.add(coco_eval, iou_type, self._image_files.get)
        return results

    def _score_nothing(self, task: str, img_ids: list[Any] | None) -> dict[str, float]:
        detections = COCO()  # its own loadRes fails on an empty list
        detections.dataset = {
            "images": self._coco_api.dataset["images"],
            "categories": self._coco_api.dataset["categories"],
            "annotations": [],
        }
        detections.createIndex()
        annotations = _with_masks(self._coco_api) if task == "segm" else self._coco_api
        scorer = COCOeval(annotations, detections, task)
        if img_ids is not None:
            scorer.params.imgIds = img_ids
        if task != "keypoints":
            scorer.params.maxDets = self._max_dets_per_image
        elif self._kpt_oks_sigmas:
            scorer.params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        return self._derive_coco_results(
            scorer, task, class_names=self._metadata.get("thing_classes")
        )

    def _write(self, name: str, results: list[dict[str, Any]]) -> None:
        if not self._output_dir:
            return
        ids = self._category_ids()
        self._write_json(name, [{**x, "category_id": ids(x["category_id"])} for x in results])

    def _write_json(self, name: str, content: Any) -> None:
        if not self._output_dir:
            return
        path = os.path.join(self._output_dir, name)
        self._logger.info("Saving results to %s", path)
        try:
            os.makedirs(self._output_dir, exist_ok=True)
            with atomic_write(path, "w") as file:
                json.dump(content, file)
        except OSError as error:
            # A full disk should cost the file, not the scores, nor the training that asked for them.
            self._logger.error(
                "Could not write %s (%s). The scores are not affected; to get the file, free space "
                "and evaluate again.",
                path,
                error,
            )

    def _category_ids(self) -> Callable[[int], int]:
        """Maps a class index to the data set's category id."""
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            return lambda index: index
        ids = {index: category for category, index in mapping.items()}

        def category_of(index: int) -> int:
            if index not in ids:
                raise ValueError(
                    f"The model predicted class {index}, but the data set has only the {len(ids)} "
                    f"classes 0 to {len(ids) - 1}. The class count of the config (NUM_CLASSES) must "
                    "be that of the data set."
                )
            return ids[index]

        return category_of


def false_discovery(coco_eval: Any) -> dict[str, float]:
    """How many detections are false (CenterNet with triplets, arXiv 1904.08189): 100 minus AP at
    low overlaps.

    Args:
        coco_eval: pycocotools' evaluation, of which annotations, detections and limits are taken.

    Returns:
        percent: ``FD`` at IoU 0.05, 0.1, ..., 0.5; ``FD5``, ``FD25``, ``FD50`` at one of them; ``FDs``,
        ``FDm``, ``FDl`` by COCO's areas; NaN where nothing is annotated.
    """
    scorer = COCOeval(coco_eval.cocoGt, coco_eval.cocoDt, "bbox")
    scorer.params.imgIds = coco_eval.params.imgIds
    scorer.params.maxDets = coco_eval.params.maxDets
    scorer.params.iouThrs = np.linspace(0.05, 0.5, 10)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][..., -1]  # (10 IoUs, 101 recalls, classes, 4 areas)
    parts = {
        "FD": precision[..., 0],
        **{f"FD{round(5 * (i + 1))}": precision[i, ..., 0] for i in (0, 4, 9)},
        **{f"FD{area}": precision[..., i + 1] for i, area in enumerate("sml")},
    }
    return {name: 100 * (1 - _mean(values)) for name, values in parts.items()}


def _mean(precision: np.ndarray) -> float:
    """Of pycocotools' values, which are -1 where nothing is annotated; NaN if all are."""
    known = precision[precision > -1]
    return float(known.mean()) if len(known) else float("nan")


def _large_enough(content: dict[str, Any], share: float) -> list[dict[str, Any]]:
    """The annotations whose box is at least ``share`` of its image wide and high."""
    sizes = {i["id"]: (share * i["width"], share * i["height"]) for i in content["images"]}
    return [
        a
        for a in content["annotations"]
        if a["bbox"][2] >= sizes[a["image_id"]][0] and a["bbox"][3] >= sizes[a["image_id"]][1]
    ]


def _read_annotations(
    dataset_name: str, output_dir: str | None, content: dict[str, Any] | None
) -> dict[str, Any]:
    """COCO's form of a data set, as its reader has it; annotations are None in files for tests."""
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file") if content is None else f"records of {dataset_name}"
    if json_file is None:
        if output_dir is None:
            raise ValueError(
                f"'{dataset_name}' is not in a JSON file: COCOEvaluator needs output_dir."
            )
        json_file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
        convert_to_coco_json(dataset_name, json_file, allow_cached=False)
    content = read_json(json_file) if content is None else content
    schema = LANDMARKS if metadata.get("evaluator_type") == "landmarks" else INSTANCES
    if isinstance(content, dict) and "annotations" not in content:
        file = coco_file(json_file, {**content, "annotations": []}, schema=schema)
        return {**evaluation_content(file), "annotations": None}
    return evaluation_content(coco_file(json_file, content, schema=schema))


def _coco_api(content: dict[str, Any]) -> COCO:
    api = COCO()
    api.dataset = {k: v for k, v in content.items() if v is not None}
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def _with_masks(api: COCO) -> COCO:
    """The annotations for the evaluation of masks: where there is only a box, nothing is scored."""
    annotations = api.dataset["annotations"]
    boxes = sum("segmentation" not in a for a in annotations)
    if not boxes:
        return api
    logger.warning(
        "%d of %d objects have no mask: no mask is scored there.", boxes, len(annotations)
    )
    return _coco_api({**api.dataset, "annotations": [_unscored(a) for a in annotations]})


def _unscored(annotation: dict[str, Any]) -> dict[str, Any]:
    if "segmentation" in annotation:
        return annotation
    x, y, w, h = annotation["bbox"]
    rectangle = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {**annotation, "segmentation": rectangle, "iscrowd": 1}


def _to_coco(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """Detections on the CPU -> COCO results, with ``mask_score`` and ``track_id`` if given."""
    boxes = instances.pred_boxes.tensor
    keep = has_side(boxes)
    if not instances.has("pred_keypoints"):
        keep &= (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    instances = instances[keep]
    results = instances_to_coco_json(instances, image_id)
    for field, key in (("mask_scores", "mask_score"), ("track_ids", "track_id")):
        if instances.has(field):
            for result, value in zip(results, instances.get(field).tolist(), strict=True):
                result[key] = value
    return results
