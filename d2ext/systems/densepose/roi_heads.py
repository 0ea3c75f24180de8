"""DensePose's branch beside the boxes of ``StandardROIHeads`` (arXiv 1802.00434; CSE: 2011.12438).

The meta-architecture is Detectron2's ``GeneralizedRCNN``. Training inputs have
``instances.gt_densepose`` (:class:`~d2ext.data.densepose.DensePoseAnnotations`), results
``instances.pred_densepose`` (:mod:`d2ext.codecs.densepose`).

Letters: R regions, C channels, s side of a pooled region, S side of the maps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from d2ext.codecs.densepose import EmbeddingPredictions, SurfacePredictions
from d2ext.modeling.export_form import refuse_tracing
from d2ext.systems.densepose.cse_losses import build_cse_loss
from d2ext.systems.densepose.embedder import Embedder
from d2ext.systems.densepose.head import DENSEPOSE_HEAD_REGISTRY, DensePoseDecoder
from d2ext.systems.densepose.losses import ChartLoss
from d2ext.systems.densepose.predictor import (
    DENSEPOSE_PREDICTOR_REGISTRY,
    DensePoseEmbeddingPredictor,
    SurfacePredictor,
)
from d2ext.systems.densepose.targets import DensePoseTargets, encode_targets, select_proposals


@ROI_HEADS_REGISTRY.register()
class DensePoseROIHeads(StandardROIHeads):
    """Boxes, and for each person maps of its surface.

    The branch for surfaces learns from annotated boxes, too; without
    ``MODEL.ROI_HEADS.PROPOSAL_APPEND_GT`` it alone does.
    """

    @configurable
    def __init__(
        self,
        *,
        densepose_in_features: Sequence[str],
        decoder: DensePoseDecoder | None,
        densepose_pooler: ROIPooler,
        densepose_head: nn.Module,
        densepose_predictor: SurfacePredictor,
        embedder: Embedder | None,
        densepose_criterion: Callable[..., dict[str, Tensor]],
        fg_iou_threshold: float = 0.7,
        trained_by_masks: bool = False,
        with_masks: bool = False,
        published_grid: bool = True,
        **roi_heads: Any,
    ) -> None:
        """Args:
        densepose_in_features: levels of the pyramid, finest first.
        decoder: makes one map of them; None: each region is pooled from its level.
        densepose_pooler: regions of these maps.
        densepose_head: (R, C, s, s) → (R, channels, s, s).
        densepose_predictor: → maps.
        embedder: with embeddings, of the vertices of meshes; None: charts.
        densepose_criterion: (predictions, targets) → losses; with embeddings, (predictions, targets,
            embeddings of the vertices by mesh).
        fg_iou_threshold: IoU with its person's box above which a proposal trains.
        trained_by_masks: instance masks train it.
        with_masks: losses need the instance masks beside it.
        published_grid: targets as published, half a cell off; see
            :func:`~d2ext.systems.densepose.targets.place_points`.
        roi_heads: of ``StandardROIHeads``.
        """
        super().__init__(**roi_heads)
        # Test-time augmentation turns it off to find boxes.
        self.densepose_on = True
        self.densepose_in_features = list(densepose_in_features)
        self.decoder = decoder
        self.densepose_pooler = densepose_pooler
        self.densepose_head = densepose_head
        self.densepose_predictor = densepose_predictor
        self.embedder = embedder
        self.densepose_criterion = densepose_criterion
        self.fg_iou_threshold = fg_iou_threshold
        self.trained_by_masks = trained_by_masks
        self.with_masks = with_masks
        self.published_grid = published_grid

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.ROI_DENSEPOSE_HEAD
        names = head.IN_FEATURES or cfg.MODEL.ROI_HEADS.IN_FEATURES
        levels = {name: input_shape[name] for name in names}
        channels, decoder = levels[names[0]].channels, None
        strides = [shape.stride for shape in levels.values()]
        if head.DECODER_ON:
            channels = head.DECODER_CONV_DIMS
            decoder = DensePoseDecoder(levels, channels=channels, norm=head.DECODER_NORM)
            strides = [decoder.stride]
        predictor = DENSEPOSE_PREDICTOR_REGISTRY.get(head.PREDICTOR_NAME)
        embeds = issubclass(predictor, DensePoseEmbeddingPredictor)
        return {
            **super().from_config(cfg, input_shape),
            "densepose_in_features": names,
            "decoder": decoder,
            "densepose_pooler": ROIPooler(
                output_size=head.POOLER_RESOLUTION,
                scales=[1 / stride for stride in strides],
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
                pooler_type=head.POOLER_TYPE,
            ),
            "densepose_head": DENSEPOSE_HEAD_REGISTRY.get(head.NAME)(
                channels,
                num_convs=head.NUM_STACKED_CONVS,
                channels=head.CONV_HEAD_DIM,
                kernel=head.CONV_HEAD_KERNEL,
            ),
            "densepose_predictor": predictor(cfg, head.CONV_HEAD_DIM),
            "embedder": Embedder(cfg) if embeds else None,
            "densepose_criterion": build_cse_loss(cfg) if embeds else build_chart_loss(cfg),
            "fg_iou_threshold": head.FG_IOU_THRESHOLD,
            "trained_by_masks": head.COARSE_SEGM_TRAINED_BY_MASKS,
            "with_masks": embeds and head.CSE.PIX_TO_SHAPE_CYCLE_LOSS.ENABLED,
            "published_grid": head.PUBLISHED_GRID,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As of ``StandardROIHeads``."""
        refuse_tracing(self)
        instances, losses = super().forward(images, features, proposals, targets)
        if self.training:
            if not self.proposal_append_gt:
                assert targets is not None
                instances = [
                    Instances.cat([x, annotated_boxes(own)]) if len(own) else x
                    for x, own in zip(instances, targets, strict=True)
                ]
            losses.update(self.densepose_losses(features, instances))
        return instances, losses

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """As of ``StandardROIHeads``; adds ``pred_densepose``."""
        instances = super().forward_with_given_boxes(features, instances)
        if self.densepose_on:
            predictions = self.predict(features, [x.pred_boxes for x in instances])
            if isinstance(predictions, EmbeddingPredictions) and self.embedder is not None:
                predictions = dataclasses.replace(predictions, vertices=self.embedder())
            start = 0
            for x in instances:
                x.pred_densepose = predictions[start : start + len(x)]
                start += len(x)
        return instances

    def maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        """What regions are pooled from."""
        levels = [features[name] for name in self.densepose_in_features]
        return levels if self.decoder is None else [self.decoder(levels)]

    def predict(self, features: dict[str, Tensor], boxes: list[Boxes]) -> SurfacePredictions:
        """Boxes of each image → predictions for all R of them."""
        pooled = self.densepose_pooler(self.maps(features), boxes)
        return self.densepose_predictor(self.densepose_head(pooled))

    def densepose_losses(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses of proposals with annotations. Without any they are 0, and all parameters get gradients
        of 0."""
        selected = select_proposals(
            proposals,
            num_classes=self.num_classes,
            iou_threshold=self.fg_iou_threshold,
            with_masks=self.trained_by_masks,
        )
        predictions = self.predict(features, [x.proposal_boxes for x in selected])
        targets = self.densepose_targets(selected, predictions)
        if self.embedder is None:
            return self.densepose_criterion(predictions, targets)
        return self.densepose_criterion(predictions, targets, self.embedder())

    def densepose_targets(
        self, selected: Sequence[Instances], predictions: SurfacePredictions
    ) -> DensePoseTargets:
        """Targets of selected proposals, for maps of the predictions' size."""
        return encode_targets(
            selected,
            predictions.coarse_segm.shape[-1],
            trained_by_masks=self.trained_by_masks,
            with_masks=self.with_masks,
            published_grid=self.published_grid,
        )


def annotated_boxes(targets: Instances) -> Instances:
    """The annotated boxes of an image as proposals, with all that is annotated."""
    annotations = {k: v for k, v in targets.get_fields().items() if k.startswith("gt_")}
    scores = targets.gt_boxes.tensor.new_zeros(len(targets))
    return Instances(
        targets.image_size,
        proposal_boxes=targets.gt_boxes,
        objectness_logits=scores,
        **annotations,
    )


def build_chart_loss(cfg: CfgNode) -> ChartLoss:
    """The losses of charts that a config describes."""
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    return ChartLoss(
        part_weight=head.PART_WEIGHTS,
        part_mask_weight=head.PART_MASK_WEIGHTS,
        coarse_weight=head.INDEX_WEIGHTS,
        background_weight=head.BACKGROUND_WEIGHT,
        uv_weight=head.POINT_REGRESSION_WEIGHTS,
        uv_confidence=head.UV_CONFIDENCE.TYPE if head.UV_CONFIDENCE.ENABLED else "",
        epsilon=head.UV_CONFIDENCE.EPSILON,
    )
