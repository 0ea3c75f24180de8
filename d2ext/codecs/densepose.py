"""Predictions on surfaces of persons (or animals), and what they say in the persons' boxes.

``instances.pred_densepose`` is a :class:`ChartPredictions` or an :class:`EmbeddingPredictions`, raw maps
of a fixed size, whatever the size of the box; ``instances.pred_boxes`` says where they lie.

- :func:`charts_in_boxes` gives part, U and V of each pixel of a box, :func:`quantize` bytes of them,
  :func:`encode_result` text;
- :func:`vertices_in_boxes` gives the vertex of a mesh for each pixel, :func:`vertices_at` for some.

**Boxes** (x, y, w, h) are cut to integers, w and h at least 1 (:func:`integer_boxes`; published), and
results are in the frame of that box.

Letters: N persons, S side of a map, D numbers of an embedding, T pixels of all boxes.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

# Pixels that are worked on at a time: 25 channels of them are 200 MB.
_CHUNK = 1 << 21
# Characters in a line of the text form.
_LINE = 76

Predictions = TypeVar("Predictions", bound="SurfacePredictions")


@dataclass(frozen=True, repr=False)
class SurfacePredictions:
    """Maps (N, channels, S, S) of N persons; a subclass names them. Those that a model does not give are
    None. Indexing, :meth:`to` and :meth:`cat` treat all maps alike, as fields of ``Instances`` need it.
    """

    coarse_segm: Tensor
    """Logits of foreground or coarse parts, background first: 2 or 15 channels."""

    def maps(self) -> dict[str, Tensor]:
        """The maps that there are, by name, in the order of the class."""
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def __len__(self) -> int:
        return len(self.coarse_segm)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.maps().items())
        return f"{type(self).__name__}({shapes})"

    def __getitem__(self: Predictions, index: int | slice | Tensor) -> Predictions:
        """The persons of an index (then of one), a slice, indices (int64) or a mask (bool)."""
        if isinstance(index, int):
            index = slice(index, None if index == -1 else index + 1)
        return self._with({name: x[index] for name, x in self.maps().items()})

    def _with(self: Predictions, maps: dict[str, Tensor]) -> Predictions:
        return dataclasses.replace(self, **maps)

    def to(self: Predictions, *args: Any, **kwargs: Any) -> Predictions:
        """On another device or of another type; arguments as of ``Tensor.to``."""
        return self._with({name: x.to(*args, **kwargs) for name, x in self.maps().items()})

    @staticmethod
    def cat(parts: Sequence[Predictions]) -> Predictions:
        """The persons of all, in order; of one model, so that all have the same maps."""
        names = parts[0].maps()
        return parts[0]._with(
            {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
        )


@dataclass(frozen=True, repr=False)
class ChartPredictions(SurfacePredictions):
    """Parts and chart coordinates."""

    fine_segm: Tensor
    """25 logits of parts, background first."""
    u: Tensor
    """25 channels: U on each part, about 0..1; channel 0 unused."""
    v: Tensor
    """25 channels: V on each part."""
    sigma_2: Tensor | None = None
    """25 channels: before softplus, the variance of U and V."""
    kappa_u: Tensor | None = None
    """25 channels: the direction of larger variance, with ``kappa_v``."""
    kappa_v: Tensor | None = None
    fine_segm_confidence: Tensor | None = None
    """1 channel, positive; ``fine_segm`` is multiplied by it already."""
    coarse_segm_confidence: Tensor | None = None
    """1 channel, positive; ``coarse_segm`` is multiplied by it already."""


@dataclass(frozen=True, repr=False)
class EmbeddingPredictions(SurfacePredictions):
    """Embeddings, to be compared with those of a mesh's vertices."""

    embedding: Tensor
    """D channels, not normalised."""
    coarse_segm_confidence: Tensor | None = None
    """As in :class:`ChartPredictions`."""
    vertices: Mapping[str, Tensor] | None = None
    """(V, D) normalised embeddings of the vertices of meshes, by name: those of the model. They stay as
    they are, on their device, whatever is selected."""


class ChartResult(NamedTuple):
    """One person in a box of h×w pixels."""

    labels: Tensor
    """(h, w) int64: part 1..24, 0 background."""
    uv: Tensor
    """(2, h, w) float32: U and V of the label's part, about 0..1, not clamped; 0 on background."""
    confidences: dict[str, Tensor]
    """(h, w) float32 by the name of the map: ``sigma_2``, ``kappa_u``, ``kappa_v`` of the label's part,
    before softplus, 0 on background; ``fine_segm_confidence``, ``coarse_segm_confidence`` everywhere."""


