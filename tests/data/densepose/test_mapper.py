"""From files to `gt_densepose`: mirrors, crops, rotations, and what the model cannot learn from."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform, TransformList

from d2ext.data import DatasetError, DensePoseMapper, build_mapper, build_train_loader
from d2ext.data.coco_json import load_coco_json
from d2ext.data.densepose import (
    MIRRORED_COARSE_PARTS,
    MIRRORED_PARTS,
    SurfaceSymmetry,
    read_uv_symmetry,
)
from d2ext.data.densepose.register import SurfaceFiles, register_densepose
from d2ext.testing import tiny_config
from tests.data.densepose.persons import (
    HEIGHT,
    MESH,
    NUM_VERTICES,
    WIDTH,
    content,
    rle,
    write_persons,
    write_surface,
)
from tests.data.densepose.test_annotations import REFERENCE, _uv_tables
from tests.reference.fixture import Fixture

Record = dict[str, Any]
Register = Callable[..., CfgNode]


@pytest.fixture
def register(tmp_path: Path) -> Iterator[Register]:
    """Registers a changed file; returns the config of a tiny model for it."""
    names = []

    def make(change: Any = None, surface: bool = True, vertices: bool = False) -> CfgNode:
        name = f"mapper_{uuid.uuid4().hex}"
        names.append(name)
        files = SurfaceFiles(**write_surface(tmp_path)) if surface else SurfaceFiles()
        register_densepose(name, *write_persons(tmp_path, change), files)
        cfg = tiny_config("DensePose")
        cfg.DATASETS.TRAIN = (name,)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
        cfg.INPUT.MIN_SIZE_TRAIN = (HEIGHT,)
        cfg.INPUT.STRICT = True
        if vertices:
            head = cfg.MODEL.ROI_DENSEPOSE_HEAD
            head.PREDICTOR_NAME = "DensePoseEmbeddingPredictor"
            mesh = {"TYPE": "vertex_direct", "NUM_VERTICES": NUM_VERTICES}
            head.CSE.EMBEDDERS[MESH] = CfgNode(mesh)
        return cfg

    yield make
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def _samples(cfg: CfgNode, count: int = 8) -> list[Record]:
    loader = iter(build_train_loader(cfg))
    return [x for _ in range(count // 2) for x in next(loader)]


def test_mirrored_as_published(tmp_path: Path) -> None:
    fixture = Fixture(REFERENCE / "annotation_flip")
    persons = fixture.manifest["inputs"]["persons"]
    keys = ("dp_x", "dp_y", "dp_I", "dp_U", "dp_V", "dp_vertex", "ref_model")

    def change(annotations: list[Record]) -> None:
        for k, (annotation, person) in enumerate(zip(annotations, persons, strict=True)):
            for key in (*keys, "dp_masks"):
                annotation.pop(key, None)
            annotation.update({key: person[key] for key in keys if person.get(key) is not None})
            mask = fixture.expected[f"person{k}.before.segm"]
            count = 1 if person.get("single_mask") else 14
            masks = [mask_util.encode(np.asfortranarray(mask == i + 1)) for i in range(count)]
            annotation["dp_masks"] = [{**m, "counts": m["counts"].decode()} for m in masks]
            annotation["image_id"] = 1

    records = load_coco_json(*write_persons(tmp_path, change))
    row, column = torch.meshgrid(torch.arange(15), torch.arange(20), indexing="ij")
    torus = (row * 20 + (-column) % 20).flatten()
    symmetry = SurfaceSymmetry(torch.from_numpy(_uv_tables(23)), {"torus_15x20": torus})
    resize = T.Resize((50, 99))
    for augmentations, mirrored in (
        ([], False),
        ([T.RandomFlip(prob=1.0), resize], True),
        ([T.RandomFlip(prob=1.0), resize, T.RandomFlip(prob=1.0)], False),
    ):
        mapper = DensePoseMapper(
            True,
            augmentations=augmentations,
            image_format="RGB",
            meshes={"torus_15x20": 300},
            symmetry=symmetry,
        )
        surface = mapper(records[0])["instances"].gt_densepose
        points = surface.points()
        names = {"x": "x", "y": "y", "i": "parts", "u": "u", "v": "v", "vertex_ids": "vertices"}
        stage = "flip" if mirrored else "before"
        for k in range(3):
            for published, name in names.items():
                expected = fixture.expected.get(f"person{k}.{stage}.{published}")
                if expected is not None:
                    actual = getattr(points, name)[points.person == k].numpy()
                    assert np.allclose(actual, expected, atol=1e-5), (k, name, stage)
            assert np.array_equal(surface.masks[k], fixture.expected[f"person{k}.{stage}.segm"])


def _back(transforms: TransformList) -> Transform:
    """From the transformed image to the image."""
    corners = np.array([[0.0, 0], [1, 0], [0, 1]])
    origin, right, down = transforms.apply_coords(corners)
    matrix = np.stack([right - origin, down - origin], axis=1)
    return lambda places: (places - origin) @ np.linalg.inv(matrix).T


CROP = T.CropTransform(15, 8, 50, 40)
TRANSFORMS = {
    "crop": [CROP],
    "mirror, crop": [T.HFlipTransform(WIDTH), CROP],
    "crop, resize, mirror": [CROP, T.ResizeTransform(40, 50, 80, 75), T.HFlipTransform(75)],
    "upside down": [T.VFlipTransform(HEIGHT)],
    "turn": [T.RotationTransform(HEIGHT, WIDTH, 30, expand=False)],
    "turn, mirror": [T.RotationTransform(HEIGHT, WIDTH, -40), T.HFlipTransform(99)],
    "quarter": [T.RotationTransform(HEIGHT, WIDTH, 90)],
}


@pytest.mark.parametrize("what", TRANSFORMS)
def test_points_and_masks_stay_on_the_person(tmp_path: Path, what: str) -> None:
    transforms = TransformList(TRANSFORMS[what])
    mirrored = "mirror" in what or what == "upside down"
    record = load_coco_json(*write_persons(tmp_path))[0]
    symmetry = SurfaceSymmetry(read_uv_symmetry(write_surface(tmp_path)["uv_symmetry"]))
    mapper = DensePoseMapper(True, augmentations=[], image_format="RGB", symmetry=symmetry)
    given = record["annotations"]
    # One by one: an image that loses a person would shift the others.
    for annotation in given:
        sample, _ = mapper.map({**record, "annotations": [annotation]}, transforms)
        instances = sample["instances"]
        x0, y0, w, h = annotation["bbox"]
        old = np.stack([annotation["dp_x"] * w, annotation["dp_y"] * h], axis=1) / 256 + (x0, y0)
        moved = transforms.apply_coords(old.astype(np.float64))
        box = instances.gt_boxes.tensor[0].double().numpy()
        inside = ((moved >= box[:2] - 1e-6) & (moved <= box[2:] + 1e-6)).all(axis=1)
        points = instances.gt_densepose.points()
        frame = torch.stack([points.x, points.y], dim=1).double().numpy()
        places = box[:2] + frame * (box[2:] - box[:2]) / 256
        assert np.abs(places - moved[inside]).max() < 1e-2
        assert inside.sum() > 0 and (("crop" in what) == (not inside.all()))
        parts = annotation["dp_I"][inside]
        parts = np.array(MIRRORED_PARTS)[parts] if mirrored else parts
        assert points.parts.tolist() == parts.tolist()
        # Tables: U turns round, V stays.
        u, v = annotation["dp_U"][inside], annotation["dp_V"][inside]
        assert np.abs(points.u.numpy() - (1 - u if mirrored else u)).max() < 1 / 128
        assert np.abs(points.v.numpy() - v).max() < 1 / 128

        rng = np.random.default_rng(0)
        somewhere = rng.uniform(0, 256, (2000, 2))
        origin = _back(transforms)(box[:2] + somewhere * (box[2:] - box[:2]) / 256)
        origin = (origin - (x0, y0)) * 256 / (w, h)
        column, row = origin.T
        expected = np.where(row < 128, 1, np.where(column < 128, 2, 0))
        expected[~((origin >= 0) & (origin < 256)).all(axis=1)] = 0
        expected = np.array(MIRRORED_COARSE_PARTS)[expected] if mirrored else expected
        column, row = somewhere.astype(int).T
        assert (instances.gt_densepose.masks[0].numpy()[row, column] == expected).mean() > 0.97
        assert {*expected.tolist()} >= {1, 3 if mirrored else 2}


def test_persons_without_points(register: Register) -> None:
    def change(annotations: list[Record]) -> None:
        for key in [k for k in annotations[0] if k.startswith(("dp_", "ref_"))]:
            del annotations[0][key]
        annotations[1]["bbox"] = [45.0, 10.0, 0.25, 30.0]
        del annotations[1]["segmentation"]
        for key in ("dp_I", "dp_U", "dp_V"):  # of no use for charts
            del annotations[2][key]
        # All masks are absent, or there are none.
        annotations[1]["dp_masks"] = [[]] * 14

    cfg = register(change)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    seen = {}
    for sample in _samples(cfg, 12):
        surface = sample["instances"].gt_densepose
        assert len(surface) == len(sample["instances"])
        seen[sample["image_id"]] = surface.has_points.tolist(), surface.has_masks.tolist()
    assert seen == {1: ([False, True], [False, False]), 2: ([False], [False]), 3: ([], [])}


def test_mirrors_need_tables(
    register: Register,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
    cfg = register()
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    seen = set()
    with caplog.at_level(logging.WARNING):
        for sample in _samples(cfg, 16):
            u = sample["instances"].gt_densepose.points().u[0]
            seen.add(round(float(u), 3))
    given = content()["annotations"][0]["dp_U"]
    assert len(seen) == 2 and given[0] in seen and min(abs(x - 1 + given[3]) for x in seen) < 0.01
    assert "mirrored" not in caplog.text

    cfg = register(surface=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            mapper = build_mapper(cfg, is_train=True)
    assert not any(isinstance(x, T.RandomFlip) for x in mapper.augmentations.augs)
    assert caplog.text.count("without mirrored images") == 1
    assert "densepose_uv_symmetry" in caplog.text and "UV_symmetry_transforms.mat" in caplog.text
    MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).densepose_uv_symmetry = "gone.mat"
    with caplog.at_level(logging.WARNING):
        assert build_mapper(cfg, is_train=True).symmetry is None
    assert "There is no file 'gone.mat'" in caplog.text

    cfg = register(vertices=True, surface=False)
    assert build_mapper(cfg, is_train=True).symmetry is None
    mesh = write_surface(tmp_path)["mesh"]
    cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS[MESH].SYMMETRY = mesh
    assert build_mapper(cfg, is_train=True).symmetry.vertices[MESH].tolist()[:3] == [1, 0, 3]


def test_mirrored_vertices(register: Register) -> None:
    cfg = register(vertices=True)
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    seen = set()
    for sample in _samples(cfg, 16):
        points = sample["instances"].gt_densepose.points()
        assert (points.parts == -1).all() and (points.mesh == 0).all()
        own = points.person == 0
        seen.add(tuple(points.vertices[own].tolist()))
    given = content()["annotations"][0]["dp_vertex"]
    assert seen == {tuple(given), tuple(v ^ 1 for v in given)}


def test_instance_masks(register: Register, caplog: pytest.LogCaptureFixture) -> None:
    def without(number: int) -> Callable[[list[Record]], None]:
        return lambda annotations: [a.pop("segmentation") for a in annotations[:number]] and None

    cfg = register()
    assert not _samples(cfg, 2)[0]["instances"].has("gt_masks")
    for vertices in (False, True):
        cfg = register(without(1), vertices=vertices)
        head = cfg.MODEL.ROI_DENSEPOSE_HEAD
        head.COARSE_SEGM_TRAINED_BY_MASKS = not vertices
        head.CSE.PIX_TO_SHAPE_CYCLE_LOSS.ENABLED = vertices
        caplog.clear()
        for sample in _samples(cfg, 6):
            assert len(sample["instances"].gt_masks) == 1
        assert "1 of 3 annotations" in caplog.text
        cfg = register(without(3))
        cfg.MODEL.ROI_DENSEPOSE_HEAD.COARSE_SEGM_TRAINED_BY_MASKS = True
        with pytest.raises(DatasetError, match=r"3 of 3 annotations .* no segmentation"):
            build_train_loader(cfg)


def test_rotation(register: Register) -> None:
    cfg = register()
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.ROTATION_ANGLES = [90]
    (sample, *_) = [x for x in _samples(cfg) if x["image_id"] == 1]
    points = sample["instances"].gt_densepose.points()
    first = points.person == 0
    # Counter-clockwise: the right half of the person, part 4, is now above.
    assert points.y[first & (points.parts == 4)].max() < points.y[first & (points.parts == 3)].min()


UNUSABLE: dict[str, tuple[Callable[[CfgNode], Any], dict[str, Any], str]] = {
    "no charts": (
        lambda cfg: None,
        {"change": lambda a: [x.pop(k) for x in a for k in ("dp_I", "dp_U", "dp_V")]},
        r"dp_I, dp_U, dp_V \(3 persons have others\)",
    ),
    "no vertices": (
        lambda cfg: None,
        {"change": lambda a: [x.pop("dp_vertex") for x in a], "vertices": True},
        "dp_vertex, ref_model",
    ),
    "unknown mesh": (
        lambda cfg: None,
        {
            "change": lambda a: a[1].update(ref_model="ant"),
            "vertices": True,
            "surface": False,
        },
        r"meshes ant \('ref_model'\); the model has blob",
    ),
    "other mesh": (
        lambda cfg: cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS[MESH].update(NUM_VERTICES=10),
        {"vertices": True, "surface": False},
        "vertex 11 of blob, which has 10",
    ),
    "one mask, many parts": (
        lambda cfg: cfg.MODEL.ROI_DENSEPOSE_HEAD.update(NUM_COARSE_SEGM_CHANNELS=15),
        {"change": lambda a: a[1].update(dp_masks=[rle(slice(0, 9), slice(0, 9))])},
        "NUM_COARSE_SEGM_CHANNELS: 2",
    ),
    "mirror of another mesh": (
        lambda cfg: cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS[MESH].update(NUM_VERTICES=13),
        {"vertices": True},
        "not those of a mesh of 13 vertices",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_data_are_found_before_training(register: Register, what: str) -> None:
    configure, options, message = UNUSABLE[what]
    cfg = register(**options)
    configure(cfg)
    with pytest.raises(DatasetError, match=message):
        build_train_loader(cfg)
