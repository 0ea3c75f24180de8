"""On a GPU the host waits for the device as often as results need, however many images there are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch.utils._pytree import tree_map_only

from d2ext.layers import has_cuda_extension
from d2ext.modeling.meta_arch import MetaArch
from d2ext.systems.cornernet import model as cornernet_model
from d2ext.testing import random_inputs
from tests.export.models import lively_model
from tests.systems.corner_cases import assert_detections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_cuda_extension(), reason="d2ext_C is not compiled for CUDA"),
]

# Of this model's 20 best corners no two make a pair.
OPTIONS = {"CornerNet": ["MODEL.CORNERNET.TEST.TOP_K", 100]}


def graph_model(architecture: str, device: torch.device) -> MetaArch:
    torch.backends.cudnn.allow_tf32 = False
    cfg, plain = lively_model(architecture, OPTIONS.get(architecture, ()))
    cfg.MODEL.INFERENCE.MODE, cfg.MODEL.DEVICE = "cudagraph", str(device)
    model = build_model(cfg).eval()
    model.load_state_dict(plain.state_dict())
    return model


def waits(model: MetaArch, inputs: list[dict[str, Any]]) -> int:
    """How often the host waits in a call, after the graph has been captured."""
    model(inputs)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(x.message) for x in seen)


def test_waits_are_counted(cuda: torch.device) -> None:
    model = torch.nn.Identity()
    model.forward = lambda x: x[0].item() + x[1].item()
    assert waits(model, torch.ones(2, device=cuda)) == 2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("YOLACT", 1),
        ("CornerNet", 1),
        ("CenterNetTriplets", 1),
        ("CenterNet", 0),
        ("RetinaFace", 2),  # images of another size are another batch
    ],
)
def test_host_waits(cuda: torch.device, architecture: str, expected: int, count: int) -> None:
    model = graph_model(architecture, cuda)
    # With their mirror images, canvases of one size.
    inputs = [*random_inputs(count, height=60, width=80), *random_inputs(1, height=57, width=80)]
    assert waits(model, inputs) == expected


def rows(instances: Instances) -> np.ndarray:
    """Class, box, score."""
    columns = (
        instances.pred_classes[:, None],
        instances.pred_boxes.tensor,
        instances.scores[:, None],
    )
    return torch.cat([x.float() for x in columns], dim=1).cpu().numpy()


def assert_same(instances: Instances, expected: Instances) -> None:
    for name, value in expected.get_fields().items():
        own = instances.get(name)
        assert torch.equal(getattr(own, "tensor", own), getattr(value, "tensor", value))


def test_a_batch_of_retinaface_is_finished_as_its_images(cuda: torch.device) -> None:
    model = graph_model("RetinaFace", cuda)
    inputs = random_inputs(4, height=60, width=80)
    inputs[1]["height"], inputs[1]["width"] = 90, 70
    with torch.no_grad():
        predictions = model.inference_network(model.preprocess(inputs))
    predictions.scores[2, 3:], predictions.scores[3] = 0.0, 0.0
    results = model.postprocess(predictions, inputs)
    counts = [len(x["instances"]) for x in results]
    assert counts[0] > 3 >= counts[2] > counts[3] == 0
    for i, result in enumerate(results):
        one = tree_map_only(torch.Tensor, lambda x, i=i: x[i : i + 1], predictions)
        (alone,) = model.postprocess(one, inputs[i : i + 1])
        assert_same(result["instances"], alone["instances"])


def test_a_batch_of_yolact_is_finished_as_its_images(cuda: torch.device) -> None:
    model = graph_model("YOLACT", cuda)
    inputs = [*random_inputs(3, height=60, width=80), *random_inputs(2, height=57, width=80)]
    with torch.no_grad():
        predictions = model.inference_network(model.preprocess(inputs))
    predictions[1][1, 4:], predictions[1][2] = -1, -1
    results = model.postprocess(predictions, inputs)
    assert [len(x["instances"]) for x in results[1:3]] == [4, 0] and len(
        results[0]["instances"]
    ) > 4
    for i, result in enumerate(results):
        (alone,) = model.postprocess(tuple(x[i : i + 1] for x in predictions), inputs[i : i + 1])
        assert_same(result["instances"], alone["instances"])


@pytest.mark.parametrize("architecture", ["CornerNet", "CenterNetTriplets"])
def test_corners_on_the_device_are_those_on_the_host(
    cuda: torch.device, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graph_model(architecture, cuda)
    inputs = [*random_inputs(2, height=60, width=80), *random_inputs(1, height=57, width=80)]
    with torch.no_grad():
        predictions = model.inference_network(model.preprocess(inputs))
    on_device = model.postprocess(copy.copy(predictions), inputs)
    monkeypatch.setattr(cornernet_model, "in_slots", lambda *_: False)
    on_host = model.postprocess(predictions, inputs)
    for a, b in zip(on_device, on_host, strict=True):
        assert a["instances"].pred_boxes.tensor.is_cuda and len(b["instances"]) > 0
        assert_detections(rows(a["instances"]), rows(b["instances"]))
