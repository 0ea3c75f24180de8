"""Inference on images: what ``DefaultPredictor`` does, for more kinds of images and in batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.config import ConfigError, load_config, merge_options
from d2ext.data.image_io import as_bgr
from d2ext.data.saved_metadata import class_metadata
from d2ext.engine.run_folder import load_run
from d2ext.export import ExportedFile, is_exported
from d2ext.layers.transfer import upload_alike
from d2ext.model_zoo import find_config_file
from d2ext.modeling.tta import build_tta


class Predictor:
    """A model that predicts on one image at a time::

        predictor = d2ext.Predictor("yolact/yolact_R_50_550.yaml", "model_final.pth")
        instances = predictor("photo.jpg")["instances"]

    Gives what ``detectron2.engine.DefaultPredictor`` gives for the same config and image.

    Args:
        config: a config, the path of its file, its name in d2ext's or Detectron2's model zoo, the folder
            of a training (:func:`~d2ext.engine.run_folder.load_run`), or a file of :mod:`d2ext.export`,
            ``model.onnx`` or ``model.pt2``, which knows all else itself.
        weights: checkpoint; by default the config's ``MODEL.WEIGHTS``.
        overrides: KEY VALUE pairs, such as ``["MODEL.DEVICE", "cpu"]``.

    Attributes:
        model: the network. metadata: names and colours of the classes, for the visualizer.

    Raises:
        ConfigError, CheckpointError: the config or the checkpoint is wrong.
    """

    def __init__(
        self, config: CfgNode | str, weights: str | None = None, overrides: Sequence[str] = ()
    ) -> None:
        model: nn.Module | None = None
        if is_exported(config):
            if weights is not None or overrides:
                raise ConfigError(
                    "An exported file has its weights and config: export again to change."
                )
            file = ExportedFile(str(config))
            cfg, model = file.cfg, file.model(file.cfg)
        elif isinstance(config, str) and os.path.isdir(config):
            cfg = load_run(config)
        elif isinstance(config, str):
            cfg = load_config(find_config_file(config))
        else:
            cfg = config.clone()
            cfg.defrost()
        merge_options(cfg, overrides)
        if weights is not None:
            cfg.MODEL.WEIGHTS = str(weights)
        self._batch = BatchPredictor(cfg, model)
        self.cfg, self.model = self._batch.cfg, self._batch.model
        self.metadata = class_metadata(cfg)

    def __call__(self, image: str | os.PathLike[str] | Image.Image | np.ndarray) -> dict[str, Any]:
        """The model's output for one image, in the image's pixels.

        Args:
            image: a path, a Pillow image, or an array (BGR, where it has colours), of any depth; see
                :func:`~d2ext.data.image_io.as_bgr`, which raises ``ImageReadError`` for what is none.
        """
        return self._batch([as_bgr(image)])[0]


class BatchPredictor:
    """Builds the model of a config, loads its weights and runs it on lists of BGR images.

    Follows ``detectron2.engine.DefaultPredictor`` (BGR in, ``INPUT.FORMAT`` to the model,
    ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``, output at the size of the image) with three
    differences: several images at once; images go to the device as bytes, where channels are reordered;
    weights that do not fit the model are an error.

    Args:
        cfg: the config; ``MODEL.WEIGHTS`` empty leaves random weights.
        model: use this one, already loaded, instead of building it.

    Attributes:
        model: the model, with test-time augmentation if ``cfg`` enables it.

    Raises:
        CheckpointError: ``MODEL.WEIGHTS`` is unreadable or of another model.
        ValueError: ``INPUT.FORMAT`` is neither "RGB" nor "BGR".
    """

    def __init__(self, cfg: CfgNode, model: nn.Module | None = None) -> None:
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f'INPUT.FORMAT is "RGB" or "BGR" here, not "{cfg.INPUT.FORMAT}".')
        self.cfg = cfg.clone()
        if model is None:
            model = build_model(self.cfg)
            Checkpointer(model, fit="exact").load(cfg.MODEL.WEIGHTS)
        self.model = build_tta(cfg, model).eval()
        self.device = torch.device(cfg.MODEL.DEVICE)
        self._resize = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )

    def upload(
        self, images: Sequence[np.ndarray], boxes: Sequence[Instances] | None = None
    ) -> list[dict[str, Any]]:
        """The model's inputs, on its device.

        Args:
            images: H×W×3 uint8 arrays, BGR, each of any size.
            boxes: for top-down models: ``pred_boxes`` in pixels of each image, and optionally other
                fields.

        Returns:
            for each image ``image`` (3, h, w) uint8 in the model's channel order, ``height``, ``width``,
            and with ``boxes`` the ``instances``, in pixels of ``image``.
        """
        arrays = [self._prepare(image) for image in images]
        if len({array.shape for array in arrays}) == 1:  # one copy for all
            tensors = list(self._upload(arrays))
        else:
            tensors = [self._upload([array])[0] for array in arrays]
        inputs: list[dict[str, Any]] = [
            {"image": tensor, "height": image.shape[0], "width": image.shape[1]}
            for tensor, image in zip(tensors, images, strict=True)
        ]
        for x, instances in zip(inputs, boxes or (), strict=boxes is not None):
            x["instances"] = _resized(instances, tuple(x["image"].shape[-2:]))
        return inputs

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(
                f"Expected an image of height x width x 3 bytes, not {image.shape} {image.dtype}."
            )
        if self.cfg.INPUT.MIN_SIZE_TEST > 0:
            image = self._resize.get_transform(image).apply_image(image)
        return np.require(image, requirements=["C", "W"])

    def _upload(self, arrays: list[np.ndarray]) -> Tensor:
        """n x (h, w, 3) bytes → (n, 3, h, w) in the model's channel order, on its device."""
        # Bytes are copied in their memory order, and permuted on the device.
        tensor = upload_alike([torch.from_numpy(array) for array in arrays], self.device)
        tensor = tensor.permute(0, 3, 1, 2)
        return tensor.flip(1) if self.cfg.INPUT.FORMAT == "RGB" else tensor

    @torch.no_grad()
    def __call__(
        self, images: Sequence[np.ndarray], boxes: Sequence[Instances] | None = None
    ) -> list[dict[str, Any]]:
        """Predict on BGR images (H×W×3 uint8 each); the model's output for each of them.

        Args:
            images, boxes: see :meth:`upload`.
        """
        return self.model(self.upload(images, boxes)) if len(images) > 0 else []


def _resized(instances: Instances, size: tuple[int, int]) -> Instances:
    """Instances with boxes, of an image that was resized to ``size`` (height, width)."""
    height, width = instances.image_size
    result = Instances(size)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = value.clone()
            value.scale(size[1] / width, size[0] / height)
        result.set(name, value)
    return result
