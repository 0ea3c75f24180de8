"""What is known about each landmark data set: point names, mirror pairs, skeleton, norms, sigmas.

Facts come from the data sets' own descriptions, as the annotation files and the published
configurations of pose toolkits state them. Points are counted from 0.

A model for MPII or WFLW needs them to predict (flip test) and to be drawn, also where the files are
absent. As Detectron2 does for COCO's people, the metadata exist from import on, for the names that the
configs use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import Metadata, MetadataCatalog

from d2ext.data.dataset_facts import Keypoints, Pairs, keypoint_metadata, mirror_pairs


@dataclass(frozen=True)
class LandmarkDataset:
    """One set of landmarks.

    Attributes:
        name: as :func:`~d2ext.data.landmarks.register_landmarks` takes it.
        category: "person" or "face".
        keypoints: names.
        flip_pairs: points that change places when the picture is mirrored.
        skeleton: pairs of points to draw a line between.
        sigmas: of COCO's object keypoint similarity; empty: there are none.
        occlusion: whether v = 1 (hidden) and v = 2 (visible) are told apart; otherwise every
            labelled point counts as visible.
        norms: groups of points whose mean positions give a face's normalising distance, by name.
        metrics: what is evaluated, see :mod:`d2ext.evaluation.landmarks`.
        norm: the default norm of NME.
        not_scored: points that the usual mean leaves out.
        failure: threshold of NME for failure rate and AUC, fraction.
        origin: index that the original annotation files give the first pixel.
    """

    name: str
    category: str
    keypoints: tuple[str, ...]
    flip_pairs: Pairs
    skeleton: Pairs
    sigmas: tuple[float, ...] = ()
    occlusion: bool = False
    norms: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("nme", "pck")
    norm: str = "box"
    not_scored: tuple[int, ...] = ()
    failure: float = 0.1
    origin: int = 0


def mirror_sums(*runs: tuple[int, int, int]) -> Pairs:
    """Mirror pairs of landmarks that are numbered along symmetric lines.

    Args:
        runs: (first, last, sum): points first to last each belong with sum minus themselves. A
            point on the axis is its own partner and gives no pair.
    """
    pairs = {
        (min(i, total - i), max(i, total - i))
        for first, last, total in runs
        for i in range(first, last + 1)
        if 2 * i != total
    }
    return tuple(sorted(pairs))


def _chain(first: int, last: int, closed: bool = False) -> Pairs:
    """Lines from each point to the next, and from the last to the first."""
    lines = tuple((i, i + 1) for i in range(first, last))
    return (*lines, (last, first)) if closed else lines


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"point_{i}" for i in range(count))


_SIDED = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_COCO = ("nose", *(f"{side}_{part}" for part in _SIDED for side in ("left", "right")))
_POSETRACK = ("nose", "head_bottom", "head_top", *_COCO[3:])
_LIMBS = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6))
_ARMS = ((5, 7), (6, 8), (7, 9), (8, 10))
_MPII = (
    *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle"),
    *("pelvis", "thorax", "upper_neck", "head_top"),
    *("right_wrist", "right_elbow", "right_shoulder"),
    *("left_shoulder", "left_elbow", "left_wrist"),
)


def _sided(center: Sequence[float], parts: Sequence[float]) -> tuple[float, ...]:
    return (*center, *(value for value in parts for _ in range(2)))


_COCO_PART_SIGMAS = (0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089)
_COCO_SIGMAS = _sided([0.026], _COCO_PART_SIGMAS)

_DATASETS = (
    LandmarkDataset(
        "coco",
        "person",
        _COCO,
        mirror_pairs(_COCO),
        (*_LIMBS, *_ARMS, (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
        _COCO_SIGMAS,
        occlusion=True,
        metrics=("oks", "pck"),
    ),
    LandmarkDataset(
        "posetrack18",
        "person",
        _POSETRACK,
        mirror_pairs(_POSETRACK),
        (*_LIMBS, *_ARMS, (0, 1), (0, 2), (1, 5), (1, 6)),
        # Head bottom and head top stand where COCO has the eyes, and keep their values.
        _COCO_SIGMAS,
        metrics=("oks", "pck"),
    ),
    LandmarkDataset(
        "mpii",
        "person",
        _MPII,
        mirror_sums((0, 5, 5), (10, 15, 25)),
        (
            *((0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9)),
            *((8, 12), (12, 11), (11, 10), (8, 13), (13, 14), (14, 15)),
        ),
        # mmpose's choice; the data set itself defines none.
        (
            *(0.089, 0.083, 0.107, 0.107, 0.083, 0.089, 0.026, 0.026, 0.026, 0.026),
            *(0.062, 0.072, 0.179, 0.179, 0.072, 0.062),
        ),
        norms={"head_points": ((8,), (9,))},
        metrics=("pckh", "pck", "pck_hourglass"),
        norm="head",
        not_scored=(6, 7),  # pelvis and thorax
        origin=1,
    ),
    LandmarkDataset(
        "300w",
        "face",
        _numbered(68),
        mirror_sums(
            *((0, 16, 16), (17, 26, 43), (31, 35, 66), (36, 39, 81), (40, 41, 87)),
            *((48, 54, 102), (55, 59, 114), (60, 64, 124), (65, 67, 132)),
        ),
        (
            *(_chain(0, 16) + _chain(17, 21) + _chain(22, 26) + _chain(27, 30) + _chain(31, 35)),
            *(_chain(36, 41, True) + _chain(42, 47, True)),
            *(_chain(48, 59, True) + _chain(60, 67, True)),
        ),
        norms={
            "inter_ocular": ((36,), (45,)),
            "inter_pupil": (tuple(range(36, 42)), tuple(range(42, 48))),
        },
        norm="inter_ocular",
        failure=0.08,
        origin=1,
    ),
    LandmarkDataset(
        "wflw",
        "face",
        _numbered(98),
        mirror_sums(
            *((0, 32, 32), (33, 37, 79), (38, 41, 88), (55, 59, 114), (60, 64, 132)),
            *((65, 67, 140), (76, 82, 158), (83, 87, 170), (88, 92, 180), (93, 95, 188)),
            (96, 97, 193),
        ),
        (
            *(_chain(0, 32) + _chain(33, 41, True) + _chain(42, 50, True)),
            *(_chain(51, 54) + _chain(55, 59)),
            *(_chain(60, 67, True) + _chain(68, 75, True)),
            *(_chain(76, 87, True) + _chain(88, 95, True)),
        ),
        norms={
            "inter_ocular": ((60,), (72,)),
            "inter_pupil": (tuple(range(60, 68)), tuple(range(68, 76))),
        },
        norm="inter_ocular",
    ),
    LandmarkDataset(
        "cofw",
        "face",
        _numbered(29),
        (
            *((0, 1), (2, 3), (4, 6), (5, 7), (8, 9), (10, 11), (12, 14), (13, 15)),
            *((16, 17), (18, 19), (22, 23)),
        ),
        (),
        occlusion=True,
        norms={"inter_ocular": ((8,), (9,)), "inter_pupil": ((16,), (17,))},
        norm="inter_ocular",
    ),
    LandmarkDataset(
        "aflw",
        "face",
        _numbered(19),
        mirror_sums((0, 2, 5), (6, 8, 17), (12, 12, 26), (15, 15, 32)),
        (),
        norm="box_size",
    ),
)

LANDMARK_DATASETS: dict[str, LandmarkDataset] = {d.name: d for d in _DATASETS}


def landmark_metadata(dataset: LandmarkDataset) -> dict[str, Any]:
    """Detectron2's metadata of a landmark set, and what the landmark evaluators need.

    Beside Detectron2's own keys: ``landmark_kind``, ``keypoint_oks_sigmas``, ``landmark_metrics``,
    ``landmark_norm``, ``landmark_norms``, ``landmark_not_scored``, ``landmark_failure``,
    ``landmark_occlusion``.
    """
    keypoints = Keypoints(dataset.keypoints, dataset.flip_pairs, dataset.skeleton, dataset.sigmas)
    return {
        **keypoint_metadata(keypoints),
        "thing_classes": [dataset.category],
        "thing_dataset_id_to_contiguous_id": {1: 0},
        "landmark_kind": dataset.name,
        "landmark_metrics": dataset.metrics,
        "landmark_norm": dataset.norm,
        "landmark_norms": dataset.norms,
        "landmark_not_scored": dataset.not_scored,
        "landmark_failure": dataset.failure,
        "landmark_occlusion": dataset.occlusion,
        "evaluator_type": "landmarks",
    }


# Name in the catalog -> set of landmarks. COCO's people are described by Detectron2.
DESCRIBED = {
    "mpii_train": "mpii",
    "mpii_val": "mpii",
    "wflw_train": "wflw",
    "wflw_test": "wflw",
}
# What is true wherever the files are and whatever is evaluated.
_KEYS = (
    "thing_classes",
    "thing_dataset_id_to_contiguous_id",
    "keypoint_names",
    "keypoint_flip_map",
    "keypoint_connection_rules",
)


class _Description(Metadata):
    """Metadata whose first values give way to those of the real data, when it is registered.

    Detectron2 refuses other values than those that are there; here that holds from the second
    setting of a key on. Whoever registers own data by such a name is not hindered.
    """

    __slots__ = ("_first",)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        object.__setattr__(self, "_first", set(values) - {"name"})

    def __setattr__(self, key: str, value: Any) -> None:
        first = object.__getattribute__(self, "_first")
        if key in first:
            first.discard(key)
            del self.__dict__[key]
        super().__setattr__(key, value)


def describe_datasets() -> None:
    """Give :data:`DESCRIBED` their metadata, unless a data set already has some."""
    for name, kind in DESCRIBED.items():
        if name not in MetadataCatalog.list():
            values = landmark_metadata(LANDMARK_DATASETS[kind])
            MetadataCatalog[name] = _Description(name=name, **{key: values[key] for key in _KEYS})
