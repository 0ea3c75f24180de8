"""Predictions drawn on pictures by Detectron2's visualizers, the same from run to run."""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances

from d2ext.files import atomic_write
from d2ext.utils.faces import draw_five_points, draw_meshes
from d2ext.utils.heatmaps import draw_points, overlay_heatmaps
from d2ext.utils.surfaces import SurfaceDrawer

# Larger images are drawn smaller: Detectron2's visualizer takes some 120 bytes for a pixel.
_MAX_PIXELS = 40_000_000


def name_classes(metadata: Metadata, classes: torch.Tensor) -> Metadata:
    """``metadata``, or if it names fewer classes than occur in ``classes``, a copy with numbers."""
    names = list(metadata.get("thing_classes") or [])
    count = int(classes.max()) + 1 if len(classes) else 0
    if count <= len(names):
        return metadata
    others = {k: v for k, v in metadata.as_dict().items() if k not in ("thing_classes", "name")}
    numbers = [f"class {i}" for i in range(len(names), count)]
    return Metadata(name=metadata.get("name", ""), thing_classes=names + numbers, **others)


def select(instances: Instances, threshold: float, device: torch.device | str = "cpu") -> Instances:
    """Instances with a score of at least ``threshold``, best first, on the CPU or another device.

    ``mask_scores``, if there are any, become the ``scores``: instances are then ranked and shown by the
    product of class score and predicted mask quality, as in the published display of YOLACT++
    (yolact/NOTES.md §7.6).
    """
    scores = instances.mask_scores if instances.has("mask_scores") else instances.scores
    order = scores.argsort(descending=True, stable=True)
    # Before the transfer, so that other masks are not copied.
    selected = instances[order[scores[order] >= threshold]].to(device)
    if selected.has("mask_scores"):
        selected.scores = selected.mask_scores
        selected.remove("mask_scores")
    return selected


