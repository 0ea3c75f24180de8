"""Landmarks ↔ maps: Gaussian and Cauchy targets; argmax, quarter offset, DARK, Taylor, expectation.

Gaussian targets as in the stacked hourglass (arXiv 1603.06937), simple baselines (arXiv 1804.06208),
DARK (arXiv 1910.06278) and UDP (arXiv 1911.07524); expectation: integral regression (arXiv 1711.08229).
No landmark system with Cauchy targets is published; they are an option of our own.

Letters as in :mod:`d2ext.codecs.landmarks`. Cell coordinates count from the centre of the first cell.
How far decode(encode(x)) may lie from x is stated at :class:`HeatmapCodec` and tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.landmarks import (
    Decoded,
    Encoded,
    LandmarkCodec,
    Size,
    inside,
    to_cells,
    to_pixels,
)

SHAPES = ("gaussian", "cauchy")
CENTERS = ("exact", "rounded", "window", "hourglass")
# Floor of a map before its logarithm (DARK's published code).
_DARK_FLOOR = 1e-10
# Range of a map before its logarithm (UDP's published code).
_UDP_RANGE = (0.001, 50.0)
# Floor of a map before the transform of the "taylor" decoder, as a share of its maximum.
_TAYLOR_FLOOR = 1e-3
# A flat map has no curvature to divide by.
_FLAT = 1e-6


def profile(squared: Tensor, sigma: float, shape: str, unit_peak: bool = True) -> Tensor:
    """Value of a target at a squared distance from its centre.

    Args:
        squared: squared distances in cells.
        sigma: width in cells.
        shape: "gaussian", exp(-r^2 / (2 sigma^2)); "cauchy", sigma / (r^2 + sigma^2)^1.5, the
            two-dimensional density without its 1 / (2 pi).
        unit_peak: scale the Cauchy profile, whose peak is 1/sigma^2, to a peak of 1.

    Raises:
        ValueError: another shape.
    """
    if shape == "gaussian":
        return torch.exp(-squared / (2 * sigma**2))
    if shape == "cauchy":
        return sigma ** (3 if unit_peak else 1) / (squared + sigma**2) ** 1.5
    raise ValueError(f'The shape of targets is one of {SHAPES}, not "{shape}".')


def kernel(sigma: float, shape: str, unit_peak: bool = True) -> Tensor:
    """(s, s) target around a cell's centre, s = 6 sigma + 1 (rounded down to whole cells a side)."""
    radius = int(3 * sigma)
    squared = torch.arange(-radius, radius + 1).float() ** 2
    return profile(squared[:, None] + squared, sigma, shape, unit_peak)


