"""Where video panoptic quality is lost: VPQ and changes of ids of each clip, the worst clips drawn.

Written into a folder: ``clips.json``, the clips, worst first, each with its VPQ and every change of an
id; and ``worst_clips/``, pictures of frames side by side, below them the annotations and the
predictions, with things in the colours of their ids.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data import Metadata
from tabulate import tabulate

from d2ext.data.errors import ImageReadError
from d2ext.data.image_io import read_image
from d2ext.data.panoptic import contiguous_segment, read_segments
from d2ext.data.video.panoptic_results import read_map
from d2ext.evaluation.panoptic_pictures import StripFrame, draw_strip
from d2ext.evaluation.vpq import VideoPanopticQuality
from d2ext.files import atomic_write

__all__ = ["AnnotatedFrame", "analyze_clips"]

logger = logging.getLogger(__name__)

# Clips in the log's table; frames of a picture, evenly chosen of longer clips.
_LOGGED, _FRAMES = 8, 6


class AnnotatedFrame(NamedTuple):
    """An annotated frame of a data set's records.

    Attributes:
        number: in its clip, from 0
        file_name: of the image
        png, segments: the annotations, as a record has them
        result_name: of the PNG of its prediction
        size: height, width
    """

    image_id: Any
    video_id: Any
    number: int
    file_name: str
    png: str
    segments: list[dict[str, Any]]
    result_name: str
    size: tuple[int, int]


def analyze_clips(
    quality: VideoPanopticQuality,
    frames: Mapping[Any, AnnotatedFrame],
    entries: Mapping[Any, dict[str, Any]],
    output_dir: Path,
    *,
    predictions: Path,
    windows: Mapping[int, int],
    groups: Mapping[str, np.ndarray],
    names: list[str],
    metadata: Metadata,
    num_pictures: int = 6,
) -> None:
    """Write the analysis of all clips; see the module's header.

    Args:
        quality: holds their frames, in which a tube is (label, track id)
        frames: by image id
        entries: of the predictions' JSON file, by image id
        output_dir: folder to write into
        predictions: folder of the predictions' PNGs
        windows: k → annotated frames
        groups: labels of "All", "Things", "Stuff"
        names: of the labels
        metadata: of the data set
        num_pictures: clips to draw
    """
    of_clip: dict[Any, list[AnnotatedFrame]] = {}
    for frame in sorted(frames.values(), key=lambda f: f.number):
        of_clip.setdefault(frame.video_id, []).append(frame)
    clips = []
    for video_id, its_frames in of_clip.items():
        row: dict[str, Any] = {"video_id": video_id, "annotated_frames": len(its_frames)}
        counts = {k: quality.counts(length, [video_id]) for k, length in windows.items()}
        for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
            each = [c.mean_quality(groups[group])[0] for c in counts.values()]
            known = [100 * value for value in each if not math.isnan(value)]
            row[f"VPQ{suffix}"] = sum(known) / len(known) if known else None
            for k, value in zip(counts, each, strict=True):
                row[f"VPQ_{k}{suffix}"] = None if math.isnan(value) else 100 * value
        image_ids = {frame.number: frame.image_id for frame in its_frames}
        switches = [
            {
                "frame": switch.frame,
                "image_id": image_ids[switch.frame],
                "category": names[switch.target[0]],
                "track_id": switch.target[1],
                "before": switch.before[1],
                "after": switch.after[1],
            }
            for switch in quality.id_switches(video_id, groups["Things"].tolist())
            if -1 not in (switch.before[1], switch.after[1])  # things without a track id
        ]
        clips.append({**row, "id_switches": len(switches), "switches": switches})
    clips.sort(key=lambda clip: math.inf if clip["VPQ"] is None else clip["VPQ"])
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(output_dir / "clips.json", "w") as file:
        json.dump({"clips": clips}, file, indent=1)
    folder = output_dir / "worst_clips"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for rank, clip in enumerate(clips[:num_pictures]):
        picture = _draw(clip, of_clip[clip["video_id"]], entries, predictions, metadata)
        name = f"{rank:02d}_{str(clip['video_id']).replace('/', '_')}.png"
        cv2.imwrite(str(folder / name), picture)
    keys = "video_id", "annotated_frames", "VPQ", "VPQ_th", "VPQ_st", "id_switches"
    rows = [{key: clip[key] for key in keys} for clip in clips[:_LOGGED]]
    table = tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".1f")
    total = sum(clip["id_switches"] for clip in clips)
    logger.info(f"{total} changes of ids; worst clips, in '{output_dir}':\n{table}")


def _draw(
    clip: dict[str, Any],
    frames: list[AnnotatedFrame],
    entries: Mapping[Any, dict[str, Any]],
    predictions: Path,
    metadata: Metadata,
) -> np.ndarray:
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round())
    strip = []
    for frame in (frames[int(i)] for i in chosen):
        targets = [{**s, "id": i} for i, s in enumerate(frame.segments, 1)]
        predicted = [
            {**contiguous_segment(s, metadata), "track_id": s.get("track_id", -1)}
            for s in entries[frame.image_id]["segments_info"]
        ]
        changes = [s for s in clip["switches"] if s["frame"] == frame.number]
        text = ", ".join(f"#{s['track_id']}: {s['before']} > {s['after']}" for s in changes)
        strip.append(
            StripFrame(
                _image(frame),
                (read_segments(frame.png, frame.segments, allow_absent=True), targets),
                (read_map(predictions / frame.result_name), predicted),
                f"frame {frame.number}" + (f"  {text}" if text else ""),
                bool(changes),
            )
        )
    shown = "none" if clip["VPQ"] is None else f"{clip['VPQ']:.1f}"
    caption = (
        f"clip {clip['video_id']}: VPQ {shown}, {clip['id_switches']} changes of ids; "
        "image, annotations, prediction"
    )
    return draw_strip(strip, metadata, caption)


def _image(frame: AnnotatedFrame) -> np.ndarray:
    """BGR; grey where it cannot be read, as then nothing was predicted."""
    try:
        return read_image(frame.file_name, "BGR")
    except ImageReadError:
        return np.full((*frame.size, 3), 128, np.uint8)
