"""Continuous surface embeddings against the published implementation."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.codecs.densepose import EmbeddingPredictions, vertices_in_boxes
from d2ext.config import ConfigError
from d2ext.data.densepose import DensePoseAnnotations, SurfacePoints
from d2ext.systems.densepose import (
    DensePoseEmbeddingPredictor,
    Embedder,
    EmbeddingLoss,
    PixelCycle,
    ShapeCycle,
    VertexEmbedder,
    normalize_embeddings,
)
from d2ext.systems.densepose.cse_losses import build_cse_loss
from d2ext.systems.densepose.targets import DensePoseTargets, encode_targets, select_proposals
from d2ext.testing import random_inputs, tiny_config
from tests.reference.fixture import Fixture, draw_tensor
from tests.systems.densepose.published import (
    REFERENCE,
    TOLERANCE,
    check_gradients,
    check_losses,
    load,
    proposals,
)


def _geodesics(rows: int, columns: int) -> Tensor:
    """Distances on a torus of so many vertices around."""

    def around(count: int) -> Tensor:
        step = torch.arange(count, dtype=torch.float64)
        apart = (step[:, None] - step).abs()
        return torch.minimum(apart, count - apart)

    r, c = around(rows)[:, None, :, None], around(columns)[None, :, None, :]
    return (0.02 * (r**2 + c**2).sqrt()).reshape(rows * columns, -1).float()


class Case(nn.Module):
    """The fixture, and predictor, embedders and losses with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fixture = Fixture(REFERENCE / "cse_embedder_losses")
        inputs = self.fixture.manifest["inputs"]
        self.predictor = DensePoseEmbeddingPredictor(64)
        self.embedder = Embedder(
            {
                mesh["name"]: VertexEmbedder(
                    mesh["rows"] * mesh["columns"],
                    16,
                    32 if mesh["embedder"] == "vertex_feature" else None,
                )
                for mesh in inputs["meshes"]
            }
        )
        load(self.predictor, self.fixture, "roi_heads.densepose_predictor.")
        load(self.embedder, self.fixture, "roi_heads.embedder.")
        self.geodesics = {m["name"]: _geodesics(m["rows"], m["columns"]) for m in inputs["meshes"]}
        self.loss = EmbeddingLoss(geodesics=self.geodesics)
        features = torch.from_numpy(draw_tensor("head_features", (4, 64, 8, 8), 31))
        self.features = features.requires_grad_()
        self.targets = self.encode(inputs["targets"])

    @staticmethod
    def encode(published: dict[str, Any]) -> DensePoseTargets:
        given = proposals(published, masks=True)
        selected = select_proposals(given, num_classes=1, iou_threshold=0.7, with_masks=False)
        expected = published["proposals_that_survive_the_filter"]
        assert [x.proposal_boxes.tensor.tolist() for x in selected] == expected
        return encode_targets(selected, 32, with_masks=True)

    def check(self, prefix: str, loss: EmbeddingLoss, targets: DensePoseTargets) -> None:
        losses = loss(self.predictor(self.features), targets, self.embedder())
        check_losses(self.fixture, losses, prefix)
        tensors = {
            "head_features": self.features,
            **{f"roi_heads.embedder.{k}": p for k, p in self.embedder.named_parameters()},
            **{
                f"roi_heads.densepose_predictor.{k}": p
                for k, p in self.predictor.named_parameters()
            },
        }
        total = sum(losses.values(), torch.zeros(()))
        check_gradients(self.fixture, total, tensors, prefix)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@torch.no_grad()
def test_predictions_and_points(case: Case) -> None:
    predictions, vertices = case.predictor(case.features), case.embedder()
    actual = {**predictions.maps(), **{f"vertex_embeddings.{k}": v for k, v in vertices.items()}}
    confident = DensePoseEmbeddingPredictor(64, segm_confidence=True)
    load(confident, case.fixture, "roi_heads.densepose_predictor.")
    maps = confident(case.features).maps()
    for name in ("coarse_segm", "coarse_segm_confidence"):
        actual[f"with_confidence.{name}"] = maps[name]
    errors = {name: case.fixture.compare(name, x) for name, x in actual.items()}
    assert max(errors.values()) < TOLERANCE, errors

    targets, expected = case.targets, case.fixture.expected
    assert targets.masks is not None
    assert np.array_equal(targets.masks, expected["instance_mask_target"] > 0)
    points, valid = targets.points.points, expected["points.valid"].astype(bool)
    assert points.person.tolist() == expected["points.roi"][valid].tolist()
    assert points.vertices.tolist() == expected["points.vertex"][valid].tolist()
    names = [mesh["name"] for mesh in case.fixture.manifest["inputs"]["meshes"]]
    meshes = [names[i] for i in expected["points.mesh"][valid]]
    assert [targets.mesh_names[i] for i in points.mesh.tolist()] == meshes
    sampled = normalize_embeddings(targets.points.sample(predictions.embedding))
    np.testing.assert_allclose(sampled, expected["points.embedding"][valid], atol=1e-5)


