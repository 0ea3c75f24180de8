"""Numbers that constructors and options take by default are those of the published configs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from d2ext import model_zoo

# Published config → defaults that are others': of CornerNet's or UPSNet's classes, of own data.
CONFIGS: dict[str, set[str]] = {
    "yolact/yolact_R_50_550": set(),
    "yolact_edge/yolact_edge_vid_R_50_550": set(),
    "cornernet/cornernet_hourglass104_511": set(),
    "cornernet/cornernet_saccade_255": {
        *("min_overlap", "top_k", "max_distance", "max_pairs", "sigma"),
    },
    "centernet_triplets/centernet_triplets_hourglass104_511": {"min_overlap", "top_k"},
    "centernet/centernet_dla34_512": set(),
    "upsnet/upsnet_R_50_coco": {"min_size"},
    "vpsnet/vpsnet_fusetrack_R_50_cityscapes_vps": {
        *("semantic_weight", "semantic_roi_weight", "panoptic_weight", "keep_fraction"),
        "max_objects",
    },
    "retinaface/mobilenet025_wider": set(),
    "landmarks/hourglass_2stack_mpii_256": set(),
}


def numbers(value: Any) -> list[float]:
    """Those in nested sequences."""
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in numbers(part)]
    return [value] if type(value) in (int, float) else []


def defaults(kind: type) -> dict[str, Any]:
    """Defaults of the constructor of a class of ours, and of its bases."""
    if hasattr(kind, "_field_defaults"):
        return dict(kind._field_defaults)
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("d2ext.") and "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters}
    return found


@pytest.mark.parametrize("config", list(CONFIGS))
def test_defaults(config: str) -> None:
    cfg = model_zoo.get_config(f"{config}.yaml")
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    with torch.device("meta"):
        values = architecture.from_config(cfg)
    compared = {architecture: values}
    for part in values.values():
        if hasattr(part, "_asdict"):
            compared[type(part)] = part._asdict()
        elif type(part).__name__.endswith("Criterion"):
            compared[type(part)] = vars(part)
    other = {
        name
        for kind, own in compared.items()
        for name, value in defaults(kind).items()
        if numbers(value) and name in own and numbers(value) != numbers(own[name])
    }
    assert other == CONFIGS[config]
