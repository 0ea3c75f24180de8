"""Which weights fit which model."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.modeling import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError, load_untrusted
from d2ext.config import get_cfg


class Detector(nn.Module):
    """A Detectron2 ResNet of some depth, narrow, a neck and a head."""

    def __init__(self, depth: int = 50, classes: int = 3) -> None:
        super().__init__()
        cfg = get_cfg()
        cfg.MODEL.RESNETS.DEPTH = depth
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 4
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 2
        self.backbone = nn.Module()
        self.backbone.bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        for i in range(20):  # a neck with a third as many parameters as the ResNet-50
            self.backbone.add_module(f"fpn{i}", nn.Conv2d(2, 2, 1))
        self.head = nn.Linear(8, classes)


def save(model: nn.Module, folder: Path, name: str = "x") -> str:
    Checkpointer(model, str(folder)).save(name)
    return str(folder / f"{name}.pth")


def load(model: nn.Module, path: str, fit: str) -> None:
    Checkpointer(model, fit=fit).load(path)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("fit", ["exact", "finetune", "any"])
def test_own_checkpoint(tmp_path: Path, fit: str) -> None:
    source, target = Detector(), Detector()
    path = save(source, tmp_path)
    assert not same(source, target)
    load(target, path, fit)
    assert same(source, target)


def test_class_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(Detector(classes=5), tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)2 of another shape:.*head\.bias: checkpoint \(5,\), model \(3,\).*class count",
    ):
        load(Detector(), path, "exact")
    target = Detector()
    before = target.head.weight.clone()
    with caplog.at_level(logging.WARNING):
        load(target, path, "finetune")  # fine-tuning on other classes
    assert "head.weight" in caplog.text and "(5, 8)" in caplog.text
    assert torch.equal(before, target.head.weight)


@pytest.mark.parametrize(("saved", "wanted"), [(50, 101), (101, 50), (101, 152), (152, 101)])
def test_another_depth(tmp_path: Path, saved: int, wanted: int) -> None:
    path = save(Detector(saved), tmp_path)
    side = "in the model" if wanted > saved else "in the checkpoint"
    with pytest.raises(CheckpointError, match=rf"(?s){side}, not.*backbone\.bottom_up\.res"):
        load(Detector(wanted), path, "exact")
    with pytest.raises(CheckpointError, match=r"Only \d+% of the backbone.*ALLOW_PARTIAL"):
        load(Detector(wanted), path, "finetune")
    load(Detector(wanted), path, "any")


def test_necks_may_differ(tmp_path: Path) -> None:
    source, target = Detector(), Detector()
    for i in range(20):
        del source.backbone._modules[f"fpn{i}"]
    source.backbone.other = nn.Conv2d(2, 2, 1)
    load(target, save(source, tmp_path), "finetune")
    assert same(source.backbone.bottom_up, target.backbone.bottom_up)


def test_another_system(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    for fit in ("exact", "finetune"):
        with pytest.raises(CheckpointError, match=r"(?s)\.\.\. and \d+ more.*d2ext convert"):
            load(Detector(), path, fit)


@pytest.mark.parametrize("style", ["detectron2", "torchvision"])
@pytest.mark.parametrize("depth", [50, 101])
def test_imagenet_weights(tmp_path: Path, style: str, depth: int) -> None:
    source = Detector(depth)
    body = source.backbone.bottom_up.state_dict()
    if style == "detectron2":
        path = tmp_path / "R-50.pkl"
        arrays = {k: v.numpy() for k, v in body.items()}
        arrays["stem.fc.weight"] = torch.rand(10, 512).numpy()
        path.write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}))
    else:
        path = tmp_path / "resnet50.pth"
        torch.save({to_torchvision(k): v for k, v in body.items()}, path)
    target = Detector()
    if depth != 50:
        with pytest.raises(CheckpointError, match="of the backbone"):
            load(target, str(path), "finetune")
        return
    load(target, str(path), "finetune")
    assert same(source.backbone.bottom_up, target.backbone.bottom_up)
    with pytest.raises(CheckpointError, match=r"(?s)42 in the model.*fpn0\.\{bias, weight\}"):
        load(Detector(), str(path), "exact")


def to_torchvision(name: str) -> str:
    for a, b in (
        ("stem.conv1.norm", "bn1"),
        ("stem.conv1", "conv1"),
        ("shortcut.norm", "downsample.1"),
        ("shortcut", "downsample.0"),
        ("conv1.norm", "bn1"),
        ("conv2.norm", "bn2"),
        ("conv3.norm", "bn3"),
    ):
        name = name.replace(a, b)
    for stage in range(2, 6):
        name = name.replace(f"res{stage}", f"layer{stage - 1}")
    return name


def test_what_is_not_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for content, message in (
        ([1, 2], "holds a list"),
        ({"model": {}}, "holds no weights"),
        ({"epoch": 3, "weights": {"a": torch.zeros(1)}}, r"entry 'epoch' is a int"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load(Detector(), str(path), "any")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS"):
        load(Detector(), str(tmp_path / "absent.pth"), "any")


def test_file_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    # port 9 of this machine: refused at once
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        load(Detector(), "http://127.0.0.1:9/model.pth", "any")


def test_a_failed_load_does_not_spoil_the_checkpointer(tmp_path: Path) -> None:
    source, target = Detector(), Detector()
    path = save(source, tmp_path)
    (tmp_path / "empty.pth").touch()
    checkpointer = Checkpointer(target)
    with pytest.raises(CheckpointError, match="empty"):
        checkpointer.load(str(tmp_path / "empty.pth"))
    checkpointer.load(path)
    assert same(source, target)


def test_checkpoints_hold_nothing_but_data(tmp_path: Path) -> None:
    path = save(Detector(), tmp_path)
    assert set(load_untrusted(path)) == {"model"}


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="'strict'"):
        Checkpointer(nn.Linear(1, 1), fit="strict")


@pytest.mark.parametrize("mark", [None, b"", b"\xff\xfe\x00", b"model_0000009.pth"])
def test_a_lost_mark_is_found_again(tmp_path: Path, mark: bytes | None) -> None:
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    for name in ("model_0000003", "model_0000011", "model_best"):
        checkpointer.save(name)
    checkpointer.tag_last_checkpoint("model_0000003.pth")
    assert checkpointer.get_checkpoint_file().endswith("model_0000003.pth")
    (tmp_path / "last_checkpoint").unlink()
    if mark is not None:
        (tmp_path / "last_checkpoint").write_bytes(mark)
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file().endswith("model_0000011.pth")
    checkpointer.save("model_final")
    (tmp_path / "last_checkpoint").unlink()
    assert checkpointer.get_checkpoint_file().endswith("model_final.pth")
