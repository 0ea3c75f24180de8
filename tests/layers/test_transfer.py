"""Values on their way to the model's device."""

from __future__ import annotations

import pytest
import torch

from d2ext.layers.transfer import upload, upload_alike


def check(target: torch.device) -> None:
    device = target.type
    values = torch.arange(12.0).view(3, 4).T
    sent = upload(values, target)
    assert sent.device.type == device and torch.equal(sent.cpu(), values)
    assert torch.equal(upload(sent, target), sent)
    together = upload_alike([values, values + 1], target)
    assert together.device.type == device
    assert torch.equal(together.cpu(), torch.stack([values, values + 1]))
    assert torch.equal(upload_alike([sent, sent], target), torch.stack([sent, sent]))


def test_values_arrive() -> None:
    check(torch.device("cpu"))


@pytest.mark.gpu
def test_values_arrive_on_the_gpu(cuda: torch.device) -> None:
    check(cuda)