@contextmanager
def _fixed_colors(seed: int) -> Iterator[None]:
    """Fix the state of NumPy's global generator, from which Detectron2 draws its colours."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write a picture (BGR, uint8) in the format of the path's suffix, whole or not at all.

    Raises:
        OSError: the disk is full or not writable, or the format unknown.
    """
    encoded, data = cv2.imencode(path.suffix.lower(), np.ascontiguousarray(image))
    if not encoded:
        raise OSError(f"cannot encode '{path}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data.tobytes())


def reduced(
    image: np.ndarray, output: dict[str, Any], factor: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """An image and what was predicted on it, ``factor`` times smaller."""
    size = -(-image.shape[0] // factor), -(-image.shape[1] // factor)
    output = dict(output)
    if "sem_seg" in output:
        output["sem_seg"] = output["sem_seg"][:, ::factor, ::factor]
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        output["panoptic_seg"] = segments[::factor, ::factor], info
    if "surface" in output:
        output["surface"] = output["surface"][:, ::factor, ::factor]
    if "instances" in output:
        smaller = Instances(size)
        for name, value in output["instances"].get_fields().items():
            if isinstance(value, Boxes):
                value = Boxes(value.tensor / factor)
            elif name == "pred_masks":
                value = value[:, ::factor, ::factor]
            elif name == "pred_keypoints":
                value = torch.cat([value[..., :2] / factor, value[..., 2:]], dim=-1)
            elif name == "pred_face_meshes":
                value = value / factor
            smaller.set(name, value)
        output["instances"] = smaller
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), output


class PictureDrawer:
    """Draws a model's predictions on single pictures.

    Args:
        metadata: see :func:`~d2ext.data.saved_metadata.class_metadata`.
        max_drawn: draw at most this many instances, the best; drawing takes milliseconds for each.
        triangles: of the meshes of faces, see :func:`~d2ext.utils.faces.draw_meshes`.
        surfaces: draws those of persons.
    """

    def __init__(
        self,
        metadata: Metadata,
        max_drawn: int = 200,
        triangles: np.ndarray | None = None,
        surfaces: SurfaceDrawer | None = None,
    ) -> None:
        self.metadata = metadata
        self.max_drawn = max_drawn
        self.triangles = triangles
        self.surfaces = surfaces or SurfaceDrawer()

    def __call__(self, image: np.ndarray, output: dict[str, Any]) -> np.ndarray:
        """Draw on an image (H×W×3, BGR, uint8); a new one of the same kind.

        Args:
            output: as Detectron2's models return it, instances as :func:`select` leaves them. With
                ``heatmaps`` (see :mod:`d2ext.utils.heatmaps`) these and the instances' points are
                drawn, too; with ``surface`` ((3, H, W) uint8 on the CPU, see
                :mod:`d2ext.utils.surfaces`) that.

        Returns:
            the picture; of an image of more than 40 megapixels, a smaller one
        """
        factor = math.ceil(math.sqrt(image.shape[0] * image.shape[1] / _MAX_PIXELS))
        if factor > 1:
            image, output = reduced(image, output, factor)
        with _fixed_colors(0):
            return self._draw_all(image[:, :, ::-1], output)[:, :, ::-1]

    def _draw_all(self, image: np.ndarray, output: dict[str, Any]) -> np.ndarray:
        """On RGB: heat maps and meshes below and points above what :meth:`_draw` draws."""
        if "heatmaps" in output:
            image = overlay_heatmaps(image, output["heatmaps"])
        if "surface" in output:
            image = self.surfaces(image, output["surface"].numpy())
            if self.surfaces.alone:
                return image
        if "instances" not in output:
            return self._draw(image, output)
        instances = output["instances"][: self.max_drawn]
        others = instances[:]
        if instances.has("pred_face_meshes"):
            image = draw_meshes(image, instances.pred_face_meshes, self.triangles)
        # Detectron2's marks would cover a face.
        five = instances.has("pred_keypoints") and instances.pred_keypoints.shape[1] == 5
        five = five and "left_mouth" in (self.metadata.get("keypoint_names") or ())
        if five:
            others.remove("pred_keypoints")
        image = self._draw(image, output | {"instances": others})
        if five:
            image = draw_five_points(image, instances.pred_keypoints)
        return draw_points(image, instances) if "heatmaps" in output else image

    def _draw(self, image: np.ndarray, output: dict[str, Any]) -> np.ndarray:
        """On RGB."""
        from d2ext.utils.visualizer import Visualizer  # pulls in matplotlib

        if "panoptic_seg" in output:
            segments, info = output["panoptic_seg"]
            visualizer = Visualizer(image, self.metadata)
            return visualizer.draw_panoptic_seg(segments.cpu(), info).get_image()
        if "sem_seg" in output:
            visualizer = Visualizer(image, self.metadata)
            labels = output["sem_seg"].argmax(dim=0).cpu()
            image = visualizer.draw_sem_seg(labels, alpha=0.5).get_image()
        if "instances" in output:
            instances = output["instances"]
            metadata = name_classes(self.metadata, instances.pred_classes)
            visualizer = Visualizer(image, metadata)
            image = visualizer.draw_instance_predictions(instances).get_image()
        return image


def track_color(track_id: int) -> tuple[float, float, float]:
    """RGB in [0, 1] of an id, in every video the same; grey for -1, which is none."""
    if track_id < 0:
        return 0.5, 0.5, 0.5
    # Turned by the golden ratio, hues of ids next to each other are far apart.
    return colorsys.hsv_to_rgb(track_id * 0.618034 % 1, (1.0, 0.65)[track_id // 8 % 2], 0.95)


def draw_tracked_panoptic(
    image: np.ndarray,
    segments: np.ndarray,
    info: Sequence[dict[str, Any]],
    metadata: Metadata,
    *,
    names: bool = True,
) -> np.ndarray:
    """Draw a panoptic map: things in the colours of their tracks, which are written on them.

    Args:
        image: (H, W, 3) uint8, BGR
        segments: (H, W) ids
        info: segments with ``id``, ``category_id``, ``isthing`` and, for things, ``track_id`` (-1: none)
        metadata: names and colours of the classes
        names: whether to write the names of things beside their numbers, and those of stuff

    Returns:
        (H, W, 3) uint8, BGR
    """
    result = image.copy()
    size = max(0.4, min(image.shape[:2]) / 1000)
    labels = []
    for segment in sorted(info, key=lambda s: bool(s["isthing"])):
        mask = (segments == segment["id"]).astype(np.uint8)
        x, y, width, height = cv2.boundingRect(mask)
        if not width:
            continue
        window = slice(y, y + height), slice(x, x + width)
        cut = mask[window]
        color = [round(255 * c) for c in reversed(_segment_color(segment, metadata))]
        part = result[window]
        part[cut > 0] = (0.45 * part[cut > 0] + 0.55 * np.array(color)).astype(np.uint8)
        if segment["isthing"]:
            contours, _ = cv2.findContours(cut, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(part, contours, -1, color, max(1, round(2 * size)))
        text = _segment_text(segment, metadata, names)
        # In the widest part of the segment, not at the edge of its box.
        distance = cv2.distanceTransform(np.pad(cut, 1), cv2.DIST_L2, 3)
        _, widest, _, (column, row) = cv2.minMaxLoc(distance)
        if text and (segment["isthing"] or widest > 20 * size):
            labels.append((text, x + column - 1, y + row - 1))
    for text, column, row in labels:
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        left = min(max(column - width // 2, 1), max(image.shape[1] - width - 1, 1))
        place = left, min(max(row + height // 2, height + 1), image.shape[0] - 2)
        for line, ink in ((3, (0, 0, 0)), (1, (255, 255, 255))):
            thick = max(line, round(line * size))
            cv2.putText(
                result, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, ink, thick, cv2.LINE_AA
            )
    return result


def _segment_color(segment: dict[str, Any], metadata: Metadata) -> tuple[float, float, float]:
    """RGB in [0, 1]."""
    if segment["isthing"]:
        return track_color(int(segment.get("track_id", -1)))
    colors = metadata.get("stuff_colors") or ()
    category = segment["category_id"]
    if category < len(colors):
        red, green, blue = (c / 255 for c in colors[category])
        return red, green, blue
    return colorsys.hsv_to_rgb(category * 0.618034 % 1, 0.35, 0.7)


def _segment_text(segment: dict[str, Any], metadata: Metadata, names: bool) -> str:
    isthing, category = bool(segment["isthing"]), segment["category_id"]
    track = int(segment.get("track_id", -1)) if isthing else -1
    known = metadata.get("thing_classes" if isthing else "stuff_classes") or ()
    name = known[category] if category < len(known) else f"class {category}"
    words = [f"#{track}"] if track >= 0 else []
    return " ".join([*words, name] if names else words)


class VideoDrawer(PictureDrawer):
    """Draws frame after frame: instances with ``track_ids``, and panoptic things with ``track_id``, in
    the colour of their id, which their label names; other objects keep a colour while their boxes
    overlap.
    """

    def __init__(
        self,
        metadata: Metadata,
        max_drawn: int = 200,
        triangles: np.ndarray | None = None,
        surfaces: SurfaceDrawer | None = None,
    ) -> None:
        super().__init__(metadata, max_drawn, triangles, surfaces)
        from detectron2.utils.video_visualizer import VideoVisualizer  # pulls in matplotlib

        with _fixed_colors(0):
            self._visualizer = VideoVisualizer(metadata)
        self._frame = 0

    def __call__(self, image: np.ndarray, output: dict[str, Any]) -> np.ndarray:
        self._frame += 1
        # another seed for each frame, or new objects would get the colours of the last ones
        with _fixed_colors(zlib.crc32(b"frame %d" % self._frame)):
            return self._draw_all(image[:, :, ::-1], output)[:, :, ::-1]

    def _draw(self, image: np.ndarray, output: dict[str, Any]) -> np.ndarray:
        if "panoptic_seg" in output:
            segments, info = output["panoptic_seg"]
            if any(s.get("track_id", -1) >= 0 for s in info or ()):
                ids = segments.cpu().numpy()
                picture = draw_tracked_panoptic(image[:, :, ::-1], ids, info, self.metadata)
                return picture[:, :, ::-1]
            return self._visualizer.draw_panoptic_seg_predictions(
                image, segments.cpu(), info
            ).get_image()
        if "sem_seg" in output:
            labels = output["sem_seg"].argmax(dim=0).cpu()
            image = self._visualizer.draw_sem_seg(image, labels).get_image()
        if "instances" in output:
            instances = output["instances"]
            metadata = name_classes(self.metadata, instances.pred_classes)
            if len(instances):
                image = _draw_tracks(image, instances, metadata, self._colors(instances))
        return image

    def _colors(self, instances: Instances) -> list[Any]:
        """RGB of each: of its id, or of the object in the frames before whose box it overlaps."""
        from detectron2.utils.video_visualizer import _DetectedInstance

        if instances.has("track_ids"):
            return [track_color(i) for i in instances.track_ids.tolist()]
        classes, boxes = instances.pred_classes.tolist(), instances.pred_boxes.tensor.numpy()
        detected = [
            _DetectedInstance(c, b, None, None, 8) for c, b in zip(classes, boxes, strict=True)
        ]
        return self._visualizer._assign_colors(detected)


def _draw_tracks(
    image: np.ndarray, instances: Instances, metadata: Metadata, colors: list[Any]
) -> np.ndarray:
    """On RGB: instances on the CPU, with their ids if they have some."""
    from d2ext.utils.visualizer import Visualizer  # pulls in matplotlib

    ids = instances.track_ids.tolist() if instances.has("track_ids") else [-1] * len(instances)
    labels = [
        (f"#{i} " if i > 0 else "") + f"{metadata.thing_classes[c]} {s:.0%}"
        for c, s, i in zip(
            instances.pred_classes.tolist(), instances.scores.tolist(), ids, strict=True
        )
    ]
    masks = list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None
    return (
        Visualizer(image, metadata)
        .overlay_instances(
            boxes=instances.pred_boxes,
            labels=labels,
            masks=masks,
            keypoints=instances.pred_keypoints if instances.has("pred_keypoints") else None,
            assigned_colors=colors,
        )
        .get_image()
    )
