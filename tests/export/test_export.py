"""What is refused, what a file says, the command, and what the check notices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

import d2ext
from d2ext.config import ConfigError
from d2ext.data.shapes import FaceSet, register_shapes_faces
from d2ext.export import (
    ExportedFile,
    NotExportable,
    check,
    export,
    exportable,
    numpy_results,
)
from d2ext.export.check import Difference, _differences
from d2ext.export.files import _joined
from d2ext.layers.corner_pool import _doubling_maximum, corner_pool_reference
from d2ext.modeling.export_form import ExportForm
from d2ext.modeling.tta import build_tta
from d2ext.systems.cornernet.postprocess import SuppressionOptions, suppress
from d2ext.systems.retinaface.postprocess import Candidates, select
from d2ext.testing import random_inputs, tiny_architectures, tiny_config
from d2ext.tools import benchmark, evaluate, predict
from d2ext.tools import export as command
from tests.export.cases import HEIGHT, WIDTH, Exported

ROOT = Path(__file__).parents[2]
FACES_CONFIG = "retinaface/mobilenet025_shapes.yaml"
# scripts/run_demo.py says how these weights were trained.
OPTIONS = ["MODEL.WEIGHTS", str(ROOT / "scripts/demo_faces.pth")]
OPTIONS += ["MODEL.PIXEL_STD", "[58.0,58.0,58.0]", "MODEL.DEVICE", "cpu"]
REFUSED = {
    "CornerNetSaccade": "what it looks at next",
}


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_what_cannot_be_exported_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    cfg = tiny_config(architecture)
    name = cfg.MODEL.META_ARCHITECTURE
    with pytest.raises(NotExportable, match=REFUSED[architecture]) as error:
        export(build_model(cfg), cfg, tmp_path / "model.onnx")
    assert str(error.value).startswith(name)
    assert not list(tmp_path.iterdir())


def test_every_system_is_exported_or_refused() -> None:
    exportable = {
        "YOLACT",
        "CornerNet",
        "CenterNetTriplets",
        "CenterNet",
        "LandmarkNet",
        "RetinaFace",
        "UPSNet",
        "DensePose",
        "YolactEdge",
        "VPSNet",
    }
    assert exportable | REFUSED.keys() == set(tiny_architectures())


TTA = ["MODEL.RETINAFACE.TEST.AUG.ENABLED", True, "MODEL.RETINAFACE.TEST.AUG.FLIP", False]


@pytest.mark.parametrize(
    ("architecture", "options", "arguments", "message"),
    [
        ("YOLACT", ["MODEL.YOLACT.TEST.NMS", "traditional"], {}, "Traditional NMS"),
        ("YOLACT", [], {"dynamic_size": True}, "brings every image to 64x64"),
        ("YOLACT", [], {"size": (65, 64)}, "brings every image to 64x64"),
        ("CornerNet", [], {"size": (64, 64)}, "multiples of 16 less 1, not 64x64"),
        ("CenterNet", [], {"size": (64, 65)}, "multiples of 32, not 64x65"),
        ("CenterNet", [], {"size": (64, 96), "dynamic_size": True}, "sides of 96 to 4096"),
        ("UPSNet", [], {"dynamic_batch": True}, "takes one image at a time"),
        ("UPSNet", [], {"size": (64, 96), "dynamic_size": True}, "input has one size"),
        ("VPSNet", [], {}, "flow by DIS cannot be exported"),
        ("VPSNet", ["MODEL.FLOW.NAME", "RAFTSmall"], {}, "flow by RAFTSmall cannot be exported"),
        ("RetinaFace", TTA, {}, "TEST.AUG.ENABLED"),
        ("DensePose", ["MODEL.MASK_ON", True], {}, "mask or keypoint head"),
        ("DensePose", ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"], {}, "pooling by ROIAlign"),
        ("DensePose", ["TEST.DETECTIONS_PER_IMAGE", -1], {}, "to their number"),
        ("DensePose", ["TEST.AUG.ENABLED", True, "TEST.AUG.FLIP", False], {}, "TEST.AUG.ENABLED"),
    ],
)
def test_configurations_that_cannot_be_exported(
    architecture: str, options: list[Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    cfg = tiny_config(architecture)
    cfg.merge_from_list(options)
    model = build_tta(cfg, build_model(cfg))
    with pytest.raises(NotExportable, match=message):
        export(model, cfg, tmp_path / "model.onnx", **arguments)


def test_names_suit_their_format(tmp_path: Path) -> None:
    cfg = tiny_config("YOLACT")
    with pytest.raises(ConfigError, match=r"format torch ends with \.pt2"):
        export(nn.Identity(), cfg, tmp_path / "model.onnx", file_format="torch")


@pytest.mark.parametrize("architecture", ["RetinaFace", "YOLACT", "UPSNet", "DensePose"])
def test_tracing_is_an_error(architecture: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(tiny_config(architecture)).eval()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model([{"image": image}])[0]["instances"].scores

    image = random_inputs(1)[0]["image"].float()
    with pytest.raises(RuntimeError, match=r"cannot be traced: .*d2ext export"):
        torch.jit.trace(Wrapper(), (image,))


@pytest.mark.parametrize("direction", ["top", "bottom", "left", "right"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 2, 7, 5), (1, 1, 16, 33)])
def test_corner_pooling_of_files_is_exact(direction: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., -1, 0] = torch.nan
    axis, reverse = {
        "top": (2, True),
        "bottom": (2, False),
        "left": (3, True),
        "right": (3, False),
    }[direction]
    expected = corner_pool_reference(x, direction)
    torch.testing.assert_close(
        _doubling_maximum(x, axis, reverse), expected, rtol=0, atol=0, equal_nan=True
    )


def test_models_of_others_are_refused() -> None:
    cfg = tiny_config("DensePose")
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    with pytest.raises(NotExportable, match="GeneralizedRCNN cannot be exported: only systems of"):
        exportable(cfg, build_model(cfg))


@pytest.fixture(scope="module")
def faces(exported_case: Callable[[str], Exported]) -> tuple[Any, Any, str]:
    """Config, model, and its file for bytes of one size."""
    exported = exported_case("retinaface")
    return exported.cfg, exported.model, exported.path("torch")


def test_bytes_and_one_image_a_batch(faces: tuple[Any, Any, str]) -> None:
    _, model, path = faces
    file = ExportedFile(path)
    assert file.facts["input"] | {"name": ""} == {
        "name": "",
        "shape": [1, 3, HEIGHT, WIDTH],
        "dtype": "uint8",
        "channels": "BGR",
        "multiple": 1,
        "less": 0,
        "sizes": False,
    }
    assert file.facts["classes"]["thing_classes"] == ["a", "b", "c"]
    images = torch.randint(0, 256, (3, 3, HEIGHT, WIDTH)).float()
    differences = check(model, file, images, 1e-4)
    assert max(x.largest for x in differences) < 1e-4, differences


def test_the_check_sees_another_model(faces: tuple[Any, Any, str]) -> None:
    cfg, model, path = faces
    other = build_model(cfg).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.head.offsets[0].bias[0] += 0.2
    images = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH)).float()
    by_name = {x.output: x.largest for x in check(other, ExportedFile(path), images, 1e-4)}
    assert by_name["boxes"] > 1e-4 > by_name["points"]


def test_maps_are_no_slots() -> None:
    """Of as many channels as there are slots, one of them empty."""
    form = ExportForm(dict, dict, (8, 8), maps=("semantic",), memory=("memory_gathered",))
    outputs = {"scores": torch.tensor([[0.9, 0.8, -1.0]]), "classes": torch.zeros(1, 3)}
    outputs |= {"semantic": torch.rand(1, 3, 2, 2), "memory_gathered": torch.rand(1, 3, 2, 2)}
    swapped = {
        name: x[:, [1, 0, 2]] for name, x in outputs.items() if name in ("scores", "classes")
    }
    differences = {x.output: x for x in _differences(outputs | swapped, outputs, form, 1e-4)}
    assert differences["scores"][1:] == (0.0, 2, 2)
    for name in ("semantic", "memory_gathered"):
        assert differences[name][1:] == (0.0, 0, 12)


def test_an_exported_file_needs_nothing_else(faces: tuple[Any, Any, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export again"):
        d2ext.Predictor(faces[2], "model.pth")
    with pytest.raises(ConfigError, match="no file"):
        d2ext.Predictor(str(tmp_path / "model.onnx"))
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"no file of torch\.export"):
        d2ext.Predictor(str(tmp_path / "model.pt2"))


def test_predict_takes_a_file(faces: tuple[Any, Any, str], tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    out = tmp_path / "out"
    common = [
        "--input",
        str(tmp_path / "a.png"),
        "--output",
        str(out),
        "--confidence-threshold",
        "0",
    ]
    assert predict.run(["--exported", faces[2], *common]) == 0
    results = json.loads((out / "coco_results.json").read_text())
    expected = d2ext.Predictor(faces[2])(image)["instances"]
    assert sorted(x["score"] for x in results) == pytest.approx(sorted(expected.scores.tolist()))
    with pytest.raises(SystemExit):
        predict.run(["--exported", faces[2], *common, "--draw", "heatmaps"])


@pytest.fixture(scope="module")
def faces_of_shapes() -> Iterator[str]:
    """The first images of `shapes_val_faces`."""
    name = register_shapes_faces(FaceSet("val", num=6), prefix="exported")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def trained(faces_of_shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``trained(tool, ...)``: a tool, run on the demo's RetinaFace; what an evaluation has written."""

    def run(tool: Any, *words: str) -> dict[str, Any]:
        output = tmp_path_factory.mktemp("evaluation")
        options = [*OPTIONS, "DATASETS.TEST", f"('{faces_of_shapes}',)"]
        options += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(output)]
        if words[0] == "--exported":  # it has the others itself
            options = options[len(OPTIONS) :]
        assert tool.run([*words, *(["--opts"] if tool is command else []), *options]) == 0
        file = output / "results.json"
        return json.loads(file.read_text()) if file.exists() else {}

    return run


