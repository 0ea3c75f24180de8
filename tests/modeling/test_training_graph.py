"""What of training graphs needs no GPU; tests/systems/test_common.py trains with them on one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from d2ext.config import ConfigError
from d2ext.engine.trainer import Trainer
from d2ext.modeling.training_graph import TrainingGraphs
from d2ext.testing import tiny_config


class Predictions(NamedTuple):
    maps: dict[str, Tensor]
    nothing: None
    stride: int


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.calls = 0

    def forward(self, images: Tensor) -> Predictions:
        self.calls += 1
        x = self.norm(images)
        return Predictions({"a": x, "b": x + 1}, None, 4)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """PyTorch's capture replaced by its warm-up runs; the shapes it was called for."""
    shapes: list[torch.Size] = []

    def capture(network: Any, sample: tuple[Tensor, ...], **options: Any) -> Any:
        for _ in range(3):
            network(*sample)
        shapes.append(sample[0].shape)
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return shapes


def test_predictions_and_statistics_are_the_networks(captured: list[torch.Size]) -> None:
    plain = Network()
    graphs = TrainingGraphs(copy.deepcopy(plain))
    for height in (4, 5, 4):
        images = torch.rand(2, 3, height, 6)
        expected, actual = plain(images), graphs(images)
        assert type(actual) is Predictions and actual[1:] == (None, 4)
        assert actual.maps.keys() == expected.maps.keys()
        assert all(torch.equal(actual.maps[k], expected.maps[k]) for k in "ab")
    assert [x[2] for x in captured] == [4, 5]
    for a, b in zip(graphs.network.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), "runs before a capture count for nothing"


def test_the_fifth_shape_runs_without_a_graph(captured: list[torch.Size]) -> None:
    graphs = TrainingGraphs(Network())
    for width in (3, 4, 5, 6, 7, 7):
        assert graphs(torch.rand(1, 3, 4, width)).maps["a"].shape[-1] == width
    assert [x[3] for x in captured] == [3, 4, 5, 6]


def test_a_copy_calls_the_copied_network(captured: list[torch.Size]) -> None:
    graphs = TrainingGraphs(Network())
    graphs(torch.rand(1, 3, 4, 4))
    calls = graphs.network.calls
    copy.deepcopy(graphs)(torch.rand(1, 3, 4, 4))
    assert graphs.network.calls == calls


@pytest.mark.gpu
def test_below_distributed_data_parallel(cuda: torch.device, tmp_path: Path) -> None:
    """Which keeps a place in autograd's graph for each parameter, on the default stream."""

    class Model(nn.Module):
        def __init__(self, graphs: bool) -> None:
            super().__init__()
            self.network = Network().to(cuda)
            self.call = (TrainingGraphs(self.network) if graphs else self.network,)

        def forward(self, images: Tensor) -> Tensor:
            return self.call[0](images).maps["b"].square().mean()

    gradients = []
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for graphs in (False, True):
            model = nn.parallel.DistributedDataParallel(Model(graphs), gradient_as_bucket_view=True)
            for seed in range(3):
                torch.manual_seed(seed)
                model.zero_grad()
                model(torch.rand(2, 3, 8, 9, device=cuda)).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    for expected, actual in zip(*gradients, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("architecture", "steps", "message"),
    [
        ("CenterNet", 1, "not on an NVIDIA GPU"),
        ("CenterNet", 2, "micro-batches would overwrite"),
        ("YolactEdge", 1, "YolactEdge runs more than one network"),
        ("DensePose", 1, "GeneralizedRCNN runs more than one"),
    ],
)
def test_refused(architecture: str, steps: int, message: str) -> None:
    cfg = tiny_config(architecture)
    cfg.SOLVER.CUDA_GRAPH, cfg.SOLVER.ACCUMULATION_STEPS = True, steps
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(ConfigError, match=f"CUDA_GRAPH must be False.*{message}"):
        Trainer.build_model(cfg)
