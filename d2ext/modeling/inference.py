"""Faster inference for any system: lower precision, channels-last memory, CUDA graphs, compilation.

A system splits its inference into a network (images → raw predictions) and a decoder (raw predictions
→ tensors whose shapes do not depend on values), and calls them through :class:`InferenceNetwork`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from d2ext.config import CONFIG_REGISTRY
from d2ext.modeling.fusion import fuse_activations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MODES = ("eager", "cudagraph", "compile", "compile_cudagraph")
# Runs before a capture, so that handles are created and algorithms selected.
_WARMUP_RUNS = 3


@CONFIG_REGISTRY.register()
def add_inference_config(cfg: CfgNode) -> None:
    """Add the keys of :class:`InferenceNetwork` to ``cfg``, in place. All is off by default."""
    cfg.MODEL.INFERENCE = CfgNode()
    # "eager"; "cudagraph" replays one captured graph per input shape (NVIDIA GPUs);
    # "compile" runs torch.compile (any device, a minute or more at the first image of a shape);
    # "compile_cudagraph" captures what it compiled.
    cfg.MODEL.INFERENCE.MODE = "eager"
    # Arithmetic of the network: "float32", "bfloat16" or "float16". Decoding stays in float32.
    cfg.MODEL.INFERENCE.DTYPE = "float32"
    # Channels-last memory format; faster for convolutions in low precision on NVIDIA GPUs.
    cfg.MODEL.INFERENCE.CHANNELS_LAST = False


def fold_norms(module: nn.Module) -> None:
    """Fold batch norms, in place, into the convolutions that hold them as ``norm``.

    These have attributes ``weight`` (O, I, kh, kw), ``bias`` and ``norm``, as Detectron2's ``Conv2d``
    and d2ext's convolutions do. Norms whose statistics depend on the input stay.
    """
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if not isinstance(norm, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)):
            continue
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        weight = conv.weight
        if conv.bias is not None:
            shift = shift + conv.bias.double() * scale
        folded = weight.double() * scale[:, None, None, None]
        conv.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=False)
        conv.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
        conv.norm = None


def prepared_copy(network: nn.Module) -> nn.Module:
    """A copy for inference alone: batch norms folded, ``prepare_inference()`` called where it is."""
    prepared = copy.deepcopy(network).eval().requires_grad_(False)
    fold_norms(prepared)
    for module in list(prepared.modules()):
        if hasattr(module, "prepare_inference"):
            module.prepare_inference()
    return prepared


class InferenceNetwork:
    """Runs ``decode(network(images))``, on a prepared copy of the network where that is faster.

    The copy has folded batch norms, ``dtype`` and memory format; then modules with a method
    ``prepare_inference()`` may change themselves in it. It is made at the first call. When weights have
    changed in place (by training or ``load_state_dict``; writing through ``parameter.data`` goes
    unnoticed), the new values are written into the copy, so that graphs and compiled code stay valid.
    Modules must not be replaced after the first call.

    Args:
        network: module of images (B, 3, H, W) float32 and, for models with memory, further tensors.
        decode: function of its output, returning tensors in (nested) tuples, named tuples, lists or
            dicts; except in mode "eager", their shapes must not depend on values.
        mode: "eager", "cudagraph", "compile" or "compile_cudagraph".
        dtype: "float32", "bfloat16" or "float16".
        channels_last: run the copy in channels-last memory format.

    Raises:
        ValueError: unknown mode or dtype; a CUDA graph on another device than a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        decode: Callable[[Any], Any],
        *,
        mode: str = "eager",
        dtype: str = "float32",
        channels_last: bool = False,
    ) -> None:
        if mode not in _MODES:
            raise ValueError(f'MODEL.INFERENCE.MODE is one of {_MODES}, not "{mode}".')
        if dtype not in DTYPES:
            raise ValueError(f'MODEL.INFERENCE.DTYPE is one of {tuple(DTYPES)}, not "{dtype}".')
        self.network = network
        self.decode = decode
        self.mode = mode
        self.dtype = DTYPES[dtype]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._plain = mode == "eager" and dtype == "float32" and not channels_last
        self._forget()

    def _forget(self) -> None:
        """Drop the copy, its graphs and its compiled code."""
        self._prepared: nn.Module | None = None
        # The network's weights when the copy was made; collecting them from the modules at every
        # call would take longer than running a small network.
        self._watched: list[Tensor] = []
        self._fingerprint: list[tuple[int, int]] = []
        self._compiled: Callable[..., Any] | None = None
        self._seen: set[torch.Size] = set()
        self._graphs: dict[torch.Size, _CapturedGraph] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Graphs and compiled code can be neither copied nor pickled; the next call rebuilds them.
        dropped = ("_prepared", "_watched", "_fingerprint", "_compiled", "_seen", "_graphs")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, images: Tensor, *state: Tensor) -> Any:
        """images (B, 3, H, W) float32 → what ``decode`` returns; the tensors are the caller's.

        ``state``: further tensors for the network, as it returned them earlier; their shapes follow from
        the images'.
        """
        if self._plain:
            # Not what training may have compiled, for images of one size.
            return self.decode(self.network.forward(images, *state))
        if self.mode.endswith("cudagraph") and images.device.type != "cuda":
            raise ValueError(
                f'MODEL.INFERENCE.MODE "{self.mode}" needs an NVIDIA GPU and the model is on '
                f'"{images.device}": set it to "eager" or "compile".'
            )
        images = images.to(self.dtype, memory_format=self.memory_format)
        if images.shape in self._graphs:
            # The device works while the host looks at hundreds of weights.
            results = self._graphs[images.shape](images, *state)
            if self._is_current():
                return results
        self._prepare()
        if self.mode == "eager":
            return self._run(images, *state)
        if images.shape not in self._seen:
            # Fills the caches of ``decode`` (prior boxes) before it is compiled or captured.
            self._run(images, *state)
            self._seen.add(images.shape)
        function = self._run if self._compiled is None else self._compiled
        if self.mode == "compile":
            return function(images, *state)
        if images.shape not in self._graphs:
            pool = next((graph.pool for graph in self._graphs.values()), None)
            self._graphs[images.shape] = _CapturedGraph(function, (images, *state), pool)
        return self._graphs[images.shape](images, *state)

    def _run(self, *inputs: Tensor) -> Any:
        assert self._prepared is not None
        return self.decode(self._prepared(*inputs))

    def _prepare(self) -> None:
        """Make the copy, or bring its weights up to date."""
        if self._is_current():
            return
        prepared = prepared_copy(self.network)
        if not self.mode.startswith("compile") and next(self.network.parameters()).is_cuda:
            low = self.dtype != torch.float32 and self.memory_format == torch.channels_last
            fuse_activations(prepared, blocked_stems=low)  # the compiler fuses by itself
        prepared = prepared.to(dtype=self.dtype, memory_format=self.memory_format)
        new = _tensors(prepared)
        old = [] if self._prepared is None else _tensors(self._prepared)
        if [(x.shape, x.device) for x in old] == [(x.shape, x.device) for x in new]:
            with torch.no_grad():
                for target, source in zip(old, new, strict=True):
                    target.copy_(source)
        else:
            self._forget()
            self._prepared = prepared
            if self.mode.startswith("compile"):
                self._compiled = torch.compile(self._run, dynamic=False)
        self._watched = _tensors(self.network)
        self._fingerprint = _fingerprint(self._watched)

    def _is_current(self) -> bool:
        """Whether there is a copy, of the weights as they are."""
        return self._prepared is not None and _fingerprint(self._watched) == self._fingerprint


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _fingerprint(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What changes when a tensor's memory or, in place, its values do."""
    return [(x.data_ptr(), x._version) for x in tensors]


class _CapturedGraph:
    """A CUDA graph of ``function`` for inputs of fixed shapes, dtypes and memory formats.

    Args:
        pool: memory of another graph, to share: results are copied out, so graphs that run one after
            the other may overwrite each other's memory.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        examples: Sequence[Tensor],
        pool: Any | None = None,
    ) -> None:
        device = examples[0].device
        self.inputs = [example.clone() for example in examples]
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP_RUNS):
                    function(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # "thread_local": a data loader that pins memory in its own thread is no error.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
        self.pool = self.graph.pool()
        # What was copied last; kept alive, so that no other tensor takes its place in memory.
        self._state: list[tuple[Tensor, float]] = []

    def __call__(self, images: Tensor, *state: Tensor) -> Any:
        self.inputs[0].copy_(images)
        for target, new, (old, version) in zip(
            self.inputs[1:], state, self._state or [(images, -1)] * len(state), strict=True
        ):
            if new is not old or _version(new) != version:  # the same for several frames
                target.copy_(new)
        self._state = [(x, _version(x)) for x in state]
        self.graph.replay()
        # The next replay overwrites the graph's memory.
        return tree_map_only(Tensor, torch.clone, self.outputs)


def _version(x: Tensor) -> float:
    """Changes with the values; NaN, which differs from itself, where they are not counted."""
    return math.nan if x.is_inference() else x._version
