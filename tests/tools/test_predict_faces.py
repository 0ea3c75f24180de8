"""`d2ext predict` with faces: poses and meshes in the results, OBJ files, aligned crops, test-time
augmentation, and landmarks in a face detector's boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from d2ext import model_zoo
from d2ext.codecs.face_alignment import crop_matrices
from d2ext.codecs.landmark_crops import pad_boxes
from d2ext.config import load_config
from d2ext.data.faces import obj_text, read_topology
from d2ext.data.image_io import read_image
from d2ext.data.landmarks.readers import extent_crop_box
from d2ext.data.shapes.face_mesh import (
    COLUMNS,
    FACE_VERTICES,
    ROWS,
    HeadShape,
    face_topology,
    head_vertices,
    topology_obj,
)
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.top_down import BoxSource, WithMargins
from d2ext.systems.retinaface.model import RetinaFace
from d2ext.testing import tiny_config
from d2ext.tools import predict
from d2ext.tools.face_files import FaceWriter, mesh_triangles
from tests.systems.retinaface.test_mesh import obj as obj  # a fixture


def save(cfg: Any, folder: Path, name: str) -> str:
    """Write a config and its model's random weights; batch norms have the statistics of noise."""
    torch.manual_seed(0)
    model = build_model(cfg)
    if isinstance(model, RetinaFace):
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 1.0
        with torch.no_grad():
            noise = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
            model.network(model.preprocess([{"image": noise}] * 2))
    cfg.MODEL.WEIGHTS = str(folder / f"{name}.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    (folder / f"{name}.yaml").write_text(cfg.dump())
    return str(folder / f"{name}.yaml")


def face_config(**options: Any) -> Any:
    """A tiny RetinaFace for WIDER FACE's class and points."""
    cfg = tiny_config("RetinaFace")
    cfg.MODEL.RETINAFACE.NUM_CLASSES = 1
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 5
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("wider_face_val",)
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return cfg


@pytest.fixture
def config(obj: str, tmp_path: Path) -> str:
    mesh = {"MODEL.RETINAFACE.MESH.NUM_VERTICES": 5, "MODEL.RETINAFACE.MESH.FILE": obj}
    return save(face_config(**mesh), tmp_path, "faces")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (128, 96))
    assert cv2.imwrite(str(tmp_path / "crowd.png"), image)
    return tmp_path / "crowd.png"


def run(config: str, output: Path, *arguments: object) -> list[dict[str, Any]]:
    assert (
        predict.run(["--config-file", config, "--output", str(output), *map(str, arguments)]) == 0
    )
    return json.loads((output / "coco_results.json").read_text())


def test_meshes_poses_and_crops(config: str, obj: str, picture: Path, tmp_path: Path) -> None:
    folders = ("--save-crops", tmp_path / "crops", "--save-meshes", tmp_path / "meshes")
    options = ("--input", picture, "--confidence-threshold", 0.1)
    found = run(config, tmp_path / "out", *options, *folders)
    image = read_image(str(picture))
    expected = BatchPredictor(load_config(config))([image])[0]["instances"]
    assert 1 < len(found) == len(expected)
    matrices = crop_matrices(expected.pred_keypoints[..., :2]).numpy()
    for i, result in enumerate(found):
        poses, mesh = expected.pred_face_poses[i], expected.pred_face_meshes[i]
        assert result["pose"] == pytest.approx(poses.tolist(), abs=0.02)
        values = torch.tensor(result["mesh"]).view(5, 3) + torch.tensor([0.5, 0.5, 0.0])
        torch.testing.assert_close(values, mesh, atol=0.02, rtol=0)
        vertices, triangles = read_topology(str(tmp_path / f"meshes/crowd_1_{i + 1}.obj"))
        np.testing.assert_allclose(vertices, mesh, atol=2e-3)
        # Of the OBJ, whose tip is nearer to the camera than its base, the other way round.
        assert sorted(map(sorted, triangles.tolist())) == [
            [0, 1, 4],
            [0, 3, 4],
            [1, 2, 4],
            [2, 3, 4],
        ]
        crop = cv2.imread(str(tmp_path / f"crops/crowd_1_{i + 1}.png"))
        expected_crop = cv2.warpAffine(image, matrices[i], (112, 112))
        assert cv2.absdiff(crop, expected_crop).mean() < 0.1
    assert len(list((tmp_path / "crops").iterdir())) == len(found)
    drawn = cv2.imread(str(tmp_path / "out/crowd.png"))
    assert (drawn != image).any()
    # Without the options nothing of this, but the pose.
    plain = run(config, tmp_path / "plain", *options)
    assert plain == [{k: v for k, v in x.items() if k != "mesh"} for x in found]


