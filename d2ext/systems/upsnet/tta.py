"""Test-time augmentation of UPSNet: flips and scales.

The published code has none, though the paper reports multi-scale results; this is what it means here.
The network sees several views of the image. In the frame of the image as it came,

- semantic logits are averaged;
- the boxes of all views, with the probabilities that their view gave them, compete in one NMS;
- the mask logits of a chosen box are averaged over the views, each of which is asked about it;

and the panoptic head works on these once.

Letters: K views, S stuff and T thing classes, R regions, M side of mask logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.systems.upsnet.boxes import clip
from d2ext.systems.upsnet.postprocess import Candidates, Detections

if TYPE_CHECKING:
    from d2ext.systems.upsnet.model import Raw, UPSNet


class View(NamedTuple):
    """A view of an image, and what the network says of it."""

    size: tuple[int, int]
    """(height, width) without padding."""
    raw: Raw
    flipped: bool

    def to_view(self, boxes: Tensor, frame: tuple[int, int]) -> Tensor:
        """Boxes (..., 4), end behind, of an image of size ``frame`` → this view's."""
        boxes = boxes * _factors(boxes, frame, self.size)
        return clip(_mirrored(boxes, self.size[1]) if self.flipped else boxes, *self.size)

    def from_view(self, boxes: Tensor, frame: tuple[int, int]) -> Tensor:
        """Inverse of :meth:`to_view`."""
        boxes = _mirrored(boxes, self.size[1]) if self.flipped else boxes
        return clip(boxes * _factors(boxes, self.size, frame), *frame)

    def score(self, padded: tuple[int, int], frame: tuple[int, int], stride: int) -> Tensor:
        """Semantic logits (S + T, h, w) at the cells of an image of size ``frame``, padded.

        Bilinear; cells in the padding repeat the border.
        """
        own = self.raw.semantic.score.float()
        grid = []
        for axis, flip in ((1, self.flipped), (0, False)):
            cells = torch.arange(padded[axis] // stride, device=own.device, dtype=torch.float32)
            # Centres of the cells, as a share of the image's side.
            share = (cells + 0.5) * stride / frame[axis]
            share = 1 - share if flip else share
            grid.append(2 * share * self.size[axis] / (own.shape[axis - 2] * stride) - 1)
        x, y = torch.meshgrid(grid[0], grid[1], indexing="xy")
        points = torch.stack([x, y], dim=-1)[None]
        return F.grid_sample(own, points, padding_mode="border", align_corners=False)[0]


class TestTimeAugmentation:
    """Predicts on an image's views.

    Args:
        min_sizes: short sides in pixels; empty: the image's own.
        max_size: longest side in pixels.
        flip: each scale also mirrored.
    """

    __test__ = False  # no test, whatever pytest thinks of the name

    def __init__(self, *, min_sizes: Sequence[int], max_size: int, flip: bool) -> None:
        if any(size < 1 for size in (*min_sizes, max_size)):
            raise ValueError(
                "MODEL.UPSNET.TEST.AUG.MIN_SIZES and MAX_SIZE are positive numbers of pixels, not "
                f"{list(min_sizes)} and {max_size}."
            )
        self.min_sizes = list(min_sizes)
        self.max_size = max_size
        self.flip = flip

    def __call__(
        self, model: UPSNet, image: Tensor, padded: tuple[int, int]
    ) -> tuple[Tensor, Detections, Detections]:
        """Predict.

        Args:
            model: in evaluation mode.
            image: (3, H, W) in 0..255.
            padded: size of the padded network input of the image as it came.

        Returns:
            semantic score (S + T, h, w) of the padded image, detections, candidates.
        """
        frame = (image.shape[-2], image.shape[-1])
        views = self.views(model, image)
        stride = model.sem_seg_head.stride
        score = torch.stack([view.score(padded, frame, stride) for view in views]).mean(dim=0)
        boxes, probabilities = [], []
        for view in views:
            decoded, own = model.regions(view.raw, [view.size])[0]
            boxes.append(view.from_view(decoded, frame))
            probabilities.append(own)
        found, entering = model.choose(torch.cat(boxes), torch.cat(probabilities))
        return (
            score,
            Detections(found, _masks(model, views, found, frame)),
            Detections(entering, _masks(model, views, entering, frame)),
        )

    def views(self, model: UPSNet, image: Tensor) -> list[View]:
        """The K views."""
        image = image.to(model.device).float()
        height, width = image.shape[-2:]
        views = []
        for short in self.min_sizes or [min(height, width)]:
            factor = min(short / min(height, width), self.max_size / max(height, width))
            size = (max(round(height * factor), 1), max(round(width * factor), 1))
            scaled = image
            if size != (height, width):
                scaled = F.interpolate(
                    image[None], size, mode="bilinear", align_corners=False, antialias=True
                )[0]
            for flipped in (False, True) if self.flip else (False,):
                own = scaled.flip(-1) if flipped else scaled
                raw = model.predict(model.preprocess([{"image": own}]))
                views.append(View(size, raw, flipped))
        return views


def _masks(
    model: UPSNet, views: Sequence[View], chosen: Candidates, frame: tuple[int, int]
) -> Tensor:
    """(n, M, M) mask logits of boxes in the image's frame, mean over the views."""
    logits = []
    for view in views:
        own = Candidates(view.to_view(chosen.boxes, frame), chosen.classes, chosen.scores)
        masks = model.masks(view.raw, [own])[0]
        logits.append(masks.flip(-1) if view.flipped else masks)
    return torch.stack(logits).mean(dim=0)


def _factors(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    return boxes.new_tensor([after[1] / before[1], after[0] / before[0]] * 2)


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)
