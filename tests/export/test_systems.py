"""Every system's files, ONNX and torch.export: the same tensors and instances, also by NumPy alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from torch import Tensor

import d2ext
from d2ext.codecs.densepose import ChartPredictions, charts_in_boxes, vertices_in_boxes
from d2ext.config import ConfigError
from d2ext.data.shapes.video import draw_clip
from d2ext.export import ExportedFile, check, numpy_results
from d2ext.export.files import later_path
from d2ext.export.graph import network_inputs
from d2ext.modeling.meta_arch import MetaArch
from d2ext.systems.landmarks.model import LandmarkNet
from d2ext.systems.upsnet.model import UPSNet
from tests.export.cases import CASES, HEIGHT, WIDTH, Exported
from tests.export.models import lively_model
from tests.export.test_docs import DOCS

MEMORY = "memory_gathered"


# Of a module: tests of one file follow each other, and it is opened once.
@pytest.fixture(scope="module", params=list(CASES))
def exported(request: pytest.FixtureRequest, exported_case: Callable[[str], Exported]) -> Exported:
    return exported_case(request.param)


FILES = [(name, kind) for name, case in CASES.items() for kind in case.formats]


@pytest.fixture(scope="module", params=FILES, ids=["-".join(x) for x in FILES])
def file(
    request: pytest.FixtureRequest, exported_case: Callable[[str], Exported]
) -> tuple[Exported, str]:
    name, kind = request.param
    exported = exported_case(name)
    return exported, exported.path(kind)


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def fields(instances: Instances) -> dict[str, np.ndarray]:
    named = dict(instances.get_fields())
    surfaces = named.pop("pred_densepose").maps() if "pred_densepose" in named else {}
    return {k: getattr(x, "tensor", x).numpy() for k, x in (named | surfaces).items()}


def assert_equal(actual: Instances, expected: Instances) -> None:
    assert actual.image_size == expected.image_size
    own, other = fields(actual), fields(expected)
    assert own.keys() == other.keys()
    for name, value in other.items():
        assert_near(name, own[name], value, 1e-3)


def assert_near(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Numbers are nearly equal; masks may differ where their logit is nearly 0."""
    if expected.dtype == bool:
        assert actual.shape == expected.shape
        assert (actual != expected).sum() <= 1e-5 * expected.size, name
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=tolerance, err_msg=name)


def test_tensors_are_the_models_own(file: tuple[Exported, str]) -> None:
    exported, opened = file[0], ExportedFile(file[1])
    height, width = opened.facts["input"]["shape"][2:]
    unit, less = opened.facts["input"]["multiple"], opened.facts["input"]["less"]
    size = (height, width) if height else (9 * unit - less, 12 * unit - less)
    size = (111, 143) if unit == 1 and height is None else size
    one_alone = bool(exported.model.export_form().rows)
    for count in (1,) if one_alone else (1, 3):  # the graph was made of two images, or one
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, 3, *size), generator=generator)
        for difference in check(exported.model, opened, images, 1e-4):
            assert difference.largest < 1e-4 and difference.compared > 0, difference


@pytest.mark.parametrize("name", ["densepose", "densepose_embeddings"])
def test_an_image_without_objects(name: str, exported_case: Callable[[str], Exported]) -> None:
    """An image of no size has none."""
    exported = exported_case(name)
    opened = ExportedFile(exported.path(exported.formats[-1]))
    size = opened.facts["input"]["shape"][2:]
    outputs = opened(torch.zeros(1, 3, *size), torch.zeros(1, 2))
    assert outputs["count"].tolist() == [0]
    assert all(outputs[x].shape[1] == 0 for x in exported.model.export_form().rows)


def test_predictor_gives_what_detectron2s_gives(file: tuple[Exported, str]) -> None:
    exported, path = file
    image = picture()
    expected = DefaultPredictor(exported.cfg)(image)["instances"]
    assert len(expected) > 0
    predictor = d2ext.Predictor(path)
    assert_equal(predictor(image)["instances"], expected)
    assert predictor.metadata.get("thing_classes") == d2ext.Predictor(exported.cfg).metadata.get(
        "thing_classes"
    )


