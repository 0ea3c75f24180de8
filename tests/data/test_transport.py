"""Messages from a loader's workers."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.utils.data import DataLoader

from d2ext.data import transport
from d2ext.data.transport import Packed, pack, unpack


def sample() -> dict[str, object]:
    instances = Instances((8, 9))
    instances.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    instances.gt_classes = torch.tensor([3])
    return {
        "file_name": "a.jpg",
        "image": torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
        "instances": instances,
        "turned": torch.arange(6.0).view(2, 3).T,
        "half": torch.tensor([0.5], dtype=torch.float16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


def test_what_is_packed_comes_out() -> None:
    before = sample()
    packed = pack(before)
    assert packed.tensors == []  # all of it is in the message
    after = unpack(packed)
    assert list(after) == list(before) and after["file_name"] == "a.jpg"
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert after[name].dtype == value.dtype and after[name].shape == value.shape
            assert torch.equal(after[name], value)
    assert torch.equal(after["instances"].gt_boxes.tensor, before["instances"].gt_boxes.tensor)
    assert after["instances"].image_size == (8, 9)
    after["image"].add_(1)  # it is the receiver's own
    assert before["image"][0, 0, 0] == 0


def test_what_is_large_or_odd_stays_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_SMALL", 100)
    large = torch.zeros(26)
    odd = torch.ones(2, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(torch.ones(2))
    packed = pack([large, odd, weight, torch.ones(25)])
    assert [x is y for x, y in zip(packed.tensors, (large, odd, weight), strict=True)] == [True] * 3
    out = unpack(packed)
    assert out[0] is large and out[1] is odd and out[2] is weight
    assert torch.equal(out[3], torch.ones(25))


def test_a_worker_sends_one_message() -> None:
    loader = DataLoader([sample()] * 4, batch_size=2, num_workers=1, collate_fn=pack)
    messages = list(loader)
    assert all(isinstance(message, Packed) for message in messages) and len(messages) == 2
    assert torch.equal(unpack(messages[1])[1]["image"], sample()["image"])
