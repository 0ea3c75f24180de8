"""Base class of models with memory: what a frame's result depends on beside the frame is a value.

Letters: B videos in step, one frame of each at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2ext.modeling.inference import InferenceNetwork
from d2ext.modeling.meta_arch import MetaArch

Inputs = list[dict[str, Any]]


class VideoMetaArch(MetaArch):
    """A :class:`MetaArch` for frames of videos in order.

    A subclass implements :meth:`step`; its memory is a dataclass of tensors. In inference the model
    keeps the memory between calls, and begins anew where a video does (:func:`begins`). An input may
    have

    - ``video_id`` and ``frame`` (0-based): without both, each image is a video of its own;
    - ``is_first``: the first frame of a video;
    - ``key_frame``: True or False decides what the model would decide itself.
    """

    # Whether its results have ``track_ids``; to those of others a tracker can give them.
    gives_ids: ClassVar[bool] = False
    # What runs on the frames after first or key frames, where that is another network; in a tuple, so
    # that it is no submodule.
    _later_network: tuple[InferenceNetwork, ...] = ()
    _memory: Any = None
    _last: Sequence[dict[str, Any]] = ()

    @property
    def has_memory(self) -> bool:
        """Whether results depend on earlier frames."""
        return True

    def set_later_network(self, network: InferenceNetwork) -> None:
        """Run ``network`` on the frames after those of :attr:`inference_network`."""
        self._later_network = (network,)

    def step(self, inputs: Inputs, memory: Any) -> tuple[list[dict[str, Any]], Any]:
        """One frame of each of B videos.

        Args:
            inputs: B frames as for :meth:`forward`.
            memory: what the last call returned for the same B videos, not changed; None: there was none.

        Returns:
            B results, and the memory for the next frames.
        """
        raise NotImplementedError

    @torch.no_grad()
    def inference(self, batched_inputs: Inputs) -> list[dict[str, Any]]:
        """Results of the next frame of each video; see :meth:`step`."""
        same = len(self._last) == len(batched_inputs)
        last = self._last if same else [{}] * len(batched_inputs)
        inputs = [
            x if x.get("is_first") or not begins(x, y) else {**x, "is_first": True}
            for x, y in zip(batched_inputs, last, strict=True)
        ]
        outputs, self._memory = self.step(inputs, self._memory if same else None)
        self._last = [{key: x.get(key) for key in ("video_id", "frame")} for x in batched_inputs]
        return outputs

    def train(self, mode: bool = True) -> VideoMetaArch:
        """Also forgets the memory: the weights that it was made with may change."""
        self._memory, self._last = None, ()
        super().train(mode)
        return self


def begins(inputs: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether a frame is the first of its video.

    It is if ``is_first`` says so; and, where the caller forgot to say it, if it has no number or video,
    belongs to another video than the last frame, or does not come after it.
    """
    frame, video = inputs.get("frame"), inputs.get("video_id")
    if inputs.get("is_first") or frame is None or video is None or last.get("frame") is None:
        return True
    return video != last["video_id"] or frame <= last["frame"]


def select_rows(tensors: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Rows of tensors (B, ...)."""
    return [x[_index(rows, x)] for x in tensors]


def replace_rows(tensors: list[Tensor], rows: list[int], values: list[Tensor]) -> list[Tensor]:
    """Copies of tensors (B, ...) with other values (len(rows), ...) in some rows."""
    return [x.index_copy(0, _index(rows, x), y) for x, y in zip(tensors, values, strict=True)]


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
