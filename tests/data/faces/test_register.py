"""Faces in the catalogs, from the command line, and by built-in names."""

import argparse
import json
import uuid
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from d2ext import model_zoo
from d2ext.config import get_cfg
from d2ext.data import build_mapper, get_dataset_dicts
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    check_config_against_data,
    register_from_arguments,
)
from d2ext.data.dataset_facts import flip_indices, set_config_from_data
from d2ext.data.errors import AnnotationError, DatasetError
from d2ext.data.faces import (
    FaceMapper,
    face_metadata,
    load_faces,
    register_builtin_faces,
    register_faces,
)
from d2ext.evaluation.wider_face import wider_images

POINTS = [10, 10, 2, 20, 10, 1, 15, 15, 2, 11, 20, 2, 19, 20, 2]
MESH = [5, 10, -1, 25, 10, 1, 15, 30, 0]


@pytest.fixture
def name():
    made = f"faces_{uuid.uuid4().hex}"
    yield made
    for split in ("train", "val"):
        if f"{made}_{split}" in DatasetCatalog.list():
            DatasetCatalog.remove(f"{made}_{split}")
        MetadataCatalog.pop(f"{made}_{split}", None)


def coco(folder: Path, annotations: list[dict], **category: object) -> str:
    Image.new("RGB", (60, 50)).save(folder / "a.png")
    Image.new("RGB", (60, 50)).save(folder / "b.png")
    content = {
        "images": [
            {"id": i + 1, "file_name": file, "height": 50, "width": 60}
            for i, file in enumerate(("a.png", "b.png"))
        ],
        "annotations": [
            {"id": i + 7, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 30], **a}
            for i, a in enumerate(annotations)
        ],
        "categories": [{"id": 1, "name": "face", **category}],
    }
    (folder / "faces.json").write_text(json.dumps(content))
    (folder / "head.obj").write_text("v -1 0 0\nv 1 0 0\nv 0 2 0\nf 1 2 3\n")
    return str(folder / "faces.json")


def config(name: str, flip: str = "none"):
    cfg = get_cfg()
    apply_dataset_to_config(cfg, name)
    cfg.INPUT.MAPPER = "FaceMapper"
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN = (100,)
    cfg.INPUT.RANDOM_FLIP = flip
    return cfg


def register(name: str, tmp_path: Path, annotations: list[dict], **category: object) -> None:
    path = coco(tmp_path, annotations, **category)
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    arguments = ["--dataset", name, "--train-json", path, "--train-images", str(tmp_path)]
    register_from_arguments(parser.parse_args([*arguments, "--landmarks", "faces"]))


def test_points_and_meshes_reach_the_model(name, tmp_path: Path, caplog) -> None:
    faces = [
        {"keypoints": POINTS, "mesh": MESH},
        {},  # neither points nor mesh
        {"keypoints": [0] * 15, "mesh": MESH, "bbox": [40, 30, 40, 40]},  # half outside
        {"bbox": [30, 30, 0, 5]},
    ]
    register(name, tmp_path, faces, mesh_file="head.obj")
    assert "probably the person's" not in caplog.text
    metadata = MetadataCatalog.get(f"{name}_train")
    assert metadata.mesh_flip == [1, 0, 2] and metadata.mesh_file == str(tmp_path / "head.obj")
    assert metadata.evaluator_type == "faces"
    assert flip_indices(f"{name}_train") == [1, 0, 2, 4, 3]
    for flip in ("none", "horizontal"):
        cfg = config(name, flip)
        records = get_dataset_dicts(cfg, cfg.DATASETS.TRAIN, is_train=True)
        assert len(records) == 2
        mapper = build_mapper(cfg, is_train=True)
        np.random.seed(0)
        samples = [mapper(records[0]) for _ in range(8)]
        mirrored = [s["instances"].gt_boxes.tensor[0, 0] > 20 for s in samples]
        assert any(mirrored) == (flip == "horizontal") and not all(mirrored)
        instances = samples[mirrored.index(flip == "horizontal")]["instances"]
        assert len(instances) == 3  # one has no area
        assert instances.gt_mesh_valid.tolist() == [True, False, True]
        eyes = instances.gt_keypoints.tensor[0, :2]
        mesh = instances.gt_face_meshes[0]
        assert (
            instances.gt_face_meshes.shape == (3, 3, 3) and (instances.gt_face_meshes[1] == 0).all()
        )
        if flip == "none":
            assert eyes.tolist() == [[21, 21, 2], [41, 21, 1]]
            assert mesh.tolist() == [[11, 21, -2], [51, 21, 2], [31, 61, 0]]
        else:
            assert eyes.tolist() == [[79, 21, 1], [99, 21, 2]]
            assert mesh.tolist() == [[69, 21, 2], [109, 21, -2], [89, 61, 0]]
        assert (instances.gt_keypoints.tensor[1:] == 0).all()
        assert instances.gt_boxes.tensor[2].max() <= 120  # cut at the border
        empty = mapper(records[1])["instances"]
        assert empty.gt_face_meshes.shape == (0, 3, 3) and empty.gt_mesh_valid.shape == (0,)
        assert empty.gt_keypoints.tensor.shape == (0, 5, 3)


