"""Base class of the meta-architectures; a model adds its network, losses and post-processing.

Training runs :meth:`~MetaArch.training_batch`, the network and :meth:`~MetaArch.losses`; inference runs
:meth:`~MetaArch.preprocess`, the network with the model's decoding (see
:mod:`d2ext.modeling.inference`), and :meth:`~MetaArch.postprocess`.

Letters: B images, H, W size of the network's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import Backbone
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2ext.layers.transfer import upload
from d2ext.modeling.export_form import ExportForm, refuse_tracing
from d2ext.modeling.inference import InferenceNetwork
from d2ext.modeling.training_graph import TrainingGraphs


class BackboneWithHead(nn.Module):
    """Images (B, 3, H, W) → the head's predictions on features of the backbone, finest first."""

    def __init__(self, backbone: Backbone, head: nn.Module, in_features: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.in_features = list(in_features)

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        return self.head([features[name] for name in self.in_features])


class MetaArch(nn.Module):
    """Base class of the meta-architectures.

    A subclass builds its modules, calls :meth:`set_network`, and implements :meth:`preprocess`,
    :meth:`encode_targets`, :meth:`losses` and :meth:`postprocess`. It overrides :meth:`training_batch`
    if its training input differs from :meth:`preprocess`, and :meth:`inference` if it runs the network
    more than once for an image.
    """

    # (old, new) prefixes of parameters that had another name in earlier versions' checkpoints.
    RENAMED_PARAMETERS: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Why models of this class cannot be exported; "": they can, see export_form.
    export_refusal: ClassVar[str] = "it does not say its form"

    def __init__(
        self,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        inference_mode: str = "eager",
        inference_dtype: str = "float32",
        channels_last: bool = False,
        vis_period: int = 0,
    ) -> None:
        """Args:
        pixel_mean, pixel_std: per channel of ``input_format``, in 0..255.
        input_format: channel order of the images, for pictures only.
        inference_mode, inference_dtype, channels_last: see :class:`InferenceNetwork`.
        vis_period: iterations between pictures of the training in TensorBoard; 0 for none.
        """
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.vis_period = vis_period
        # In a tuple, so that neither the network nor the copy that inference keeps is a submodule.
        self._inference: tuple[InferenceNetwork, ...] = ()
        # What training calls instead of the network, if anything, also in a tuple.
        self._training_graphs: tuple[TrainingGraphs, ...] = ()
        self._inference_options: dict[str, Any] = {
            "mode": inference_mode,
            "dtype": inference_dtype,
            "channels_last": channels_last,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of this class's constructor; subclasses add theirs."""
        return {
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "inference_mode": cfg.MODEL.INFERENCE.MODE,
            "inference_dtype": cfg.MODEL.INFERENCE.DTYPE,
            "channels_last": cfg.MODEL.INFERENCE.CHANNELS_LAST,
            "vis_period": cfg.VIS_PERIOD,
        }

    def set_network(self, network: nn.Module, decode: Callable[[Any], Any]) -> None:
        """Set what runs between images and losses or results; the last step of a constructor.

        Args:
            network: images (B, 3, H, W) → predictions. It is not registered as a submodule: its parts
                are already modules of the model.
            decode: in inference, predictions → tensors whose shapes do not depend on values, see
                :class:`InferenceNetwork`.
        """
        self._inference = (InferenceNetwork(network, decode, **self._inference_options),)

    def set_inference_network(self, network: InferenceNetwork) -> None:
        """Run ``network`` in inference, instead of that of :meth:`set_network`."""
        self._inference = (network,)

    @property
    def network(self) -> nn.Module:
        """Images → predictions, with the weights that are trained."""
        return self.inference_network.network

    def use_training_graphs(self) -> None:
        """From now on :meth:`forward` trains with CUDA graphs of the network."""
        self._training_graphs = (TrainingGraphs(self.network),)

    @property
    def inference_network(self) -> InferenceNetwork:
        """Network and decoding as :meth:`inference` runs them; benchmarks time it."""
        if not self._inference:
            raise RuntimeError(
                f"{type(self).__name__}'s constructor must end with set_network(...)."
            )
        return self._inference[0]

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Detectron2's contract.

        Args:
            batched_inputs: for each image a dict with ``image`` (3, h, w) in 0..255, any size;
                ``height``, ``width`` of the output (missing or None: of the image); in training
                ``instances`` and whatever else :meth:`encode_targets` reads.

        Returns:
            In training a dict of scalar losses; otherwise for each image a dict of results, see
            :meth:`postprocess`.

        Raises:
            KeyError: training inputs without ``instances``.
            RuntimeError: under ``torch.jit.trace``, which would keep the example's number of detections.
        """
        refuse_tracing(self)
        if not self.training:
            return self.inference(batched_inputs)
        self.check_annotated(batched_inputs)
        images, targets = self.training_batch(batched_inputs)
        network = self._training_graphs[0] if self._training_graphs else self.network
        predictions = network(images)
        self.put_picture(batched_inputs, images, targets, predictions)
        return self.losses(predictions, targets)

    @staticmethod
    def check_annotated(batched_inputs: list[dict[str, Any]]) -> None:
        """Raise KeyError for training inputs without ``instances``."""
        if not all("instances" in inputs for inputs in batched_inputs):
            raise KeyError(
                "Training needs `instances` for each image: the data mapper did not provide them "
                "(is it built with is_train=True, and has the data set annotations?)."
            )

    def put_picture(
        self, batched_inputs: list[dict[str, Any]], images: Tensor, targets: Any, predictions: Any
    ) -> None:
        """Put :meth:`draw_training`'s picture into the event storage, at ``VIS_PERIOD``."""
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            state = np.random.get_state()  # Detectron2's visualizer uses random colours
            with torch.no_grad():
                name, picture = self.draw_training(batched_inputs, images, targets, predictions)
            np.random.set_state(state)
            get_event_storage().put_image(name, picture)

    # Methods that a model implements, in the order in which they run

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Images of the inputs → the network's input, (B, 3, H, W), normalised."""
        raise NotImplementedError

    def network_state(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, ...]:
        """What the network gets in inference beside the images; nothing by default."""
        return ()

    def encode_targets(self, batched_inputs: list[dict[str, Any]], images: Tensor) -> Any:
        """Targets for the predictions on ``images`` (B, 3, H, W)."""
        raise NotImplementedError

    def losses(self, predictions: Any, targets: Any) -> dict[str, Tensor]:
        """Scalar losses, weighted."""
        raise NotImplementedError

    def postprocess(
        self, predictions: Any, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Decoded predictions → for each image Detectron2's results at the size of the output."""
        raise NotImplementedError

    def draw_training(
        self, batched_inputs: list[dict[str, Any]], images: Tensor, targets: Any, predictions: Any
    ) -> tuple[str, Tensor]:
        """Name and picture (3, h, w) in 0..1 of targets beside predictions, at ``VIS_PERIOD``."""
        raise NotImplementedError

    def export_form(self) -> ExportForm:
        """How network and decoding are exported; of a class without ``export_refusal``.

        Raises:
            NotExportable: this configuration cannot be exported.
        """
        raise NotImplementedError

    def training_batch(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, Any]:
        """The network's input when training, and its targets."""
        images = self.preprocess(batched_inputs)
        return images, self.encode_targets(batched_inputs, images)

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results of each image; see :meth:`postprocess`."""
        images = self.preprocess(batched_inputs)
        predictions = self.inference_network(images, *self.network_state(batched_inputs))
        return self.postprocess(predictions, batched_inputs)

    # Helpers for models

    def normalize(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) in 0..255 → pixel mean subtracted, divided by the deviation."""
        return (images - self.pixel_mean) / self.pixel_std

    def upload(self, inputs: dict[str, Any]) -> Tensor:
        """The input's image on the model's device, see :func:`d2ext.layers.transfer.upload`."""
        return upload(inputs["image"], self.device)

    def draw_pair(
        self, inputs: dict[str, Any], detections: Instances, *, masks: bool = False
    ) -> tuple[str, Tensor]:
        """Annotations beside detections on the image of ``inputs``, with keypoints and the vertices of
        faces' meshes where they have some; see :meth:`draw_training`."""
        from detectron2.utils.visualizer import Visualizer  # pulls in matplotlib

        image = inputs["image"].permute(1, 2, 0).clamp(0, 255).cpu()
        image = convert_image_to_rgb(image, self.input_format)
        annotations, detections = inputs["instances"].to("cpu"), detections.to("cpu")
        pictures = []
        for prefix, instances in (("gt", annotations), ("pred", detections)):
            shown = {"boxes": instances.get(f"{prefix}_boxes")}
            for field in ("keypoints", "masks") if masks else ("keypoints",):
                if instances.has(f"{prefix}_{field}"):
                    value = instances.get(f"{prefix}_{field}")
                    shown[field] = value.detach().numpy() if isinstance(value, Tensor) else value
            canvas = image.copy()
            if instances.has(f"{prefix}_face_meshes"):
                meshes = instances.get(f"{prefix}_face_meshes")
                _draw_dots(canvas, meshes[meshes.flatten(1).any(dim=1)])  # zeros: not annotated
            pictures.append(Visualizer(canvas).overlay_instances(**shown).get_image())
        joined = torch.from_numpy(np.concatenate(pictures, axis=1)).permute(2, 0, 1)
        return "Left: annotations. Right: detections", joined.float() / 255

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in self.RENAMED_PARAMETERS:
            for key in [key for key in state_dict if key.startswith(prefix + old)]:
                state_dict[prefix + new + key.removeprefix(prefix + old)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _draw_dots(image: np.ndarray, points: Tensor) -> None:
    """Paint the pixels of points (..., 2 or more: x, y) half green, so that small faces stay visible."""
    x, y = points[..., :2].reshape(-1, 2).detach().floor().long().numpy().T
    inside = (x >= 0) & (y >= 0) & (x < image.shape[1]) & (y < image.shape[0])
    x, y = x[inside], y[inside]
    image[y, x] = image[y, x] // 2 + np.array([0, 127, 0], image.dtype)


def image_size(inputs: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of an input's image."""
    height, width = inputs["image"].shape[-2:]
    return height, width


def output_size(inputs: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of an input's results; missing or None: the image's."""
    height, width = image_size(inputs)
    return inputs.get("height") or height, inputs.get("width") or width
