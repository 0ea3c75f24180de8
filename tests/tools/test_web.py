"""`d2ext web`: what it shows for pictures, videos and broken files, without and with gradio."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.testing import tiny_config
from d2ext.tools import predict, web
from d2ext.tools.command_line import CommandError
from d2ext.utils.video import video_writer

NAMES = ("CenterNet", "YolactEdge")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of two systems, one of them with memory."""
    folder = tmp_path_factory.mktemp("systems")
    found = []
    for name in NAMES:
        cfg = tiny_config(name)
        cfg.TEST.DETECTIONS_PER_IMAGE = 5  # drawing takes long
        torch.manual_seed(0)
        Checkpointer(build_model(cfg), str(folder)).save(name)
        (folder / f"{name}.yaml").write_text(cfg.dump())
        found += ["--config-file", str(folder / f"{name}.yaml")]
        found += ["--weights", str(folder / f"{name}.pth")]
    return found


@pytest.fixture(scope="module")
def systems(words: list[str]) -> list[web.System]:
    return web.load_systems(web.build_parser().parse_args([*words, "--max-frames", "3"]))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    return tmp_path / "a.png"


def test_a_picture_is_what_predict_gives(
    systems: list[web.System], words: list[str], picture: Path, tmp_path: Path
) -> None:
    assert [x.name for x in systems] == list(NAMES)
    for i, system in enumerate(systems):
        drawn, results = system(str(picture), 0.01, tmp_path / "web" / str(i))
        command = [*words[4 * i : 4 * i + 2], "--input", str(picture), "--output"]
        command += [str(tmp_path / f"predict{i}"), "--confidence-threshold", "0.01"]
        assert predict.run([*command, "--opts", "MODEL.WEIGHTS", words[4 * i + 3]]) == 0
        expected = json.loads((tmp_path / f"predict{i}/coco_results.json").read_text())
        assert expected and json.loads(results.read_text()) == expected
        assert (cv2.imread(str(drawn)) == cv2.imread(str(tmp_path / f"predict{i}/a.png"))).all()
        rows = system.table(results)
        assert len(rows) == min(len(expected), 100)
        assert rows[0][1].startswith("class ") and rows[0][2] == round(expected[0]["score"], 3)
        assert [int(v) for v in rows[0][3].split(", ")] == [round(v) for v in expected[0]["bbox"]]


def test_a_video_is_cut_and_begins_anew(systems: list[web.System], tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    with video_writer(clip, 5) as write:
        for i in range(5):
            write(np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8), None)
    contents = []
    for name in ("first", "second"):
        for system in systems:
            drawn, results = system(str(clip), 0.01, tmp_path / name / system.name)
            reader = cv2.VideoCapture(str(drawn))
            assert drawn.suffix == ".mp4" and reader.get(cv2.CAP_PROP_FRAME_COUNT) == 3
            found = json.loads(results.read_text())
            assert {x["image_id"] for x in found} == {1, 2, 3}
            contents.append(found)
    assert contents[:2] == contents[2:]


def test_what_cannot_be_read_is_said(systems: list[web.System], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for file in (broken, text):
        with pytest.raises(CommandError, match=file.name):
            systems[0](str(file), 0.5, tmp_path / "out")


def test_wrong_commands(
    words: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "find_spec", lambda name: name)
    for wrong, message in (
        ([], "There is no system"),
        (words[:2], "CenterNet has no weights"),
        (words[2:4], "belongs behind a --config-file"),
        (words[:4] + words[2:4], "belongs behind a --config-file"),
        ([*words[:2], "--weights", "absent.pth"], "absent.pth"),
        (["--run", "absent"], "no folder of a training"),
    ):
        assert web.run(wrong) == 2
        assert message in capsys.readouterr().err

    class Page:
        def launch(self, **options: object) -> None:
            raise OSError(f"Cannot find empty port: {options['server_port']}")

    with monkeypatch.context() as patch:
        patch.setattr(web, "build_page", lambda *_: Page())
        assert web.run([*words, "--port", "81"]) == 2
        assert "127.0.0.1:81 is in use" in capsys.readouterr().err
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    assert web.run(words) == 2
    assert "needs gradio: pip install d2ext[web]" in capsys.readouterr().err


def test_the_page(
    systems: list[web.System], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradio = pytest.importorskip("gradio")
    page = web.build_page(systems, tmp_path)
    (function,) = [x.fn for x in page.fns.values()]
    outputs = function(str(picture), 0.01)
    assert len(outputs) == 10 and outputs[3] and outputs[8]
    note, shown, video = outputs[:3]
    assert Path(shown["value"]).is_file() and not note["visible"] and not video["visible"]
    (tmp_path / "b.jpg").write_text("broken")
    outputs = function(str(tmp_path / "b.jpg"), 0.5)
    for note, shown, video, table, file in (outputs[:5], outputs[5:]):
        assert note["visible"] and "Cannot read image 'b.jpg'" in note["value"]
        assert shown["value"] is video["value"] is file is None and table == []
    warnings: list[str] = []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    assert function(None, 0.5) == gradio.skip() and warnings == [
        "Upload an image or a video first."
    ]
