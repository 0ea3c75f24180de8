"""Instance masks as linear combinations of prototypes (YOLACT, https://arxiv.org/abs/1904.02689).

Shapes: B images, h x w grid of k prototypes, N detections, H x W output.

- :func:`assemble_masks`: probabilities on the prototype grid, differentiable (training).
- :func:`assemble_binary_masks`: boolean masks at the image's size (inference), fused.

Both run compiled kernels (``csrc/``) where available and the plain PyTorch functions ``*_reference``
elsewhere; the results agree up to rounding.

**Crop rule.** Box sides times the grid's size, ordered, widened by ``padding`` cells on each side,
clamped to [0, size]; cell i is inside iff low <= i < high. A box with a NaN side contains no cell.

**Precision.** float16 and bfloat16 are multiplied and summed in float32, float32 in float32, float64
in float64; box limits are computed in float32 (float64 for float64 prototypes). Autocast does not
change the operators' dtype; prototypes and coefficients of different dtypes are promoted to their
common one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.layers._extension import compiled_for, has_extension, register_gradient

__all__ = [
    "assemble_binary_masks",
    "assemble_binary_masks_reference",
    "assemble_masks",
    "assemble_masks_reference",
]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_SIDE = 2**31 - 1
_CHUNK_PIXELS = 2**25
"""Interpolated pixels that the plain PyTorch path holds at a time (float32: 128 MiB)."""


def assemble_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None = None,
    *,
    padding: float = 1.0,
) -> Tensor:
    """Mask probabilities on the prototype grid: sigmoid(prototypes · coefficients), cropped.

    Differentiable with respect to prototypes and coefficients (first derivatives).

    Args:
        prototypes: (B, h, w, k) or (h, w, k), floating point, any strides.
        coefficients: (N, k).
        boxes: (N, 4), x1, y1, x2, y2 relative to the image (0 to 1; values outside, and corners
            in any order, are allowed). No gradient.
        batch_index: (N,) int64, the image of each detection; needed iff B > 1.
        padding: cells by which the crop is wider than the box on each side, >= 0.

    Returns:
        (N, h, w) in the prototypes' dtype; 0 outside the box.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        IndexError: a batch_index outside [0, B) on the CPU. The GPU kernel does not check, which
            would make the host wait: such a detection gets an empty mask and no gradient.
    """
    prototypes, coefficients = _promote(prototypes, coefficients)
    if not compiled_for(prototypes.device):
        return assemble_masks_reference(
            prototypes, coefficients, boxes, batch_index, padding=padding
        )
    return torch.ops.d2ext.assemble_masks.default(
        prototypes, coefficients, boxes, batch_index, padding
    )


def assemble_slot_masks(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """:func:`assemble_masks` of a batch with D slots for each image, in plain PyTorch.

    Args:
        prototypes: (B, h, w, k). coefficients: (B, D, k). boxes: (B, D, 4).

    Returns:
        (B, D, h, w) float32.
    """
    height, width = prototypes.shape[1:3]
    logits = coefficients.float() @ prototypes.float().flatten(1, 2).transpose(1, 2)
    inside = _cells_inside(boxes.float().flatten(0, 1), height, width, 1.0)
    masks = logits.sigmoid().flatten(0, 1).unflatten(1, (height, width))
    return torch.where(inside, masks, masks.new_zeros(())).unflatten(0, boxes.shape[:2])


def assemble_binary_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    batch_index: Tensor | None = None,
    *,
    threshold: float = 0.5,
    crop: str = "before",
    padding: float = 1.0,
) -> Tensor:
    """Boolean masks at the image's size, without the intermediate steps in memory.

    The probabilities of :func:`assemble_masks`, resized bilinearly as by
    ``F.interpolate(..., mode="bilinear", align_corners=False)``, then compared: > threshold. No
    gradient.

    Args:
        prototypes, coefficients, boxes, batch_index: as for :func:`assemble_masks`.
        size: (H, W) of the masks, in pixels.
        threshold: a pixel is set iff its probability is above this.
        crop: "before": probabilities are cropped on the prototype grid, before they are resized
            (published YOLACT); "after": the resized mask is cropped, by the same rule on the H x W
            grid.
        padding: cells (of the grid on which is cropped) by which the crop is wider than the box on
            each side, >= 0.

    Returns:
        (N, H, W) bool.

    Raises:
        ValueError, IndexError: as :func:`assemble_masks`.
    """
    _check_crop(crop)
    prototypes, coefficients = _promote(prototypes, coefficients)
    if not compiled_for(prototypes.device):
        return assemble_binary_masks_reference(
            prototypes,
            coefficients,
            boxes,
            size,
            batch_index,
            threshold=threshold,
            crop=crop,
            padding=padding,
        )
    return torch.ops.d2ext.assemble_binary_masks.default(
        prototypes,
        coefficients,
        boxes,
        batch_index,
        size[0],
        size[1],
        threshold,
        crop == "after",
        padding,
    )


# ---------------------------------------------------------------- plain PyTorch


def assemble_masks_reference(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None = None,
    *,
    padding: float = 1.0,
) -> Tensor:
    """:func:`assemble_masks` in plain PyTorch; differentiable to any order."""
    prototypes, coefficients = _promote(prototypes, coefficients)
    _check_inputs(prototypes, coefficients, boxes, batch_index, padding)
    _check_batch_values(batch_index, prototypes)
    masks = _cropped_probabilities(prototypes, coefficients, boxes, batch_index, padding)
    return masks.to(prototypes.dtype)


@torch.no_grad()
def assemble_binary_masks_reference(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    batch_index: Tensor | None = None,
    *,
    threshold: float = 0.5,
    crop: str = "before",
    padding: float = 1.0,
) -> Tensor:
    """:func:`assemble_binary_masks` in plain PyTorch, a chunk of detections at a time."""
    _check_crop(crop)
    prototypes, coefficients = _promote(prototypes, coefficients)
    _check_inputs(prototypes, coefficients, boxes, batch_index, padding)
    _check_batch_values(batch_index, prototypes)
    _check_size(size)
    height, width = size
    detections = coefficients.shape[0]
    masks = torch.empty((detections, height, width), dtype=torch.bool, device=prototypes.device)
    step = max(1, _CHUNK_PIXELS // (height * width))
    for start in range(0, detections, step):
        part = slice(start, start + step)
        probabilities = _cropped_probabilities(
            prototypes,
            coefficients[part],
            boxes[part],
            None if batch_index is None else batch_index[part],
            padding if crop == "before" else math.inf,
        )
        # A NaN counts where its weight is above 0; times 0 it would still be NaN.
        spoilt = probabilities.isnan().to(probabilities.dtype)
        pair = torch.stack([probabilities.nan_to_num(0.0), spoilt], dim=1)
        resized, spoilt = F.interpolate(
            pair, size=(height, width), mode="bilinear", align_corners=False
        ).unbind(1)
        above = (resized > threshold) & (spoilt == 0)
        if crop == "after":
            above &= _cells_inside(boxes[part].to(probabilities.dtype), height, width, padding)
        masks[part] = above
    return masks


def _cropped_probabilities(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    padding: float,
) -> Tensor:
    """(N, h, w) in float32, or float64 for float64 prototypes; infinite padding: not cropped."""
    dtype = torch.float64 if prototypes.dtype == torch.float64 else torch.float32
    with torch.autocast(prototypes.device.type, enabled=False):
        probabilities = _logits(prototypes.to(dtype), coefficients.to(dtype), batch_index).sigmoid()
    if math.isinf(padding):
        return probabilities
    _, height, width = probabilities.shape
    keep = _cells_inside(boxes.to(dtype), height, width, padding)
    return torch.where(keep, probabilities, probabilities.new_zeros(()))


def _logits(prototypes: Tensor, coefficients: Tensor, batch_index: Tensor | None) -> Tensor:
    if prototypes.dim() == 3 or batch_index is None:
        # N = 0 with B > 1 images needs no index.
        image = prototypes if prototypes.dim() == 3 else prototypes[:1].flatten(0, 1)
        return _image_logits(image, coefficients).reshape(-1, *prototypes.shape[-3:-1])
    # Image by image: prototypes[batch_index] would copy every prototype N / B times.
    members = [(batch_index == image).nonzero()[:, 0] for image in range(prototypes.shape[0])]
    logits = [
        _image_logits(prototypes[image], coefficients[rows]) for image, rows in enumerate(members)
    ]
    if not logits:
        return coefficients.new_zeros((0, *prototypes.shape[1:3]))
    return torch.cat(logits)[torch.cat(members).argsort()]


def _image_logits(prototypes: Tensor, coefficients: Tensor) -> Tensor:
    flat = coefficients @ prototypes.flatten(0, 1).T
    return flat.unflatten(1, prototypes.shape[:2])


def _cells_inside(boxes: Tensor, height: int, width: int, padding: float) -> Tensor:
    """(N, height, width) bool: the cells inside the boxes by the crop rule."""
    columns = _inside_along(boxes[:, 0], boxes[:, 2], width, padding)
    rows = _inside_along(boxes[:, 1], boxes[:, 3], height, padding)
    return rows[:, :, None] & columns[:, None, :]


def _inside_along(side_a: Tensor, side_b: Tensor, size: int, padding: float) -> Tensor:
    a = side_a * size
    b = side_b * size
    low = (torch.minimum(a, b) - padding).clamp(0, size)
    high = (torch.maximum(a, b) + padding).clamp(0, size)
    cells = torch.arange(size, device=a.device, dtype=a.dtype)
    return (cells >= low[:, None]) & (cells < high[:, None])


# ---------------------------------------------------------------- arguments


def _promote(prototypes: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    if prototypes.dtype == coefficients.dtype:
        return prototypes, coefficients
    dtype = torch.promote_types(prototypes.dtype, coefficients.dtype)
    return prototypes.to(dtype), coefficients.to(dtype)


def _check_crop(crop: str) -> None:
    if crop not in ("before", "after"):
        raise ValueError(f'crop must be "before" or "after", got {crop!r}')


def _check_inputs(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    padding: float,
) -> None:
    """The checks of the compiled operators (csrc/prototype_masks.h), for the plain PyTorch path and for
    tensors without values."""
    sides = prototypes.shape[-3:]
    if prototypes.dim() not in (3, 4) or min(sides) < 1 or max(sides) >= _MAX_SIDE:
        raise ValueError(
            "prototypes must have shape (h, w, k) or (B, h, w, k) with h, w, k >= 1 and < 2^31 - 1, "
            f"got {tuple(prototypes.shape)}"
        )
    if prototypes.dtype not in _DTYPES or not boxes.is_floating_point():
        raise ValueError(
            f"prototypes and boxes must be floating point, got {prototypes.dtype} and {boxes.dtype}"
        )
    channels = prototypes.shape[-1]
    if coefficients.dim() != 2 or coefficients.shape[1] != channels:
        raise ValueError(
            f"coefficients must have shape (N, {channels}), as many columns as there are "
            f"prototypes, got {tuple(coefficients.shape)}"
        )
    if coefficients.dtype != prototypes.dtype:
        raise ValueError(
            f"coefficients are {coefficients.dtype} but prototypes are {prototypes.dtype}"
        )
    detections = coefficients.shape[0]
    if boxes.shape != (detections, 4):
        raise ValueError(
            f"boxes must have shape ({detections}, 4), one box per row of coefficients, "
            f"got {tuple(boxes.shape)}"
        )
    devices = {str(tensor.device) for tensor in (prototypes, coefficients, boxes)}
    if batch_index is not None:
        devices.add(str(batch_index.device))
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")
    if not (0 <= padding < math.inf):
        raise ValueError(f"padding must be finite and >= 0 cells, got {padding}")
    _check_batch_index(batch_index, prototypes, detections)


def _check_batch_index(batch_index: Tensor | None, prototypes: Tensor, detections: int) -> None:
    images = prototypes.shape[0] if prototypes.dim() == 4 else 1
    if batch_index is None:
        if images != 1 and detections:
            raise ValueError(
                f"batch_index is needed to choose among the prototypes of {images} images"
            )
        return
    if prototypes.dim() != 4:
        raise ValueError(
            f"batch_index needs prototypes of shape (B, h, w, k), got {tuple(prototypes.shape)}"
        )
    if batch_index.shape != (detections,) or batch_index.dtype != torch.int64:
        raise ValueError(
            f"batch_index must be int64 of shape ({detections},), "
            f"got {batch_index.dtype} of shape {tuple(batch_index.shape)}"
        )
    if not images and detections:
        raise ValueError(f"{detections} detections, but prototypes of no image")


def _check_batch_values(batch_index: Tensor | None, prototypes: Tensor) -> None:
    if batch_index is None or not len(batch_index):
        return
    if not bool(((batch_index >= 0) & (batch_index < len(prototypes))).all()):
        raise IndexError(
            f"batch_index must be in [0, {len(prototypes)}), got {batch_index.tolist()}"
        )


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 1 or max(size) >= _MAX_SIDE:
        raise ValueError(
            f"size must be (height, width), both >= 1 and < 2^31 - 1, got {tuple(size)}"
        )


# ---------------------------------------------------------------- compiled: shapes, gradients

if has_extension():

    @torch.library.register_fake("d2ext::assemble_masks")
    def _assemble_masks_fake(
        prototypes: Tensor,
        coefficients: Tensor,
        boxes: Tensor,
        batch_index: Tensor | None,
        padding: float,
    ) -> Tensor:
        _check_inputs(prototypes, coefficients, boxes, batch_index, padding)
        height, width = prototypes.shape[-3:-1]
        return prototypes.new_empty((coefficients.shape[0], height, width))

    @torch.library.register_fake("d2ext::assemble_masks_backward")
    def _assemble_masks_backward_fake(
        grad: Tensor,
        prototypes: Tensor,
        coefficients: Tensor,
        boxes: Tensor,
        batch_index: Tensor | None,
        padding: float,
    ) -> tuple[Tensor, Tensor]:
        _check_inputs(prototypes, coefficients, boxes, batch_index, padding)
        expected = (coefficients.shape[0], *prototypes.shape[-3:-1])
        like = grad.dtype == prototypes.dtype and grad.device == prototypes.device
        if grad.shape != expected or not like:
            raise ValueError(
                f"grad must be {prototypes.dtype} on {prototypes.device} of shape {expected}, "
                f"got {grad.dtype} on {grad.device} of shape {tuple(grad.shape)}"
            )
        return torch.empty_like(prototypes), torch.empty_like(coefficients)

    @torch.library.register_fake("d2ext::assemble_binary_masks")
    def _assemble_binary_masks_fake(
        prototypes: Tensor,
        coefficients: Tensor,
        boxes: Tensor,
        batch_index: Tensor | None,
        height: int,
        width: int,
        threshold: float,
        crop_after: bool,
        padding: float,
    ) -> Tensor:
        _check_inputs(prototypes, coefficients, boxes, batch_index, padding)
        _check_size((height, width))
        return prototypes.new_empty((coefficients.shape[0], height, width), dtype=torch.bool)

    # Only the inputs are saved: backward recomputes the logits.

    def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.padding = inputs
        ctx.save_for_backward(*tensors)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.d2ext.assemble_masks_backward.default
        return *backward(grad, *ctx.saved_tensors, ctx.padding), None, None, None

    register_gradient("assemble_masks", _backward, _save_inputs)