def numpy_inputs(
    facts: dict[str, Any], model: MetaArch, image: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """What a program without PyTorch does before: images, and what is said of the image."""
    height, width = facts["input"]["shape"][2:]
    size = image.shape[:2]
    if facts["results"] == "yolact":
        image = cv2.resize(image.astype(np.float32), (width, height))
        return image.transpose(2, 0, 1)[None], {"size": size}
    if facts["results"] in ("upsnet", "vpsnet"):
        assert isinstance(model, UPSNet)
        scale = model.network_scale(size)
        image = cv2.resize(image.astype(np.float32), None, fx=scale, fy=scale)
        images = np.zeros((1, 3, height, width), np.float32)
        images[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        return images, {"size": size, "input_size": image.shape[:2], "scale": scale}
    if facts["results"].startswith("densepose"):
        edge = ResizeShortestEdge([90, 90], 1333)
        image = edge.get_transform(image).apply_image(image)  # by Pillow
        images = np.zeros((1, 3, height, width), np.float32)
        images[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        return images, {"size": size, "input_size": image.shape[:2]}
    if facts["results"] == "landmarks":
        assert isinstance(model, LandmarkNet)
        box = np.array([0.0, 0.0, size[1], size[0]])
        matrix = numpy_results.crop_matrix(box, (height, width), model.padding)
        centers = matrix.copy()
        centers[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        crop = cv2.warpAffine(image.astype(np.float32), centers, (width, height), flags=flags)
        return crop.transpose(2, 0, 1)[None], {"matrix": matrix}
    if facts["results"] == "retinaface":
        return image.transpose(2, 0, 1)[None].astype(np.float32), {"size": size}
    images, corner = numpy_results.place(image, facts)
    return images, {"size": size, "corner": corner} | (
        {"input_size": images.shape[2:]} if facts["results"] == "cornernet" else {}
    )


NAMES = {
    "boxes": "pred_boxes",
    "classes": "pred_classes",
    "masks": "pred_masks",
    "points": "pred_keypoints",
    "joints": "pred_keypoints",
    "meshes": "pred_face_meshes",
    "distances": "embedding_distances",
    "score": "scores",
}
"""NumPy's names of what Instances call otherwise."""


def surfaces_in_boxes(instances: Instances) -> list[Tensor]:
    """What numpy_results calls surfaces."""
    predictions, boxes = instances.pred_densepose, instances.pred_boxes.tensor
    if isinstance(predictions, ChartPredictions):
        return [torch.cat([x.labels[None], x.uv]) for x in charts_in_boxes(predictions, boxes)]
    results = vertices_in_boxes(predictions, boxes, predictions.vertices["toy"])
    return [x.vertices.masked_fill(~x.mask, -1) for x in results]


def test_numpy_gives_the_same(exported: Exported) -> None:
    path = exported.path(exported.formats[-1])
    file = ExportedFile(path)
    image = picture()
    ordered = image[..., ::-1] if file.facts["input"]["channels"] == "RGB" else image
    images, known = numpy_inputs(file.facts, exported.model, ordered)
    sizes = [torch.tensor([known["input_size"]])] if file.facts["input"]["sizes"] else []
    outputs = file(torch.from_numpy(np.ascontiguousarray(images)), *sizes)
    results = numpy_results.results(
        file.facts, {name: x.numpy() for name, x in outputs.items()}, **known
    )
    predicted = d2ext.Predictor(path)(image)
    expected = fields(predicted["instances"])
    if "panoptic" in results:
        panoptic, infos = predicted["panoptic_seg"]
        assert (results.pop("panoptic") != panoptic.numpy()).mean() < 1e-3
        assert len(results.pop("segments")) == len(infos)
        assert results.pop("semantic").shape == panoptic.shape
        results = {name: x for name, x in results.items() if not name.startswith("object_")}
    if "surfaces" in results:
        own, other = results.pop("surfaces"), surfaces_in_boxes(predicted["instances"])
        assert len(own) == len(other) > 0 and len(np.unique(own[0])) > 5
        for a, b in zip(own, other, strict=True):  # argmax of nearly equal numbers may differ
            assert (abs(a - b.numpy()) > 1e-4).mean() < 1e-3
    compared = 0
    for name, value in results.items():
        other = expected.get(NAMES.get(name, name))
        if other is None:
            assert name in ("corner_scores", "point_scores"), name
            continue
        if name == "joints":
            value = value + 0.5  # COCO's convention → Detectron2's
        if name in ("points", "joints"):
            other = other[..., :2]
        value = value[None] if value.ndim < other.ndim else value
        tolerance = 0.05 if file.facts["results"] == "landmarks" else 1e-3  # OpenCV's crop
        assert_near(name, value, other, tolerance)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_frames_of_a_video(kind: str, exported_case: Callable[[str], Exported]) -> None:
    """Key frames and others, of two videos."""
    exported = exported_case("yolact_edge")
    frames = [np.roll(picture(), 5 * i, axis=1) for i in range(6)]
    own, file = d2ext.VideoPredictor(exported.cfg), d2ext.VideoPredictor(exported.path(kind))
    distances = []
    for video in range(2):
        for frame in frames[video:]:
            actual, expected = file(frame), own(frame)
            assert actual["key_distance"] == expected["key_distance"]
            assert_equal(actual["instances"], expected["instances"])
            distances.append(actual["key_distance"])
        own.reset()
        file.reset()
    assert distances == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]


CLIPS = [("vpsnet", "torch"), ("vpsnet", "onnx"), ("vpsnet_track", "torch")]


@pytest.mark.parametrize(("name", "kind"), CLIPS, ids=["-".join(x) for x in CLIPS])
def test_panoptic_clips(name: str, kind: str, exported_case: Callable[[str], Exported]) -> None:
    """Maps, segments and ids of two clips, of which the second one changes its size."""
    exported = exported_case(name)
    own, file = d2ext.VideoPredictor(exported.cfg), d2ext.VideoPredictor(exported.path(kind))
    for index, widths in enumerate(((WIDTH,) * 4, (WIDTH, WIDTH + 5, WIDTH + 5))):
        clip = draw_clip(0, "val", index, HEIGHT, WIDTH + 5, length=len(widths))
        ids = []
        for frame, width in zip(clip.frames, widths, strict=True):
            image = np.ascontiguousarray(frame.image[:, :width])
            actual, expected = file(image), own(image)
            assert_equal(actual["instances"], expected["instances"])
            (panoptic, segments), (other_map, others) = (
                x["panoptic_seg"] for x in (actual, expected)
            )
            assert (panoptic != other_map).sum() <= 1, "nearly equal logits"
            for segment, other in zip(segments, others, strict=True):
                near = {"score": 1e-4, "area": 1}
                near = {key: pytest.approx(other[key], abs=x) for key, x in near.items()}
                assert segment == {**other, **near}
            ids.append(set(expected["instances"].track_ids.tolist()))
        assert 0 < len(ids[0] & ids[-1]) < len(ids[-1]), "some objects are known, some new"
        own.reset()
        file.reset()


@torch.no_grad()
def test_flow_and_fusion_are_in_the_graph() -> None:
    """Scores of a second frame, which depend on the first one, are those of the model."""
    _, model = lively_model("VPSNet", CASES["vpsnet"].options)
    inputs = [
        [{"image": torch.from_numpy(np.roll(picture(), 6 * i, axis=1).transpose(2, 0, 1).copy())}]
        for i in range(2)
    ]
    sizes = [model.network_size((HEIGHT, WIDTH))]
    _, memory = model.step(inputs[0], None)
    images, expected = model._predict(
        model.preprocess(inputs[1]), sizes, [False], inputs[1], memory
    )
    form = model.export_form().later
    state = model.size_tensor(sizes), memory.images, memory.gathered
    outputs = form.pack(form.network(*network_inputs(images, form, *state)))
    torch.testing.assert_close(outputs["semantic"], expected.semantic.score, rtol=1e-5, atol=1e-6)
    for other in ((state[0], images, memory.gathered), (state[0], memory.images, outputs[MEMORY])):
        changed = form.pack(form.network(images, *other))["semantic"]
        assert (changed - expected.semantic.score).abs().max() > 1e-4


def test_panoptic_videos_in_step(exported_case: Callable[[str], Exported]) -> None:
    """One goes on, the other begins."""
    exported = exported_case("vpsnet")
    file = ExportedFile(exported.path("torch"))
    models = exported.model, file.model(file.cfg)
    frames = [
        torch.from_numpy(np.roll(picture(), 6 * i, axis=1).transpose(2, 0, 1)) for i in range(4)
    ]
    results = []
    for model in models:
        first = [{"image": x, "is_first": True} for x in frames[:2]]
        _, memory = model.step(first, None)
        following = [{"image": frames[2]}, {"image": frames[3], "is_first": True}]
        results.append(model.step(following, memory)[0])
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual["instances"], expected["instances"])
    assert results[0][1]["instances"].track_ids.tolist() == [
        x + 1 for x in range(len(results[0][1]["instances"]))
    ]


def test_numpy_feeds_the_memory(
    exported_case: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/export.md says of videos."""
    path = exported_case("yolact_edge").path("onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install d2ext[export]")
    for name in (path, later_path(path)):
        shutil.copy(name, tmp_path / Path(name).name.replace("model", "edge"))
    monkeypatch.chdir(tmp_path)
    key, later = ExportedFile(path), ExportedFile(path).later
    assert later is not None
    images = torch.randint(0, 256, (3, 1, 3, 64, 64)).float()
    (block,) = re.findall(r"```python\n(key, later.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {"onnxruntime": onnxruntime, "frames": list(images.numpy())}
    exec(block, names)
    outputs = key(images[0])
    expected = later(images[2], *(outputs[name] for name in later.facts["memory"]))
    assert "similarity" in expected and expected.keys() == names["one"].keys()
    for name, value in names["one"].items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)


def test_files_of_a_video_belong_together(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    path = exported_case("yolact_edge").path("torch")
    with pytest.raises(ConfigError, match="which is the one to give"):
        ExportedFile(later_path(path))
    moved = str(tmp_path / "street.pt2")
    shutil.copy(path, moved)
    with pytest.raises(ConfigError, match=r"no file '.*street\.later\.pt2', of the frames after"):
        ExportedFile(moved)
    shutil.copy(later_path(exported_case("vpsnet").path("torch")), later_path(moved))
    with pytest.raises(ConfigError, match="are not of one export"):
        ExportedFile(moved)
    shutil.copy(later_path(path), later_path(moved))
    assert ExportedFile(moved).later is not None


def test_sizes_that_a_file_does_not_take(exported: Exported) -> None:
    file = ExportedFile(exported.path(exported.formats[0]))
    if file.facts["input"]["sizes"]:
        with pytest.raises(ValueError, match=r"not the 300x100"):
            file(torch.zeros(1, 3, 100, 300))
    elif file.facts["input"]["shape"][2] is None:
        with pytest.raises(ValueError, match=r"takes sides of 96 to 4096 pixels, not the 64x32"):
            file(torch.zeros(1, 3, 32, 64))
    else:
        with pytest.raises(ValueError, match=r"not the 7x5 .*--dynamic-size"):
            file(torch.zeros(1, 3, 5, 7))


def test_the_file_says_what_is_in_it(exported: Exported) -> None:
    path = exported.path(exported.formats[0])
    facts = ExportedFile(path).facts
    assert facts["architecture"] == exported.cfg.MODEL.META_ARCHITECTURE
    assert facts["input"]["channels"] == exported.cfg.INPUT.FORMAT
    assert facts["d2ext"] == d2ext.__version__
    assert "model.pth" not in facts["config"], "a path of this machine"
    assert Path(path).parent.name not in str(facts)
