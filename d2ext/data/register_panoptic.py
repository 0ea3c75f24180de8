"""Panoptic data sets in Detectron2's separated form, registered from COCO's panoptic form.

The dicts carry all that panoptic models and their evaluators read: ``annotations``,
``sem_seg_file_name`` (0 things, 1..S stuff), ``pan_seg_file_name`` and ``segments_info`` with
contiguous ids.
"""

import logging
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.utils.file_io import PathManager

from d2ext.data.coco_json import differences, load_coco_json, read_coco_json
from d2ext.data.coco_schema import Id
from d2ext.data.errors import DatasetError, shorten
from d2ext.data.panoptic import IGNORE_LABEL, attach_panoptic, read_panoptic_json
from d2ext.data.panoptic_json import PanopticSummary, check_panoptic_json
from d2ext.data.panoptic_to_detection import DetectionFiles, panoptic_to_detection

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def register_panoptic(
    name: str,
    images: str,
    panoptic_json: str,
    panoptic_root: str | None = None,
    *,
    json: str | None = None,
    sem_seg: str | None = None,
) -> PanopticSummary:
    """Check a panoptic data set, make what is missing, and register it.

    Args:
        name: under which the catalogs have it then
        images: folder of the images
        panoptic_json: COCO's panoptic form
        panoptic_root: folder of its PNGs; default: by panopticapi's convention the JSON file's name
            without ``.json``
        json: instances in COCO's form; None: made of the PNGs
        sem_seg: folder of maps with 0 things, 1..S stuff, 255 void, named as the PNGs are; None: made
            of the PNGs

    Returns:
        what is in the JSON file

    Raises:
        DatasetError: files that cannot be used
    """
    panoptic_root = panoptic_root or os.path.splitext(panoptic_json)[0]
    summary = check_panoptic_json(panoptic_json, panoptic_root, images)
    if summary.left_out:
        logger.warning(
            f"Data set '{name}': {len(summary.left_out)} images without annotation are left out: "
            f"image id {shorten(summary.left_out)}."
        )
    if json is not None:
        _check_instances_match(name, read_coco_json(json, images).classes, summary)
    made_json, made_sem_seg = json, sem_seg
    if json is None or sem_seg is None:
        made_json, made_sem_seg = panoptic_to_detection(name, summary, panoptic_root)
    paths = {
        "image_root": images,
        "panoptic_json": panoptic_json,
        "panoptic_root": panoptic_root,
        "json_file": json or made_json,
        "sem_seg_root": sem_seg or made_sem_seg,
    }
    if json is None:
        paths["mask_format"] = "bitmask"  # exact masks, as RLE
    _register(name, partial(_load, name), summary.metadata(), paths)
    return summary


def _check_instances_match(name: str, classes: dict[Id, str], summary: PanopticSummary) -> None:
    """Raise :class:`DatasetError` unless an instances file has the things of the panoptic one."""
    text = differences(classes, summary.things)
    if text:
        raise DatasetError(
            f"The categories of data set '{name}' differ between its instances and the things of "
            f"its panoptic file ({text}). Give both the same, or leave out the "
            "instances file: instances are then made of the panoptic PNGs."
        )


def _register(
    name: str,
    load: Callable[[], list[Record]],
    metadata: dict[str, Any],
    paths: dict[str, Any],
) -> None:
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        evaluator_type="coco_panoptic_seg",
        ignore_label=IGNORE_LABEL,
        label_divisor=1000,
        **metadata,
        **paths,
    )


def _load(name: str) -> list[Record]:
    """Dicts of a data set from the files that its metadata name."""
    metadata = MetadataCatalog.get(name)
    records = load_coco_json(metadata.json_file, metadata.image_root)
    records = attach_panoptic(name, records)
    for record in records:
        png = os.path.relpath(record["pan_seg_file_name"], metadata.panoptic_root)
        record["sem_seg_file_name"] = os.path.join(metadata.sem_seg_root, png)
    return records


def register_cityscapes_separated() -> None:
    """Register ``cityscapes_fine_panoptic_{train,val}_separated``.

    They are made of the files that Detectron2's ``cityscapes_fine_panoptic_*`` read (as
    ``cityscapesscripts/preparation/createPanopticImgs.py`` writes them), and need no other package.
    The evaluators are those of COCO's panoptic data.
    """
    for split in ("train", "val"):
        source = f"cityscapes_fine_panoptic_{split}"
        name = f"{source}_separated"
        if name in DatasetCatalog.list() or source not in DatasetCatalog.list():
            continue
        files = MetadataCatalog.get(source)
        register_cityscapes_folder(name, files.image_root, files.panoptic_json, files.panoptic_root)


def register_cityscapes_folder(
    name: str, image_root: str, panoptic_json: str, panoptic_root: str
) -> None:
    """Register one split of Cityscapes; its files are read when the data set is first loaded.

    Args:
        name: for the catalogs
        image_root: folder of the cities' folders, ``.../leftImg8bit/train``
        panoptic_json, panoptic_root: as ``createPanopticImgs.py`` writes them
    """

    @lru_cache(maxsize=1)
    def convert() -> DetectionFiles:
        return _convert_cityscapes(name, image_root, panoptic_json, panoptic_root)

    def load() -> list[Record]:
        files = convert()
        MetadataCatalog.get(name).set(json_file=files.json_file, sem_seg_root=files.sem_seg_root)
        return _load(name)

    paths = {
        "image_root": image_root,
        "panoptic_json": panoptic_json,
        "panoptic_root": panoptic_root,
        "mask_format": "bitmask",
    }
    metadata = PanopticSummary.of(CITYSCAPES_CATEGORIES, [], []).metadata()
    _register(name, load, metadata, paths)


def _convert_cityscapes(
    name: str, image_root: str, panoptic_json: str, panoptic_root: str
) -> DetectionFiles:
    """Its JSON file names images by another name than they have: they go by their ids."""
    content = read_panoptic_json(panoptic_json)
    suffix = "_leftImg8bit.png"
    file_names = {
        file[: -len(suffix)]: f"{city}/{file}"
        for city in PathManager.ls(image_root)
        for file in PathManager.ls(os.path.join(image_root, city))
        if file.endswith(suffix)
    }
    images = [{**i, "file_name": file_names.get(i["id"])} for i in content["images"]]
    summary = PanopticSummary.of(CITYSCAPES_CATEGORIES, images, content["annotations"])
    absent = [i for i, image in summary.images.items() if image["file_name"] is None]
    if absent:
        raise DatasetError(
            f"{len(absent)} of {len(summary.images)} images that '{panoptic_json}' lists are not in "
            f"'{image_root}': {shorten(absent)}."
        )
    return panoptic_to_detection(name, summary, panoptic_root)
