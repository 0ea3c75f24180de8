"""Configs of earlier versions still load, and say what is called otherwise now."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from d2ext.config import add_d2ext_config, get_cfg, load_config
from d2ext.config.renamed import RENAMED, Renamed
from d2ext.data import MAPPER_REGISTRY

# As tools/train_net.py saved it before the keys were renamed: all keys that d2ext had.
SAVED = Path(__file__).parent / "saved_962d9ae.yaml"


def value_of(cfg: CfgNode, key: str) -> Any:
    for word in key.split("."):
        cfg = cfg[word]
    return cfg


def test_the_table_leads_somewhere() -> None:
    cfg = get_cfg()
    for old, now in RENAMED.items():
        if old != now.key:
            with pytest.raises(KeyError):
                value_of(cfg, old)
        value = None if now.key is None else value_of(cfg, now.key)
        for _, new in now.values:
            assert type(new) is type(value)
    assert all(new in MAPPER_REGISTRY for _, new in RENAMED["INPUT.LANDMARKS.ENABLED"].values)


def test_a_saved_config(caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_config(str(SAVED))
    assert cfg.MODEL.CORNERNET_HOURGLASS.CHANNELS == [16, 16, 24]
    assert cfg.MODEL.NEWELL_HOURGLASS.DEPTH == 2
    assert cfg.MODEL.BACKBONE.NAME == "build_cornernet_hourglass_backbone"
    assert cfg.INPUT.MAPPER == "build_top_down_mapper"
    assert f"{SAVED}: config key MODEL.HOURGLASS is now MODEL.CORNERNET_HOURGLASS." in caplog.text
    assert "MODEL.BACKBONE.NAME 'build_stacked_hourglass_backbone' is now" in caplog.text
    assert CfgNode.load_cfg(cfg.dump()).MODEL.NEWELL_HOURGLASS == cfg.MODEL.NEWELL_HOURGLASS


def test_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    options = ["MODEL.HOURGLASS.BLOCKS", "[1, 2]", "INPUT.LANDMARKS.ENABLED", "True"]
    cfg = load_config("", [*options, "OUTPUT_DIR", "'7'"])
    assert cfg.MODEL.CORNERNET_HOURGLASS.BLOCKS == [1, 2]
    assert cfg.INPUT.MAPPER == "build_top_down_mapper"
    assert cfg.OUTPUT_DIR == "7"
    name = "MODEL.CORNERNET_HOURGLASS.BLOCKS"
    assert f"the command line: config key MODEL.HOURGLASS.BLOCKS is now {name}." in caplog.text
    caplog.clear()
    load_config("", [name, "[1, 2]", "INPUT.MAPPER", "build_top_down_mapper"])
    assert not caplog.text


def test_keys_without_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(RENAMED, "MODEL.GONE", Renamed(None))
    path = tmp_path / "c.yaml"
    path.write_text("VERSION: 2\nMODEL: {GONE: {SIZE: 1}}\nSEED: 3\n")
    assert load_config(str(path), ["MODEL.GONE.SIZE", "2", "SEED", "4"]).SEED == 4
    assert f"{path}: MODEL.GONE ({{'SIZE': 1}}) has no effect" in caplog.text
    assert "the command line: MODEL.GONE.SIZE (2) has no effect" in caplog.text


@pytest.mark.parametrize("old_base", [True, False])
def test_a_file_wins_over_its_base(tmp_path: Path, old_base: bool) -> None:
    old, new = "MODEL: {HOURGLASS: {%s}}", "MODEL: {CORNERNET_HOURGLASS: {%s}}"
    base, file = (old, new) if old_base else (new, old)
    (tmp_path / "base.yaml").write_text(base % "BLOCKS: [1], NUM_STACKS: 1")
    (tmp_path / "file.yaml").write_text("VERSION: 2\n_BASE_: base.yaml\n" + file % "BLOCKS: [2]")
    hourglass = load_config(str(tmp_path / "file.yaml")).MODEL.CORNERNET_HOURGLASS
    assert (hourglass.BLOCKS, hourglass.NUM_STACKS) == ([2], 1)


def test_a_config_of_detectron2_and_its_copies() -> None:
    cfg = get_detectron2_cfg()
    add_d2ext_config(cfg)
    for x in (cfg, cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        x.merge_from_file(str(SAVED))
        x.merge_from_list(["MODEL.STACKED_HOURGLASS.DEPTH", 3])
        x.freeze()
        assert x.MODEL.CORNERNET_HOURGLASS.CHANNELS == [16, 16, 24]
        assert x.MODEL.NEWELL_HOURGLASS.DEPTH == 3