@torch.no_grad()
def test_nearest_vertices(case: Case) -> None:
    predictions, vertices = case.predictor(case.features), case.embedder()
    boxes = torch.tensor(case.fixture.manifest["inputs"]["result_boxes"])
    for name in ("torus_15x20", "animal_8x12"):
        for k, result in enumerate(vertices_in_boxes(predictions[:3], boxes, vertices[name])):
            expected = case.fixture.expected[f"closest{k}.{name}"]
            assert (result.vertices.numpy() == expected).mean() >= 0.999
            assert np.array_equal(result.mask, case.fixture.expected[f"closest{k}.mask"])
    nobody = predictions[torch.zeros(4, dtype=torch.bool)]
    assert vertices_in_boxes(nobody, boxes[:0], vertices["torus_15x20"]) == []


def test_losses(case: Case) -> None:
    case.check("hard.", case.loss, case.targets)
    case.check("soft.", dataclasses.replace(case.loss, soft=True), case.targets)


def test_points_without_a_vertex_and_outside(case: Case) -> None:
    inputs = case.fixture.manifest["inputs"]
    for prefix in ("hard_ignored.", "none_valid."):
        published = pickle.loads(pickle.dumps(inputs["targets"]))
        for persons in published["proposals"]:
            for annotation in (p["densepose"] for p in persons if p["densepose"]):
                count = len(annotation["dp_x"])
                if prefix == "none_valid.":
                    annotation["dp_x"] = [-300.0] * count
                else:
                    annotation["dp_vertex"][2::5] = [-1] * len(range(2, count, 5))
        case.check(prefix, case.loss, case.encode(published))


@torch.no_grad()
def test_cycles(case: Case) -> None:
    predictions, vertices = case.predictor(case.features), case.embedder()
    masks, expected = case.targets.masks, case.fixture.expected
    assert masks is not None
    cycle = PixelCycle(weight=1.0, num_pixels=0)
    for name, all_meshes in (("meshes_of_the_batch", False), ("all_meshes", True)):
        loss = EmbeddingLoss(pixel_cycle=dataclasses.replace(cycle, all_meshes=all_meshes))
        value = loss(predictions, case.targets, vertices)["loss_densepose_pix2shape"]
        assert float(value) == pytest.approx(float(expected[f"pix2shape.{name}"]), rel=1e-4)
    for first, second in (("torus_15x20", "animal_8x12"), ("animal_8x12", "absent_9x9")):
        pair = {first: vertices[first], second: vertices[second]}
        value = ShapeCycle(weight=1.0)(pair, case.geodesics)
        published = float(expected[f"shape2shape.{first}+{second}"])
        assert float(value) == pytest.approx(published, rel=1e-4)
    few = dataclasses.replace(cycle, num_pixels=5)(predictions, masks, vertices)
    assert 0 < float(few) < float(expected["pix2shape.all_meshes"])
    # A pixel alone can only come back to itself.
    assert float(dataclasses.replace(cycle, num_pixels=1)(predictions, masks, vertices)) == 0


def test_the_first_vertex_trains() -> None:
    """Vertices count from 0; -1 is none. Two vertices at distances 0 and 2 of the embedding."""
    points = SurfacePoints([100.0, 50.0], [100.0, 50.0], vertices=[0, -1], mesh="cow")
    x = Instances((50, 50), gt_densepose=DensePoseAnnotations([points]))
    x.proposal_boxes = x.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 40.0]]))
    embedding = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    predictions = EmbeddingPredictions(torch.zeros(1, 2, 8, 8), embedding)
    targets = encode_targets([x], 8)
    losses = EmbeddingLoss(embedding_sigma=2.0)(predictions, targets, {"cow": torch.eye(2)})
    assert float(losses["loss_densepose_Ecow"]) == pytest.approx(0.6 * np.log1p(np.exp(-1)))


