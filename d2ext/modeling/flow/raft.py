"""RAFT (arXiv 2003.12039) as torchvision has it, with torchvision's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from torchvision.models.optical_flow import raft_large, raft_small

from d2ext.modeling.flow.estimator import FLOW_REGISTRY, FlowEstimator


class _RAFT(FlowEstimator):
    """Runs in float32 whatever the model's dtype: torchvision looks up places in its cost volume in the
    dtype of the features. It copies from the CPU as it runs, so that a CUDA graph cannot hold it."""

    size_divisibility: ClassVar[int] = 8
    # torchvision: features at 1/8, of which the coarsest of four levels must have two cells.
    min_size: ClassVar[int] = 128
    follows_inference_mode: ClassVar[bool] = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def estimate(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None
    ) -> Tensor:
        # 0..255 → -1..1, as torchvision's transforms of these weights do
        return self.network(current / 127.5 - 1, reference / 127.5 - 1)[-1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _RAFT:
        """Follows a change of device only."""
        return super()._apply(lambda x: x.to(fn(x.new_empty(0)).device), recurse)


@FLOW_REGISTRY.register()
class RAFTLarge(_RAFT):
    """5.3 million parameters."""

    def __init__(self) -> None:
        super().__init__(raft_large(weights=None))


@FLOW_REGISTRY.register()
class RAFTSmall(_RAFT):
    """1 million parameters."""

    def __init__(self) -> None:
        super().__init__(raft_small(weights=None))
