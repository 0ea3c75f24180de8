"""Objects as peaks of class maps: Gaussian targets, peaks, best places.

Shared by CornerNet (arXiv 1808.01244), CenterNet with triplets (arXiv 1904.08189) and CenterNet with
points (arXiv 1904.07850).

Letters: B images, C maps (classes), H x W cells of a map, N objects, k places.
A place is also given as its ``index`` = y * W + x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.affine import invert_affine
from d2ext.layers import affine_crops
from d2ext.layers.exporting import needs_fixed_shapes

# Most numbers that one step of draw_gaussians holds.
_DRAWING_LIMIT = 1 << 24


class TopK(NamedTuple):
    """The best places of maps; each field (B, k), or (B, C, k) from :func:`top_k_per_class`."""

    scores: Tensor
    """Best first."""
    classes: Tensor
    """int64 map number."""
    ys: Tensor
    """int64 row."""
    xs: Tensor
    """int64 column."""
    index: Tensor
    """int64, y * W + x."""


def gaussian_radius(heights: Tensor, widths: Tensor, min_overlap: float, variant: str) -> Tensor:
    """How far corners may move so that the box still overlaps the object's by ``min_overlap``.

    Args:
        heights, widths: sides of the objects in cells, of one shape. The published codes round them up
            to whole cells first.
        min_overlap: IoU in 0..1 (exclusive).
        variant: "cornernet": the smallest radius of the three ways in which both corners may move
            (outwards, inwards, one each). "centernet" and "triplets": these published codes divide by
            2 where the quadratic formula has 2a, and take the larger root throughout; the result is
            that of the third way times 4 * min_overlap / 2, and no radius in the sense above.

    Returns:
        float64, in cells; the published codes round it down.
    """
    if variant not in ("cornernet", "centernet", "triplets"):
        raise ValueError(
            f'gaussian_radius has the variants "cornernet", "centernet", "triplets", not "{variant}".'
        )
    heights, widths = heights.double(), widths.double()
    perimeter, area = heights + widths, heights * widths
    # a r^2 - b r + c = 0 for: one corner inwards and one outwards; both inwards; both outwards.
    one_each = (1.0, perimeter, area * (1 - min_overlap) / (1 + min_overlap))
    inwards = (4.0, 2 * perimeter, area * (1 - min_overlap))
    outwards = (4 * min_overlap, -2 * min_overlap * perimeter, area * (min_overlap - 1))

    def roots(a: float, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(b - s, b + s), not divided by 2a."""
        s = (b * b - 4 * a * c).sqrt()
        return b - s, b + s

    if variant == "cornernet":
        radii = [
            roots(*one_each)[0] / 2,
            roots(*inwards)[0] / (2 * inwards[0]),
            roots(*outwards)[1] / (2 * outwards[0]),
        ]
    else:
        radii = [roots(*way)[1] / 2 for way in (one_each, inwards, outwards)]
    return torch.stack(radii).amin(dim=0)


