"""The faster inference paths give what the plain one gives."""

from __future__ import annotations

import copy
import functools
import pickle
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from d2ext.layers.deform_conv import ModulatedDeformConv
from d2ext.modeling.inference import InferenceNetwork, _CapturedGraph, fold_norms
from d2ext.testing import random_inputs, tiny_config


def _randomize_norms(module: nn.Module) -> None:
    """Statistics and affine that a wrong folding would not survive."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.5, 0.5),
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 2.0),
            ):
                value = getattr(norm, name)
                drawn = torch.rand(value.shape, generator=generator) * (high - low) + low
                value.data.copy_(drawn)


def _tiny(**changes: Any) -> nn.Module:
    """A tiny YOLACT with settled norms; ``changes`` are keys below MODEL.INFERENCE."""
    cfg = tiny_config("YOLACT")
    for key, value in changes.items():
        cfg.MODEL.INFERENCE[key] = value
    return _build(cfg)


def _build(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    _randomize_norms(model)
    return model


def _results(model: nn.Module, count: int = 2, seed: int = 0) -> list[Any]:
    with torch.no_grad():
        return [output["instances"].to("cpu") for output in model(random_inputs(count, seed=seed))]


def _assert_same(actual: list[Any], expected: list[Any], score: float, box: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert len(one) == len(other) > 0
        assert one.pred_classes.tolist() == other.pred_classes.tolist()
        torch.testing.assert_close(one.scores, other.scores, atol=score, rtol=0)
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, atol=box, rtol=0)
        assert (one.pred_masks != other.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("kind", ["plain", "bias", "deformable"])
def test_folded_norms_change_nothing(norm: str, kind: str) -> None:
    if kind == "deformable":
        conv: nn.Module = ModulatedDeformConv(4, 6, norm=get_norm(norm, 6))
        nn.init.normal_(conv.offset_mask.weight, std=0.1)
        nn.init.normal_(conv.bias)
    else:
        conv = Conv2d(4, 6, 3, padding=1, bias=kind == "bias", norm=get_norm(norm, 6))
    conv.eval()
    _randomize_norms(conv)
    x = torch.randn(2, 4, 7, 9)
    with torch.no_grad():
        expected = conv(x)
        fold_norms(conv)
        assert conv.norm is None
        torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)


def test_norms_that_depend_on_the_input_stay() -> None:
    conv = Conv2d(4, 8, 1, norm=nn.GroupNorm(2, 8))
    fold_norms(conv)
    assert isinstance(conv.norm, nn.GroupNorm)


@pytest.mark.parametrize("channels_last", [False, True])
def test_eager_copy_equals_the_plain_network(channels_last: bool) -> None:
    expected = _results(_tiny())
    model = _tiny(CHANNELS_LAST=channels_last)
    model.inference_network._plain = False  # run the folded copy in float32
    _assert_same(_results(model), expected, score=1e-5, box=0.01)


def test_compiled_equals_eager_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the code generator, which takes minutes on a CPU (the GPU test runs it)."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain, model = _tiny(), _tiny(MODE="compile")
    for seed in (0, 1):
        _assert_same(_results(model, seed=seed), _results(plain, seed=seed), score=1e-5, box=0.01)
    # training goes on: the weights change in place
    with torch.no_grad():
        for network in (plain, model):
            for parameter in network.parameters():
                parameter.mul_(0.9)
    _assert_same(_results(model), _results(plain), score=1e-5, box=0.01)
    # no graph break, and nothing compiled anew: neither for the second image nor for new weights
    assert backend.frame_count == 1


def test_low_precision_stays_close() -> None:
    """Rankings may swap in bfloat16, so the raw predictions are compared, as published models are."""
    model = _tiny(DTYPE="bfloat16")
    network = model.inference_network
    images = model.preprocess(random_inputs(2))
    with torch.no_grad():
        expected = network.network(images)
        network._prepare()
        actual = network._prepared(images.bfloat16())
    for name in ("offsets", "logits", "coefficients", "prototypes"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert one.dtype == torch.bfloat16, name
        error = (one.float() - other).norm() / other.norm()
        assert 1e-5 < error < 0.05, (name, error)
    for output in _results(model):
        assert len(output) > 0 and output.scores.dtype == torch.float32


def test_weights_that_change_are_used() -> None:
    model = _tiny(CHANNELS_LAST=True)
    first = _results(model)
    prepared = model.inference_network._prepared
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    second = _results(model)
    assert model.inference_network._prepared is prepared
    assert not torch.equal(first[0].scores, second[0].scores)
    plain = _tiny()
    plain.load_state_dict(state)
    _assert_same(second, _results(plain), score=1e-5, box=0.01)


def test_a_graph_runs_before_weights_are_compared() -> None:
    """And its predictions count only if they have not changed."""
    network = InferenceNetwork(nn.Conv2d(3, 1, 1), lambda x: x, channels_last=True)
    images = torch.ones(1, 3, 2, 2)
    runs = []

    def graph(x: Tensor) -> Tensor:
        runs.append(x)
        return torch.full((1, 1, 2, 2), 7.0)  # of the weights at the capture

    with torch.no_grad():
        network(images)
        network._graphs[images.shape] = graph
        assert (network(images) == 7).all() and len(runs) == 1
        network.network.weight.mul_(0).add_(1)
        torch.testing.assert_close(network(images), network.network(images))
        assert len(runs) == 2


def test_copies_and_pickles_start_anew() -> None:
    model = _tiny(CHANNELS_LAST=True)
    expected = _results(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.inference_network is not model.inference_network
        assert other.inference_network._prepared is None
        assert other.inference_network.network.backbone is other.backbone
        _assert_same(_results(other), expected, score=0, box=0)


@pytest.mark.parametrize("mode", ["cudagraph", "compile_cudagraph"])
def test_graph_on_the_cpu_is_an_error(mode: str) -> None:
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        _results(_tiny(MODE=mode))


def test_unknown_settings_are_errors() -> None:
    for option in ({"mode": "fast"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="is one of"):
            InferenceNetwork(nn.Identity(), lambda x: (x,), **option)


class _Predictions(NamedTuple):
    features: dict[str, Tensor]
    logits: list[Tensor]


class _TwoLevels(nn.Module):
    """Predictions in a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> _Predictions:
        p2 = self.conv(images)
        p3 = p2[:, :, ::2, ::2]
        return _Predictions({"p2": p2, "p3": p3}, [p2.sum(dim=(2, 3)), p3.sum(dim=(2, 3))])


