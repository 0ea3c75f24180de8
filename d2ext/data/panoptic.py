"""Panoptic annotations: classes, PNGs, and the label maps made of them.

COCO's panoptic form is a JSON file that lists each image's segments (``id``, ``category_id``,
``iscrowd``) and a PNG per image whose pixels hold segment ids, id = R + 256 G + 65536 B, 0 = void
(arXiv 1801.00868).

Detectron2 registers it in two forms, and both are understood here:

- *separated* (``coco_2017_*_panoptic_separated``, ``shapes_*_panoptic``): things have contiguous ids
  0..T-1, stuff 1..S; 0 in a stuff map stands for all things (``stuff_classes[0]`` is "things").
- *standard* (``coco_2017_*_panoptic``, ``cityscapes_fine_panoptic_*``): things and stuff share one
  range of contiguous ids, and ``thing_classes`` and ``stuff_classes`` both name all of them.

A *full* label map, ``cfg.INPUT.SEM_SEG_WITH_THINGS``, has stuff 0..S-1 first, in the order of the
separated ids 1..S, then things S..S+T-1, and 255 where there is no label.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog

from d2ext.data.coco_json import check_lists, log_findings, raise_problems, read_json
from d2ext.data.coco_schema import PANOPTIC, SEGMENT, Findings, check_ids, link, normalize
from d2ext.data.errors import AnnotationError, DatasetError, shorten
from d2ext.data.image_io import read_color_map

Record = dict[str, Any]
Segment = dict[str, Any]

# Label of pixels without a class.
IGNORE_LABEL = 255
# Labels 0..254 fit beside the ignore label.
MAX_CLASSES = 255
# Segment ids have three bytes.
_NUM_IDS = 256**3
# What panoptic metadata hold.
_METADATA = (
    "thing_classes",
    "stuff_classes",
    "thing_dataset_id_to_contiguous_id",
    "stuff_dataset_id_to_contiguous_id",
)


@dataclass(frozen=True)
class PanopticClasses:
    """The classes of a panoptic data set, stuff and things apart.

    Attributes:
        stuff: S names, in the order of the separated ids 1..S
        things: T names, in the order of their contiguous ids
        full_colors: (R, G, B) of all S+T labels of a full map, or empty
        stuff_labels: contiguous id of a stuff segment → label in 0..S-1
        thing_labels: contiguous id of a thing segment → contiguous thing id in 0..T-1
        dataset_ids: the data set's own category id → label of a full map, 0..S+T-1
        separated: see the module's header
    """

    stuff: list[str]
    things: list[str]
    full_colors: list[tuple[int, ...]]
    stuff_labels: Mapping[int, int]
    thing_labels: Mapping[int, int]
    dataset_ids: Mapping[int, int]
    separated: bool

    @property
    def full(self) -> list[str]:
        """Names of all S+T labels of a full map."""
        return [*self.stuff, *self.things]

    @property
    def unique_names(self) -> list[str]:
        """Those names; of a thing and a stuff class that share one, each says which it is."""
        shared = set(self.stuff) & set(self.things)
        return [
            *(f"{n} (stuff)" if n in shared else n for n in self.stuff),
            *(f"{n} (thing)" if n in shared else n for n in self.things),
        ]

    def label_of(self, segment: Segment) -> int | None:
        """Label in a full map of a data set dict's segment, None for an unknown category.

        In the standard form ``isthing`` may be absent, as Detectron2's Cityscapes has it.
        """
        category = segment["category_id"]
        isthing = segment.get("isthing")
        if isthing is None:
            isthing = category in self.thing_labels and category not in self.stuff_labels
        if isthing:
            thing = self.thing_labels.get(category)
            return None if thing is None else len(self.stuff) + thing
        return self.stuff_labels.get(category)

    def predicted_label(self, segment: Segment, file_name: str) -> int:
        """Label in a full map of a model's segment; without ``isthing`` its id is the data set's own.

        Raises:
            ValueError: a class that the data set does not have
        """
        if segment.get("isthing") is None:
            label = self.dataset_ids.get(segment["category_id"])
        else:
            label = self.label_of(segment)
        if label is None:
            kind = "thing" if segment.get("isthing") else "stuff"
            raise ValueError(
                f"The model predicted {kind} class {segment['category_id']} on '{file_name}', which "
                "the data set does not have. The class counts of the config must be those of the "
                "data set."
            )
        return label


def is_panoptic(metadata: Metadata) -> bool:
    """Whether the metadata of a data set describe things and stuff."""
    return all(metadata.get(key) is not None for key in _METADATA)


def panoptic_classes(dataset: str | Metadata) -> PanopticClasses:
    """The classes of a panoptic data set, by its registered name or its metadata.

    Raises:
        DatasetError: the metadata does not describe a panoptic data set, or has too many classes
    """
    metadata = MetadataCatalog.get(dataset) if isinstance(dataset, str) else dataset
    dataset_name = metadata.get("name")
    missing = [key for key in _METADATA if metadata.get(key) is None]
    if missing:
        raise DatasetError(
            f"Data set '{dataset_name}' is not a panoptic one: its metadata lack "
            f"{', '.join(missing)}. Use a panoptic data set (for COCO coco_2017_train_panoptic_"
            "separated, for the built-in data shapes_train_panoptic), or register yours with "
            "--train-panoptic-json and --train-panoptic-root."
        )
    names = {kind: list(metadata.get(f"{kind}_classes")) for kind in ("thing", "stuff")}
    colors = {kind: list(metadata.get(f"{kind}_colors") or []) for kind in ("thing", "stuff")}
    ids = {kind: metadata.get(f"{kind}_dataset_id_to_contiguous_id") for kind in ("thing", "stuff")}
    separated = names["thing"] != names["stuff"]
    used = {
        "thing": sorted(set(ids["thing"].values())),
        # Separated: 0 stands for all things and is no class of its own.
        "stuff": sorted(set(ids["stuff"].values()) - ({0} if separated else set())),
    }
    count = len(used["thing"]) + len(used["stuff"])
    if count > MAX_CLASSES:
        raise DatasetError(
            f"Data set '{dataset_name}' has {count} classes; a label map with things holds at most "
            f"{MAX_CLASSES}, since {IGNORE_LABEL} means no label."
        )
    ranks = {kind: {i: rank for rank, i in enumerate(values)} for kind, values in used.items()}
    dataset_ids = {d: ranks["stuff"][c] for d, c in ids["stuff"].items() if c in ranks["stuff"]}
    dataset_ids.update({d: len(used["stuff"]) + ranks["thing"][c] for d, c in ids["thing"].items()})
    full_colors = [
        tuple(colors[kind][i])
        for kind in ("stuff", "thing")
        for i in used[kind]
        if i < len(colors[kind])
    ]
    return PanopticClasses(
        stuff=[names["stuff"][i] for i in used["stuff"]],
        things=[names["thing"][i] for i in used["thing"]],
        full_colors=full_colors if len(full_colors) == count else [],
        stuff_labels=ranks["stuff"],
        thing_labels=ranks["thing"],
        dataset_ids=dataset_ids,
        separated=separated,
    )


def read_segments(
    file_name: str, segments: Sequence[Segment], *, allow_absent: bool = False
) -> np.ndarray:
    """Read a panoptic PNG as places in the list of its segments.

    Args:
        file_name: the PNG
        segments: with ``id``, as the JSON file lists them
        allow_absent: whether a listed segment may have no pixel

    Returns:
        H×W uint16: 0 void, i+1 the i-th segment

    Raises:
        ImageReadError: missing or unreadable file, or not three channels of 8 bits
        AnnotationError: PNG and list disagree, or an id is listed twice
    """
    wrong = [s["id"] for s in segments if not 0 < s["id"] < _NUM_IDS]
    if wrong:
        raise AnnotationError(
            f"Segments of '{file_name}' have ids outside [1, {_NUM_IDS - 1}]: {shorten(wrong)}. "
            "(0 means void.)"
        )
    repeated = [i for i, n in Counter(s["id"] for s in segments).items() if n > 1]
    if repeated:
        raise AnnotationError(
            f"Segment ids of '{file_name}' occur more than once in its JSON entry: "
            f"{shorten(repeated)}. Give every segment of an image an id of its own."
        )
    rgb = read_color_map(file_name).astype(np.int32)
    ids = rgb[..., 0] + (rgb[..., 1] << 8) + (rgb[..., 2] << 16)
    # Zeros are not written before they are needed, so the table costs what is looked up in it.
    table = np.zeros(_NUM_IDS, np.uint16)
    for place, segment in enumerate(segments):
        table[segment["id"]] = place + 1
    places = table[ids]
    unlisted = np.unique(ids[(places == 0) & (ids != 0)]).tolist()
    if unlisted:
        raise AnnotationError(
            f"'{file_name}' has pixels of segments that its JSON entry does not list: "
            f"{shorten(unlisted)}. PNG and JSON file do not belong together."
        )
    if not allow_absent:
        pixels = np.bincount(places.reshape(-1), minlength=len(segments) + 1)[1:]
        absent = [s["id"] for s, n in zip(segments, pixels, strict=True) if n == 0]
        if absent:
            raise AnnotationError(
                f"'{file_name}' has no pixel of segments that its JSON entry lists: "
                f"{shorten(absent)}. PNG and JSON file do not belong together."
            )
    return places


def full_label_map(record: Record, classes: PanopticClasses) -> np.ndarray:
    """Labels of things and stuff, as ``cfg.INPUT.SEM_SEG_WITH_THINGS`` wants them.

    Args:
        record: data set dict with ``pan_seg_file_name`` and ``segments_info``
        classes: of its data set

    Returns:
        H×W uint8: stuff 0..S-1, things S..S+T-1, 255 no label

    Raises:
        SampleError: see :func:`read_segments`; also a category that the data set does not have, or
            a record without panoptic annotation
    """
    if "pan_seg_file_name" not in record or "segments_info" not in record:
        raise AnnotationError(
            f"'{record['file_name']}' has no panoptic annotation (pan_seg_file_name and "
            "segments_info), which INPUT.SEM_SEG_WITH_THINGS needs. Load the data set with "
            "d2ext.data.get_dataset_dicts, which adds them."
        )
    file_name, segments = record["pan_seg_file_name"], record["segments_info"]
    table = np.full(len(segments) + 1, IGNORE_LABEL, np.uint8)
    for place, segment in enumerate(segments):
        label = classes.label_of(segment)
        if label is None:
            raise AnnotationError(
                f"Segment {segment['id']} of '{file_name}' has category {segment['category_id']}, "
                f"which is not among the {len(classes.full)} classes of the data set."
            )
        table[place + 1] = label
    return table[read_segments(file_name, segments)]


def attach_panoptic(dataset_name: str, records: Sequence[Record]) -> list[Record]:
    """Data set dicts with ``pan_seg_file_name`` and ``segments_info``.

    Detectron2's separated data sets do not carry them; they are taken from the files that the
    metadata name, ``panoptic_json`` and ``panoptic_root``.

    Raises:
        DatasetError: no such files, images without an entry, or unknown categories
    """
    if all("pan_seg_file_name" in r and "segments_info" in r for r in records):
        return list(records)
    classes = panoptic_classes(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    json_file, root = metadata.get("panoptic_json"), metadata.get("panoptic_root")
    if json_file is None or root is None:
        raise DatasetError(
            f"Data set '{dataset_name}' has no panoptic annotations, which "
            "INPUT.SEM_SEG_WITH_THINGS needs: set panoptic_json and panoptic_root in its metadata, "
            "or pan_seg_file_name and segments_info in its dicts."
        )
    content = read_panoptic_json(json_file)
    entries = {entry["image_id"]: entry for entry in content["annotations"]}
    absent = [r["image_id"] for r in records if r["image_id"] not in entries]
    if absent:
        raise DatasetError(
            f"{len(absent)} images of data set '{dataset_name}' have no entry in '{json_file}': "
            f"image id {shorten(absent)}. The files do not belong together."
        )
    unknown = Counter(
        s["category_id"]
        for entry in entries.values()
        for s in entry["segments_info"]
        if s["category_id"] not in classes.dataset_ids
    )
    if unknown:
        raise DatasetError(
            f"{sum(unknown.values())} segments in '{json_file}' have a category that the metadata "
            f"of data set '{dataset_name}' do not know: {shorten(sorted(unknown))}. Add it to "
            "thing_dataset_id_to_contiguous_id or stuff_dataset_id_to_contiguous_id, or correct "
            "the file."
        )
    return [
        {
            **record,
            "pan_seg_file_name": os.path.join(root, entries[record["image_id"]]["file_name"]),
            "segments_info": [
                contiguous_segment(s, metadata)
                for s in entries[record["image_id"]]["segments_info"]
            ],
        }
        for record in records
    ]


def read_panoptic_json(json_file: str) -> dict[str, Any]:
    """A panoptic JSON file, parsed, its fields as :mod:`d2ext.data.coco_schema` has them.

    Raises:
        DatasetError: no such file, not JSON, or not in the panoptic form; all problems in one message
    """
    content = read_json(json_file)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not any(
        isinstance(a, dict) and "segments_info" in a for a in annotations
    ):
        if annotations == []:
            raise DatasetError(f"'{json_file}' annotates nothing: its 'annotations' are empty.")
        raise DatasetError(
            f"'{json_file}' is not a panoptic file: its 'annotations' must be a list of objects "
            "with image_id, file_name and segments_info. (An instances file goes into "
            "--train-json or --val-json.)"
        )
    check_lists(json_file, content, PANOPTIC)
    findings = Findings()
    content = {
        **content,
        **{key: normalize(content[key], key, PANOPTIC[key], findings) for key in PANOPTIC},
    }
    images, annotations = content["images"], content["annotations"]
    check_ids(images, "images", findings)
    check_ids(content["categories"], "categories", findings)
    link(annotations, "annotations", "image_id", images, "images", findings)
    check_ids(annotations, "annotations", findings, "image_id")
    for annotation in annotations:
        of_image = Findings()
        segments = normalize(annotation.get("segments_info", []), "segments", SEGMENT, of_image)
        link(segments, "segments", "category_id", content["categories"], "categories", of_image)
        check_ids(segments, "segments", of_image)
        annotation["segments_info"] = segments
        findings.add(of_image, f"'{annotation.get('file_name')}'")
    raise_problems(json_file, "a panoptic data set", findings.lines())
    log_findings(json_file, findings)
    return content


def contiguous_segment(segment: Segment, metadata: Metadata) -> Segment:
    """A segment of a panoptic JSON file with Detectron2's contiguous id and ``isthing``.

    ``area`` (pixels) and ``visibility`` (share of the object that is not hidden) stay where the file has
    them.
    """
    category = segment["category_id"]
    isthing = category in metadata.thing_dataset_id_to_contiguous_id
    ids = (
        metadata.thing_dataset_id_to_contiguous_id
        if isthing
        else metadata.stuff_dataset_id_to_contiguous_id
    )
    return {
        "id": segment["id"],
        "category_id": ids[category],
        "isthing": isthing,
        "iscrowd": segment.get("iscrowd", 0),
        **{key: segment[key] for key in ("area", "visibility") if segment.get(key) is not None},
    }
