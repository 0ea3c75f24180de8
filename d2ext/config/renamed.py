"""Keys and values of earlier versions of d2ext: accepted, with a warning that names the new ones."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


class Renamed(NamedTuple):
    """Today's form of a key, or of the keys of a section."""

    key: str | None
    """Its name now, which may be the same; None: it has no effect any more."""
    values: tuple[tuple[Any, Any], ...] = ()
    """(old, new) values; others stay."""


RENAMED = {
    "MODEL.HOURGLASS": Renamed("MODEL.CORNERNET_HOURGLASS"),
    "MODEL.STACKED_HOURGLASS": Renamed("MODEL.NEWELL_HOURGLASS"),
    "MODEL.BACKBONE.NAME": Renamed(
        "MODEL.BACKBONE.NAME",
        (("build_stacked_hourglass_backbone", "build_cornernet_hourglass_backbone"),),
    ),
    "INPUT.LANDMARKS.GEOMETRY": Renamed("INPUT.LANDMARKS.CROP_GEOMETRY"),
    "MODEL.LANDMARKS.TARGET.GEOMETRY": Renamed("MODEL.LANDMARKS.TARGET.CELL_GEOMETRY"),
    "INPUT.LANDMARKS.ENABLED": Renamed(
        "INPUT.MAPPER", ((True, "build_top_down_mapper"), (False, "D2extDatasetMapper"))
    ),
    "SOLVER.CHECKPOINT_FAILURE": Renamed(None),  # training always goes on
    "SOLVER.NON_FINITE_LOSS": Renamed(None),  # SOLVER.NON_FINITE_LOSS_LIMIT 1 stops at the first
}
# Former options of which only one value was in use; that is now the behaviour.
for _key in (
    "MODEL.CENTERNET_TRIPLETS.TEST.NMS",
    "MODEL.CENTERNET_TRIPLETS.TEST.NMS_THRESH",
    "MODEL.CENTERNET_TRIPLETS.TEST.OUTSIDE_MARGIN",
    "MODEL.CENTERNET_TRIPLETS.TEST.PEAK_KERNEL",
    "MODEL.CENTERNET_TRIPLETS.TEST.SMALL_AREA",
    "MODEL.CORNERNET.TEST.NMS",
    "MODEL.CORNERNET.TEST.NMS_THRESH",
    "MODEL.CORNERNET.TEST.PEAK_KERNEL",
    "MODEL.LANDMARKS.INTEGRAL",
    "MODEL.LANDMARKS.LOSS.WEIGHT",
    "MODEL.LANDMARKS.TARGET.UNIT_PEAK",
):
    RENAMED[_key] = Renamed(None)


class RenamingCfgNode(CfgNode):
    """The root of a config, which renames what it loads from files and from the command line."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """As Detectron2's, with today's names. Bases, too, come through here before they are merged."""
        tree = super().load_yaml_with_base(filename, allow_unsafe=allow_unsafe)
        for old in RENAMED:
            *path, leaf = old.split(".")
            section: Any = tree
            for word in path:
                section = section.get(word) if isinstance(section, dict) else None
            if isinstance(section, dict) and leaf in section:
                for key, value in rename(old, section.pop(leaf), filename):
                    for word in reversed(key.split(".")):
                        value = {word: value}
                    _merge(value, tree)
        return tree

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """As Detectron2's: ``[key, value, ...]``."""
        renamed: list[Any] = []
        for key, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            for pair in rename(key, value, "the command line"):
                renamed += pair
        super().merge_from_list(renamed)

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        # Sections are of the plain class, and yacs merges only sections of one class.
        return CfgNode._decode_cfg_value(value)


def rename(key: str, value: Any, source: str) -> list[tuple[str, Any]]:
    """[(key, value)] as they are today, or [] if they have no effect.

    Args:
        key, value: of any version.
        source: where they stand, for the warning.
    """
    for old, now in RENAMED.items():
        if key != old and not key.startswith(f"{old}."):
            continue
        if now.key is None:
            logger.warning("%s: %s (%s) has no effect any more.", source, key, value)
            return []
        new_key = now.key + key.removeprefix(old)
        decoded = CfgNode._decode_cfg_value(value) if now.values else value
        new_value = next((new for before, new in now.values if before == decoded), value)
        if new_key != key:
            logger.warning("%s: config key %s is now %s.", source, key, new_key)
        if new_value is not value:
            logger.warning("%s: %s %r is now %r.", source, new_key, value, new_value)
        return [(new_key, new_value)]
    return [(key, value)]


def _merge(source: dict[str, Any], target: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(value, target[key])
        else:
            target[key] = value
