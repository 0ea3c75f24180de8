"""Factors and sizes of images that are resized by their short side, as Detectron and OpenCV round them.

Detectron2's own ``ResizeShortestEdge`` rounds half up; the published systems built on Detectron give
OpenCV the factor, which rounds half to even and keeps the factor as the step between pixels.
"""

from __future__ import annotations

Size = tuple[int, int]
"""(height, width) in pixels."""


def short_side_scale(size: Size, short: int, longest: int) -> float:
    """The factor that gives the short side ``short`` pixels and the long side at most ``longest``.

    Args:
        size: of the image.
        short: pixels of the short side; 0: the image stays as it is, 1.
        longest: most pixels of the long side, after rounding.
    """
    if short == 0:
        return 1.0
    scale = short / min(size)
    return longest / max(size) if round(scale * max(size)) > longest else scale


def axis_scales(size: Size, scale: float) -> tuple[float, float]:
    """The factors of both sides: ``scale``, or what leaves one pixel of an extreme shape."""
    height, width = (max(scale, 1 / side) for side in size)
    return height, width


def scaled_size(size: Size, scale: float) -> Size:
    """The size that ``cv2.resize(image, None, fx=scale, fy=scale)`` gives, at least 1 pixel a side."""
    pairs = zip(size, axis_scales(size, scale), strict=True)
    height, width = (round(side * factor) for side, factor in pairs)
    return height, width
