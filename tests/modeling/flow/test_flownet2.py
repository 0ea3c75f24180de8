"""FlowNet2 against the published one, its sizes, and its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext import get_cfg
from d2ext.checkpoint import CheckpointError, convert_state_dict
from d2ext.checkpoint.convert import apply_rules
from d2ext.checkpoint.flow import flownet2_rules, load_flow_weights
from d2ext.config import ConfigError
from d2ext.modeling.flow import FlowNet2, FlowNet2C, FlowNet2S, FlowNet2SD, build_flow
from d2ext.modeling.flow.flownet2 import channel_norm
from tests.reference.fixture import Fixture, draw_image, draw_tensor

REFERENCE = Path(__file__).parents[2] / "reference/vpsnet"
SINGLE = {FlowNet2C: "flownetc", FlowNet2S: "flownets_1", FlowNet2SD: "flownets_d"}


def frames() -> list[Tensor]:
    """The fixture's, RGB (1, 3, 128, 256)."""
    image = torch.from_numpy(draw_image(128, 264, seed=0)[:, :, ::-1].copy()).permute(2, 0, 1)
    return [image[None, :, :, 4 * t : 4 * t + 256].float() for t in range(2)]


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture(REFERENCE / "fusetrack_3frames")


@pytest.fixture(scope="module")
def published(fixture: Fixture) -> dict[str, Tensor]:
    """FlowNet2's weights as NVIDIA's file has them."""
    prefix = "flownet2."
    parameters = [p for p in fixture.manifest["parameters"] if p[0].startswith(prefix)]
    fixture.manifest = {**fixture.manifest, "parameters": parameters}
    weights = fixture.state_dict().items()
    return {name.removeprefix(prefix): torch.from_numpy(value) for name, value in weights}


def test_equals_the_published_network(fixture: Fixture, published: dict[str, Tensor]) -> None:
    model = FlowNet2().eval()
    converted = convert_state_dict("flownet2", {"state_dict": published, "epoch": 1})
    model.load_state_dict({k.removeprefix("flow."): v for k, v in converted.items()})
    outputs: dict[str, Tensor] = {}
    for name in ("flownetc", "flownets_1", "flownets_2", "flownets_d"):
        network = getattr(model, name)
        network.register_forward_hook(lambda _, __, flow, name=name: outputs.update({name: flow}))
    reference, current = frames()
    flow = model(current, reference)
    for name, output in outputs.items():
        assert fixture.compare(f"frame1.flow.{name}", output) < 1e-5
    assert fixture.compare("frame1.flow.full", flow) < 1e-5
    # Any size: as padded with 0 by hand; images of a batch do not depend on each other.
    current, reference = current[..., :70, :90], reference[..., :70, :90]
    padded = [F.pad(x, (0, 38, 0, 58)) for x in (current, reference)]
    flow = model(torch.cat([current, 255 - current]), torch.cat([reference, 255 - reference]))
    torch.testing.assert_close(flow[:1], model(*padded)[..., :70, :90], atol=1e-4, rtol=1e-4)
    low = model.bfloat16()(current, reference)
    assert low.dtype == torch.float32
    assert (low - flow[:1]).norm() < 0.1 * flow[:1].norm()


def test_names_in_a_checkpoint_of_vpsnet(published: dict[str, Tensor]) -> None:
    weights = {f"flownet2.{name}": value for name, value in published.items()}
    converted = apply_rules(weights, flownet2_rules(r"flownet2\."))
    assert converted.keys() == convert_state_dict("flownet2", published).keys()


@pytest.mark.parametrize("estimator_class", SINGLE)
def test_single_networks(
    estimator_class: type, fixture: Fixture, published: dict[str, Tensor], tmp_path: Path
) -> None:
    prefix = SINGLE[estimator_class] + "."
    weights = {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)}
    if estimator_class is FlowNet2S:
        weights["conv1.0.weight"] = weights["conv1.0.weight"][:, :6].clone()
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    cfg = get_cfg()
    cfg.MODEL.FLOW.NAME = estimator_class.__name__
    estimator = build_flow(cfg)
    load_flow_weights(estimator, str(tmp_path / "weights.pth"))
    outputs: list[Tensor] = []
    estimator.network.register_forward_hook(lambda _, __, output: outputs.append(output))
    reference, current = frames()
    estimator(current, reference)
    if estimator_class is not FlowNet2S:  # which saw more in FlowNet2
        assert fixture.compare(f"frame1.flow.{prefix[:-1]}", outputs.pop()) < 1e-5
    flow = estimator(current[..., :65, :100], reference[..., :65, :100])
    enlarged = F.interpolate(20 * outputs[-1], scale_factor=4, mode="bilinear")
    assert torch.equal(flow, enlarged[..., :65, :100])


def test_channel_norm() -> None:
    a = torch.from_numpy(draw_tensor("a", (1, 16, 20, 28)))
    assert Fixture(REFERENCE / "operators").compare("channel_norm", channel_norm(a)) < 1e-6


def test_it_is_frozen() -> None:
    cfg = get_cfg()
    cfg.MODEL.FLOW.NAME = "FlowNet2S"
    estimator = build_flow(cfg).train()
    assert not estimator.training and not any(p.requires_grad for p in estimator.parameters())
    current = torch.zeros(1, 3, 64, 64, requires_grad=True)
    assert not estimator(current, current).requires_grad


def test_wrong_names_and_files_are_explained(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.MODEL.FLOW.NAME = "FlowNet3"
    with pytest.raises(ConfigError, match=r"one of .*FlowNet2, "):
        build_flow(cfg)
    cfg.MODEL.FLOW.NAME = "FlowNet2S"
    estimator, path = build_flow(cfg), str(tmp_path / "weights.pth")
    torch.save({"layer1.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no network for optical flow"):
        load_flow_weights(estimator, path)
    torch.save({"flownetc.conv1.0.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(CheckpointError, match=r"another estimator than .* FlowNet2S"):
        load_flow_weights(estimator, path)
