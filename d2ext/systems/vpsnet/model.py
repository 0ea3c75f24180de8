"""VPSNet: panoptic segmentation of videos (arXiv 2006.11339).

UPSNet on pairs of frames. Optical flow (:mod:`d2ext.modeling.flow`) leads from a frame to the one
before; features of that one are warped by it and fused with the frame's own
(:class:`~.head.FusionNeck`). What UPSNet's box head sees of an object is also matched with the objects
of earlier frames (:class:`~.head.TrackHead`, :func:`~.postprocess.track`), so that it keeps its id.
Either part can be left out: the paper's variants Fuse, Track and FuseTrack.

Letters: B videos in step, C channels of the pyramid, h×w cells of its finest level, H×W network input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from d2ext.checkpoint.flow import load_flow_weights
from d2ext.config import ConfigError
from d2ext.modeling.export_form import ExportForm, NotExportable, Outputs
from d2ext.modeling.flow import FlowEstimator, build_flow
from d2ext.modeling.inference import InferenceNetwork
from d2ext.modeling.meta_arch import image_size, output_size
from d2ext.modeling.region_slots import Slots
from d2ext.modeling.video import Inputs, VideoMetaArch
from d2ext.systems.upsnet.head import SemanticPredictions
from d2ext.systems.upsnet.model import EXPORTED_OPTIONS, UPSNet
from d2ext.systems.upsnet.network import drop_features
from d2ext.systems.vpsnet import losses as L
from d2ext.systems.vpsnet import targets as T
from d2ext.systems.vpsnet.head import (
    STRIDE,
    FusionNeck,
    TrackHead,
    VPSNetPredictions,
    match_logits,
)
from d2ext.systems.vpsnet.network import FrameNetwork, VPSNetNetwork, drop_frame_features
from d2ext.systems.vpsnet.postprocess import ObjectMemory, VPSNetPostprocessor, track


@dataclass(frozen=True)
class VPSNetMemory:
    """What the results of the next frames of B videos depend on."""

    images: Tensor
    """(B, 3, H, W) network input of the last frames; in a file's form, if the model is one."""
    gathered: Tensor | None
    """(B, C, h, w), see :class:`VPSNetPredictions`."""
    sizes: list[tuple[int, int]]
    """B × (height, width) of the last frames without padding."""
    objects: list[ObjectMemory]
    """Those of each video; empty without track head."""


