"""Detectron2's visualizer of instances, whose masks keep their holes and whose labels keep clear of each
other."""

from typing import Any

import numpy as np
from detectron2.utils.visualizer import GenericMask
from detectron2.utils.visualizer import Visualizer as Detectron2Visualizer

__all__ = ["Visualizer"]

# How far a label goes, in its own heights, to keep clear of others; then it stays where it was.
_SHIFTS = (0, 1, -1, 2, -2, 3, -3, 4, -4)


class Visualizer(Detectron2Visualizer):
    """See Detectron2's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._labels: list[Any] | None = None  # where labels of instances lie, matplotlib's Bbox

    def overlay_instances(self, *, masks: Any = None, **others: Any) -> Any:
        """As Detectron2's, which fills the holes of masks."""
        if masks is not None:
            masks = [
                _OneOutline(x.mask, x.height, x.width) if x.has_holes else x
                for x in self._convert_masks(masks)
            ]
        self._labels = []
        try:
            return super().overlay_instances(masks=masks, **others)
        finally:
            self._labels = None

    def draw_polygon(
        self, segment: np.ndarray, color: Any, edge_color: Any = None, alpha: float = 0.5
    ) -> Any:
        """As Detectron2's; also several outlines with a row of NaN after each, of which those that turn
        the other way are holes."""
        from matplotlib.colors import to_rgb
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        ends = np.isnan(segment[:, 0]).nonzero()[0]
        if not len(ends):
            return super().draw_polygon(segment, color, edge_color, alpha)
        outlines = np.split(segment, ends + 1)[:-1]
        rings = [Path(np.concatenate([x[:-1], x[:1]]), closed=True) for x in outlines]
        patch = PathPatch(
            Path.make_compound_path(*rings),
            facecolor=(*to_rgb(color), alpha),
            edgecolor=to_rgb(color if edge_color is None else edge_color),
            linewidth=max(self._default_font_size // 15 * self.output.scale, 1),
        )
        self.output.ax.add_patch(patch)
        return self.output

    def draw_text(self, text: str, position: Any, **others: Any) -> Any:
        """As Detectron2's; an instance's is moved up or down where it would cover an earlier one."""
        super().draw_text(text, position, **others)
        if self._labels is None:
            return self.output
        label = self.output.ax.texts[-1]
        place = label.get_window_extent(self.output.canvas.get_renderer()).padded(2)
        image = self.output.ax.get_window_extent()
        for shift in _SHIFTS:
            moved = place.translated(0, shift * place.height)
            inside = image.y0 <= moved.y0 and moved.y1 <= image.y1
            if (inside or not shift) and not moved.count_overlaps(self._labels):
                place = moved
                x, y = self.output.ax.transData.transform(label.get_position())
                up = self.output.ax.transData.inverted()
                label.set_position(up.transform((x, y + shift * place.height)))
                break
        self._labels.append(place)
        return self.output


class _OneOutline(GenericMask):
    """A mask whose outlines and holes are one polygon, see :meth:`Visualizer.draw_polygon`."""

    def mask_to_polygons(self, mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
        """OpenCV's outlines turn one way, its holes the other."""
        polygons, has_holes = super().mask_to_polygons(mask)
        gap = np.full(2, np.nan)
        return [np.concatenate([part for x in polygons for part in (x, gap)])], has_holes

    def bbox(self) -> np.ndarray:
        """(x1, y1, x2, y2); Detectron2's passes the outlines to pycocotools."""
        rows, columns = self.mask.nonzero()
        return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
