"""`d2ext convert`: published files → checkpoints that Detectron2 loads completely."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from d2ext import model_zoo
from d2ext.checkpoint import ConversionError, convert_state_dict
from d2ext.testing import tiny_config
from d2ext.tools import convert
from tests.reference.fixture import Fixture

REPOSITORY = Path(__file__).resolve().parents[2]
R_50, PLUS = "yolact/yolact_R_50_550.yaml", "yolact/yolact_plus_R_50_550.yaml"


def drawn(case: str) -> dict[str, Tensor]:
    """A published state dict with the fixture's values."""
    folder = REPOSITORY / "tests" / "reference" / "yolact" / case
    return {k: torch.from_numpy(v) for k, v in Fixture(folder).state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def published(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """YOLACT R-50 as published: file and content."""
    state = drawn("resnet50")
    torch.save(state, folder / "resnet50.pth")
    return folder / "resnet50.pth", state


def run(config: str, *arguments: object) -> int:
    return convert.run(["--config-file", config, *map(str, arguments)])


def load_strictly(cfg: CfgNode, path: Path) -> nn.Module:
    """Load with Detectron2's own checkpointer, which logs what it misses; that must be nothing."""
    complaints: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complaints.append(record.getMessage())

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "d2ext")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
        DetectionCheckpointer(model).load(str(path))
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
    assert complaints == []
    return model


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    for name, value in convert_state_dict("yolact", state).items():
        if name in own:
            assert torch.equal(own[name], value), name


def test_yolact(
    published: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, state = published
    target = tmp_path / "new" / "converted.pth"
    assert run(R_50, source, target) == 0
    assert "354 of 354" in capsys.readouterr().out
    assert_holds(load_strictly(model_zoo.get_config(R_50), target), state)
    assert [x.name for x in target.parent.iterdir()] == ["converted.pth"]

    before = target.stat().st_mtime_ns
    assert run(R_50, source, target) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert target.stat().st_mtime_ns == before
    # a config with frozen norms, whose model has no batch counters
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN")
    assert run(R_50, source, target, "--overwrite", "--opts", *frozen) == 0
    assert "batch counters dropped" in capsys.readouterr().out
    cfg = model_zoo.get_config(R_50)
    cfg.merge_from_list(list(frozen))
    assert_holds(load_strictly(cfg, target), state)


def test_yolact_plus_of_version_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the first version wrote beside, and without batch counters, as old PyTorch did."""
    state = drawn("plus_resnet50")
    surplus = {
        "backbone.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1),
        "fpn.downsample_layers.2.weight": torch.zeros(256, 256, 3, 3),
    }
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in {**old, **surplus}.items()}}, folder / "x"
    )
    assert run(PLUS, folder / "x", tmp_path / "plus.pth") == 0
    out = capsys.readouterr().out
    assert "2 published parameters left out" in out
    for name in surplus:
        assert name in out
    assert_holds(load_strictly(model_zoo.get_config(PLUS), tmp_path / "plus.pth"), old)


@pytest.mark.parametrize(
    ("config", "options", "messages"),
    [
        (
            "yolact/yolact_R_101_550.yaml",
            (),
            ("255 parameters of the model are not in the checkpoint", "res4.6", "another depth"),
        ),
        (
            PLUS,
            (),
            ("are not in the checkpoint", "offset_mask", "another shape", "variant"),
        ),
        (
            R_50,
            ("--opts", "MODEL.YOLACT.NUM_CLASSES", 20),
            ("logits.weight: checkpoint (243, 256, 3, 3), config (63, 256, 3, 3)", "class count"),
        ),
        (R_50, ("--system", "torchvision_resnet"), ("not known to this system",)),
        (R_50, ("--system", "yolo"), ("There is no converter for",)),
        (R_50, ("--opts", "MODEL.META_ARCHITECTURE", "RetinaNet"), ("--system", "yolact")),
    ],
)
def test_another_model_s_config(
    published: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: str,
    options: tuple[object, ...],
    messages: tuple[str, ...],
) -> None:
    system = options if options[:1] == ("--system",) else ()
    rest = () if system else options
    assert run(config, *system, published[0], tmp_path / "x.pth", *rest) == 2
    error = capsys.readouterr().err
    for message in messages:
        assert message in error
    assert list(tmp_path.iterdir()) == []


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_that_are_no_checkpoints(
    published: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = published[0].read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"weights": Malicious(tmp_path / "executed")}, tmp_path / "code.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"model": Malicious(tmp_path / "executed")}))
    torch.save([1, 2], tmp_path / "list.pth")
    before = sorted(tmp_path.iterdir())
    for name, message in (
        ("cut.pth", "cut short"),
        ("empty.pth", "empty"),
        ("code.pth", "refused"),
        ("code.pkl", "refused"),
        ("list.pth", "state dict"),
        ("missing.pth", "does not exist"),
    ):
        assert run(R_50, tmp_path / name, tmp_path / "out.pth") == 2, name
        assert message in capsys.readouterr().err, name
    assert sorted(tmp_path.iterdir()) == before
    assert run(R_50, published[0], tmp_path / "out.pkl") == 2
    assert ".pth" in capsys.readouterr().err
    assert run(R_50, published[0], published[0], "--overwrite") == 2
    assert "same file" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(convert, "convert", lambda *_: ({"model": {}}, []))
    (tmp_path / "file").write_text("")
    assert run(R_50, "x", tmp_path / "file" / "out.pth") == 1
    assert "cannot write" in capsys.readouterr().err


# Backbones


@pytest.fixture(scope="module")
def classifiers(folder: Path) -> dict[int, Path]:
    files = {}
    for depth in (18, 34):
        files[depth] = folder / f"resnet{depth}.pth"
        model = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        torch.save(model.state_dict(), files[depth])
    return files


def small_config(path: Path) -> str:
    path.write_text(tiny_config("YOLACT").dump())
    return str(path)


def test_torchvision_backbone(
    classifiers: dict[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small_config(tmp_path / "small.yaml")
    system = ("--system", "torchvision_resnet")
    assert run(config, *system, classifiers[18], tmp_path / "R-18.pth") == 0
    out = capsys.readouterr().out
    assert "fc.weight" in out and "fc.bias" in out and "initial" not in out
    model = build_model(tiny_config("YOLACT"))
    DetectionCheckpointer(model).load(str(tmp_path / "R-18.pth"))
    state = torch.load(classifiers[18], weights_only=True)
    own = model.backbone.bottom_up.state_dict()
    for ours, theirs in (
        ("stem.conv1.weight", "conv1.weight"),
        ("stem.conv1.norm.running_var", "bn1.running_var"),
        ("res3.0.shortcut.weight", "layer2.0.downsample.0.weight"),
        ("res5.1.conv2.weight", "layer4.1.conv2.weight"),
    ):
        assert torch.equal(own[ours], state[theirs]), ours


def test_torchvision_backbone_of_another_depth(
    classifiers: dict[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small_config(tmp_path / "small.yaml")
    system = ("--system", "torchvision_resnet")
    assert run(config, *system, classifiers[34], tmp_path / "out.pth") == 2
    error = capsys.readouterr().err
    assert "are not in the net" in error and "another depth" in error
    options = ("--opts", "MODEL.RESNETS.DEPTH", 34)
    assert run(config, *system, classifiers[18], tmp_path / "out.pth", *options) == 2
    assert "are not in the checkpoint" in capsys.readouterr().err
    # without --system: told what it is
    assert run(config, classifiers[18], tmp_path / "out.pth") == 2
    assert "--system torchvision_resnet" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_every_config_has_its_converter() -> None:
    for name in model_zoo.available():
        # Detectron2's own models, and flow networks, whose published files --system tells apart.
        if name.startswith(("baselines/", "flow/")):
            continue
        folder, file = name.split("/")
        system = "upsnet" if file.startswith("upsnet_") else folder
        assert convert.system_of(model_zoo.get_config(name)) == system, name


def test_models_of_others_have_none() -> None:
    cfg = tiny_config("YOLACT")
    for architecture in ("GeneralizedRCNN", "Other"):
        cfg.MODEL.META_ARCHITECTURE = architecture
        with pytest.raises(ConversionError, match=r"landmarks, .*upsnet, .*yolact"):
            convert.system_of(cfg)