def draw_targets(
    cells: Tensor,
    labelled: Tensor,
    map_size: Size,
    *,
    sigma: float,
    shape: str = "gaussian",
    center: str = "exact",
    window: float = 0.0,
    unit_peak: bool = True,
) -> Encoded:
    """Target maps.

    Args:
        cells: (N, K, 2), cell coordinates.
        labelled: (N, K) bool.
        sigma, shape, unit_peak: see :func:`profile`.
        center: where the bump stands. "exact": at the point. "rounded": at the cell that holds it.
            "window": at the point, cut by a window around that cell (UDP). "hourglass": as the
            published stacked hourglass does: at the cell, truncated toward zero (so that -0.7 is
            cell 0), within 3 sigma + 1 cells, only if x > 0 in continuous cell coordinates; what is
            not drawn is a map of zeros that counts like the others.
        window: the bump is cut off beyond this many sigma in x and y; 0: nowhere. 3 is the usual
            support of 6 sigma + 1 cells.

    Returns:
        one target (N, K, h, w), and weights: 0 where not labelled or where no cell lies within the
        window (3 sigma if there is none) of the point.

    Raises:
        ValueError: another center or shape.
    """
    if center not in CENTERS:
        raise ValueError(f'The centre of targets is one of {CENTERS}, not "{center}".')
    cells = cells.float()
    width, height = map_size
    if center == "hourglass":
        corner = cells + 0.5
        cell = corner.trunc()
        limit = cell.new_tensor([width, height])
        drawn = labelled & (corner[..., 0] > 0) & ((cell >= 0) & (cell < limit)).all(dim=-1)
        middle, around, radius = cell, cell, 3 * sigma + 1
        weights = torch.ones_like(labelled, dtype=torch.float32)
    else:
        cell = (cells + 0.5).floor()
        middle = cell if center == "rounded" else cells
        around = cells if center == "exact" else cell
        radius = float(int((window or 3.0) * sigma))
        last = cell.new_tensor([width - 1, height - 1])
        drawn = labelled & ((around >= -radius) & (around <= last + radius)).all(dim=-1)
        weights = drawn.float()
    dx = torch.arange(width, device=cells.device) - middle[..., :1]
    dy = torch.arange(height, device=cells.device) - middle[..., 1:]
    if shape == "gaussian":  # a product of two vectors
        along_x, along_y = profile(dx**2, sigma, shape), profile(dy**2, sigma, shape)
        maps = along_y[..., :, None] * along_x[..., None, :]
    else:
        maps = profile(dy[..., :, None] ** 2 + dx[..., None, :] ** 2, sigma, shape, unit_peak)
    if window > 0 or center in ("window", "hourglass"):
        near_x = (torch.arange(width, device=cells.device) - around[..., :1]).abs() <= radius
        near_y = (torch.arange(height, device=cells.device) - around[..., 1:]).abs() <= radius
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
    """As the published stacked hourglass does.

    Values above 1 become 1, so that the first cell of a plateau wins. What is no maximum of its 3x3
    neighbours becomes 0; in a map without a positive value such a cell therefore beats the negative
    peak. The point moves a quarter of a cell in x and y, on a tie toward the lower side too. A point
    whose value is not positive stays at the corner of its cell.
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
    gradient = torch.stack(
        [patch[..., 2, 3] - patch[..., 2, 1], patch[..., 3, 2] - patch[..., 1, 2]], dim=-1
    )
    middle = 2 * patch[..., 2, 2]
    dxx = (patch[..., 2, 4] - middle + patch[..., 2, 0]) / 4
    dyy = (patch[..., 4, 2] - middle + patch[..., 0, 2]) / 4
    step, solvable = _newton(gradient / 2, dxx, dyy, _cross(patch[..., 1:4, 1:4]))
    moved = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2) & solvable
    return torch.where(moved[..., None], cells + step, cells), scores


def decode_dark_udp(maps: Tensor, blur: int = 11) -> tuple[Tensor, Tensor]:
    """DARK in the variant of UDP (arXiv 1911.07524): clipped maps, repeated edges, differences over
    one cell, a small number on the Hessian's diagonal; at every cell."""
    cells, scores = decode_argmax(maps)
    x, y = cells.long().unbind(-1)
    logs = gaussian_blur(maps, blur).clamp(*_UDP_RANGE).log()
    gradient, dxx, dyy, dxy = _derivatives(_patch(logs, x, y, 1))
    tiny = torch.finfo(torch.float32).eps
    step, solvable = _newton(gradient, dxx + tiny, dyy + tiny, dxy)
    return torch.where(solvable[..., None], cells + step, cells), scores


def decode_taylor(maps: Tensor, shape: str = "gaussian") -> tuple[Tensor, Tensor]:
    """One Newton step in the space where the target's shape is a parabola: exact for exact targets.

    That is log(map) for Gaussian targets and map^(-2/3) for Cauchy targets. No blur. At a border the
    differences are taken one cell further in. The step is at most one cell in x and in y; where the
    map has no maximum in this space, the quarter offset is taken instead.
    """
    cells, scores = decode_argmax(maps)
    height, width = maps.shape[-2:]
    if min(height, width) < 3:
        return cells, scores
    x, y = cells.long().unbind(-1)
    inner = torch.stack([x.clamp(1, width - 2), y.clamp(1, height - 2)], dim=-1)
    patch = _patch(maps, inner[..., 0], inner[..., 1], 1)
    floor = (_TAYLOR_FLOOR * scores).clamp(min=_DARK_FLOOR)[..., None, None]
    patch = patch.clamp(min=floor)
    patch = patch.log() if shape == "gaussian" else -((patch / floor) ** (-2 / 3))
    gradient, dxx, dyy, dxy = _derivatives(patch)
    step, solvable = _newton(gradient, dxx, dyy, dxy)
    concave = (dxx < 0) & (dyy < 0) & (dxx * dyy > dxy**2) & solvable
    found = torch.maximum(torch.minimum(inner + step, cells + 1), cells - 1)
    quarter = cells + _differences(maps, x, y).sign() * 0.25
    return torch.where(concave[..., None], found, quarter), scores


