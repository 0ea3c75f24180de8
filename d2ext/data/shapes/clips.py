"""Clips of `shapes` in Detectron2's catalogs: records of videos, and pairs of frames with flow."""

from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.shapes.catalog import load_shapes, paths_metadata, shapes_metadata
from d2ext.data.shapes.scene import Draws
from d2ext.data.shapes.sets import VideoSet

__all__ = [
    "DEFAULT_PANOPTIC_VIDEO_SETS",
    "DEFAULT_VIDEO_SETS",
    "VIDEO_TASKS",
    "load_shapes_flow",
    "load_shapes_video",
    "register_shapes_video",
]

DEFAULT_VIDEO_SETS = (VideoSet("train", 120), VideoSet("val", 20))
# Sizes and annotated frames as in Cityscapes-VPS.
DEFAULT_PANOPTIC_VIDEO_SETS = (
    VideoSet("train", 120, length=30, every=5),
    VideoSet("val", 5, length=30, every=5),
    VideoSet("test", 20, length=30, every=5),
)

# Task of the clips -> that of their frames, and the evaluator's type.
VIDEO_TASKS = {
    "instances": ("rle", "ytvis"),
    "panoptic": ("panoptic", "video_panoptic_seg"),
    "keypoints": ("keypoints", "video_keypoints"),
}

# Largest distance of the two frames of a pair, as those of a frame and its key frame are in YolactEdge.
_FARTHEST = 4


def load_shapes_video(shapes: VideoSet, task: str = "instances") -> list[dict[str, Any]]:
    """The clips of a set as records of videos; every call returns its own copy.

    Args:
        task: one of :data:`VIDEO_TASKS`

    Returns:
        One dict per clip: ``video_id``, ``length``, ``height``, ``width`` and ``frames``. A frame is a
        dict as the task has it for images, with ``video_id``, ``frame`` (0-based), ``track_id``
        (constant over the clip) in each annotation and thing segment, and ``flow_file_name`` and
        ``occlusion_file_name``: patterns whose ``{frame}`` is the other frame.
    """
    if task not in VIDEO_TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(VIDEO_TASKS)}")
    records = load_shapes(shapes, VIDEO_TASKS[task][0])
    for record in records:
        clip, time = divmod(record["image_id"], shapes.length)
        stem = f"{shapes.stem(record['image_id'])}_to_{{frame:06d}}"
        record.update(
            video_id=clip,
            frame=time,
            flow_file_name=f"{shapes.root}/flow/{stem}.flo",
            occlusion_file_name=f"{shapes.root}/occlusion/{stem}.png",
        )
        if task == "instances":
            record["json_index"] = time
    return [
        {
            "video_id": clip,
            "length": shapes.length,
            "height": shapes.height,
            "width": shapes.width,
            "frames": records[clip * shapes.length : (clip + 1) * shapes.length],
        }
        for clip in range(shapes.num)
    ]


def load_shapes_flow(shapes: VideoSet) -> list[dict[str, Any]]:
    """A pair for each frame but a clip's first: the frame, and one of the four before it, uniformly.

    Returns:
        dicts with ``file_name``, ``height``, ``width``, ``image_id``, ``reference`` (``file_name`` of
        the earlier frame) and ``flow_file_name``, the motion from the frame to the earlier one
    """
    pairs = []
    for index in range(shapes.num_frames):
        time = index % shapes.length
        if time == 0:
            continue
        draws = Draws(shapes.seed, shapes.split, "pair", index)
        other = time - 1 - draws.below(min(_FARTHEST, time))
        reference = index - time + other
        pairs.append(
            {
                "file_name": f"{shapes.root}/images/{shapes.stem(index)}.bmp",
                "height": shapes.height,
                "width": shapes.width,
                "image_id": index,
                "reference": {"file_name": f"{shapes.root}/images/{shapes.stem(reference)}.bmp"},
                "flow_file_name": f"{shapes.root}/flow/{shapes.pair_stem(index, other)}.flo",
            }
        )
    return pairs


def register_shapes_video(
    shapes: VideoSet,
    prefix: str = "shapes",
    tasks: tuple[str, ...] = ("instances", "keypoints", "flow"),
) -> list[str]:
    """Register clips as ``<prefix>_<split>_video`` (instances), ``..._video_<task>`` and
    ``<prefix>_<split>_flow``; returns the names."""
    names = []
    for task in tasks:
        name = f"{prefix}_{shapes.split}_" + {"instances": "video", "flow": "flow"}.get(
            task, f"video_{task}"
        )
        if task == "flow":
            DatasetCatalog.register(name, partial(load_shapes_flow, shapes))
            MetadataCatalog.get(name).set(
                image_root=f"{shapes.root}/images", evaluator_type="optical_flow"
            )
        else:
            of_frames, evaluator = VIDEO_TASKS[task]
            DatasetCatalog.register(name, partial(load_shapes_video, shapes, task))
            metadata = {**shapes_metadata(of_frames), **paths_metadata(shapes, of_frames)}
            if task == "instances":
                metadata.update(
                    json_file=f"{shapes.root}/annotations/tracks.json", mask_format="bitmask"
                )
            MetadataCatalog.get(name).set(**{**metadata, "evaluator_type": evaluator}, video=True)
        names.append(name)
    return names