def test_videos_have_files_of_each_frame(config: str, picture: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"frames/{name}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"frames/{name}.png").write_bytes(picture.read_bytes())
    arguments = ["--config-file", config, "--output", str(tmp_path / "out"), "--video-input"]
    arguments += [str(tmp_path / "frames"), "--save-crops", str(tmp_path / "crops")]
    arguments += ["--confidence-threshold", "0.1", "--batch-size", "2"]
    assert predict.run(arguments) == 0
    names = {path.name for path in (tmp_path / "crops").iterdir()}
    assert {"a_1_1.png", "b_2_1.png", "c_3_1.png"} <= names


def test_a_crop_shows_the_face_where_the_template_has_it(tmp_path: Path) -> None:
    """Dots at known points, turned by 120 degrees, lie on the template's points in the crop."""
    angle, image = np.deg2rad(120), np.zeros((300, 300, 3), np.uint8)
    template = np.array([(38.3, 51.7), (73.5, 51.5), (56.0, 71.7), (41.5, 92.4), (70.7, 92.2)])
    turn = 2 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (template - 56) @ turn.T + 150
    for i, (x, y) in enumerate(points):
        cv2.circle(image, (round(x), round(y)), 6, (0, 0, 50 * i + 50), -1)
    found = Instances((300, 300), pred_keypoints=torch.ones(2, 5, 3))
    found.pred_keypoints[0, :, :2] = torch.from_numpy(points)
    found.pred_keypoints[1, 2] = 0  # no nose, no crop
    FaceWriter(tmp_path / "c", None).write(3, "a/b.jpg", image, {"instances": found})
    assert [x.name for x in (tmp_path / "c").iterdir()] == ["b_3_1.png"]
    crop = cv2.imread(str(tmp_path / "c/b_3_1.png"))
    for i, (x, y) in enumerate(template):
        assert abs(int(crop[round(y), round(x), 2]) - (50 * i + 50)) < 5


def test_models_without_points_and_meshes(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config("YOLACT")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    config = save(cfg, tmp_path, "yolact")
    base = ["--config-file", config, "--output", str(tmp_path / "out"), "--input", str(picture)]
    for option in ("--save-crops", "--save-meshes"):
        assert predict.run([*base, option, str(tmp_path / "x")]) == 1
        assert f"{option}: the model predicts no" in capsys.readouterr().err
    people = Instances((9, 9), pred_keypoints=torch.zeros(1, 17, 3))
    with pytest.raises(ValueError, match="17 landmarks"):
        FaceWriter(tmp_path, None).write(
            1, "x", np.zeros((9, 9, 3), np.uint8), {"instances": people}
        )


def test_triangles(obj: str, tmp_path: Path) -> None:
    cfg = face_config(**{"MODEL.RETINAFACE.MESH.NUM_VERTICES": 5})
    nothing, dataset = Metadata(name="x"), Metadata(name="y", mesh_file=obj)
    assert mesh_triangles(cfg, nothing) is None
    expected = mesh_triangles(cfg, dataset)
    cfg.MODEL.RETINAFACE.MESH.FILE = obj
    np.testing.assert_array_equal(mesh_triangles(cfg, nothing), expected)
    cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES = 6
    assert mesh_triangles(cfg, dataset) is None
    assert mesh_triangles(face_config(), dataset) is None
    # The built-in head's are right, and right again if a file has them inside out.
    cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES = 1103
    cfg.MODEL.RETINAFACE.MESH.FILE = str(tmp_path / "head.obj")
    text = topology_obj()
    (tmp_path / "head.obj").write_text(text)
    np.testing.assert_array_equal(mesh_triangles(cfg, nothing), face_topology())
    vertices = head_vertices(HeadShape())
    text = obj_text("head", vertices, face_topology()[:, [0, 2, 1]], digits=3)
    (tmp_path / "head.obj").write_text(text)
    np.testing.assert_array_equal(np.sort(mesh_triangles(cfg, nothing)), np.sort(face_topology()))
    a, b, c = vertices[mesh_triangles(cfg, nothing)][:, :, :2].transpose(1, 2, 0)
    areas = (b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]
    assert (areas < 0).mean() > 0.9
    assert obj_text("", np.array([[1, 2, 3]]), None, digits=3).splitlines()[1:] == [
        "v 1.000 2.000 3.000"
    ]


def test_several_sizes_by_the_command_line(config: str, picture: Path, tmp_path: Path) -> None:
    options = ("--input", picture, "--confidence-threshold", 0.1, "--opts")
    aug = ("MODEL.RETINAFACE.TEST.AUG.ENABLED", True, "MODEL.RETINAFACE.TEST.AUG.MIN_SIZES", "[64]")
    found = run(config, tmp_path / "out", *options, *aug)
    cfg = load_config(config)
    cfg.merge_from_list([str(x) for x in aug])
    (expected,) = BatchPredictor(cfg)([read_image(str(picture))])
    assert 0 < len(found) == len(expected["instances"])
    assert found[0]["pose"] == pytest.approx(
        expected["instances"].pred_face_poses[0].tolist(), abs=0.02
    )


def test_landmarks_of_wflw_in_detected_faces(config: str, picture: Path, tmp_path: Path) -> None:
    cfg = model_zoo.get_config("landmarks/regression_R_18_wflw_256.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.LANDMARKS.INPUT_SIZE", [64, 64]])
    cfg.merge_from_list(["MODEL.LANDMARKS.TEST.FLIP", False])
    wflw = save(cfg, tmp_path, "wflw")
    options = ("--input", picture, "--detector", config, "--box-threshold", 0.1)
    options += ("--box-margins", 0, -0.25, 0, 0, "--confidence-threshold", 0, "--no-pictures")
    found = run(wflw, tmp_path / "out", *options, "--save-crops", tmp_path / "crops")
    image = read_image(str(picture))
    faces = BatchPredictor(load_config(config))([image])[0]["instances"]
    assert len(found) == len(faces) > 1
    for result, box, score in zip(found, faces.pred_boxes, faces.scores, strict=True):
        x0, y0, x1, y1 = box.tolist()
        height = y1 - y0
        expected = [x0, y0 + 0.25 * height, x1 - x0, 0.75 * height]
        assert result["bbox"] == pytest.approx(expected, abs=0.01)
        # A landmark's score is 1 with this head: what remains is the detector's.
        assert result["score"] == pytest.approx(float(score))
        assert len(result["keypoints"]) == 3 * 98
    # Five points follow from the 98.
    assert len(list((tmp_path / "crops").iterdir())) == len(found)


def test_margins_make_the_crops_of_wflw() -> None:
    """A face's box begins at the hair line, WFLW's crop is a square about landmarks from the brows down
    (extent_crop_box). On the built-in head --box-margins 0 -0.22 0 0 makes up for it."""
    vertices = 100 * head_vertices(HeadShape())[:FACE_VERTICES, :2] + 300
    landmarks = vertices[np.repeat(ROWS, len(COLUMNS)) > -0.43]

    class Given(BoxSource):
        def __call__(self, image_ids: Any, images: Any) -> list[Instances]:
            box = torch.from_numpy(np.concatenate([vertices.min(axis=0), vertices.max(axis=0)]))
            return [Instances((600, 600), pred_boxes=Boxes(box[None].float()))]

    crops = [
        pad_boxes(source([1], [])[0].pred_boxes.tensor, (256, 256))[0]
        for source in (Given(), WithMargins(Given(), (0, -0.22, 0, 0)))
    ]
    wanted = pad_boxes(torch.tensor([extent_crop_box(landmarks)]), (256, 256))[0]
    scales = [float((x[2] - x[0]) / (wanted[2] - wanted[0])) for x in crops]
    assert scales[0] > 1.2 and scales[1] == pytest.approx(1, abs=0.05)
    side = float(wanted[2] - wanted[0])
    shifts = [float((x[1] + x[3] - wanted[1] - wanted[3]) / 2 / side) for x in crops]
    assert shifts[0] < -0.1 and shifts[1] == pytest.approx(0, abs=0.05)


def test_margins_belong_to_boxes(config: str, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(config, tmp_path / "out", "--input", picture, "--box-margins", 0, 0, 0, 0)
