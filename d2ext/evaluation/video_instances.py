"""Instances in videos: COCO's metrics of single frames, and how well tracks and ids are right."""

import contextlib
import copy
import io
import logging
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools.cocoeval import COCOeval, Params

from d2ext.data.errors import DatasetError
from d2ext.evaluation.coco import COCOEvaluator
from d2ext.evaluation.identity import (
    INSTALL,
    IdentityFrame,
    compare_frame,
    identity_available,
    identity_metrics,
)
from d2ext.evaluation.track_ap import Track, average_precision, evaluate_tracks, track_results

__all__ = ["VideoInstanceEvaluator"]

logger = logging.getLogger(__name__)


@dataclass
class _PredictedTrack:
    """One id of a video. Its class is the one with the largest sum of scores, its score the mean of its
    frames' scores; of several detections with the id in a frame the best is taken."""

    video_id: Hashable
    track_id: int
    category_id: int  # contiguous
    score: float
    detections: dict[Any, dict[str, Any]]  # image id -> COCO result


class VideoInstanceEvaluator(COCOEvaluator):
    """COCO's metrics on the annotated frames, as :class:`~d2ext.evaluation.coco.COCOEvaluator` has them,
    and, if ``instances`` have ``track_ids`` (-1: no id), metrics of the tracks:

    - ``segm_track``: AP, AP50, AR1, ... of YouTube-VIS (:mod:`~d2ext.evaluation.track_ap`) on the
      annotated frames, from masks;
    - with them, and as ``keypoints_track`` (by OKS) or, where there is neither, as ``bbox_track``:
      IDF1, HOTA, MOTA, ... (:mod:`~d2ext.evaluation.identity`) if the package is installed. All
      detections with an id count, whatever their score; objects of different classes do not match.
    - ``results.json``: YouTube-VIS's results, from masks: a list of ``video_id``, ``category_id``,
      ``score``, ``segmentations`` (RLE or null for each frame that the data set's JSON lists), and
      ``results_info.json``, which names the data set, since ids of several sets begin at 1.

    A track's class is the one with the largest sum of scores over its frames, its score their mean.
    The targets are the records of the data set, videos with frames. Without any annotated frame the
    results are written and nothing is compared. If outputs have ``key_distance``, the number of frames
    since the key frame, each task has ``AP-d<distance>``: AP on the frames at that distance alone.

    Args:
        dataset_name: registered; its records are videos.
        output_dir: folder for the results.
        coco: further arguments of :class:`~d2ext.evaluation.coco.COCOEvaluator`.
            The official implementation is used, whose matches ``AP-d<distance>`` reads.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, **coco: Any) -> None:
        videos = DatasetCatalog.get(dataset_name)
        frames = [frame for video in videos for frame in video["frames"]]
        self._name = dataset_name
        self._annotated = {f["image_id"] for f in frames if "annotations" in f}
        # Of all frames: video and place in it.
        self._places = {
            f["image_id"]: (v["video_id"], f["frame"]) for v in videos for f in v["frames"]
        }
        self._listed = {video["video_id"]: _listed_frames(video["frames"]) for video in videos}
        self._distances: dict[int, set[Any]] = {}
        content = _coco_content(dataset_name, frames)
        coco["use_fast_impl"] = False
        super().__init__(dataset_name, output_dir=output_dir, content=content, **coco)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some frames, annotated or not; see
        :meth:`COCOEvaluator.process <d2ext.evaluation.coco.COCOEvaluator.process>`."""
        for one_input, output in zip(inputs, outputs, strict=True):
            tracked = output["instances"].has("track_ids")
            if tracked or one_input["image_id"] in self._annotated:
                super().process([one_input], [output])
                distance = output.get("key_distance")
                self._predictions[-1].update(tracked=tracked, key_distance=distance)

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[Any] | None = None
    ) -> None:
        tracks = None
        without_ids = ""
        if any(p["tracked"] for p in predictions):
            tracks = self._predicted_tracks(predictions)
            if "segm" in self._fields:
                self._write_tracks(tracks)
        else:
            without_ids = "The predictions have no track ids (TEST.TRACKER gives them): "
        if not self._do_evaluation:
            what = f"{without_ids}there are no results. " if without_ids else ""
            logger.warning(
                f"{what}Data set '{self._name}' has no annotations: there is nothing to compare with."
            )
            return
        if without_ids:
            logger.warning(f"{without_ids}only single frames are evaluated.")
        # Before the evaluation of frames, which changes the results in place.
        results = {} if tracks is None else self._evaluate_tracks(tracks)
        predictions = [p for p in predictions if p["image_id"] in self._annotated]
        self._distances = defaultdict(set)
        for p in predictions:
            if p["key_distance"] is not None:
                self._distances[int(p["key_distance"])].add(p["image_id"])
        super()._eval_predictions(predictions, img_ids)
        self._results.update(results)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        for distance, images in sorted(self._distances.items()):
            results[f"AP-d{distance}"] = _ap_on(coco_eval, images)
        return results

    def _predicted_tracks(self, predictions: list[dict[str, Any]]) -> list[_PredictedTrack]:
        detections: defaultdict[tuple[Hashable, int], list[dict[str, Any]]] = defaultdict(list)
        for result in (
            x for p in predictions for x in p["instances"] if x.get("track_id", -1) >= 0
        ):
            detections[self._places[result["image_id"]][0], result["track_id"]].append(result)
        tracks = []
        for (video, track_id), results in detections.items():
            classes: defaultdict[int, float] = defaultdict(float)
            best: dict[Any, dict[str, Any]] = {}
            for result in sorted(results, key=_score):
                best[result["image_id"]] = result
            for result in best.values():
                classes[result["category_id"]] += _score(result)
            score = sum(map(_score, best.values())) / len(best)
            category = max(classes, key=lambda c: classes[c])
            tracks.append(_PredictedTrack(video, track_id, category, score, best))
        return tracks

    def _write_tracks(self, tracks: list[_PredictedTrack]) -> None:
        """YouTube-VIS's ``results.json``; tracks that no listed frame shows are left out."""
        results = []
        for track in tracks:
            length, places = self._listed[track.video_id]
            masks: list[Any] = [None] * length
            for image_id, mask in _masks(track).items():
                if image_id in places:
                    masks[places[image_id]] = mask
            if any(mask is not None for mask in masks):
                results.append(
                    {
                        "video_id": track.video_id,
                        "category_id": track.category_id,
                        "score": track.score,
                        "segmentations": masks,
                    }
                )
        self._write("results.json", results)
        self._write_json("results_info.json", {"dataset": self._name, "tracks": len(results)})

    def _evaluate_tracks(self, predicted: list[_PredictedTrack]) -> dict[str, dict[str, float]]:
        targets = list(self._coco_api.anns.values())
        results: dict[str, dict[str, float]] = {}
        has_masks = "segm" in self._fields and any("segmentation" in t for t in targets)
        if has_masks:
            results["segm_track"] = self._track_ap(targets, predicted)
        kinds = ["segm"] if has_masks else []
        if "keypoints" in self._fields and any(t.get("num_keypoints") for t in targets):
            kinds.append("keypoints")
        if identity_available():
            for kind in kinds or ["bbox"]:
                metrics = self._identity(kind, targets, predicted)
                results.setdefault(f"{kind}_track", {}).update(metrics)
        else:
            logger.warning("IDF1 and HOTA are left out: they need trackeval (%s).", INSTALL)
        for task, metrics in results.items():
            shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            logger.info("Tracks of '%s', %s: %s", self._name, task, shown)
        return results

    def _track_ap(
        self, targets: list[dict[str, Any]], predicted: list[_PredictedTrack]
    ) -> dict[str, float]:
        # An id that another class has, too, is another object.
        tracks: dict[tuple[Hashable, int, int], Track] = {}
        for target in (t for t in targets if "segmentation" in t):
            video, frame = self._places[target["image_id"]]
            key = (video, target["track_id"], target["category_id"])
            track = tracks.setdefault(key, Track(video, target["category_id"]))
            track.masks[frame] = self._coco_api.annToRLE(target)
            track.iscrowd = max(track.iscrowd, target["iscrowd"])
        ids = self._category_ids()
        predictions = []
        for p in predicted:
            masks = {self._places[i][1]: m for i, m in _masks(p).items() if i in self._annotated}
            if masks:
                predictions.append(Track(p.video_id, ids(p.category_id), masks, p.score))
        categories = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
        scorer = evaluate_tracks(list(tracks.values()), predictions, [c["id"] for c in categories])
        return track_results(scorer, [c["name"] for c in categories])

    def _identity(
        self, kind: str, targets: list[dict[str, Any]], predicted: list[_PredictedTrack]
    ) -> dict[str, float]:
        ids = self._category_ids()
        of_image: defaultdict[Any, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
        for target in targets:
            of_image[target["image_id"]][0].append(target)
        for track in predicted:
            for image_id, result in track.detections.items():
                entry = {**result, "category_id": ids(track.category_id)}
                of_image[image_id][1].append(entry)
        videos: defaultdict[Hashable, list[IdentityFrame]] = defaultdict(list)
        sigmas = self._kpt_oks_sigmas or Params("keypoints").kpt_oks_sigmas
        for image_id in sorted(self._annotated, key=lambda i: self._places[i][1]):
            frame = compare_frame(
                kind, *of_image[image_id], to_rle=self._coco_api.annToRLE, sigmas=sigmas
            )
            videos[self._places[image_id][0]].append(frame)
        return identity_metrics(list(videos.values()))


def _score(result: dict[str, Any]) -> float:
    return result.get("mask_score", result["score"])


def _masks(track: _PredictedTrack) -> dict[Any, dict[str, Any]]:
    """Image id -> mask that is not empty."""
    masks = {image_id: result["segmentation"] for image_id, result in track.detections.items()}
    return {image_id: mask for image_id, mask in masks.items() if mask_util.area(mask) > 0}


def _ap_on(scorer: COCOeval, images: Collection[Any]) -> float:
    """AP (0..100) on some of the images of an evaluation, from its matches."""
    part = copy.copy(scorer)
    everything = scorer.params.imgIds
    keep = [i for i, image in enumerate(everything) if image in images]
    part.params, part._paramsEval = copy.copy(scorer.params), copy.copy(scorer._paramsEval)
    part.params.imgIds = part._paramsEval.imgIds = [everything[i] for i in keep]
    starts = range(0, len(scorer.evalImgs), len(everything))
    part.evalImgs = [scorer.evalImgs[start + i] for start in starts for i in keep]
    with contextlib.redirect_stdout(io.StringIO()):
        part.accumulate()
    return average_precision(part.eval["precision"][:, :, :, 0, -1])


def _listed_frames(frames: Sequence[dict[str, Any]]) -> tuple[int, dict[Any, int]]:
    """How many frames the JSON lists, and the places of those that are here; all, if it has no list."""
    places = {f["image_id"]: f["json_index"] for f in frames if "json_index" in f}
    places = places or {f["image_id"]: f["frame"] for f in frames}
    return max(places.values(), default=-1) + 1, places


def _coco_content(dataset_name: str, frames: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """COCO's form of the annotated frames; without ``annotations`` if there are none."""
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.thing_classes
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
    category_ids = {index: category for category, index in ids.items()}
    points = metadata.get("keypoint_names")
    extra = {"keypoints": list(points)} if points else {}
    annotated = [f for f in frames if "annotations" in f]
    content: dict[str, Any] = {
        "images": [
            {"id": f["image_id"], **{k: f[k] for k in ("file_name", "height", "width")}}
            for f in annotated or frames
        ],
        "categories": [{"id": c, "name": names[i], **extra} for i, c in category_ids.items()],
    }
    if not annotated:
        return content
    content["annotations"] = []
    for frame in annotated:
        seen = set()
        for annotation in frame["annotations"]:
            key = (annotation["track_id"], annotation["category_id"])
            if key in seen:
                raise DatasetError(
                    f"Frame '{frame['file_name']}' of data set '{dataset_name}' has several objects of "
                    f"track {key[0]} and one class: give each object of a frame a track_id of its own."
                )
            seen.add(key)
            entry = _coco_annotation(annotation, with_keypoints=bool(points))
            entry.update(
                id=len(content["annotations"]) + 1,
                image_id=frame["image_id"],
                category_id=category_ids[annotation["category_id"]],
            )
            content["annotations"].append(entry)
    return content


def _coco_annotation(annotation: dict[str, Any], *, with_keypoints: bool) -> dict[str, Any]:
    """Detectron2's form -> COCO's, but for the ids."""
    fields = ("track_id", "segmentation", "area")
    entry = {key: annotation[key] for key in fields if annotation.get(key) is not None}
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYWH_ABS)
    entry.update(bbox=[float(v) for v in box], iscrowd=int(annotation.get("iscrowd", 0)))
    mask = entry.get("segmentation")
    if isinstance(mask, dict) and isinstance(mask["counts"], bytes):
        entry["segmentation"] = {**mask, "counts": mask["counts"].decode("ascii")}
    if with_keypoints and annotation.get("keypoints") is not None:
        # COCO's are pixel indices.
        values = annotation["keypoints"]
        entry["keypoints"] = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(values)]
        entry["num_keypoints"] = sum(v > 0 for v in values[2::3])
    return entry
