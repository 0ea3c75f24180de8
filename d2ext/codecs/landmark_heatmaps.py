"""Landmarks ↔ maps: Gaussian and Cauchy targets; argmax, quarter offset, DARK, Taylor, centroid.

Gaussian targets as in the stacked hourglass (arXiv 1603.06937), simple baselines (arXiv 1804.06208),
DARK (arXiv 1910.06278) and UDP (arXiv 1911.07524). Cauchy targets are ours; no published landmark
system has them. For the expectation over a map see :mod:`d2ext.codecs.landmark_integral`.

Letters as in :mod:`d2ext.codecs.landmarks`. Cell coordinates count from the centre of the first cell.
:class:`HeatmapCodec` states how far decode(encode(x)) may be from x; tests check it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.landmark_integral import mean_cell
from d2ext.codecs.landmarks import Decoded, Encoded, LandmarkCodec, Size, to_cells, to_pixels

SHAPES = ("gaussian", "cauchy")
CENTERS = ("exact", "rounded", "window", "hourglass")
# Floor of a map before its logarithm (DARK's published code).
_DARK_FLOOR = 1e-10
# Range of a map before its logarithm (UDP's published code).
_UDP_RANGE = (0.001, 50.0)
# Floor of a map before the transform of the "taylor" decoder, as a share of its maximum.
_TAYLOR_FLOOR = 1e-3


def profile(squared: Tensor, sigma: float, shape: str) -> Tensor:
    """Value of a target, at most 1, at a squared distance from its centre.

    Args:
        squared: squared distances in cells.
        sigma: width in cells.
        shape: "gaussian", exp(-r^2 / (2 sigma^2)); "cauchy", sigma / (r^2 + sigma^2)^1.5, the
            two-dimensional density without its 1 / (2 pi), times sigma^2.

    Raises:
        ValueError: another shape.
    """
    if shape == "gaussian":
        return torch.exp(-squared / (2 * sigma**2))
    if shape == "cauchy":
        return (1 + squared / sigma**2) ** -1.5
    raise ValueError(f'The shape of targets is one of {SHAPES}, not "{shape}".')


def support(sigma: float, window: float = 3.0) -> int:
    """Side in cells of a target that is cut off: 2 window sigma + 1, rounded down.

    With the usual window that is 6 sigma + 1: 4 for sigma 0.5, 5 for 0.7, 10 for 1.5.
    """
    return int(2 * window * sigma + 1 + 1e-6)


def draw_targets(
    cells: Tensor,
    labelled: Tensor,
    map_size: Size,
    *,
    sigma: float,
    shape: str = "gaussian",
    center: str = "exact",
    window: float = 0.0,
) -> Encoded:
    """Target maps.

    Args:
        cells: (N, K, 2), cell coordinates.
        labelled: (N, K) bool.
        sigma, shape: see :func:`profile`.
        center: centre of the bump. "exact": the point. "rounded": the cell that contains it.
            "window": the point, but cut off around that cell (UDP). "hourglass", as the published
            stacked hourglass: the cell, truncated toward zero (so that -0.7 is cell 0), within
            3 sigma + 1 cells, only if x > 0 in continuous cell coordinates; a landmark that is not
            drawn gets a map of zeros that counts like the others.
        window: the bump is cut off beyond this many sigma in x and y; 0: nowhere ("window": 3).
            What remains is :func:`support` cells a side: those nearest to the point ("exact") or to its
            cell; for whole sigma these are the same, all cells up to 3 sigma from the point's cell. If
            their number is even, there is one more above and left of the cell.

    Returns:
        one target (N, K, h, w), and weights: 0 where not labelled or where no part of the bump is in
        the map. A bump that is not cut off counts up to 3 sigma from the outermost cells' centres (in
        whole cells, rounded down; from the point if "exact", else from its cell).

    Raises:
        ValueError: another center or shape.
    """
    if center not in CENTERS:
        raise ValueError(f'The centre of targets is one of {CENTERS}, not "{center}".')
    cells = cells.float()
    width, height = map_size
    limit = cells.new_tensor([width, height])
    if center == "hourglass":
        corner = cells + 0.5
        cell = corner.trunc()
        drawn = labelled & (corner[..., 0] > 0) & ((cell >= 0) & (cell < limit)).all(dim=-1)
        middle, cut = cell, True
        first, last = cell - (3 * sigma + 1), cell + (3 * sigma + 1)
        weights = torch.ones_like(labelled, dtype=torch.float32)
    else:
        cell = (cells + 0.5).floor()
        middle = cell if center == "rounded" else cells
        around = cells if center == "exact" else cell
        cut = window > 0 or center == "window"
        if cut:
            size = support(sigma, window or 3.0)
            first = (around - size / 2).ceil()
            last = first + (size - 1)
        else:
            radius = int(3 * sigma)
            first, last = around - radius, around + radius
        drawn = labelled & ((last >= 0) & (first <= limit - 1)).all(dim=-1)
        weights = drawn.float()
    columns = torch.arange(width, device=cells.device)
    rows = torch.arange(height, device=cells.device)
    dx, dy = columns - middle[..., :1], rows - middle[..., 1:]
    if shape == "gaussian":  # a product of two vectors
        along_x, along_y = profile(dx**2, sigma, shape), profile(dy**2, sigma, shape)
        maps = along_y[..., :, None] * along_x[..., None, :]
    else:
        maps = profile(dy[..., :, None] ** 2 + dx[..., None, :] ** 2, sigma, shape)
    if cut:
        near_x = (columns >= first[..., :1]) & (columns <= last[..., :1])
        near_y = (rows >= first[..., 1:]) & (rows <= last[..., 1:])
        maps = maps * (near_y[..., :, None] & near_x[..., None, :])
    return Encoded((maps * drawn[..., None, None],), weights)


# Decoders: maps (N, K, h, w) → cell coordinates (N, K, 2) and scores (N, K)


def decode_argmax(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The best cell, the first of several. Score: the value there."""
    width = maps.shape[-1]
    scores, index = maps.flatten(2).max(dim=-1)
    return torch.stack([index % width, index // width], dim=-1).float(), scores


def decode_quarter(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The best cell, and a quarter of a cell toward the larger neighbour in x and in y.

    As in simple baselines and HRNet: only for 1 < x < w - 1 and 1 < y < h - 1; nothing on a tie.
    """
    cells, scores = decode_argmax(maps)
    height, width = maps.shape[-2:]
    x, y = cells.long().unbind(-1)
    moved = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    steps = _differences(maps, x, y).sign() * 0.25
    return cells + steps * moved[..., None], scores


def decode_hourglass(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Decode as the published stacked hourglass does.

    Values above 1 become 1, so that the first cell of a plateau wins. A cell that is not the maximum of
    its 3x3 neighbourhood becomes 0, so that it beats the peak of a map without positive values. The
    point always moves a quarter of a cell in x and y, on a tie toward the lower side. A point whose
    value is not positive stays at the corner of its cell.
    """
    maps = maps.clamp(max=1)
    peaks = maps * (F.max_pool2d(maps, 3, stride=1, padding=1) == maps)
    cells, scores = decode_argmax(peaks)
    x, y = cells.long().unbind(-1)
    steps = torch.where(_differences(maps, x, y) > 0, 0.25, -0.25)
    return cells + torch.where(scores[..., None] > 0, steps, -0.5), scores


def decode_dark(maps: Tensor, blur: int = 11) -> tuple[Tensor, Tensor]:
    """Distribution-aware decoding (arXiv 1910.06278): blur, logarithm, one Newton step.

    Second differences reach over two cells. Only for 1 < x < w - 2 and 1 < y < h - 2, and where the
    Hessian can be inverted; elsewhere the best cell.

    Args:
        blur: side of the Gaussian kernel, odd: 11 for sigma 2, 17 for 3, 7 for 1.5.
    """
    cells, scores = decode_argmax(maps)
    height, width = maps.shape[-2:]
    x, y = cells.long().unbind(-1)
    logs = gaussian_blur(maps, blur).clamp(min=_DARK_FLOOR).log()
    patch = _patch(logs, x, y, 2)
    middle = 2 * patch[..., 2, 2]
    dxx = (patch[..., 2, 4] - middle + patch[..., 2, 0]) / 4
    dyy = (patch[..., 4, 2] - middle + patch[..., 0, 2]) / 4
    gradient = _differences(logs, x, y) / 2
    step, solvable = _newton(gradient, dxx, dyy, _cross(patch[..., 1:4, 1:4]))
    moved = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2) & solvable
    return torch.where(moved[..., None], cells + step, cells), scores


def decode_dark_udp(maps: Tensor, blur: int = 11) -> tuple[Tensor, Tensor]:
    """DARK in UDP's variant (arXiv 1911.07524): clipped maps, repeated edges, differences over one
    cell, the mixed derivative from the two corners on the main diagonal (as in the published code), a
    small number added to the Hessian's diagonal; at every cell."""
    cells, scores = decode_argmax(maps)
    x, y = cells.long().unbind(-1)
    logs = gaussian_blur(maps, blur).clamp(*_UDP_RANGE).log()
    patch = _patch(logs, x, y, 1)
    middle = 2 * patch[..., 1, 1]
    dxx = patch[..., 1, 2] - middle + patch[..., 1, 0]
    dyy = patch[..., 2, 1] - middle + patch[..., 0, 1]
    # (f(1,1) - f(1,0) - f(0,1) + 2 f(0,0) - f(-1,0) - f(0,-1) + f(-1,-1)) / 2
    diagonal = patch[..., 2, 2] - middle + patch[..., 0, 0]
    dxy = (diagonal - dxx - dyy) / 2
    tiny = torch.finfo(torch.float32).eps
    step, solvable = _newton(_differences(logs, x, y) / 2, dxx + tiny, dyy + tiny, dxy)
    return torch.where(solvable[..., None], cells + step, cells), scores


def decode_taylor(
    maps: Tensor, shape: str = "gaussian", sigma: float | None = None
) -> tuple[Tensor, Tensor]:
    """One Newton step after a transform that makes the target a parabola: exact for exact targets.

    The transform is log(map) for Gaussian targets and map^(-2/3) for Cauchy targets. No blur. Values
    below 1/1000 of the maximum carry no information: they are set to that, and if one of the four
    corners is among them, the mixed derivative is 0. At a border the differences are taken one cell
    further in. The step is at most one cell in x and in y. Where the transformed map has no maximum,
    the quarter offset is used instead; where a side of the map is shorter than 3 cells, the best cell.

    Args:
        sigma: the target's width in cells; gives the curvature, which is needed at a border for narrow
            targets (a Gaussian below 0.8 cells, a Cauchy one that is cut off), where only two values
            carry information. None: not used.
    """
    cells, scores = decode_argmax(maps)
    height, width = maps.shape[-2:]
    if min(height, width) < 3:
        return cells, scores
    x, y = cells.long().unbind(-1)
    inner_x, inner_y = x.clamp(1, width - 2), y.clamp(1, height - 2)
    floor = (_TAYLOR_FLOOR * scores).clamp(min=_DARK_FLOOR)[..., None]
    curvature = None
    if sigma is not None:
        # Of -r^2 / (2 sigma^2), and of -floor^(2/3) (1 + r^2 / sigma^2).
        unit = torch.ones_like(scores) if shape == "gaussian" else 2 * floor ** (2 / 3)
        curvature = -unit.view_as(scores) / sigma**2
    around = _patch(maps, inner_x, inner_y, 1)
    known = (around[..., ::2, ::2].flatten(-2) > floor).all(dim=-1)
    dxy = _cross(_parabola(around, floor[..., None], shape)) * known
    # Along the best cell's row and column, where the values are largest.
    inward_x, inward_y = inner_x - x, inner_y - y
    row = _patch(maps, inner_x, y, 1)[..., 1, :]
    column = _patch(maps, x, inner_y, 1)[..., :, 1]
    gx, dxx = _line(row, inward_x, floor, shape, curvature)
    gy, dyy = _line(column, inward_y, floor, shape, curvature)
    gradient = torch.stack([gx + dxy * inward_y, gy + dxy * inward_x], dim=-1)
    step, solvable = _newton(gradient, dxx, dyy, dxy)
    concave = (dxx < 0) & (dxx * dyy > dxy**2) & solvable
    inner = torch.stack([inner_x, inner_y], dim=-1)
    refined = torch.maximum(torch.minimum(inner + step, cells + 1), cells - 1)
    quarter = cells + _differences(maps, x, y).sign() * 0.25
    return torch.where(concave[..., None], refined, quarter), scores


def _parabola(values: Tensor, floor: Tensor, shape: str) -> Tensor:
    """Values of maps, transformed so that the target's shape is a parabola."""
    values = values.clamp(min=floor)
    return values.log() if shape == "gaussian" else -((values / floor) ** (-2 / 3))


def _line(
    values: Tensor, inward: Tensor, floor: Tensor, shape: str, curvature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """First and second derivative at the middle of three cells, (..., 3) → (...) each.

    Args:
        inward: 0 where the middle one is the best cell; 1 or -1 where the best cell is at the border,
            as the first or the last of the three.
        curvature: second derivative to use at a border where the cell farthest from it is not above the
            floor. None: unknown.
    """
    line = _parabola(values, floor, shape)
    left, middle, right = line.unbind(-1)
    slope, second = (right - left) / 2, right - 2 * middle + left
    if curvature is None:
        return slope, second
    far = torch.where(inward > 0, values[..., 2], values[..., 0])
    lost = (inward != 0) & (far <= floor[..., 0])
    # The slope halfway between the border's cell and the middle one.
    near = torch.where(inward > 0, middle - left, right - middle)
    slope = torch.where(lost, near + curvature * inward / 2, slope)
    return slope, torch.where(lost, curvature, second)


def decode_centroid(maps: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The centre of mass of the best cell's surroundings, cells up to ``ceil(3 sigma)`` away.

    For maps that are probabilities: if the landmark may be in several nearby cells, their mean is a
    better estimate than the most likely cell, and averages out the network's errors. Only around the
    peak (local soft-argmax, as in arXiv 2111.02360), so that a second peak far away does not pull the
    point into the middle.
    """
    cells, scores = decode_argmax(maps)
    height, width = maps.shape[-2:]
    radius = math.ceil(3 * sigma)
    dx = torch.arange(width, device=maps.device) - cells[..., :1]
    dy = torch.arange(height, device=maps.device) - cells[..., 1:]
    near = (dy.abs() <= radius)[..., :, None] & (dx.abs() <= radius)[..., None, :]
    mass = maps.clamp(min=0) * near
    total = mass.sum(dim=(-2, -1), keepdim=True)
    means = mean_cell(mass / total.clamp(min=torch.finfo(maps.dtype).tiny))
    return torch.where(total[..., 0] > 0, means, cells), scores


def gaussian_blur(maps: Tensor, side: int) -> Tensor:
    """Blur each map (zeros outside) and restore its maximum.

    The kernel has OpenCV's deviation for its side, 0.3 ((side - 1) / 2 - 1) + 0.8. (For sides up to 7,
    in newer versions 9, OpenCV itself takes weights rounded to simple fractions.)

    Raises:
        ValueError: an even side.
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f"A blur's side is odd, not {side}.")
    deviation = 0.3 * ((side - 1) / 2 - 1) + 0.8
    offsets = torch.arange(side, device=maps.device).float() - side // 2
    line = torch.exp(-(offsets**2) / (2 * deviation**2))
    line = (line / line.sum()).to(maps.dtype)
    flat = maps.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, line.view(1, 1, 1, -1), padding=(0, side // 2))
    flat = F.conv2d(flat, line.view(1, 1, -1, 1), padding=(side // 2, 0))
    blurred = flat[:, 0].view_as(maps)
    old, new = maps.amax(dim=(-2, -1), keepdim=True), blurred.amax(dim=(-2, -1), keepdim=True)
    return blurred * (old / new.clamp(min=1e-12))


def _patch(maps: Tensor, x: Tensor, y: Tensor, radius: int) -> Tensor:
    """Squares of (2 radius + 1) cells around cells, edges repeated: (N, K, s, s)."""
    height, width = maps.shape[-2:]
    offsets = torch.arange(-radius, radius + 1, device=maps.device)
    columns = (x[..., None] + offsets).clamp(0, width - 1)
    rows = (y[..., None] + offsets).clamp(0, height - 1)
    index = rows[..., :, None] * width + columns[..., None, :]
    return maps.flatten(2).gather(2, index.flatten(2)).view(index.shape)


def _differences(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Right minus left neighbour, lower minus upper one; neighbours clamped to the map."""
    patch = _patch(maps, x, y, 1)
    return torch.stack(
        [patch[..., 1, 2] - patch[..., 1, 0], patch[..., 2, 1] - patch[..., 0, 1]], dim=-1
    )


def _cross(patch: Tensor) -> Tensor:
    """Mixed second derivative of 3x3 patches, from all four corners."""
    plus = patch[..., 2, 2] + patch[..., 0, 0]
    return (plus - patch[..., 0, 2] - patch[..., 2, 0]) / 4


def _newton(gradient: Tensor, dxx: Tensor, dyy: Tensor, dxy: Tensor) -> tuple[Tensor, Tensor]:
    """-H^-1 D, (..., 2), and where the determinant is not zero."""
    determinant = dxx * dyy - dxy**2
    gx, gy = gradient.unbind(-1)
    step = torch.stack([dxy * gy - dyy * gx, dxy * gx - dxx * gy], dim=-1) / determinant[..., None]
    return step, step.isfinite().all(dim=-1)


DECODERS: dict[str, Callable[[HeatmapCodec, Tensor], tuple[Tensor, Tensor]]] = {
    "argmax": lambda codec, maps: decode_argmax(maps),
    "quarter": lambda codec, maps: decode_quarter(maps),
    "hourglass": lambda codec, maps: decode_hourglass(maps),
    "dark": lambda codec, maps: decode_dark(maps, codec.blur),
    "dark_udp": lambda codec, maps: decode_dark_udp(maps, codec.blur),
    "taylor": lambda codec, maps: decode_taylor(maps, codec.shape, codec.sigma),
    "centroid": lambda codec, maps: decode_centroid(maps, codec.sigma),
}


@dataclass(frozen=True)
class HeatmapCodec(LandmarkCodec):
    """One bump per landmark. Prediction: one tensor (N, K, h, w); the score is the peak's value.

    Distance of decode(encode(x)) from x in x and in y, in cells (a cell is W/w pixels), for points
    inside the crop, its edges included, geometry "continuous", and sigma 0.5 to 2, cut off or not:

    =========  ===========================  ====================================================
    decoder    targets                      at most
    =========  ===========================  ====================================================
    argmax     exact, rounded, window       0.5
    quarter    exact                        0.25; 0.5 up to two cells from the border
    quarter    rounded                      0.5 (the target holds nothing finer)
    hourglass  exact                        0.25; 0.75 up to one cell from the border, where it may
                                            move outwards
    hourglass  hourglass                    0.75 (the target is one of whole cells, yet it moves)
    dark       exact, Gaussian, blur 11     0.05 at least 8 cells from the border; 0.5
    dark       exact, Cauchy, blur 11       0.1 at least 8 cells from the border; 0.5
    dark_udp   exact, Gaussian, blur 11     0.05 at least 8 cells from the border; 1.01
    dark_udp   exact, Cauchy, blur 11       0.1 at least 8 cells from the border; at it no bound
    taylor     exact                        0.01
    centroid   exact, Gaussian, sigma <= 1  0.03 at least 3 sigma from the border; 0.9
    centroid   exact, Cauchy, sigma 0.5     0.1 at least 3 sigma from the border; 0.9
    =========  ===========================  ====================================================

    A point outside the crop has weight 0, or is decoded near the nearest point inside: within 0.5 cells
    with argmax, quarter, dark and taylor, 0.75 with hourglass, 1 with centroid and with dark_udp and
    Gaussian targets. The centre "hourglass" is different: a point with x <= 0 or in no cell (such as
    x = W) has an empty map and, as published, weight 1. It is decoded at the crop's first corner
    (argmax: first cell), however far away that is.

    Attributes:
        map_size: (w, h).
        sigma, shape, center, window: see :func:`draw_targets`.
        decoder: a key of :data:`DECODERS`.
        blur: see :func:`decode_dark`.
        geometry: see :func:`d2ext.codecs.landmarks.to_cells`.
        flip_shift: shift un-mirrored maps one cell to the right, as published with the geometry "index".
    """

    input_size: Size
    map_size: Size
    sigma: float = 2.0
    shape: str = "gaussian"
    center: str = "exact"
    window: float = 0.0
    decoder: str = "taylor"
    blur: int = 11
    geometry: str = "continuous"
    flip_shift: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.center not in CENTERS or self.sigma <= 0:
            raise ValueError(
                f"MODEL.LANDMARKS.TARGET: SHAPE is one of {SHAPES}, CENTER one of {CENTERS} and SIGMA "
                f"positive, not '{self.shape}', '{self.center}', {self.sigma}."
            )
        if self.decoder not in DECODERS:
            raise ValueError(
                f"MODEL.LANDMARKS.DECODER is one of {sorted(DECODERS)}, not '{self.decoder}'."
            )

    def encode(self, points: Tensor, labelled: Tensor) -> Encoded:
        """One target (N, K, h, w), see :func:`draw_targets`."""
        return draw_targets(
            to_cells(points.float(), self.input_size, self.map_size, self.geometry),
            labelled,
            self.map_size,
            sigma=self.sigma,
            shape=self.shape,
            center=self.center,
            window=self.window,
        )

    def decode(self, prediction: tuple[Tensor, ...]) -> Decoded:
        (maps,) = prediction
        cells, scores = DECODERS[self.decoder](self, maps.float())
        return Decoded(to_pixels(cells, self.input_size, self.map_size, self.geometry), scores)

    def mirror(self, prediction: tuple[Tensor, ...], partners: Tensor) -> tuple[Tensor, ...]:
        (maps,) = prediction
        maps = maps[:, partners].flip(-1)
        if self.flip_shift:
            maps = torch.cat([maps[..., :1], maps[..., :-1]], dim=-1)
        return (maps,)
