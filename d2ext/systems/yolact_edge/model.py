"""YolactEdge: YOLACT on videos, where most frames take their coarse features from a key frame
(arXiv 2012.12259).

A key frame goes through YOLACT's whole network and leaves its memory. Another frame goes through the
backbone up to the finest level; the flow net (``flow.py``) says where the key frame's coarser sums moved
to, and heads and post-processing are YOLACT's. Without a flow net (stage "image") this is YOLACT.

Letters: B videos in step, C channels of the pyramid, F of the flow features, S input side, h_l×w_l cells
of level l.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from d2ext.config import ConfigError
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.inference import InferenceNetwork
from d2ext.modeling.video import Inputs, VideoMetaArch, replace_rows, select_rows
from d2ext.systems.yolact.model import YOLACT
from d2ext.systems.yolact.postprocess import Detections
from d2ext.systems.yolact_edge.flow import FlowNet, Refinement
from d2ext.systems.yolact_edge.losses import flow_loss, flow_targets, warp_loss
from d2ext.systems.yolact_edge.networks import KeyNetwork, NonKeyNetwork, Sums

logger = logging.getLogger(__name__)

STAGES = ("image", "flow", "video")
_NEEDS = {
    "flow": 'Stage "flow" needs `{}` for each image: set INPUT.MAPPER to "FlowPairMapper" and '
    "DATASETS.TRAIN to pairs of images with flow, such as flying_chairs_train.",
    "video": 'Stage "video" needs `{}` for each frame: set INPUT.MAPPER to "ClipMapper" and '
    "DATASETS.TRAIN to videos with annotations.",
}


@dataclass
class YolactEdgeMemory:
    """What the key frames of B videos leave for the frames after them."""

    sums: list[Tensor]
    """For each level but the finest (B, C, h_l, w_l) float32: the pyramid's top-down sum."""
    flow_features: Tensor
    """(B, F, h_0, w_0): what :meth:`FlowNet.encode_key` gives."""
    key_frames: Tensor
    """(B,) int64, on the CPU: the number of the last key frame."""

    def tensors(self) -> list[Tensor]:
        """Those on the model's device."""
        return [self.flow_features, *self.sums]


class Carried(NamedTuple):
    """What one training step leaves for the next one."""

    lateral: Tensor
    """(B, C, h_0, w_0), the finest of the target frame."""
    sums: Sums
    """Of the target frame, through the whole network."""
    reference_lateral: Tensor
    """(B, C, h_0, w_0), the finest of the reference frame."""
    reference_sums: list[Tensor]
    """Of the reference frame, but for the finest level."""


