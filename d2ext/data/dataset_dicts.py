"""Loading data sets as lists of dicts, with the checks that save a run from failing hours later."""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)

from d2ext.data.annotations import describe_dropped, obvious_flaw
from d2ext.data.errors import DatasetError, shorten
from d2ext.data.panoptic import attach_panoptic
from d2ext.data.video.records import flatten, is_video

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def get_dataset_dicts(cfg: CfgNode, names: Sequence[str], *, is_train: bool) -> list[Record]:
    """Load the named data sets, check them, and leave out what cannot be trained on.

    Like Detectron2's ``get_detection_dataset_dicts``, with these differences: an image whose only
    annotations are crowds counts as annotated and stays; annotations that describe nothing are
    dropped, and one line says how many; problems that concern the whole data set are errors here,
    not hours later. Of videos, training gets the frames that are annotated, a test all.

    Args:
        cfg: reads ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``, ``INPUT.MASK_FORMAT``,
            ``INPUT.SEM_SEG_WITH_THINGS`` (adds the panoptic annotation to dicts that lack it),
            ``MODEL.MASK_ON``, ``MODEL.KEYPOINT_ON``
        names: registered data sets; training joins them
        is_train: whether to check and filter annotations

    Raises:
        DatasetError: unregistered or empty data set, missing files, class ids outside the set,
            missing masks, data sets with different classes
    """
    if not names:
        key = "DATASETS.TRAIN" if is_train else "DATASETS.TEST"
        raise DatasetError(f"No data set is given: set {key}, or pass --dataset and its files.")
    dicts = [load_images(name) for name in names]
    if is_train:
        dicts = [_annotated(name, d) for name, d in zip(names, dicts, strict=True)]
    if cfg.MODEL.LOAD_PROPOSALS:
        dicts = [
            load_proposals_into_dataset(d, _proposal_file(cfg, name, is_train))
            for name, d in zip(names, dicts, strict=True)
        ]
    if is_train:
        check_same_classes(names)
        if cfg.INPUT.SEM_SEG_WITH_THINGS:
            check_same_classes(names, "stuff_classes")
            dicts = [attach_panoptic(name, d) for name, d in zip(names, dicts, strict=True)]
        dicts = [_checked(cfg, name, d) for name, d in zip(names, dicts, strict=True)]
    records = list(itertools.chain.from_iterable(dicts))
    has_instances = any("annotations" in record for record in records)
    if is_train and has_instances:
        records = _filtered(cfg, records)
        classes = MetadataCatalog.get(names[0]).get("thing_classes")
        if classes is not None and records:
            print_instances_class_histogram(records, classes)
    if not records:
        raise DatasetError(
            f"No image of {', '.join(names)} is left to train on: none has annotations. Set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS: False to train on images without objects."
        )
    return records


def check_same_classes(names: Sequence[str], kind: str = "thing_classes") -> None:
    """Raise :class:`DatasetError` unless the data sets have the same classes in the same order."""
    known = {name: MetadataCatalog.get(name).get(kind) for name in names}
    first = known[names[0]]
    for name, classes in known.items():
        if classes != first:
            raise DatasetError(
                f"Data sets '{names[0]}' and '{name}' cannot be used together: their classes "
                f"differ ({shorten(first)} and {shorten(classes)}). Give both JSON files the "
                "same 'categories'."
            )


def load_dataset(name: str) -> list[Record]:
    """The dicts of a registered data set, or a :class:`DatasetError` that says why not."""
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"Data set '{name}' is not registered. Register it in Python, or pass --dataset with "
            f"its files. Known names: {shorten(sorted(DatasetCatalog.list()), 20)}."
        )
    try:
        records = DatasetCatalog.get(name)
    except FileNotFoundError as e:
        raise DatasetError(
            f"Data set '{name}' is registered, but '{e.filename}' does not exist. Detectron2 looks "
            "for its built-in data sets under the environment variable DETECTRON2_DATASETS "
            "(default 'datasets')."
        ) from e
    if not isinstance(records, list):
        raise DatasetError(
            f"Data set '{name}' is a {type(records).__name__}; d2ext's loader needs the list of "
            "dicts that DatasetCatalog usually gives."
        )
    if not records:
        raise DatasetError(f"Data set '{name}' has no images. Check its annotation file.")
    return records