def own_config(name: str, file: str):
    cfg = model_zoo.get_config(f"retinaface/{file}.yaml")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{name}_train",), ()
    return cfg


def test_config_follows_points_and_meshes(name, tmp_path: Path, caplog) -> None:
    register(name, tmp_path, [{"keypoints": POINTS, "mesh": MESH}, {}], mesh_file="head.obj")
    cfg = own_config(name, "mobilenet025_wider_mesh")
    with pytest.raises(DatasetError, match=r"VERTICES is 1103, but data .* has 3 vertices\. Set"):
        check_config_against_data(cfg)
    apply_dataset_to_config(cfg, name)
    check_config_against_data(cfg)
    mesh = cfg.MODEL.RETINAFACE.MESH
    assert (3, str(tmp_path / "head.obj")) == (mesh.NUM_VERTICES, mesh.FILE)
    assert cfg.MODEL.KEYPOINT_ON and "NUM_VERTICES" not in caplog.text
    # Without --dataset the topology is still that of the training data, of any of several sets.
    cfg = own_config(name, "mobilenet025_wider_mesh")
    cfg.merge_from_list(["MODEL.RETINAFACE.MESH.NUM_VERTICES", 3, "MODEL.DEVICE", "cpu"])
    cfg.DATASETS.TRAIN = ("wider_face_train", f"{name}_train")
    assert build_model(cfg).criterion.edges.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert FaceMapper.from_config(cfg)["mesh_flip"] == [1, 0, 2]
    # A config without meshes stays so.
    cfg = own_config(name, "mobilenet025_wider")
    check_config_against_data(cfg)
    apply_dataset_to_config(cfg, name)
    assert cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES == 0
    assert "stays 0: the 3 of data set" in caplog.text


def test_config_of_boxes_alone(name, tmp_path: Path, caplog) -> None:
    """Also where all points of the file are absent, and a category names a topology without a mesh."""
    register(name, tmp_path, [{"keypoints": [0] * 15}, {}], mesh_file="head.obj")
    cfg = own_config(name, "mobilenet025_wider_mesh")
    with pytest.raises(DatasetError, match=r"KEYPOINT_ON is True, .* nothing for it. Set .* False"):
        check_config_against_data(cfg)
    # Beside data that have points they may train.
    assert "has nothing for it" not in caplog.text
    cfg.DATASETS.TRAIN = (f"{name}_train", "shapes_train_faces")
    with pytest.raises(DatasetError, match="has 1103 vertices"):
        cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES = 3
        check_config_against_data(cfg)
    cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES = 1103
    check_config_against_data(cfg)
    assert len(FaceMapper.from_config(cfg)["mesh_flip"]) == 1103
    apply_dataset_to_config(cfg, name)
    check_config_against_data(cfg)
    assert not cfg.MODEL.KEYPOINT_ON and cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES == 0
    assert caplog.text.count("has nothing for it") == 2
    # A model that has been trained on others is evaluated as it is.
    MetadataCatalog.get(f"{name}_val").set(**face_metadata(), keypoints_labelled=False)
    other = own_config(name, "mobilenet025_wider_mesh")
    other.DATASETS.TRAIN, other.DATASETS.TEST = (), (f"{name}_val",)
    set_config_from_data(other, f"{name}_val")
    check_config_against_data(other, train=False)
    assert "annotations" not in build_mapper(other, is_train=False)(
        DatasetCatalog.get(f"{name}_train")[0]
    )
    assert other.MODEL.KEYPOINT_ON and other.MODEL.RETINAFACE.MESH.NUM_VERTICES == 1103
    cfg.MODEL.DEVICE, cfg.INPUT.AUGMENTATION.SIZE = "cpu", 96
    mapper = build_mapper(cfg, is_train=True)
    batch = [mapper(x) for x in get_dataset_dicts(cfg, cfg.DATASETS.TRAIN, is_train=True)]
    losses = build_model(cfg)(batch)
    assert set(losses) == {"loss_box", "loss_class"}
    assert all(np.isfinite(x.item()) for x in losses.values())


def test_1000_faces(name, tmp_path: Path) -> None:
    boxes = [[x, y, 1, 1] for x in range(40) for y in range(25)]
    register(name, tmp_path, [{"bbox": b, "mesh": MESH} for b in boxes], mesh_file="head.obj")
    cfg = config(name)
    sample = build_mapper(cfg, is_train=True)(DatasetCatalog.get(f"{name}_train")[0])
    assert sample["instances"].gt_face_meshes.shape == (1000, 3, 3)


