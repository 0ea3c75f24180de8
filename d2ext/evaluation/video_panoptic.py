"""Panoptic segmentation of videos: Video Panoptic Quality, and Segmentation and Tracking Quality."""

import copy
import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from d2ext.data.errors import shorten
from d2ext.data.panoptic import PanopticClasses, panoptic_classes, read_segments
from d2ext.data.video.panoptic_results import PanopticVideoWriter, segment_places
from d2ext.evaluation.panoptic_match import Counts
from d2ext.evaluation.stq import SegmentationTrackingQuality, VideoSegment, overlap_pixels
from d2ext.evaluation.video_panoptic_analysis import AnnotatedFrame, analyze_clips
from d2ext.evaluation.vpq import TubeSegment, VideoPanopticQuality, window_length
from d2ext.files import atomic_write, json_list

__all__ = ["VideoPanopticEvaluator"]

logger = logging.getLogger(__name__)

# Group → end of the names of its results.
_GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}


class _State(NamedTuple):
    """What a process has; ``notes`` counts by text."""

    vpq: VideoPanopticQuality
    stq: SegmentationTrackingQuality
    seen: set[Any]
    entries: list[dict[str, Any]]
    unmatched: list[str]
    notes: Counter[str]


class VideoPanopticEvaluator(DatasetEvaluator):
    """VPQ (:mod:`~d2ext.evaluation.vpq`) and STQ (:mod:`~d2ext.evaluation.stq`) on annotated frames.

    Those are the frames with ``pan_seg_file_name`` and ``segments_info``, whose things have
    ``track_id``. What identifies an object is its class and its track id; stuff of a class is one
    object, a thing without a track id is one in every frame anew. A frame is found by its image id, or
    else by its file name without folder and ending. An annotated frame without a prediction (it could
    not be read) is one where nothing is predicted.

    Areas of annotated segments are those of the annotations (``area``), as published, or where these
    have none, counted; if stated and counted ones differ, the log says so. Windows are of consecutive
    annotated frames, whatever lies between them: k // d + 1 of them, where d is the usual distance of
    one to the next. The log says how many, and whether there are other distances. A window that is
    longer than all clips is left out of the mean.

    Metadata's ``vpq_left_out`` names classes that do not count in the averages of VPQ.

    Written into the output folder: ``vpq.json``, all numbers; ``panoptic_video/*.png`` and
    ``panoptic_video.json``, the predictions (:mod:`~d2ext.data.video.panoptic_results`).
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        windows: Sequence[int] = (0, 5, 10, 15),
        analysis_dir: str | None = None,
    ) -> None:
        """
        Args:
            dataset_name: its records are videos
            output_dir: where files are written; None: nowhere
            windows: k of VPQ, in frames; 0: single frames
            analysis_dir: where :func:`analyze_clips` writes; needs ``output_dir``

        Raises:
            ValueError: windows that are negative or none, ``vpq_left_out`` that names no class
            DatasetError: not a panoptic data set
        """
        if not windows or min(windows) < 0:
            raise ValueError(f"TEST.VPQ_WINDOWS is {tuple(windows)}: numbers of frames, 0 and up.")
        self._name = dataset_name
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._analysis_dir = None if analysis_dir is None else Path(analysis_dir)
        self._windows = sorted(set(windows))
        self._frames = _annotated_frames(dataset_name)
        self._metadata = MetadataCatalog.get(dataset_name)
        self._classes = panoptic_classes(dataset_name)
        self._names = self._classes.unique_names
        self._left_out = _left_out(self._classes, self._metadata.get("vpq_left_out") or ())
        frames = [f for video in DatasetCatalog.get(dataset_name) for f in video["frames"]]
        self._ids = {frame["image_id"] for frame in frames}
        stems = Counter(_stem(frame["file_name"]) for frame in frames)
        self._by_name = {
            _stem(frame["file_name"]): frame["image_id"]
            for frame in frames
            if stems[_stem(frame["file_name"])] == 1
        }
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        vpq = VideoPanopticQuality(len(self._names))
        self._state = _State(vpq, SegmentationTrackingQuality(), set(), [], [], Counter())
        self._writer = None
        if self._output_dir is not None:
            self._writer = PanopticVideoWriter(self._output_dir / "panoptic_video", self._metadata)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some frames, annotated or not.

        Args:
            inputs: with ``image_id`` or ``file_name``
            outputs: with ``panoptic_seg``: (H, W) ids and the list of their segments with ``id``,
                ``category_id``, ``isthing`` and, for things, ``track_id`` (-1: no id)

        Raises:
            ValueError: a map that is not of the frame's size or has ids that are not listed, or a class
                that the data set does not have
        """
        for one_input, output in zip(inputs, outputs, strict=True):
            image_id = one_input.get("image_id")
            if image_id not in self._ids:
                name = str(one_input.get("file_name", image_id))
                image_id = self._by_name.get(_stem(name))
                if image_id is None:
                    self._state.unmatched.append(name)
                    continue
            ids, segments = output["panoptic_seg"]
            if image_id in self._frames:
                name = self._frames[image_id].file_name
                places = segment_places(ids.cpu().numpy(), segments, name)
                self._update(image_id, places, segments)

    def _update(
        self, image_id: Any, places: np.ndarray | None, segments: Sequence[dict[str, Any]]
    ) -> None:
        """Add a frame; places None: nothing is predicted."""
        frame = self._frames[image_id]
        targets = read_segments(frame.png, frame.segments, allow_absent=True)
        if places is None:
            places = np.zeros_like(targets)
        pixels = overlap_pixels(targets, places, (len(frame.segments) + 1, len(segments) + 1))
        state = self._state
        for segment, area in zip(frame.segments, pixels.sum(axis=1)[1:].tolist(), strict=True):
            state.notes["areas"] += segment.get("area", area) != area
        for segment in segments:
            if segment["isthing"]:
                state.notes["tracked" if segment.get("track_id", -1) >= 0 else "untracked"] += 1
        state.vpq.update(
            frame.video_id,
            frame.number,
            pixels,
            [self._tube(s, frame) for s in frame.segments],
            [self._tube(s, frame) for s in segments],
        )
        state.stq.update(
            frame.video_id, pixels, [*map(_segment, frame.segments)], [*map(_segment, segments)]
        )
        state.seen.add(image_id)
        if self._writer is not None:
            entry = self._writer.write(frame.result_name, image_id, places, segments)
            state.entries.append(entry)

    def _tube(self, segment: dict[str, Any], frame: AnnotatedFrame) -> TubeSegment:
        label = self._classes.predicted_label(segment, frame.file_name)
        isthing = bool(segment["isthing"])
        track = segment.get("track_id", -1) if isthing else 0
        tube = (label, track) if track >= 0 else (label, -1, frame.number, segment["id"])
        crowd = isthing and bool(segment.get("iscrowd", 0))
        return TubeSegment(tube, label, crowd, segment.get("area"), segment.get("visibility"))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Gather and score.

        Returns:
            ``{"video_panoptic_seg": {...}}``, 0..100: ``VPQ``, ``VPQ_k`` for each window, the same with
            ``_th`` for things and ``_st`` for stuff; ``STQ``, ``AQ``, ``IoU``. Where no predicted thing
            has a track id, ``VPQ_0`` alone. NaN for a group without a class.
            ``"video_panoptic_visibility"``, where annotations have ``visibility``: ``recall_k_hidden``,
            ``iou_k_hidden``, ``..._visible``
            (:meth:`~d2ext.evaluation.vpq.VideoPanopticQuality.recall_by_visibility`).
            None in all processes but the main one
        """
        own = self._state
        gathered = comm.gather(own, dst=0)
        if not comm.is_main_process():
            return None
        if not self._frames:
            logger.warning(
                "Data set '%s' has no annotated frame: there is nothing to compare with.",
                self._name,
            )
            return {}
        try:
            return self._evaluate(_merged(gathered, len(self._names)))
        finally:
            self._state = own

    def _evaluate(self, merged: _State) -> dict[str, dict[str, float]]:
        self._state = merged
        for image_id in self._frames.keys() - self._state.seen:
            self._state.notes["absent"] += 1
            self._update(image_id, None, [])
        windows = self._window_lengths()
        tracked = bool(self._state.notes["tracked"]) or not self._state.notes["untracked"]
        self._warn(windows, tracked)
        if not tracked:
            windows = {0: 1}
        counts = {k: self._state.vpq.counts(length) for k, length in windows.items()}
        results = self._averages(counts, mean=tracked)
        self._log_vpq(counts, windows, results)
        visibility = self._by_visibility(windows)
        self._write(counts, windows, results, visibility)
        if tracked:
            scores = {k: 100 * value for k, value in self._state.stq.compute().items()}
            shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            logger.info("Panoptic videos of '%s': %s", self._name, shown)
            results.update(scores)
        everything = {"video_panoptic_seg": results}
        if visibility:
            everything["video_panoptic_visibility"] = visibility
        return everything

    def _window_lengths(self) -> dict[int, int]:
        """k → annotated frames."""
        spacings = self._state.vpq.spacings()
        spacing = spacings.most_common(1)[0][0] if spacings else 1
        if len(spacings) > 1:
            others = sum(spacings.values()) - spacings[spacing]
            logger.warning(
                "Data set '%s': from an annotated frame to the next it is %d frames, but %d times it is "
                "another number. Windows are of consecutive annotated frames all the same.",
                *(self._name, spacing, others),
            )
        return {k: window_length(k, spacing) for k in self._windows}

    def _warn(self, windows: dict[int, int], tracked: bool) -> None:
        notes, unmatched = self._state.notes, self._state.unmatched
        if unmatched:
            logger.warning(
                f"{len(unmatched)} predictions are of frames that data set '{self._name}' does not "
                f"have, neither by image id nor by file name; they do not count: {shorten(unmatched)}."
            )
        if notes["absent"]:
            logger.warning(
                f"{notes['absent']} of {len(self._frames)} annotated frames have no prediction: there "
                "nothing is predicted."
            )
        if notes["areas"]:
            logger.warning(
                f"{notes['areas']} annotated segments state another area than their PNG has. VPQ uses "
                "what they state, as the published code does."
            )
        if not tracked:
            logger.warning(
                "The predicted segments have no track_id: STQ, and VPQ of more than single frames, are "
                "left out."
            )
        elif notes["untracked"]:
            logger.warning(
                f"{notes['untracked']} predicted things have no track_id: each is an object of its own."
            )
        lengths = self._state.vpq.lengths()
        short = {n for n in windows.values() if n > min(lengths)}
        if tracked and short:
            clips = sum(count for length, count in lengths.items() if length < max(short))
            logger.warning(
                f"{clips} of {sum(lengths.values())} clips have fewer annotated frames than the longest "
                f"window, {max(short)}, and do not count there."
            )
        if len(set(windows.values())) < len(windows):
            logger.warning("Some windows of VPQ are equal: frames between annotated ones add none.")

    def _groups(self) -> dict[str, np.ndarray]:
        """Labels that count."""
        stuff, size = len(self._classes.stuff), len(self._names)
        groups = {"All": range(size), "Things": range(stuff, size), "Stuff": range(stuff)}
        return {
            name: np.array([i for i in labels if i not in self._left_out], np.int64)
            for name, labels in groups.items()
        }

    def _averages(self, counts: dict[int, Counts], *, mean: bool) -> dict[str, float]:
        results = {}
        for group, suffix in _GROUPS.items():
            labels = self._groups()[group]
            each = {k: 100 * c.mean_quality(labels)[0] for k, c in counts.items()}
            if mean:
                known = [value for value in each.values() if not math.isnan(value)]
                results[f"VPQ{suffix}"] = sum(known) / len(known) if known else math.nan
            results.update({f"VPQ_{k}{suffix}": value for k, value in each.items()})
        for k in counts:
            if 0 in counts and results[f"VPQ_{k}"] > results["VPQ_0"] + 1e-9:
                logger.warning(
                    f"VPQ of k = {k} exceeds that of single frames ({results[f'VPQ_{k}']:.4f} to "
                    f"{results['VPQ_0']:.4f}): possible, but rare."
                )
        return results

    def _log_vpq(
        self, counts: dict[int, Counts], windows: dict[int, int], results: dict[str, float]
    ) -> None:
        lengths = self._state.vpq.lengths()
        clips = ", ".join(f"{count} of {n}" for n, count in sorted(lengths.items()))
        heads = [f"k={k} ({n} annotated)" for k, n in windows.items()]
        rows = [
            [group, *(results.get(f"VPQ{k}{suffix}") for k in ("", *(f"_{k}" for k in counts)))]
            for group, suffix in _GROUPS.items()
        ]
        style: dict[str, Any] = {"tablefmt": "pipe", "floatfmt": ".2f", "numalign": "center"}
        table = tabulate(rows, headers=["VPQ", "mean", *heads], **style)
        logger.info(f"Video panoptic quality, clips by annotated frames: {clips}\n{table}")
        qualities = {k: 100 * c.quality()[:, 0] for k, c in counts.items()}
        classes = [
            [name + " (left out)" * (i in self._left_out), *(q[i] for q in qualities.values())]
            for i, name in enumerate(self._names)
        ]
        table = tabulate(classes, headers=["PQ", *heads], **style)
        logger.info(f"Video panoptic quality of the classes:\n{table}")

    def _by_visibility(self, windows: dict[int, int]) -> dict[str, float]:
        things = self._groups()["Things"].tolist()
        results = {}
        for k, length in windows.items():
            shares = self._state.vpq.recall_by_visibility(length, things)
            for name, values in shares.items():
                results[f"tubes_{k}_{name}"] = float(values["tubes"])
                for key in ("recall", "iou"):
                    results[f"{key}_{k}_{name}"] = 100 * values[key]
        return results

    def _write(
        self,
        counts: dict[int, Counts],
        windows: dict[int, int],
        results: dict[str, float],
        visibility: dict[str, float],
    ) -> None:
        """The predictions' JSON file, ``vpq.json``, and the analysis."""
        if self._output_dir is None or self._writer is None:
            return
        self._output_dir.mkdir(parents=True, exist_ok=True)
        entries = {entry["image_id"]: entry for entry in self._state.entries}
        ordered = [f for i, f in self._frames.items() if i in entries]
        images = [
            {"id": f.image_id, "file_name": f.file_name, "height": f.size[0], "width": f.size[1]}
            for f in ordered
        ]
        others = {
            "images": images,
            "categories": self._writer.categories,
            "label_divisor": self._writer.divisor,
        }
        path = self._output_dir / "panoptic_video.json"
        with json_list(path, key="annotations", others=others) as write:
            for frame in ordered:
                write(entries[frame.image_id])
        content = {
            "results": _without_nan({**results, **visibility}),
            "left_out": [self._names[i] for i in self._left_out],
            "windows": [
                {"k": k, "annotated_frames": windows[k], "categories": self._rows(c)}
                for k, c in counts.items()
            ],
        }
        with atomic_write(self._output_dir / "vpq.json", "w") as file:
            json.dump(content, file, indent=1)
        if self._analysis_dir is not None:
            analyze_clips(
                self._state.vpq,
                {i: frame for i, frame in self._frames.items() if i in entries},
                entries,
                self._analysis_dir,
                predictions=self._output_dir / "panoptic_video",
                windows=windows,
                groups=self._groups(),
                names=self._names,
                metadata=self._metadata,
            )

    def _rows(self, counts: Counts) -> list[dict[str, Any]]:
        """Of each class."""
        quality = 100 * counts.quality()
        return [
            {
                "category": name,
                "isthing": int(i >= len(self._classes.stuff)),
                **_without_nan(dict(zip(("PQ", "SQ", "RQ"), quality[i].tolist(), strict=True))),
                "iou": float(counts.iou[i]),
                "tp": int(counts.tp[i]),
                "fp": int(counts.fp[i]),
                "fn": int(counts.fn[i]),
            }
            for i, name in enumerate(self._names)
        ]


