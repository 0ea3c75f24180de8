"""What a config keeps of the metadata of its training data, so that it alone names and draws what the
model predicts, where the data are not registered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata

from d2ext.data.dataset_facts import check_names

# Keys of cfg.DATASETS; the metadata have them in lower case.
_SAVED = (
    "THING_CLASSES",
    "STUFF_CLASSES",
    "THING_COLORS",
    "STUFF_COLORS",
    "KEYPOINT_NAMES",
    "KEYPOINT_FLIP_MAP",
    "KEYPOINT_CONNECTION_RULES",
    "MESH_FILE",
    "MESH_FLIP",
    "DENSEPOSE_MESH",
    "DENSEPOSE_MESH_NAME",
    "DENSEPOSE_UV_SYMMETRY",
)
# The same for what is a dict there, and pairs [category id, class] in the config.
_IDS = {
    "THING_IDS": "thing_dataset_id_to_contiguous_id",
    "STUFF_IDS": "stuff_dataset_id_to_contiguous_id",
}


def save_metadata(cfg: CfgNode, dataset_name: str) -> None:
    """Put the metadata of a registered data set into ``cfg.DATASETS``, in place."""
    metadata = MetadataCatalog.get(dataset_name)
    known = {key: metadata.get(key.lower()) for key in _SAVED}
    known |= {key: sorted((metadata.get(name) or {}).items()) for key, name in _IDS.items()}
    for key, value in known.items():
        # Lists alone, which YAML has.
        cfg.DATASETS[key] = json.loads(json.dumps(value or type(cfg.DATASETS[key])()))


def saved_metadata(cfg: CfgNode) -> Metadata | None:
    """What a training left in ``cfg.DATASETS``; None: no names of classes."""
    known: dict[str, Any] = {k.lower(): cfg.DATASETS[k] for k in _SAVED if cfg.DATASETS.get(k)}
    known |= {name: dict(cfg.DATASETS[k]) for k, name in _IDS.items() if cfg.DATASETS.get(k)}
    if "thing_classes" not in known and "stuff_classes" not in known:
        return None
    return Metadata(name="names of the config", **known)


def known_metadata(cfg: CfgNode) -> list[Metadata]:
    """Of the model's classes: what the training left in the config, and of the registered data sets of
    ``DATASETS.TEST`` and ``DATASETS.TRAIN``, in this order."""
    saved = saved_metadata(cfg)
    names = [x for x in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if x in MetadataCatalog.list()]
    return ([] if saved is None else [saved]) + [MetadataCatalog.get(name) for name in names]


def class_metadata(cfg: CfgNode, class_names: Sequence[str] | None = None) -> Metadata:
    """Names and colours of the classes that a config's model predicts.

    They come from what the training left in the config, or else from the first registered data set of
    ``DATASETS.TEST`` and ``DATASETS.TRAIN`` that names its thing classes; ``class_names``, if given,
    replaces the names, and then nothing is taken from a data set. Where nothing names them, classes are
    called by their number, see :func:`~d2ext.utils.drawing.name_classes`.

    Raises:
        DatasetError: names of another number of classes (or keypoints) than the model has.
    """
    if class_names is not None:
        metadata = Metadata(name="class names", thing_classes=list(class_names))
    else:
        known = known_metadata(cfg)
        metadata = next((m for m in known if m.get("thing_classes")), known[0] if known else None)
        metadata = metadata or Metadata(name="no names")
    check_names(cfg, metadata)
    return metadata
