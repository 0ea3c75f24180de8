"""Pictures of the panoptic analysis, of images and of videos."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data import Metadata

from d2ext.utils.drawing import PictureDrawer, draw_tracked_panoptic

# Longest side of a picture, pixels; smaller ones are enlarged to the second.
_LARGEST, _SMALLEST = 800, 400
_STRIP = 26  # height of a caption, pixels
# Width of a frame in a strip of frames, pixels; and of the red line around one that is marked.
_FRAME_WIDTH, _MARK = 400, 4


class StripFrame(NamedTuple):
    """A frame of a strip.

    Attributes:
        image: H×W×3 uint8 BGR
        annotations, prediction: (H, W) ids and segments with ``track_id``
        title: above it
        marked: whether it has a red frame
    """

    image: np.ndarray
    annotations: tuple[np.ndarray, list[dict[str, Any]]]
    prediction: tuple[np.ndarray, list[dict[str, Any]]]
    title: str
    marked: bool = False


def draw_strip(frames: Sequence[StripFrame], metadata: Metadata, caption: str) -> np.ndarray:
    """Frames of a video side by side, below each its annotations and its prediction.

    Args:
        frames: of one shape of images, from left to right
        metadata: names and colours of the classes

    Returns:
        H'×W'×3 uint8 BGR
    """
    columns = []
    for frame in frames:
        height = max(1, round(_FRAME_WIDTH * frame.image.shape[0] / frame.image.shape[1]))
        size = (_FRAME_WIDTH, height)
        small = frame.image.shape[1] < _FRAME_WIDTH
        image = cv2.resize(
            frame.image, size, interpolation=cv2.INTER_CUBIC if small else cv2.INTER_AREA
        )
        panels = [image]
        for ids, segments in (frame.annotations, frame.prediction):
            resized = cv2.resize(ids.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
            panels.append(draw_tracked_panoptic(image, resized, segments, metadata, names=False))
        if frame.marked:
            cv2.rectangle(panels[-1], (0, 0), (size[0] - 1, size[1] - 1), (0, 0, 255), _MARK)
        column = captioned(np.concatenate(panels), frame.title)
        columns.append(np.pad(column, ((0, 0), (0, 2), (0, 0)), constant_values=255))
    tallest = max(column.shape[0] for column in columns)
    columns = [
        np.pad(c, ((0, tallest - c.shape[0]), (0, 0), (0, 0)), constant_values=255) for c in columns
    ]
    return captioned(np.concatenate(columns, axis=1), caption)


def draw_comparison(
    image: np.ndarray,
    annotations: tuple[Any, list[dict[str, Any]]],
    prediction: tuple[Any, list[dict[str, Any]]],
    metadata: Metadata,
    caption: str,
) -> np.ndarray:
    """Picture, annotations and prediction side by side.

    Args:
        image: H×W×3 uint8 BGR
        annotations, prediction: panoptic map and segments as models return them
        metadata: names and colours of the classes

    Returns:
        H'×W'×3 uint8 BGR
    """
    drawer = PictureDrawer(metadata)
    scale = picture_scale(max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    panels = []
    for title, panoptic in (
        ("image", None),
        ("annotations", annotations),
        ("prediction", prediction),
    ):
        panel = cv2.resize(
            image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        )
        if panoptic is not None:
            segments = cv2.resize(
                panoptic[0].numpy().astype(np.uint16), size, interpolation=cv2.INTER_NEAREST
            )
            present = set(np.unique(segments).tolist())
            infos = [s for s in panoptic[1] if s["id"] in present]
            if infos:  # the visualizer fails on a map without segments
                panel = drawer(
                    panel, {"panoptic_seg": (torch.from_numpy(segments.astype(np.int32)), infos)}
                )
        panels.append(captioned(panel, title))
    return captioned(np.concatenate(panels, axis=1), caption)


def draw_confusion(
    path: Path, confusion: np.ndarray, names: list[str], *, num_shown: int = 30
) -> list[str]:
    """Draw the part of a confusion matrix in which most segments go wrong.

    Args:
        path: of the PNG
        confusion: (C+1, C+1) segments, row annotated, column predicted, C "none"
        names: of the C classes
        num_shown: classes in the picture

    Returns:
        names of the classes shown
    """
    # matplotlib's object interface: pyplot would keep state and want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    involved = wrong[:-1].sum(axis=1) + wrong[:, :-1].sum(axis=0)
    occurring = np.flatnonzero(confusion[:-1].sum(axis=1) + confusion[:, :-1].sum(axis=0))
    shown = sorted(sorted(occurring.tolist(), key=lambda i: -involved[i])[:num_shown])
    selected = [*shown, len(names)]
    matrix = confusion[np.ix_(selected, selected)]
    share = matrix / np.maximum(confusion[selected].sum(axis=1, keepdims=True), 1)

    side = 3 + 0.33 * len(selected)
    figure = Figure(figsize=(side + 0.6, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = [names[i] for i in shown]
    ticks = range(len(selected))
    axes.set_xticks(ticks, [*labels, "missed"], rotation=90, fontsize=8)
    axes.set_yticks(ticks, [*labels, "no such segment"], fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("annotated")
    omitted = len(occurring) - len(shown)
    axes.set_title(
        "Segments that overlap with IoU > 0.5, whatever their classes"
        + (f" ({omitted} classes with fewer errors are left out)" if omitted else ""),
        fontsize=9,
    )
    for row, column in zip(*np.nonzero(matrix), strict=True):
        dark = share[row, column] > 0.55
        axes.text(
            column,
            row,
            str(matrix[row, column]),
            ha="center",
            va="center",
            fontsize=6,
            color="white" if dark else "black",
        )
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="share of the row")
    figure.savefig(path, format="png")
    return labels


def picture_scale(longest: int) -> float:
    """What to enlarge a picture by whose longest side has so many pixels."""
    if longest > _LARGEST:
        return _LARGEST / longest
    return max(1.0, _SMALLEST / longest)


def captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture, BGR, below a line of text."""
    strip = np.full((_STRIP, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(
        strip, text, (4, _STRIP - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
    )
    return np.concatenate([strip, picture])
