"""Boxes as pairs of corners: targets, and pairing of corner peaks (arXiv 1808.01244, section 3).

Shared by CornerNet and CenterNet with triplets, which adds the centre (arXiv 1904.08189).

Letters: B images, C classes, H x W cells of the maps, N object slots of an image, K best corners of a
kind, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.codecs.heatmaps import draw_gaussians, gather_at, gaussian_radius, local_peaks, top_k
from d2ext.layers.exporting import needs_fixed_shapes

# Score of a rejected pair.
REJECTED = -1.0
# The corners' Gaussians have standard deviation (2 r + 1) / this (published code).
_CORNER_DIVISOR = 6.0


class PointTargets(NamedTuple):
    """Targets of one kind of point: top-left corner, bottom-right corner or centre."""

    heat: Tensor
    """(B, C, H, W) float32 in 0..1, 1 at the points."""
    index: Tensor
    """(B, N) int64 cell of each object's point, y * W + x; 0 in empty slots."""
    offset: Tensor
    """(B, N, 2) float32, position (x, y) within the cell, in 0..1; 0 in empty slots."""
    valid: Tensor | None = None
    """(B, C, H, W) bool, which cells of ``heat`` count; None: all."""


class CornerTargets(NamedTuple):
    """Targets of a batch."""

    top_left: PointTargets
    bottom_right: PointTargets
    center: PointTargets | None
    mask: Tensor
    """(B, N) bool, which slots hold an object."""


def encode_corners(
    boxes: Sequence[Tensor],
    classes: Sequence[Tensor],
    *,
    num_classes: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    min_overlap: float = 0.3,
    radius_variant: str = "cornernet",
    center_divisor: float | None = None,
) -> CornerTargets:
    """Annotations of a batch → targets.

    Boxes are clipped to the input; if no area remains, the slot stays empty. As published, the limit is
    the last pixel's index (size - 1), so that every corner lies in a cell. Objects in the same cell
    share its peak, but each has a slot. There is no limit on the number of objects (the published code
    fails beyond 128).

    Args:
        boxes: for each image (n, 4) XYXY in pixels of the network input.
        classes: for each image (n,) int64 in 0..C - 1.
        input_size: (height, width) of the network input, pixels.
        output_size: (H, W).
        min_overlap: IoU with the object of a box whose corners are both off by the Gaussians' radius.
        radius_variant: see :func:`gaussian_radius`.
        center_divisor: the centres' Gaussians have the corners' radius r and standard deviation
            (2 r + 1) / this. None: no targets for centres.
    """
    device = boxes[0].device
    count = max(1, *(len(b) for b in boxes)) if boxes else 1
    # float64, as the published code computes cells.
    padded = torch.zeros((len(boxes), count, 4), dtype=torch.float64, device=device)
    labels = torch.zeros((len(boxes), count), dtype=torch.int64, device=device)
    for i, (b, c) in enumerate(zip(boxes, classes, strict=True)):
        padded[i, : len(b)] = b.to(padded)
        labels[i, : len(b)] = c
    height, width = input_size
    xs = padded[..., 0::2].clamp(0, width - 1)
    ys = padded[..., 1::2].clamp(0, height - 1)
    mask = (xs[..., 1] > xs[..., 0]) & (ys[..., 1] > ys[..., 0])

    scale_x, scale_y = output_size[1] / width, output_size[0] / height
    radii = gaussian_radius(
        ((ys[..., 1] - ys[..., 0]) * scale_y).ceil(),
        ((xs[..., 1] - xs[..., 0]) * scale_x).ceil(),
        min_overlap,
        radius_variant,
    )
    # The radius of an empty slot may be NaN.
    radii = torch.where(mask, radii, torch.zeros_like(radii)).long().clamp(min=0)

    def targets(x: Tensor, y: Tensor, divisor: float) -> PointTargets:
        """x, y (B, N) in input pixels."""
        place = torch.stack([x * scale_x, y * scale_y], dim=-1)
        return _point_targets(place, labels, radii, mask, num_classes, output_size, divisor)

    center = None
    if center_divisor is not None:
        center = targets(xs.mean(dim=-1), ys.mean(dim=-1), center_divisor)
    return CornerTargets(
        targets(xs[..., 0], ys[..., 0], _CORNER_DIVISOR),
        targets(xs[..., 1], ys[..., 1], _CORNER_DIVISOR),
        center,
        mask,
    )


def _point_targets(
    places: Tensor,
    labels: Tensor,
    radii: Tensor,
    mask: Tensor,
    num_classes: int,
    size: tuple[int, int],
    divisor: float,
) -> PointTargets:
    """places (B, N, 2) in fractional cells; labels, radii, mask (B, N)."""
    batch = len(places)
    places = places * mask[..., None]
    cells = places.long()
    # Empty slots draw a peak of height 0.
    image = torch.arange(batch, device=places.device)[:, None]
    heat = draw_gaussians(
        size,
        batch * num_classes,
        cells.flatten(0, 1),
        radii.flatten(),
        (image * num_classes + labels).flatten(),
        divisor=divisor,
        peaks=mask.flatten(),
    ).reshape(batch, num_classes, *size)
    index = cells[..., 1] * size[1] + cells[..., 0]
    return PointTargets(heat, index, (places - cells).float())


