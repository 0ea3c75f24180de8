"""``OpticalFlow``: training of the small network, its loss, its outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2ext import get_cfg
from d2ext.checkpoint.flow import load_flow_weights
from d2ext.config import ConfigError
from d2ext.modeling.flow import PyramidFlow, build_flow
from d2ext.modeling.flow.colors import flow_colors
from tests.modeling.flow.test_estimators import shifted_pair


def config(name: str = "PyramidFlow", **inference: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "OpticalFlow"
    cfg.MODEL.FLOW.NAME = name
    cfg.INPUT.FORMAT = "RGB"
    return cfg


def sample(current: Tensor, reference: Tensor, x: float, y: float) -> dict[str, Any]:
    height, width = current.shape[-2:]
    flow = torch.tensor([x, y])[:, None, None].repeat(1, height, width)
    valid = torch.ones(height, width, dtype=torch.bool)
    pair = {"image": current[0], "reference": {"image": reference[0]}}
    return {**pair, "flow": flow, "flow_valid": valid}


def test_it_learns_a_shift() -> None:
    """In both directions, so that it must look at the images."""
    torch.manual_seed(0)
    model = build_model(config()).train()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    a, b = shifted_pair()
    inputs = [sample(a, b, -4, 3), sample(b, a, 4, -3)]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = model(inputs)["loss_flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.3 * losses[0], losses
    for output, x in zip(model.eval()(inputs), inputs, strict=True):
        assert (output["flow"] - x["flow"]).norm(dim=0).mean() < 2.5  # of 5


def test_the_loss_counts_known_pixels_only() -> None:
    model = build_model(config()).train()
    a, b = shifted_pair()
    known = sample(a, b, -4, 3)
    partly = copy.deepcopy(known)
    partly["flow_valid"][:, 50:] = False
    partly["flow"][:, :, 50:] = 1000.0
    predictions = [torch.zeros(1, 2, 24, 24), torch.zeros(1, 2, 96, 96)]
    for x in (known, partly):
        images, targets = model.training_batch([x])
        assert images.shape[-2:] == (96, 96)
        # 5 pixels off on both levels, of which the coarse one counts half; half a pixel for the border,
        # where a cell has known and unknown pixels.
        assert model.losses(predictions, targets)["loss_flow"].item() == pytest.approx(
            7.5, abs=1e-4
        )
    x["flow_valid"][:] = False
    _, targets = model.training_batch([x])
    assert model.losses(predictions, targets)["loss_flow"] == 0


def test_outputs_are_in_pixels_of_the_output() -> None:
    model = build_model(config("Exact")).eval()
    a, b = shifted_pair()
    x = {**sample(a, b, -4, 3), "height": 140, "width": 270}
    (output,) = model([x])
    assert output["flow"].shape == (2, 140, 270)
    torch.testing.assert_close(output["flow"].mean(dim=(1, 2)), torch.tensor([-12.0, 6.0]))


def test_bgr_is_turned() -> None:
    cfg = config()
    torch.manual_seed(0)
    rgb = build_model(cfg).eval()
    rgb.flow.predict.weight.data.normal_()
    cfg.INPUT.FORMAT = "BGR"
    bgr = build_model(cfg).eval()
    bgr.load_state_dict(rgb.state_dict())
    a, b = shifted_pair()
    expected = rgb([sample(a, b, 0, 0)])[0]["flow"]
    assert expected.abs().max() > 0.1
    assert torch.equal(bgr([sample(a.flip(1), b.flip(1), 0, 0)])[0]["flow"], expected)


def test_missing_inputs_and_untrained_estimators_are_explained() -> None:
    a, b = shifted_pair()
    with pytest.raises(ConfigError, match="needs `reference`"):
        build_model(config()).eval()([{"image": a[0]}])
    with pytest.raises(ConfigError, match="needs `flow`"):
        build_model(config()).train()([{"image": a[0], "reference": {"image": b[0]}}])
    with pytest.raises(ConfigError, match="not trained"):
        build_model(config("FlowNet2S")).train()([sample(a, b, 0, 0)])
    cfg = config()
    cfg.MODEL.FLOW.WEIGHTS = "flow.pth"
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS"):
        build_model(cfg)


def test_its_weights_serve_other_models(tmp_path: Any) -> None:
    model = build_model(config())
    torch.save({"model": model.state_dict(), "iteration": 3}, tmp_path / "model.pth")
    estimator = build_flow(config())
    load_flow_weights(estimator, str(tmp_path / "model.pth"))
    expected = model.flow.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in estimator.state_dict().items())
    assert not any(p.requires_grad for p in estimator.parameters())


def test_training_is_drawn() -> None:
    cfg = config()
    cfg.VIS_PERIOD = 1
    a, b = shifted_pair()
    with EventStorage() as storage:
        build_model(cfg).train()([sample(a, b, -4, 3)])
        ((_, picture, _),) = storage._vis_data
    assert picture.shape == (3, 96, 192)
    assert picture[:, :, 96:].min() == 1  # at first nothing moves


def test_colors() -> None:
    flow = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.5, 0.0]]).T[:, None]
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.5, 0.5]])
    torch.testing.assert_close(flow_colors(flow)[:, 0].T, expected, atol=1e-5, rtol=0)


def test_low_precision() -> None:
    """Runs in it, and differs by little: coordinates stay in float32."""
    torch.manual_seed(0)
    estimator = PyramidFlow().eval()
    estimator.predict.weight.data.normal_(std=0.3)
    a, b = shifted_pair()
    expected = estimator(a, b)
    low = copy.deepcopy(estimator).to(torch.bfloat16, memory_format=torch.channels_last)(a, b)
    assert low.dtype == torch.float32
    assert (low - expected).norm() < 0.1 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["PyramidFlow", "FlowNet2"])
def test_graphs_give_what_eager_inference_gives(cuda: torch.device, name: str) -> None:
    torch.manual_seed(0)
    cfg = config(name)
    cfg.MODEL.DEVICE = "cuda"
    cfg.MODEL.INFERENCE.DTYPE = "bfloat16"
    cfg.MODEL.INFERENCE.CHANNELS_LAST = True
    eager = build_model(cfg).eval()
    cfg.MODEL.INFERENCE.MODE = "cudagraph"
    graph = build_model(cfg).eval()
    graph.load_state_dict(eager.state_dict())
    a, b = shifted_pair()
    for x in (sample(a, b, 0, 0), sample(b, a, 0, 0)):
        expected = eager([x])[0]["flow"]
        torch.testing.assert_close(graph([x])[0]["flow"], expected, atol=1e-2, rtol=1e-2)


def test_export() -> None:
    """Operators and shapes do not depend on values."""
    torch.manual_seed(0)
    estimator = build_flow(config("FlowNet2C"))
    images = torch.rand(2, 1, 3, 64, 64).mul(255).unbind()
    program = torch.export.export(estimator, images)
    torch.testing.assert_close(program.module()(*images), estimator(*images))


def test_each_level_warps_by_the_flow_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that always says (1, -1): 1 cell, then 2·1 + 1, then 2·3 + 1, then 2·7 + 1."""
    estimator = PyramidFlow().eval()
    estimator.predict.bias.data = torch.tensor([1.0, -1.0])
    warped: list[Tensor] = []

    def warp(features: Tensor, flow: Tensor) -> Tensor:
        warped.append(flow)
        return features

    monkeypatch.setattr("d2ext.modeling.flow.pyramid_flow.warp", warp)
    images = torch.zeros(1, 3, 64, 96)
    flows = estimator.flows(images, images)
    for flow, cells in zip(warped, (2, 6, 14), strict=True):
        assert (flow[:, 0] == cells).all() and (flow[:, 1] == -cells).all()
    for flow, pixels in zip(flows, (32, 48, 56, 60, 60), strict=True):
        torch.testing.assert_close(flow[:, 0], torch.full_like(flow[:, 0], pixels))
    assert flows[-1].shape == (1, 2, 64, 96)