class VertexResult(NamedTuple):
    """One person in a box of h×w pixels."""

    vertices: Tensor
    """(h, w) int64: nearest vertex from 0; 0 outside the mask."""
    mask: Tensor
    """(h, w) bool."""


def integer_boxes(boxes: Tensor) -> Tensor:
    """XYXY (N, 4) → (N, 4) int64 x, y, w, h, cut to integers, at least a pixel."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).long().clamp(min=1)
    return torch.cat([boxes[:, :2].long(), sizes], dim=1)


class _Pixels(NamedTuple):
    """Pixels of boxes and where they lie between the cells of the persons' maps."""

    person: Tensor
    """(T,) int32 or int64."""
    corners: Tensor
    """(4, T), the same type: cells of all maps, laid end to end: upper left and right, lower left and
    right."""
    right: Tensor
    """(T,) weight of the right column, of 1."""
    lower: Tensor
    """(T,) weight of the lower row, of 1."""

    def select(self, keep: Tensor) -> _Pixels:
        """The pixels of indices or of a mask."""
        return _Pixels(*(x[..., keep] for x in self))

    def sample(self, cells: Tensor, channel: Tensor | None = None) -> Tensor:
        """Bilinear samples, those of :func:`torch.nn.functional.interpolate` to 1e-6.

        Args:
            cells: (N * S * S, C)
            channel: (T,) of each pixel; None: all

        Returns:
            (T, C) or (T,)
        """
        if channel is None:
            a, b, c, d = (cells.index_select(0, corner) for corner in self.corners)
            right, lower = self.right[:, None], self.lower[:, None]
        else:
            a, b, c, d = (cells[corner, channel] for corner in self.corners)
            right, lower = self.right, self.lower
        return torch.lerp(torch.lerp(a, b, right), torch.lerp(c, d, right), lower)