def _annotated_frames(dataset_name: str) -> dict[Any, AnnotatedFrame]:
    """By image id."""
    frames = [
        frame
        for video in DatasetCatalog.get(dataset_name)
        for frame in video["frames"]
        if "pan_seg_file_name" in frame
    ]
    # Predictions are named as the annotations are, as in Cityscapes-VPS, where that tells them apart.
    names = Counter(_stem(frame["pan_seg_file_name"]) for frame in frames)
    result = {}
    for frame in frames:
        name, clip = _stem(frame["pan_seg_file_name"]), str(frame["video_id"]).replace("/", "_")
        if names[name] > 1:
            name = f"{clip.zfill(6)}_{frame['frame']:06d}"
        result[frame["image_id"]] = AnnotatedFrame(
            image_id=frame["image_id"],
            video_id=frame["video_id"],
            number=frame["frame"],
            file_name=frame["file_name"],
            png=frame["pan_seg_file_name"],
            segments=frame["segments_info"],
            result_name=f"{name}.png",
            size=(frame["height"], frame["width"]),
        )
    return result


def _merged(states: Sequence[_State], num_classes: int) -> _State:
    vpq, stq = VideoPanopticQuality(num_classes), SegmentationTrackingQuality()
    notes: Counter[str] = Counter()
    for state in states:
        vpq.merge(state.vpq)
        stq.merge(copy.deepcopy(state.stq))  # frames may be added
        notes.update(state.notes)
    return _State(
        vpq,
        stq,
        set().union(*(state.seen for state in states)),
        list(itertools.chain.from_iterable(state.entries for state in states)),
        list(itertools.chain.from_iterable(state.unmatched for state in states)),
        notes,
    )


def _left_out(classes: PanopticClasses, names: Sequence[str]) -> list[int]:
    unknown = [name for name in names if name not in classes.full]
    if unknown:
        raise ValueError(
            f"Metadata's vpq_left_out names {shorten(unknown)}; the classes are "
            f"{', '.join(classes.full)}."
        )
    return [i for i, name in enumerate(classes.full) if name in names]


def _segment(segment: dict[str, Any]) -> VideoSegment:
    thing = bool(segment["isthing"])
    crowd = thing and bool(segment.get("iscrowd", 0))
    track = segment.get("track_id", -1)
    tracked = thing and not crowd and track >= 0
    # Things and stuff are numbered separately.
    return VideoSegment(
        (thing, int(segment["category_id"])), int(track) if tracked else None, crowd
    )


def _stem(file_name: str) -> str:
    """Without folder and ending."""
    return os.path.splitext(os.path.basename(file_name))[0]


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: None if math.isnan(value) else value for key, value in values.items()}
