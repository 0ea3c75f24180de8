"""Data sets of videos in Detectron2's catalogs: from files in any form, and the built-in names.

Under ``DETECTRON2_DATASETS``, read when they are first used:

- ``ytvis_{2019,2021,2022}_{train,val,test}``: ``ytvis_2019/{train,valid,test}/JPEGImages`` with
  ``ytvis_2019/train.json`` or ``ytvis_2019/train/instances.json``; ``valid`` may be called ``val``;
- ``coco_2017_{train,val}_as_ytvis_2019``: COCO's objects of classes that YouTube-VIS has, as its own;
- ``cityscapes_vps_{train,val,test}``: the folder ``cityscapes_vps`` as it comes
  (:mod:`.cityscapes_vps`);
- ``viper_vps_{train,val}``: the folder ``viper_vps`` (:mod:`.viper_vps`);
- ``flying_chairs_{train,val}``: ``FlyingChairs_release/data``, and the split file
  ``FlyingChairs_train_val.txt`` beside it or in the folder above, if there is one.
"""

import os
import pickle
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from d2ext.data.coco_json import read_json
from d2ext.data.coco_schema import Id
from d2ext.data.dataset_dicts import load_dataset
from d2ext.data.dataset_facts import dataset_facts
from d2ext.data.errors import DatasetError, shorten
from d2ext.data.summary import summarize
from d2ext.data.video import cityscapes_vps, viper_vps
from d2ext.data.video.coco_video_json import is_coco_video, read_coco_video
from d2ext.data.video.flow_pairs import flow_pairs
from d2ext.data.video.mask_folders import read_mask_folders
from d2ext.data.video.panoptic_video import is_panoptic_video, read_panoptic_video
from d2ext.data.video.video_data import VideoData
from d2ext.data.video.ytvis_json import is_ytvis, read_ytvis

Record = dict[str, Any]

# YouTube-VIS 2019's class → COCO's, as published for YolactEdge.
YTVIS_2019_FROM_COCO = {
    **{name: name for name in ("person", "skateboard", "dog", "cat", "cow", "train", "horse")},
    **{name: name for name in ("bear", "giraffe", "surfboard", "airplane", "truck", "zebra")},
    **{name: name for name in ("elephant", "snowboard", "boat")},
    "sedan": "car",
    "motorbike": "motorcycle",
    "tennis_racket": "tennis racket",
}


def read_videos(
    name: str,
    source: str,
    image_root: str,
    *,
    panoptic_root: str | None = None,
    classes: list[str] | None = None,
) -> VideoData:
    """Videos in any of the known forms, told by their content.

    Args:
        name: of the data set
        source: a JSON file in YouTube-VIS' form, in COCO's with videos, or in COCO's panoptic form with
            clips; or a folder of masks
        image_root: folder of the images
        panoptic_root: of the panoptic form, folder of its PNGs
        classes: names, of masks alone

    Raises:
        DatasetError: another form, or a file that cannot be used
    """
    if PathManager.isdir(source):
        return read_mask_folders(source, image_root, classes)
    content = read_json(source)
    if classes is not None:
        raise DatasetError(f"'{source}' names its classes itself: leave out the semantic classes.")
    if isinstance(content, dict):
        if is_panoptic_video(content):
            return read_panoptic_video(name, source, image_root, panoptic_root)
        if is_ytvis(content):
            return read_ytvis(source, content, image_root)
        if is_coco_video(content):
            return read_coco_video(source, content, image_root)
        if isinstance(content.get("videos"), dict):
            raise DatasetError(
                f"'{source}' seems to be the meta.json of YouTube-VOS, which has no categories and no "
                "masks. YouTube-VIS has files of its own (train.json or instances.json)."
            )
        if "images" in content:
            raise DatasetError(
                f"'{source}' is a COCO file of images: none has a 'video_id' and no annotation a "
                "'track_id'. Give it as --train-json or --val-json, or add them."
            )
    raise DatasetError(
        f"'{source}' is in no known form of videos: YouTube-VIS ('videos' with 'file_names', "
        "'annotations' with 'segmentations'), COCO with 'video_id' and 'track_id', COCO's panoptic "
        "form, or a folder of masks."
    )


def register_videos(
    name: str, read: Callable[[], VideoData], metadata: Mapping[str, Any] | None = None
) -> None:
    """Register videos that are read when they are first used, once; metadata of ``read`` are set then.

    Args:
        name: for the catalogs
        read: gives the videos
        metadata: what is known before
    """

    @lru_cache(maxsize=1)
    def pickled() -> bytes:
        data = read()
        MetadataCatalog.get(name).set(**data.metadata)
        return pickle.dumps(data.videos)

    DatasetCatalog.register(name, lambda: pickle.loads(pickled()))
    MetadataCatalog.get(name).set(video=True, **(metadata or {}))