def _place(scale: Tensor, index: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of a pixel, cells per pixel → low cell, high cell (int32), weight of the high one
    (``align_corners=False``)."""
    position = (scale * (index + 0.5) - 0.5).clamp_(min=0)
    low = position.int()
    return low, (low + 1).clamp_(max=side - 1), position - low


def _pixels_at(person: Tensor, column: Tensor, row: Tensor, sizes: Tensor, side: int) -> _Pixels:
    """Pixels (T,) in the boxes of persons, whose sizes (N, 2) are w, h."""
    across, down = (side / sizes.float()).T.contiguous().index_select(1, person)
    y0, y1, lower = _place(down, row, side)
    x0, x1, right = _place(across, column, side)
    first = person * side
    upper_row, lower_row = (first + y0) * side, (first + y1) * side
    corners = [upper_row + x0, upper_row + x1, lower_row + x0, lower_row + x1]
    return _Pixels(person, torch.stack(corners), right, lower)


def _pixels_of(sizes: Tensor, side: int) -> Iterator[_Pixels]:
    """The pixels of boxes, person by person, row by row, a chunk at a time.

    Args:
        sizes: (N, 2) int64: w, h
        side: S
    """
    areas = sizes.prod(dim=1)
    ends = areas.cumsum(0)
    begins, widths = ends - areas, sizes[:, 0].int()
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, total), device=sizes.device)
        # int32: half the memory, and division in 64 bits is slow on GPUs.
        person = torch.searchsorted(ends, index, right=True, out_int32=True)
        within = (index - begins.index_select(0, person)).int()
        width = widths.index_select(0, person)
        row = within // width
        yield _pixels_at(person, within - row * width, row, sizes, side)


def _in_boxes(chunks: list[Tensor], sizes: Tensor) -> list[Tensor]:
    """Values (..., T) of the pixels of :func:`_pixels_of` → (..., h, w) for each box."""
    if not chunks:
        return []
    shapes = [(h, w) for w, h in sizes.tolist()]
    values = torch.cat(chunks, dim=-1).split([h * w for h, w in shapes], dim=-1)
    return [x.unflatten(-1, shape) for x, shape in zip(values, shapes, strict=True)]


def _foreground(coarse: Tensor) -> Tensor:
    """Whether the largest of (T, C) is another than the first, the background; cheaper than argmax."""
    return coarse[:, 1:].amax(dim=1) > coarse[:, 0]


def _cells(maps: Tensor) -> Tensor:
    """(N, C, S, S) → (N * S * S, C): the channels of a cell side by side."""
    return maps.float().permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


@torch.no_grad()
def charts_in_boxes(predictions: ChartPredictions, boxes: Tensor) -> list[ChartResult]:
    """Part, U, V and confidences of each pixel of the persons' boxes.

    All pixels of all boxes go through the same few calls, and only those of the foreground are
    interpolated in all parts.

    Args:
        predictions: of N persons
        boxes: (N, 4) XYXY, pixels of the image that the results are for
    """
    sizes = integer_boxes(boxes)[:, 2:]
    side = predictions.coarse_segm.shape[-1]
    cells = {name: _cells(x) for name, x in predictions.maps().items()}
    coarse, fine = cells.pop("coarse_segm"), cells.pop("fine_segm")
    labels, values = [], []
    for pixels in _pixels_of(sizes, side):
        foreground = _foreground(pixels.sample(coarse)).nonzero()[:, 0]
        inside = pixels.select(foreground)
        part = inside.sample(fine).argmax(dim=1)
        label = torch.zeros_like(pixels.person, dtype=torch.int64)
        label[foreground] = part
        rows = []
        for name, x in cells.items():
            if name.endswith("segm_confidence"):
                rows.append(pixels.sample(x)[:, 0])
            else:
                row = torch.zeros_like(pixels.right)
                row[foreground] = torch.where(part > 0, inside.sample(x, part), 0.0)
                rows.append(row)
        labels.append(label)
        values.append(torch.stack(rows))
    confidences = list(cells)[2:]
    return [
        ChartResult(label, own[:2], dict(zip(confidences, own[2:], strict=True)))
        for label, own in zip(_in_boxes(labels, sizes), _in_boxes(values, sizes), strict=True)
    ]


@torch.no_grad()
def vertices_in_boxes(
    predictions: EmbeddingPredictions, boxes: Tensor, vertices: Tensor
) -> list[VertexResult]:
    """The nearest vertex of a mesh for each pixel of the persons' boxes.

    Args:
        predictions: of N persons
        boxes: (N, 4) XYXY, pixels of the image that the results are for
        vertices: (V, D) embeddings of the mesh's vertices, normalised
    """
    sizes = integer_boxes(boxes)[:, 2:]
    side = predictions.coarse_segm.shape[-1]
    coarse, embedding = _cells(predictions.coarse_segm), _cells(predictions.embedding)
    nearest, masks = [], []
    for pixels in _pixels_of(sizes, side):
        mask = _foreground(pixels.sample(coarse))
        vertex = torch.zeros_like(pixels.person, dtype=torch.int64)
        vertex[mask] = nearest_vertices(pixels.select(mask).sample(embedding), vertices)
        nearest.append(vertex)
        masks.append(mask)
    return [
        VertexResult(*result)
        for result in zip(_in_boxes(nearest, sizes), _in_boxes(masks, sizes), strict=True)
    ]


@torch.no_grad()
def masks_in_boxes(predictions: SurfacePredictions, boxes: Tensor) -> list[Tensor]:
    """The coarse foreground, (h, w) bool for each person: the mask of embeddings.

    Args:
        predictions: of N persons
        boxes: (N, 4) XYXY
    """
    sizes = integer_boxes(boxes)[:, 2:]
    coarse = _cells(predictions.coarse_segm)
    pixels = _pixels_of(sizes, predictions.coarse_segm.shape[-1])
    return _in_boxes([_foreground(x.sample(coarse)) for x in pixels], sizes)


@torch.no_grad()
def vertices_at(
    predictions: EmbeddingPredictions,
    sizes: Tensor,
    person: Tensor,
    column: Tensor,
    row: Tensor,
    vertices: Tensor,
) -> Tensor:
    """The nearest vertex of a mesh for some pixels; all on the device of the predictions or the CPU.

    Args:
        predictions: of N persons
        sizes: (N, 2) w, h of their boxes, cut to integers
        person, column, row: (T,) int64: which person, and where in the box
        vertices: as of :func:`vertices_in_boxes`

    Returns:
        (T,) int64; -1 outside the mask
    """
    device, side = predictions.embedding.device, predictions.coarse_segm.shape[-1]
    sizes = sizes.long().clamp(min=1)
    person, column, row, sizes = (x.to(device) for x in (person, column, row, sizes))
    pixels = _pixels_at(person, column, row, sizes, side)
    mask = _foreground(pixels.sample(_cells(predictions.coarse_segm)))
    result = torch.full_like(pixels.person, -1)
    inside = pixels.select(mask)
    result[mask] = nearest_vertices(
        inside.sample(_cells(predictions.embedding)), vertices.to(device)
    )
    return result


def nearest_vertices(embeddings: Tensor, vertices: Tensor) -> Tensor:
    """(T, D) embeddings of pixels, (V, D) of vertices → (T,) int64, the vertex of least distance."""
    squares = vertices.square().sum(dim=1)
    chunks = [
        # The pixel's own square is the same for all vertices.
        torch.addmm(squares, own, vertices.T, alpha=-2).argmin(dim=1)
        for own in embeddings.split(max(1, (_CHUNK * 25) // max(len(vertices), 1)))
    ]
    return torch.cat(chunks) if chunks else embeddings.new_zeros(0, dtype=torch.int64)


def quantize(result: ChartResult) -> Tensor:
    """(3, h, w) uint8: part, 255 U and 255 V, clamped and cut."""
    uv = (result.uv * 255).clamp(0, 255).to(torch.uint8)
    return torch.cat([result.labels[None].to(torch.uint8), uv])


def paste_masks(masks: Sequence[Tensor], boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The persons' pixels in the image. A box under one pixel wide or high has none, though its result
    has a pixel (published).

    Args:
        masks: N, (h, w) bool: labels of :func:`charts_in_boxes` above 0, or :func:`masks_in_boxes`
        boxes: (N, 4) that they are for
        size: (height, width) of the image

    Returns:
        (N, height, width) bool
    """
    pasted = torch.zeros((len(masks), *size), dtype=torch.bool, device=boxes.device)
    corners, sizes = boxes[:, :2].long().tolist(), (boxes[:, 2:] - boxes[:, :2]).long().tolist()
    for image, mask, (x, y), (w, h) in zip(pasted, masks, corners, sizes, strict=True):
        window = image[y : y + h, x : x + w]
        window.copy_(mask[: window.shape[0], : window.shape[1]])
    return pasted


def paste_results(
    quantized: Sequence[Tensor], boxes: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The persons in the image. Where they overlap, the first of them is on top.

    Args:
        quantized: N, (3, h, w) uint8, of :func:`quantize`
        boxes: (N, 4) that they are for
        size: (height, width) of the image

    Returns:
        surface: (3, height, width) uint8: part, 255 U, 255 V
        persons: (height, width) int32: which of them, from 1; 0: none
    """
    device = quantized[0].device if quantized else boxes.device
    surface = torch.zeros((3, *size), dtype=torch.uint8, device=device)
    persons = torch.zeros(size, dtype=torch.int32, device=device)
    corners = boxes[:, :2].long().tolist()
    for i in range(len(quantized) - 1, -1, -1):
        x, y = corners[i]
        h, w = quantized[i].shape[1:]
        window = surface[:, y : y + h, x : x + w]
        result = quantized[i][:, : window.shape[1], : window.shape[2]]
        there = result[0] > 0
        window.copy_(torch.where(there, result, window))
        persons[y : y + h, x : x + w][there] = i + 1
    return surface, persons


def encode_result(quantized: Tensor) -> str:
    """(3, h, w) uint8 → text: a PNG of the three planes as red, green, blue, in base64, with a line
    break after every 76 characters and at the end (published)."""
    rgb = quantized.permute(1, 2, 0).cpu().numpy()
    done, png = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))
    if not done:
        raise ValueError(f"A result of shape {tuple(quantized.shape)} makes no PNG.")
    text = base64.b64encode(png.tobytes()).decode("ascii")
    return "".join(f"{text[i : i + _LINE]}\n" for i in range(0, len(text), _LINE))


def stored_result(quantized: Tensor) -> dict[str, Any]:
    """A person's entry ``densepose`` in files of results: ``shape`` (3, h, w), ``data``: the text of
    :func:`encode_result`."""
    return {"shape": list(quantized.shape), "data": encode_result(quantized)}


def decode_result(text: str) -> Tensor:
    """Inverse of :func:`encode_result`.

    Raises:
        ValueError: the text is no such PNG.
    """
    content = np.frombuffer(base64.b64decode(text), np.uint8)
    bgr = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if len(content) else None
    if bgr is None or bgr.ndim != 3 or bgr.shape[2] != 3 or bgr.dtype != np.uint8:
        raise ValueError("The text holds no PNG of three planes of bytes.")
    return torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1])).permute(2, 0, 1)