class PointMaps(NamedTuple):
    """Raw predictions of one kind of point."""

    heat: Tensor
    """(B, C, H, W) logits."""
    offset: Tensor
    """(B, 2, H, W) x and y, added to the cell."""
    embedding: Tensor | None
    """(B, 1, H, W); centres have none."""


class Points(NamedTuple):
    """Best points of one kind; fields (B, K)."""

    xs: Tensor
    """Cells with their offset."""
    ys: Tensor
    scores: Tensor
    """Probability, best first; 0 where there is no peak."""
    classes: Tensor
    """int64."""
    index: Tensor
    """int64 cell, y * W + x."""


class CornerPairs(NamedTuple):
    """Pairs of a top-left and a bottom-right corner, best first."""

    boxes: Tensor
    """(B, P, 4) XYXY in cells; meaningless for rejected pairs."""
    scores: Tensor
    """(B, P) mean of the corners' scores, or :data:`REJECTED`."""
    top_left_scores: Tensor
    """(B, P)."""
    bottom_right_scores: Tensor
    """(B, P)."""
    classes: Tensor
    """(B, P) int64."""
    distances: Tensor
    """(B, P) between the embeddings of the corners."""


def decode_points(maps: PointMaps, k: int) -> Points:
    """The best ``k`` peaks over classes and cells (all cells if there are fewer); embeddings are not
    used."""
    best = top_k(local_peaks(maps.heat.float().sigmoid()), k)
    offset = gather_at(maps.offset, best.index).float()
    return Points(
        best.xs + offset[..., 0], best.ys + offset[..., 1], best.scores, best.classes, best.index
    )


def _decode_kinds(kinds: Sequence[PointMaps], k: int) -> list[tuple[Points, Tensor]]:
    """:func:`decode_points` of each kind, and the points' embeddings (B, K)."""
    if needs_fixed_shapes(kinds[0].heat) and len(kinds) > 1:
        # Launching kernels takes a GPU longer than running them: all kinds as one batch.
        joined = PointMaps(*(torch.cat(maps) for maps in zip(*kinds, strict=True)))
        ((points, embeddings),) = _decode_kinds([joined], k)
        parts = zip(*(x.chunk(len(kinds)) for x in (*points, embeddings)), strict=True)
        return [(Points(*fields), own) for *fields, own in parts]
    decoded = []
    for maps in kinds:
        assert maps.embedding is not None
        points = decode_points(maps, k)
        decoded.append((points, gather_at(maps.embedding, points.index)[..., 0].float()))
    return decoded


def decode_corners(
    top_left: PointMaps,
    bottom_right: PointMaps,
    *,
    k: int = 100,
    max_distance: float = 0.5,
    max_pairs: int = 1000,
    reject_border: bool = False,
) -> CornerPairs:
    """Pair the best corners of both kinds.

    A pair is rejected where the classes differ, the embeddings are more than ``max_distance`` apart, or
    the bottom-right corner lies left of or above the other one.

    Args:
        k: corners of each kind; all cells if the map has fewer.
        max_pairs: P; the best of the K * K, rejected ones last.
        reject_border: also reject top-left corners in the first row or column of the maps, and
            bottom-right ones in the last (CornerNet-Saccade: its crops cut objects there).

    Returns:
        Always P = min(max_pairs, K * K) pairs.
    """
    (tl, tl_tag), (br, br_tag) = _decode_kinds([top_left, bottom_right], k)
    distances = (tl_tag[:, :, None] - br_tag[:, None, :]).abs()
    rejected = (
        (tl.classes[:, :, None] != br.classes[:, None, :])
        | (distances > max_distance)
        | (br.xs[:, None, :] < tl.xs[:, :, None])
        | (br.ys[:, None, :] < tl.ys[:, :, None])
    )
    if reject_border:
        height, width = top_left.heat.shape[-2:]
        at_start = (tl.index < width) | (tl.index % width == 0)
        at_end = (br.index >= (height - 1) * width) | (br.index % width == width - 1)
        rejected = rejected | at_start[:, :, None] | at_end[:, None, :]
    scores = (tl.scores[:, :, None] + br.scores[:, None, :]) / 2
    scores = scores.masked_fill(rejected, REJECTED).flatten(1)
    scores, order = scores.topk(min(max_pairs, scores.shape[1]), dim=1)
    columns = br.scores.shape[1]
    i = order.div(columns, rounding_mode="floor")
    j = order - i * columns
    boxes = [tl.xs.gather(1, i), tl.ys.gather(1, i), br.xs.gather(1, j), br.ys.gather(1, j)]
    return CornerPairs(
        torch.stack(boxes, dim=-1),
        scores,
        tl.scores.gather(1, i),
        br.scores.gather(1, j),
        tl.classes.gather(1, i),
        distances.flatten(1).gather(1, order),
    )
