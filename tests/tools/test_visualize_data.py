"""`d2ext visualize-data`: pictures of what the loader gives, bad samples skipped and reported."""

import json
import logging
import uuid

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

from d2ext.tools import visualize_data
from d2ext.utils.drawing import write_picture
from d2ext.utils.surfaces import part_colors, value_colors
from tests.data.densepose.persons import NUM_VERTICES, content, write_persons
from tests.data.scenes import BACKGROUND, paint_scene, write_image


@pytest.fixture
def data(tmp_path):
    """Arguments for a data set of four painted scenes with two classes."""
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for i in range(4):
        scene = paint_scene(60, 80, seed=i)
        write_image(folder / f"{i}.png", scene.image)
        images.append({"id": i, "file_name": f"{i}.png", "height": 60, "width": 80})
        for k, annotation in enumerate(scene.polygon_annotations):
            x0, y0, x1, y1 = annotation["bbox"]
            annotations.append(
                {
                    "id": 10 * i + k,
                    "image_id": i,
                    "category_id": 1 + k % 2,
                    "iscrowd": int(k == 4),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": 1.0,
                    "segmentation": annotation["segmentation"],
                }
            )
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    name = f"test_visualize_{uuid.uuid4().hex}"
    yield [
        *("--dataset", name),
        *("--train-json", str(tmp_path / "data.json")),
        *("--train-images", str(folder)),
        *("--output-dir", str(tmp_path / "out")),
    ]
    if f"{name}_train" in DatasetCatalog.list():
        DatasetCatalog.remove(f"{name}_train")
    MetadataCatalog.pop(f"{name}_train", None)


