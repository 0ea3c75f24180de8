"""A ``GeneralizedRCNN`` with DensePose's heads in fixed slots, for exported files.

Detectron2's own inference gives each image another number of boxes; this one's boxes lie in fixed slots
(:mod:`d2ext.modeling.region_slots`), and the maps of those in use are rows of one tensor.

Letters: N images, R regions, T thing classes, D slots, n slots in use, C channels, S side of the maps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor, nn

from d2ext.codecs.densepose import EmbeddingPredictions
from d2ext.layers.transfer import upload
from d2ext.modeling.export_form import EXPORT_REGISTRY, ExportForm, NotExportable, Outputs
from d2ext.modeling.meta_arch import MetaArch, image_size
from d2ext.modeling.region_slots import EMPTY, SlotRPN, Slots, pool, select
from d2ext.systems.densepose.roi_heads import DensePoseROIHeads

# Before the name of a mesh, outputs with the embeddings of its vertices.
_VERTICES = "vertices_"


class RegionPredictions(NamedTuple):
    """Persons of a batch."""

    slots: Slots
    maps: dict[str, Tensor]
    """(N, n, C, S, S) by name, those of :class:`~d2ext.codecs.densepose.SurfacePredictions`."""
    vertices: dict[str, Tensor]
    """(N, V, D) by mesh, of embeddings."""


class SlotNetwork(nn.Module):
    """Backbone, RPN, box head and surfaces: an image (1, 3, H, W) and its size without padding (1, 2) →
    :class:`RegionPredictions`."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        heads: DensePoseROIHeads = model.roi_heads
        self.backbone, self.rpn = model.backbone, SlotRPN.of(model.proposal_generator)
        self.num_classes = heads.num_classes
        self.box_in_features, self.box_pooler = heads.box_in_features, heads.box_pooler
        self.box_head, self.box_predictor = heads.box_head, heads.box_predictor
        self.in_features, self.decoder = heads.densepose_in_features, heads.decoder
        self.pooler, self.head = heads.densepose_pooler, heads.densepose_head
        self.predictor, self.embedder = heads.densepose_predictor, heads.embedder

    def forward(self, images: Tensor, sizes: Tensor) -> RegionPredictions:
        assert images.shape[0] == 1
        features = self.backbone(images)
        slots = self.detect(features, sizes)
        used = (slots.scores[0] != EMPTY).nonzero()[:, 0]
        maps = [features[name] for name in self.in_features]
        maps = maps if self.decoder is None else [self.decoder(maps)]
        pooled = pool(self.pooler, maps, slots.boxes[0, used], torch.zeros_like(used))
        surfaces = self.predictor(self.head(pooled)).maps()
        vertices = {} if self.embedder is None else self.embedder()
        return RegionPredictions(
            slots,
            {name: x[None].float() for name, x in surfaces.items()},
            {name: x[None].float() for name, x in vertices.items()},
        )

    def detect(self, features: dict[str, Tensor], sizes: Tensor) -> Slots:
        """What Detectron2's RPN and ``fast_rcnn_inference`` find."""
        rpn, predictor = self.rpn, self.box_predictor
        proposals = rpn.find(features, *rpn.predict(features), sizes)
        shape, regions = proposals.logits.shape, proposals.boxes.flatten(0, 1)
        images = torch.arange(shape[0], device=regions.device).repeat_interleave(shape[1])
        maps = [features[name] for name in self.box_in_features]
        pooled = pool(self.box_pooler, maps, regions, images)
        logits, deltas = (x.float() for x in predictor(self.box_head(pooled)))
        scores = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=1)
        boxes = predictor.box2box_transform.apply_deltas(deltas, regions)
        there = (proposals.logits > -torch.inf).flatten()
        there &= boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
        # One box of all classes, or one each.
        boxes = boxes.view(*shape, -1, 4).expand(-1, -1, self.num_classes, -1)
        height, width = sizes[:, :, None, None].unbind(1)
        return select(
            rpn.clip(boxes, height, width),
            scores[:, :-1].masked_fill(~there[:, None], EMPTY).unflatten(0, shape),
            score_threshold=predictor.test_score_thresh,
            nms_threshold=predictor.test_nms_thresh,
            limit=predictor.test_topk_per_image,
            ties=0,
        )


