"""The defaults: d2ext's keys in any config."""

from __future__ import annotations

import pytest
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from d2ext.config import CONFIG_REGISTRY, add_d2ext_config, get_cfg


def test_keys_that_are_there_keep_their_values() -> None:
    cfg = get_detectron2_cfg()
    cfg.MODEL.YOLACT = CfgNode({"NUM_CLASSES": 3, "OWN": 1})
    cfg.SOLVER.BASE_LR = 0.5
    add_d2ext_config(cfg)
    assert (cfg.MODEL.YOLACT.NUM_CLASSES, cfg.MODEL.YOLACT.OWN, cfg.SOLVER.BASE_LR) == (3, 1, 0.5)
    assert cfg.MODEL.YOLACT.INPUT_SIZE == get_cfg().MODEL.YOLACT.INPUT_SIZE
    cfg.MODEL.YOLACT.INPUT_SIZE = 99
    add_d2ext_config(cfg)
    assert cfg.MODEL.YOLACT.INPUT_SIZE == 99


def test_configs_share_no_values() -> None:
    first = get_cfg()
    first.MODEL.YOLACT.ANCHORS.SCALES.append([1.0])
    assert first.MODEL.YOLACT.ANCHORS.SCALES != get_cfg().MODEL.YOLACT.ANCHORS.SCALES


def test_a_frozen_config_is_left_alone() -> None:
    cfg = get_detectron2_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError, match="immutable"):
        add_d2ext_config(cfg)


def test_a_part_of_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_mine_config(cfg: CfgNode) -> None:
        cfg.MODEL.MINE = CfgNode({"SIZE": 4})

    monkeypatch.setitem(CONFIG_REGISTRY._obj_map, "add_mine_config", add_mine_config)
    assert get_cfg().MODEL.MINE.SIZE == 4
