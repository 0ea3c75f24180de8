"""A look at the whole of a data set when it is registered: what a table shows, what makes training
meaningless, and what is probably not meant.

:func:`summarize` looks at all annotations, at a few hundred images and at some thousand boxes, evenly
spread. :func:`report` prints the table and writes it beside the run as ``dataset_summary.json``.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from tabulate import tabulate

from d2ext.data.densepose.parts import NUM_PARTS
from d2ext.data.errors import DatasetError, ImageReadError, shorten
from d2ext.data.image_io import read_image, read_label_map, stored_size
from d2ext.data.panoptic import IGNORE_LABEL
from d2ext.data.video.records import flatten, is_video
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

# How many images, and boxes of annotations, are looked at.
CHECKED_IMAGES, CHECKED_BOXES = 200, 2000
# A box is wrong that covers less of its mask's box (IoU) and has a side that is off by more pixels.
_UNLIKE, _ROUNDING = 0.5, 3.0
# Share of the boxes looked at from which on it is no single mistake.
_MANY = 0.1
# Fewer grey values than this, of 256, are no photographs.
_FLAT = 16

Record = dict[str, Any]


@dataclass
class Summary:
    """What is in a data set. ``checked`` images have been read, ``boxes`` are of those looked at.

    Attributes:
        videos, annotated, tracks: of videos, whose frames are ``images``: how many, frames with
            annotations, and tracks
        values: smallest and largest value of the pixels, as models see them
        turned: images with an EXIF orientation
        instances, crowds: annotations
        with_keypoints: annotations with a labelled keypoint
        with_surface, surface_points: annotations with points on a surface (DensePose), and all points
        parts: of the surface, how often each occurs among the points
        classes: how often each occurs
        boxes: looked at
        unlike_mask, outside: those that do not fit their mask, and that reach beyond their image
        labels: value of label maps → number of maps looked at that have it
        void: of panoptic data, the share of the pixels looked at that belong to no segment
        warnings: what is probably not meant
    """

    name: str
    images: int
    checked: int = 0
    videos: int = 0
    annotated: int = 0
    tracks: int = 0
    unreadable: list[str] = field(default_factory=list)
    other_size: list[str] = field(default_factory=list)
    values: tuple[int, int] | None = None
    turned: int = 0
    instances: int = 0
    crowds: int = 0
    with_keypoints: int = 0
    with_surface: int = 0
    surface_points: int = 0
    parts: dict[int, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    boxes: int = 0
    unlike_mask: int = 0
    outside: int = 0
    labels: dict[int, int] = field(default_factory=dict)
    void: float | None = None
    warnings: list[str] = field(default_factory=list)

    def rows(self) -> dict[str, Any]:
        """What the table shows."""
        images = {"images": self.images}
        if self.videos:
            images = {
                "videos": self.videos,
                "frames": self.images,
                "annotated frames": self.annotated,
                "tracks": self.tracks,
            }
        rows: dict[str, Any] = {
            **images,
            "images looked at": self.checked,
            "not readable": len(self.unreadable),
            "of another size than annotated": len(self.other_size),
            "with an EXIF orientation": self.turned,
            "pixel values": "-" if self.values is None else "{} to {}".format(*self.values),
        }
        if self.labels:
            labels = [f"{label} ({count})" for label, count in self.labels.items()]
            return {**rows, "labels (maps that have them)": shorten(labels, 8)}
        void = {} if self.void is None else {"void": f"{100 * self.void:.1f} %"}
        empty = [name for name, count in self.classes.items() if not count]
        return {
            **rows,
            "instances": self.instances,
            "crowds": self.crowds,
            **void,
            "with labelled keypoints": self.with_keypoints,
            **self._surface_rows(),
            "classes": len(self.classes),
            "classes without any": f"{len(empty)} ({shorten(empty, 3)})" if empty else 0,
            "boxes looked at": self.boxes,
            "unlike their mask": self.unlike_mask,
            "reaching beyond their image": self.outside,
        }

    def _surface_rows(self) -> dict[str, Any]:
        if not self.with_surface:
            return {}
        absent = [part for part in range(1, NUM_PARTS + 1) if part not in self.parts]
        return {
            "with points on a surface": self.with_surface,
            "points each": f"{self.surface_points / self.with_surface:.0f}",
            "parts without any": f"{len(absent)} ({shorten(absent, 3)})" if absent else 0,
        }


_summaries: dict[str, Summary] = {}
_printed: set[str] = set()


def summarize(
    name: str, records: Sequence[Record], labels: dict[int, int] | None = None
) -> Summary:
    """Look at a registered data set.

    Args:
        name: of the data set, whose metadata name the classes
        records: its dicts, of images or of videos
        labels: of semantic data, how many label maps have each value

    Raises:
        DatasetError: there is nothing to learn from, or the annotations plainly mean something else than
            they say
    """
    videos = records if is_video(records) else []
    if videos:
        records = flatten(videos)
    summary = Summary(name, len(records), labels=dict(sorted((labels or {}).items())))
    summary.videos = len(videos)
    if videos:
        _count_tracks(summary, records)
    if comm.is_main_process():  # the others see the same files
        _look_at_images(summary, records)
        _look_at_void(summary, records)
    if labels is None:
        _count(summary, records, MetadataCatalog.get(name).get("thing_classes") or [])
        _look_at_boxes(summary, records)
    _summaries[name] = summary
    if logger.hasHandlers():
        report([name])
    return summary


def report(names: Iterable[str], folder: str | None = None) -> None:
    """Print the table of own data sets, unless it was printed, and write it.

    Args:
        names: data sets; those that nobody summarized are left out
        folder: where ``dataset_summary.json`` is written; None: nowhere
    """
    known = [_summaries[name] for name in dict.fromkeys(names) if name in _summaries]
    new = [summary for summary in known if summary.name not in _printed]
    if new:
        _printed.update(summary.name for summary in new)
        columns = [summary.rows() for summary in new]
        rows = [[k, *(c.get(k, "-") for c in columns)] for k in {k: 0 for c in columns for k in c}]
        headers = ["", *(summary.name for summary in new)]
        logger.info("Data:\n%s", tabulate(rows, headers, tablefmt="pipe", stralign="right"))
    for summary in new:
        for text in summary.warnings:
            logger.warning("Data set '%s': %s", summary.name, text)
    if known and folder is not None:
        os.makedirs(folder, exist_ok=True)
        with atomic_write(os.path.join(folder, "dataset_summary.json"), "w") as f:
            json.dump({summary.name: asdict(summary) for summary in known}, f, indent=1)


def forget(name: str) -> None:
    """Of a data set that is not registered any more."""
    _summaries.pop(name, None)
    _printed.discard(name)


def evenly(items: Sequence[Any], count: int) -> Sequence[Any]:
    """At most ``count`` of them, evenly spread."""
    return items[:: -(-len(items) // count) or 1]


def _look_at_images(summary: Summary, records: Sequence[Record]) -> None:
    sample = evenly(records, CHECKED_IMAGES)
    as_stored = []  # annotated as the file is stored, not as its EXIF orientation turns it
    reason: ImageReadError | None = None
    for record in sample:
        file_name = record["file_name"]
        try:
            image = read_image(file_name)
        except ImageReadError as e:
            reason = reason or e
            summary.unreadable.append(file_name)
            continue
        low, high = summary.values or (255, 0)
        summary.values = min(low, int(image.min())), max(high, int(image.max()))
        stored, orientation = stored_size(file_name)
        turned = orientation != 1
        summary.turned += turned
        annotated = _annotated_size(record)
        if annotated not in (None, image.shape[:2]):
            summary.other_size.append(file_name)
            if turned and annotated == stored:
                as_stored.append(file_name)
    summary.checked = len(sample)
    read = len(sample) - len(summary.unreadable)
    if reason is not None and not read:
        raise DatasetError(
            f"None of {len(sample)} images of data set '{summary.name}' that were looked at can be "
            f"read; the first: {reason}"
        )
    if as_stored:
        raise DatasetError(
            f"{len(as_stored)} of {len(sample)} images of data set '{summary.name}' that were looked at "
            f"are turned by their EXIF orientation, but annotated as they are stored: "
            f"{shorten(as_stored)}. Remove the orientation from the files (exiftool "
            "-overwrite_original -Orientation= FOLDER), and pictures and annotations agree; or annotate "
            "the turned pictures."
        )
    if read and len(summary.other_size) == read:
        raise DatasetError(
            f"None of {read} images of data set '{summary.name}' that were looked at has the width and "
            f"height that its annotations say: {shorten(summary.other_size)}. Correct them in the "
            "annotation file, or give the images that were annotated."
        )
    if summary.values is not None and summary.values[1] - summary.values[0] < _FLAT:
        summary.warnings.append(
            f"the pixels of all images looked at lie between {summary.values[0]} and "
            f"{summary.values[1]} of 255: is there anything to see in them?"
        )
    for what, files in (
        ("cannot be read", summary.unreadable),
        ("have another size than their annotations say", summary.other_size),
    ):
        if files:
            summary.warnings.append(
                f"{len(files)} of {len(sample)} images looked at {what}: {shorten(files)}. Such images "
                "are left out."
            )


def _look_at_void(summary: Summary, records: Sequence[Record]) -> None:
    """Void pixels are neither learned nor scored."""
    maps = [
        record["sem_seg_file_name"]
        for record in records
        if "segments_info" in record and "sem_seg_file_name" in record
    ]
    void = total = 0
    for file_name in evenly(maps, CHECKED_IMAGES):
        try:
            labels = read_label_map(file_name)
        except ImageReadError:
            continue  # training reports and leaves out
        void += int((labels == IGNORE_LABEL).sum())
        total += labels.size
    if total:
        summary.void = void / total


def _annotated_size(record: Record) -> tuple[int, int] | None:
    """Height and width that the annotations, or the label map, are for; None: they do not say."""
    if "height" in record:
        return record["height"], record["width"]
    labels = record.get("sem_seg_file_name")
    return None if labels is None else stored_size(labels)[0]


def _count(summary: Summary, records: Sequence[Record], classes: Sequence[str]) -> None:
    counts: Counter[int] = Counter()
    parts: Counter[int] = Counter()
    for record in records:
        for annotation in record.get("annotations", ()):
            crowd = bool(annotation.get("iscrowd", 0))
            summary.crowds += crowd
            summary.instances += not crowd
            counts[annotation["category_id"]] += 1
            summary.with_keypoints += any(v > 0 for v in (annotation.get("keypoints") or ())[2::3])
            summary.with_surface += "dp_x" in annotation
            summary.surface_points += len(annotation.get("dp_x", ()))
            parts.update(np.asarray(annotation.get("dp_I", ())).tolist())
    summary.parts = dict(sorted(parts.items()))
    if MetadataCatalog.get(summary.name).get("keypoint_names") and not summary.with_keypoints:
        summary.warnings.append(
            "a category has keypoints, but no annotation has one that is labelled (x, y, v with v > 0)."
        )
    summary.classes = {name: counts[i] for i, name in enumerate(classes)}
    if summary.crowds and not summary.instances:
        text = (
            f"All {summary.crowds} annotations of data set '{summary.name}' are crowds ('iscrowd': 1): "
            "there is no instance to learn or to evaluate. Set 'iscrowd' to 0 where an annotation is a "
            "single object; its mask may be RLE nevertheless (brush tools write 1 for any RLE)."
        )
        if not any("segments_info" in record for record in records):
            raise DatasetError(text)
        summary.warnings.append(text)  # there is stuff to learn


def _count_tracks(summary: Summary, frames: Sequence[Record]) -> None:
    annotated = [frame for frame in frames if "annotations" in frame]
    summary.annotated = len(annotated)
    tracks = {(f["video_id"], a["track_id"]) for f in annotated for a in f["annotations"]}
    summary.tracks = len(tracks)
    if annotated and not tracks:
        summary.warnings.append("no frame has an annotation: there is no track in any video.")


def _look_at_boxes(summary: Summary, records: Sequence[Record]) -> None:
    pairs = [(r, a) for r in records for a in r.get("annotations", ()) if not a.get("iscrowd", 0)]
    sample = [(r, a) for r, a in evenly(pairs, CHECKED_BOXES) if len(a.get("bbox") or ()) == 4]
    if not sample:
        return
    is_xywh = np.array(
        [a.get("bbox_mode", BoxMode.XYWH_ABS) == BoxMode.XYWH_ABS for _, a in sample]
    )
    given = np.array([a["bbox"] for _, a in sample], np.float64)
    boxes = np.hstack([given[:, :2], given[:, 2:] + given[:, :2] * is_xywh[:, None]])
    sizes = np.array([[r.get("width", np.inf), r.get("height", np.inf)] for r, _ in sample])
    masks = np.array([_mask_box(a.get("segmentation")) for _, a in sample])
    summary.boxes = len(boxes)
    points = [a["keypoints"] for _, a in sample if a.get("keypoints")]
    _refuse_fractions(summary, sizes, boxes=boxes, masks=masks, keypoints=_labelled(points))

    corners = is_xywh & (given[:, 2:] > given[:, :2]).all(1) & (given[:, 2:] <= sizes + 1).all(1)
    outside = ((boxes[:, :2] < -1) | (boxes[:, 2:] > sizes + 1)).any(1)
    unlike, like = _unlike(boxes, masks), ~np.isnan(masks[:, 0]) & ~_unlike(given, masks)
    summary.unlike_mask, summary.outside = int(unlike.sum()), int(outside.sum())
    wrong = unlike if unlike.any() else outside
    as_corners = unlike & like if unlike.any() else outside & corners.all()
    if wrong.mean() > _MANY and as_corners.sum() > 0.9 * wrong.sum():
        what = "do not fit their masks" if unlike.any() else "reach beyond their image"
        raise DatasetError(
            f"{int(wrong.sum())} of {len(boxes)} boxes of data set '{summary.name}' that were looked at "
            f"{what}, but would as x0, y0, x1, y1: {_places(sample, wrong)}. 'bbox' is x, y, width, "
            "height in COCO's form; correct it, or, where there are masks, leave it out."
        )
    if unlike.any():
        summary.warnings.append(
            f"{int(unlike.sum())} of {len(boxes)} boxes looked at do not fit their mask: "
            f"{_places(sample, unlike)}. 'bbox' is x, y, width, height."
        )
    if outside.mean() > _MANY:
        summary.warnings.append(
            f"{int(outside.sum())} of {len(boxes)} boxes looked at reach beyond their image: "
            f"{_places(sample, outside)}. 'bbox' is x, y, width, height in pixels."
        )


def _labelled(keypoints: Sequence[Sequence[float]]) -> np.ndarray:
    """(P, 2) x, y of all points that are labelled."""
    points = np.concatenate([np.reshape(k, (-1, 3)) for k in keypoints] or [np.zeros((0, 3))])
    return points[points[:, 2] > 0, :2]


def _refuse_fractions(summary: Summary, sizes: np.ndarray, **coordinates: np.ndarray) -> None:
    """Raise where no coordinate is beyond the first pixel or two of images that are larger."""
    for what, values in coordinates.items():
        values = values[~np.isnan(values)]
        if len(values) and values.max() <= 1.5 and sizes.min() > 16:
            raise DatasetError(
                f"The coordinates of the {what} of data set '{summary.name}' are all below 1.5: they "
                "seem to be fractions of the images' sides. COCO's form has pixels: multiply x by the "
                "width, y by the height."
            )


def _mask_box(segmentation: Any) -> tuple[float, float, float, float]:
    """XYXY about polygons or RLE; NaN without a mask."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        x, y, w, h = mask_util.toBbox(segmentation).tolist()
        return x, y, x + w, y + h
    polygons = [p for p in segmentation or () if len(p) >= 6 and len(p) % 2 == 0]
    if not polygons:
        return (np.nan,) * 4
    points = np.concatenate([np.asarray(p, np.float64) for p in polygons]).reshape(-1, 2)
    return (*points.min(0), *points.max(0))


def _unlike(boxes: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(N) bool: whether boxes and boxes of masks differ, both (N, 4) XYXY, NaN: there is none."""
    sides = np.minimum(boxes[:, 2:], masks[:, 2:]) - np.maximum(boxes[:, :2], masks[:, :2])
    inner = sides.clip(0).prod(1)
    areas = [(b[:, 2:] - b[:, :2]).clip(0).prod(1) for b in (boxes, masks)]
    far = (np.abs(boxes - masks) > _ROUNDING).any(1)
    return far & (inner < _UNLIKE * (areas[0] + areas[1] - inner))


def _places(sample: Sequence[tuple[Record, Record]], wrong: np.ndarray) -> str:
    places = [
        f"annotation {a.get('id', '?')} of '{r['file_name']}'"
        for (r, a), w in zip(sample, wrong, strict=True)
        if w
    ]
    return shorten(places, 3)
