"""A model's normalisation, network and decoding as one graph of PyTorch's exporter.

Letters: B images, H×W pixels of the network's input.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from d2ext.layers.corner_pool import LONGEST_SIDE
from d2ext.layers.exporting import exporting_to_onnx
from d2ext.modeling.export_form import EXPORT_REGISTRY, ExportForm, NotExportable, Outputs
from d2ext.modeling.inference import DTYPES, prepared_copy
from d2ext.modeling.meta_arch import MetaArch

MAX_BATCH = 1024
# Pixels of the sides of images of any size; the coarsest levels then have two cells or more.
MIN_SIDE, MAX_SIDE = 96, 4 * LONGEST_SIDE


class ExportGraph(nn.Module):
    """Images (B, 3, H, W) in 0..255, bytes or float32, in the config's order of channels → named
    tensors.

    Args:
        model: in eval mode.
        form: of the model.
        dtype: of the network's arithmetic; decoding stays in float32.
    """

    def __init__(self, model: MetaArch, form: ExportForm, dtype: torch.dtype) -> None:
        super().__init__()
        inference = form.network or model.inference_network
        self.network = prepared_copy(inference.network).to(dtype)
        self.dtype, self.form = dtype, form
        self.decode = inference.decode
        self.register_buffer("mean", model.pixel_mean.clone())
        self.register_buffer("deviation", model.pixel_std.clone())

    def forward(self, images: Tensor, *state: Tensor) -> Outputs:
        images = (images.float() - self.mean) / self.deviation
        inputs = network_inputs(images, self.form, *state)
        return self.form.pack(self.decode(self.network(inputs[0].to(self.dtype), *inputs[1:])))


def network_inputs(images: Tensor, form: ExportForm, *state: Tensor) -> tuple[Tensor, ...]:
    """Normalised images → what a model's network takes. ``state``: ``sizes``, then the memory, if there
    are some, see :class:`ExportForm`."""
    if form.mirror:
        return (torch.cat([images, images.flip(-1)]),)
    if not form.sizes:
        return (images, *state)
    sizes, *memory = state
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    images = images * (rows < sizes[:, :1])[:, None, :, None]  # zeros behind the image
    return images * (columns < sizes[:, 1:])[:, None, None], sizes, *memory


def whole_sizes(images: Tensor, form: ExportForm) -> list[Tensor]:
    """The state of images (B, 3, H, W) without padding: ``sizes`` (B, 2), if the form has them."""
    whole = torch.tensor([images.shape[-2:]], dtype=torch.float32, device=images.device)
    return [whole.expand(len(images), 2)] if form.sizes else []


class _Stem(nn.Module):
    """Detectron2's ``BasicStem`` for images of any size: of a strided pooling, PyTorch's exporter takes
    the example's parity for everybody's."""

    def __init__(self, stem: BasicStem) -> None:
        super().__init__()
        self.conv1 = stem.conv1

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv1(x)), 3, stride=1, padding=1)[..., ::2, ::2]


def exportable(cfg: CfgNode, model: nn.Module) -> MetaArch:
    """A model itself or, of Detectron2's, what stands for it.

    Raises:
        NotExportable: there is nothing; the message names the model.
    """
    name = type(model).__name__
    stand_in = f"Exportable{type(getattr(model, 'roi_heads', None)).__name__}"
    if name.endswith("WithTTA"):
        raise NotExportable(
            f"{name} runs the model on several views of an image: turn TEST.AUG.ENABLED off."
        )
    if isinstance(model, MetaArch):
        return model
    if stand_in not in EXPORT_REGISTRY:
        raise NotExportable(f"{name} cannot be exported: only systems of d2ext can be.")
    result: MetaArch = EXPORT_REGISTRY.get(stand_in)(cfg, model)
    return result.to(model.device).train(model.training)


def export_form(model: MetaArch) -> ExportForm:
    """The form of a model.

    Raises:
        NotExportable: it has none; the message names the model and says why.
    """
    if model.export_refusal:
        name = type(model).__name__
        raise NotExportable(f"{name} cannot be exported so far: {model.export_refusal}.")
    return model.export_form()


def input_size(form: ExportForm, size: tuple[int, int] | None, dynamic: bool) -> tuple[int, int]:
    """(height, width) of the graph's input.

    Raises:
        NotExportable: the network does not take this size, or any but one.
    """
    if form.sizes and dynamic:
        raise NotExportable("The file's input has one size; smaller images lie in its corner.")
    if not form.multiple and (dynamic or size not in (None, form.size)):
        raise NotExportable(
            f"The model brings every image to {form.size[0]}x{form.size[1]}: there are no other sizes."
        )
    size = size or form.size
    if dynamic and any(not MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise NotExportable(
            f"Images of any size have sides of {MIN_SIDE} to {MAX_SIDE} pixels, not {size[0]}x{size[1]}."
        )
    if form.multiple and any((side + form.less) % form.multiple or side < 1 for side in size):
        less = f" less {form.less}" if form.less else ""
        raise NotExportable(
            f"The input's sides are multiples of {form.multiple}{less}, not {size[0]}x{size[1]}."
        )
    return size


def dynamic_shapes(form: ExportForm, batch: bool, size: bool) -> dict[str, dict[int, Dim]]:
    """What of the shape of ``images`` the graph leaves open."""
    shape = {0: Dim("batch", min=1, max=MAX_BATCH)} if batch else {}
    for axis, name in ((2, "height"), (3, "width")) if size else ():
        if form.multiple == 1:
            shape[axis] = Dim(name, min=MIN_SIDE, max=MAX_SIDE)
            continue
        steps = (-(-MIN_SIDE // form.multiple), MAX_SIDE // form.multiple)
        side = form.multiple * Dim(f"{name}_units", min=steps[0], max=steps[1])
        shape[axis] = side - form.less if form.less else side
    return {"images": shape}


def capture(
    model: MetaArch,
    form: ExportForm,
    size: tuple[int, int],
    *,
    dtype: str = "float32",
    bytes_in: bool = False,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    onnx: bool = False,
    earlier: ExportForm | None = None,
) -> ExportedProgram:
    """The graph of a model for images of ``size`` (height, width), one a batch if not dynamic.

    Args:
        onnx: it goes into an ONNX file, not one of PyTorch.
        earlier: of a form with memory: the one that leaves it.
    """
    graph = ExportGraph(model, form, DTYPES[dtype]).eval()
    if dynamic_size and form.multiple == 1:
        for module in list(graph.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, BasicStem):
                    setattr(module, name, _Stem(child))
    batch = 2 if dynamic_batch else 1  # of one image, the exporter would take the number for fixed
    images = torch.zeros((batch, 3, *size), device=model.device)
    images = images.to(torch.uint8) if bytes_in else images
    shapes: dict[str, Any] = dynamic_shapes(form, dynamic_batch, dynamic_size)
    state = whole_sizes(images, form)
    with torch.no_grad(), _quiet(), exporting_to_onnx(onnx):
        if form.memory:
            assert earlier is not None
            left = ExportGraph(model, earlier, DTYPES[dtype]).eval()(images, *state)
            state += [left[name] for name in form.memory]
        if state:
            batches = {0: shapes["images"][0]} if form.memory and dynamic_batch else None
            shapes["state"] = (batches,) * len(state)
        graph(images, *state)  # fills the caches of priors
        return torch.export.export(
            graph,
            (images, *state),
            dynamic_shapes=shapes,
            strict=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
