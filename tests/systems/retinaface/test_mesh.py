"""RetinaFace's mesh branch: coding, choice of faces, losses, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints
from torch import Tensor

from d2ext.layers.opencv_resample import resize_float_like_opencv
from d2ext.systems.retinaface.losses import RetinaFaceCriterion
from d2ext.systems.retinaface.mesh import (
    MeshHead,
    decode_meshes,
    encode_meshes,
    mesh_topology,
)
from d2ext.systems.retinaface.model import RetinaFace
from d2ext.testing import tiny_config

# A pyramid on a rectangle of 2 x 4, seen from its tip.
VERTICES = [[0, 0, 1], [2, 0, 1], [2, 4, 1], [0, 4, 1], [1, 2, -4]]
FACES = [[1, 2, 5], [2, 3, 5], [3, 4, 5], [4, 1, 5]]


@pytest.fixture
def obj(tmp_path: Path) -> str:
    lines = [f"v {x} {y} {z}" for x, y, z in VERTICES] + [f"f {a} {b} {c}" for a, b, c in FACES]
    (tmp_path / "mesh.obj").write_text("\n".join(lines))
    return str(tmp_path / "mesh.obj")


def _model(obj: str, *options: Any) -> RetinaFace:
    cfg = tiny_config("RetinaFace")
    cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES = 5
    cfg.MODEL.RETINAFACE.MESH.FILE = obj
    cfg.merge_from_list([*options])
    torch.manual_seed(0)
    return build_model(cfg)


def _inputs(count: int = 1) -> list[dict[str, Any]]:
    """Images of bright rectangles, whose mesh is the pyramid, or without mesh where they are grey."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(count):
        image = torch.randint(0, 60, (3, 64, 64), generator=generator, dtype=torch.uint8)
        boxes = torch.tensor([[4.0, 6.0, 24.0, 40.0], [34.0, 30.0, 44.0, 50.0], [40.0, 4, 60, 24]])
        for (x1, y1, x2, y2), value in zip(boxes.int().tolist(), (250, 250, 130), strict=True):
            image[:, y1:y2, x1:x2] = value
        shape = torch.tensor(VERTICES, dtype=torch.float32) / torch.tensor([2, 4, 2])
        sides = torch.cat([boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] - boxes[:, :2])[:, :1]], 1)
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.zeros(3, dtype=torch.int64)
        instances.gt_keypoints = Keypoints(torch.zeros(3, 3, 3))
        instances.gt_face_meshes = shape * sides[:, None] + torch.nn.functional.pad(
            boxes[:, None, :2], (0, 1)
        )
        instances.gt_mesh_valid = torch.tensor([True, True, False])
        instances.gt_face_meshes[2] = 1e9
        inputs.append({"image": image, "instances": instances})
    return inputs


def test_topology(obj: str) -> None:
    topology = mesh_topology(obj)
    assert topology is not None
    edges = {tuple(edge) for edge in topology.edges.tolist()}
    assert edges == {(0, 1), (1, 2), (2, 3), (0, 3), (0, 4), (1, 4), (2, 4), (3, 4)}
    side = 8**0.5
    torch.testing.assert_close(topology.mean[0], torch.tensor([-1, -2, 1]) / side)
    torch.testing.assert_close(topology.mean[4], torch.tensor([0, 0, -4]) / side)
    assert mesh_topology(obj + "x") is None


def test_coding() -> None:
    priors = torch.tensor([[10.0, 20.0, 8.0, 8.0], [5.0, 5.0, 16.0, 16.0]])
    meshes = torch.randn(2, 5, 3) * 10
    meshes[0, 0] = torch.tensor([14.0, 16.0, -8.0])
    offsets = encode_meshes(meshes, priors)
    torch.testing.assert_close(offsets[0, 0], torch.tensor([5.0, -5.0, -10.0]))
    torch.testing.assert_close(decode_meshes(offsets, priors), meshes)


def test_priors_of_a_cell_have_their_own_weights(obj: str) -> None:
    head = MeshHead(4, 5, 3, mesh_topology(obj))
    vectors = torch.randn(6, 4)
    kinds = torch.tensor([0, 1, 2, 2, 1, 0])
    found = head(vectors, kinds)
    for i, kind in enumerate(kinds.tolist()):
        rows = slice(15 * kind, 15 * (kind + 1))
        expected = head.output.weight[rows] @ vectors[i] + head.output.bias[rows]
        torch.testing.assert_close(found[i].flatten(), expected)
    assert head(vectors[:0], kinds[:0]).shape == (0, 5, 3)
    with pytest.raises(ValueError, match="NUM_VERTICES is 6"):
        MeshHead(4, 6, 3, mesh_topology(obj))