def _config(tmp_path: Path) -> CfgNode:
    cfg = tiny_config("DensePose")
    head = cfg.MODEL.ROI_DENSEPOSE_HEAD
    head.PREDICTOR_NAME = "DensePoseEmbeddingPredictor"
    head.CSE.EMBED_LOSS_NAME = "SoftEmbeddingLoss"
    head.CSE.EMBED_SIZE = 4
    features = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    (tmp_path / "features.pkl").write_bytes(pickle.dumps({"features": features}))
    np.save(tmp_path / "distances.npy", _geodesics(3, 4).numpy())
    mesh = {"TYPE": "vertex_feature", "NUM_VERTICES": 12, "FEATURE_DIM": 3}
    mesh |= {"INIT_FILE": str(tmp_path / "features.pkl")}
    mesh |= {"GEODESICS": str(tmp_path / "distances.npy")}
    head.CSE.EMBEDDERS.cow = CfgNode(mesh)
    return cfg


def _cows(x: dict[str, Any]) -> None:
    points = SurfacePoints([64.0, 192.0], [64.0, 192.0], vertices=[3, 7], mesh="cow")
    x["instances"].gt_densepose = DensePoseAnnotations([points] * len(x["instances"]))


def test_a_model_trains_and_predicts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(_config(tmp_path))
    embedder = model.roi_heads.embedder.embedder_cow
    assert embedder.features.abs().sum() > 0
    torch.nn.init.normal_(embedder.embeddings)
    inputs = random_inputs(2)
    _cows(inputs[0])
    inputs[1]["instances"] = inputs[1]["instances"][:0]
    with EventStorage():
        losses = model(inputs)
        assert losses["loss_densepose_Ecow"] > 0
        sum(losses.values()).backward()
        assert embedder.embeddings.grad.abs().sum() > 0
        model.zero_grad()
        inputs[0]["instances"] = inputs[0]["instances"][:0]
        losses = model(inputs)
        assert losses["loss_densepose_Ecow"] == losses["loss_densepose_S"] == 0
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        (result,) = model(inputs[:1])
    found = result["instances"]
    assert isinstance(found.pred_densepose, EmbeddingPredictions)
    vertices = model.roi_heads.embedder()["cow"]
    results = vertices_in_boxes(found.pred_densepose, found.pred_boxes.tensor, vertices)
    assert len(results) == len(found) > 0
    assert convert_state_dict("densepose", model.state_dict()).keys() == model.state_dict().keys()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    with EventStorage():
        inputs = random_inputs(1)
        _cows(inputs[0])
        points = SurfacePoints([9.0], [9.0], vertices=[3], mesh="ant")
        inputs[0]["instances"].gt_densepose = DensePoseAnnotations([points] * 3)
        with pytest.raises(ValueError, match="ant"):
            build_model(cfg)(inputs)
    cse = cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE
    with pytest.raises(ConfigError, match="INIT_FILE"):
        VertexEmbedder(12, 4, feature_size=3)()
    cse.EMBEDDERS.cow.GEODESICS = ""
    with pytest.raises(ConfigError, match="GEODESICS"):
        build_cse_loss(cfg).geodesics["cow"]
    cse.EMBEDDERS.cow.FEATURE_DIM = 5
    with pytest.raises(ConfigError, match="FEATURE_DIM"):
        Embedder(cfg)
    cse.SHAPE_TO_SHAPE_CYCLE_LOSS.ENABLED = True
    with pytest.raises(ConfigError, match="two meshes"):
        build_cse_loss(cfg)
    cse.EMBEDDERS = CfgNode(new_allowed=True)
    with pytest.raises(ConfigError, match="EMBEDDERS"):
        Embedder(cfg)
    published = model_zoo.get_config("densepose/densepose_rcnn_R_50_FPN_cse_soft_s1x.yaml")
    assert build_cse_loss(published).soft


def test_cycles_are_by_default_the_published_recipe_s(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    cse = cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE
    pixel, shape = cse.PIX_TO_SHAPE_CYCLE_LOSS, cse.SHAPE_TO_SHAPE_CYCLE_LOSS
    cse.EMBEDDERS.calf = cse.EMBEDDERS.cow
    pixel.ENABLED = shape.ENABLED = True
    built = build_cse_loss(cfg)
    assert built.pixel_cycle == PixelCycle(pixel.WEIGHT)
    assert built.shape_cycle == ShapeCycle(shape.WEIGHT)


def test_features_of_the_built_in_mesh() -> None:
    embedder = VertexEmbedder(1180, 16, 64)
    embedder.load(MetadataCatalog.get("shapes_val_bodies").densepose_mesh)
    assert embedder.features.abs().amax() > 0
