"""Trained models as files that run without their code: ``torch.export``, ONNX, AOTInductor.

:func:`export` writes a file, :class:`ExportedFile` runs one, :func:`check` compares it with its model,
and ``numpy_results.py`` makes results of a file's outputs without PyTorch.
"""

from __future__ import annotations

import os

import torch
from detectron2.config import CfgNode
from torch import nn

from d2ext.config import ConfigError
from d2ext.export.check import Difference, check
from d2ext.export.files import FORMATS, ExportedFile, is_exported, later_path, metadata, write
from d2ext.export.graph import capture, export_form, exportable, input_size
from d2ext.export.onnx_format import need
from d2ext.modeling.export_form import NotExportable

__all__ = [
    "FORMATS",
    "Difference",
    "ExportedFile",
    "NotExportable",
    "check",
    "export",
    "exportable",
    "is_exported",
]


def export(
    model: nn.Module,
    cfg: CfgNode,
    path: str | os.PathLike[str],
    *,
    file_format: str = "onnx",
    size: tuple[int, int] | None = None,
    dtype: str = "float32",
    bytes_in: bool = False,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
) -> list[str]:
    """Write a model's normalisation, network and decoding to a file; of a model with memory to two,
    the second beside the first, see :func:`~d2ext.export.files.later_path`.

    Args:
        model: its graph takes images (B, 3, H, W) in 0..255 and gives tensors of fixed slots;
            docs/export.md lists them.
        cfg: the model's, which the file carries.
        path: ends with ".onnx", or with ".pt2" for the other formats.
        file_format: "onnx", "torch" (``torch.export``) or "aoti" (AOTInductor, for this machine's CPU or
            GPU).
        size: (height, width) of the input; by default the model's own.
        dtype: of the network's arithmetic: "float32", "float16" or "bfloat16".
        bytes_in: images are uint8, not float32.
        dynamic_batch, dynamic_size: batches of any size instead of one image; images of any size that
            the network takes.

    Returns:
        The files' paths.

    Raises:
        NotExportable: this model, or a model with these sizes, cannot be exported.
        ConfigError: the name does not suit the format, or that needs a package that is not installed.
    """
    path = os.fspath(path)
    if not path.endswith(FORMATS[file_format]):
        raise ConfigError(
            f"A file of format {file_format} ends with {FORMATS[file_format]}: '{path}'."
        )
    name, model = type(model).__name__, exportable(cfg, model)
    form = export_form(model)
    if file_format == "onnx":
        need("onnxscript")
    if form.sizes and dynamic_batch:
        raise NotExportable(f"{name}'s file takes one image at a time.")
    size = input_size(form, size, dynamic_size)
    device = "cpu" if file_format == "onnx" else torch.device(model.device).type
    forms = {path: form} | ({later_path(path): form.later} if form.later else {})
    for target, own in forms.items():
        program = capture(
            model.eval(),
            own,
            size,
            dtype=dtype,
            bytes_in=bytes_in,
            dynamic_batch=dynamic_batch,
            dynamic_size=dynamic_size,
            onnx=file_format == "onnx",
            earlier=form,
        )
        write(program, target, file_format, metadata(cfg, own, program, device))
    return list(forms)
