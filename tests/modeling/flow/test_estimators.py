"""Estimators of optical flow that are not FlowNet2: sizes, weights, and that they find motion."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.optical_flow import raft_small

from d2ext import get_cfg
from d2ext.checkpoint.flow import load_flow_weights
from d2ext.config import ConfigError
from d2ext.modeling.flow import DIS, FLOW_REGISTRY, Exact, RAFTSmall, build_flow
from tests.reference.fixture import draw_image


def build(name: str) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.MODEL.FLOW.NAME = name
    return build_flow(cfg)


def shifted_pair() -> tuple[Tensor, Tensor]:
    """The reference shows everything 4 columns to the left and 3 rows below."""
    image = torch.from_numpy(draw_image(80, 100)).permute(2, 0, 1)[None].float()
    return image[..., 3:73, 4:94], image[..., 0:70, 8:98]


@pytest.mark.parametrize(
    "name", [name for name, _ in FLOW_REGISTRY if not name.startswith("FlowNet2")]
)
@pytest.mark.parametrize("size", [(1, 1), (37, 51)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *size) * 255
    flow = build(name)(images, images, [{"flow": torch.zeros(2, *size)}])
    assert flow.shape == (1, 2, *size)
    assert flow.dtype == torch.float32
    assert flow.isfinite().all()


def test_dis_finds_a_shift() -> None:
    current, reference = shifted_pair()
    images = torch.cat([current, reference]), torch.cat([reference, current])
    there, back = DIS()(*images)[..., 15:-15, 15:-15].mean(dim=(2, 3))
    torch.testing.assert_close(there, torch.tensor([-4.0, 3.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(back, torch.tensor([4.0, -3.0]), atol=0.1, rtol=0)
    empty = torch.zeros(0, 3, 40, 50)
    assert DIS()(empty, empty).shape == (0, 2, 40, 50)


def test_exact_flow_is_scaled_with_the_image() -> None:
    flow = torch.zeros(2, 2, 3)
    flow[:, 1, 2] = torch.tensor([3.0, -2.0])
    flow[0, 0, 0] = torch.nan
    images = torch.zeros(1, 3, 4, 9)
    result = Exact()(images, images, [{"flow": flow}])[0]
    expected = torch.zeros(2, 4, 9)
    expected[:, 2:, 6:] = torch.tensor([9.0, -4.0])[:, None, None]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("inputs", [None, [{}]])
def test_exact_flow_says_what_it_needs(inputs: list[dict[str, Tensor]] | None) -> None:
    images = torch.zeros(1, 3, 4, 9)
    with pytest.raises(ConfigError, match=r"INPUT\.VIDEO\.FLOW to True"):
        Exact()(images, images, inputs)


def test_raft_is_torchvisions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = raft_small().eval()
    torch.save(published.state_dict(), tmp_path / "raft.pth")
    estimator = build("RAFTSmall")
    load_flow_weights(estimator, str(tmp_path / "raft.pth"))
    current, reference = shifted_pair()
    padded = [F.pad(x, (0, 38, 0, 58)) / 255 * 2 - 1 for x in (current, reference)]
    with torch.no_grad():
        expected = published(*padded)[-1][..., :70, :90]
    torch.testing.assert_close(estimator(current, reference), expected)


def test_raft_stays_in_float32() -> None:
    estimator = RAFTSmall().eval()
    before = copy.deepcopy(estimator.state_dict())
    estimator.to(torch.bfloat16, memory_format=torch.channels_last)
    after = estimator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
