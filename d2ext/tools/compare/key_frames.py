"""What is lost between key frames: mask AP by distance from the key frame.

Frames are evaluated as published (yolact_edge/NOTES.md §5): in as many passes as a key frame has frames,
with key frames shifted by one each, so that every frame is seen at every distance. The fastest third of
the objects is also evaluated alone.
"""

from __future__ import annotations

import contextlib
import io
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
from d2ext.data.coco_json import compressed_rle
from d2ext.evaluation.track_ap import average_precision
from d2ext.systems.yolact_edge import YolactEdge, YolactEdgeMemory
from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison, Plot, Series

_CONFIG = "yolact_edge/yolact_edge_vid_shapes.yaml"
_AP = "mask AP"
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
        return [{**self._kept[0], "key_distance": outputs[0]["key_distance"]}], memory


@COMPARISONS.register()
def key_frames() -> Comparison:
    """One trained model, run in three ways."""
    distances = {f"d{d}": f"AP at distance {d}" for d in range(5)}
    return Comparison(
        summary="YolactEdge between key frames: mask AP by distance from the key frame",
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
    videos = DatasetCatalog.get(name)
    annotated = {x["image_id"]: x for v in videos for x in v["frames"] if "annotations" in x}
    # Of each distance, the annotated frames and the detections in them.
    groups: dict[int, tuple[list[dict[str, Any]], list[Annotation]]] = defaultdict(lambda: ([], []))
    batches = list(build_test_loader(cfg, name))
    model.test_all_phases = True
    for phase in model.evaluation_passes():
        for batch in batches:
            (output,) = model(batch)
            frame = annotated.get(batch[0]["image_id"])
            distance = output["key_distance"]
            if frame and (distance > 0 or frame["frame"] % model.key_interval == phase):
                frames, detections = groups[distance]
                frames.append(frame)
                instances = output["instances"].to("cpu")
                detections += instances_to_coco_json(instances, frame["image_id"])
    fast = fast_tracks(videos)
    results = {}
    series: Series = {"distance": [], "fast": []}
    for distance, group in sorted(groups.items()):
        for plot, key, tracks in (("distance", "d", None), ("fast", "fast/d", fast)):
            value = mask_ap(*group, tracks)
            results[f"{key}{distance}"] = value
            series[plot].append((float(distance), value, 0.0))
    return results, series


def fast_tracks(videos: Sequence[dict[str, Any]]) -> set[tuple[Any, int]]:
    """(video, track) of the fastest third.

    By the mean way of the box's centre from one annotated frame to the next.
    """
    centers: dict[tuple[Any, int], dict[int, np.ndarray]] = defaultdict(dict)
    for video in videos:
        annotated = [frame for frame in video["frames"] if "annotations" in frame]
        for place, frame in enumerate(annotated):
            for a in frame["annotations"]:
                box = BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)
                center = np.reshape(box, (2, 2)).mean(axis=0)
                centers[video["video_id"], a["track_id"]][place] = center
    speeds = {}
    for key, known in centers.items():
        ways = [np.linalg.norm(known[t + 1] - known[t]) for t in known if t + 1 in known]
        if ways:
            speeds[key] = float(np.mean(ways))
    limit = np.quantile(list(speeds.values()), 2 / 3) if speeds else 0.0
    return {key for key, speed in speeds.items() if speed >= limit}


def mask_ap(
    frames: Sequence[dict[str, Any]],
    detections: Sequence[Annotation],
    tracks: set[tuple[Any, int]] | None,
) -> float:
    """COCO's mask AP (0..100, NaN where no object counts) on some annotated frames.

    Args:
        detections: of these frames, COCO results with classes from 0.
        tracks: only these objects count, the others are ignored; None: all.
    """
    annotations: list[Annotation] = []
    for frame in frames:
        for a in frame["annotations"]:
            mask = compressed_rle(a["segmentation"], frame["height"], frame["width"])
            counted = tracks is None or (frame["video_id"], a["track_id"]) in tracks
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": frame["image_id"],
                    "category_id": a["category_id"],
                    "segmentation": mask,
                    "area": float(mask_util.area(mask)),
                    "iscrowd": int(a.get("iscrowd", 0) or not counted),
                }
            )
    if not detections:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        targets = COCO()
        targets.dataset = {
            "images": [
                {"id": f["image_id"], "height": f["height"], "width": f["width"]} for f in frames
            ],
            "categories": [{"id": i} for i in {a["category_id"] for a in annotations}],
            "annotations": annotations,
        }
        targets.createIndex()
        evaluation = COCOeval(targets, targets.loadRes(list(detections)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    return average_precision(evaluation.eval["precision"][:, :, :, 0, -1])