def _unchanged(predictions: RegionPredictions) -> RegionPredictions:
    """The network's decoding; a function of the module, so that models can be pickled."""
    return predictions


@EXPORT_REGISTRY.register()
class ExportableDensePoseROIHeads(MetaArch):
    """Predicts what the model predicts; in inference alone, one image after the other."""

    export_refusal = ""

    def __init__(self, cfg: CfgNode, model: GeneralizedRCNN) -> None:
        """Args:
            cfg: its ``INPUT.MAX_SIZE_TEST`` says how large images are at most.
            model: with :class:`DensePoseROIHeads`.

        Raises:
            NotExportable: other heads, proposals or pooling than DensePose's.
        """
        super().__init__(
            pixel_mean=model.pixel_mean.flatten().tolist(),
            pixel_std=model.pixel_std.flatten().tolist(),
            input_format=model.input_format,
        )
        heads = model.roi_heads
        if heads.mask_on or heads.keypoint_on:
            raise NotExportable(
                "DensePose with a mask or keypoint head beside it cannot be exported so far: set "
                "MODEL.MASK_ON and MODEL.KEYPOINT_ON to False."
            )
        pooling = {
            type(x) for x in (heads.box_pooler, heads.densepose_pooler) for x in x.level_poolers
        }
        if type(model.proposal_generator) is not RPN or pooling != {ROIAlign}:
            raise NotExportable(
                "DensePose can be exported with MODEL.PROPOSAL_GENERATOR.NAME RPN and pooling by "
                "ROIAlign or ROIAlignV2, not with others."
            )
        if heads.box_predictor.test_topk_per_image < 1:
            raise NotExportable("A file has slots: set TEST.DETECTIONS_PER_IMAGE to their number.")
        self.model = model
        unit = max(model.backbone.size_divisibility, 1)
        self.unit, self.side = unit, -(-cfg.INPUT.MAX_SIZE_TEST // unit) * unit
        self.set_network(SlotNetwork(model), _unchanged)

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """As the model: normalised, padded with zeros at the bottom and right."""
        images: Tensor = self.model.preprocess_image(batched_inputs).tensor
        return images

    def network_state(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, ...]:
        """(N, 2) sizes without padding."""
        sizes = torch.tensor([image_size(x) for x in batched_inputs], dtype=torch.float32)
        return (upload(sizes, self.device),)

    def postprocess(
        self, predictions: RegionPredictions, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """``instances`` with ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_densepose``."""
        found, sizes = [], [image_size(x) for x in batched_inputs]
        for row, count in enumerate(predictions.slots.counts.tolist()):
            one = predictions.slots.instances(row, count, sizes[row])
            surfaces = self.model.roi_heads.densepose_predictor.RESULT(
                **{name: x[row, :count] for name, x in predictions.maps.items()}
            )
            if isinstance(surfaces, EmbeddingPredictions):
                vertices = {name: x[row] for name, x in predictions.vertices.items()}
                surfaces = dataclasses.replace(surfaces, vertices=vertices)
            one.pred_densepose = surfaces
            found.append(one)
        results: list[dict[str, Any]] = GeneralizedRCNN._postprocess(found, batched_inputs, sizes)
        return results

    def export_form(self) -> ExportForm:
        predictor = self.model.roi_heads.densepose_predictor
        embedder = self.model.roi_heads.embedder
        meshes = [] if embedder is None else embedder.mesh_names

        def pack(predictions: RegionPredictions) -> Outputs:
            vertices = {f"{_VERTICES}{name}": x for name, x in predictions.vertices.items()}
            return predictions.slots.outputs() | predictions.maps | vertices

        def unpack(outputs: Outputs) -> RegionPredictions:
            return RegionPredictions(
                Slots.of(outputs),
                {name: outputs[name] for name in predictor.names},
                {name: outputs[f"{_VERTICES}{name}"] for name in meshes},
            )

        return ExportForm(
            pack=pack,
            unpack=unpack,
            size=(self.side, self.side),
            multiple=self.unit,
            sizes=True,
            rows=tuple(predictor.names),
            results="densepose_embeddings" if meshes else "densepose",
        )
