"""The conversion engine and the converters' names."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone

from d2ext.checkpoint import (
    ConversionError,
    Rule,
    apply_rules,
    available_converters,
    convert_state_dict,
    unwrap,
)
from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.torchvision import torchvision_backbone
from d2ext.config import get_cfg
from d2ext.modeling import MobileNetV2

ONE = torch.ones(1)


def test_first_matching_rule_renames() -> None:
    rules = [Rule(r"a\.(\d)", r"x.\1"), Rule(r"a\..*", "never"), Rule("b", None)]
    assert apply_rules({"a.1": ONE, "b": ONE}, rules) == {"x.1": ONE}


def test_unknown_names_are_refused_by_name() -> None:
    with pytest.raises(ConversionError, match="surprise"):
        apply_rules({"surprise": ONE}, [Rule("a", "b")])


def test_two_names_must_not_become_one() -> None:
    with pytest.raises(ConversionError, match="become"):
        apply_rules({"a": ONE, "b": ONE}, [Rule("[ab]", "c")])


def test_unwrap_finds_the_state_dict() -> None:
    plain = {"a": ONE}
    for wrapped in (plain, {"state_dict": plain}, {"model": plain, "epoch": 3}, {"module.a": ONE}):
        assert unwrap(wrapped) == plain
    for wrong in ({}, [], 3, {"a": "text"}, {"model": {}}):
        with pytest.raises(ConversionError):
            unwrap(wrong)


def test_unknown_systems_and_strangers_are_refused() -> None:
    with pytest.raises(ConversionError, match="yolact"):
        convert_state_dict("nonesuch", {"a": ONE})
    with pytest.raises(ConversionError, match="another system"):
        convert_state_dict("yolact", {"a": ONE})
    strange = {"prediction_layers.0.bbox_layer.weight": ONE, "roi_heads.weight": ONE}
    with pytest.raises(ConversionError, match=r"roi_heads\.weight"):
        convert_state_dict("yolact", strange)
    assert {"yolact", "torchvision_resnet"} <= set(available_converters())


def test_leftovers_of_version_one_are_dropped() -> None:
    state = {
        "prediction_layers.0.bbox_layer.weight": ONE,
        "backbone.layer1.0.conv1.weight": ONE,
        "fpn.downsample_layers.2.weight": ONE,
        "fpn.downsample_layers.1.bias": ONE,
    }
    assert set(convert_state_dict("yolact", state)) == {
        "head.predictor.offsets.weight",
        "backbone.downsample7.bias",
    }


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_resnet_becomes_a_backbone(depth: int, tmp_path) -> None:
    torch.manual_seed(depth)
    source = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    backbone = build_backbone(cfg).eval()
    converted = convert_state_dict("torchvision_resnet", source.state_dict())
    path = tmp_path / "resnet.pth"
    torch.save({"model": converted, "matching_heuristics": True}, path)
    DetectionCheckpointer(backbone).load(str(path))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        y = source.maxpool(source.relu(source.bn1(source.conv1(x))))
        expected = source.layer4(source.layer3(source.layer2(source.layer1(y))))
        torch.testing.assert_close(backbone(x)["res5"], expected, rtol=1e-4, atol=1e-4)


def test_torchvision_mobilenet_becomes_a_backbone(tmp_path) -> None:
    """As MODEL.WEIGHTS: the checkpointer knows it by its names."""
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v2(weights=None).eval()
    path = tmp_path / "mobilenet_v2.pth"
    torch.save(source.state_dict(), path)
    assert torchvision_backbone(source.state_dict()) == "torchvision_mobilenetv2"
    # A whole CenterNet has a ResNet's names, and others.
    resnet = torchvision.models.resnet18(weights=None).state_dict()
    assert torchvision_backbone(resnet) == "torchvision_resnet"
    assert not torchvision_backbone({**resnet, "hm.0.weight": torch.zeros(1)})
    assert not torchvision_backbone(torchvision.models.mobilenet_v3_small().state_dict())
    backbone = MobileNetV2(out_features=["group3", "group6"]).eval()
    Checkpointer(backbone, fit="finetune").load(str(path))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        actual, expected = backbone(x), []
        for i, layer in enumerate(source.features):
            x = layer(x)
            if i in (6, 16):
                expected.append(x)
    for y, z in zip(actual.values(), expected, strict=True):
        torch.testing.assert_close(y, z)
