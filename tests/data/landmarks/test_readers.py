"""Annotation files of landmark data sets, in every form that is read."""

import importlib.util
import json
import subprocess
import sys
import textwrap
import uuid

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ext.data.errors import DatasetError
from d2ext.data.landmarks import (
    LANDMARK_DATASETS,
    TopDownMapper,
    flip_indices,
    instance_records,
    load_landmarks,
    register_landmarks,
)
from d2ext.data.landmarks.datasets import DESCRIBED
from d2ext.data.landmarks.readers import detect_form, extent_crop_box
from d2ext.data.landmarks.register import custom_kind, read_head_boxes
from d2ext.data.landmarks.samples import usable_annotations

SETS = {
    "coco": "test_coco.json",
    "mpii": "test_mpii.json",
    "300w": "test_300w.json",
    "wflw": "test_wflw.json",
    "cofw": "test_cofw.json",
    "aflw": "test_aflw.json",
    "posetrack18": "test_posetrack18_val.json",
}


@pytest.fixture
def names():
    """Fresh names; what gets registered under them is removed again."""
    made = [f"landmarks_{uuid.uuid4().hex}" for _ in range(2)]
    yield made
    for name in made:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """``a.png`` and ``b.png``, 100 x 80."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 80)).save(tmp_path / name)
    return tmp_path


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def run_apart(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def points_of(annotation) -> np.ndarray:
    return np.array(annotation["keypoints"]).reshape(-1, 3)


@pytest.mark.parametrize("kind", list(LANDMARK_DATASETS))
def test_kinds_are_consistent(kind):
    facts = LANDMARK_DATASETS[kind]
    count = len(facts.keypoints)
    assert count == {"coco": 17, "posetrack18": 17, "mpii": 16}.get(kind) or count in (
        *(68, 98, 29, 19),
    )
    pairs = np.array(facts.flip_pairs)
    assert len(np.unique(pairs)) == pairs.size and pairs.max() < count
    assert all(a < b for a, b in facts.flip_pairs) or kind in ("coco", "posetrack18", "mpii")
    assert len(facts.sigmas) in (0, count)
    for a, b in facts.skeleton:
        assert 0 <= a < count and 0 <= b < count and a != b
    # A mirrored face has the same distance between the eyes.
    partner = dict(facts.flip_pairs) | {b: a for a, b in facts.flip_pairs}
    for name, (first, second) in facts.norms.items():
        if name != "head_points":
            assert {partner[i] for i in first} == set(second)


@pytest.mark.parametrize("kind", list(SETS))
def test_original_and_coco_form_give_the_same_targets(kind, real_data, names):
    root = real_data / "landmarks" / kind
    images = str(root if kind == "posetrack18" else root / "images")
    register_landmarks(names[0], kind, str(root / "original" / SETS[kind]), images)
    register_landmarks(names[1], kind, str(root / f"{kind}_keypoints.json"), str(root / "images"))
    key = "keypoints"
    both = [
        sorted(
            instance_records(DatasetCatalog.get(name)), key=lambda r: r["annotations"][0][key][3:9]
        )
        for name in names
    ]
    assert len(both[0]) == {"coco": 3, "mpii": 3, "wflw": 4, "posetrack18": 12}.get(kind, 2)
    mapper = TopDownMapper(size=(64, 48), flip_indices=flip_indices(names[0]), recipe="none")
    for original, coco in zip(*both, strict=True):
        a, b = mapper(original), mapper(coco)
        assert a["image"].equal(b["image"]) and a["image"].std() > 1
        points = a["instances"].gt_keypoints.tensor
        assert points.equal(b["instances"].gt_keypoints.tensor)
        assert (points[..., 2] > 0).sum() == original["annotations"][0]["num_keypoints"]
    category = json.loads((root / f"{kind}_keypoints.json").read_text())["categories"][0]
    facts = LANDMARK_DATASETS[kind]
    assert {tuple(sorted(p)) for p in category["flip_pairs"]} == {
        tuple(sorted(p)) for p in facts.flip_pairs
    }
    np.testing.assert_allclose(facts.sigmas, category.get("sigmas", ()))
    if kind in ("coco", "mpii", "posetrack18"):
        assert list(facts.keypoints) == category["keypoints"]
        assert {tuple(sorted((a, b))) for a, b in facts.skeleton} == {
            tuple(sorted((a - 1, b - 1))) for a, b in category["skeleton"]
        }


def test_occlusion_is_kept_where_the_source_has_it(real_data):
    cofw = real_data / "landmarks/cofw"
    records = load_landmarks(
        LANDMARK_DATASETS["cofw"], str(cofw / "cofw_keypoints.json"), str(cofw / "images"), "coco"
    )
    values = np.concatenate([points_of(a)[:, 2] for r in records for a in r["annotations"]])
    assert set(values) == {1, 2}


def coco_file(count=16, **annotation):
    points = [[10 + i, 20 + i, 1] for i in range(count)]
    points[-1 if count < 4 else 3] = [0, 0, 0]
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 80, "width": 100}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 1,
                "keypoints": [v for p in points for v in p],
                "bbox": [10, 20, 30, 40],
                **annotation,
            }
        ],
        "categories": [{"id": 1, "name": "person"}],
    }


def test_coco_form(folder):
    path = write(folder / "x.json", coco_file(center=[51.0, 41.0], scale=0.2, box_size=9.0))
    (record,) = load_landmarks(LANDMARK_DATASETS["mpii"], path, str(folder), "coco")
    assert record["file_name"] == str(folder / "a.png") and record["image_id"] == 7
    annotation = record["annotations"][0]
    points = points_of(annotation)
    # Pixel indices become centres of pixels; v of a set without occlusion flags is 2; a point that is
    # not labelled stays zero.
    np.testing.assert_array_equal(points[0], [10.5, 20.5, 2])
    np.testing.assert_array_equal(points[3], [0, 0, 0])
    assert annotation["bbox"] == [10, 20, 40, 60] and annotation["area"] == 1200
    # MPII: centre 1-based, moved down by 15 pixels per unit of scale.
    np.testing.assert_allclose(annotation["crop_box"], [30, 23, 70, 63])
    assert annotation["person_scale"] == 0.2 and annotation["box_size"] == 9.0
    (record,) = load_landmarks(LANDMARK_DATASETS["mpii"], path, str(folder), "coco", origin=1)
    np.testing.assert_array_equal(points_of(record["annotations"][0])[0], [9.5, 19.5, 2])


@pytest.mark.parametrize("bbox", [[0, 0, 0, 0], [5, 5, -1, 9]])
def test_box_of_the_points_where_there_is_none(folder, bbox):
    path = write(folder / "x.json", coco_file(bbox=bbox, area=0))
    (record,) = load_landmarks(LANDMARK_DATASETS["mpii"], path, str(folder), "coco")
    (annotation,) = usable_annotations(record)
    points = points_of(annotation)
    x0, y0, x1, y1 = annotation["bbox"]
    inside = points[points[:, 2] > 0][:, :2]
    assert (inside > (x0, y0)).all() and (inside < (x1, y1)).all() and annotation["area"] > 0


def test_mpii_form(folder):
    joints = [[11.0 + i, 21.0 + 2 * i] for i in range(16)]
    joints[0] = [-1.0, -1.0]
    person = {
        "image": "b.png",
        "joints": joints,
        "joints_vis": [0] + [1] * 15,
        "center": [51.0, 41.0],
        "scale": 0.2,
    }
    path = write(folder / "mpii.json", [person, {**person, "image": "a.png"}, person])
    head = write(folder / "heads.json", [[0, 0, 3, 4], [1, 1, 2, 2], [5, 5, 6, 7]])
    records = load_landmarks(LANDMARK_DATASETS["mpii"], path, str(folder), "mpii", head_boxes=head)
    assert [len(r["annotations"]) for r in records] == [2, 1]
    assert records[0]["width"] == 100 and records[0]["height"] == 80
    annotation = records[0]["annotations"][0]
    points = points_of(annotation)
    np.testing.assert_array_equal(points[0], [0, 0, 0])
    np.testing.assert_array_equal(points[1], [11.5, 22.5, 2])  # index 12, 23 from 1 on
    # Joints 1 to 15 span 11..25 and 22..50; 15 % more on each side.
    np.testing.assert_allclose(annotation["bbox"], [11 - 2.1, 22 - 4.2, 25 + 2.1, 50 + 4.2])
    np.testing.assert_allclose(annotation["crop_box"], [30, 23, 70, 63])
    assert [a["head_box"] for r in records for a in r["annotations"]] == [
        [0, 0, 3, 4],
        [5, 5, 6, 7],
        [1, 1, 2, 2],
    ]


def test_head_boxes_follow_the_file_not_the_ids(folder):
    content = coco_file()
    content["images"].append({**content["images"][0], "id": 8})
    (person,) = content["annotations"]
    content["annotations"] = [
        {**person, "id": key, "image_id": image} for key, image in ((9, 7), (4, 8), (6, 7))
    ]
    head = write(folder / "heads.json", [[i, 0, i + 3, 4] for i in range(3)])
    path = write(folder / "x.json", content)
    records = load_landmarks(LANDMARK_DATASETS["mpii"], path, str(folder), "coco", head_boxes=head)
    heads = {a["id"]: a["head_box"] for r in records for a in r["annotations"]}
    assert heads == {9: [0, 0, 3, 4], 4: [1, 0, 4, 4], 6: [2, 0, 5, 4]}


def test_wflw_text(folder):
    face = np.arange(196) / 3 + 5
    fields = [*face.round(3), 4, 5, 60, 70, 1, 0, 0, 0, 1, 0, "a.png"]
    path = write(folder / "list.txt", " ".join(map(str, fields)) + "\n\n")
    assert detect_form(LANDMARK_DATASETS["wflw"], path) == "wflw"
    (record,) = load_landmarks(LANDMARK_DATASETS["wflw"], path, str(folder), "wflw")
    annotation = record["annotations"][0]
    np.testing.assert_allclose(points_of(annotation)[0], [5.5, 5.833, 2])
    assert annotation["bbox"] == [4, 5, 60, 70]
    assert annotation["attributes"] == {
        "pose": True,
        "expression": False,
        "illumination": False,
        "make_up": False,
        "occlusion": True,
        "blur": False,
    }
    np.testing.assert_allclose(annotation["crop_box"], [5, 5, 70, 70])


def test_wflw_text_has_the_published_crop(real_data, folder):
    path = real_data / "landmarks/wflw/original/test_wflw.json"
    for entry in json.loads(path.read_text())["annotations"]:
        points = np.array(entry["keypoints"]).reshape(-1, 3)[:, :2]
        x, y, half = *entry["center"], entry["scale"] * 100
        np.testing.assert_allclose(
            extent_crop_box(points), [x - half, y - half, x + half, y + half]
        )


def test_pts_folder(folder):
    lines = "\n".join(f"{10 + i}.5 {20 + i}" for i in range(68))
    write(folder / "a.pts", f"version: 1\nn_points: 68\n{{\n{lines}\n}}\n")
    assert detect_form(LANDMARK_DATASETS["300w"], str(folder)) == "pts"
    (record,) = load_landmarks(LANDMARK_DATASETS["300w"], str(folder), str(folder), "pts")
    assert record["file_name"] == str(folder / "a.png")
    np.testing.assert_array_equal(points_of(record["annotations"][0])[0], [10, 19.5, 2])
    (folder / "01_Indoor").mkdir()
    for name in ("a.pts", "a.png"):  # as 300-W is published
        (folder / name).rename(folder / "01_Indoor" / name)
    (found,) = load_landmarks(LANDMARK_DATASETS["300w"], str(folder), str(folder), "pts")
    assert found == {**record, "file_name": str(folder / "01_Indoor" / "a.png")}
    # As indices from 0: x 9.5 to 76.5, y 19 to 86.
    np.testing.assert_array_equal(record["annotations"][0]["crop_box"], [9, 18.5, 77, 86.5])


def test_csv(folder):
    header = "image,scale,box_size,center_w,center_h"
    row = ",".join(map(str, ["b.png", 0.2, 40, 50, 30, *range(1, 37), -1, -1]))
    path = write(folder / "face.csv", f"{header}\n{row}\n")
    assert detect_form(LANDMARK_DATASETS["aflw"], path) == "csv"
    (record,) = load_landmarks(LANDMARK_DATASETS["aflw"], path, str(folder), "csv")
    annotation = record["annotations"][0]
    np.testing.assert_array_equal(points_of(annotation)[[0, 18]], [[1.5, 2.5, 2], [0, 0, 0]])
    np.testing.assert_allclose(annotation["crop_box"], [30, 10, 70, 50])
    assert annotation["box_size"] == 40 and annotation["num_keypoints"] == 18


def test_crop_box_of_the_file_wins(folder, names):
    content = coco_file(
        center=[51.0, 41.0], scale=0.2, crop_box=[1, 2, 31, 32], bbox_head=[1, 2, 3, 4]
    )
    path = write(folder / "x.json", content)
    (record,) = load_landmarks(LANDMARK_DATASETS["mpii"], path, str(folder), "coco")
    annotation = record["annotations"][0]
    assert annotation["crop_box"] == [1, 2, 31, 32] and annotation["head_box"] == [1, 2, 4, 6]


def test_custom_kind_from_names(folder):
    category = {
        "id": 3,
        "name": "hand",
        "keypoints": ["wrist", "left_tip", "right_tip"],
        "skeleton": [[1, 2], [1, 3]],
    }
    content = {**coco_file(3), "categories": [category]}
    kind = custom_kind(write(folder / "x.json", content))
    assert kind.flip_pairs == ((1, 2),) and kind.skeleton == ((0, 1), (0, 2))
    assert kind.metrics == ("nme", "pck") and kind.category == "hand"
    for change in ({"flip_pairs": [[0, 3]]}, {"sigmas": [0.1]}, {"skeleton": [[1, 4]]}):
        content["categories"] = [{**category, **change}]
        with pytest.raises(DatasetError, match="do not fit"):
            custom_kind(write(folder / "x.json", content))
    content["categories"] = [{**category, "keypoints": ["a", "a", "b"]}]
    with pytest.raises(DatasetError, match="different names"):
        custom_kind(write(folder / "x.json", content))


def test_registering(folder, names):
    path = write(folder / "x.json", coco_file())
    register_landmarks(names[0], "mpii", path, str(folder))
    register_landmarks(names[0], "mpii", path, str(folder))  # the same again
    metadata = MetadataCatalog.get(names[0])
    assert metadata.evaluator_type == "landmarks" and len(metadata.keypoint_names) == 16
    assert ("right_ankle", "left_ankle") in metadata.keypoint_flip_map
    assert flip_indices(names[0]) == [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]
    with pytest.raises(DatasetError, match="already registered"):
        register_landmarks(names[0], "mpii", path, str(folder.parent))
    with pytest.raises(DatasetError, match="known: coco"):
        register_landmarks(names[1], "mpi", path, str(folder))
    with pytest.raises(DatasetError, match="Form 'yaml'"):
        register_landmarks(names[1], "mpii", path, str(folder), form="yaml")


def test_published_sets_are_described_before_they_are_registered(folder):
    """In a process of their own: what is registered there is gone afterwards."""
    own = {**coco_file(3), "categories": [{"id": 1, "name": "hand", "keypoints": ["a", "b", "c"]}]}
    write(folder / "own.json", own)
    code = """
        import copy, pickle
        import pytest
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from d2ext.config import get_cfg
        from d2ext.data.landmarks import LANDMARK_DATASETS, flip_indices, register_landmarks
    """
    for name, other in (("mpii_val", "mpii_train"), ("wflw_test", "wflw_train")):
        kind = LANDMARK_DATASETS[DESCRIBED[name]]
        content = coco_file(len(kind.keypoints))
        content["annotations"][0]["category_id"] = content["categories"][0]["id"] = 5
        write(folder / f"{name}.json", content)
        code += f"""
        metadata = MetadataCatalog.get("{name}")
        assert "{name}" not in DatasetCatalog.list() and metadata.name == "{name}"
        assert metadata.thing_classes == ["{kind.category}"] and metadata.keypoint_connection_rules
        assert len(metadata.keypoint_names) == {len(kind.keypoints)}
        assert not metadata.get("evaluator_type") and "_first" not in metadata.as_dict()
        again = pickle.loads(pickle.dumps(metadata))
        assert again.as_dict() == copy.deepcopy(metadata).as_dict() == metadata.as_dict()
        again.thing_classes = ["{kind.category}"]
        before = flip_indices("{name}")
        for _ in range(2):
            register_landmarks("{name}", "{kind.name}", r"{folder}/{name}.json", r"{folder}")
        assert MetadataCatalog.get("{name}") is metadata and flip_indices("{name}") == before
        assert metadata.evaluator_type == "landmarks"
        if "{kind.name}" == "mpii":
            assert metadata.thing_dataset_id_to_contiguous_id == {{5: 0}}
        with pytest.raises(AssertionError, match="different value"):
            metadata.keypoint_names = ("a",)  # the real data's stay
        # Other data by such a name.
        assert flip_indices("{other}") == before
        register_landmarks("{other}", "custom", r"{folder}/own.json", r"{folder}")
        assert flip_indices("{other}") == [0, 1, 2]
    """
    run_apart(code)


def without(part, key):
    content = coco_file()
    del content[part][0][key]
    return content


def twice():
    content = coco_file()
    return {**content, "annotations": content["annotations"] * 2}


BAD = {
    "other count": ("mpii", coco_file(17), "has 17 points; 'mpii' has 16"),
    "no images": ("mpii", {"annotations": []}, "has no 'images'"),
    "unknown image": ("mpii", coco_file(image_id=8), "not in 'images'"),
    "no annotation id": ("mpii", without("annotations", "id"), "1 annotations have no 'id'"),
    "no image id": ("mpii", without("annotations", "image_id"), "annotations have no 'image_id'"),
    "image without id": ("mpii", without("images", "id"), "1 images have no 'id'"),
    "image without name": ("mpii", without("images", "file_name"), "images have no 'file_name'"),
    "same id": ("mpii", twice(), r"'id' occur repeatedly in 'annotations': 1 \(2 times\)"),
    "no box": (
        "mpii",
        coco_file(bbox=[1, 2, 3]),
        r"not four numbers.*id 1 \(\[1, 2, 3\]\)",
    ),
    "no crop box": ("mpii", coco_file(crop_box=None), "'crop_box' is not four numbers"),
    "no head box": ("mpii", coco_file(bbox_head=["a"] * 4), "'bbox_head' is not four numbers"),
    "not finite": (
        "mpii",
        coco_file(keypoints=[float("inf"), 1, 2] * 16),
        "'keypoints' that is not",
    ),
    "no annotation": ("mpii", {**coco_file(), "annotations": []}, "no annotation"),
    "list": ("mpii", [{"image": "a.png"}], "has no center, joints"),
    "json": ("mpii", "{", "not valid JSON"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_json_is_a_clear_error(case, folder, names):
    kind, content, message = BAD[case]
    path = write(folder / "bad.json", content)
    with pytest.raises(DatasetError, match=message):
        register_landmarks(names[0], kind, path, str(folder))
    assert names[0] not in DatasetCatalog.list()


def test_other_bad_files(folder, names):
    def refuse(kind, path, message, **options):
        with pytest.raises(DatasetError, match=message):
            register_landmarks(names[0], kind, str(path), str(folder), **options)

    refuse("coco", folder / "none.json", "does not exist")
    refuse("aflw", write(folder / "x.mat", "x"), "holds both parts of AFLW")
    refuse("wflw", folder / "x.mat", "no form that is read")
    refuse("wflw", write(folder / "x.txt", "1 2 3 a.png"), "line 1 .* has 4 fields")
    refuse("wflw", write(folder / "x.txt", "x " * 206 + "a.png"), "line 1 .*could not convert")
    refuse("aflw", write(folder / "x.csv", "a\nb,1,2"), "line 2 .* has 3 fields")
    refuse("300w", folder, "no .pts file")
    for text, message in (("1 2", "between"), ("{1 2}", "has 1 points"), ("{1}", "odd number")):
        write(folder / "a.pts", text)
        refuse("300w", folder, message)
    (folder / "a.pts").rename(folder / "c.pts")
    refuse("300w", folder, "no image 'c.png'")
    path = write(folder / "x.json", coco_file())
    heads = write(folder / "h.json", [[0, 0, 1, 1]] * 2)
    refuse("mpii", path, "2 head boxes", head_boxes=heads)
    refuse("mpii", path, "no list of", head_boxes=write(folder / "h.json", [[0, 0, 1]]))
    # SciPy reads it, where it is installed.
    message = (
        "headboxes_src" if importlib.util.find_spec("scipy") else "needs SciPy: pip install scipy"
    )
    refuse("mpii", path, message, head_boxes=write(folder / "h.mat", "x" * 200))


def test_head_boxes_of_mpii(folder):
    scipy_io = pytest.importorskip("scipy.io")
    corners = np.arange(12).reshape(2, 2, 3)  # corner, x and y, person
    scipy_io.savemat(str(folder / "gt.mat"), {"headboxes_src": corners})
    np.testing.assert_array_equal(
        read_head_boxes(str(folder / "gt.mat")), [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    )
