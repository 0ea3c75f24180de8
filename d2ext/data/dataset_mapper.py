"""From a data set's dict to a model's input."""

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from fvcore.common.registry import Registry
from fvcore.transforms.transform import TransformList

from d2ext.data.annotations import describe_dropped, normalize_annotations
from d2ext.data.augmentations import DetectionInput, ReportsVisibleShares, build_augmentations
from d2ext.data.augmentations.affine import WarpTransform
from d2ext.data.errors import AnnotationError, shorten
from d2ext.data.image_io import label_values, read_label_map, read_record_image
from d2ext.data.panoptic import IGNORE_LABEL, PanopticClasses, full_label_map, panoptic_classes

logger = logging.getLogger(__name__)

MAPPER_REGISTRY = Registry("MAPPER")
MAPPER_REGISTRY.__doc__ = """What ``INPUT.MAPPER`` names: ``build(cfg, is_train)`` returns a mapper.

A mapper makes a model's input of one data set dict, and raises ``d2ext.data.SampleError`` for one that
it cannot use. It may have a method ``samples(records, dataset_names)``, which turns the dicts of images
into those that are mapped; without it there is one sample for each image.
"""


@MAPPER_REGISTRY.register()
class D2extDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` (same constructor), which in addition

    - takes its augmentations from ``cfg.INPUT.AUGMENTATION``;
    - gives ``crowd_instances``: ``Instances`` with ``gt_boxes`` and ``gt_classes`` of the crowd
      annotations (Detectron2 discards them);
    - drops annotations that describe nothing (zero-area boxes, polygons with two points, empty
      masks) and computes boxes that are missing;
    - reads any kind of image (:mod:`d2ext.data.image_io`);
    - can make ``sem_seg`` hold things as well as stuff (``cfg.INPUT.SEM_SEG_WITH_THINGS``);
    - gives ``instances`` the same fields on every image, also on one without objects;
    - raises :class:`~d2ext.data.errors.SampleError`, which names the file, for unusable samples.

    Random numbers come from ``numpy.random``, so a caller that seeds it gets the same sample again.
    """

    # Whether ``instances`` have ``gt_ids``, the ``track_id`` of annotations; for subclasses.
    with_track_ids = False

    @configurable
    def __init__(
        self,
        *args: Any,
        sem_seg_with_things: PanopticClasses | None = None,
        sem_seg_labels: Collection[int] | None = None,
        published_crowds: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: of Detectron2's ``DatasetMapper``
            sem_seg_with_things: classes of the data, to make ``sem_seg`` of the panoptic
                annotation; None reads the file that ``sem_seg_file_name`` names
            sem_seg_labels: values that such a file may hold; None: any
            published_crowds: crowds are objects like others, see ``INPUT.PUBLISHED_CROWDS``
        """
        super().__init__(*args, **kwargs)
        self.sem_seg_labels = None if sem_seg_labels is None else set(sem_seg_labels)
        self.sem_seg_with_things = sem_seg_with_things
        self.published_crowds = published_crowds

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Arguments of the constructor. ``cfg.INPUT.AUGMENTATION.NAME`` chooses the recipe."""
        common = cfg
        if not is_train and cfg.MODEL.KEYPOINT_ON:
            # Detectron2 would ask the training data, which may not be there, for mirrored keypoints.
            common = cfg.clone()
            common.defrost()
            common.MODEL.KEYPOINT_ON = False
        arguments = super().from_config(common, is_train)
        arguments["augmentations"] = build_augmentations(cfg, is_train)
        arguments["published_crowds"] = cfg.INPUT.PUBLISHED_CROWDS
        if cfg.INPUT.AUGMENTATION.NAME != "default":
            arguments["recompute_boxes"] = False
        if cfg.INPUT.SEM_SEG_WITH_THINGS and is_train:
            arguments["sem_seg_with_things"] = panoptic_classes(cfg.DATASETS.TRAIN[0])
        metadata = (
            MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if is_train and cfg.DATASETS.TRAIN else None
        )
        if metadata is not None and metadata.get("stuff_classes") is not None:
            ignored = {
                metadata.get("ignore_label", IGNORE_LABEL),
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            }
            arguments["sem_seg_labels"] = {*range(len(metadata.stuff_classes)), *ignored}
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: one image in Detectron2's data set format; not modified

        Returns:
            ``image`` (C, H, W), uint8 or float32, in ``image_format``; ``height``, ``width`` of the
            original image; the other entries of the input; and, when training, as far as
            annotated, ``instances`` (``gt_boxes``, ``gt_classes``, with masks ``gt_masks``, with
            keypoints ``gt_keypoints``), ``crowd_instances`` and ``sem_seg`` (H, W) int64;
            ``instances`` also has ``gt_visible_shares`` (how much of each box the crop leaves,
            0..1) where a transform is :class:`ReportsVisibleShares`

        Raises:
            SampleError: the image cannot be read or the annotations do not belong to it
        """
        return self.map(dataset_dict)[0]

    def map(
        self, dataset_dict: dict[str, Any], transforms: TransformList | None = None
    ) -> tuple[dict[str, Any], TransformList]:
        """The sample, and the transforms that made it.

        Args:
            dataset_dict: see :meth:`__call__`
            transforms: of another image of this size, to be used for this one, too; None draws new ones
        """
        dataset_dict = dict(dataset_dict)  # what is changed below it is copied there
        image = read_record_image(dataset_dict, self.image_format)
        sem_seg = self._read_sem_seg(dataset_dict)
        dataset_dict.pop("sem_seg_file_name", None)
        if sem_seg is not None and sem_seg.shape != image.shape[:2]:
            raise AnnotationError(
                f"The label map of '{dataset_dict['file_name']}' has height and width "
                f"{sem_seg.shape}, the image {image.shape[:2]}."
            )
        annotations = dataset_dict.pop("annotations", None) if self.is_train else None
        if annotations is not None:
            annotations = self._prepare_annotations(annotations, dataset_dict["file_name"], image)

        aug_input = DetectionInput(image, sem_seg=sem_seg, **_boxes_and_crowd(annotations))
        if transforms is None:
            transforms = self.augmentations(aug_input)
        else:
            aug_input.replay(transforms)
        image = aug_input.image
        image_shape = image.shape[:2]
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if aug_input.sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(aug_input.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            dataset_dict.pop("annotations", None)
            dataset_dict.pop("sem_seg", None)
        elif annotations is not None:
            annotations = [a for a, keep in zip(annotations, aug_input.keep, strict=True) if keep]
            self._set_instances(dataset_dict, annotations, transforms, image_shape)
        return dataset_dict, transforms

    def _read_sem_seg(self, dataset_dict: dict[str, Any]) -> np.ndarray | None:
        """H×W labels in the image's original size, or None if there are none."""
        if self.is_train and self.sem_seg_with_things is not None:
            return full_label_map(dataset_dict, self.sem_seg_with_things)
        if "sem_seg_file_name" not in dataset_dict:
            return None
        file_name = dataset_dict["sem_seg_file_name"]
        labels = read_label_map(file_name)
        if self.is_train and self.sem_seg_labels is not None:
            wrong = [v for v in label_values(labels) if v not in self.sem_seg_labels]
            if wrong:
                raise AnnotationError(
                    f"Label map '{file_name}' has labels {shorten(wrong)}, which are no class."
                )
        return labels

    def _prepare_annotations(
        self, annotations: list[dict[str, Any]], file_name: str, image: np.ndarray
    ) -> list[dict[str, Any]]:
        """Drop what describes nothing and what the model does not need; check what is left."""
        dropped: Counter[str] = Counter()
        annotations = normalize_annotations(annotations, dropped)
        if dropped:
            _log_dropped(file_name, dropped)
        for annotation in annotations:
            if self.published_crowds:
                annotation["iscrowd"] = 0
            crowd = annotation.get("iscrowd", 0)
            if not self.use_instance_mask or crowd:
                annotation.pop("segmentation", None)
            if not self.use_keypoint or crowd:
                annotation.pop("keypoints", None)
            elif "keypoints" not in annotation:
                annotation["keypoints"] = np.zeros(3 * self._num_keypoints())
            if self.use_instance_mask and not crowd:
                self._check_mask(annotation, file_name, image)
        return annotations

    def _check_mask(self, annotation: dict[str, Any], file_name: str, image: np.ndarray) -> None:
        segmentation = annotation.get("segmentation")
        if segmentation is None:
            raise AnnotationError(
                f"Annotation {annotation.get('id', '?')} of '{file_name}' has no segmentation, but the "
                "model learns masks. Annotate it, or set MODEL.MASK_ON: False if the model can do "
                "without."
            )
        if isinstance(segmentation, dict):
            if self.instance_mask_format == "polygon":
                raise AnnotationError(
                    f"The mask of annotation {annotation.get('id', '?')} of '{file_name}' is an RLE, "
                    "but INPUT.MASK_FORMAT is 'polygon'. "
                    "Set INPUT.MASK_FORMAT: bitmask."
                )
            if tuple(segmentation["size"]) != image.shape[:2]:
                raise AnnotationError(
                    f"The mask of annotation {annotation.get('id', '?')} of '{file_name}' has height "
                    f"and width {segmentation['size']}, "
                    f"the image {list(image.shape[:2])}."
                )

    def _set_instances(
        self,
        dataset_dict: dict[str, Any],
        annotations: list[dict[str, Any]],
        transforms: TransformList,
        image_shape: tuple[int, int],
    ) -> None:
        """Transform the annotations; set ``instances`` and ``crowd_instances``."""
        shares = None
        if any(isinstance(t, ReportsVisibleShares) for t in transforms.transforms):
            shares = _visible_shares(
                [a for a in annotations if not a.get("iscrowd", 0)], transforms
            )
        annotations = [
            self._transform_annotation(annotation, transforms, image_shape)
            for annotation in annotations
        ]
        for annotation in annotations:
            if "keypoints" in annotation:  # a list of arrays would be slow to make a tensor of
                annotation["keypoints"] = annotation["keypoints"].tolist()
        regular = [a for a in annotations if not a.get("iscrowd", 0)]
        crowds = [a for a in annotations if a.get("iscrowd", 0)]
        if regular:
            instances = detection_utils.annotations_to_instances(
                regular, image_shape, mask_format=self.instance_mask_format
            )
            if self.recompute_boxes:
                instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
            if shares is not None:
                instances.gt_visible_shares = shares
            self._add_fields(dataset_dict, instances, regular, transforms)
            instances = detection_utils.filter_empty_instances(instances)
        else:
            instances = self._no_instances(image_shape)
            self._add_fields(dataset_dict, instances, [], transforms)
            if shares is not None:
                instances.gt_visible_shares = shares
        dataset_dict["instances"] = instances
        crowd_instances = detection_utils.annotations_to_instances(crowds, image_shape)
        dataset_dict["crowd_instances"] = detection_utils.filter_empty_instances(crowd_instances)

    def _transform_annotation(
        self, annotation: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> dict[str, Any]:
        """Box, polygons and keypoints of an annotation, modified in place, in the sample's image."""
        return detection_utils.transform_instance_annotations(
            annotation,
            transforms,
            image_shape,
            keypoint_hflip_indices=self.keypoint_hflip_indices,
        )

    def _add_fields(
        self,
        dataset_dict: dict[str, Any],
        instances: Instances,
        annotations: list[dict[str, Any]],
        transforms: TransformList,
    ) -> None:
        """Set further fields of ``instances``, before those without area are left out.

        Args:
            dataset_dict: of the image
            instances: N; also of length 0
            annotations: N; boxes, masks and keypoints are transformed, all else is as annotated
            transforms: of this sample
        """
        if self.with_track_ids:
            ids = [a["track_id"] for a in annotations]
            instances.gt_ids = torch.tensor(ids, dtype=torch.int64)

    def _no_instances(self, image_shape: tuple[int, int]) -> Instances:
        """``Instances`` of length 0 with the fields that others have."""
        instances = Instances(image_shape)
        instances.gt_boxes = Boxes(torch.zeros(0, 4))
        instances.gt_classes = torch.zeros(0, dtype=torch.int64)
        if self.use_instance_mask and self.instance_mask_format == "polygon":
            instances.gt_masks = PolygonMasks([])
        elif self.use_instance_mask:
            instances.gt_masks = BitMasks(torch.zeros(0, *image_shape, dtype=torch.bool))
        if self.use_keypoint:
            instances.gt_keypoints = Keypoints(torch.zeros(0, self._num_keypoints(), 3))
        return instances

    def _num_keypoints(self) -> int:
        return 0 if self.keypoint_hflip_indices is None else len(self.keypoint_hflip_indices)


@MAPPER_REGISTRY.register()
class PoseMapper(D2extDatasetMapper):
    """:class:`D2extDatasetMapper` whose ``gt_keypoints`` outside the image stay annotated.

    Detectron2 marks them as unlabelled. Published CenterNet decides on the annotation: a person all of
    whose joints lie outside the crop still trains its size. A sample that was rotated
    (``INPUT.AUGMENTATION.AFFINE.ROTATE_PROB``) says so: ``rotated``, True.
    """

    def map(
        self, dataset_dict: dict[str, Any], transforms: TransformList | None = None
    ) -> tuple[dict[str, Any], TransformList]:
        """See the base class."""
        sample, transforms = super().map(dataset_dict, transforms)
        steps = (t for t in transforms.transforms if isinstance(t, WarpTransform))
        if any(step.box_matrix is not None for step in steps):
            sample["rotated"] = True
        return sample, transforms

    def _transform_annotation(
        self, annotation: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> dict[str, Any]:
        keypoints = annotation.pop("keypoints", None)
        annotation = super()._transform_annotation(annotation, transforms, image_shape)
        if keypoints is not None:
            points = np.reshape(keypoints, (-1, 3))
            points[:, :2] = transforms.apply_coords(points[:, :2])
            if sum(isinstance(t, T.HFlipTransform) for t in transforms.transforms) % 2 == 1:
                points = points[self.keypoint_hflip_indices]
            annotation["keypoints"] = np.where(points[:, 2:] > 0, points, 0.0)
        return annotation


def _boxes_and_crowd(annotations: list[dict[str, Any]] | None) -> dict[str, np.ndarray]:
    """Arguments ``boxes`` (N, 4) XYXY and ``crowd`` (N,) of :class:`DetectionInput`."""
    if annotations is None:
        return {}
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    return {"boxes": boxes, "crowd": crowd}


def _visible_shares(annotations: list[dict[str, Any]], transforms: TransformList) -> torch.Tensor:
    """(N,) float32: the share of each box's area that the transforms leave."""
    if not annotations:
        return torch.zeros(0)
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    # Coordinates are not cut; all transforms keep sides parallel to the axes.
    whole = transforms.apply_coords(boxes.reshape(-1, 2)).reshape(-1, 2, 2)
    area = np.abs(whole[:, 1] - whole[:, 0]).prod(axis=1)
    cut = transforms.apply_box(boxes).reshape(-1, 2, 2)
    visible = (cut[:, 1] - cut[:, 0]).clip(min=0).prod(axis=1)
    return torch.from_numpy(visible / np.maximum(area, 1e-9)).float()


_dropped_logged = False


def _log_dropped(file_name: str, dropped: Counter[str]) -> None:
    """Say once per process that annotations are dropped. The loader has counted them all."""
    global _dropped_logged
    if not _dropped_logged:
        _dropped_logged = True
        logger.warning(
            f"Annotations of '{file_name}' that describe nothing are left out: "
            f"{describe_dropped(dropped)}. Further ones are left out silently."
        )