@META_ARCH_REGISTRY.register()
class YolactEdge(YOLACT, VideoMetaArch):
    """YOLACT on images (no flow net), or on videos."""

    @configurable
    def __init__(
        self,
        *,
        stage: str = "image",
        flow_net: FlowNet | None = None,
        refinement: Refinement | None = None,
        key_interval: int = 5,
        key_phase: int = 0,
        test_all_phases: bool = False,
        min_similarity: float = -1.0,
        warp_weight: float = 1.0,
        published_warp_convs: bool = False,
        joint_images: bool = False,
        **yolact: Any,
    ) -> None:
        """Args:
        stage: "image", "flow" or "video": what is trained, see ``MODEL.YOLACT_EDGE.STAGE``.
        flow_net, refinement: None in stage "image".
        key_interval, key_phase, min_similarity: which frames are key frames.
        test_all_phases: evaluate in several passes, see :meth:`evaluation_passes`.
        warp_weight, published_warp_convs: see ``MODEL.YOLACT_EDGE``.
        joint_images: training inputs also hold images of another data set, without ``reference``.
        yolact: see :class:`YOLACT`.

        Raises:
            ConfigError: unknown stage, or a backbone that cannot run in part.
        """
        super().__init__(**yolact)
        if stage not in STAGES or (stage == "image") != (flow_net is None):
            raise ConfigError(
                f"MODEL.YOLACT_EDGE.STAGE is {stage!r}; it must be one of {STAGES}, and there is a flow "
                'net in all but "image".'
            )
        if key_interval < 1 or not 0 <= key_phase < key_interval:
            raise ConfigError(
                f"MODEL.YOLACT_EDGE.KEY_INTERVAL is {key_interval}, KEY_PHASE {key_phase}: the interval "
                "is at least 1, the phase at least 0 and below the interval."
            )
        self.stage = stage
        self.flow_net = flow_net
        self.refinement = refinement
        self.key_interval, self.key_phase = key_interval, key_phase
        self.test_all_phases = test_all_phases
        self.min_similarity = min_similarity
        self.warp_weight = warp_weight
        self.published_warp_convs = published_warp_convs
        video_steps = ("full",) if stage == "image" else ("full", "carried")
        # Optimizer steps of an iteration, each with its own losses.
        self.training_steps = (("images",) if joint_images else ()) + video_steps
        if stage == "flow" or self.training_steps == ("full",):
            self.training_steps = ()
        if flow_net is None:
            return
        if not hasattr(self.backbone.bottom_up, "stages"):
            raise ConfigError(
                f"{type(self.backbone.bottom_up).__name__} cannot run up to its finest feature alone: "
                'YolactEdge on videos needs a ResNet (MODEL.YOLACT.BOTTOM_UP "build_resnet_backbone"); '
                'with others it is for images (MODEL.YOLACT_EDGE.STAGE "image").'
            )
        self.set_network(
            KeyNetwork(self.backbone, self.head, flow_net),
            lambda raw: (*self._decode(raw[0]), *raw[1]),
        )
        non_key = NonKeyNetwork(
            self.backbone, self.head, flow_net, refinement, compare=min_similarity > -1
        )
        self.set_later_network(
            InferenceNetwork(
                non_key, lambda raw: (*self._decode(raw[0]), raw[1]), **self._inference_options
            )
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        edge = cfg.MODEL.YOLACT_EDGE
        if edge.STAGE != "image":
            if not cfg.MODEL.WEIGHTS:
                logger.warning(
                    "MODEL.WEIGHTS is empty: a training in stage %r would freeze a random backbone. It "
                    'starts from the weights of stage "image".',
                    edge.STAGE,
                )
            channels = cfg.MODEL.YOLACT.FPN_CHANNELS
            levels = len(cfg.MODEL.YOLACT.IN_FEATURES)
            arguments["flow_net"] = FlowNet(
                channels,
                num_levels=levels,
                width=edge.FLOW_CHANNELS,
                published_init=edge.PUBLISHED_FLOW_INIT,
            )
            if edge.REFINEMENT:
                arguments["refinement"] = Refinement(channels, levels - 1)
        return {
            **arguments,
            "stage": edge.STAGE,
            "key_interval": edge.KEY_INTERVAL,
            "key_phase": edge.KEY_PHASE,
            "test_all_phases": edge.TEST_ALL_PHASES,
            "min_similarity": edge.MIN_SIMILARITY,
            "warp_weight": edge.WARP_WEIGHT,
            "published_warp_convs": edge.PUBLISHED_WARP_CONVS,
            "joint_images": bool(cfg.DATASETS.TRAIN_JOINT),
        }

    @property
    def has_memory(self) -> bool:
        """Only with a flow net."""
        return self.flow_net is not None

    @property
    def num_memory(self) -> int:
        """Tensors of the memory, the last ones that :attr:`inference_network` returns."""
        return len(self.backbone.levels)

    @property
    def non_key_network(self) -> InferenceNetwork:
        """Network and decoding of the frames between key frames; benchmarks time it."""
        if not self._later_network:
            raise RuntimeError('Stage "image" has no network for frames between key frames.')
        return self._later_network[0]

    def export_form(self) -> ExportForm:
        """As of YOLACT; with a flow net of key frames, and of the frames between them as ``later``."""
        form = super().export_form()
        if self.flow_net is None:
            return form
        coarser = [f"memory_sum_{level}" for level in self.backbone.levels[1:]]
        names = ("memory_flow_features", *coarser)
        count = self.num_memory

        def pack(decoded: tuple[Tensor, ...]) -> Outputs:
            memory = (x.float() for x in decoded[-count:])
            return form.pack(decoded[:-count]) | dict(zip(names, memory, strict=True))

        def pack_later(decoded: tuple[Tensor, ...]) -> Outputs:
            *own, similarity = decoded
            outputs = form.pack(tuple(own))
            return outputs if similarity is None else outputs | {"similarity": similarity}

        return dataclasses.replace(
            form,
            pack=pack,
            unpack=lambda x: (*form.unpack(x), *(x[name] for name in names)),
            later=dataclasses.replace(
                form,
                pack=pack_later,
                unpack=lambda x: (*form.unpack(x), x.get("similarity")),
                network=self.non_key_network,
                memory=names,
            ),
        )

    # Training

    def train(self, mode: bool = True) -> "YolactEdge":
        """Of a model with a flow net, what is not trained stays in evaluation mode.

        Frozen are the backbone and the sums; in stage "flow" everything but the flow net, whose scale
        and bias have no loss there; in stage "video" the finest flow, which nothing uses.
        """
        super().train(mode)
        if self.flow_net is None or not mode:
            return self
        flow_net, backbone = self.flow_net, self.backbone
        if self.stage == "flow":
            trained = [flow_net.reduce, flow_net.encoder, flow_net.up_features, flow_net.up_flow]
            trained += [flow_net.flow]
        else:
            trained = [flow_net.reduce, flow_net.encoder, self.head]
            trained += [*flow_net.flow[1:], *flow_net.scale[1:], *flow_net.bias[1:]]
            trained += [*flow_net.up_features[1:], *flow_net.up_flow[1:]]
            trained += [] if self.refinement is None else [self.refinement]
            trained += [getattr(backbone, f"output{level}") for level in backbone.levels]
            trained += [getattr(backbone, f"downsample{level}") for level in backbone.extra_levels]
        self.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        backbone.bottom_up.eval()
        return self

    def check_training_inputs(self, inputs: Inputs) -> None:
        """Raise ConfigError where the data mapper does not give what the stage is trained with."""
        wanted = {"flow": ("flow",), "video": ("instances", "reference")}.get(self.stage, ())
        for key in wanted:
            if not all(key in x or x.get("joint") for x in inputs):
                raise ConfigError(_NEEDS[self.stage].format(key))

    def forward(self, batched_inputs: Inputs, step: str = "", carried: Any = None) -> Any:
        """See :class:`MetaArch`.

        With ``step``, one of ``training_steps``: its losses and what the next step takes as ``carried``.
        Without, a model with such steps gives the losses of all, as ``<step>/<loss>``.
        """
        if step or self.training:
            self.check_training_inputs(batched_inputs)
        if step:
            return self._training_step(batched_inputs, step, carried)
        if not self.training or (self.stage == "image" and not self.training_steps):
            return super().forward(batched_inputs)
        if self.stage == "flow":
            return self._flow_losses(batched_inputs)
        result: dict[str, Tensor] = {}
        for name in self.training_steps:
            losses, carried = self._training_step(batched_inputs, name, carried)
            result |= {f"{name}/{key}": value for key, value in losses.items()}
        return result

    def _training_step(
        self, batched_inputs: Inputs, step: str, carried: Carried | None
    ) -> tuple[dict[str, Tensor], Any]:
        """One optimizer step of an iteration (yolact_edge/NOTES.md §4).

        "images": of the joint images through the whole network. "full": of the target frames through the
        whole network. "carried": of the target frames with features of their reference frames.
        """
        joint = step == "images"
        inputs = [x for x in batched_inputs if bool(x.get("joint")) == joint]
        if self.stage == "image":
            losses = super().forward(inputs)
            assert isinstance(losses, dict)
            return losses, None
        if step == "carried":
            assert carried is not None
            return self._carried_losses(inputs, carried), None
        network = self.network
        assert isinstance(network, KeyNetwork)
        images = self.preprocess(inputs)
        with torch.no_grad():  # frozen
            laterals, sums = network.pyramid(images)
        targets = self.encode_targets(inputs, images)
        losses = self.losses(network.predict(sums), targets)
        if joint:
            return losses, None
        with torch.no_grad():
            references = self.preprocess([x["reference"] for x in inputs])
            reference_laterals, reference_sums = network.pyramid(references)
        finest, *coarser = sorted(sums)
        return losses, Carried(
            laterals[finest],
            sums,
            reference_laterals[finest],
            [reference_sums[level] for level in coarser],
        )

    def _carried_losses(self, inputs: Inputs, carried: Carried) -> dict[str, Tensor]:
        """Losses of the target frames through the network of frames between key frames."""
        non_key = self.non_key_network.network
        assert isinstance(non_key, NonKeyNetwork) and self.flow_net is not None
        features = self.flow_net.features
        sums = non_key.carried_sums(
            carried.lateral,
            features(carried.lateral),
            self.flow_net.encode_key(features(carried.reference_lateral)),
            carried.reference_sums,
        )
        predictions = non_key.predict(sums)
        targets = self.encode_targets(inputs, carried.lateral)
        self.put_picture(inputs, carried.lateral, targets, predictions)
        losses = self.losses(predictions, targets)
        if self.warp_weight > 0:
            backbone, coarser = self.backbone, sorted(sums)[1:]
            names = list(coarser)
            if self.published_warp_convs and len(coarser) == 2:
                names[1] = backbone.levels[0]
            loss = warp_loss(
                [sums[level] for level in coarser],
                [carried.sums[level] for level in coarser],
                [getattr(backbone, f"output{level}") for level in names],
            )
            losses["loss_warp"] = self.warp_weight * loss
        return losses

    def _flow_losses(self, inputs: Inputs) -> dict[str, Tensor]:
        """Stage "flow": the error of all flows; the first image plays the current frame."""
        non_key = self.non_key_network.network
        assert isinstance(non_key, NonKeyNetwork) and self.flow_net is not None
        with torch.no_grad():
            current, key = (
                non_key.finest_lateral(self.preprocess(images))
                for images in (inputs, [x["reference"] for x in inputs])
            )
        encoded = self.flow_net.encode_key(self.flow_net.features(key))
        motions = self.flow_net(self.flow_net.features(current), encoded, finest=0)
        losses = []
        for i, x in enumerate(inputs):  # whose flows may differ in size
            flow, valid = x["flow"].to(self.device)[None], x["flow_valid"].to(self.device)[None]
            flows = [motion.flow[i : i + 1] for motion in motions.values()]
            losses.append(flow_loss(flows, flow_targets(flow.float()), valid))
        return {"loss_flow": torch.stack(losses).mean()}

    # Inference

    def evaluation_passes(self) -> Iterator[int]:
        """Prepare the model for each pass of an evaluation (yolact_edge/NOTES.md §5)."""
        configured = self.key_phase
        several = self.test_all_phases and self.has_memory
        try:
            for phase in range(self.key_interval) if several else [configured]:
                self.key_phase = phase
                yield phase
        finally:
            self.key_phase = configured

    @torch.no_grad()
    def step(
        self, inputs: Inputs, memory: YolactEdgeMemory | None
    ) -> tuple[list[dict[str, Any]], YolactEdgeMemory | None]:
        """One frame of each of B videos; see :class:`VideoMetaArch`.

        Outputs also have ``key_distance``: frames since the key frame, 0 for a key frame.
        """
        images = self.preprocess(inputs)
        if self.flow_net is None:
            return self.postprocess(self.inference_network(images), inputs), None
        numbers = [x.get("frame") or 0 for x in inputs]
        key = [i for i in range(len(inputs)) if self._is_key(inputs[i], i, memory)]
        others = [i for i in range(len(inputs)) if i not in key]
        raw: list[Tensor] = []
        if others:
            assert memory is not None
            rows = memory.tensors()
            if key:
                rows = select_rows(rows, others)
            *raw, similarity = self.non_key_network(_rows(images, others), *rows)
            if self.min_similarity > -1:
                low = (similarity < self.min_similarity).tolist()
                key = sorted([*key, *(i for i, x in zip(others, low, strict=True) if x)])
                raw = select_rows(raw, [j for j, x in enumerate(low) if not x])
                others = [i for i in others if i not in key]
        if key:
            results = self.inference_network(_rows(images, key))
            raw, memory = self._join(raw, others, results, key, numbers, memory)
        assert memory is not None
        outputs = self.postprocess(tuple(raw), inputs)
        for output, number, last in zip(outputs, numbers, memory.key_frames.tolist(), strict=True):
            output["key_distance"] = number - last
        return outputs, memory

    def postprocess(
        self, predictions: tuple[Tensor, ...], batched_inputs: Inputs
    ) -> list[dict[str, Any]]:
        """As :class:`YOLACT`; what follows the decoded predictions is left out."""
        return super().postprocess(predictions[: len(Detections._fields) + 1], batched_inputs)

    def _is_key(self, inputs: dict[str, Any], row: int, memory: YolactEdgeMemory | None) -> bool:
        frame = inputs.get("frame")
        if memory is None or inputs.get("is_first") or frame is None:
            return True
        if inputs.get("key_frame") is not None:
            return bool(inputs["key_frame"])
        since = frame - int(memory.key_frames[row])
        if frame < self.key_phase or since >= self.key_interval:
            return True
        return (frame - self.key_phase) % self.key_interval == 0

    def _join(
        self,
        raw: list[Tensor],
        others: list[int],
        results: Sequence[Tensor],
        key: list[int],
        numbers: list[int],
        memory: YolactEdgeMemory | None,
    ) -> tuple[list[Tensor], YolactEdgeMemory]:
        """Decoded predictions of key frames and others in the order of the videos, and the memory."""
        count = len(results) - self.num_memory
        decoded, new = list(results[:count]), list(results[count:])
        key_numbers = torch.tensor([numbers[i] for i in key])
        if memory is None or len(key) == len(numbers):
            return decoded, YolactEdgeMemory(new[1:], new[0], key_numbers)
        features, *sums = replace_rows(memory.tensors(), key, new)
        (frames,) = replace_rows([memory.key_frames], key, [key_numbers])
        if others:
            order = [*others, *key]
            places = sorted(range(len(order)), key=lambda i: order[i])
            joined = [torch.cat(pair) for pair in zip(raw, decoded, strict=True)]
            decoded = select_rows(joined, places)
        return decoded, YolactEdgeMemory(sums, features, frames)


def _rows(images: Tensor, rows: list[int]) -> Tensor:
    return images if len(rows) == len(images) else select_rows([images], rows)[0]
