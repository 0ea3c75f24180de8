"""YolactEdge's networks: of key frames, and of the frames between (arXiv 2012.12259, section 3).

Letters: B videos in step, C channels of the pyramid, F of the flow features, S input side, h_l×w_l cells
of level l; level 0 is the finest.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.systems.yolact.fpn import BilinearFPN, resize
from d2ext.systems.yolact.head import YOLACTHead, YOLACTPredictions
from d2ext.systems.yolact_edge.flow import FlowNet, Refinement, carry_over

# Of each level of the pyramid, as Detectron2 counts them (P3 is 3): (B, C, h_l, w_l).
Sums = dict[int, Tensor]


class FrameNetwork(nn.Module):
    """What the networks of key frames and of others have in common."""

    def __init__(self, backbone: BilinearFPN, head: YOLACTHead, flow_net: FlowNet) -> None:
        super().__init__()
        self.backbone, self.head, self.flow_net = backbone, head, flow_net

    def predict(self, sums: Sums) -> YOLACTPredictions:
        """Top-down sums → predictions."""
        return self.head(list(self.backbone.outputs(sums).values()))


class KeyNetwork(FrameNetwork):
    """The whole network."""

    def forward(self, images: Tensor) -> tuple[YOLACTPredictions, list[Tensor]]:
        """(B, 3, S, S) → predictions, tensors of the memory."""
        laterals, sums = self.pyramid(images)
        finest, *coarser = sorted(sums)
        key = self.flow_net.encode_key(self.flow_net.features(laterals[finest]))
        # In float32, in which they are sampled.
        return self.predict(sums), [key, *(sums[level].float() for level in coarser)]

    def pyramid(self, images: Tensor) -> tuple[Sums, Sums]:
        """(B, 3, S, S) → laterals and top-down sums, by level."""
        laterals = self.backbone.laterals(self.backbone.bottom_up(images))
        return laterals, self.backbone.merge(laterals)


class NonKeyNetwork(FrameNetwork):
    """The network of the frames between: a part of the backbone, the flow net, and the heads."""

    def __init__(
        self,
        backbone: BilinearFPN,
        head: YOLACTHead,
        flow_net: FlowNet,
        refinement: Refinement | None,
        compare: bool,
    ) -> None:
        super().__init__(backbone, head, flow_net)
        self.refinement = refinement
        self.compare = compare

    def forward(self, images: Tensor, *memory: Tensor) -> tuple[YOLACTPredictions, Tensor | None]:
        """(B, 3, S, S), tensors of the memory → predictions, (B,) similarity to the key frame.

        The similarity is None unless ``compare``.
        """
        key, *sums = memory
        lateral = self.finest_lateral(images)
        own = self.flow_net.features(lateral)
        similarity = None
        if self.compare:
            alike = self.flow_net.encode_key(own).float()
            similarity = F.cosine_similarity(alike, key.float(), dim=1).mean(dim=(1, 2))
        return self.predict(self.carried_sums(lateral, own, key, sums)), similarity

    def finest_lateral(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, C, h_0, w_0), with the stages of a ResNet that lead there."""
        bottom_up, name = self.backbone.bottom_up, self.backbone.in_features[0]
        x = bottom_up.stem(images)
        for stage_name, stage in zip(bottom_up.stage_names, bottom_up.stages, strict=True):
            x = stage(x)
            if stage_name == name:
                break
        return self.backbone.lateral(self.backbone.levels[0], x)

    def carried_sums(
        self, lateral: Tensor, own: Tensor, key: Tensor, sums: Sequence[Tensor]
    ) -> Sums:
        """A frame's finest lateral and flow features, and the key frame's memory → the frame's sums.

        The finest sum is made before the others are refined, as published.
        """
        motions = self.flow_net(own, key.to(own.dtype))  # a memory in a file is float32
        carried = [carry_over(x, motions[level]) for level, x in enumerate(sums, start=1)]
        finest = resize(carried[0], lateral) + lateral
        if self.refinement is not None:
            carried = self.refinement(carried, lateral)
        return dict(zip(self.backbone.levels, [finest, *carried], strict=True))
