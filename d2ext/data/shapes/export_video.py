"""Writing clips of `shapes` to disk, in the forms in which people have videos::

OUT/video_<split>/frames/<clip>/<time>.png

ytvis   OUT/annotations/video_<split>.json           YouTube-VIS' form: a track has lists over frames
        OUT/video_<split>/flow/<clip>_<time>_to_<time>.flo, occlusion/...png   to the next frame
coco    OUT/annotations/video_<split>.json           COCO's form with video_id, frame_id, track_id
davis   OUT/video_<split>/masks/<clip>/<time>.png    8 bits, value = object
mots    OUT/video_<split>/masks/<clip>/<time>.png    16 bits, value = class * 1000 + object
        OUT/video_<split>/classes.txt                names of the classes 1, 2, ...
cityscapes_vps
        OUT/video_<split>/frames/<clip>_<time>.png
        OUT/annotations/video_<split>.json           COCO's panoptic form of every fifth frame
        OUT/video_<split>/panoptic/<clip>_<time>.png segment id = R + 256 G + 65536 B
"""

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2ext.data.shapes.classes import THING_CLASSES, THING_COLORS
from d2ext.data.shapes.coco import id_to_rgb, panoptic_json, tracks_json, video_instances_json
from d2ext.data.shapes.export import check_free, publish
from d2ext.data.shapes.files import encode_png
from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.sets import VideoSet
from d2ext.data.shapes.video import flow_bytes

__all__ = ["VIDEO_FORMATS", "export_video"]

VIDEO_FORMATS = ("ytvis", "coco", "davis", "mots", "cityscapes_vps")


def _by_clip(shapes: VideoSet, index: int) -> str:
    return f"{index // shapes.length:06d}/{index % shapes.length:06d}.png"


def _mask_png(frame: Frame, value: Callable[[int, int], int], bits: int) -> bytes:
    """PNG whose pixels are ``value(category, number)`` of things, and 0."""
    labels = np.zeros((frame.height, frame.width), np.uint16 if bits == 16 else np.uint8)
    for segment in frame.segments:
        labels[frame.panoptic == segment.id] = value(segment.category, segment.number)
    image = Image.fromarray(labels)
    if bits == 8:
        image.putpalette([0, 0, 0, *(c for color in THING_COLORS for c in color)])
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def _files(shapes: VideoSet, form: str, index: int) -> dict[str, bytes]:
    """What is written for a frame, by name below ``video_<split>``."""
    frame, stem = shapes.frame(index), shapes.stem(index)
    clip, time = shapes.clip(index // shapes.length), index % shapes.length
    name = _by_clip(shapes, index)
    if form == "cityscapes_vps":
        files = {f"frames/{stem}.png": encode_png(frame.image)}
        if shapes.is_annotated(index):
            files[f"panoptic/{stem}.png"] = encode_png(id_to_rgb(frame.panoptic))
        return files
    files = {f"frames/{name}": encode_png(frame.image)}
    if form == "ytvis" and time + 1 < shapes.length:
        pair = shapes.pair_stem(index, time + 1)
        files[f"flow/{pair}.flo"] = flow_bytes(clip.flow(time, time + 1))
        files[f"occlusion/{pair}.png"] = encode_png(clip.occlusion(time, time + 1))
    elif form == "davis":
        files[f"masks/{name}"] = _mask_png(frame, lambda category, number: number, 8)
    elif form == "mots":
        files[f"masks/{name}"] = _mask_png(frame, lambda category, n: 1000 * (category + 1) + n, 16)
    return files


def _annotations(shapes: VideoSet, form: str) -> dict[str, Any]:
    if form == "ytvis":
        return tracks_json(shapes, lambda index: _by_clip(shapes, index))
    if form == "coco":
        return video_instances_json(shapes, lambda index: _by_clip(shapes, index))
    frames = enumerate(shapes.frames())
    return panoptic_json(
        (i, f"{shapes.stem(i)}.png", frame) for i, frame in frames if shapes.is_annotated(i)
    )


def export_video(
    shapes: VideoSet,
    out: Path,
    form: str = "ytvis",
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Write clips in one of :data:`VIDEO_FORMATS`; otherwise as
    :func:`~d2ext.data.shapes.export.export_images`."""
    if form not in VIDEO_FORMATS:
        raise ValueError(f"unknown format {form!r}; choose from {', '.join(VIDEO_FORMATS)}")
    folder = f"video_{shapes.split}"
    json_file = f"annotations/{folder}.json"
    targets = [folder] if form in ("davis", "mots") else [folder, json_file]
    check_free(out, targets, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=out) as name:
        temporary = Path(name)
        for index in tqdm(range(shapes.num_frames), folder, unit="frame", disable=not progress):
            for file_name, data in _files(shapes, form, index).items():
                path = temporary / folder / file_name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        if form == "mots":
            (temporary / folder / "classes.txt").write_text("\n".join(THING_CLASSES) + "\n")
        if json_file in targets:
            (temporary / "annotations").mkdir()
            (temporary / json_file).write_text(json.dumps(_annotations(shapes, form)))
        publish(temporary, out, targets)
    return targets
