"""Images of any sizes, on canvases, at several scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.canvas import Canvas, centered
from d2ext.modeling.multi_scale import MultiScaleMetaArch


class Toy(MultiScaleMetaArch):
    """Says how bright an image is, at each scale; sides of canvases are multiples of 8."""

    def __init__(self, scales: tuple[float, ...], flip: bool = False) -> None:
        super().__init__(
            scales=scales, flip=flip, pixel_mean=[0.0, 0.0, 0.0], pixel_std=[1.0, 1.0, 1.0]
        )
        self.set_network(nn.Identity(), lambda x: (x.amax(dim=(1, 2, 3)),))
        self.batches: list[tuple[int, ...]] = []

    def canvas(self, size: tuple[int, int], scale: float) -> Canvas:
        height, width = (int(side * scale) for side in size)
        return centered((height, width), (-(-height // 8) * 8, -(-width // 8) * 8), scale)

    def draw(self, images: Tensor, canvas: Canvas) -> Tensor:
        return canvas.draw(F.interpolate(images.float(), canvas.content))

    def preprocess(
        self, batched_inputs: list[dict[str, Any]], scale: float | None = None
    ) -> Tensor:
        images = super().preprocess(batched_inputs, scale)
        self.batches.append(tuple(images.shape))
        return images

    def detections(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]], scale: float
    ) -> list[Any]:
        return [(scale, int(x)) for x in predictions[0][: len(batched_inputs)]]

    def result(self, inputs: dict[str, Any], passes: list[Any]) -> dict[str, Any]:
        return {"passes": passes}

    def shown_maps(self, inputs: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        maps = torch.zeros(2, 4, 4)
        maps[0, 1, 2], maps[1, 3, 3] = 0.5, 0.25
        stretched = torch.tensor([[2, 0, 0], [0, 3, 0]], dtype=torch.float64)
        return [("centers", maps, stretched), ("centers", maps.flip(-1), stretched)]


INPUTS = [
    {"image": torch.full((3, *size), 10 * (i + 1), dtype=torch.uint8)}
    for i, size in enumerate([(5, 6), (9, 3), (7, 8)])
]


def test_images_that_share_a_canvas_go_through_together() -> None:
    model = Toy((1.0, 2.0)).eval()
    results = model(INPUTS)
    assert [x["passes"] for x in results] == [[(1.0, v), (2.0, v)] for v in (10, 20, 30)]
    assert model.batches == [
        (2, 3, 8, 8),
        (1, 3, 16, 8),
        (2, 3, 16, 16),
        (1, 3, 24, 8),
    ]


def test_one_pass_and_mirror_images() -> None:
    model = Toy((2.0, 1.0), flip=True).eval()
    image = torch.zeros(3, 4, 4)
    image[:, :, 0] = 7
    inputs = [{"image": image}, {"image": image + 1}]
    images = model.preprocess(inputs)
    assert images.shape == (4, 3, 8, 8)  # at the first scale
    assert torch.equal(images[2:], images[:2].flip(-1))
    results = model.postprocess(model.inference_network(images), inputs)
    assert [x["passes"] for x in results] == [[(2.0, 7)], [(2.0, 8)]]


def test_heat_maps_are_the_largest_of_one_name() -> None:
    (shown,) = Toy((1.0,)).heatmaps([{"image": torch.zeros(3, 12, 8), "height": 24, "width": 8}])
    heat = shown["centers"]
    assert heat.shape == (24, 8)
    # Cells of 2 x 6 pixels of the output; the mirrored map's peak is in column 1.
    assert heat.max().item() == pytest.approx(0.5 * 3 / 4 * 11 / 12, abs=1e-3)  # bilinear
    assert heat[8:10, 4:6].min() > 0.2 and heat[8:10, 2:4].min() > 0.2


@pytest.mark.parametrize("scales", [(), (1.0, 0.0)])
def test_scales_are_positive(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="SCALES"):
        Toy(scales)
