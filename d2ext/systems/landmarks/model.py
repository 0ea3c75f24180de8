"""Landmark localization: K points of an image or of each box in it, from crops of one size.

The stacked hourglass (arXiv 1603.06937) and other backbones, with heat map, integral (arXiv 1711.08229),
regression and SimCC (arXiv 2107.03332) heads. An image's boxes become crops
(:mod:`d2ext.codecs.landmark_crops`, :mod:`d2ext.layers.affine_crops`), the crops of all images pass
through the backbone and the head (``head.py``) together, a codec decodes the points
(:mod:`d2ext.codecs`), and these are mapped back into the image (``postprocess.py``).

Letters: B images, N crops of all images, K landmarks, H, W size of a crop, h, w of a map.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor

from d2ext.codecs.affine import invert_affine
from d2ext.codecs.heatmaps import maps_on_image
from d2ext.codecs.landmark_crops import CropRegions, apply_affine, crop_regions
from d2ext.data.landmarks import flip_indices
from d2ext.layers import affine_crops, truncated_crops
from d2ext.layers.transfer import upload, upload_alike
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.meta_arch import BackboneWithHead, MetaArch, image_size, output_size
from d2ext.systems.landmarks.head import LandmarkHead, build_landmark_head, landmark_head_class
from d2ext.systems.landmarks.postprocess import make_instances
from d2ext.systems.landmarks.targets import LandmarkTargets, make_targets, read_keypoints

logger = logging.getLogger(__name__)

CROP_METHODS = {"affine": affine_crops, "hourglass": truncated_crops}
# Fields of `instances` with the boxes to crop; the first one present is used.
BOX_FIELDS = ("pred_boxes", "proposal_boxes", "gt_boxes")
# Colours of annotations and predictions in pictures.
_GREEN, _RED = (0.0, 255.0, 0.0), (255.0, 0.0, 0.0)


class _Network(BackboneWithHead):
    """Crops (N, 3, H, W) → raw predictions; in a flip test 2N, those of the mirror images last."""

    def __init__(self, backbone: Backbone, head: LandmarkHead, flip: bool) -> None:
        super().__init__(backbone, head, head.in_features)
        self.flip = flip

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        # head.training, because train() of the model reaches its head but not this module.
        if self.head.training and images.shape[0] == 0:
            return ()  # batch norms have no statistics of an empty batch
        if self.flip and not self.head.training:
            images = torch.cat([images, images.flip(-1)])
        return super().forward(images)


@META_ARCH_REGISTRY.register()
class LandmarkNet(MetaArch):
    """A backbone and one head; see the module.

    Inputs in training: either ``crop`` True, ``image`` of the network's size and ``instances`` with one
    instance and its ``gt_keypoints`` in pixels of the crop, as the landmark mapper gives them; or
    ``instances`` with ``gt_boxes``, which are cropped, and ``gt_keypoints``.

    In inference: ``instances`` (or Detectron2's ``proposals``) with the boxes to crop in the first
    field of :data:`BOX_FIELDS` that is present, and optionally ``scores`` and ``pred_classes``. Without
    them, and with ``crop`` True, the box is the whole image.
    """

    export_refusal = ""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: LandmarkHead,
        num_keypoints: int,
        input_size: Sequence[int],
        padding: float = 1.25,
        crop_method: str = "affine",
        max_trained: int = 64,
        flip_indices: Sequence[int] | None = None,
        max_crops: int = 64,
        give_heatmaps: bool = False,
        keypoint_threshold: float = 0.2,
        truncate: bool = False,
        **meta_arch: Any,
    ) -> None:
        """Args:
        backbone, head: see ``head.py``.
        num_keypoints: K.
        input_size: (H, W).
        padding: see :func:`~d2ext.codecs.landmark_crops.pad_boxes`.
        crop_method: "affine", or "hourglass" for the published stacked hourglass's crops at whole
            pixels, whose points are mapped back as if the crop were exactly the box.
        max_trained: most instances of a batch that are trained on, if the model crops.
        flip_indices: the mirror partner of each landmark; None: no flip test.
        max_crops: crops per batch of the network.
        give_heatmaps: see ``postprocess.py``; only of heads that learn maps.
        keypoint_threshold: see :func:`~d2ext.systems.landmarks.postprocess.instance_scores`.
        truncate: truncate coordinates in the image to whole pixels, as the published test of the
            stacked hourglass does.
        meta_arch: see :class:`MetaArch`. With graphs or compilation, the number of crops is padded to
            a power of two.
        """
        super().__init__(**meta_arch)
        if crop_method not in CROP_METHODS:
            raise ValueError(
                f'MODEL.LANDMARKS.CROP.METHOD is one of {sorted(CROP_METHODS)}, not "{crop_method}".'
            )
        if flip_indices is not None and sorted(flip_indices) != list(range(num_keypoints)):
            raise ValueError(
                f"MODEL.LANDMARKS.FLIP_INDICES must name each of {num_keypoints} landmarks once, not "
                f"{list(flip_indices)}."
            )
        if give_heatmaps and not head.learns_maps:
            raise ValueError(
                "MODEL.LANDMARKS.TEST.HEATMAPS: this head has no heat maps; set it to False."
            )
        self.backbone = backbone
        self.head = head
        self.num_keypoints = num_keypoints
        self.input_size = (int(input_size[0]), int(input_size[1]))
        partners = None if flip_indices is None else torch.tensor(list(flip_indices))
        self.register_buffer("partners", partners, False)
        self.padding = padding
        self.crop_method = crop_method
        self.max_trained = max_trained
        self.max_crops = max_crops
        self.give_heatmaps = give_heatmaps
        self.keypoint_threshold = keypoint_threshold
        self.truncate = truncate
        self.set_network(_Network(backbone, head, flip_indices is not None), self._decode)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        landmarks = cfg.MODEL.LANDMARKS
        cfg = cfg.clone()
        cfg.defrost()
        learns_maps = landmark_head_class(cfg).learns_maps and not landmarks.IN_FEATURE
        cfg.MODEL.NEWELL_HOURGLASS.NUM_MAPS = landmarks.NUM_KEYPOINTS if learns_maps else 0
        backbone = build_backbone(cfg)
        return {
            **super().from_config(cfg),
            "backbone": backbone,
            "head": build_landmark_head(cfg, backbone.output_shape()),
            "num_keypoints": landmarks.NUM_KEYPOINTS,
            "input_size": landmarks.INPUT_SIZE,
            "padding": landmarks.CROP.PADDING,
            "crop_method": landmarks.CROP.METHOD,
            "max_trained": landmarks.CROP.MAX_TRAINED,
            "flip_indices": find_flip_indices(cfg) if landmarks.TEST.FLIP else None,
            "max_crops": landmarks.TEST.MAX_CROPS,
            "give_heatmaps": landmarks.TEST.HEATMAPS,
            "keypoint_threshold": landmarks.TEST.KEYPOINT_THRESH,
            "truncate": landmarks.TEST.TRUNCATE,
        }

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Crops of all boxes of a batch, normalised: (N, 3, H, W)."""
        return self.normalize(self.crop(batched_inputs, self.regions(batched_inputs)))

    def regions(self, batched_inputs: list[dict[str, Any]]) -> CropRegions:
        """The boxes of a batch and how they are cropped; see :class:`LandmarkNet`."""
        boxes = [_read_boxes(inputs) for inputs in batched_inputs]
        sizes = [image_size(inputs) for inputs in batched_inputs]
        return crop_regions(boxes, sizes, self.input_size, self.padding)

    def crop(self, batched_inputs: list[dict[str, Any]], regions: CropRegions) -> Tensor:
        """Crops of regions, in 0..255: (N, 3, H, W) float32."""
        function = CROP_METHODS[self.crop_method]
        places = regions.padded if self.crop_method == "hourglass" else regions.matrices
        places = upload(places, self.device)
        counts = regions.images.bincount(minlength=len(batched_inputs)).tolist()
        used = [(x["image"], n) for x, n in zip(batched_inputs, counts, strict=True) if n]
        if not used:
            return torch.zeros((0, 3, *self.input_size), device=self.device)
        images = [image for image, _ in used]
        if len({(image.shape, image.dtype, image.device, n) for image, n in used}) == 1:
            # Equal images are copied and sampled in one call, which is faster than one for each.
            alike = places.view(len(used), -1, *places.shape[1:])
            together = upload_alike(images, self.device)
            crops = function(together, alike, self.input_size).flatten(0, 1)
        else:
            images = [upload(image, self.device) for image in images]
            parts = zip(images, places.split([n for _, n in used]), strict=True)
            crops = torch.cat([function(x[None], p[None], self.input_size)[0] for x, p in parts])
        return crops

    def training_batch(
        self, batched_inputs: list[dict[str, Any]]
    ) -> tuple[Tensor, LandmarkTargets]:
        """Crops (N, 3, H, W), normalised, and the landmarks in them."""
        given = [bool(inputs.get("crop")) for inputs in batched_inputs]
        parts = [
            self._given_crop(inputs) if crop else self._crop_boxes(inputs)
            for inputs, crop in zip(batched_inputs, given, strict=True)
        ]
        images, keypoints = (torch.cat(x) for x in zip(*parts, strict=True))
        if len(images) > self.max_trained and not any(given):
            selected = torch.randperm(len(images))[: self.max_trained].to(self.device)
            images, keypoints = images[selected], keypoints[selected]
        return self.normalize(images), make_targets(keypoints)

    def _given_crop(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A sample that the mapper cropped: image (1, 3, H, W), keypoints (1, K, 3)."""
        image = self.upload(inputs)
        if image_size(inputs) != self.input_size:
            raise ValueError(
                f"The crop has {image_size(inputs)} pixels, but MODEL.LANDMARKS.INPUT_SIZE is "
                f"{list(self.input_size)}."
            )
        keypoints = read_keypoints(inputs["instances"], self.num_keypoints, self.device)
        return image[None].float(), keypoints[:1]

    def _crop_boxes(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Crops of an image's boxes: images (n, 3, H, W), keypoints (n, K, 3)."""
        keypoints = read_keypoints(inputs["instances"], self.num_keypoints, self.device)
        regions = self.regions([inputs])
        keep = regions.valid.nonzero()[:, 0]
        if len(keep) > self.max_trained:  # no more crops than could be selected
            keep = keep[torch.randperm(len(keep))[: self.max_trained].sort().values]
        regions, keypoints = regions.select(keep), keypoints[keep.to(self.device)]
        to_crops = invert_affine(regions.matrices).to(self.device)
        points = apply_affine(keypoints[..., :2].double(), to_crops).float()
        return self.crop([inputs], regions), torch.cat([points, keypoints[..., 2:]], dim=-1)

    def losses(
        self, predictions: tuple[Tensor, ...], targets: LandmarkTargets
    ) -> dict[str, Tensor]:
        """The head's losses; without crops, ``loss_no_instances``."""
        if not predictions:
            # Every parameter gets a gradient, or other processes would wait for it forever.
            zeros = [p.sum() * 0 for p in self.parameters() if p.requires_grad]
            return {"loss_no_instances": torch.stack(zeros).sum()}
        return self.head.losses(predictions, targets)

    def _prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Raw predictions → the decoder's input; in a flip test, the average."""
        if self.partners is None:
            return self.head.prediction(raw)
        straight, mirrored = (
            self.head.prediction(x)
            for x in zip(*(x.unflatten(0, (2, -1)) for x in raw), strict=True)
        )
        return self.head.average(straight, self.head.codec.mirror(mirrored, self.partners))

    def _decode(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Raw predictions → points (N, K, 2) in the crop, scores (N, K), with ``give_heatmaps`` maps."""
        prediction = self._prediction(raw)
        decoded = self.head.codec.decode(prediction)
        return (*decoded, prediction[0]) if self.give_heatmaps else (*decoded,)

    def export_form(self) -> ExportForm:
        names = ("points", "scores", "heatmaps")

        def pack(decoded: tuple[Tensor, ...]) -> Outputs:
            return dict(zip(names, decoded, strict=False))

        return ExportForm(
            pack=pack,
            unpack=lambda outputs: tuple(outputs[name] for name in names if name in outputs),
            size=self.input_size,
            results="landmarks",
            options={"truncate": self.truncate, "threshold": self.keypoint_threshold},
        )

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See :meth:`postprocess`; in batches of ``max_crops``."""
        regions = self.regions(batched_inputs)
        chunks = torch.arange(len(regions.boxes)).split(self.max_crops)
        parts = [self._run(self.crop(batched_inputs, regions.select(x))) for x in chunks]
        predictions = tuple(torch.cat(x) for x in zip(*parts, strict=True))
        return self.postprocess(predictions, batched_inputs, regions)

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the inference network on one batch of crops, padded with blank ones: to at least one, and
        with graphs or compilation to a power of two, so that there are few batch sizes."""
        images = self.normalize(images)
        count, padded = len(images), max(len(images), 1)
        if self.inference_network.mode != "eager":
            padded = min(1 << (padded - 1).bit_length(), self.max_crops)
        if padded > count:
            images = torch.cat([images, images.new_zeros(padded - count, *images.shape[1:])])
        return tuple(x[:count] for x in self.inference_network(images))

    def postprocess(
        self,
        predictions: tuple[Tensor, ...],
        batched_inputs: list[dict[str, Any]],
        regions: CropRegions | None = None,
    ) -> list[dict[str, Any]]:
        """Decoded predictions → for each image ``{"instances": Instances}``, see ``postprocess.py``: one
        instance for each box, in order. A box that is a single point, not finite, or outside the image
        gives an instance with scores of 0.

        Args:
            regions: of ``batched_inputs``, if already known.
        """
        regions = self.regions(batched_inputs) if regions is None else regions
        points, scores, *maps = predictions
        if len(points) != len(regions.boxes):
            raise ValueError(f"There are {len(points)} crops for {len(regions.boxes)} boxes.")
        # float32 could round a coordinate up to the whole number that truncation must stay below.
        matrices = regions.matrices if self.truncate else regions.matrices.float()
        matrices = upload(matrices, self.device)
        points = apply_affine(points.to(matrices), matrices)
        if self.truncate:
            points = points.trunc().float()
        results = make_instances(
            points,
            scores,
            regions,
            image_sizes=[image_size(x) for x in batched_inputs],
            output_sizes=[output_size(x) for x in batched_inputs],
            threshold=self.keypoint_threshold,
            heatmaps=(maps[0], matrices.float() * self._cell(maps[0])) if maps else None,
        )
        return [{"instances": instances} for instances in results]

    def _cell(self, maps: Tensor) -> Tensor:
        """Factor (3,) that turns a matrix from crops into one from cells of maps (..., h, w)."""
        height, width = self.input_size
        return maps.new_tensor([width / maps.shape[-1], height / maps.shape[-2], 1])

    @torch.no_grad()
    def heatmaps(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Heat maps for drawing, see :mod:`d2ext.utils.heatmaps`.

        Returns:
            for each image ``joints`` (height, width) of the output in 0..1: the maximum over landmarks
            and boxes; with heads that do not learn maps, nothing.
        """
        if not self.head.learns_maps:
            return [{} for _ in batched_inputs]
        regions = self.regions(batched_inputs)
        results = [torch.zeros(output_size(x), device=self.device) for x in batched_inputs]
        for index in regions.valid.nonzero()[:, 0].split(self.max_crops):
            part = regions.select(index)
            if len(index) == 0:
                continue
            raw = self.network(self.normalize(self.crop(batched_inputs, part)))
            maps = self.head.strength(self._prediction(raw))
            to_image = part.matrices * self._cell(maps).cpu()
            # One by one: each result is as large as the image.
            for i, crop_maps, matrix in zip(part.images.tolist(), maps, to_image, strict=True):
                inputs = batched_inputs[i]
                heat = maps_on_image(crop_maps, matrix, image_size(inputs), output_size(inputs))
                results[i] = torch.maximum(results[i], heat)
        return [{"joints": joints} for joints in results]

    def draw_training(
        self,
        batched_inputs: list[dict[str, Any]],
        images: Tensor,
        targets: LandmarkTargets,
        predictions: tuple[Tensor, ...],
    ) -> tuple[str, Tensor]:
        """The batch's first crops, above with annotated, below with predicted landmarks."""
        name = "Above: annotations. Below: predictions"
        if not predictions:
            return name, torch.zeros(3, *self.input_size)
        crops = images[:8] * self.pixel_std + self.pixel_mean
        prediction = self.head.prediction(tuple(x[:8] for x in predictions))
        points = self.head.codec.decode(prediction).points
        rows = (
            mark_points(crops, targets.points[:8], targets.labelled[:8], _GREEN),
            mark_points(crops, points, torch.ones_like(targets.labelled[:8]), _RED),
        )
        picture = torch.cat([torch.cat([*row], dim=-1) for row in rows], dim=-2)
        return name, picture.clamp(0, 255).cpu() / 255


def mark_points(
    images: Tensor, points: Tensor, shown: Tensor, color: tuple[float, float, float]
) -> Tensor:
    """Copy of images (n, 3, H, W) in 0..255 with 3x3 pixels coloured at the ``shown`` (n, K) points
    (n, K, 2)."""
    images = images.clone()
    limit = points.new_tensor([images.shape[-1], images.shape[-2]])
    number = torch.arange(len(images), device=points.device)[:, None].expand_as(shown)
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            pixels = points.floor() + points.new_tensor([dx, dy])
            inside = shown & ((pixels >= 0) & (pixels < limit)).all(dim=-1)
            x, y = pixels[inside].long().unbind(-1)
            images[number[inside], :, y, x] = images.new_tensor(color)
    return images


def _read_boxes(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes to crop, (n, 4) float64, their classes and scores, on the CPU; see :class:`LandmarkNet`."""
    instances = inputs.get("instances", inputs.get("proposals"))
    if instances is None or inputs.get("crop"):
        height, width = image_size(inputs)
        whole = torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64)
        return whole, torch.zeros(1, dtype=torch.int64), torch.ones(1)

    def first_of(*names: str) -> Any:
        return next((instances.get(name) for name in names if instances.has(name)), None)

    boxes = first_of(*BOX_FIELDS)
    if boxes is None:
        raise ValueError(
            f"`instances` have none of {BOX_FIELDS}: provide boxes, or leave `instances` out to use "
            "the whole image."
        )
    classes, scores = first_of("pred_classes", "gt_classes"), first_of("scores")
    return (
        boxes.tensor.detach().double().cpu(),
        torch.zeros(len(boxes), dtype=torch.int64) if classes is None else classes.cpu(),
        torch.ones(len(boxes)) if scores is None else scores.detach().float().cpu(),
    )


def find_flip_indices(cfg: CfgNode) -> list[int]:
    """The mirror partner of each landmark, from the metadata of the config's data sets, test sets
    first, or from ``MODEL.LANDMARKS.FLIP_INDICES``.

    A data set's ``keypoint_names`` and ``keypoint_flip_map`` take precedence, with a warning if
    ``FLIP_INDICES`` differs; ``FLIP_INDICES`` is used if no data set with as many landmarks is known.

    Raises:
        ValueError: neither is known, or the data set has another number of landmarks.
    """
    landmarks = cfg.MODEL.LANDMARKS
    given = list(landmarks.FLIP_INDICES)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else Metadata()
        if not metadata.get("keypoint_names") or metadata.get("keypoint_flip_map") is None:
            continue
        indices = flip_indices(name)
        if len(indices) == landmarks.NUM_KEYPOINTS:
            if given and given != indices:
                logger.warning(
                    "MODEL.LANDMARKS.FLIP_INDICES %s is not used: the landmarks of data set '%s' "
                    "have other mirror partners, %s.",
                    given,
                    name,
                    indices,
                )
            return indices
        if not given:
            raise ValueError(
                f"Data set '{name}' has {len(indices)} landmarks, but "
                f"MODEL.LANDMARKS.NUM_KEYPOINTS is {landmarks.NUM_KEYPOINTS}."
            )
    if not given:
        raise ValueError(
            "MODEL.LANDMARKS.TEST.FLIP needs to know left from right: set "
            "MODEL.LANDMARKS.FLIP_INDICES, or name a registered data set with keypoint_names and "
            "keypoint_flip_map in DATASETS.TEST."
        )
    return given
