"""Graphs as ONNX files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from d2ext.config import ConfigError

# The first with DeformConv.
OPSET = 19
# ONNX' numbers of types.
_FLOAT, _BOOL = 1, 9


def need(package: str) -> None:
    """Raise ConfigError if a package of the extra ``export`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"ONNX files need {package}: pip install d2ext[export]")


def to_onnx(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int = OPSET
) -> Any:
    """The ONNX program of an exported one.

    Args:
        inputs, outputs: their names.
        opset: of ONNX, 19 or later.
    """
    return torch.onnx.export(
        program,
        input_names=list(inputs),
        output_names=list(outputs),
        opset_version=opset,
        custom_translation_table={
            torch.ops.torchvision.deform_conv2d.default: _deform_conv(),
            torch.ops.d2ext.nms.default: _nms(),
            torch.ops.aten.sort.stable: _stable_sort(),
        },
        verbose=False,
    )


def _deform_conv() -> Any:
    """torchvision's operator as ONNX' ``DeformConv``; both order offsets as (y, x) of each tap."""
    from onnxscript import opset19 as op

    def deform_conv2d(
        input: Any,
        weight: Any,
        offset: Any,
        mask: Any,
        bias: Any,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
        offset_groups: int,
        use_mask: bool,
    ) -> Any:
        return op.DeformConv(
            input,
            weight,
            offset,
            bias,
            mask if use_mask else None,
            strides=[stride_h, stride_w],
            pads=[pad_h, pad_w, pad_h, pad_w],
            dilations=[dilation_h, dilation_w],
            group=groups,
            offset_group=offset_groups,
        )

    return deform_conv2d


def _nms() -> Any:
    """d2ext's operator as ONNX' ``NonMaxSuppression``, whose groups are images of one class."""
    from onnxscript import opset19

    op: Any = opset19  # its types know no values that are computed

    def nms(boxes: Any, valid: Any, threshold: float) -> Any:
        limit = np.float32(threshold)
        if limit > threshold:  # as the others: above it, the overlap in float32
            limit = np.nextafter(limit, np.float32(-1))
        shape = op.Shape(valid)
        count = op.Gather(shape, op.Constant(value_ints=[-1]))
        grouped = op.Concat(op.Constant(value_ints=[-1]), count, axis=0)
        zero, one = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
        scalar = op.Squeeze(count)
        # Best first: their number, down to 1; 0 for those that are not valid.
        ranks = op.Range(op.Cast(scalar, to=_FLOAT), zero, op.Constant(value_float=-1.0))
        groups = op.Reshape(valid, grouped)
        scores = op.Where(groups, ranks, zero)
        selected = op.NonMaxSuppression(
            op.Reshape(boxes, op.Concat(grouped, op.Constant(value_ints=[4]), axis=0)),
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            count,
            op.Constant(value_float=float(limit)),
            op.Constant(value_float=0.5),
        )
        index = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        number = op.Gather(op.Shape(selected), op.Constant(value_ints=[0]))
        keep = op.ScatterND(op.Mul(scores, zero), index, op.Expand(one, number))
        return op.Reshape(op.Cast(keep, to=_BOOL), shape)

    return nms


def _stable_sort() -> Any:
    """ONNX' ``TopK`` of all: of equal elements the first one comes first."""
    from onnxscript import opset19

    op: Any = opset19  # its types know no values that are computed

    def sort(x: Any, *, stable: bool, dim: int, descending: bool) -> Any:
        assert stable
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    return sort
