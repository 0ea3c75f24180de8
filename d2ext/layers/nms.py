"""Non-maximum suppression over fixed slots, without waiting for the device.

torchvision's gives the indices of the boxes that stay: how many, the host must wait to know. Here a mask
says it, so that what comes after has a fixed shape too, for CUDA graphs and exported files.

Shapes: ... groups (images, classes, levels), N boxes of each.

:func:`nms` is greedy. :func:`overlapped` is what Fast NMS (arXiv 1904.02689, section 4) asks of boxes.

On CUDA the operators ``d2ext::nms`` and ``d2ext::overlapped`` are compiled (``csrc/cuda/nms.cu``).
Elsewhere greedy NMS is torchvision's, one group after the other (in ONNX it becomes
``NonMaxSuppression``), and the other one plain PyTorch.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from d2ext.layers._extension import has_cuda_extension
from d2ext.layers.exporting import is_exporting, is_exporting_to_onnx

__all__ = ["nms", "nms_reference", "overlapped", "overlapped_reference"]


def nms(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Which boxes no better one of their group, itself kept, overlaps by more than ``threshold``.

    Overlaps are computed in float32, or float64 for float64 boxes, under autocast too; that of two boxes
    without area is none. There is no gradient.

    Args:
        boxes: (..., N, 4) corners x1, y1, x2, y2, the best one of each group first.
        valid: (..., N) bool; other boxes neither stay nor suppress.
        threshold: IoU in 0..1.

    Returns:
        (..., N) bool.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if is_exporting() and not is_exporting_to_onnx():
        # A program that holds torchvision's operator stops if it keeps fewer than two boxes: two without
        # area always stay.
        boxes, valid = F.pad(boxes, (0, 0, 0, 2)), F.pad(valid, (0, 2), value=True)
        return nms_reference(boxes, valid, threshold)[..., :-2]
    return torch.ops.d2ext.nms.default(boxes, valid, threshold)


def nms_reference(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """:func:`nms`, of the same arguments, by torchvision's operator; waits for the device."""
    _check(boxes, valid)
    if valid.numel() == 0:
        return valid.clone()
    count = boxes.shape[-2]
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    ranks = torch.arange(count, 0, -1, dtype=boxes.dtype, device=boxes.device)
    keep = []
    for own, good in zip(boxes.reshape(-1, count, 4), valid.reshape(-1, count), strict=True):
        index = good.nonzero()[:, 0]
        index = index[torchvision.ops.nms(own[index], ranks[index], threshold)]
        keep.append(good.new_zeros(count).index_fill(0, index, True))
    return torch.stack(keep).view(valid.shape)


def overlapped(boxes: Tensor, threshold: float) -> Tensor:
    """Which boxes a better one of their group, itself overlapped or not, overlaps by more than
    ``threshold``.

    As :func:`nms`, overlaps are computed in float32, or float64 for float64 boxes; that of a box with a
    NaN is none. There is no gradient.

    Args:
        boxes: (..., N, 4) corners x1, y1, x2, y2, the best one of each group first.
        threshold: IoU in 0..1, rounded to the boxes' arithmetic.

    Returns:
        (..., N) bool.

    Raises:
        ValueError: wrong shape or dtype.
    """
    if not boxes.is_cuda or not has_cuda_extension() or is_exporting():
        return overlapped_reference(boxes, threshold)
    return torch.ops.d2ext.overlapped.default(boxes, threshold)


def overlapped_reference(boxes: Tensor, threshold: float) -> Tensor:
    """:func:`overlapped` in plain PyTorch, N·N numbers for each group."""
    _check_boxes(boxes)
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    # Computed in place where possible.
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = torch.minimum(x2[..., :, None], x2[..., None, :])
    width = width.sub_(torch.maximum(x1[..., :, None], x1[..., None, :])).clamp_(min=0)
    height = torch.minimum(y2[..., :, None], y2[..., None, :])
    height = height.sub_(torch.maximum(y1[..., :, None], y1[..., None, :])).clamp_(min=0)
    intersection = width.mul_(height)
    area = (x2 - x1) * (y2 - y1)
    union = (area[..., :, None] + area[..., None, :]).sub_(intersection)
    # Row i suppresses column j > i. A box without area has IoU 0/0 with itself only.
    above = intersection.div_(union) > threshold
    count = boxes.shape[-2]
    later = torch.ones(count, count, dtype=torch.bool, device=boxes.device).triu_(diagonal=1)
    return above.logical_and_(later).any(dim=-2)


def _check_boxes(boxes: Tensor) -> None:
    if boxes.dim() < 2 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            "boxes must be floating point of shape (..., N, 4), "
            f"got {boxes.dtype} of shape {tuple(boxes.shape)}"
        )


def _check(boxes: Tensor, valid: Tensor) -> None:
    """The checks of the compiled operator, for the other one and for tensors without values."""
    _check_boxes(boxes)
    if valid.dtype != torch.bool or valid.shape != boxes.shape[:-1]:
        raise ValueError(
            f"valid must be bool, one for each box, got {valid.dtype} of shape {tuple(valid.shape)}"
        )
    if valid.device != boxes.device:
        raise ValueError(f"boxes are on {boxes.device} but valid is on {valid.device}")


if not hasattr(torch.ops.d2ext, "nms"):  # not compiled; as in csrc/library.cpp
    torch.library.define("d2ext::nms", "(Tensor boxes, Tensor valid, float threshold) -> Tensor")
torch.library.impl("d2ext::nms", "CPU")(nms_reference)
if not has_cuda_extension():
    torch.library.impl("d2ext::nms", "CUDA")(nms_reference)


@torch.library.register_fake("d2ext::nms")
def _nms_fake(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    _check(boxes, valid)
    return torch.empty_like(valid)


if hasattr(torch.ops.d2ext, "overlapped"):  # compiled

    @torch.library.register_fake("d2ext::overlapped")
    def _overlapped_fake(boxes: Tensor, threshold: float) -> Tensor:
        _check_boxes(boxes)
        return boxes.new_empty(boxes.shape[:-1], dtype=torch.bool)
