"""Training in which a network's forward and backward pass are one launch each, instead of thousands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

# Of more sizes of images the further ones run as without graphs: each graph keeps its activations.
_MOST_SHAPES = 4


class _Graphs:
    """The network as graphs, captured for images (B, 3, H, W) of one shape; called like the network.

    The trained parameters are arguments of what is captured, since DistributedDataParallel keeps their
    places in autograd's graph, which belong to the stream that must not be in a capture; other tensors
    on the same memory have places of their own.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network = network
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        aliases = (p.detach().requires_grad_() for p in self.parameters.values())
        self.graphed = torch.cuda.make_graphed_callables(
            self.run, (images.detach().clone(), *aliases), allow_unused_input=True
        )

    def run(self, images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The network, with other tensors for its parameters → the tensors of its predictions."""
        given = dict(zip(self.parameters, parameters, strict=True))
        predictions = torch.func.functional_call(self.network, given, (images,))
        self._leaves, self._spec = tree_flatten(predictions)
        tensors = tuple(x for x in self._leaves if isinstance(x, Tensor))
        self._leaves = [None if isinstance(x, Tensor) else (x,) for x in self._leaves]
        return tensors

    def __call__(self, images: Tensor) -> Any:
        left = iter(self.graphed(images, *self.parameters.values()))
        leaves = [next(left) if x is None else x[0] for x in self._leaves]
        return tree_unflatten(leaves, self._spec)


class TrainingGraphs:
    """Calls a network as CUDA graphs of its forward and of its backward pass, a pair for each of the
    first four shapes of images, captured at the first call under the autocast that is then active.

    Between the forward and the backward pass the network must not be called again: predictions and
    gradients lie in the graphs' memory, which the next call overwrites.

    Args:
        network: images (B, 3, H, W) → predictions in (nested) tuples, named tuples, lists or dicts; it
            does not wait for the device.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._graphs: dict[torch.Size, _Graphs] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"network": self.network, "_graphs": {}}  # graphs can be neither copied nor pickled

    def __call__(self, images: Tensor) -> Any:
        if images.shape not in self._graphs:
            if len(self._graphs) == _MOST_SHAPES:
                return self.network(images)
            self._graphs[images.shape] = self._capture(images)
        return self._graphs[images.shape](images)

    def _capture(self, images: Tensor) -> _Graphs:
        statistics = [x.clone() for x in self.network.buffers()]
        kind = images.device.type
        with torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            graph = _Graphs(self.network, images)
        with torch.no_grad():
            for buffer, before in zip(self.network.buffers(), statistics, strict=True):
                buffer.copy_(before)  # as they were before the runs that precede a capture
        return graph