def load_images(name: str) -> list[Record]:
    """:func:`load_dataset`; of videos all frames in order, see :func:`~d2ext.data.video.flatten`."""
    records = load_dataset(name)
    if not is_video(records):
        return records
    try:
        return flatten(records)
    except DatasetError as e:
        raise DatasetError(f"Data set '{name}': {e}") from e


def _annotated(name: str, records: list[Record]) -> list[Record]:
    """Frames without annotations are left out; images are as they are."""
    annotated = [r for r in records if "annotations" in r or "is_first" not in r]
    if not annotated:
        raise DatasetError(
            f"No frame of the videos of data set '{name}' is annotated (the public files of validation "
            "and test sets have no annotations)."
        )
    return annotated


def _proposal_file(cfg: CfgNode, name: str, is_train: bool) -> str:
    names, files = (
        (cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN)
        if is_train
        else (cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST)
    )
    return files[list(names).index(name)]


def _checked(cfg: CfgNode, name: str, records: list[Record]) -> list[Record]:
    """Raise on what no sample could repair; drop annotations that describe nothing."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    dropped: Counter[str] = Counter()
    wrong_class: list[str] = []
    no_mask: list[str] = []
    masks = 0
    rle: list[str] = []
    result = []
    for record in records:
        if "annotations" not in record:
            result.append(record)
            continue
        usable = []
        for annotation in record["annotations"]:
            category = annotation.get("category_id")
            if classes is not None and not _is_class(category, len(classes)):
                wrong_class.append(f"{category} in '{record['file_name']}'")
                continue
            flaw = obvious_flaw(annotation)
            if flaw:
                dropped[flaw] += 1
                continue
            if cfg.MODEL.MASK_ON and not annotation.get("iscrowd", 0):
                if not annotation.get("segmentation"):
                    which = f"annotation {annotation['id']} of " if "id" in annotation else ""
                    no_mask.append(f"{which}'{record['file_name']}'")
                    continue
                masks += 1
                if isinstance(annotation["segmentation"], dict):
                    rle.append(f"'{record['file_name']}'")
            usable.append(annotation)
        result.append({**record, "annotations": usable})
    if wrong_class:
        raise DatasetError(
            f"{len(wrong_class)} annotations of data set '{name}' have a class id outside "
            f"[0, {len(classes) - 1}]: {shorten(wrong_class)}. Its {len(classes)} classes are "
            f"{shorten(classes)}."
        )
    if no_mask and not masks:
        raise DatasetError(
            f"No annotation of data set '{name}' has a segmentation, but the model learns masks: "
            f"{shorten(no_mask)}. Annotate them; for an R-CNN set MODEL.MASK_ON: False; or train a "
            "model that learns boxes, such as CornerNet."
        )
    if no_mask:
        logger.warning(
            f"Data set '{name}': {len(no_mask)} annotations without segmentation are left out, since "
            f"the model learns masks: {shorten(no_mask)}."
        )
    if rle and cfg.INPUT.MASK_FORMAT == "polygon":
        raise DatasetError(
            f"{len(rle)} masks of data set '{name}' are RLE, but INPUT.MASK_FORMAT is 'polygon': "
            f"{shorten(rle)}. Set INPUT.MASK_FORMAT: bitmask."
        )
    if dropped:
        logger.warning(
            f"Data set '{name}': annotations that describe nothing are left out: "
            f"{describe_dropped(dropped)}."
        )
    return result


def _is_class(category: Any, count: int) -> bool:
    return isinstance(category, Integral) and 0 <= int(category) < count


def _filtered(cfg: CfgNode, records: list[Record]) -> list[Record]:
    """Leave out images without annotations and, for keypoints, those with too few of them."""
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        annotated = [record for record in records if record.get("annotations")]
        if len(annotated) < len(records):
            logger.info(
                f"{len(records) - len(annotated)} images without annotations are left out, "
                f"{len(annotated)} stay (DATALOADER.FILTER_EMPTY_ANNOTATIONS)."
            )
        records = annotated
    minimum = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    if minimum > 0:
        records = filter_images_with_few_keypoints(records, minimum)
    return records
