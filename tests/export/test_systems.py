"""Every system's files, ONNX and torch.export: the same tensors and instances, also by NumPy alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances

import d2ext
from d2ext.export import ExportedFile, check, numpy_results
from d2ext.export.files import metadata, write
from d2ext.export.graph import capture, export_form
from d2ext.modeling.meta_arch import MetaArch
from d2ext.systems.landmarks.model import LandmarkNet
from d2ext.systems.upsnet.model import UPSNet
from tests.export.models import lively_model

HEIGHT, WIDTH = 129, 190
CORNERS = ("TEST.MAX_DISTANCE", 9.0, "NUM_CLASSES", 1, "TEST.TOP_K", 40)
PLUS = ("MASK_RESCORING.ENABLED", True, "INPUT_SIZE", 256, "BOTTOM_UP", "build_resnet_dcn_backbone")


RESNET = ["MODEL.RETINAFACE.BOTTOM_UP", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18]
RESNET += ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.NORM", "BN"]
RESNET += ["MODEL.RETINAFACE.IN_FEATURES", ["res3", "res4", "res5"]]
RESNET += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]


def keys(section: str, *pairs: Any) -> list[Any]:
    return [f"MODEL.{section}.{x}" if i % 2 == 0 else x for i, x in enumerate(pairs)]


class Case(NamedTuple):
    architecture: str
    options: list[Any]
    dynamic_size: bool = False


CASES = {
    "yolact": Case("YOLACT", []),
    "yolact_plus": Case(
        "YOLACT",
        keys("YOLACT", *PLUS, "TEST.NMS", "cross_class_fast", "TEST.CROP", "after")
        + ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]],
    ),
    "cornernet": Case("CornerNet", keys("CORNERNET", *CORNERS), dynamic_size=True),
    "triplets": Case("CenterNetTriplets", keys("CENTERNET_TRIPLETS", *CORNERS, "TEST.FLIP", False)),
    "centernet": Case("CenterNet", keys("CENTERNET", "TEST.FLIP", True)),
    "landmarks": Case("LandmarkNet", []),
    "upsnet": Case("UPSNet", keys("UPSNET", "TEST.SCORE_THRESH", 0.15, "TEST.MIN_SIZE", 100)),
    "retinaface": Case("RetinaFace", [], dynamic_size=True),
    "retinaface_resnet": Case("RetinaFace", RESNET, dynamic_size=True),
    "retinaface_mesh": Case("RetinaFace", keys("RETINAFACE", "MESH.NUM_VERTICES", 12)),
}


class Exported(NamedTuple):
    cfg: CfgNode
    model: MetaArch
    path: Callable[[str], str]
    """Format → a file of it, in which batches are of any size where they can be."""


@pytest.fixture(scope="module", params=list(CASES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case: Case = CASES[request.param]
    cfg, model = lively_model(case.architecture, case.options)
    folder = tmp_path_factory.mktemp(request.param)
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    form = export_form(model)
    size = form.size
    if form.multiple:
        canvas = getattr(model, "canvas", None)
        size = (HEIGHT, WIDTH) if canvas is None else canvas((HEIGHT, WIDTH), 1.0).size
    if form.sizes:  # that of the image, resized and padded
        shape = model.network_size((HEIGHT, WIDTH))
        size = tuple(-(-side // form.multiple) * form.multiple for side in shape)

    def path(file_format: str) -> str:
        if file_format == "onnx":
            for package in ("onnxscript", "onnxruntime"):
                pytest.importorskip(package, reason="pip install d2ext[export]")
        name = folder / f"model{'.onnx' if file_format == 'onnx' else '.pt2'}"
        if not name.exists():
            program = capture(
                model,
                form,
                size,
                dynamic_batch=not form.sizes,
                dynamic_size=case.dynamic_size,
                onnx=file_format == "onnx",
            )
            facts = metadata(cfg, form, program, "cpu")
            write(program, str(name), file_format, facts)
        return str(name)

    return Exported(cfg, model, path)


@pytest.fixture(params=["torch", "onnx"])
def path(request: pytest.FixtureRequest, exported: Exported) -> str:
    return exported.path(request.param)


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def fields(instances: Instances) -> dict[str, np.ndarray]:
    return {k: getattr(x, "tensor", x).numpy() for k, x in instances.get_fields().items()}


def assert_equal(actual: Instances, expected: Instances) -> None:
    assert actual.image_size == expected.image_size
    own, other = fields(actual), fields(expected)
    assert own.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_allclose(own[name], value, rtol=1e-4, atol=1e-3, err_msg=name)


def test_tensors_are_the_models_own(exported: Exported, path: str) -> None:
    file = ExportedFile(path)
    height, width = file.facts["input"]["shape"][2:]
    unit, less = file.facts["input"]["multiple"], file.facts["input"]["less"]
    size = (height, width) if height else (9 * unit - less, 12 * unit - less)
    size = (111, 143) if unit == 1 and height is None else size
    for count in (1, 3):  # the graph was made of two images
        images = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(count)) * 255
        for difference in check(exported.model, file, images, 1e-4):
            assert difference.largest < 1e-4 and difference.compared > 0, difference


def test_predictor_gives_what_detectron2s_gives(exported: Exported, path: str) -> None:
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
    if facts["results"] == "upsnet":
        assert isinstance(model, UPSNet)
        scale = model.network_scale(size)
        image = cv2.resize(image.astype(np.float32), None, fx=scale, fy=scale)
        images = np.zeros((1, 3, height, width), np.float32)
        images[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        return images, {"size": size, "input_size": image.shape[:2], "scale": scale}
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


def test_numpy_gives_the_same(exported: Exported) -> None:
    path = exported.path("onnx")
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
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=tolerance, err_msg=name)
        compared += 1
    assert compared >= 2


def test_sizes_that_a_file_does_not_take(exported: Exported) -> None:
    file = ExportedFile(exported.path("torch"))
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
    facts = ExportedFile(exported.path("torch")).facts
    assert facts["architecture"] == exported.cfg.MODEL.META_ARCHITECTURE
    assert facts["input"]["channels"] == exported.cfg.INPUT.FORMAT
    assert facts["d2ext"] == d2ext.__version__
    assert "model.pth" not in facts["config"], "a path of this machine"
    assert Path(exported.path("torch")).parent.name not in str(facts)
