"""Heads on regions in fixed slots: nothing waits for the device, results are as of variable shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import batched_nms, nms

from d2ext.layers import has_cuda_extension
from d2ext.modeling import region_slots
from d2ext.modeling.region_slots import TIES, select
from d2ext.systems.upsnet import roi_heads
from d2ext.systems.upsnet.boxes import PyramidRoIAlign
from d2ext.systems.vpsnet.roi_heads import VPSNetRoIAlign
from d2ext.testing import random_inputs, tiny_config
from tests.export.models import lively_model


class Copies(TorchDispatchMode):
    """Records copies of values to a GPU, for which the host waits and which a CUDA graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in args if isinstance(x, Tensor)]
        if (
            isinstance(result, Tensor)
            and result.is_cuda
            and any(x.device.type == "cpu" for x in inputs)
        ):
            self.seen += [func] if any(x.dim() for x in inputs) else []
        return result


def to_fake_gpu(model: nn.Module) -> None:
    """Parameters and buffers without values."""
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, x in group.items():
                fake = None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
                group[name] = nn.Parameter(fake, False) if isinstance(x, nn.Parameter) else fake
    rpn = model.proposal_generator
    rpn._cell_anchors = [torch.empty(x.shape, device="cuda") for x in rpn._cell_anchors]


@pytest.mark.parametrize("architecture", ["UPSNet", "VPSNet"])
def test_nothing_waits_for_the_device(architecture: str) -> None:
    """On a GPU of tensors without values, an operation that needs one raises an error."""
    model = build_model(tiny_config(architecture)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Copies() as copies:
        to_fake_gpu(model)
        assert not copies.seen
        torch.empty(2, device="cuda").new_tensor([1.0, 2.0])
        assert copies.seen, "what it is for"
        copies.seen.clear()
        images, sizes = torch.empty(2, 3, 96, 128, device="cuda"), torch.empty(2, 2, device="cuda")
        predictions = model.inference_network.decode(model.network(images, sizes))
    assert not copies.seen
    slots = min(model.candidates["limit"] + TIES, 30 * 3)
    assert predictions.candidates.boxes.shape == (2, slots, 4)
    assert predictions.candidates.mask_logits.shape == (2, slots, 28, 28)
    if architecture == "VPSNet":
        assert predictions.embeddings.shape == (2, slots, 16)


@pytest.mark.parametrize("pooler", [PyramidRoIAlign(7, [4, 8, 16]), VPSNetRoIAlign(7, [4, 8, 16])])
def test_pooling_from_all_levels_is_pooling_from_one(
    pooler: PyramidRoIAlign, monkeypatch: Any
) -> None:
    features = [torch.randn(2, 3, 64 >> i, 80 >> i) for i in range(3)]
    corners = torch.rand(2, 40, 2) * 200 - 20
    boxes = torch.cat([corners, corners + torch.rand(2, 40, 2) ** 3 * 600], dim=2)
    lists = [Boxes(x) for x in boxes]
    assert len(pooler.levels(boxes.flatten(0, 1)).unique()) == 3
    expected = pooler(features, lists)
    monkeypatch.setattr(region_slots, "needs_fixed_shapes", lambda _: True)
    assert torch.equal(pooler(features, lists), expected)


@pytest.mark.parametrize("architecture", ["UPSNet", "VPSNet"])
def test_results_of_fixed_shapes_are_those_of_variable_ones(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config(architecture)).eval()
    inputs = random_inputs(2)
    for i, x in enumerate(inputs):
        x.update(video_id=i, frame=0, is_first=True)
    expected = model(inputs)
    for module in (region_slots, roi_heads):
        monkeypatch.setattr(module, "needs_fixed_shapes", lambda _: True)
    for a, b in zip(model(inputs), expected, strict=True):
        assert len(b["instances"]) > 0
        for name, value in b["instances"].get_fields().items():
            own = a["instances"].get(name)
            torch.testing.assert_close(getattr(own, "tensor", own), getattr(value, "tensor", value))
        assert torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0])


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("threshold", "limit"), [(0.05, 20), (0.15, 1000), (0.5, 7), (0.95, 5)])
def test_select_is_torchvisions_nms(across: bool, threshold: float, limit: int) -> None:
    """Several classes of a region, and boxes of empty slots, among the candidates."""
    torch.manual_seed(0)
    corners = torch.rand(2, 60, 6, 2) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(2, 60, 6, 2) * 30], dim=-1)
    probabilities = (3 * torch.randn(2, 60, 7)).softmax(dim=2)[..., :6]
    probabilities[:, 50:] = -1.0
    options = {"score_threshold": threshold, "nms_threshold": 0.3, "limit": limit}
    slots = select(boxes, probabilities, across_classes=across, **options)
    for i in range(2):
        region, kind = (probabilities[i] > threshold).nonzero(as_tuple=True)
        found, scores = boxes[i, region, kind], probabilities[i, region, kind]
        keep = nms(found, scores, 0.3) if across else batched_nms(found, scores, kind, 0.3)
        keep = keep[:limit]
        own = slots.instances(i, int(slots.counts[i]), (100, 100))
        assert torch.equal(own.scores, scores[keep]) and torch.equal(own.pred_classes, kind[keep])
        assert torch.equal(own.pred_boxes.tensor, found[keep])
        assert (slots.scores[i, len(keep) :] == -1).all()


def categories(ids: torch.Tensor, segments: list[dict[str, Any]]) -> torch.Tensor:
    """The category of each pixel, stuff from 1000 on, void -1."""
    numbers = [-1] * (1 + max([0, *(x["id"] for x in segments)]))
    for x in segments:
        numbers[x["id"]] = x["category_id"] + 1000 * (not x["isthing"])
    return torch.tensor(numbers, device=ids.device)[ids.long()]


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda_extension(), reason="d2ext_C is not compiled for CUDA")
@pytest.mark.parametrize("architecture", ["UPSNet", "VPSNet"])
def test_graph_and_eager_on_the_gpu(cuda: torch.device, architecture: str) -> None:
    """The network does not wait for the device, and a graph of it gives the same for images of other
    sizes and the same padding."""
    torch.backends.cudnn.allow_tf32 = False
    cfg, plain = lively_model(architecture)
    cfg.MODEL.INFERENCE.MODE, cfg.MODEL.DEVICE = "cudagraph", str(cuda)
    models = [plain.to(cuda), build_model(cfg).eval()]
    models[1].load_state_dict(plain.state_dict())
    for height, width in ((60, 80), (50, 70), (60, 80)):
        inputs = random_inputs(2, height=height, width=width)
        for i, x in enumerate(inputs):
            x.update(video_id=i, frame=0, is_first=True)
        expected, actual = (model(inputs) for model in models)
        images, state = models[0].preprocess(inputs), models[0].network_state(inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                models[0].network.forward(images, *state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(actual, expected, strict=True):
            own, other = a["instances"], b["instances"]
            assert len(other) > 0 and torch.equal(own.pred_classes, other.pred_classes)
            torch.testing.assert_close(own.scores, other.scores, atol=1e-4, rtol=0)
            boxes = own.pred_boxes.tensor, other.pred_boxes.tensor
            torch.testing.assert_close(*boxes, atol=0.05, rtol=0)
            # By category: a segment of few pixels moves the ids of all that follow.
            maps = [categories(*x["panoptic_seg"]) for x in (a, b)]
            assert (maps[0] != maps[1]).float().mean() < 0.01
