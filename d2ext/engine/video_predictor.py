"""Inference on the frames of a video, in their order, with ids that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import nn

from d2ext.config import ConfigError
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.top_down import BoxSource
from d2ext.engine.tracking import build_tracker, give_ids
from d2ext.export import ExportedFile
from d2ext.utils.drawing import select

__all__ = ["FramePredictor", "VideoPredictor"]


class FramePredictor(BatchPredictor):
    """A :class:`BatchPredictor` whose images are the frames of a video, in order.

    A model with memory (``has_memory``) sees one frame after the other and gets its memory back
    with the next; other models see the frames of a call together.

    Attributes:
        memory: what the model's last ``step`` returned; None at the beginning of a video.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module | None = None) -> None:
        super().__init__(cfg, model)
        self.has_memory = getattr(self.model, "has_memory", False)
        self.reset()

    def reset(self) -> None:
        """The next frame is the first of another video."""
        self.memory: Any = None
        self._frame = 0
        self._video = getattr(self, "_video", -1) + 1

    @torch.no_grad()
    def __call__(
        self, images: Sequence[np.ndarray], boxes: Sequence[Instances] | None = None
    ) -> list[dict[str, Any]]:
        """The output of each frame; see :class:`BatchPredictor`."""
        if not self.has_memory:
            return super().__call__(images, boxes)
        outputs = []
        for i, image in enumerate(images):
            inputs = self.upload([image], None if boxes is None else [boxes[i]])
            inputs[0].update(video_id=self._video, frame=self._frame, is_first=self._frame == 0)
            (output,), self.memory = self.model.step(inputs, self.memory)
            self._frame += 1
            outputs.append(output)
        return outputs


class VideoPredictor:
    """A model that predicts on the frames of a video::

        predictor = d2ext.VideoPredictor(cfg, tracker="NorfairTracker", threshold=0.5)
        for frame in frames:  # of one video, in order
            instances = predictor(frame)["instances"]
            instances.track_ids  # int64, from 1; -1: none
        predictor.reset()  # before another video

    Models with memory keep it between frames.

    Args:
        cfg: the config; ``MODEL.WEIGHTS`` is loaded. Or the path of an exported file
            (:mod:`d2ext.export`), of a model with memory the one of its key frames.
        tracker: what gives the instances of a model that gives none their ids, a name in
            :data:`~d2ext.engine.tracking.TRACKER_REGISTRY`; empty: there are none.
        model: use this one, already loaded, instead of building it.
        threshold: instances of a lower score are left out, before they are tracked; the others come best
            first, on the CPU. 0: all, as the model gives them.
        boxes: the boxes that a top-down model (landmarks) crops; frames have the ids 1, 2, ...

    Raises:
        CheckpointError: ``MODEL.WEIGHTS`` is unreadable or of another model.
        ConfigError: there is no such tracker, its package is not installed, or the model gives ids.
    """

    def __init__(
        self,
        cfg: CfgNode | str,
        *,
        tracker: str = "",
        model: nn.Module | None = None,
        threshold: float = 0.0,
        boxes: BoxSource | None = None,
    ) -> None:
        if not isinstance(cfg, CfgNode):
            file = ExportedFile(cfg)
            cfg, model = file.cfg, file.model(file.cfg)
        self._tracker = build_tracker(tracker, cfg) if tracker else None
        self.frames = FramePredictor(cfg, model)
        if tracker and getattr(self.frames.model, "gives_ids", False):
            raise ConfigError(f"{cfg.MODEL.META_ARCHITECTURE} gives ids itself: no tracker.")
        self._threshold, self._boxes = threshold, boxes
        self._number = 0

    def reset(self) -> None:
        """The next frame is the first of another video: memory, tracks and ids begin anew."""
        self.frames.reset()
        self._number = 0
        if self._tracker is not None:
            self._tracker.reset()

    def __call__(self, frame: np.ndarray) -> dict[str, Any]:
        """The output for the next frame (H×W×3, BGR, uint8)."""
        return self.batch([frame])[0]

    def batch(self, frames: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Outputs for the next frames, in order; models without memory run on all of them together."""
        numbers = range(self._number, self._number + len(frames))
        boxes = None if self._boxes is None else self._boxes([n + 1 for n in numbers], frames)
        outputs = self.frames(frames, boxes)
        for number, output in zip(numbers, outputs, strict=True):
            if "instances" not in output:
                continue
            if self._threshold > 0:
                output["instances"] = select(output["instances"], self._threshold)
            if self._tracker is not None:
                give_ids(output, self._tracker, number)
        self._number += len(frames)
        return outputs
