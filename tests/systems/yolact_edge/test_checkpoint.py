"""Converters of the six published configurations; sizes as the published checkpoints have them."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from d2ext import model_zoo
from d2ext.checkpoint import ConversionError, convert_state_dict
from tests.reference.fixture import Fixture
from tests.systems.yolact_edge.test_reference import REFERENCE

# Config → entries of the published state dict (yolact_edge/NOTES.md §7), those that serve the flow, and
# those that are refined.
PUBLISHED = {
    "yolact_edge_R_50_550": (354, False, False),
    "yolact_edge_R_101_550": (660, False, False),
    "yolact_edge_ytvis_R_101_550": (660, False, False),
    "yolact_edge_vid_R_50_550": (391, True, True),
    "yolact_edge_vid_R_101_550": (697, True, True),
    "yolact_edge_vid_minimal_R_101_550": (693, True, False),
    "yolact_edge_mobilenetv2_550": (348, False, False),
}


def _published(name: str, flow: bool, refined: bool) -> dict[str, Tensor]:
    """Published names and shapes: those of a fixture, with more blocks in R-101."""
    case = "edge_mobilenetv2" if "mobilenet" in name else "edge_vid_resnet50"
    classes = 40 if "vid" in name or "ytvis" in name else 80
    state = {}
    for key, shape in Fixture(REFERENCE / case).manifest["parameters"]:
        if (key.startswith("flow_net") and not flow) or (key.startswith("spa") and not refined):
            continue
        shape = list(shape)
        for part, count in (("conf_layer", 3 * 81), ("semantic_seg_conv", 80)):
            if part in key and classes == 80:
                shape[0] = count
        state[key] = torch.zeros(shape)
        block = "backbone.layers.2.1."
        if "R_101" in name and key.startswith(block):
            for i in range(6, 23):
                state[key.replace(block, f"backbone.layers.2.{i}.")] = torch.zeros(shape)
    return state


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_every_published_configuration_converts(name: str) -> None:
    count, flow, refined = PUBLISHED[name]
    published = _published(name, flow, refined)
    assert len(published) == count
    cfg = model_zoo.get_config(f"yolact_edge/{name}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    converted = convert_state_dict("yolact_edge", published)
    build_model(cfg).load_state_dict(converted, strict=True)
    left_out = [k for k in published if k.startswith(("backbone.layers.7.", "backbone.layers.8."))]
    assert len(converted) == count - (len(left_out) if "mobilenet" in name else 0)


def test_what_is_no_such_checkpoint() -> None:
    with pytest.raises(ConversionError, match="another system"):
        convert_state_dict("yolact_edge", {"fc.weight": torch.zeros(1)})
    state = _published("yolact_edge_vid_R_50_550", True, True) | {"flow_net.conv9": torch.zeros(1)}
    with pytest.raises(ConversionError, match="conv9"):
        convert_state_dict("yolact_edge", state)
