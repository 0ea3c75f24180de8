"""From UPSNet's predictions to Detectron2's results, at the size of the output.

Boxes have their end behind the last pixel, as Detectron2's evaluators and the COCO format count (the
published x2, y2 are one less). Detections and the panoptic head's candidates are ``Instances`` of the
unpadded network input with ``pred_boxes``, ``scores``, ``pred_classes`` and ``mask_logits`` (n, M, M).

Letters: N images, R regions, T thing classes, S stuff classes, D slots, n instances, h×w semantic score
at stride 4, H×W output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import paste_masks_in_image
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from d2ext.systems.upsnet.boxes import end_behind, inclusive
from d2ext.systems.upsnet.panoptic_head import PanopticPrediction, predict_panoptic

CATEGORY_IDS = ("separated", "joint")
# Stride of the semantic score.
STRIDE = 4


def nearest(
    maps: Tensor,
    image_size: tuple[int, int],
    size: tuple[int, int],
    scales: tuple[float, float] | None = None,
) -> Tensor:
    """Crop padded maps (..., h', w') to the image (h, w) and resize them (nearest) to (H, W).

    Output cell i is input cell floor(i · scale).

    Args:
        scales: input cells in one of the output, along height and width; None: (h / H, w / W).
    """
    scales = scales or _ratios(image_size, size)
    for dim, before, after, scale in zip((-2, -1), image_size, size, scales, strict=True):
        # Published: OpenCV, with 1 / scale as the factor and its inverse as the step.
        step = 1 / (1 / scale)
        index = torch.arange(after, device=maps.device, dtype=torch.float64) * step
        maps = maps.index_select(dim, index.to(torch.int64).clamp(max=before - 1))
    return maps


def _ratios(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    return image_size[0] / size[0], image_size[1] / size[1]


class PanopticMap(NamedTuple):
    """A panoptic map and the areas of its segments."""

    labels: Tensor
    """(H, W) int64: stuff 0..S-1, instances S..S+n-1, void -1."""
    areas: Tensor
    """(S + n,) int64 pixels of each label."""


def clean(
    labels: Tensor,
    semantic: Tensor,
    classes: Tensor,
    *,
    num_stuff: int,
    num_classes: int,
    stuff_area_limit: int,
) -> PanopticMap:
    """The published clean-up of a panoptic map, at the size of the output.

    If the most frequent class of the semantic map in an instance's pixels is stuff and has at least
    half of them, the instance becomes that stuff; otherwise it stays. Then stuff classes with fewer
    than ``stuff_area_limit`` pixels become void. The dummy instance (class -1) becomes the last stuff
    class.

    Args:
        labels: (H, W): stuff 0..S-1, instances S..S+n-1, unknown S+n.
        semantic: (H, W) arg max of the semantic logits, 0..S+T-1.
        classes: (n,) of the instances, in 0..T-1; -1 for the dummy.
        num_stuff: S.
        num_classes: S + T.
        stuff_area_limit: in pixels.
    """
    count = len(classes)
    labels, semantic = labels.to(torch.int64), semantic.to(torch.int64)
    # Pixels of each label by semantic class; `bincount` would wait for the device.
    joint = (labels * num_classes + semantic).flatten()
    pixels = labels.new_zeros((num_stuff + count + 1) * num_classes)
    pixels = pixels.scatter_add_(0, joint, torch.ones_like(joint)).view(-1, num_classes)
    votes = pixels[num_stuff : num_stuff + count]
    most, winner = votes.max(dim=1)  # of equal votes the lowest class wins
    to_stuff = (winner < num_stuff) & (2 * most >= votes.sum(dim=1))
    table = torch.arange(num_stuff + count + 1, device=labels.device)
    unchanged = torch.where(classes < 0, num_stuff - 1, table[num_stuff : num_stuff + count])
    table[num_stuff : num_stuff + count] = torch.where(to_stuff, winner, unchanged)
    table[-1] = -1
    # Areas follow from the counts, without reading the map again.
    before = pixels.sum(dim=1)
    areas = torch.zeros_like(before)
    areas.index_add_(0, table[:-1], before[:-1])
    small = areas[:num_stuff] < stuff_area_limit
    lost = torch.zeros_like(table, dtype=torch.bool)
    lost[:-1] = (table[:-1] < num_stuff) & small[table[:-1].clamp(max=num_stuff - 1)]
    areas[:num_stuff][small] = 0
    return PanopticMap(table.masked_fill(lost, -1)[labels], areas[:-1])


def segments(
    panoptic: PanopticMap,
    classes: Tensor,
    scores: Tensor,
    *,
    num_stuff: int,
    category_ids: str,
    track_ids: Tensor | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Detectron2's ``panoptic_seg``.

    Args:
        panoptic: a map of n instances.
        classes, scores: (n,) of the instances.
        num_stuff: S.
        category_ids: "separated" (things 0..T-1, stuff 1..S) or "joint" (stuff 0..S-1, things S..).
        track_ids: (n,) of the instances, if they have ids.

    Returns:
        (H, W) int32 map of segment ids, 0 void; and for each segment ``id`` (from 1), ``category_id``,
        ``isthing``, ``score`` (of the detection; 1 for stuff), ``area`` in pixels, things also
        ``track_id`` if they have one.
    """
    joint = category_ids == "joint"
    # Things first, as Detectron2's own merge.
    present = (panoptic.areas > 0).roll(-num_stuff)
    ids = torch.where(present, present.cumsum(0), 0).roll(num_stuff).to(torch.int32)
    ids = F.pad(ids, (0, 1))  # the last: void
    # The host waits for the device once.
    things = [classes, scores] if track_ids is None else [classes, scores, track_ids]
    numbers = torch.cat([x.double() for x in (panoptic.areas, *things)]).tolist()
    areas, numbers = numbers[: len(panoptic.areas)], numbers[len(panoptic.areas) :]
    kinds, confidences, tracks = (numbers[i * len(classes) :][: len(classes)] for i in range(3))
    infos: list[dict[str, Any]] = []
    for label in [*range(num_stuff, len(areas)), *range(num_stuff)]:
        if areas[label] == 0:
            continue
        thing = label - num_stuff
        infos.append(
            {
                "id": len(infos) + 1,
                "category_id": int(kinds[thing]) + num_stuff * joint
                if thing >= 0
                else label + 1 - joint,
                "isthing": thing >= 0,
                "score": confidences[thing] if thing >= 0 else 1.0,
                "area": int(areas[label]),
            }
        )
        if tracks and thing >= 0:
            infos[-1]["track_id"] = int(tracks[thing])
    return ids[panoptic.labels], infos


