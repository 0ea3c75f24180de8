"""VPSNet's network with all heads, as inference runs it: shapes do not depend on values.

Letters: B images, C channels of the pyramid, h×w cells of its finest level, D channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2ext.modeling.flow import FlowEstimator
from d2ext.systems.upsnet.network import UPSNetNetwork, drop_features
from d2ext.systems.vpsnet.head import FusionNeck, TrackHead, VPSNetPredictions, quarter_flow
from d2ext.systems.vpsnet.postprocess import with_dummy


class VPSNetNetwork(UPSNetNetwork):
    """Backbone, fusion, RPN head and semantic head: images → :class:`VPSNetPredictions`; in inference
    also the heads on regions.

    Args:
        published_dummy: see ``MODEL.VPSNET``.
        heads: arguments of the base class.
    """

    def __init__(
        self,
        *heads: Any,
        fusion: FusionNeck | None,
        track_head: TrackHead | None,
        published_dummy: bool,
    ) -> None:
        super().__init__(*heads)
        self.fusion = fusion
        self.track_head = track_head
        self.published_dummy = published_dummy

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        flow: Tensor | None = None,
        reference: Tensor | None = None,
        alone: Tensor | None = None,
    ) -> VPSNetPredictions:
        """Images (B, 3, H, W); those from ``flow`` on only with fusion.

        Args:
            sizes: see :class:`UPSNetNetwork`.
            flow: (B, 2, H, W), pixels, from the images to the frames before them; default: 0.
            reference: (B, C, h, w), ``gathered`` of the frames before; default: of the images.
            alone: (B,) bool: images that are their own reference; default: none.
        """
        features, gathered = self.backbone(images), None
        if self.fusion is not None:
            gathered = self.fusion.gather(features)
            flow = torch.zeros_like(images[:, :2]) if flow is None else flow
            reference = gathered if reference is None else reference
            if alone is not None:
                reference = torch.where(alone[:, None, None, None], gathered, reference)
            features = self.fusion(features, gathered, reference.to(gathered), quarter_flow(flow))
        semantic = self.semantic(features)
        predictions = VPSNetPredictions(features, *self.rpn.predict(features), semantic, gathered)
        return self.detect(predictions, sizes)

    def detect(self, predictions: Any, sizes: Tensor | None) -> Any:
        """Add ``candidates``, with their masks, and ``embeddings``."""
        if sizes is None or sizes.shape[0] == 0:
            return predictions
        features = predictions.features
        slots = self.select_candidates(*self.find(predictions, sizes))
        slots = with_dummy(slots) if self.published_dummy else slots
        (slots,) = self.roi_heads.add_masks(features, [slots])
        embeddings = None
        if self.track_head is not None:
            regions = self.track_head(self.roi_heads.pool_boxes(features, [*slots.boxes]))
            embeddings = regions.float().unflatten(0, slots.classes.shape)
        return predictions._replace(candidates=slots, embeddings=embeddings)


class FrameNetwork(nn.Module):
    """Optical flow and network in one, for exported files.

    Args:
        flow, network: of the model.
        rgb: images → what the flow takes; not a module, whose tensors half precision would round.
    """

    def __init__(
        self, flow: FlowEstimator, network: VPSNetNetwork, rgb: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.flow, self.network, self.rgb = flow, network, rgb

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        references: Tensor | None = None,
        gathered: Tensor | None = None,
    ) -> tuple[Tensor, VPSNetPredictions]:
        """Images (B, 3, H, W) and ``sizes``, see :class:`UPSNetNetwork` → the images and
        :class:`VPSNetPredictions`.

        Args:
            references, gathered: images of the frames before, and what they left; default: the images
                are those frames themselves.
        """
        shown = self.rgb(images)
        flow = self.flow(shown, shown if references is None else self.rgb(references))
        return images, self.network(images, sizes, flow, gathered)


def drop_frame_features(frame: tuple[Tensor, VPSNetPredictions]) -> Any:
    """:func:`drop_features` of what :class:`FrameNetwork` gives."""
    return frame[0], drop_features(frame[1])