def draw_gaussians(
    size: tuple[int, int],
    num_classes: int,
    cells: Tensor,
    radii: Tensor,
    classes: Tensor,
    divisor: float = 6.0,
    peaks: Tensor | None = None,
) -> Tensor:
    """Class maps with a Gaussian at each object, the larger value where they overlap.

    A Gaussian has standard deviation (2 * radius + 1) / divisor, reaches ``radius`` cells in x and y,
    and is ``peaks`` at its centre (by default exactly 1).

    Args:
        size: (H, W).
        num_classes: number of maps. A batch is drawn at once by numbering classes over its images.
        cells: (N, 2) int64 (x, y), all inside the map.
        radii: (N,) int64, not negative.
        classes: (N,) int64 in 0..num_classes - 1.
        divisor: CornerNet and CenterNet 6; the centres of CenterNet with triplets 5.
        peaks: (N,) value at the centre.

    Returns:
        (num_classes, H, W) float32 in 0..1 on the device of ``cells``. Does not wait for the device.
    """
    height, width = size
    device = cells.device
    heat = torch.zeros((num_classes, height, width), device=device)
    if len(cells) == 0:
        return heat
    sigma = (2 * radii.double() + 1) / divisor

    def profile(length: int, centers: Tensor) -> Tensor:
        """(N, length) float32: one side of the Gaussians."""
        distance = (torch.arange(length, device=device) - centers[:, None]).double()
        values = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
        return values.masked_fill(distance.abs() > radii[:, None], 0.0).float()

    columns, rows = profile(width, cells[:, 0]), profile(height, cells[:, 1])
    if peaks is not None:
        rows = rows * peaks.to(rows)[:, None]
    step = max(1, _DRAWING_LIMIT // (height * width))
    for start in range(0, len(cells), step):
        part = slice(start, start + step)
        values = rows[part, :, None] * columns[part, None, :]
        target = classes[part, None, None].expand_as(values)
        heat.scatter_reduce_(0, target, values, "amax")
    return heat


def local_peaks(heat: Tensor) -> Tensor:
    """Set to 0 every cell that is below the maximum of its 3 x 3 neighbourhood.

    Equal neighbours on a plateau are all peaks, as published.

    Args:
        heat: (B, C, H, W), not negative.
    """
    surroundings = F.max_pool2d(heat, 3, stride=1, padding=1)
    return torch.where(surroundings == heat, heat, 0.0)


def top_k(heat: Tensor, k: int) -> TopK:
    """The ``k`` best places over all classes and cells, or all of them if there are fewer.

    Args:
        heat: (B, C, H, W).

    Returns:
        fields (B, min(k, C * H * W)).
    """
    if needs_fixed_shapes(heat):
        # A GPU selects among all in less time than among the best of each class.
        cells = heat.shape[2] * heat.shape[3]
        flat = heat.flatten(1)
        scores, place = flat.topk(min(k, flat.shape[1]), dim=1)
        classes = place.div(cells, rounding_mode="floor")
        index = place - classes * cells
        ys = index.div(heat.shape[3], rounding_mode="floor")
        return TopK(scores, classes, ys, index - ys * heat.shape[3], index)
    per_class = top_k_per_class(heat, k)
    flat = per_class.scores.flatten(1)
    scores, order = flat.topk(min(k, flat.shape[1]), dim=1)
    classes, ys, xs, index = (field.flatten(1).gather(1, order) for field in per_class[1:])
    return TopK(scores, classes, ys, xs, index)


def top_k_per_class(heat: Tensor, k: int) -> TopK:
    """The ``k`` best cells of each class, or all of them if there are fewer.

    Args:
        heat: (B, C, H, W).

    Returns:
        fields (B, C, min(k, H * W)).
    """
    width = heat.shape[-1]
    flat = heat.flatten(2)
    scores, index = flat.topk(min(k, flat.shape[2]), dim=2)
    classes = torch.arange(heat.shape[1], device=heat.device)[None, :, None].expand_as(index)
    ys = index.div(width, rounding_mode="floor")
    return TopK(scores, classes, ys, index - ys * width, index)


def gather_at(maps: Tensor, index: Tensor) -> Tensor:
    """Values of all channels at places: maps (B, C, H, W), index (B, k) → (B, k, C)."""
    flat = maps.flatten(2)
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


def maps_on_image(
    maps: Tensor, to_image: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Maximum over maps, resampled to the image for drawing.

    Args:
        maps: (C, h, w); cell (i, j) covers [j, j + 1) x [i, i + 1).
        to_image: (2, 3), cells to pixels of the image.
        image_size, output_size: (height, width) of the image and of the result.

    Returns:
        ``output_size``, float32, bilinear, 0 outside the maps.
    """
    stretch = [image_size[1] / output_size[1], image_size[0] / output_size[0], 1]
    to_cells = invert_affine(to_image.double()) * to_image.new_tensor(stretch, dtype=torch.float64)
    best = maps.amax(dim=0)[None, None]
    return affine_crops(best, to_cells[None, None].to(maps.device), output_size)[0, 0, 0]
