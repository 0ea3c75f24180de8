"""Measures a model stage by stage: what `d2ext benchmark model` times."""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2ext.engine.predictor import BatchPredictor
from d2ext.export.files import ExportedNetwork
from d2ext.modeling.inference import InferenceNetwork
from d2ext.modeling.meta_arch import MetaArch

# Keys below MODEL that hold the score below which a system drops candidates.
_SCORE_KEYS = ("SCORE_THRESH", "SCORE_THRESH_TEST")
_ROUNDS = 3


class Clock:
    """Times functions on a device.

    Args:
        device: waited for before and after each measurement.
        iterations: calls that are measured.
        warmup: calls before them, which also compile, capture and select algorithms.
    """

    def __init__(self, device: torch.device, iterations: int, warmup: int) -> None:
        self.device, self.iterations, self.warmup = device, iterations, warmup

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def latency(self, function: Callable[[], Any]) -> list[float]:
        """Milliseconds of single calls."""
        for _ in range(self.warmup):
            function()
        times = []
        for _ in range(self.iterations):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def median(self, function: Callable[[], Any]) -> float:
        """Median of :meth:`latency`."""
        return statistics.median(self.latency(function))

    def rate(self, function: Callable[[], Any]) -> float:
        """Calls a second, back to back."""
        rates = []
        for _ in range(_ROUNDS):
            self.wait()
            start = time.perf_counter()
            for _ in range(self.iterations):
                function()
            self.wait()
            rates.append(self.iterations / (time.perf_counter() - start))
        return statistics.median(rates)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions that the numbers depend on."""
    known: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.type == "cuda":
        known["device"] = torch.cuda.get_device_name(device)
        known["cuda"] = torch.version.cuda
        known["cudnn"] = torch.backends.cudnn.version()
        known["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        known["tf32"] = torch.backends.cudnn.allow_tf32
    return known


def lower_score_thresholds(cfg: CfgNode, value: float) -> list[str]:
    """Set every score threshold below ``cfg.MODEL``; the keys that were changed."""
    changed = []

    def visit(node: CfgNode, prefix: str) -> None:
        for key, entry in node.items():
            if isinstance(entry, CfgNode):
                visit(entry, f"{prefix}{key}.")
            elif key in _SCORE_KEYS:
                node[key] = value
                changed.append(f"{prefix}{key}")

    visit(cfg.MODEL, "MODEL.")
    return changed


@contextmanager
def settled_norms(model: nn.Module) -> Iterator[None]:
    """Batch norms, frozen ones too, take the statistics of what runs through them meanwhile.

    Without this, activations of a random ResNet grow from block to block: boxes without area or of
    infinite size make the work after the network unlike that of a trained model, and stop a training.
    """
    calls: Counter[nn.Module] = Counter()

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        calls[norm] += 1
        # The mean of all calls, for heads that several feature maps share.
        norm.running_mean.lerp_(x.mean(dim=(0, 2, 3)), 1 / calls[norm])
        norm.running_var.lerp_(x.var(dim=(0, 2, 3), correction=0), 1 / calls[norm])

    kinds = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
    hooks = [m.register_forward_pre_hook(settle) for m in model.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run_network(model: nn.Module, inputs: list[dict[str, Any]]) -> None:
    """Run the network alone, eagerly; of a model that is not d2ext's, the whole model."""
    if isinstance(model, MetaArch):
        model.inference_network.network(model.preprocess(inputs), *model.network_state(inputs))
    else:
        model(inputs)


def network_only(faster: InferenceNetwork) -> InferenceNetwork:
    """The same network in the same mode, without decoding."""

    def tensors(raw: Any) -> tuple[Tensor, ...]:
        if isinstance(raw, Tensor):
            return (raw,)
        values = raw.values() if isinstance(raw, dict) else raw
        nested = (tensors(x) for x in values if isinstance(x, (Tensor, dict, tuple, list)))
        return tuple(x for part in nested for x in part)

    name = str(faster.dtype).removeprefix("torch.")
    return InferenceNetwork(
        faster.network,
        tensors,
        mode=faster.mode,
        dtype=name,
        channels_last=faster.memory_format == torch.channels_last,
    )