@pytest.mark.parametrize(
    ("face", "category", "message"),
    [
        ({"mesh": [1, 2, 3]}, {"mesh_file": "head.obj"}, "1 vertices, the topology 3"),
        ({"mesh": MESH}, {}, "names a 'mesh_file'"),
        ({"mesh": MESH}, {"mesh_file": "head.obj", "mesh_flip": [0, 1]}, "no list of partners"),
        ({"mesh": MESH}, {"mesh_file": "no.obj"}, "does not exist"),
        ({"keypoints": [1, 2, 2]}, {}, "has 1 points; 'faces' has 5"),
    ],
)
def test_wrong_meshes_and_points(name, tmp_path: Path, face, category, message) -> None:
    with pytest.raises(DatasetError, match=message):
        register(name, tmp_path, [face], **category)


def test_other_topology_in_a_sample(name, tmp_path: Path) -> None:
    register(name, tmp_path, [{"mesh": MESH}], mesh_file="head.obj")
    mapper = build_mapper(config(name), is_train=True)
    record = DatasetCatalog.get(f"{name}_train")[0]
    record["annotations"][0]["mesh"] = [1.0, 2.0, 3.0]
    with pytest.raises(AnnotationError, match=r"a\.png' has 1 vertices, the topology 3"):
        mapper(record)


def test_wflw(tmp_path: Path) -> None:
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    points = np.arange(196) / 4
    line = " ".join([*(f"{v}" for v in points), "1 2 50 49", "0 1 0 0 0 1", "a.png"])
    (tmp_path / "list.txt").write_text(line)
    (record,) = load_faces(str(tmp_path / "list.txt"), str(tmp_path), "faces_wflw")
    (face,) = record["annotations"]
    assert face["bbox"] == [1, 2, 50, 49] and face["attributes"]["blur"]
    assert face["keypoints"][:3] == [points[192] + 0.5, points[193] + 0.5, 2]
    assert "crop_box" not in face
    with pytest.raises(DatasetError, match="known: faces, faces_300w"):
        load_faces("x", "y", "wflw")


def test_names_taken_and_no_faces(name, tmp_path: Path) -> None:
    (tmp_path / "label.txt").write_text("# a.jpg\n1 2 3 4\n")
    register_faces(f"{name}_train", str(tmp_path / "label.txt"), str(tmp_path))
    register_faces(f"{name}_train", str(tmp_path / "label.txt"), str(tmp_path))
    with pytest.raises(DatasetError, match="already registered"):
        register_faces(f"{name}_train", str(tmp_path / "label.txt"), "elsewhere")
    (tmp_path / "empty.txt").write_text("# a.jpg\n")
    with pytest.raises(DatasetError, match="has no face"):
        register_faces(f"{name}_val", str(tmp_path / "empty.txt"), str(tmp_path))


def test_left_of_the_person(name, tmp_path: Path, caplog) -> None:
    swapped = np.reshape(POINTS, (5, 3))[[1, 0, 2, 4, 3]].ravel().tolist()
    register(name, tmp_path, [{"keypoints": swapped}, {}])
    assert "probably the person's" in caplog.text


@pytest.fixture
def wider_root(tmp_path: Path, monkeypatch):
    names = [f"wider_face_{split}" for split in ("train", "val", "test")]

    def register_again() -> None:
        for known in names:
            DatasetCatalog.remove(known)
            MetadataCatalog.pop(known)
        register_builtin_faces()

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "widerface").mkdir()
    register_again()
    yield tmp_path / "widerface"
    monkeypatch.undo()
    register_again()


def test_wider_face_by_name(wider_root: Path, caplog) -> None:
    with pytest.raises(DatasetError, match="wider_face_val' is not there"):
        DatasetCatalog.get("wider_face_val")
    (wider_root / "wider_face_split").mkdir()
    for split in ("train", "val", "test"):
        (wider_root / f"WIDER_{split}" / "images").mkdir(parents=True)
    text = "0--Parade/a.jpg\n1\n1 2 30 40 0 0 0 0 0 0\n"
    for split in ("train", "val"):
        (wider_root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt").write_text(text)
    (wider_root / "wider_face_split" / "wider_face_test_filelist.txt").write_text("0--P/b.jpg\n")
    assert "keypoints" not in DatasetCatalog.get("wider_face_train")[0]["annotations"][0]
    assert "has no five points" in caplog.text
    (wider_root / "train").mkdir()
    five = " ".join(["5 6 0"] * 5)
    (wider_root / "train" / "label.txt").write_text(f"# 0--Parade/a.jpg\n1 2 30 40 {five} 0\n")
    assert DatasetCatalog.get("wider_face_train")[0]["annotations"][0]["num_keypoints"] == 5
    assert "annotations" not in DatasetCatalog.get("wider_face_test")[0]
    metadata = MetadataCatalog.get("wider_face_val")
    assert metadata.evaluator_type == "wider_face" and metadata.keypoint_names[0] == "left_eye"
    images = wider_images(DatasetCatalog.get("wider_face_val"), metadata.image_root)
    assert images["0--Parade/a"].boxes.tolist() == [[1, 2, 30, 40]]