def written(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_annotations(data, tmp_path):
    assert visualize_data.run([*data, "--source", "annotation", "--num", "9"]) == 0
    assert written(tmp_path) == [
        "0000_0.png",
        "0001_1.png",
        "0002_2.png",
        "0003_3.png",
        "dataset_summary.json",
        "montage.png",
    ]
    picture = cv2.imread(str(tmp_path / "out" / "0000_0.png"))[:, :, ::-1]
    assert picture.shape == (300, 400, 3)  # enlarged five times
    scene = np.kron(paint_scene(60, 80).image, np.ones((5, 5, 1), np.uint8))
    # Free background stays as it is; labels, boxes and masks change the rest.
    free = (scene == BACKGROUND).all(-1)
    assert (picture[free] == BACKGROUND).all(-1).mean() > 0.6
    assert (picture[~free] == scene[~free]).all(-1).mean() < 0.3
    montage = cv2.imread(str(tmp_path / "out" / "montage.png"))
    assert montage.shape == (2 * visualize_data.CELL, 2 * visualize_data.CELL, 3)


def test_loader_shows_the_training_stream(data, tmp_path):
    opts = ["INPUT.AUGMENTATION.NAME", "ssd", "INPUT.AUGMENTATION.SIZE", "450", "SEED", "3"]
    assert visualize_data.run([*data, "--num", "6", *opts]) == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert len(first) == 8  # the stream is endless: more samples than images
    assert cv2.imread(str(tmp_path / "out" / "montage.png")).shape[0] == 2 * visualize_data.CELL
    for path in (tmp_path / "out").glob("0*.png"):
        assert cv2.imread(str(path)).shape == (450, 450, 3)
    # Same seed, other batch size and workers: the same pictures.
    more = ["SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "2"]
    assert visualize_data.run([*data, "--num", "6", *opts, *more]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == first


@pytest.mark.parametrize("source", ["annotation", "loader"])
def test_bad_samples_are_reported(data, tmp_path, caplog, source):
    (tmp_path / "images" / "2.png").write_bytes(b"")
    arguments = [*data, "--source", source, "--num", "4", "MODEL.MASK_ON", "True"]
    with caplog.at_level(logging.ERROR):
        assert visualize_data.run(arguments) == 1
    assert any("2.png" in r.getMessage() for r in caplog.records)
    names = written(tmp_path)
    assert "montage.png" in names and not any("_2.png" in name for name in names)
    assert len(names) == (5 if source == "annotation" else 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nonsense"], "no data set 'nonsense'"),
        (["--train-json", "a.json"], "add --dataset NAME"),
        ([], r"DATASETS.TRAIN"),
        (["--num", "0"], "no number from 1 on"),
        (["--config-file", "none.yaml"], "none.yaml"),
        (["INPUT.NONSENSE", "1"], "INPUT.NONSENSE"),
    ],
)
def test_errors_are_messages(tmp_path, capsys, arguments, message):
    try:
        status = visualize_data.run([*arguments, "--output-dir", str(tmp_path / "out")])
    except SystemExit as stopped:  # how argparse ends
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2ext.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_picture(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


class TestDraw:
    metadata = Metadata(
        name="x",
        thing_classes=["one"],
        stuff_classes=["sky", "sea"],
        keypoint_names=["center"],
        keypoint_connection_rules=[],
    )

    def sample(self, height=450, width=450):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, width / 2, height / 2]]))
        instances.gt_classes = torch.tensor([0])
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, : max(1, height // 2), : max(1, width // 2)] = True
        instances.gt_masks = BitMasks(mask)
        return {"image": torch.full((3, height, width), 100.0), "instances": instances}

    def test_mask_is_drawn_where_it_is(self):
        sample = self.sample()
        sample["image"][:, :, 300:] = 400.0  # unclipped photometric distortion
        picture = visualize_data.draw(sample, self.metadata, "RGB")
        assert (picture[260:, :260] == 100).all() and (picture[260:, 310:] == 255).all()
        assert (picture[20:200, 20:200] != 100).any(-1).mean() > 0.9

    def test_channel_order(self):
        sample = {"image": torch.tensor([10, 20, 30])[:, None, None].expand(3, 450, 450)}
        assert visualize_data.draw(sample, self.metadata, "BGR")[5, 5].tolist() == [30, 20, 10]
        assert visualize_data.draw(sample, self.metadata, "RGB")[5, 5].tolist() == [10, 20, 30]

    def test_keypoints(self):
        sample = self.sample()
        del sample["instances"].get_fields()["gt_masks"]
        before = visualize_data.draw(sample, self.metadata, "RGB")
        sample["instances"].gt_keypoints = Keypoints(torch.tensor([[[350.0, 300.0, 2.0]]]))
        changed = np.argwhere((visualize_data.draw(sample, self.metadata, "RGB") != before).any(-1))
        assert len(changed) and np.abs(changed.mean(0) - [300, 350]).max() < 2

    def test_meshes(self):
        sample = self.sample()
        del sample["instances"].get_fields()["gt_masks"]
        before = visualize_data.draw(sample, self.metadata, "RGB")
        mesh = torch.tensor([[[300.0, 300, 0], [400, 300, 0], [350, 400, 0]]])
        sample["instances"].gt_face_meshes = mesh
        sample["instances"].gt_mesh_valid = torch.tensor([True])
        for triangle, centers in (([0, 2, 1], [333, 350]), ([0, 1, 2], None), (None, [333, 350])):
            triangles = None if triangle is None else np.array([triangle])
            picture = visualize_data.draw(sample, self.metadata, "RGB", triangles)
            changed = np.argwhere((picture != before).any(-1))
            assert len(changed) == 0 if centers is None else len(changed) > 2
            assert centers is None or np.abs(changed.mean(0) - centers).max() < 15
        sample["instances"].gt_mesh_valid[:] = False
        assert (visualize_data.draw(sample, self.metadata, "RGB") == before).all()

    def test_sem_seg_with_ignored_pixels(self):
        sem_seg = torch.full((450, 450), 255)
        sem_seg[:, :225] = 1
        sample = {"image": torch.full((3, 450, 450), 100.0), "sem_seg": sem_seg}
        picture = visualize_data.draw(sample, self.metadata, "RGB")
        assert (picture[:, 240:] == 100).all() and (picture[10:100, 10:100] != 100).any(-1).all()

    def test_crowds_are_named(self):
        sample = self.sample()
        sample["crowd_instances"] = Instances((450, 450))
        sample["crowd_instances"].gt_boxes = Boxes(torch.tensor([[300.0, 300.0, 400.0, 400.0]]))
        sample["crowd_instances"].gt_classes = torch.tensor([0])
        picture = visualize_data.draw(sample, self.metadata, "RGB")
        assert (picture[340:360, 298:303] != 100).any()

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (700, 2)])
    def test_extreme_shapes(self, shape):
        picture = visualize_data.draw(self.sample(*shape), self.metadata, "RGB")
        assert max(picture.shape[:2]) >= 400
        assert max(visualize_data.shrink(picture).shape[:2]) <= visualize_data.CELL