def register_own_videos(
    name: str,
    source: str,
    images: str,
    panoptic_root: str | None = None,
    classes: list[str] | None = None,
) -> dict[Id, str]:
    """Read videos as :func:`read_videos` does, register them and look at the whole of them.

    Returns:
        category id → name

    Raises:
        DatasetError: files that cannot be used
    """
    read = partial(read_videos, name, source, images, panoptic_root=panoptic_root, classes=classes)
    register_videos(name, read, {"json_file": source, "image_root": images})
    summarize(name, load_dataset(name))
    metadata = MetadataCatalog.get(name)
    ids = metadata.thing_dataset_id_to_contiguous_id
    categories = {i: metadata.thing_classes[contiguous] for i, contiguous in ids.items()}
    for i, contiguous in metadata.get("stuff_dataset_id_to_contiguous_id", {}).items():
        categories[i] = f"{metadata.stuff_classes[contiguous]} (stuff)"
    return categories


def register_relabelled(
    name: str, source: str, target: str, from_source: Mapping[str, str]
) -> None:
    """Register an image data set's objects under the classes of another data set.

    Objects of other classes, and images that then have none, are left out.

    Args:
        name: for the catalogs
        source: the image data set
        target: whose classes the new one has
        from_source: class of the target → class of the source

    Raises:
        DatasetError: when loaded: unknown classes
    """

    def load() -> list[Record]:
        old, new = (dataset_facts(dataset).things or [] for dataset in (source, target))
        unknown = [
            *(f"{n} of {target}" for n in from_source if n not in new),
            *(f"{n} of {source}" for n in from_source.values() if n not in old),
        ]
        if unknown:
            raise DatasetError(f"Data set '{name}': there are no classes {shorten(unknown)}.")
        table = {old.index(theirs): new.index(ours) for ours, theirs in from_source.items()}
        records = []
        for record in load_dataset(source):
            annotations = [
                {**a, "category_id": table[a["category_id"]]}
                for a in record.get("annotations", ())
                if a["category_id"] in table
            ]
            if annotations:
                records.append({**record, "annotations": annotations})
        known = MetadataCatalog.get(target).as_dict()
        keys = ("thing_classes", "thing_colors", "thing_dataset_id_to_contiguous_id")
        MetadataCatalog.get(name).set(**{key: known[key] for key in keys if key in known})
        return records

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="coco")


def register_builtin_videos() -> None:
    """Register the names above, in the folder that ``DETECTRON2_DATASETS`` names now."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for year in (2019, 2021, 2022):
        for split, folders in (("train", ["train"]), ("val", ["valid", "val"]), ("test", ["test"])):
            files = [
                (os.path.join(root, f"ytvis_{year}", file), os.path.join(root, f"ytvis_{year}", f))
                for f in folders
                for file in (f"{f}.json", f"{f}/instances.json")
            ]
            name = f"ytvis_{year}_{split}"
            register_videos(name, partial(_read_ytvis, name, files), {"evaluator_type": "ytvis"})
    for split in ("train", "val"):
        register_relabelled(
            f"coco_2017_{split}_as_ytvis_2019",
            f"coco_2017_{split}",
            "ytvis_2019_train",
            YTVIS_2019_FROM_COCO,
        )
        name = f"flying_chairs_{split}"
        DatasetCatalog.register(name, partial(_flying_chairs, root, split))
        MetadataCatalog.get(name).evaluator_type = "optical_flow"
    for folder, readers in (
        (
            "cityscapes_vps",
            {
                "train": cityscapes_vps.read_train,
                "val": cityscapes_vps.read_val,
                "test": cityscapes_vps.read_test,
            },
        ),
        ("viper_vps", {"train": viper_vps.read_train, "val": viper_vps.read_val}),
    ):
        path = os.path.join(root, folder)
        for split, read in readers.items():
            name = f"{folder}_{split}"
            known = {"evaluator_type": "video_panoptic_seg", "image_root": path}
            register_videos(name, partial(read, name, path), known)


def _read_ytvis(name: str, files: list[tuple[str, str]]) -> VideoData:
    """The first of the JSON files that is there."""
    there = [(file, folder) for file, folder in files if PathManager.isfile(file)]
    if not there:
        raise DatasetError(
            f"Data set '{name}' is not there: none of {', '.join(file for file, _ in files)} exists. "
            "The environment variable DETECTRON2_DATASETS names the folder (default 'datasets')."
        )
    file, folder = there[0]
    images = os.path.join(folder, "JPEGImages")
    data = read_videos(name, file, images)
    return VideoData(data.videos, {**data.metadata, "json_file": file, "image_root": images})


def _flying_chairs(root: str, split: str) -> list[Record]:
    folder = os.path.join(root, "FlyingChairs_release")
    files = [os.path.join(f, "FlyingChairs_train_val.txt") for f in (folder, root)]
    split_file = next((f for f in files if PathManager.isfile(f)), None)
    return flow_pairs(os.path.join(folder, "data"), split, split_file)