class UPSNetPostprocessor:
    """Makes ``instances``, ``sem_seg`` and ``panoptic_seg``.

    Args:
        num_stuff, num_things: S, T.
        overlap_fraction, unknown: see :func:`predict_panoptic`.
        category_ids: "separated" or "joint", see :func:`segments`.
        stuff_area_limit: see :func:`clean`.
        heuristic: instead of the panoptic head, merge the other heads' results with these thresholds
            of Detectron2's ``combine_semantic_and_instance_outputs``.
    """

    # See `predict_panoptic`.
    dummy = True

    @configurable
    def __init__(
        self,
        *,
        num_stuff: int,
        num_things: int,
        overlap_fraction: float = 0.3,
        unknown: bool = True,
        category_ids: str = "separated",
        stuff_area_limit: int = 4096,
        heuristic: dict[str, float] | None = None,
    ) -> None:
        if category_ids not in CATEGORY_IDS:
            raise ValueError(
                f'MODEL.UPSNET.CATEGORY_IDS is one of {CATEGORY_IDS}, not "{category_ids}".'
            )
        self.num_stuff = num_stuff
        self.num_classes = num_stuff + num_things
        self.overlap_fraction = overlap_fraction
        self.unknown = unknown
        self.category_ids = category_ids
        self.stuff_area_limit = stuff_area_limit
        self.heuristic = heuristic

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        upsnet, combine = cfg.MODEL.UPSNET, cfg.MODEL.PANOPTIC_FPN.COMBINE
        if upsnet.TEST.PANOPTIC not in ("head", "heuristic"):
            raise ValueError(
                f'MODEL.UPSNET.TEST.PANOPTIC is "head" or "heuristic", not "{upsnet.TEST.PANOPTIC}".'
            )
        heuristic = {
            "overlap_threshold": combine.OVERLAP_THRESH,
            "stuff_area_thresh": combine.STUFF_AREA_LIMIT,
            "instances_score_thresh": combine.INSTANCES_CONFIDENCE_THRESH,
        }
        return {
            "num_stuff": upsnet.NUM_STUFF,
            "num_things": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "overlap_fraction": upsnet.TEST.OVERLAP_FRACTION,
            "unknown": upsnet.TEST.UNKNOWN,
            "category_ids": upsnet.CATEGORY_IDS,
            "stuff_area_limit": upsnet.TEST.STUFF_AREA_LIMIT,
            "heuristic": heuristic if upsnet.TEST.PANOPTIC == "heuristic" else None,
        }

    def __call__(
        self,
        score: Tensor,
        detections: Instances,
        candidates: Instances,
        size: tuple[int, int],
        scales: tuple[float, float] | None = None,
    ) -> dict[str, Any]:
        """One image's semantic score (S + T, h, w) of the padded input, detections and candidates of
        the panoptic head, in videos with ``track_ids`` → its results at ``size`` (height, width).

        ``scales``, here and below: pixels of the network's input in one of the output, along height
        and width; None: the ratios of their sizes, which are off where a size was rounded.
        """
        instances = self.instances(detections, size, scales)
        semantic = self.semantic_map(score, detections.image_size, size, scales)
        if self.heuristic is None:
            prediction = self.fuse(score, candidates)
            ids = candidates.track_ids[prediction.keep] if candidates.has("track_ids") else None
            panoptic = self.segments(prediction, candidates.image_size, size, scales, ids)
        else:
            panoptic = self.merge(instances, semantic, self.heuristic)
        return {"instances": instances, "sem_seg": semantic, "panoptic_seg": panoptic}

    def fuse(self, score: Tensor, candidates: Instances) -> PanopticPrediction:
        """The panoptic head on one image's semantic score (S + T, h, w) and candidates."""
        return predict_panoptic(
            score.float(),
            inclusive(candidates.pred_boxes.tensor),
            candidates.pred_classes,
            candidates.scores,
            candidates.mask_logits,
            (STRIDE * score.shape[1], STRIDE * score.shape[2]),
            num_stuff=self.num_stuff,
            overlap_fraction=self.overlap_fraction,
            unknown=self.unknown,
            dummy=self.dummy,
        )

    def segments(
        self,
        prediction: PanopticPrediction,
        image_size: tuple[int, int],
        size: tuple[int, int],
        scales: tuple[float, float] | None = None,
        track_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The panoptic map of an image of ``image_size`` → ``panoptic_seg`` at the output's size."""
        panoptic = clean(
            nearest(prediction.labels, image_size, size, scales),
            nearest(prediction.semantic, image_size, size, scales),
            prediction.classes,
            num_stuff=self.num_stuff,
            num_classes=self.num_classes,
            stuff_area_limit=self.stuff_area_limit,
        )
        return segments(
            panoptic,
            prediction.classes,
            prediction.scores,
            num_stuff=self.num_stuff,
            category_ids=self.category_ids,
            track_ids=track_ids,
        )

    def instances(
        self,
        detections: Instances,
        size: tuple[int, int],
        scales: tuple[float, float] | None = None,
    ) -> Instances:
        """Detections of one image at the size of the output: ``pred_boxes``, ``scores``,
        ``pred_classes``, ``pred_masks``."""
        height, width = scales or _ratios(detections.image_size, size)
        boxes = detections.pred_boxes.tensor
        x, y = inclusive(boxes).unflatten(1, (2, 2)).unbind(2)
        boxes = end_behind(torch.stack([x / width, y / height], dim=2).flatten(1))
        x, y = boxes.unflatten(1, (2, 2)).unbind(2)
        boxes = torch.stack([x.clamp(max=size[1]), y.clamp(max=size[0])], dim=2).flatten(1)
        result = Instances(size)
        result.pred_boxes = Boxes(boxes)
        result.scores = detections.scores
        result.pred_classes = detections.pred_classes
        result.pred_masks = paste_masks_in_image(
            detections.mask_logits.sigmoid(), result.pred_boxes, size, threshold=0.5
        ).to(torch.bool)
        return result

    def semantic_map(
        self,
        score: Tensor,
        image_size: tuple[int, int],
        size: tuple[int, int],
        scales: tuple[float, float] | None = None,
    ) -> Tensor:
        """(S + T, h, w) score of the padded image → ``sem_seg`` logits at the size of the output."""
        height, width = scales or _ratios(image_size, size)
        factors = (STRIDE / height, STRIDE / width)
        # One more cell at either end, so that rounding of the factors cannot leave a line out; the
        # interpolation repeats the border there too.
        cells = F.pad(score[None].float(), (0, 1, 0, 1), mode="replicate")
        logits = F.interpolate(cells, scale_factor=factors, mode="bilinear", align_corners=False)
        logits = logits[0, :, : size[0], : size[1]]
        if self.category_ids == "joint":
            return logits
        things = logits[self.num_stuff :].amax(dim=0, keepdim=True)
        return torch.cat([things, logits[: self.num_stuff]])

    def merge(
        self, instances: Instances, semantic: Tensor, thresholds: dict[str, float]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """``panoptic_seg`` by Detectron2's heuristic, from ``instances`` and ``sem_seg``."""
        labels = semantic.argmax(dim=0)
        joint = self.category_ids == "joint"
        if joint:
            labels = torch.where(labels < self.num_stuff, labels + 1, 0)
        panoptic, infos = combine_semantic_and_instance_outputs(instances, labels, **thresholds)
        for info in infos:
            info.setdefault("score", 1.0)
            if joint:
                info["category_id"] += self.num_stuff if info["isthing"] else -1
        return panoptic, infos