def count_flops(model: nn.Module, inputs: list[dict[str, Any]]) -> int:
    """FLOPs of convolutions and matrix products, in float32 and eager mode; multiply-add = 2."""
    mapping = {torch.ops.torchvision.deform_conv2d: _deform_conv_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run_network(model, inputs)
    return counter.get_total_flops()


def _deform_conv_flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """As for a convolution; the bilinear samples are not counted."""
    batch, out_channels, height, width = out_shape
    channels, kernel_height, kernel_width = weight_shape[1:]
    taps = channels * kernel_height * kernel_width
    return 2 * batch * out_channels * height * width * taps


class BoxPredictor(BatchPredictor):
    """Gives a top-down model the same number of random boxes in each image."""

    def __init__(self, cfg: CfgNode, count: int, model: nn.Module | None = None) -> None:
        super().__init__(cfg, model)
        self.count = count

    def upload(
        self, images: Sequence[np.ndarray], boxes: Sequence[Instances] | None = None
    ) -> list[dict[str, Any]]:
        """As the base class; boxes of a quarter to three quarters of the image's sides."""
        rng = np.random.default_rng(0)
        drawn = []
        for image in images:
            sides = rng.uniform(0.25, 0.75, (self.count, 2))
            corners = rng.uniform(0, 1, (self.count, 2)) * (1 - sides)
            shares = np.concatenate([corners, corners + sides], axis=1)
            height, width = image.shape[:2]
            instances = Instances((height, width))
            pixels = shares * [width, height, width, height]
            instances.pred_boxes = Boxes(torch.from_numpy(pixels))
            drawn.append(instances)
        return super().upload(images, drawn)


class StreamPredictor(BatchPredictor):
    """Takes each call's images as the next frames of as many videos.

    Attributes:
        period: calls from one key frame to the next.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        super().__init__(cfg, model)
        self.period = getattr(model, "key_interval", 1)
        self._frame = 0

    def upload(
        self, images: Sequence[np.ndarray], boxes: Sequence[Instances] | None = None
    ) -> list[dict[str, Any]]:
        """As the base class, with the numbers of videos and frames."""
        inputs = super().upload(images, boxes)
        for i, x in enumerate(inputs):
            x.update(video_id=i, frame=self._frame)
        self._frame += 1
        return inputs


def measure_batch(
    predictor: BatchPredictor, images: list[np.ndarray], clock: Clock
) -> dict[str, Any]:
    """Stages, latency, throughput and memory for one batch."""
    device = predictor.device
    result: dict[str, Any] = {"batch_size": len(images)}
    period = getattr(predictor, "period", 1)

    def run() -> None:
        for _ in range(period):
            predictor(images)

    with torch.no_grad():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        result["latency_ms"] = _spread([t / period for t in clock.latency(run)])
        result["images_per_second"] = len(images) * period * clock.rate(run)
        if device.type == "cuda":
            # Memory of CUDA graphs counts as reserved, not as allocated.
            result["peak_allocated_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
            result["peak_reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
        stages = stage_times(predictor, images, clock)
        stages["total"] = result["latency_ms"]["median"]
        result["output"] = describe_output(predictor(images))
    result["stages_ms"] = stages
    return result


def stage_times(
    predictor: BatchPredictor, images: list[np.ndarray], clock: Clock
) -> dict[str, float]:
    """Milliseconds of the parts of the total."""
    model = predictor.model
    inputs = predictor.upload(images)
    stages = {"upload": clock.median(lambda: predictor.upload(images))}
    if not isinstance(model, MetaArch):
        stages["model"] = clock.median(lambda: model(inputs))
        return stages
    faster = model.inference_network
    exported = isinstance(faster, ExportedNetwork)
    if hasattr(model, "stages") and not exported:
        return stages | {name: clock.median(part) for name, part in model.stages(inputs).items()}
    batch = model.preprocess(inputs)
    stages["preprocess"] = clock.median(lambda: model.preprocess(inputs))
    state = model.network_state(inputs)
    decoded = clock.median(lambda: faster(batch, *state))
    if exported:
        stages["file"] = decoded
    else:
        stages |= _network_times(predictor, batch, state, clock)
        stages["choice"] = max(decoded - stages["network"], 0.0)
    finished = clock.median(lambda: model.postprocess(faster(batch, *state), inputs))
    stages["results"] = max(finished - decoded, 0.0)
    return stages


def _network_times(
    predictor: BatchPredictor, batch: Tensor, state: Sequence[Tensor], clock: Clock
) -> dict[str, float]:
    """Of a model's network without decoding."""
    model = predictor.model
    alone = network_only(model.inference_network)
    stages = {"network": clock.median(lambda: alone(batch, *state))}
    if isinstance(predictor, StreamPredictor):
        memory = alone(batch)[-model.num_memory :]
        between = network_only(model.non_key_network)
        stages["between"] = clock.median(lambda: between(batch, *memory))
        frames = stages["network"] + (predictor.period - 1) * stages["between"]
        stages["cycle"] = frames / predictor.period
    return stages


def describe_output(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Detections per image and their boxes' share of it, on which the time for results depends."""
    description: dict[str, Any] = {}
    detections = [output["instances"] for output in outputs if "instances" in output]
    if detections:
        description["detections_per_image"] = statistics.mean(len(x) for x in detections)
        shares = [
            x.pred_boxes.area().float().mean().item() / (x.image_size[0] * x.image_size[1])
            for x in detections
            if len(x) and x.has("pred_boxes")
        ]
        description["mean_box_share"] = statistics.mean(shares) if shares else 0.0
    return description


def _spread(times: Sequence[float]) -> dict[str, float]:
    low, high = np.percentile(times, [10, 90]).tolist()
    return {"median": statistics.median(times), "p10": low, "p90": high}
