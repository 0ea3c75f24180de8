"""Names, mirror pairs and skeletons of published data sets whose files may be absent.

A model for MPII or WFLW needs them to predict (flip test) and to be drawn. As Detectron2 does for
COCO's people, the metadata exist from import on, for the names that the configs use.
"""

from __future__ import annotations

from typing import Any

from detectron2.data import Metadata, MetadataCatalog

from d2ext.data.landmarks.kinds import KINDS, kind_metadata

__all__ = ["DESCRIBED", "describe_datasets"]

# Data set -> kind. COCO's people are described by Detectron2.
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
            values = kind_metadata(KINDS[kind])
            MetadataCatalog[name] = _Description(name=name, **{key: values[key] for key in _KEYS})