def _assert_predictions(actual: Any, expected: _Predictions) -> None:
    assert type(actual) is _Predictions and list(actual.features) == ["p2", "p3"]
    for name, value in expected.features.items():
        torch.testing.assert_close(actual.features[name], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-5)


def test_compiled_predictions_keep_their_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    network = _TwoLevels()
    images = torch.randn(1, 3, 8, 6)
    compiled = InferenceNetwork(network, lambda x: x, mode="compile")
    with torch.no_grad():
        _assert_predictions(compiled(images), network(images))
    assert backend.frame_count == 1


def test_a_graph_copies_a_memory_that_is_new() -> None:
    """In inference mode, where tensors do not say whether they changed, always."""
    graph = object.__new__(_CapturedGraph)
    graph.inputs, graph._state = [torch.zeros(1), torch.zeros(1)], []
    graph.outputs = graph.inputs[1]
    graph.graph = SimpleNamespace(replay=lambda: None)
    image = torch.zeros(1)
    for inference in (False, True):
        with torch.inference_mode(inference):
            memory = torch.ones(1)
            assert graph(image, memory).item() == 1
            memory += 1
            assert graph(image, memory).item() == 2
            assert graph(image, torch.full((1,), 5.0)).item() == 5


def test_a_graphs_predictions_are_the_callers() -> None:
    """A replay writes into the same memory again."""
    memory = _Predictions({"p2": torch.zeros(2), "p3": torch.zeros(1)}, [torch.zeros(3)])
    graph = object.__new__(_CapturedGraph)
    graph.inputs, graph.outputs, graph._state = [torch.zeros(1)], memory, []
    graph.graph = SimpleNamespace(replay=lambda: memory.features["p3"].add_(graph.inputs[0]))
    first, second = graph(torch.ones(1)), graph(torch.ones(1))
    assert type(first) is _Predictions
    assert first.features["p3"].item() == 1 and second.features["p3"].item() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cudagraph", "compile", "compile_cudagraph"])
def test_graphs_keep_structure_on_the_gpu(cuda: torch.device, mode: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    network = _TwoLevels().to(cuda)
    graph = InferenceNetwork(network, lambda x: x, mode=mode)
    with torch.no_grad():
        for _ in range(2):
            images = torch.randn(1, 3, 8, 6, device=cuda)
            _assert_predictions(graph(images), network(images))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cudagraph", "compile", "compile_cudagraph"])
def test_graphs_equal_eager_on_the_gpu(cuda: torch.device, mode: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    cfg = tiny_config("YOLACT")
    cfg.MODEL.DEVICE = str(cuda)
    plain = _build(cfg)
    cfg.MODEL.INFERENCE.MODE = mode
    model = _build(cfg)
    model.load_state_dict(plain.state_dict())
    # two shapes in turn, for graphs share their memory
    for count, seed in ((1, 0), (2, 1), (1, 2), (2, 3)):
        actual = _results(model, count, seed)
        _assert_same(actual, _results(plain, count, seed), score=1e-4, box=1.01)
    with torch.no_grad():
        for one in (model, plain):
            for parameter in one.parameters():
                parameter.mul_(0.9)
    _assert_same(_results(model), _results(plain), score=1e-4, box=1.01)