@pytest.fixture(scope="module")
def results_of_the_model(trained: Callable[..., Any]) -> dict[str, dict[str, float]]:
    return trained(evaluate, "--config-file", FACES_CONFIG)


@pytest.mark.parametrize("file", ["faces.onnx", "faces.pt2"])
def test_a_file_has_the_ap_of_its_model(
    file: str,
    trained: Callable[..., Any],
    results_of_the_model: dict[str, dict[str, float]],
    tmp_path: Path,
) -> None:
    if file.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="pip install d2ext[export]")
    path = str(tmp_path / file)
    trained(command, "--config-file", FACES_CONFIG, "--size", "256", "256", "--check", path)
    found = trained(evaluate, "--exported", path)
    assert found["bbox"]["AP"] > 30 and found.keys() == results_of_the_model.keys()
    for task, values in results_of_the_model.items():  # boxes, points, meshes
        assert found[task] == pytest.approx(values, abs=0.1, nan_ok=True), task


def test_benchmark_takes_a_file(
    faces: tuple[Any, Any, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model", "--exported", faces[2], "--image-size", str(HEIGHT), str(WIDTH)]
    words += ["--iters", "1", "--warmup", "1", "--output", str(tmp_path / "report.json")]
    assert benchmark.run(words) == 0
    assert f"{faces[2]}: exported\n" in capsys.readouterr().out
    (batch,) = json.loads((tmp_path / "report.json").read_text())["batches"]
    assert set(batch["stages_ms"]) == {"upload", "preprocess", "file", "results", "total"}
    assert batch["output"]["detections_per_image"] > 0 and batch["stages_ms"]["file"] > 0
    for more, message in (
        (["--dtype", "bfloat16"], "export again"),
        (["--image-size", "64", "64"], "--dynamic-size"),
    ):
        assert benchmark.run([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_the_command_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config("RetinaFace")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    out = tmp_path / "model.pt2"
    arguments = ["--config-file", str(tmp_path / "config.yaml"), "--check", "--size", "60", "80"]
    assert command.run([*arguments, str(out)]) == 0
    text = capsys.readouterr().out
    assert f"Wrote {out}" in text and "picture  boxes" in text and "noise    scores" in text
    assert command.run([*arguments, "--format", "onnx", str(out)]) == 2
    assert "ends with .onnx" in capsys.readouterr().err
    monkeypatch.setattr(command, "export", lambda *_, **__: [])  # the file is there
    assert command.run([*arguments, "--tolerance", "-1", str(out)]) == 1
    assert "beyond the tolerance" in capsys.readouterr().out


def test_images_with_other_numbers_of_rows() -> None:
    joined = _joined([torch.ones(1, 2, 3), torch.ones(1, 4, 3), torch.ones(1, 0, 3)])
    assert joined.sum(dim=2).tolist() == [[3, 3, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]


def test_differences_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Difference("boxes", 1e-5, 2, 8), Difference("scores", 0.5, 0, 2)
    assert command.print_differences("noise", [good], 1e-3)
    assert not command.print_differences("noise", [good, bad], 1e-3)
    assert "(2 slots moved)" in capsys.readouterr().out


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_nms_of_numpy_is_the_models(threshold: float) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (1, 300, 2))
    boxes = torch.from_numpy(
        np.concatenate([corners, corners + rng.uniform(5, 30, corners.shape)], 2)
    )
    scores = torch.from_numpy(np.sort(rng.uniform(size=(1, 300)))[:, ::-1].copy())
    classes = torch.from_numpy(rng.integers(0, 2, (1, 300)))
    candidates = Candidates(scores, classes, boxes, classes, boxes)
    (slots,), (count,), _ = select(
        candidates, score_threshold=0.0, nms_threshold=threshold, max_detections=100
    )
    keep = numpy_results.greedy_nms(boxes[0].numpy(), classes[0].numpy(), threshold, 100)
    assert 20 < len(keep) < 101 and keep.tolist() == slots[:count].tolist()


@pytest.mark.parametrize("keep_stale", [True, False])
def test_soft_nms_of_numpy_is_the_models(keep_stale: bool) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (200, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 30, corners.shape)], 1)
    scores, classes = rng.uniform(0, 0.3, 200), rng.integers(0, 2, 200)
    rows = np.concatenate(
        [boxes, scores[:, None], np.zeros((200, 2)), classes[:, None], boxes[:, :1]], 1
    )
    options = SuppressionOptions(score_threshold=0.02, keep_stale=keep_stale, max_detections=150)
    expected = suppress(torch.from_numpy(rows).float(), options).numpy()
    result = {"boxes": boxes.astype(np.float32), "scores": scores, "classes": classes}
    result = numpy_results._soft_nms(result, 0.5, 0.02, keep_stale, 150)
    assert 50 < len(expected) < 190
    np.testing.assert_allclose(result["scores"], expected[:, 4], rtol=1e-4)
    np.testing.assert_allclose(result["boxes"], expected[:, :4], rtol=1e-5)
    assert (result["classes"] == expected[:, 7]).all()
