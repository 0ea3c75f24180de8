"""Converted stacked hourglasses of widths and depths that the fixtures do not have.

The reference is a plain reading of the published network over a state dict of published names.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.checkpoint import ConversionError, convert_state_dict
from d2ext.modeling.newell_hourglass import NewellHourglass

State = dict[str, Tensor]


class Published:
    """Draws the parameters when they are first used, and predicts with them."""

    def __init__(self, stacks: int, width: int, maps: int, increase: int, prefix: str) -> None:
        self.stacks, self.width, self.maps, self.increase = stacks, width, maps, increase
        self.prefix, self.state = prefix, State()
        self.generator = torch.Generator().manual_seed(0)

    def draw(
        self, name: str, shape: tuple[int, ...], low: float = -0.3, high: float = 0.3
    ) -> Tensor:
        name = self.prefix + name
        if name not in self.state:
            values = torch.rand(shape, generator=self.generator) * (high - low) + low
            self.state[name] = values
        return self.state[name]

    def conv(self, x: Tensor, name: str, width: int, size: int = 1, stride: int = 1) -> Tensor:
        limit = (3 / (x.shape[1] * size**2)) ** 0.5
        weight = self.draw(f"{name}.weight", (width, x.shape[1], size, size), -limit, limit)
        bias = self.draw(f"{name}.bias", (width,))
        return F.conv2d(x, weight, bias, stride, (size - 1) // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        width = (x.shape[1],)
        mean = self.draw(f"{name}.running_mean", width)
        var = self.draw(f"{name}.running_var", width, 0.5, 2)
        weight, bias = self.draw(f"{name}.weight", width, 0.5, 2), self.draw(f"{name}.bias", width)
        self.state[f"{self.prefix}{name}.num_batches_tracked"] = torch.tensor(7)
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    def residual(self, x: Tensor, name: str, width: int) -> Tensor:
        y = self.conv(self.norm(x, f"{name}.bn1"), f"{name}.conv1.conv", width // 2)
        y = self.conv(self.norm(y, f"{name}.bn2"), f"{name}.conv2.conv", width // 2, 3)
        y = self.conv(self.norm(y, f"{name}.bn3"), f"{name}.conv3.conv", width)
        skip = self.conv(x, f"{name}.skip_layer.conv", width)  # there, used or not
        return y + (x if x.shape[1] == width else skip)

    def hourglass(self, x: Tensor, name: str, levels: int, increase: int) -> Tensor:
        width = x.shape[1]
        up = self.residual(x, f"{name}.up1", width)
        low = self.residual(F.max_pool2d(x, 2), f"{name}.low1", width + increase)
        if levels > 1:
            low = self.hourglass(
                low, f"{name}.low2", levels - 1, 0
            )  # the inner ones keep the width
        else:
            low = self.residual(low, f"{name}.low2", width + increase)
        low = self.residual(low, f"{name}.low3", width)
        return up + F.interpolate(low, scale_factor=2.0)

    def __call__(self, images: Tensor) -> list[Tensor]:
        x = self.norm(self.conv(images, "pre.0.conv", 64, 7, 2), "pre.0.bn")
        x = F.max_pool2d(self.residual(x, "pre.1", 128), 2)
        x = self.residual(self.residual(x, "pre.3", 128), "pre.4", self.width)
        maps = []
        for i in range(self.stacks):
            y = self.hourglass(x, f"hgs.{i}.0", 4, self.increase)
            y = self.residual(y, f"features.{i}.0", self.width)
            y = self.norm(self.conv(y, f"features.{i}.1.conv", self.width), f"features.{i}.1.bn")
            maps.append(self.conv(y, f"outs.{i}.conv", self.maps))
            if i < self.stacks - 1:
                x = x + self.conv(maps[-1], f"merge_preds.{i}.conv.conv", self.width)
                x = x + self.conv(y, f"merge_features.{i}.conv.conv", self.width)
        return maps


def ours(state: State) -> State:
    converted = convert_state_dict("landmarks", state)
    return {name.removeprefix("backbone."): value for name, value in converted.items()}


@pytest.mark.parametrize(
    ("stacks", "width", "maps", "increase", "prefix"),
    [
        (2, 64, 7, 0, "model.module."),
        (1, 128, 16, 0, "module."),  # the last block of the stem does not widen
        (1, 32, 16, 16, ""),
        (3, 32, 5, 0, "model."),
    ],
)
def test_maps_of_all_stacks(stacks: int, width: int, maps: int, increase: int, prefix: str) -> None:
    published = Published(stacks, width, maps, increase, prefix)
    images = torch.rand(1, 3, 64, 128, generator=published.generator)
    expected = published(images)
    net = NewellHourglass(
        num_stacks=stacks, num_maps=maps, channels=width, increase=increase
    ).eval()
    net.load_state_dict(ours(published.state), strict=True)
    with torch.no_grad():
        found = net(images)
    for i, value in enumerate(expected, start=1):
        error = (found[f"maps{i}"] - value).abs().max() / value.abs().max()
        assert error < 1e-4, (i, error)


def test_a_checkpoint_with_holes_is_named_not_a_traceback() -> None:
    published = Published(1, 32, 3, 0, "")
    published(torch.rand(1, 3, 64, 64))
    whole = ours(published.state)
    # of an unused layer nothing is missed
    part = dict(published.state)
    del part["hgs.0.0.up1.skip_layer.conv.bias"]
    assert set(ours(part)) == set(whole)
    with pytest.raises(ConversionError, match="another system"):
        ours({"hgs.0.0.up1.conv2.conv.weight": torch.zeros(1)})
