"""Base class of detectors that run on whole images, each on a canvas, at one or more scales.

Letters: B images, H×W pixels of a canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2ext.codecs.canvas import Canvas
from d2ext.codecs.heatmaps import maps_on_image
from d2ext.layers.transfer import upload_alike
from d2ext.modeling.meta_arch import MetaArch, image_size, output_size


class MultiScaleMetaArch(MetaArch):
    """A subclass implements :meth:`canvas`, :meth:`draw`, :meth:`detections`, :meth:`result` and
    :meth:`shown_maps`, besides :meth:`encode_targets` and :meth:`losses` of :class:`MetaArch`."""

    def __init__(self, *, scales: Sequence[float], flip: bool, **meta_arch: Any) -> None:
        """Args:
        scales: of the image in inference, one pass of the network each.
        flip: also pass the mirror image.
        meta_arch: see :class:`MetaArch`.
        """
        super().__init__(**meta_arch)
        if not scales or min(scales) <= 0:
            raise ValueError(
                f"TEST.SCALES holds positive factors, at least one; not {list(scales)}."
            )
        self.scales = [float(scale) for scale in scales]
        self.flip = flip

    def canvas(self, size: tuple[int, int], scale: float) -> Canvas:
        """How an image of ``size`` (height, width) is placed in the network's input."""
        raise NotImplementedError

    def draw(self, images: Tensor, canvas: Canvas) -> Tensor:
        """(n, 3, h, w) → (n, 3, H, W) in 0..255: scaled images, each on the canvas."""
        raise NotImplementedError

    def detections(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]], scale: float
    ) -> list[Any]:
        """Decoded predictions of a pass → each image's detections, in pixels of the image."""
        raise NotImplementedError

    def result(self, inputs: dict[str, Any], passes: list[Any]) -> dict[str, Any]:
        """Detections of one image at each scale → its results."""
        raise NotImplementedError

    def results(
        self, batched_inputs: list[dict[str, Any]], passes: list[list[Any]]
    ) -> list[dict[str, Any]]:
        """Detections of each image at each scale → its results."""
        return [self.result(x, each) for x, each in zip(batched_inputs, passes, strict=True)]

    def shown_maps(self, inputs: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        """One image's heat maps: name, probabilities (C, h, w), map from cells to pixels (2, 3)."""
        raise NotImplementedError

    def preprocess(
        self, batched_inputs: list[dict[str, Any]], scale: float | None = None
    ) -> Tensor:
        """Images with canvases of one size → (B, 3, H, W), followed by B mirror images if ``flip``.

        Around the images there are zeros, as published added before the normalisation.

        Args:
            scale: one of the test scales; default: the first of them.
        """
        scale = self.scales[0] if scale is None else scale
        groups: dict[Any, list[int]] = {}  # of images of one size, which are drawn together
        for i, image in enumerate(x["image"] for x in batched_inputs):
            groups.setdefault((image.shape, image.dtype), []).append(i)
        canvases: dict[int, Tensor] = {}
        for members in groups.values():
            group = [batched_inputs[i] for i in members]
            together = upload_alike([x["image"] for x in group], self.device)
            canvas = self.canvas(image_size(group[0]), scale)
            canvases.update(zip(members, self.draw(together, canvas), strict=True))
        images = self.normalize(torch.stack([canvases[i] for i in range(len(batched_inputs))]))
        return torch.cat([images, images.flip(-1)]) if self.flip else images

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Images of any sizes, at all scales; images with canvases of one size run as a batch."""
        runs = []
        for scale in self.scales:
            groups: dict[tuple[int, int], list[int]] = {}
            for i, inputs in enumerate(batched_inputs):
                groups.setdefault(self.canvas(image_size(inputs), scale).size, []).append(i)
            for members in groups.values():
                group = [batched_inputs[i] for i in members]
                predictions = self.inference_network(self.preprocess(group, scale))
                runs.append((members, group, predictions, scale))
        passes: list[list[Any]] = [[] for _ in batched_inputs]
        for members, group, predictions, scale in runs:
            for i, one in zip(members, self.detections(predictions, group, scale), strict=True):
                passes[i].append(one)
        return self.results(batched_inputs, passes)

    def postprocess(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Results of a single pass, at the first scale."""
        passes = self.detections(predictions, batched_inputs, self.scales[0])
        return self.results(batched_inputs, [[one] for one in passes])

    @torch.no_grad()
    def heatmaps(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Heat maps at the first test scale, for drawing; see :mod:`d2ext.utils.heatmaps`.

        Returns:
            for each image maps by name, (height, width) of the output, in 0..1.
        """
        results = []
        for inputs in batched_inputs:
            shown: dict[str, Tensor] = {}
            for name, maps, to_image in self.shown_maps(inputs):
                heat = maps_on_image(maps, to_image, image_size(inputs), output_size(inputs))
                shown[name] = torch.maximum(shown.get(name, heat), heat)
            results.append(shown)
        return results
