"""Variants of DensePose R-CNN, small: persons without points, nobody at all; the published configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2ext.codecs.densepose import charts_in_boxes
from d2ext.data.densepose import DensePoseAnnotations
from d2ext.testing import random_inputs, tiny_config

LOSSES = {"": ("U", "V", "I", "S"), "iid_iso": ("UV", "I", "S"), "indep_aniso": ("UV", "I", "S")}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "legacy": {"DECODER_ON": False, "NUM_COARSE_SEGM_CHANNELS": 15},
    "deeplab": {"NAME": "DensePoseDeepLabHead", "CONV_HEAD_DIM": 32},
    "of the image": {
        "NAME": "DensePoseUNetHead",
        "IN_FEATURES": ["image"],
        "DECODER_ON": False,
        "CONV_HEAD_DIM": 16,
        "NUM_STACKED_CONVS": 3,
        "POOLER_RESOLUTION": 32,
        "NUM_COARSE_SEGM_CHANNELS": 15,
        "PART_MASK_WEIGHTS": 1.0,
    },
    "isotropic": {"UV_CONFIDENCE.ENABLED": True},
    "anisotropic": {
        "UV_CONFIDENCE.ENABLED": True,
        "UV_CONFIDENCE.TYPE": "indep_aniso",
        "SEGM_CONFIDENCE.ENABLED": True,
        "COARSE_SEGM_TRAINED_BY_MASKS": True,
    },
}


def _config(variant: str) -> CfgNode:
    cfg = tiny_config("DensePose")
    for key, value in VARIANTS[variant].items():
        cfg.merge_from_list([f"MODEL.ROI_DENSEPOSE_HEAD.{key}", value])
    if "IN_FEATURES" in VARIANTS[variant]:
        cfg.MODEL.BACKBONE.NAME = "UNetBackbone"
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["unet"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = cfg.MODEL.ANCHOR_GENERATOR.SIZES[:1]
    return cfg


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_model(_config(request.param))


def _losses(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The branch's losses; gradients of the sum of all are there and finite."""
    model.train()
    model.zero_grad()
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    return {k: v.detach() for k, v in losses.items() if k.startswith("loss_densepose")}


def _gradient(model: nn.Module) -> float:
    head = model.roi_heads.densepose_head
    return sum(float(p.grad.abs().sum()) for p in head.parameters() if p.grad is not None)


def test_trains_with_and_without_points(model: nn.Module) -> None:
    inputs = random_inputs()
    losses = _losses(model, inputs)
    kind = model.roi_heads.densepose_criterion.uv_confidence
    assert losses.keys() == {f"loss_densepose_{name}" for name in LOSSES[kind]}
    assert all(value != 0 for value in losses.values()) and _gradient(model) > 0

    for x in inputs:  # persons without points, with instance masks
        persons = x["instances"]
        persons.gt_densepose = DensePoseAnnotations([None] * len(persons))
    losses = _losses(model, inputs)
    assert all(value == 0 for value in losses.values()) and _gradient(model) == 0

    inputs[0]["instances"].remove("gt_densepose")  # of a dataset without any
    inputs[1]["instances"] = inputs[1]["instances"][:0]
    losses = _losses(model, inputs)
    assert all(value == 0 for value in losses.values())