@pytest.mark.parametrize("flow", [False, True])
def test_pairs_of_frames_are_strips(tmp_path, flow):
    arguments = ["--dataset", "shapes_video", "--num", "3", "--output-dir", str(tmp_path / "out")]
    options = [
        "INPUT.MAPPER",
        "ClipMapper",
        "INPUT.AUGMENTATION.NAME",
        "none",
        "MODEL.MASK_ON",
        "True",
    ]
    assert visualize_data.run([*arguments, *options, "INPUT.VIDEO.FLOW", str(flow)]) == 0
    names = [name for name in written(tmp_path) if name != "montage.png"]
    assert len(names) == 3
    for name in names:
        picture = cv2.imread(str(tmp_path / "out" / name))
        height, width = picture.shape[:2]
        assert width == (3 if flow else 2) * height
        panels = np.split(picture.astype(int), 3 if flow else 2, axis=1)
        assert np.abs(panels[0] - panels[1]).mean() > 1


def test_holes_of_masks_stay_free():
    mask = torch.zeros(1, 400, 400, dtype=torch.bool)
    mask[:, 100:300, 100:300] = True
    mask[:, 150:250, 150:250] = False
    instances = Instances((400, 400), gt_boxes=Boxes([[100.0, 100, 300, 300]]))
    instances.gt_classes, instances.gt_masks = torch.zeros(1, dtype=torch.int64), BitMasks(mask)
    sample = {"image": torch.full((3, 400, 400), 100, dtype=torch.uint8), "instances": instances}
    picture = visualize_data.draw(sample, Metadata(thing_classes=["frame"]), "RGB").astype(int)
    changed = np.abs(picture - 100).max(axis=2) > 5
    assert changed[200, 125] and not changed[170:230, 170:230].any()


def test_tracks_keep_their_colour():
    def instances(*ids):
        result = Instances((4, 4))
        result.gt_ids = torch.tensor(ids)
        result.gt_classes = torch.zeros(len(ids), dtype=torch.int64)
        return result

    one, two = (visualize_data.colors(i) for i in (instances(5, 2), instances(2, 9, 5)))
    assert (one[0] == two[2]).all() and (one[1] == two[0]).all() and (one[0] != one[1]).any()
    metadata = Metadata(thing_classes=["car"])
    assert visualize_data.labels(instances(5, 2), metadata) == ["car 5", "car 2"]


def test_frames_as_annotated(tmp_path):
    arguments = ["--dataset", "shapes_video_panoptic", "--num", "6", "--source", "annotation"]
    assert visualize_data.run([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    names = written(tmp_path)
    assert names[4] == "0004_000000_000004.png" and len(names) == 7
    assert len(names) == 7


@pytest.mark.parametrize("vertices", [False, True])
def test_points_on_surfaces(tmp_path, vertices):
    def change(annotations):
        for annotation in annotations if vertices else []:
            for key in ("dp_I", "dp_U", "dp_V"):
                del annotation[key]

    json_file, images = write_persons(tmp_path, change)
    name = f"test_visualize_{uuid.uuid4().hex}"
    files = ["--dataset", name, "--train-json", json_file, "--train-images", images]
    out = ["--output-dir", str(tmp_path / "out"), "--source", "annotation"]
    try:
        assert visualize_data.run([*files, *out]) == 0
    finally:
        DatasetCatalog.pop(f"{name}_train", None)
        MetadataCatalog.pop(f"{name}_train", None)
    picture = cv2.imread(str(tmp_path / "out" / "0000_1.png"))[:, :, ::-1]
    panels = np.split(picture, picture.shape[1] // 400, axis=1)
    assert len(panels) == (1 if vertices else 3) and picture.shape[0] == 300
    first = content()["annotations"][0]
    x0, y0, w, h = first["bbox"]
    for i in range(16):
        x = int(5 * (x0 + w * first["dp_x"][i] / 256))
        y = int(5 * (y0 + h * first["dp_y"][i] / 256))
        if vertices:
            expected = [value_colors(np.array([first["dp_vertex"][i] / (NUM_VERTICES - 1)]))[0]]
        else:
            part = part_colors()[int(first["dp_I"][i])]
            expected = [part, *value_colors(np.array([first["dp_U"][i], first["dp_V"][i]]))]
        for panel, color in zip(panels, expected, strict=True):
            assert np.abs(panel[y, x].astype(int) - color).max() <= 8, i
    # The third person is on the second image, the last image has none.
    assert cv2.imread(str(tmp_path / "out" / "0002_3.png")).shape == (300, 400, 3)