def test_at_most_so_many_meshes_of_an_image() -> None:
    criterion = RetinaFaceCriterion(max_meshes=3)
    image_of = torch.tensor([0] * 5 + [1] * 2 + [3] * 6)
    has_mesh = torch.ones(13, dtype=torch.bool)
    has_mesh[[0, 5]] = False
    drawn = [criterion._choose_meshes(image_of, has_mesh) for _ in range(20)]
    for chosen in drawn:
        assert len(set(chosen.tolist())) == len(chosen) == 3 + 1 + 3
        assert image_of[chosen].bincount().tolist() == [3, 1, 0, 3]
        assert has_mesh[chosen].all()
    assert set(torch.cat(drawn).tolist()) == set(range(13)) - {0, 5}


def _mesh_losses(edges: Tensor | None, meshes: Tensor, target: Tensor) -> list[float]:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 9.0]])
    criterion = RetinaFaceCriterion(edges=edges)
    return [x.item() for x in criterion._mesh_losses(meshes, target, boxes)]


def test_losses_by_hand() -> None:
    target = torch.tensor([[[0.0, 0, 0], [3, 4, 0]]])
    edges = torch.tensor([[0, 1]])
    shifted = target + torch.tensor([1.0, 0.0, -2.0])
    assert _mesh_losses(edges, shifted, target) == pytest.approx([1 / 6, 0])
    longer = target * 2
    assert _mesh_losses(edges, longer, target) == pytest.approx([7 / 6 / 6, 5 / 6])
    none = torch.zeros(0, 2, 3)
    assert [
        x.item()
        for x in RetinaFaceCriterion(edges=edges)._mesh_losses(none, none, torch.zeros(0, 4))
    ] == [0, 0]
    with pytest.raises(ValueError, match=r"MESH\.FILE"):
        _mesh_losses(None, target, target)


def test_learns_and_predicts_in_pixels_of_the_output(obj: str) -> None:
    model = _model(obj, "MODEL.RETINAFACE.TEST.SCORE_THRESH", 0.3)
    inputs = _inputs(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = model(inputs)["loss_vertex"].item()
    for _ in range(60):
        losses = model(inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert set(losses) == {*("loss_box", "loss_class", "loss_landmark", "loss_vertex", "loss_edge")}
    assert losses["loss_vertex"].item() < min(first / 2, 5 * 0.05)
    model.eval()
    big = inputs[0] | {"height": 128, "width": 192}
    result, scaled = (x["instances"] for x in model([inputs[0], big]))
    assert result.pred_face_meshes.shape == (len(result), 5, 3)
    targets = inputs[0]["instances"]
    for box, mesh in zip(targets.gt_boxes.tensor[:2], targets.gt_face_meshes[:2], strict=True):
        best = (result.pred_boxes.tensor - box).abs().sum(dim=1).argmin()
        error = (result.pred_face_meshes[best] - mesh).abs().mean()
        assert error < 0.1 * (box[2:] - box[:2]).prod().sqrt(), error
    factors = torch.tensor([3.0, 2.0, 6**0.5])
    torch.testing.assert_close(scaled.pred_face_meshes, result.pred_face_meshes * factors)
    # Resized for the network, and back.
    model.nms_threshold = 1.1  # NMS counts whole pixels of the image
    image = inputs[0]["image"][None].float()
    doubled = {"image": resize_float_like_opencv(image, (128, 128), (2.0, 2.0))[0]}
    expected = model([doubled])[0]["instances"].pred_face_meshes
    model.min_size, model.max_size = 128, 200
    found = model(inputs[:1])[0]["instances"].pred_face_meshes
    torch.testing.assert_close(found, expected / 2, atol=1e-2, rtol=0)


def test_batches_of_several_sizes_are_drawn(obj: str) -> None:
    model = _model(obj)
    inputs = _inputs(2)
    images, targets = model.training_batch(
        [inputs[0], {"image": torch.zeros(3, 90, 96), "instances": inputs[1]["instances"]}]
    )
    _, picture = model.draw_training(inputs, images, targets, model.network(images))
    assert picture.shape == (3, 64, 128)


def test_without_meshes_and_without_file(obj: str) -> None:
    model = _model(obj)
    inputs = _inputs()
    inputs[0]["instances"].gt_mesh_valid[:] = False
    losses = model(inputs)
    assert losses["loss_vertex"].item() == losses["loss_edge"].item() == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    inputs[0]["instances"].remove("gt_face_meshes")
    assert model(inputs)["loss_vertex"].item() == 0
    moved = _model(obj + ".moved")  # a trained model elsewhere
    assert moved.load_state_dict(model.state_dict())
    assert moved.eval()(inputs)[0]["instances"].pred_face_meshes.shape[1:] == (5, 3)
    inputs = _inputs()
    inputs[0]["instances"].gt_face_meshes = torch.zeros(3, 6, 3)
    with pytest.raises(ValueError, match="6 vertices"):
        model(inputs)
