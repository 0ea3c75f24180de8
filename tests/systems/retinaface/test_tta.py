"""Test-time augmentation: views that fit on each other, and voting by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2ext.config import ConfigError
from d2ext.engine.predictor import BatchPredictor
from d2ext.modeling.tta import build_tta
from d2ext.systems.retinaface.model import RetinaFace
from d2ext.systems.retinaface.tta import RetinaFaceWithTTA, vote
from d2ext.testing import tiny_config
from tests.systems.retinaface.test_mesh import _model
from tests.systems.retinaface.test_mesh import obj as obj  # a fixture
from tests.systems.retinaface.test_model import _images, settled

# Of the pyramid of test_mesh.py, and of the tiny model's points.
VERTEX_PARTNERS, POINT_PARTNERS = [1, 0, 3, 2, 4], [1, 0, 2]


@pytest.fixture
def model(obj: str) -> RetinaFace:
    """With meshes, in inference, with statistics of noise in its norms."""
    return settled(_model(obj))


def _wrapped(model: RetinaFace, **options: Any) -> RetinaFaceWithTTA:
    partners = {"point_partners": POINT_PARTNERS, "vertex_partners": VERTEX_PARTNERS}
    defaults = {"min_sizes": [], "max_size": 4000, "flip": False, "vote_iou": 0.4}
    return RetinaFaceWithTTA(model, **{**defaults, **partners, **options})


def _tensors(instances: Instances) -> dict[str, Tensor]:
    return {k: getattr(v, "tensor", v) for k, v in instances.get_fields().items()}


def test_one_view_changes_nothing(model: RetinaFace) -> None:
    inputs = _images((60, 80), (40, 50))
    inputs[1]["height"], inputs[1]["width"] = 80, 100
    for plain, augmented in zip(model(inputs), _wrapped(model)(inputs), strict=True):
        expected, found = _tensors(plain["instances"]), _tensors(augmented["instances"])
        assert len(expected["scores"]) > 3 and set(expected) == set(found)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=1e-3, rtol=1e-4)


def test_a_mirrored_image_gives_the_mirrored_result(model: RetinaFace) -> None:
    # Sides whose cells lie symmetrically. Without clipping, which two views would do differently.
    model.clip_boxes = False
    augmented = _wrapped(model, min_sizes=[64, 96], flip=True)
    inputs = _images((64, 128))
    (a,), (b,) = (augmented(x) for x in (inputs, [{"image": inputs[0]["image"].flip(-1)}]))
    expected, found = _tensors(a["instances"]), _tensors(b["instances"])
    assert len(expected["scores"]) > 3
    mirrored = _tensors(augmented.mirror(a["instances"]))
    mirrored["pred_face_poses"] = expected["pred_face_poses"] * torch.tensor([-1, 1, -1])
    for name, values in mirrored.items():
        torch.testing.assert_close(found[name], values, atol=0.05, rtol=1e-4)


def test_mirror_exchanges_left_and_right(model: RetinaFace) -> None:
    found = Instances((30, 50), pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 11.0, 22.0]])))
    found.pred_keypoints = torch.tensor([[[2.0, 5.0, 1.0], [9.0, 6.0, 1.0], [5.0, 9.0, 1.0]]])
    found.pred_face_meshes = torch.arange(15.0).view(1, 5, 3)
    mirrored = _wrapped(model).mirror(found)
    assert mirrored.pred_boxes.tensor.tolist() == [[39, 2, 49, 22]]
    assert mirrored.pred_keypoints.tolist() == [[[41, 6, 1], [48, 5, 1], [45, 9, 1]]]
    assert mirrored.pred_face_meshes[0, 0].tolist() == [47, 4, 5]  # of vertex 1
    assert found.pred_keypoints[0, 0].tolist() == [2, 5, 1]


def test_votes_by_hand(model: RetinaFace) -> None:
    boxes = [[0, 0, 9, 9], [100, 0, 109, 9], [2, 0, 11, 9], [0, 0, 9, 9], [100, 0, 109, 3]]
    found = Instances((50, 200), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    found.scores = torch.tensor([0.6, 0.8, 0.2, 0.9, 0.4])
    found.pred_classes = torch.tensor([0, 0, 0, 1, 0])
    found.pred_keypoints = torch.arange(5.0)[:, None, None].expand(5, 3, 3)
    # Ten by ten pixels, and ten by four: an IoU of 0.4 is a vote.
    first, group = vote(found, 0.4)
    assert first.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert group.tolist() == [2, 1, 2, 0, 1]
    assert vote(found, 0.41)[1].tolist() == [2, 1, 2, 0, 3]
    assert vote(found, 0.4, max_faces=2)[1].tolist() == [-1, 1, -1, 0, 1]
    merged = _wrapped(model).merge(found)
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert merged.pred_classes.tolist() == [1, 0, 0]
    expected = torch.tensor([[0.0, 0, 9, 9], [100, 0, 109, 7], [0.5, 0, 9.5, 9]])
    torch.testing.assert_close(merged.pred_boxes.tensor, expected)
    torch.testing.assert_close(merged.pred_keypoints[:, 0, 0], torch.tensor([3.0, 2.0, 0.5]))
    model.max_detections = 2
    assert len(_wrapped(model).merge(found)) == 2
    assert len(_wrapped(model).merge(found[found.scores > 1])) == 0


@pytest.fixture
def dataset() -> Iterator[str]:
    name = "tta_faces"
    DatasetCatalog.register(name, list)
    flip_map = (("left", "right"),)
    facts = {"keypoint_names": ("left", "right", "top"), "keypoint_flip_map": flip_map}
    MetadataCatalog.get(name).set(**facts)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_the_config_switches_it_on(model: RetinaFace, obj: str, dataset: str) -> None:
    cfg = tiny_config("RetinaFace")
    cfg.DATASETS.TEST, cfg.MODEL.RETINAFACE.MESH.FILE = (dataset,), obj
    aug = cfg.MODEL.RETINAFACE.TEST.AUG
    assert build_tta(cfg, model) is model and aug.MIN_SIZES == [500, 800, 1100, 1400, 1700]
    aug.ENABLED, aug.MIN_SIZES, aug.MAX_SIZE = True, [40, 60], 90
    predictor = BatchPredictor(cfg, model)
    assert list(predictor.model.partners.values()) == [POINT_PARTNERS, VERTEX_PARTNERS]
    sizes = []
    hook = model.backbone.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[2:]))
    image = _images((60, 160))[0]["image"].permute(1, 2, 0).numpy()
    found = predictor([image])[0]["instances"]
    hook.remove()
    assert found.image_size == (60, 160) and len(found) > 0
    assert [tuple(x) for x in sizes] == [(34, 90)] * 4  # both would be longer than 90
    assert (model.min_size, model.max_size) == (0, 2150)
    MetadataCatalog.get(dataset).mesh_flip = [0, 1, 3, 2, 4]
    assert build_tta(cfg, model).partners["pred_face_meshes"] == [0, 1, 3, 2, 4]


def test_mirroring_needs_partners(
    model: RetinaFace, obj: str, dataset: str, tmp_path: Path
) -> None:
    cfg = tiny_config("RetinaFace")
    aug = cfg.MODEL.RETINAFACE.TEST.AUG
    aug.ENABLED = True
    cfg.MODEL.RETINAFACE.MESH.FILE = obj
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = (), ()
    with pytest.raises(ConfigError, match="left from right"):
        build_tta(cfg, model)
    cfg.DATASETS.TEST = (dataset,)
    for text in (None, Path(obj).read_text().replace("v 0 4", "v 1 4")):
        cfg.MODEL.RETINAFACE.MESH.FILE = str(tmp_path / "other.obj")
        if text:
            (tmp_path / "other.obj").write_text(text)
        with pytest.raises(ConfigError, match="mirror partner"):
            build_tta(cfg, model)
    aug.FLIP = False
    assert isinstance(build_tta(cfg, model), RetinaFaceWithTTA)
    aug.MIN_SIZES = [0]
    with pytest.raises(ValueError, match="MIN_SIZES"):
        build_tta(cfg, model)