@pytest.mark.parametrize("append", [True, False])
def test_the_branch_knows_annotated_boxes(append: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether box head and RPN do or not; with all that is annotated, and once."""
    cfg = _config("plain")
    cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = append
    model = build_model(cfg)
    heads, inputs, seen = model.roi_heads, random_inputs(), []
    inputs[1]["instances"] = inputs[1]["instances"][:0]
    boxes = []
    monkeypatch.setattr(heads, "densepose_losses", lambda features, x: seen.extend(x) or {})
    monkeypatch.setattr(heads, "_forward_box", lambda features, x: boxes.extend(x) or {})
    with EventStorage():
        model.train()(inputs)
    persons = inputs[0]["instances"].gt_boxes.tensor

    def same(proposals: Instances) -> Tensor:
        return (proposals.proposal_boxes.tensor[:, None] == persons).all(dim=2)

    assert same(seen[0]).sum(dim=0).tolist() == [1] * len(persons)
    assert same(boxes[0]).any() == append
    place = same(seen[0]).nonzero()
    assert torch.equal(seen[0].gt_boxes.tensor[place[:, 0]], persons[place[:, 1]])
    assert (
        len(seen[0].gt_densepose) == len(seen[0]) == len(boxes[0]) + (0 if append else len(persons))
    )
    assert len(seen[1]) == len(boxes[1])


@torch.no_grad()
def test_finds_nobody(model: nn.Module) -> None:
    model.eval()
    model.roi_heads.box_predictor.test_score_thresh = 1.1
    for result in model(random_inputs()):
        found = result["instances"]
        assert len(found) == len(found.pred_densepose) == 0
        assert charts_in_boxes(found.pred_densepose, found.pred_boxes.tensor) == []


@torch.no_grad()
def test_each_image_gets_its_own_persons() -> None:
    torch.manual_seed(0)
    model, inputs = build_model(_config("plain")).eval(), random_inputs(2)
    together = [x["instances"].pred_densepose for x in model(inputs)]
    for x, expected in zip(inputs, together, strict=True):
        alone = model([x])[0]["instances"].pred_densepose
        torch.testing.assert_close(alone.u, expected.u, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0].u, together[1].u, atol=1e-2)


@torch.no_grad()
def test_branch_sees_the_image_itself() -> None:
    """The box's pixels and nothing else, not the features that boxes come from."""
    torch.manual_seed(0)
    heads = build_model(_config("of the image")).roi_heads.eval()
    image, boxes = torch.rand(1, 3, 64, 64), [Boxes(torch.tensor([[8.0, 8, 40, 40]]))]
    expected = heads.predict({"image": image}, boxes).u
    assert expected.shape == (1, 25, 32, 32)
    outside = image.clone()
    outside[:, :, 44:] = outside[:, :, :, 44:] = 0
    assert torch.equal(heads.predict({"image": outside}, boxes).u, expected)
    assert not torch.equal(heads.predict({"image": image.flip(3)}, boxes).u, expected)


def test_masks_that_lack_are_named() -> None:
    model, inputs = build_model(_config("anisotropic")), random_inputs()
    for x in inputs:
        x["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="gt_masks"):
        _losses(model, inputs)


def test_published_names_of_parameters() -> None:
    """Of what no fixture covers: the DeepLab head, and the model without decoder (NOTES.md)."""
    torch.manual_seed(0)
    heads = build_model(_config("deeplab")).roi_heads
    shapes = {name: tuple(x.shape) for name, x in heads.densepose_head.state_dict().items()}
    norms = {"weight": (256,), "bias": (256,)}
    expected = {f"ASPP.convs.{i}.1.{k}": v for i in range(4) for k, v in norms.items()}
    expected |= {f"ASPP.convs.4.2.{k}": v for k, v in norms.items()}
    expected |= {f"ASPP.convs.{i}.0.weight": (256, 16, 3, 3) for i in range(1, 4)}
    expected |= {f"ASPP.convs.{i}.weight": (256, 16, 1, 1) for i in ("0.0", "4.1")}
    expected |= {"ASPP.project.0.weight": (256, 1280, 1, 1)}
    expected |= {"body_conv_fcn1.weight": (32, 256, 3, 3)}
    expected |= {f"body_conv_fcn1.norm.{k}": (32,) for k in norms}
    assert shapes == expected
    assert [c[0].dilation for c in heads.densepose_head.ASPP.convs[1:4]] == [
        (6, 6),
        (12, 12),
        (56, 56),
    ]
    names = build_model(_config("legacy")).roi_heads.state_dict()
    assert not any(name.startswith("decoder") for name in names)
    assert names["densepose_predictor.ann_index_lowres.weight"].shape == (16, 15, 4, 4)
