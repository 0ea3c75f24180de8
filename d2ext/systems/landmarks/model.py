"""Landmark localization: K points of an image or of each box in it, from crops of one size.

The stacked hourglass (arXiv 1603.06937) and other backbones, with heat map, integral (arXiv 1711.08229),
regression and SimCC (arXiv 2107.03332) heads. An image's boxes become crops
(:mod:`d2ext.codecs.landmark_crops`, :mod:`d2ext.layers.affine_crops`), the crops of all images pass the
backbone and the head (``head.py``) together, a codec finds the points (:mod:`d2ext.codecs`), and these
go back into the image (``postprocess.py``).

Letters: B images, N crops of all images, K landmarks, H, W size of a crop, h, w of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2ext.codecs.affine import invert_affine
from d2ext.codecs.landmark_crops import (
    apply_affine,
    crop_to_image,
    has_side,
    pad_boxes,
)
from d2ext.layers import affine_crops, truncated_crops
from d2ext.layers.transfer import upload, upload_alike
from d2ext.modeling.inference import InferenceNetwork
from d2ext.systems.landmarks.drawing import draw_training
from d2ext.systems.landmarks.head import MapHead, build_landmark_head, landmark_head_class
from d2ext.systems.landmarks.head_base import LandmarkHead
from d2ext.systems.landmarks.inputs import (
    Regions,
    counts_between,
    find_flip_indices,
    find_regions,
)
from d2ext.systems.landmarks.postprocess import Persons, make_instances

CROP_METHODS = ("affine", "hourglass")


class _Network(nn.Module):
    """Crops (N, 3, H, W) → raw predictions; with ``flip`` 2N, those of the mirror images behind."""

    def __init__(self, backbone: Backbone, head: LandmarkHead, flip: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.flip = flip

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.flip:
            images = torch.cat([images, images.flip(-1)])
        return self.head(self.backbone(images))


@META_ARCH_REGISTRY.register()
class LandmarkNet(nn.Module):
    """A backbone and one head; see the module."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: LandmarkHead,
        num_keypoints: int,
        input_size: Sequence[int],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        padding: float = 1.25,
        crop_method: str = "affine",
        max_trained: int = 64,
        flip_indices: Sequence[int] | None = None,
        max_crops: int = 64,
        give_heatmaps: bool = False,
        keypoint_threshold: float = 0.2,
        truncate: bool = False,
        inference_mode: str = "eager",
        inference_dtype: str = "float32",
        channels_last: bool = False,
        vis_period: int = 0,
    ) -> None:
        """Args:
        backbone, head: see ``head.py``.
        num_keypoints: K.
        input_size: (H, W).
        pixel_mean, pixel_std: per channel, in 0..255.
        padding: see :func:`~d2ext.codecs.landmark_crops.pad_boxes`.
        crop_method: "affine", or "hourglass" for the published stacked hourglass's crops at whole
            pixels, whose points go back as if they had been cut at the box itself.
        max_trained: instances of a batch that are trained on at most, where the model crops.
        flip_indices: the mirror partner of each landmark; None: no flip test.
        max_crops: crops that pass the network at once.
        give_heatmaps: see ``postprocess.py``; only of heads that learn maps.
        keypoint_threshold: see :func:`~d2ext.systems.landmarks.postprocess.instance_scores`.
        truncate: cut coordinates in the image toward zero to whole pixels, as the published test of
            the stacked hourglass does.
        inference_mode, inference_dtype, channels_last: see :class:`InferenceNetwork`. With graphs or
            compilation, the number of crops is filled up to a power of two.
        vis_period: iterations between pictures of the training in TensorBoard; 0 for none.
        """
        super().__init__()
        if crop_method not in CROP_METHODS:
            raise ValueError(
                f'MODEL.LANDMARKS.CROP.METHOD is one of {CROP_METHODS}, not "{crop_method}".'
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
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        partners = None if flip_indices is None else torch.tensor(list(flip_indices))
        self.register_buffer("partners", partners, False)
        self.padding = padding
        self.crop_method = crop_method
        self.max_trained = max_trained
        self.max_crops = max_crops
        self.give_heatmaps = give_heatmaps
        self.keypoint_threshold = keypoint_threshold
        self.truncate = truncate
        self.vis_period = vis_period
        # In a tuple, so that the copy of the weights which it keeps is no submodule.
        self._inference = (
            InferenceNetwork(
                _Network(backbone, head, flip_indices is not None),
                self._decode,
                mode=inference_mode,
                dtype=inference_dtype,
                channels_last=channels_last,
            ),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        landmarks = cfg.MODEL.LANDMARKS
        cfg = cfg.clone()
        cfg.defrost()
        learns_maps = landmark_head_class(cfg).learns_maps and not landmarks.IN_FEATURE
        cfg.MODEL.NEWELL_HOURGLASS.NUM_MAPS = landmarks.NUM_KEYPOINTS if learns_maps else 0
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": build_landmark_head(cfg, backbone.output_shape()),
            "num_keypoints": landmarks.NUM_KEYPOINTS,
            "input_size": landmarks.INPUT_SIZE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "padding": landmarks.CROP.PADDING,
            "crop_method": landmarks.CROP.METHOD,
            "max_trained": landmarks.CROP.MAX_TRAINED,
            "flip_indices": find_flip_indices(cfg) if landmarks.TEST.FLIP else None,
            "max_crops": landmarks.TEST.MAX_CROPS,
            "give_heatmaps": landmarks.TEST.HEATMAPS,
            "keypoint_threshold": landmarks.TEST.KEYPOINT_THRESH,
            "truncate": landmarks.TEST.TRUNCATE,
            "inference_mode": cfg.MODEL.INFERENCE.MODE,
            "inference_dtype": cfg.MODEL.INFERENCE.DTYPE,
            "channels_last": cfg.MODEL.INFERENCE.CHANNELS_LAST,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def inference_network(self) -> InferenceNetwork:
        """Network and decoding as :meth:`inference` runs them; benchmarks time it."""
        return self._inference[0]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Detectron2's contract.

        Args:
            batched_inputs: a dict each with ``image`` (3, height, width) in 0..255, any size. In
                training, either

                - ``crop`` True: ``image`` is a crop of the network's size, and ``instances`` has one
                  instance, its ``gt_keypoints`` in pixels of the crop: what the landmark mapper
                  gives; or
                - ``instances`` with ``gt_boxes`` and ``gt_keypoints``: the model crops each box,
                  without augmentation.

                In inference, ``instances`` with the boxes to look into, the first of ``pred_boxes``,
                ``proposal_boxes``, ``gt_boxes`` that it has (and ``scores`` and ``pred_classes``, if
                it has them), or Detectron2's ``proposals``; without them, and with ``crop`` True, the
                image is the box. ``height``, ``width``: of the output (default: of the image).

        Returns:
            In training the losses. Otherwise a list of ``{"instances": Instances}``, see
            ``postprocess.py``: one for each box, in the order of the boxes. A box without a
            side (neither width nor height), of numbers that are not finite, or outside the image gives
            an instance with scores of 0.

        Raises:
            KeyError: training inputs without ``instances``.
            ValueError: another number of landmarks; crops of another size; ``instances`` without boxes
                or landmarks.
        """
        if self.training:
            return self._train(batched_inputs)
        regions = self.find_regions(batched_inputs)
        total = sum(regions.counts)
        chunks = (
            self.crop(batched_inputs, regions, start, min(start + self.max_crops, total))
            for start in range(0, total, self.max_crops)
        )
        return self._predict(chunks, regions, batched_inputs)

    # Crops

    def find_regions(self, batched_inputs: list[dict[str, Any]]) -> Regions:
        """The boxes of a batch in inference; see :meth:`forward`."""
        return find_regions(batched_inputs, self.input_size, self.padding)

    def crop(
        self, batched_inputs: list[dict[str, Any]], regions: Regions, start: int, stop: int
    ) -> Tensor:
        """Crops number ``start`` to ``stop`` of a batch, normalised: (stop - start, 3, H, W)."""
        truncated = self.crop_method == "hourglass"
        places = regions.padded if truncated else regions.matrices
        places = upload(places[start:stop], self.device)
        function = truncated_crops if truncated else affine_crops
        counts = counts_between(regions.counts, start, stop)
        used = [(x["image"], n) for x, n in zip(batched_inputs, counts, strict=True) if n]
        if not used:
            return torch.zeros((0, 3, *self.input_size), device=self.device)
        images = [image for image, _ in used]
        if len({(image.shape, image.dtype, image.device, n) for image, n in used}) == 1:
            # Images alike are sent and sampled in one call; launching one for each takes longer.
            alike = places.view(len(used), -1, *places.shape[1:])
            together = upload_alike(images, self.device)
            crops = function(together, alike, self.input_size).flatten(0, 1)
        else:
            images = [upload(image, self.device) for image in images]
            own = places.split([n for _, n in used])
            parts = zip(images, own, strict=True)
            crops = torch.cat([function(x[None], p[None], self.input_size)[0] for x, p in parts])
        return (crops - self.pixel_mean) / self.pixel_std

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """All crops of a batch, normalised: (N, 3, H, W)."""
        regions = self.find_regions(batched_inputs)
        return self.crop(batched_inputs, regions, 0, sum(regions.counts))

    # Inference

    def inference(self, images: Tensor, batched_inputs: list[dict[str, Any]]) -> list[dict]:
        """Predict on crops (N, 3, H, W) that :meth:`preprocess` made; see :meth:`forward`."""
        chunks = iter(images.split(self.max_crops)) if len(images) else iter(())
        return self._predict(chunks, self.find_regions(batched_inputs), batched_inputs)

    @torch.no_grad()
    def heatmaps(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """What the network sees, for pictures (see :mod:`d2ext.utils.heatmaps`).

        Args:
            batched_inputs: see :meth:`forward`.

        Returns:
            for each image ``joints`` (height, width) of the output in 0..1: the maximum over landmarks
            and boxes, without a flip test. Nothing with heads that learn no maps.
        """
        regions = self.find_regions(batched_inputs)
        if not isinstance(self.head, MapHead):
            return [{} for _ in batched_inputs]
        images = self.crop(batched_inputs, regions, 0, sum(regions.counts))
        parts = [
            self.head.strength(self.head(self.backbone(x))).amax(dim=1, keepdim=True)
            for x in images.split(self.max_crops)
            if len(x)
        ]
        width, height = self.head.codec.map_size
        cells_to_crop = torch.tensor([self.input_size[1] / width, self.input_size[0] / height, 1])
        to_cells = invert_affine(regions.matrices * cells_to_crop)
        maps = torch.cat(parts) if parts else images.new_zeros(0, 1, height, width)
        results = []
        first = 0
        for inputs, count in zip(batched_inputs, regions.counts, strict=True):
            size = inputs["image"].shape[-2:]
            output = (inputs.get("height") or size[0], inputs.get("width") or size[1])
            seen = torch.zeros(output, device=self.device)
            shrink = torch.tensor([size[1] / output[1], size[0] / output[0], 1])
            for i in range(first, first + count):  # one by one: each is as large as the image
                if regions.valid[i]:
                    matrix = (to_cells[i] * shrink).to(self.device)
                    seen = torch.maximum(
                        seen, affine_crops(maps[i][None], matrix[None, None], output)[0, 0, 0]
                    )
            results.append({"joints": seen})
            first += count
        return results

    def _decode(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Raw predictions → points (N, K, 2) in the crop, scores (N, K) and, if wanted, the maps."""
        if self.partners is None:
            prediction = self.head.prediction(raw)
        else:
            straight = self.head.prediction(tuple(x[: len(x) // 2] for x in raw))
            mirrored = self.head.prediction(tuple(x[len(x) // 2 :] for x in raw))
            mirrored = self.head.codec.mirror(mirrored, self.partners)
            prediction = self.head.average(straight, mirrored)
        found = self.head.codec.decode(prediction)
        return (*found, prediction[0]) if self.give_heatmaps else (*found,)

    @torch.no_grad()
    def _predict(
        self, chunks: Iterator[Tensor], regions: Regions, batched_inputs: list[dict[str, Any]]
    ) -> list[dict]:
        """Points of normalised crops, chunk by chunk, and from them the instances of each image."""
        output_sizes = [
            (x.get("height") or x["image"].shape[-2], x.get("width") or x["image"].shape[-1])
            for x in batched_inputs
        ]
        # Before the network starts, so that no copy waits for it.
        persons = self._persons(regions, batched_inputs, output_sizes)
        # In float32 a coordinate may round to the whole number that it must be cut below.
        exact = regions.matrices if self.truncate else regions.matrices.float()
        matrices = upload(exact, self.device)
        outputs = [self._run(images) for images in chunks] or [self._nothing()]
        points, scores, *maps = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
        if len(points) != len(matrices):
            raise ValueError(f"There are {len(points)} crops for {len(matrices)} boxes.")
        points = apply_affine(points.to(matrices), matrices)
        if self.truncate:
            points = points.trunc().float()
            matrices = matrices.float()
        results = make_instances(
            persons,
            points,
            scores,
            regions.counts,
            output_sizes,
            threshold=self.keypoint_threshold,
        )
        if maps:
            height, width = self.input_size
            to_pixels = [width / maps[0].shape[-1], height / maps[0].shape[-2], 1]
            to_output = matrices * matrices.new_tensor(to_pixels) * persons.scales[..., None]
            for instances, own_maps, own_matrices in zip(
                results, maps[0].split(regions.counts), to_output.split(regions.counts), strict=True
            ):
                instances.pred_keypoint_heatmaps = own_maps
                instances.pred_keypoint_heatmap_matrices = own_matrices
        return [{"instances": instances} for instances in results]

    def _persons(
        self,
        regions: Regions,
        batched_inputs: list[dict[str, Any]],
        output_sizes: list[tuple[int, int]],
    ) -> Persons:
        """What the output says of the boxes, on the device."""
        limits, scales = [], []
        for inputs, (height, width), count in zip(
            batched_inputs, output_sizes, regions.counts, strict=True
        ):
            limits += [(width, height)] * count
            scales += [
                (width / inputs["image"].shape[-1], height / inputs["image"].shape[-2])
            ] * count

        columns = [
            regions.boxes.float(),
            torch.tensor(scales, dtype=torch.float32).view(-1, 2),
            torch.tensor(limits, dtype=torch.float32).view(-1, 2),
            regions.scores[:, None],
            regions.valid[:, None],
        ]
        # One copy instead of five.
        sent = upload(torch.cat(columns, dim=1), self.device)
        own, own_scales, own_limits, score, valid = sent.split([4, 2, 2, 1, 1], dim=1)
        classes = upload(regions.classes, self.device)
        return Persons(own, classes, score[:, 0], valid[:, 0] > 0, own_scales, own_limits)

    def _nothing(self) -> tuple[Tensor, ...]:
        """What the network gives for no crop."""
        scores = torch.zeros((0, self.num_keypoints), device=self.device)
        found = (scores.new_zeros(0, self.num_keypoints, 2), scores)
        if not self.give_heatmaps:
            return found
        assert isinstance(self.head, MapHead)
        width, height = self.head.codec.map_size
        return (*found, scores.new_zeros(0, self.num_keypoints, height, width))

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        """The inference network on one chunk."""
        network = self.inference_network
        count = len(images)
        if network.mode != "eager":
            # One graph for each power of two, not for each number of persons.
            wanted = min(1 << (count - 1).bit_length(), self.max_crops)
            if wanted > count:
                blank = images.new_zeros(wanted - count, *images.shape[1:])
                images = torch.cat([images, blank])
        return tuple(x[:count] for x in network(images))

    # Training

    def _train(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        images, points, labelled = self.training_crops(batched_inputs)
        if len(images) == 0:
            # All parameters take part, so that processes that wait for each other's gradients do not
            # wait for ever. No crop of nothing enters the statistics of batch norms.
            nothing = sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)
            assert isinstance(nothing, Tensor)
            return {"loss_no_instances": nothing}
        raw = self.head(self.backbone(images))
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self._visualize_training(images, points, labelled, raw)
        return self.head.losses(raw, points, labelled)

    def training_crops(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        """Crops of a training batch: images (N, 3, H, W) normalised, points (N, K, 2) in pixels of the
        crop, labelled (N, K) bool; see :meth:`forward`."""
        for inputs in batched_inputs:
            if "instances" not in inputs:
                raise KeyError(
                    "Training needs `instances` for each image: the data mapper did not provide them "
                    "(is it built with is_train=True, and has the data set annotations?)."
                )
        images, keypoints = [], []
        for inputs in batched_inputs:
            crops, points = (
                self._given_crop(inputs) if inputs.get("crop") else self._own_crops(inputs)
            )
            images.append(crops)
            keypoints.append(points)
        crops, points = torch.cat(images), torch.cat(keypoints)
        labelled = (points[..., 2] > 0) & points[..., :2].isfinite().all(dim=-1)
        positions = torch.where(labelled[..., None], points[..., :2], 0)
        given = any(inputs.get("crop") for inputs in batched_inputs)
        if not given and len(crops) > self.max_trained:
            chosen = torch.randperm(len(crops))[: self.max_trained].to(crops.device)
            crops, positions, labelled = crops[chosen], positions[chosen], labelled[chosen]
        return (crops - self.pixel_mean) / self.pixel_std, positions, labelled

    def _given_crop(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A sample that the mapper cropped: image (1, 3, H, W), keypoints (1, K, 3)."""
        image = inputs["image"].to(self.device, torch.float32, non_blocking=True)
        if tuple(image.shape[-2:]) != self.input_size:
            raise ValueError(
                f"A crop of {tuple(image.shape[-2:])} pixels came for a network of "
                f"MODEL.LANDMARKS.INPUT_SIZE {list(self.input_size)}."
            )
        return image[None], self._keypoints(inputs["instances"])[:1]

    def _own_crops(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Crops of an image's boxes with a side: images (n, 3, H, W), keypoints (n, K, 3)."""
        image = inputs["image"].to(self.device, non_blocking=True)
        instances = inputs["instances"]
        if len(instances) == 0:
            return (
                torch.zeros((0, len(image), *self.input_size), device=self.device),
                torch.zeros((0, self.num_keypoints, 3), device=self.device),
            )
        if not instances.has("gt_boxes"):
            raise ValueError(
                "Landmarks are trained in boxes, and these instances have no gt_boxes."
            )
        keypoints = self._keypoints(instances)
        boxes = instances.gt_boxes.tensor.detach().double().cpu()
        keep = has_side(boxes).nonzero()[:, 0]
        if len(keep) > self.max_trained:  # no more crops than could be chosen
            keep = keep[torch.randperm(len(keep))[: self.max_trained]]
        boxes, keypoints = boxes[keep], keypoints[keep.to(keypoints.device)]
        padded = pad_boxes(boxes, self.input_size, self.padding)
        matrices = crop_to_image(padded, self.input_size).to(self.device)
        crops = affine_crops(image[None], matrices[None], self.input_size)[0]
        points = apply_affine(keypoints[..., :2].double(), invert_affine(matrices)).float()
        return crops, torch.cat([points, keypoints[..., 2:]], dim=-1)

    def _keypoints(self, instances: Instances) -> Tensor:
        """``gt_keypoints`` (n, K, 3) on the device."""
        if not instances.has("gt_keypoints"):
            raise ValueError(
                "These instances have no gt_keypoints: the annotations need `keypoints`, and "
                "MODEL.KEYPOINT_ON must be True so that the mapper keeps them."
            )
        keypoints = instances.gt_keypoints.tensor.to(self.device, torch.float32)
        if keypoints.shape[1] != self.num_keypoints:
            raise ValueError(
                f"The data have {keypoints.shape[1]} landmarks, but MODEL.LANDMARKS.NUM_KEYPOINTS is "
                f"{self.num_keypoints}."
            )
        return keypoints

    @torch.no_grad()
    def _visualize_training(
        self, images: Tensor, points: Tensor, labelled: Tensor, raw: tuple[Tensor, ...]
    ) -> None:
        """Log the truth beside what is found in the batch's first crops."""
        some = slice(0, 8)
        found = self.head.codec.decode(self.head.prediction(tuple(x[some] for x in raw)))
        picture = draw_training(
            images[some] * self.pixel_std + self.pixel_mean,
            (points[some], labelled[some]),
            (found.points, torch.ones_like(labelled[some])),
        )
        get_event_storage().put_image("Above: ground truth. Below: found", picture)
