"""Graphs as ONNX files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from d2ext.config import ConfigError

# The first with DeformConv.
OPSET = 19


def need(package: str) -> None:
    """Raise ConfigError if a package of the extra ``export`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"ONNX files need {package}: pip install d2ext[export]")


def to_onnx(program: ExportedProgram, names: Sequence[str], opset: int = OPSET) -> Any:
    """The ONNX program of an exported one.

    Args:
        names: of the outputs.
        opset: of ONNX, 19 or later.
    """
    return torch.onnx.export(
        program,
        output_names=list(names),
        opset_version=opset,
        custom_translation_table={torch.ops.torchvision.deform_conv2d.default: _deform_conv()},
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
