"""Cityscapes-VPS (arXiv 2006.11339), below the folder ``cityscapes_vps``:

- train: ``train/{img,labelmap}`` and ``instances_train_city_vps_rle.json``;
- val: ``val/{img_all,panoptic_video}`` and ``panoptic_gt_val_city_vps.json``, COCO's panoptic form;
- test: ``test/img_all`` and ``im_all_info_test_city_vps.json``, images without annotations.

The other lists that come with it (``panoptic_im_*``, ``instances_val_*``, ``im_all_info_val_*``) say
nothing more and are not read. Category ids are Cityscapes' train ids: stuff 0 to 10, things 11 to 18.
The data are registered as all panoptic data are, stuff and things numbered separately
(``MODEL.UPSNET.CATEGORY_IDS`` "separated"), and a full label map (``INPUT.SEM_SEG_WITH_THINGS``) has
just the train ids.
"""

import os
from collections.abc import Mapping

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.utils.file_io import PathManager

from d2ext.data.coco_json import check_image_files, check_lists, raise_problems, read_json
from d2ext.data.coco_schema import PANOPTIC, Findings, check_ids, normalize
from d2ext.data.errors import DatasetError
from d2ext.data.panoptic_json import PanopticSummary
from d2ext.data.video.label_maps import read_label_map_clips
from d2ext.data.video.panoptic_video import image_videos, places_by_name, read_panoptic_video
from d2ext.data.video.video_data import VideoData

CATEGORIES = [
    {"id": c["trainId"], **{key: c[key] for key in ("name", "isthing", "color")}}
    for c in CITYSCAPES_CATEGORIES
]

# Who makes what, as the published code's users report (its issues 9, 12, 21, 26).
_DOWNLOAD = "in the download of Cityscapes-VPS"
_FRAMES = (
    "frames of Cityscapes' leftImg8bit sequences, on request there; the published code's "
    "prepare_data/fetch_city_images.py picks and names them"
)
_MADE = (
    "not in the download: the published code's prepare_data/create_panoptic_labels.sh makes it, for "
    "some only when it is run twice"
)
_LABEL_MAPS = "made of train/inst, which is in the download, by the published code's prepare_data"


def read_train(name: str, root: str) -> VideoData:
    """Records of the clips of the training part; see :mod:`.label_maps`.

    Args:
        name: of the data set
        root: folder ``cityscapes_vps``

    Raises:
        DatasetError: files that are missing or cannot be used
    """
    json_file, images, labels = check_there(
        name,
        root,
        {
            "instances_train_city_vps_rle.json": _DOWNLOAD,
            "train/img": _FRAMES,
            "train/labelmap": _LABEL_MAPS,
        },
    )
    return read_label_map_clips(name, json_file, images, labels, CATEGORIES)


def read_val(name: str, root: str) -> VideoData:
    """Records of the clips of the validation part; as :func:`read_train`."""
    json_file, images, panoptic = check_there(
        name,
        root,
        {
            "panoptic_gt_val_city_vps.json": _MADE,
            "val/img_all": _FRAMES,
            "val/panoptic_video": _DOWNLOAD,
        },
    )
    return read_panoptic_video(name, json_file, images, panoptic)


def read_test(name: str, root: str) -> VideoData:
    """Records of the clips of the test part, of which no frame is annotated; as :func:`read_train`."""
    json_file, images = check_there(
        name,
        root,
        {"im_all_info_test_city_vps.json": _DOWNLOAD, "test/img_all": _FRAMES},
    )
    content = read_json(json_file)
    content = content if isinstance(content, dict) else {}
    check_lists(json_file, content, ["images"])
    findings = Findings()
    entries = normalize(content["images"], "images", PANOPTIC["images"], findings)
    check_ids(entries, "images", findings)
    problems = findings.lines() or check_image_files(entries, images)
    raise_problems(json_file, "a list of images", problems)
    places = places_by_name(json_file, entries, "id")
    metadata = {
        **PanopticSummary.of(CATEGORIES, [], []).metadata(),
        "evaluator_type": "video_panoptic_seg",
        "video": True,
    }
    return VideoData(image_videos(entries, images, places), metadata)


def check_there(name: str, root: str, makers: Mapping[str, str]) -> list[str]:
    """Paths of files and folders below ``root``.

    Args:
        name: of the data set
        root: folder of the data
        makers: name below ``root`` → where it comes from

    Raises:
        DatasetError: what is missing, and where it comes from
    """
    paths = {key: os.path.join(root, *key.split("/")) for key in makers}
    missing = [key for key, path in paths.items() if not PathManager.exists(path)]
    if missing:
        texts = [f"'{paths[key]}' does not exist ({makers[key]})" for key in missing]
        raise DatasetError(
            f"Data set '{name}' is not complete: {'; '.join(texts)}. The environment variable "
            "DETECTRON2_DATASETS names the folder above (default 'datasets')."
        )
    return list(paths.values())