def _fit(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (..., h, w) cropped, or padded with zeros, at the bottom and right to ``size``."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    height, width = (after - before for after, before in zip(size, maps.shape[-2:], strict=True))
    return F.pad(maps, (0, width, 0, height))


def _unchanged(flow: Tensor) -> Tensor:
    """The flow network's decoding; a function of the module, so that models can be pickled."""
    return flow


def _rgb(images: Tensor, mean: Tensor, deviation: Tensor, input_format: str) -> Tensor:
    """See :meth:`VPSNet.rgb`."""
    images = images * deviation + mean
    return images.flip(1) if input_format == "BGR" else images


# Outputs of an exported frame that the next one takes.
_MEMORY = ("memory_images", "memory_gathered")


@META_ARCH_REGISTRY.register()
class VPSNet(UPSNet, VideoMetaArch):
    """VPSNet."""

    postprocessor_class = VPSNetPostprocessor
    read_targets = staticmethod(T.read_targets)

    @configurable
    def __init__(
        self,
        *,
        flow: FlowEstimator | None = None,
        fusion: FusionNeck | None = None,
        track_head: TrackHead | None = None,
        match_loss_weight: float = 0.5,
        match_weights: Sequence[float] = (1.0, 2.0, 10.0),
        max_objects: int = 1000,
        own_flow: bool = False,
        **upsnet: Any,
    ) -> None:
        """Args:
        flow, fusion: both or none. The flow is frozen.
        own_flow: the flow network has its weights already: those of a checkpoint are ignored.
        track_head: None: objects get no ids.
        match_loss_weight, match_weights, max_objects: see ``MODEL.VPSNET``.
        upsnet: see :class:`UPSNet`.
        """
        super().__init__(**upsnet)
        if (flow is None) != (fusion is None):
            raise ValueError("Fusion and optical flow go together.")
        self.fusion = fusion
        self.track_head = track_head
        self.match_loss_weight = match_loss_weight
        self.match_weights = tuple(match_weights)
        self.max_objects = max_objects
        self.set_network(
            VPSNetNetwork(
                *self.network_parts(),
                fusion=fusion,
                track_head=track_head,
                published_dummy=self.postprocessor.dummy,
            ),
            drop_features,
        )
        self.flow = None if flow is None else flow.requires_grad_(False).eval()
        self.own_flow = own_flow or (flow is not None and not any(True for _ in flow.parameters()))
        self._flow_network: tuple[InferenceNetwork, ...] = ()
        if flow is not None and flow.follows_inference_mode:
            self._flow_network = (InferenceNetwork(flow, _unchanged, **self._inference_options),)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        vpsnet = cfg.MODEL.VPSNET
        shapes = arguments["backbone"].output_shape()
        channels = shapes[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        if vpsnet.FUSION:
            arguments["flow"] = build_flow(cfg)
            if cfg.MODEL.FLOW.WEIGHTS:
                load_flow_weights(arguments["flow"], cfg.MODEL.FLOW.WEIGHTS)
                arguments["own_flow"] = True
            arguments["fusion"] = FusionNeck(
                channels,
                max_displacement=vpsnet.MAX_DISPLACEMENT,
                published_warp=vpsnet.PUBLISHED_WARP,
            )
        if vpsnet.TRACK:
            cells = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION**2
            arguments["track_head"] = TrackHead(channels * cells, vpsnet.TRACK_FC_DIM)
        return {
            **arguments,
            "match_loss_weight": vpsnet.MATCH_LOSS_WEIGHT,
            "match_weights": vpsnet.MATCH_WEIGHTS,
            "max_objects": vpsnet.MAX_OBJECTS,
        }

    @property
    def has_memory(self) -> bool:
        """With fusion, track head or both; without, each frame is on its own."""
        return self.fusion is not None or self.track_head is not None

    @property
    def gives_ids(self) -> bool:  # type: ignore[override]
        """Only with a track head; a tracker can give ids otherwise."""
        return self.track_head is not None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.own_flow and self.flow is not None:
            for key in [key for key in state_dict if key.startswith(f"{prefix}flow.")]:
                del state_dict[key]
            state_dict.update(self.flow.state_dict(prefix=f"{prefix}flow."))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def rgb(self, images: Tensor) -> Tensor:
        """Network input (B, 3, H, W) → RGB in 0..255, what the flow network takes."""
        return _rgb(images, self.pixel_mean, self.pixel_std, self.input_format)

    def predict_flow(self, images: Tensor, references: Tensor, inputs: Inputs) -> Tensor:
        """(B, 2, H, W) pixels from network inputs (B, 3, H, W) to others."""
        assert self.flow is not None
        images, references = self.rgb(images), self.rgb(references)
        if self._flow_network:
            network = self.flow if self.training else self._flow_network[0]
            return network(images, references)
        # What is no network works on the image alone: padding has no flow.
        flow = torch.zeros_like(images[:, :2])
        for i, x in enumerate(inputs):
            height, width = self.network_size(image_size(x))
            inside = (slice(i, i + 1), slice(None), slice(height), slice(width))
            flow[inside] = self.flow(images[inside], references[inside], [x])
        return flow

    # Training

    def train(self, mode: bool = True) -> VPSNet:
        """Batch norms stay in evaluation mode: their statistics are those of the image model.

        Their weights are trained (vpsnet/NOTES.md, Network).
        """
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def check_training_inputs(self, inputs: Inputs) -> None:
        """Raise ConfigError where the data mapper does not give pairs of frames."""
        if not all("reference" in x for x in inputs):
            raise ConfigError(
                "VPSNet trains on pairs of frames and these samples have no `reference`: set "
                'INPUT.MAPPER to "ClipMapper".'
            )

    def forward(self, batched_inputs: Inputs) -> Any:
        """See :class:`MetaArch`; training inputs have ``reference``, the dict of another frame."""
        if not self.training:
            return super().forward(batched_inputs)
        self.check_training_inputs(batched_inputs)
        self.check_annotated(batched_inputs)
        images, targets = self.training_batch(batched_inputs)
        references = self.preprocess([x["reference"] for x in batched_inputs])
        reference_features = self.backbone(references)
        fusing: tuple[Tensor, ...] = ()
        if self.fusion is not None:
            flow = self.predict_flow(images, references, batched_inputs)
            fusing = flow, self.fusion.gather(reference_features)
        predictions = self.network(images, None, *fusing)._replace(reference=reference_features)
        self.put_picture(batched_inputs, images, targets, predictions)
        return self.losses(predictions, targets)

    def region_losses(
        self,
        predictions: Any,
        regions: list[Instances],
        targets: Sequence[Any],
    ) -> dict[str, Tensor]:
        """Also ``loss_match``: regions of the fused frame against annotated boxes of the other one."""
        losses = super().region_losses(predictions, regions, targets)
        if self.track_head is None:
            return losses
        positive, _ = select_foreground_proposals(regions, self.roi_heads.num_classes)
        embeddings = self.embed(predictions.features, [x.proposal_boxes.tensor for x in positive])
        objects = self.embed(predictions.reference, [x.reference_boxes for x in targets])
        pairs = zip(embeddings, objects, strict=True)
        loss = L.match_loss(
            [match_logits(*pair) for pair in pairs],
            [T.match_targets(x.gt_index, t) for x, t in zip(positive, targets, strict=True)],
        )
        losses["loss_match"] = loss * self.match_loss_weight
        return losses

    def panoptic_cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :func:`losses.panoptic_loss`."""
        return L.panoptic_loss(logits, target)

    def embed(self, features: dict[str, Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Boxes (n, 4) of each image → their embeddings (n, D)."""
        assert self.track_head is not None
        embeddings = self.track_head(self.roi_heads.pool_boxes(features, boxes))
        return embeddings.split([len(x) for x in boxes])

    # Inference

    @torch.no_grad()
    def step(
        self, inputs: Inputs, memory: VPSNetMemory | None
    ) -> tuple[list[dict[str, Any]], VPSNetMemory]:
        """One frame of each of B videos; see :class:`VideoMetaArch`.

        A frame of another size than the one before is fused with itself; objects keep their ids.
        """
        images = self.preprocess(inputs)
        sizes = [self.network_size(image_size(x)) for x in inputs]
        first = [memory is None or bool(x.get("is_first")) for x in inputs]
        images, predictions = self._predict(images, sizes, first, inputs, memory)
        outputs, objects = [], []
        for i, (candidates, embeddings) in enumerate(self._candidates(predictions, sizes)):
            if embeddings is not None:
                known = None if memory is None or first[i] else memory.objects[i]
                candidates.track_ids, known = self._track(candidates, embeddings, known)
                objects.append(known)
            outputs.append(self._result(predictions, i, candidates, inputs[i]))
        return outputs, VPSNetMemory(images, predictions.gathered, sizes, objects)

    def _predict(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        first: list[bool],
        inputs: Inputs,
        memory: VPSNetMemory | None,
    ) -> tuple[Tensor, VPSNetPredictions]:
        """The network on frames and, with fusion, the frames before them; and the images that the next
        frames are compared with."""
        state = self.network_state(inputs)
        if self.fusion is None:
            return images, self.inference_network(images, *state)
        if memory is None or memory.gathered is None:
            alone = [True] * len(images)
        else:
            alone = [x or a != b for x, a, b in zip(first, sizes, memory.sizes, strict=True)]
        if self._later_network:
            return self._predict_apart(images, state[0], alone, memory)
        own = torch.tensor(alone, dtype=torch.bool, device=images.device)
        cells = [x // STRIDE for x in images.shape[-2:]]
        if memory is None or memory.gathered is None:
            references = images
            gathered = images.new_zeros((len(images), self.fusion.channels, *cells))
        else:
            # The padding may have changed with the other videos' frames.
            last = _fit(memory.images, images.shape[-2:])
            references = torch.where(own[:, None, None, None], images, last)
            gathered = _fit(memory.gathered, cells)
        flow = self.predict_flow(images, references, inputs)
        return images, self.inference_network(images, *state, flow, gathered, own)

    def _predict_apart(
        self, images: Tensor, sizes: Tensor, alone: list[bool], memory: VPSNetMemory | None
    ) -> tuple[Tensor, VPSNetPredictions]:
        """As :meth:`_predict`, by a file for frames that are their own reference and one for others."""
        parts = []
        for i, own in enumerate(alone):
            frame = images[i : i + 1], sizes[i : i + 1]
            if own:
                parts.append(self.inference_network(*frame))
            else:
                assert memory is not None and memory.gathered is not None
                last = memory.images[i : i + 1], memory.gathered[i : i + 1]
                parts.append(self._later_network[0](*frame, *last))
        return tree_map(lambda *x: None if x[0] is None else torch.cat(x), *parts)

    def _track(
        self, candidates: Instances, embeddings: Tensor, objects: ObjectMemory | None
    ) -> tuple[Tensor, ObjectMemory]:
        """See :func:`~.postprocess.track`; None: the video begins."""
        objects = objects or ObjectMemory.empty(embeddings.shape[1], embeddings.device)
        options: dict[str, Any] = {"weights": self.match_weights, "limit": self.max_objects}
        return track(candidates, embeddings, objects, **options)

    def _candidates(
        self, predictions: Any, sizes: list[tuple[int, int]]
    ) -> list[tuple[Instances, Tensor | None]]:
        """Candidates of the panoptic head, with mask logits, of each frame; and their embeddings."""
        predictions = self.with_regions(predictions, sizes)
        slots, embeddings = predictions.candidates, predictions.embeddings
        return [
            (slots.instances(i, n, size), None if embeddings is None else embeddings[i, :n])
            for i, (n, size) in enumerate(zip(slots.counts.tolist(), sizes, strict=True))
        ]

    def stages(self, inputs: Inputs) -> dict[str, Callable[[], Any]]:
        """Parts of :meth:`step` by name, for benchmarks: each computes one, again with every call."""
        images = self.preprocess(inputs)
        sizes = [self.network_size(image_size(x)) for x in inputs]
        first = [True] * len(inputs)
        _, predictions = self._predict(images, sizes, first, inputs, None)
        candidates = self._candidates(predictions, sizes)
        stages: dict[str, Callable[[], Any]] = {"preprocess": lambda: self.preprocess(inputs)}
        if self.fusion is not None:
            stages["flow"] = lambda: self.predict_flow(images, images, inputs)
            flow, gathered = self.predict_flow(images, images, inputs), predictions.gathered
            own = torch.ones(len(images), dtype=torch.bool, device=images.device)
            state = *self.network_state(inputs), flow, gathered, own
        else:
            state = self.network_state(inputs)
        stages["network"] = lambda: self.inference_network(images, *state)
        stages["choice"] = lambda: self._candidates(predictions, sizes)
        if self.track_head is not None:
            stages["tracking"] = lambda: [self._track(*x, None) for x in candidates]
        stages["results"] = lambda: [
            self._result(predictions, i, candidates[i][0], x) for i, x in enumerate(inputs)
        ]
        return stages

    def postprocess(self, predictions: Any, batched_inputs: Inputs) -> list[dict[str, Any]]:
        """Results of frames as of videos of their own: without ids."""
        sizes = [self.network_size(image_size(x)) for x in batched_inputs]
        candidates = self._candidates(predictions, sizes)
        return [
            self._result(predictions, i, candidates[i][0], inputs)
            for i, inputs in enumerate(batched_inputs)
        ]

    def _result(
        self,
        predictions: VPSNetPredictions,
        row: int,
        candidates: Instances,
        inputs: dict[str, Any],
    ) -> dict[str, Any]:
        score, scales = predictions.semantic.score[row], self.output_scales(inputs)
        return self.postprocessor(score, candidates, candidates, output_size(inputs), scales)

    def export_form(self) -> ExportForm:
        """A frame's candidates, scores and embeddings; with fusion of a frame that is its own reference,
        and of one after another as ``later``."""
        if self.flow is not None and not self._flow_network:
            raise NotExportable(
                f"VPSNet with optical flow by {type(self.flow).__name__} cannot be exported: that is "
                "estimated outside of the network, of an image without its padding. With FlowNet2 or "
                "PyramidFlow (MODEL.FLOW.NAME, MODEL.FLOW.WEIGHTS) it can."
            )

        def pack(predictions: VPSNetPredictions) -> Outputs:
            assert predictions.candidates is not None
            outputs = predictions.candidates.outputs()
            if predictions.embeddings is not None:
                outputs["embeddings"] = predictions.embeddings
            return outputs | {"semantic": predictions.semantic.score.float()}

        def unpack(outputs: Outputs) -> VPSNetPredictions:
            score = outputs["semantic"]
            return VPSNetPredictions(
                features={},
                logits=[],
                deltas=[],
                semantic=SemanticPredictions(score[:, :0], score),
                gathered=outputs.get(_MEMORY[1]),
                candidates=Slots.of(outputs),
                embeddings=outputs.get("embeddings"),
            )

        names = (*EXPORTED_OPTIONS, "published_id_lookup")
        form = dataclasses.replace(
            super().export_form(),
            pack=pack,
            unpack=unpack,
            results="vpsnet",
            options={
                **{name: getattr(self.postprocessor, name) for name in names},
                "match_weights": list(self.match_weights),
                "max_objects": self.max_objects,
            },
        )
        if self.flow is None:
            return form

        def pack_frame(frame: tuple[Tensor, VPSNetPredictions]) -> Outputs:
            images, predictions = frame
            assert predictions.gathered is not None
            memory = images.float(), predictions.gathered.float()
            return pack(predictions) | dict(zip(_MEMORY, memory, strict=True))

        assert isinstance(self.network, VPSNetNetwork)
        scale = {"mean": self.pixel_mean, "deviation": self.pixel_std}
        rgb = partial(_rgb, **scale, input_format=self.input_format)
        network = FrameNetwork(self.flow, self.network, rgb)
        form = dataclasses.replace(
            form,
            pack=pack_frame,
            unpack=lambda outputs: (outputs[_MEMORY[0]], unpack(outputs)),
            network=InferenceNetwork(network, drop_frame_features),
        )
        return dataclasses.replace(form, later=dataclasses.replace(form, memory=_MEMORY))


__all__ = ["VPSNet", "VPSNetMemory"]
