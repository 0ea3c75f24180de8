"""Semantic data sets of one's own: pictures and label maps in two folders, names of the classes."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from d2ext.data.errors import DatasetError, shorten
from d2ext.data.image_io import label_values, read_label_map
from d2ext.data.panoptic import IGNORE_LABEL
from d2ext.data.summary import CHECKED_IMAGES, evenly, summarize


def parse_classes(text: str) -> list[str]:
    """Names of classes: separated by commas, or a text file with one name per line.

    Raises:
        DatasetError: no names, or a name twice
    """
    if PathManager.isfile(text):
        with PathManager.open(text, "r", encoding="utf-8") as f:
            names = [line.strip() for line in f.read().splitlines()]
    else:
        names = [name.strip() for name in text.split(",")]
    return check_classes([name for name in names if name])


def check_classes(names: Sequence[str]) -> list[str]:
    """The names as a list; raises :class:`DatasetError` if there are none or a name repeats."""
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if not names or repeated:
        raise DatasetError(
            "Semantic classes need names, each once, in the order of the labels 0, 1, ...; got "
            + (f"{shorten(repeated)} repeatedly." if repeated else "none.")
        )
    return list(names)


def register_semantic(name: str, images: str, sem_seg: str, classes: Sequence[str]) -> None:
    """Check and register a semantic data set.

    Args:
        name: for the catalogs
        images: folder of the pictures
        sem_seg: folder of single-channel PNGs with the pictures' names: a pixel's value is its class
            index, 255 is no label
        classes: names in the order of the labels

    Raises:
        DatasetError: missing folders, pictures without label map or the reverse, labels that are no
            class, a single class, maps with nothing but the first class
    """
    classes = check_classes(classes)
    if len(classes) > IGNORE_LABEL:
        raise DatasetError(
            f"Data set '{name}' has {len(classes)} classes; label maps hold {IGNORE_LABEL}."
        )
    if len(classes) < 2:
        raise DatasetError(
            f"Data set '{name}' has the one class {classes[0]}, so there is nothing to learn: name the "
            "background, too, as the class of label 0."
        )
    pairs = _pairs(name, images, sem_seg)
    labels = _count_labels(name, [labels for _, labels in pairs], classes)
    DatasetCatalog.register(name, partial(_load, pairs))
    MetadataCatalog.get(name).set(
        stuff_classes=classes,
        stuff_dataset_id_to_contiguous_id={i: i for i in range(len(classes))},
        image_root=images,
        sem_seg_root=sem_seg,
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
    )
    summarize(name, _load(pairs), labels)


def _count_labels(name: str, files: list[str], classes: Sequence[str]) -> Counter[int]:
    """How many of some maps, evenly spread, have each label. Only if these show a single class, others
    are read until a second one comes."""
    counts: Counter[int] = Counter()
    some = evenly(files, CHECKED_IMAGES)
    for number, file in enumerate([*some, *sorted(set(files) - set(some))]):
        found = sorted(set(counts) - {IGNORE_LABEL})
        if number >= len(some) and len(found) > 1:
            return counts
        values = label_values(read_label_map(file))
        wrong = [v for v in values if v >= len(classes) and v != IGNORE_LABEL]
        if wrong:
            raise DatasetError(
                f"'{file}' has labels {shorten(wrong)}, but data set '{name}' has the "
                f"{len(classes)} classes 0 to {len(classes) - 1} ({shorten(classes)}); "
                f"{IGNORE_LABEL} means no label."
            )
        counts.update(values)
    found = sorted(set(counts) - {IGNORE_LABEL})
    if len(found) < 2:
        text = f"has a label but {found[0]} ({classes[found[0]]})" if found else "has a label"
        raise DatasetError(
            f"Data set '{name}': none of its {len(files)} label maps {text}, so there is nothing to "
            f"learn. A pixel's value is the number of its class, 0 to {len(classes) - 1}; "
            f"{IGNORE_LABEL}, which {counts[IGNORE_LABEL]} maps have, is no label: masks of 0 and 255 "
            "are to be 0 and 1."
        )
    return counts


def _pairs(name: str, images: str, sem_seg: str) -> list[tuple[str, str]]:
    """(picture, label map) of equal names without extension, sorted."""
    listed = []
    for folder in (images, sem_seg):
        if not PathManager.isdir(folder):
            raise DatasetError(f"Data set '{name}': there is no folder '{folder}'.")
        files = [f for f in sorted(PathManager.ls(folder)) if not f.startswith(".")]
        listed.append({os.path.splitext(f)[0]: os.path.join(folder, f) for f in files})
    pictures, maps = listed
    for what, of, missing in (
        ("pictures", "label map", sorted(set(pictures) - set(maps))),
        ("label maps", "picture", sorted(set(maps) - set(pictures))),
    ):
        if missing:
            raise DatasetError(
                f"Data set '{name}': {len(missing)} {what} have no {of} of the same name: "
                f"{shorten(missing)}. ('{images}' and '{sem_seg}')"
            )
    if not pictures:
        raise DatasetError(f"Data set '{name}': there are no files in '{images}'.")
    return [(pictures[stem], maps[stem]) for stem in sorted(pictures)]


def _load(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"file_name": picture, "image_id": number, "sem_seg_file_name": labels}
        for number, (picture, labels) in enumerate(pairs)
    ]
