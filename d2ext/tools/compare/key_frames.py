"""What is lost between key frames: mask AP by distance from the key frame, and the time of a frame.

Frames are evaluated as published (yolact_edge/NOTES.md §5): in as many passes as a key frame has frames,
with key frames shifted by one each, so that every frame is seen at every distance. The fastest third of
the objects, by the mean way of their box's centre from frame to frame, is also evaluated alone.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from d2ext.data import build_test_loader
from d2ext.systems.yolact_edge import YolactEdge, YolactEdgeMemory
from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison, Plot, Series

_CONFIG = "yolact_edge/yolact_edge_vid_shapes.yaml"
_AP = "mask AP"
# COCO's limit of detections a frame.
_MAX_DETECTIONS = 100
Annotation = dict[str, Any]


class KeptKeyFrame(YolactEdge):
    """The results of the last key frame, unchanged: what carrying over must be better than."""

    _kept: Sequence[dict[str, Any]] = ()

    def step(
        self, inputs: list[dict[str, Any]], memory: YolactEdgeMemory | None
    ) -> tuple[list[dict[str, Any]], YolactEdgeMemory | None]:
        """As :class:`YolactEdge`; for one video at a time."""
        outputs, memory = super().step(inputs, memory)
        if outputs[0]["key_distance"] == 0:
            self._kept = outputs
        return [{**x, **y} for x, y in zip(self._kept, _distances(outputs), strict=True)], memory


def _distances(outputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"key_distance": x["key_distance"]} for x in outputs]


@COMPARISONS.register()
def key_frames() -> Comparison:
    """One trained model, run in three ways."""
    distances = {f"d{d}": f"AP at distance {d}" for d in range(5)}
    return Comparison(
        summary="YolactEdge between key frames: mask AP by distance from the key frame, time of a frame",
        arms={
            "carried": Arm("features carried over", _CONFIG),
            "every_frame": Arm(
                "every frame a key frame",
                _CONFIG,
                ("MODEL.YOLACT_EDGE.KEY_INTERVAL", "1"),
                trained_by="carried",
            ),
            "kept": Arm(
                "masks of the key frame kept",
                _CONFIG,
                trained_by="carried",
                build=lambda cfg: KeptKeyFrame(cfg).to(cfg.MODEL.DEVICE),
            ),
        },
        columns={
            **distances,
            "fast/d0": "fastest third, 0",
            "fast/d4": "fastest third, 4",
            "ms": "ms a frame",
        },
        measure=measure,
        plots={
            "distance": Plot("frames since the key frame", _AP),
            "fast": Plot("frames since the key frame", f"{_AP}, fastest third"),
        },
    )


@torch.no_grad()
def measure(cfg: CfgNode, model: nn.Module) -> tuple[dict[str, float], Series]:
    """AP by distance, of all objects and of the fastest third."""
    assert isinstance(model, YolactEdge)
    (name,) = cfg.DATASETS.TEST
    groups: dict[int, list[tuple[dict[str, Any], list[Annotation]]]] = defaultdict(list)
    seconds = []
    batches = list(build_test_loader(cfg, name))
    model.test_all_phases = True
    for phase in model.evaluation_passes():
        model.train()
        model.eval()  # forgets the memory
        for batch in batches:
            start = time.perf_counter()
            (output,) = model(batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            (inputs,) = batch
            distance = output["key_distance"]
            if distance > 0 or inputs["frame"] % model.key_interval == phase:
                found = instances_to_coco_json(output["instances"].to("cpu"), inputs["image_id"])
                groups[distance].append((inputs, found))
    fast = fast_tracks(DatasetCatalog.get(name))
    results = {"ms": 1e3 * float(np.mean(seconds))}
    series: Series = {"distance": [], "fast": []}
    for distance, frames in sorted(groups.items()):
        for plot, key, tracks in (("distance", "d", None), ("fast", "fast/d", fast)):
            value = average_precision(frames, DatasetCatalog.get(name), tracks)
            results[f"{key}{distance}"] = value
            series[plot].append((float(distance), value, 0.0))
    return results, series


def fast_tracks(videos: Sequence[dict[str, Any]]) -> set[tuple[Any, int]]:
    """(video, track) of the fastest third: by the mean way of the box's centre from frame to frame."""
    centers: dict[tuple[Any, int], dict[int, np.ndarray]] = defaultdict(dict)
    for video in videos:
        for frame in video["frames"]:
            for annotation in frame.get("annotations", ()):
                key = (video["video_id"], annotation["track_id"])
                centers[key][frame["frame"]] = _box(annotation).reshape(2, 2).mean(axis=0)
    speeds = {}
    for key, known in centers.items():
        ways = [np.linalg.norm(known[t + 1] - known[t]) for t in known if t + 1 in known]
        if ways:
            speeds[key] = float(np.mean(ways))
    limit = np.quantile(list(speeds.values()), 2 / 3)
    return {key for key, speed in speeds.items() if speed >= limit}


def _box(annotation: Annotation) -> np.ndarray:
    mode = annotation.get("bbox_mode", BoxMode.XYWH_ABS)
    return np.array(BoxMode.convert(list(annotation["bbox"]), mode, BoxMode.XYXY_ABS))


def average_precision(
    frames: Sequence[tuple[dict[str, Any], list[Annotation]]],
    videos: Sequence[dict[str, Any]],
    tracks: set[tuple[Any, int]] | None,
) -> float:
    """COCO's mask AP (0..100) of detections on some annotated frames.

    Args:
        frames: (input, detections as COCO results with classes from 0).
        tracks: only these objects count, the others are ignored; None: all.
    """
    annotated = {x["image_id"]: x for v in videos for x in v["frames"] if "annotations" in x}
    images: list[dict[str, Any]] = []
    annotations: list[Annotation] = []
    detections: list[Annotation] = []
    for inputs, found in frames:
        record = annotated.get(inputs["image_id"])
        if record is None:
            continue
        height, width = record["height"], record["width"]
        images.append({"id": record["image_id"], "height": height, "width": width})
        detections += found
        for a in record["annotations"]:
            mask = a["segmentation"]
            if isinstance(mask, list):
                mask = mask_util.merge(mask_util.frPyObjects(mask, height, width))
            counted = tracks is None or (record["video_id"], a["track_id"]) in tracks
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": a["category_id"],
                    "segmentation": mask,
                    "area": float(mask_util.area(mask)),
                    "bbox": mask_util.toBbox(mask).tolist(),
                    "iscrowd": int(a.get("iscrowd", 0) or not counted),
                }
            )
    categories = [{"id": i} for i in sorted({a["category_id"] for a in annotations})]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
        truth.createIndex()
        if not detections:
            return 0.0
        evaluation = COCOeval(truth, truth.loadRes(detections), "segm")
        evaluation.params.maxDets = [1, 10, _MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])
