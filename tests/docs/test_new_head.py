"""docs/new_head.md: its code runs as it stands; what retinaface.md and densepose.md name
exists."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from d2ext import model_zoo
from d2ext.config import CONFIG_REGISTRY
from d2ext.data import MAPPER_REGISTRY
from d2ext.data.shapes import FaceSet, load_shapes_faces
from tests.test_documents import COMMAND, ROOT, assert_key, blocks, commands, help_of

PAGE = (ROOT / "docs/new_head.md").read_text(encoding="utf-8")
FACES = (ROOT / "docs/retinaface.md").read_text(encoding="utf-8")
SURFACES = (ROOT / "docs/densepose.md").read_text(encoding="utf-8")


@pytest.fixture
def few_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in faces, but only some."""
    for split in ("train", "val"):
        few = FaceSet(split, 6, 128, 128, seed=1)
        name = f"shapes_{split}_faces"
        monkeypatch.setitem(DatasetCatalog.data, name, lambda few=few: load_shapes_faces(few))


@pytest.fixture
def registries() -> Any:
    """What the page registers goes again."""
    yield
    for registry, name in (
        (MAPPER_REGISTRY, "TurnMapper"),
        (ROI_HEADS_REGISTRY, "TurnROIHeads"),
        (CONFIG_REGISTRY, "add_turn_config"),
    ):
        del registry._obj_map[name]


@pytest.mark.usefixtures("few_faces", "registries")
def test_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(blocks(PAGE, "python")), names)
    instances = names["instances"]
    assert instances.pred_turn.shape == (len(instances),) and len(instances) > 0
    assert ((instances.pred_turn >= 0) & (instances.pred_turn <= 1)).all()
    # Labels are those of the picture, also of a mirrored one.
    cfg = names["cfg"]
    record = next(r for r in DatasetCatalog.get("shapes_train_faces") if r["annotations"])
    turns = []
    for flip in ("none", "horizontal"):
        cfg.INPUT.RANDOM_FLIP = flip
        mapper = names["TurnMapper"](cfg)
        samples = [mapper(record)["instances"] for _ in range(12)]
        turns.append({tuple(x.gt_turn.tolist()) for x in samples})
    (plain,) = turns[0]
    assert turns[1] == {plain, tuple(t if t < 0 else 1 - t for t in plain)}
    # Images without faces train as well.
    model = names["trainer"].model.train()
    empty = {"image": torch.zeros(3, 96, 96), "instances": Instances((96, 96))}
    sample = names["TurnMapper"](cfg)({**record, "annotations": []})
    with EventStorage(0):
        losses = model([{**empty, "instances": sample["instances"]}])
    assert losses["loss_turn"].item() == 0 and losses["loss_turn"].requires_grad


TOOLS = [w for x in (FACES, SURFACES) for w in commands(x) if w[0] in ("python", "d2ext")]


@pytest.mark.parametrize("words", TOOLS, ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    if words[0] == "d2ext":
        words = ["-m", *words]
        count = 2 + sum(1 for _ in itertools.takewhile(COMMAND.fullmatch, words[2:]))
        text = help_of(*words[:count])
    else:
        text = (ROOT / words[1]).read_text(encoding="utf-8")
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert {w for w in words if w.startswith("--")} <= known
    if "--config-file" in words:
        model_zoo.find_config_file(words[words.index("--config-file") + 1])
    for word in words:
        if re.fullmatch(r"[A-Z_]+(\.[A-Z_0-9]+)+", word):
            assert_key(word)


def test_keys_links_and_configs_exist() -> None:
    sections = "INPUT|MODEL|TEST|DATASETS|DATALOADER|DENSEPOSE_EVALUATION"
    for key in re.findall(rf"`((?:{sections})\.[A-Z_.]+)", FACES + SURFACES):
        assert_key(key)
    for page in (FACES, PAGE, SURFACES):
        links = [x for x in re.findall(r"\]\(([^)#]+)\)", page) if "://" not in x]
        assert [x for x in links if not (ROOT / "docs" / x).exists()] == []
    table = re.findall(r"^\| `(retinaface/.*?)` \|", FACES, flags=re.MULTILINE)
    files = {f"retinaface/{x.name}" for x in (ROOT / "configs/retinaface").glob("*.yaml")}
    assert {x for row in table for x in row.split("`, `")} == {x for x in files if "Base-" not in x}


def test_python_of_retinaface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "label.txt").write_text("# a.jpg\n1 2 30 40\n")
    names: dict[str, Any] = {}
    exec("\n".join(blocks(FACES, "python")), names)
    DatasetCatalog.remove("mine_train")
    MetadataCatalog.remove("mine_train")