def mean_cell(probabilities: Tensor) -> Tensor:
    """Mean position under maps (N, K, h, w) that sum to 1: cell coordinates (N, K, 2)."""
    height, width = probabilities.shape[-2:]
    columns = torch.arange(width, device=probabilities.device, dtype=torch.float32)
    rows = torch.arange(height, device=probabilities.device, dtype=torch.float32)
    x = (probabilities.sum(dim=-2) * columns).sum(dim=-1)
    y = (probabilities.sum(dim=-1) * rows).sum(dim=-1)
    return torch.stack([x, y], dim=-1)


def decode_centroid(maps: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The centre of mass of the best cell's surroundings, cells up to ``ceil(3 sigma)`` away.

    For maps that are probabilities: where a landmark may lie in several places near each other, the
    mean is nearer to it than the most likely one, and averages over the network's errors in single
    cells. Around the peak only (local soft-argmax, as arXiv 2111.02360 has it), so that another place
    far away does not draw the point into the middle.
    """
    cells, scores = decode_argmax(maps)
    height, width = maps.shape[-2:]
    radius = math.ceil(3 * sigma)
    dx = torch.arange(width, device=maps.device) - cells[..., :1]
    dy = torch.arange(height, device=maps.device) - cells[..., 1:]
    near = (dy.abs() <= radius)[..., :, None] & (dx.abs() <= radius)[..., None, :]
    mass = maps.clamp(min=0) * near
    total = mass.sum(dim=(-2, -1), keepdim=True)
    found = mean_cell(mass / total.clamp(min=torch.finfo(maps.dtype).tiny))
    return torch.where(total[..., 0] > 0, found, cells), scores


def gaussian_blur(maps: Tensor, side: int) -> Tensor:
    """Blur each map (zeros outside) and scale it to its old maximum.

    The kernel has OpenCV's deviation for its side, 0.3 ((side - 1) / 2 - 1) + 0.8.

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
    """Mixed second derivative of 3x3 patches."""
    plus = patch[..., 2, 2] + patch[..., 0, 0]
    return (plus - patch[..., 0, 2] - patch[..., 2, 0]) / 4


def _derivatives(patch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient (..., 2) and second derivatives xx, yy, xy of 3x3 patches."""
    gradient = torch.stack(
        [patch[..., 1, 2] - patch[..., 1, 0], patch[..., 2, 1] - patch[..., 0, 1]], dim=-1
    )
    middle = 2 * patch[..., 1, 1]
    dxx = patch[..., 1, 2] - middle + patch[..., 1, 0]
    dyy = patch[..., 2, 1] - middle + patch[..., 0, 1]
    return gradient / 2, dxx, dyy, _cross(patch)


def _newton(gradient: Tensor, dxx: Tensor, dyy: Tensor, dxy: Tensor) -> tuple[Tensor, Tensor]:
    """-H^-1 D, (..., 2), and where the determinant is not zero."""
    determinant = dxx * dyy - dxy**2
    solvable = determinant != 0
    safe = torch.where(solvable, determinant, torch.ones_like(determinant))
    gx, gy = gradient.unbind(-1)
    step = torch.stack([dxy * gy - dyy * gx, dxy * gx - dxx * gy], dim=-1) / safe[..., None]
    return step, solvable & step.isfinite().all(dim=-1)


DECODERS: dict[str, Callable[[HeatmapCodec, Tensor], tuple[Tensor, Tensor]]] = {
    "argmax": lambda codec, maps: decode_argmax(maps),
    "quarter": lambda codec, maps: decode_quarter(maps),
    "hourglass": lambda codec, maps: decode_hourglass(maps),
    "dark": lambda codec, maps: decode_dark(maps, codec.blur),
    "dark_udp": lambda codec, maps: decode_dark_udp(maps, codec.blur),
    "taylor": lambda codec, maps: decode_taylor(maps, codec.shape),
    "centroid": lambda codec, maps: decode_centroid(maps, codec.sigma),
}


@dataclass(frozen=True)
class HeatmapCodec(LandmarkCodec):
    """One bump per landmark. Prediction: one tensor (N, K, h, w); the score is the peak's value.

    Distance of decode(encode(x)) from x in x and in y, in cells (a cell is W/w pixels), for points
    inside the crop and geometry "continuous":

    =========  ==========================  =====================================================
    decoder    center                      at most
    =========  ==========================  =====================================================
    argmax     any                         0.5
    quarter    exact                       0.25; 0.5 within two cells of the border
    quarter    rounded                     0.5 (the target holds nothing finer)
    hourglass  hourglass                   0.75 (the target is one of whole cells, yet it moves)
    hourglass  exact                       0.25; 0.75 in the outermost cells, where it moves outwards
    dark       exact                       0.05 (sigma 2, blur 11), at least 8 cells from the border
    taylor     exact, either shape         0.01
    centroid   exact                       0.03 (sigma 0.5 to 1), at least 3 sigma from the border;
                                           0.9 at it
    =========  ==========================  =====================================================

    A point outside the crop cannot be found there: what is found is as near as the bounds say to the
    nearest place inside, or the landmark's weight is 0.

    Attributes:
        map_size: (w, h).
        sigma, shape, center, window, unit_peak: see :func:`draw_targets`.
        decoder: a key of :data:`DECODERS`.
        blur: see :func:`decode_dark`.
        geometry: see :func:`d2ext.codecs.landmarks.to_cells`.
        flip_shift: move un-mirrored maps one cell to the right, as is published with the geometry
            "index".
    """

    input_size: Size
    map_size: Size
    sigma: float = 2.0
    shape: str = "gaussian"
    center: str = "exact"
    window: float = 0.0
    unit_peak: bool = True
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
            unit_peak=self.unit_peak,
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


@dataclass(frozen=True)
class IntegralCodec(LandmarkCodec):
    """The expectation over a map. Prediction: one tensor (N, K, h, w), not normalised.

    Found is the mean of the cells' positions under softmax(beta * map), so never a point outside the
    outermost cells' centres, and, as every cell has some weight, one that lies too near the middle.
    ``debias`` takes out the share that a map which is 0 away from its peak gives to all cells alike:
    with C the mean of exp(beta * map), x' = C/(C - 1) * (x - middle/C).

    The score is the probability within two cells of the point, in 0..1.

    For maps whose softmax is a bump of deviation sigma, points at least 3 sigma inside the map are
    found within 0.05 cells.
    """

    input_size: Size
    map_size: Size
    beta: float = 1.0
    debias: bool = False
    geometry: str = "continuous"

    def encode(self, points: Tensor, labelled: Tensor) -> Encoded:
        """One target (N, K, 2): x/W, y/H. Landmarks outside the crop do not count."""
        weights = labelled & inside(points, self.input_size)
        return Encoded((points.float() / points.new_tensor(self.input_size),), weights.float())

    def probabilities(self, maps: Tensor) -> Tensor:
        """(N, K, h, w) → the same, float32, sum 1 for each landmark."""
        return (self.beta * maps.float()).flatten(2).softmax(dim=-1).view_as(maps)

    def points(self, maps: Tensor) -> Tensor:
        """(N, K, h, w) → pixel coordinates (N, K, 2); can be differentiated."""
        cells = mean_cell(self.probabilities(maps))
        if self.debias:
            width, height = self.map_size
            log_sum = (self.beta * maps.float()).flatten(2).logsumexp(dim=-1)
            # 1/C, the share of the probability that lies evenly on all cells
            share = torch.exp(math.log(width * height) - log_sum)
            freed = [
                (cells[..., axis] - (size - 1) / 2 * share) / (1 - share).clamp(min=_FLAT)
                for axis, size in enumerate(self.map_size)
            ]
            # A flat map has no peak that could be freed.
            cells = torch.where(share[..., None] < 0.5, torch.stack(freed, dim=-1), cells)
        return to_pixels(cells, self.input_size, self.map_size, self.geometry)

    def decode(self, prediction: tuple[Tensor, ...]) -> Decoded:
        (maps,) = prediction
        points = self.points(maps)
        cells = to_cells(points, self.input_size, self.map_size, self.geometry)
        width, height = self.map_size
        dx = torch.arange(width, device=maps.device) - cells[..., :1]
        dy = torch.arange(height, device=maps.device) - cells[..., 1:]
        near = (dy**2)[..., :, None] + (dx**2)[..., None, :] <= 4
        scores = (self.probabilities(maps) * near).sum(dim=(-2, -1)).clamp(max=1)
        return Decoded(points, scores)

    def mirror(self, prediction: tuple[Tensor, ...], partners: Tensor) -> tuple[Tensor, ...]:
        (maps,) = prediction
        return (maps[:, partners].flip(-1),)
