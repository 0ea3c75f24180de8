"""Pages on videos (PAGES): commands, configs and keys exist; the code runs as it stands."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model

from d2ext import model_zoo
from d2ext.config import get_cfg
from d2ext.data.shapes import draw_clip
from d2ext.modeling.flow import FLOW_REGISTRY
from d2ext.utils.video import video_writer
from tests.test_documents import COMMAND, ROOT, assert_key, blocks, commands, help_of

PAGES = {
    name: (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("video.md", "yolact_edge.md", "vpsnet.md")
}
COMMANDS = [words for page in PAGES.values() for words in commands(page)]
TOOLS = [w for w in COMMANDS if w[0] in ("python", "d2ext")]


@pytest.mark.parametrize("words", TOOLS, ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    words = ["-m", *words] if words[0] == "d2ext" else words[1:]
    start = 2 if words[0] == "-m" else 1
    count = start + sum(1 for _ in itertools.takewhile(COMMAND.fullmatch, words[start:]))
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(*words[:count])))
    assert {w for w in words[count:] if w.startswith("--")} <= known
    if "--config-file" in words:
        model_zoo.find_config_file(words[words.index("--config-file") + 1])
    for word in words:
        if re.fullmatch(r"[A-Z_]+(\.[A-Z_0-9]+)+", word):
            assert_key(word)


@pytest.mark.parametrize("name", list(PAGES))
def test_keys_and_links_exist(name: str) -> None:
    keys = re.findall(r"`((?:INPUT|MODEL|TEST|DATASETS)\.[A-Z_.]+)", PAGES[name])
    assert keys
    for key in keys:
        assert_key(key)
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", PAGES[name]) if "://" not in x]
    assert [x for x in links if not (ROOT / "docs" / x).exists()] == []


def test_configs_of_the_table_exist() -> None:
    table = re.findall(r"^\| `(yolact_edge/.*?)` \|", PAGES["yolact_edge.md"], flags=re.MULTILINE)
    files = set()
    for entry in (x for row in table for x in row.split("`, `")):
        braces = re.search(r"\{(.*)\}", entry)
        for part in braces[1].split(",") if braces else [""]:
            files.add(re.sub(r"\{.*\}", part, entry).replace("...", "*"))
    for file in files - {x for x in files if "*" in x}:
        model_zoo.find_config_file(file)
    every = {f"yolact_edge/{x.name}" for x in (ROOT / "configs/yolact_edge").glob("yolact*.yaml")}
    missing = {x for x in every - files if "_R_50_550.yaml" not in x}  # those are "..."
    assert missing == set()


def test_configs_of_vpsnet_are_in_its_table() -> None:
    rows = re.findall(r"^\| (`(?:vpsnet|flow)/.*?`) \|", PAGES["vpsnet.md"], flags=re.MULTILINE)
    named = {file for row in rows for file in re.findall(r"`(.+?)`", row)}
    folders = ROOT / "configs/vpsnet", ROOT / "configs/flow"
    files = {f"{folder.name}/{x.name}" for folder in folders for x in folder.glob("*.yaml")}
    assert named == {x for x in files if "/Base-" not in x}


def test_choices_of_vpsnet_exist() -> None:
    page = PAGES["vpsnet.md"]
    names = re.findall(r"^\| (`[A-Z]\w+`.*?) \| .* \|$", page, flags=re.MULTILINE)
    estimators = {x for row in names for x in re.findall(r"`(\w+)`", row)}
    assert estimators == {name for name, _ in FLOW_REGISTRY}
    published = set(re.findall(r"^\| `MODEL\.VPSNET\.(\w+)` \|", page, flags=re.MULTILINE))
    assert published == {key for key in get_cfg().MODEL.VPSNET if key.startswith("PUBLISHED_")}


def write_clip(path: Path) -> None:
    with video_writer(path, 25) as write:
        for frame in draw_clip(0, "val", 0, 64, 64, length=5).frames:
            write(frame.image[:, :, ::-1], None)


def write_weights(config: str, path: Path) -> None:
    cfg = model_zoo.get_config(config)
    cfg.MODEL.DEVICE = "cpu"
    path.parent.mkdir(parents=True)
    torch.save({"model": build_model(cfg).state_dict()}, path)


def test_code_of_vpsnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4")
    write_weights("vpsnet/vpsnet_shapes.yaml", tmp_path / "output/vps/model_final.pth")
    names: dict[str, Any] = {}
    exec("\n".join(blocks(PAGES["vpsnet.md"], "python")), names)
    assert names["panoptic_map"].shape == (64, 64)
    assert names["output"]["instances"].track_ids.dtype == torch.int64


def test_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("norfair")
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4")
    write_weights("yolact_edge/yolact_edge_vid_shapes.yaml", tmp_path / "output/model_final.pth")
    names: dict[str, Any] = {}
    exec("\n".join(blocks(PAGES["video.md"], "python")), names)
    assert names["instances"].pred_masks.shape[1:] == (64, 64)
    assert names["number"] == 4 and names["output"]["key_distance"] == 1  # frame 3 is a key frame
