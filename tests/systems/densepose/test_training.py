"""From an annotation file to losses: the whole way of training, charts and embeddings."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2ext.data import build_train_loader
from d2ext.data.custom import apply_dataset_to_config, register_own_dataset
from d2ext.data.shapes.body_sets import register_shapes_bodies
from d2ext.data.shapes.sets import BodySet
from d2ext.testing import tiny_config
from tests.data.densepose.persons import MESH, NUM_VERTICES, write_persons, write_surface

CHARTS = {"loss_densepose_U", "loss_densepose_V", "loss_densepose_I", "loss_densepose_S"}


@pytest.fixture
def name() -> Iterator[str]:
    name = f"train_{uuid.uuid4().hex}"
    yield name
    for each in (f"{name}_train", f"{name}_train_bodies"):
        DatasetCatalog.pop(each, None)
        MetadataCatalog.pop(each, None)


def _embeddings(cfg: CfgNode, mesh: str, **keys: Any) -> None:
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    head.PREDICTOR_NAME = "DensePoseEmbeddingPredictor"
    head.CSE.EMBED_LOSS_NAME = "SoftEmbeddingLoss"
    head.CSE.PIX_TO_SHAPE_CYCLE_LOSS.ENABLED = True
    head.CSE.EMBEDDERS[mesh] = CfgNode(keys)


def _train(cfg: CfgNode, iterations: int = 2) -> list[dict[str, float]]:
    """Losses of some steps; all parameters must get finite gradients."""
    cfg.DATASETS.TEST = ()
    cfg.INPUT.STRICT = True
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    batches, result = iter(build_train_loader(cfg)), []
    with EventStorage():
        for _ in range(iterations):
            losses = model(next(batches))
            sum(losses.values()).backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            assert all(g is not None and g.isfinite().all() for g in gradients)
            optimizer.step()
            optimizer.zero_grad()
            result.append({k: float(v) for k, v in losses.items()})
    return result


def test_charts_of_own_files(tmp_path: Path, name: str) -> None:
    json_file, images = write_persons(tmp_path)
    options = {f"densepose_{key}": path for key, path in write_surface(tmp_path).items()}
    register_own_dataset(name, json_file, images, **options)
    cfg = tiny_config("DensePose")
    apply_dataset_to_config(cfg, name)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    for losses in _train(cfg):
        assert losses.keys() >= CHARTS and all(losses[key] > 0 for key in CHARTS)


def test_embeddings_of_own_files(tmp_path: Path, name: str) -> None:
    json_file, images = write_persons(tmp_path)
    surface = write_surface(tmp_path)
    register_own_dataset(name, json_file, images, densepose_mesh=surface["mesh"])
    cfg = tiny_config("DensePose")
    apply_dataset_to_config(cfg, name)
    geodesics = surface["geodesics"]
    _embeddings(cfg, MESH, TYPE="vertex_direct", NUM_VERTICES=NUM_VERTICES, GEODESICS=geodesics)
    for losses in _train(cfg):
        for key in (f"E{MESH}", "S", "pix2shape"):
            assert losses[f"loss_densepose_{key}"] > 0, key


@pytest.mark.parametrize("embeddings", [False, True])
def test_bodies_of_shapes(name: str, embeddings: bool) -> None:
    cfg = tiny_config("DensePose")
    dataset = register_shapes_bodies(BodySet("train", 4), prefix=name)
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    if embeddings:
        metadata = MetadataCatalog.get(dataset)
        mesh = {"TYPE": "vertex_feature", "NUM_VERTICES": 1180, "FEATURE_DIM": 64}
        files = {"INIT_FILE": metadata.densepose_mesh, "GEODESICS": metadata.densepose_geodesics}
        _embeddings(cfg, metadata.densepose_mesh_name, **mesh, **files)
    first, second = _train(cfg)
    keys = {"loss_densepose_Eshapes_body", "loss_densepose_S"} if embeddings else CHARTS
    assert all(losses[key] > 0 for losses in (first, second) for key in keys)
    assert first != second


def test_batches_without_points_train(tmp_path: Path, name: str) -> None:
    def change(annotations: list[dict[str, Any]]) -> None:
        for annotation in annotations[:2]:  # all of the first image
            for key in [k for k in annotation if k.startswith(("dp_", "ref_"))]:
                del annotation[key]
        annotations[1]["bbox"] = [45.0, 10.0, 0.3, 30.0]

    json_file, images = write_persons(tmp_path, change)
    register_own_dataset(name, json_file, images)
    cfg = tiny_config("DensePose")
    apply_dataset_to_config(cfg, name)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 1
    sums = [sum(losses[key] for key in CHARTS) for losses in _train(cfg, 3)]
    assert sorted(value > 0 for value in sums) == [False, False, True]


def test_a_real_person(real_data: Path, name: str) -> None:
    folder = real_data / "densepose"
    if not (folder / "densepose_person.json").is_file():
        pytest.skip("the annotated person is not there: densepose/densepose_person.json")
    register_own_dataset(name, str(folder / "densepose_person.json"), str(folder))
    cfg = tiny_config("DensePose")
    apply_dataset_to_config(cfg, name)
    for losses in _train(cfg):
        assert losses["loss_densepose_I"] > 0 and losses["loss_densepose_U"] > 0
        assert losses["loss_densepose_S"] == 0  # no masks
