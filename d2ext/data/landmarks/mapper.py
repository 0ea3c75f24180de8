"""From an instance to a crop that a landmark network trains on; from an image to a test input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances, Keypoints

from d2ext.data.augmentations.photometric import RandomPhotometricDistortion
from d2ext.data.coco_results import category_ids
from d2ext.data.dataset_facts import flip_indices
from d2ext.data.dataset_mapper import MAPPER_REGISTRY
from d2ext.data.errors import AnnotationError
from d2ext.data.image_io import ImageCache, ImageReader, read_image, read_record_image
from d2ext.data.landmarks.geometry import pad_box
from d2ext.data.landmarks.hourglass import draw_hourglass, hourglass_sample
from d2ext.data.landmarks.samples import (
    Record,
    add_detections,
    instance_crop_box,
    instance_points,
    instance_records,
    usable_annotations,
)
from d2ext.data.landmarks.transforms import (
    AffineCropTransform,
    CutoutTransform,
    RandomCropGeometry,
    crop_transform,
    half_body_box,
)

# Change of each of brightness, contrast, saturation and hue, once colours are to change.
_EACH_COLOR_PROB = 0.5
# Output stride of the published hourglass, whose joints are in heat-map pixels.
_HOURGLASS_STRIDE = 4
# Points below which a body's lower half begins, by name.
_LOWER = ("hip", "knee", "ankle", "pelvis")


@MAPPER_REGISTRY.register()
def build_top_down_mapper(cfg: CfgNode, is_train: bool) -> TopDownMapper | TopDownTestMapper:
    """Training: a sample is one annotated instance, cropped. Test: one image with the boxes to crop."""
    return TopDownMapper(cfg, True) if is_train else TopDownTestMapper(cfg)


class TopDownMapper:
    """Training samples of a landmark network. A sample has

    - ``image`` (3, h, w) float32 in [0, 255], the crop, in ``image_format``;
    - ``crop``: True, which tells the model that there is nothing left to crop;
    - ``instances``: ``Instances((h, w))`` of length 1 with ``gt_boxes`` (the instance's box in the
      crop), ``gt_classes`` and ``gt_keypoints`` (1, K, 3): x, y in crop pixels, continuous, never
      rounded, also outside the crop; v = 0 not labelled, 1 hidden, 2 visible;
    - ``crop_matrix`` (2, 3) float64, image to crop, both continuous, flip included; ``crop_box``
      (4,) float64, the padded box in the image before augmentation; ``flipped``;
    - ``instance_id``, ``height``, ``width``, ``file_name``, ``image_id``.
    """

    @configurable
    def __init__(
        self,
        *,
        size: tuple[int, int],
        flip_indices: Sequence[int],
        image_format: str = "BGR",
        padding: float = 1.25,
        geometry: RandomCropGeometry | None = None,
        recipe: str = "default",
        half_body_prob: float = 0.0,
        half_body_min_points: int = 8,
        upper: Sequence[bool] = (),
        cutout_prob: float = 0.0,
        cutout_size: tuple[float, float] = (0.1, 0.4),
        color_prob: float = 0.0,
        color: RandomPhotometricDistortion | None = None,
        reader: ImageReader = read_image,
    ) -> None:
        """
        Args:
            size: (h, w) of the crop.
            flip_indices: (K,) which landmark takes the place of each when mirrored.
            image_format: "BGR" or "RGB".
            padding: factor on the box.
            geometry: draws the crop's geometry; plain crops follow its rule
                (:mod:`d2ext.data.landmarks.geometry`), too. None: plain crops, edges onto edges.
            recipe: "default", "hourglass" or "none"; see ``INPUT.LANDMARKS.RECIPE``.
            half_body_prob, half_body_min_points, upper: of half-body crops; ``upper`` (K,) tells the
                points of the upper half.
            cutout_prob, cutout_size: of a covered rectangle.
            color_prob, color: of changed colours.
            reader: takes a file name and ``format=``; for callers that keep images in memory.

        Raises:
            ValueError: unknown recipe, or a hourglass recipe whose crop is no square.
        """
        if recipe not in ("default", "hourglass", "none"):
            raise ValueError(
                f"INPUT.LANDMARKS.RECIPE is {recipe!r}; choose default, hourglass or none."
            )
        if recipe == "hourglass" and size[0] != size[1]:
            raise ValueError(
                f"The hourglass recipe needs a square MODEL.LANDMARKS.INPUT_SIZE: {size}."
            )
        if half_body_prob > 0 and len(upper) != len(flip_indices):
            raise ValueError(
                "Half-body crops need INPUT.LANDMARKS.UPPER_BODY, the names of the upper points."
            )
        self.size = size
        self.flip_indices = list(flip_indices)
        self.image_format = image_format
        self.padding = padding
        self.geometry = geometry
        self.plain_geometry = "continuous" if geometry is None else geometry.geometry
        self.recipe = recipe
        self.half_body_prob = half_body_prob
        self.half_body_min_points = half_body_min_points
        self.upper = np.asarray(upper, dtype=bool)
        self.cutout_prob = cutout_prob
        self.cutout_size = cutout_size
        self.color_prob = color_prob
        self.color = color
        self.reader = reader

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """From ``INPUT.LANDMARKS`` and, so that training crops are what the model sees in a test,
        ``MODEL.LANDMARKS.INPUT_SIZE`` and ``CROP.PADDING``. The landmarks are those of the first
        training set."""
        c = cfg.INPUT.LANDMARKS
        dataset = (cfg.DATASETS.TRAIN or cfg.DATASETS.TEST)[0]
        model = cfg.MODEL.LANDMARKS
        size = int(model.INPUT_SIZE[0]), int(model.INPUT_SIZE[1])
        recipe = c.RECIPE if is_train else "none"
        half_body_prob = c.HALF_BODY_PROB if recipe == "default" else 0.0
        return {
            "size": size,
            "flip_indices": flip_indices(dataset),
            "reader": ImageCache(c.CACHE_MB << 20) if c.CACHE_MB > 0 else read_image,
            "image_format": cfg.INPUT.FORMAT,
            "padding": model.CROP.PADDING,
            "recipe": recipe,
            "geometry": RandomCropGeometry(
                size,
                c.CROP_GEOMETRY,
                rotation=c.ROTATION,
                rotation_prob=c.ROTATION_PROB,
                scale=c.SCALE,
                shift=c.SHIFT,
                flip_prob=c.FLIP_PROB,
            ),
            "half_body_prob": half_body_prob,
            "half_body_min_points": c.HALF_BODY_MIN_POINTS,
            "upper": upper_body(dataset, c.UPPER_BODY) if half_body_prob > 0 else (),
            "cutout_prob": c.CUTOUT_PROB,
            "cutout_size": tuple(c.CUTOUT_SIZE),
            "color_prob": c.COLOR_PROB,
            "color": RandomPhotometricDistortion(
                brightness=c.BRIGHTNESS,
                contrast=c.CONTRAST,
                saturation=c.SATURATION,
                hue=c.HUE,
                prob=_EACH_COLOR_PROB,
                image_format=cfg.INPUT.FORMAT,
            )
            if c.COLOR_PROB > 0
            else None,
        }

    @staticmethod
    def samples(records: list[Record], dataset_names: Sequence[str]) -> list[Record]:
        """One record for each annotated instance."""
        return instance_records(records)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: an image whose ``annotations`` has one entry, as
                :func:`~d2ext.data.landmarks.samples.instance_records` makes them; not modified.

        Raises:
            SampleError: the image cannot be read, or the annotation does not fit.
        """
        if len(record["annotations"]) != 1:
            raise AnnotationError(
                f"A landmark sample of '{record['file_name']}' has {len(record['annotations'])} "
                "instances; expected one (see instance_records)."
            )
        annotation = record["annotations"][0]
        points = instance_points(annotation, len(self.flip_indices))
        image = read_record_image(dict(record), self.image_format, self.reader)
        box = np.array(instance_crop_box(annotation))
        if not np.isfinite(box).all():
            raise AnnotationError(
                f"Annotation {annotation.get('id')} of '{record['file_name']}' has a box that is "
                "not finite."
            )
        box = pad_box(box, self.size, self.padding)
        if self.recipe == "hourglass":
            sample = self._hourglass(image, points, box)
        else:
            sample = self._augmented(image, points, box)
        crop, crop_points, matrix, flipped = sample
        result = {key: value for key, value in record.items() if key != "annotations"}
        result.setdefault("height", image.shape[0])
        result.setdefault("width", image.shape[1])
        instances = Instances((crop.shape[0], crop.shape[1]))
        instances.gt_boxes = _map_box(annotation, matrix, self.size)
        instances.gt_classes = torch.zeros(1, dtype=torch.int64)
        instances.gt_keypoints = Keypoints(torch.from_numpy(crop_points[None].astype(np.float32)))
        picture = np.ascontiguousarray(crop.transpose(2, 0, 1), dtype=np.float32)
        return {
            **result,
            "image": torch.from_numpy(picture),
            "crop": True,
            "instances": instances,
            "crop_matrix": torch.from_numpy(np.array(matrix, dtype=np.float64)),
            "crop_box": torch.from_numpy(box),
            "flipped": flipped,
            "instance_id": annotation.get("id", 0),
        }

    def _augmented(
        self, image: np.ndarray, points: np.ndarray, box: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        augment = self.recipe == "default"
        if augment and np.random.uniform() < self.half_body_prob:
            half = half_body_box(points, self.upper, self.size, self.half_body_min_points)
            box = box if half is None else half
        if augment and self.geometry is not None:
            transform, flipped = self.geometry(box)
        else:
            transform, flipped = crop_transform(box, self.size, self.plain_geometry), False
        crop = transform.apply_image(image)
        points = _map_points(points, transform)
        if flipped:
            points = points[self.flip_indices]
        if augment and self.color is not None and np.random.uniform() < self.color_prob:
            crop = np.clip(self.color.get_transform(crop).apply_image(crop), 0, 255)
        if augment and np.random.uniform() < self.cutout_prob:
            cutout = random_cutout(crop, self.cutout_size)
            crop = cutout.apply_image(crop)
            points[cutout.covers(points[:, :2]) & (points[:, 2] > 0), 2] = 1
        return crop, points, transform.matrix, flipped

    def _hourglass(
        self, image: np.ndarray, points: np.ndarray, box: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """The published recipe; ``gt_keypoints`` are its heat-map pixels times 4.

        Its coordinates are taken as continuous ones: it cuts images at its coordinates, and finds
        points at the middles of cells, i + 0.5.

        The matrix is that of the unaugmented crop: the published joints are rounded, so there is
        no exact one.
        """
        if self.image_format == "BGR":
            image = image[:, :, ::-1]
        center, scale = (box[:2] + box[2:]) / 2, (box[2] - box[0]) / 200
        size = self.size[0]
        draws = draw_hourglass()
        try:
            crop, joints = hourglass_sample(
                image,
                points,
                center,
                scale,
                self.flip_indices,
                draws,
                size=size,
                output_size=size // _HOURGLASS_STRIDE,
            )
        except ValueError as e:
            raise AnnotationError(str(e)) from e
        crop = crop * np.float32(255)
        crop = crop[:, :, ::-1] if self.image_format == "BGR" else crop
        drawn = joints[:, 0] > 0
        joints[:, :2] *= _HOURGLASS_STRIDE
        joints[:, 2] = np.where(drawn, np.maximum(joints[:, 2], 1), 0)
        joints[~drawn] = 0
        matrix = crop_transform(box, self.size).matrix
        return crop, joints, matrix, draws.flip


class TopDownTestMapper:
    """Test inputs of a landmark network, one per image: the whole ``image`` (C, H, W) uint8, not
    resized, and ``instances`` whose boxes are to be cropped (the model pads them).

    With annotations: ``gt_boxes``, ``gt_classes``, ``instance_ids`` (N,) int64 of all instances with
    labelled points. With ``detections`` (:func:`add_detections`): ``pred_boxes``, ``scores``,
    ``pred_classes``. With ``whole_image``, and where an image has neither key, there is no
    ``instances``, and the whole image is the crop.
    """

    @configurable
    def __init__(
        self,
        *,
        image_format: str = "BGR",
        whole_image: bool = False,
        detections: str = "",
        min_score: float = 0.0,
        reader: ImageReader = read_image,
    ) -> None:
        """
        Args:
            image_format: "BGR" or "RGB".
            whole_image: give no boxes.
            detections: path of a file of boxes that :meth:`samples` takes; "": those annotated.
            min_score: of the file's boxes.
            reader: takes a file name and ``format=``.
        """
        self.image_format = image_format
        self.whole_image = whole_image
        self.detections = detections
        self.min_score = min_score
        self.reader = reader

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """From ``INPUT.FORMAT``, ``INPUT.LANDMARKS.TEST_BOXES`` and ``TEST_MIN_SCORE``."""
        boxes = cfg.INPUT.LANDMARKS.TEST_BOXES
        return {
            "image_format": cfg.INPUT.FORMAT,
            "whole_image": boxes == "image",
            "detections": "" if boxes in ("annotations", "image") else boxes,
            "min_score": cfg.INPUT.LANDMARKS.TEST_MIN_SCORE,
        }

    def samples(self, records: list[Record], dataset_names: Sequence[str]) -> list[Record]:
        """The images, with ``detections`` where they come from a file."""
        if not self.detections:
            return records
        categories = category_ids(MetadataCatalog.get(dataset_names[0]))
        return add_detections(records, self.detections, self.min_score, categories)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: an image of the data set; not modified.

        Raises:
            SampleError: the image cannot be read.
        """
        image = read_record_image(dict(record), self.image_format, self.reader)
        result = {k: v for k, v in record.items() if k not in ("annotations", "detections")}
        result["height"], result["width"] = image.shape[:2]
        result["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.whole_image:
            return result
        instances = Instances(image.shape[:2])
        if "detections" in record:
            boxes = [box for box, _ in record["detections"]]
            instances.pred_boxes = Boxes(_box_tensor(boxes))
            instances.scores = torch.tensor([score for _, score in record["detections"]])
            instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
        elif "annotations" in record:
            annotations = usable_annotations(record)
            instances.gt_boxes = Boxes(_box_tensor([instance_crop_box(a) for a in annotations]))
            instances.gt_classes = torch.tensor(
                [a["category_id"] for a in annotations], dtype=torch.int64
            )
            instances.instance_ids = torch.tensor(
                [a.get("id", i) for i, a in enumerate(annotations)], dtype=torch.int64
            )
        else:
            return result
        result["instances"] = instances
        return result


def random_cutout(crop: np.ndarray, size: tuple[float, float]) -> CutoutTransform:
    """A rectangle of random place, shape and colour.

    Args:
        size: smallest and largest side, fraction of the crop's.
    """
    height, width = crop.shape[:2]
    w, h = (np.random.uniform(*size, 2) * (width, height)).tolist()
    x, y = np.random.uniform(0, 1, 2) * (width - w, height - h)
    fill = np.random.uniform(0, 255, crop.shape[2]).astype(crop.dtype)
    return CutoutTransform((round(x), round(y), round(x + w), round(y + h)), fill)


def upper_body(dataset: str, names: Sequence[str] = ()) -> list[bool]:
    """Which landmarks belong to the upper half of a body.

    Args:
        names: of the upper ones; if empty, all but hips, pelvis, knees and ankles.

    Raises:
        ValueError: names that the data set does not have.
    """
    known = MetadataCatalog.get(dataset).keypoint_names
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"INPUT.LANDMARKS.UPPER_BODY: '{dataset}' has no {', '.join(unknown)}.")
    if names:
        return [name in names for name in known]
    return [not any(part in name for part in _LOWER) for name in known]


def _map_points(points: np.ndarray, transform: AffineCropTransform) -> np.ndarray:
    """(K, 3) into the crop; points that are not labelled become 0."""
    result = points.copy()
    result[:, :2] = transform.apply_coords(points[:, :2])
    result[points[:, 2] == 0] = 0
    return result


def _map_box(annotation: dict[str, Any], matrix: np.ndarray, size: tuple[int, int]) -> Boxes:
    """The box about the mapped corners of the instance's box, cut to the crop."""
    x0, y0, x1, y1 = instance_crop_box(annotation)
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    mapped = AffineCropTransform(matrix, size).apply_coords(corners).clip(0, [size[1], size[0]])
    return Boxes(_box_tensor([[*mapped.min(axis=0), *mapped.max(axis=0)]]))


def _box_tensor(boxes: list[list[float]]) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
