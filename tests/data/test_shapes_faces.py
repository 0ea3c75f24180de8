"""Heads of `shapes`: one mesh, and points, boxes and meshes that are what the picture shows."""

import dataclasses
import hashlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from d2ext.data.shapes import (
    FaceSet,
    ShapesSet,
    face_sets,
    files,
    load_shapes_faces,
    register_shapes_faces,
)
from d2ext.data.shapes.__main__ import main
from d2ext.data.shapes.classes import Outline
from d2ext.data.shapes.face_mesh import (
    COLUMNS,
    FACE_VERTICES,
    NUM_VERTICES,
    POINT_FLIP_MAP,
    POINT_NAMES,
    POINT_VERTICES,
    ROWS,
    HeadShape,
    face_topology,
    head_vertices,
    mirror_vertices,
    rotation,
)
from d2ext.data.shapes.face_paint import HeadLook, Light, head_solid, head_surface
from d2ext.data.shapes.face_raster import Surface, hides, render
from d2ext.data.shapes.face_scene import draw_faces
from d2ext.data.shapes.faces import FaceFrame, Head
from d2ext.data.shapes.items import Cover
from d2ext.data.shapes.raster import rasterize
from d2ext.data.shapes.scene import Draws, draw_layer
from d2ext.data.shapes.sets import set_from_name

TINY = FaceSet("val", 10, 160, 128, seed=3)
LEFT_EYE, RIGHT_EYE, NOSE, LEFT_MOUTH, RIGHT_MOUTH = range(5)
LOOK = HeadLook(
    skin=np.array([230.0, 180, 150]),
    hair=np.array([60.0, 40, 30]),
    iris=np.array([40.0, 90, 200]),
    lip=np.array([200.0, 30, 60]),
)
FRONT = Light(np.array([0.0, 0, -1]), 0.8)
GREY = ShapesSet("val", 1, 200, 200).frame(0)  # a backdrop


@pytest.fixture(scope="module")
def frames():
    return [draw_faces(0, "val", index, 256, 256) for index in range(40)]


def head(yaw=0.0, pitch=0.0, roll=0.0, size=100.0, centre=(100.0, 110.0), look=LOOK, **shape):
    pose = tuple(math.radians(a) for a in (yaw, pitch, roll))
    return Head(HeadShape(**shape), look, pose, size / 2, centre)


def frame_of(*items):
    return FaceFrame(list(items), FRONT, 0.0, GREY)


def square(x, y, half):
    outline = Outline([[np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)])]], [], np.zeros((0, 2)))
    layer = dataclasses.replace(draw_layer(Draws(0, "a", "b", 0), -1, 9.0), outline=outline)
    matrix = np.array([[half, 0, x], [0, half, y]], float)
    return Cover(layer, matrix, rasterize(outline, matrix, 200, 200))


def extremes():
    names = [f.name for f in dataclasses.fields(HeadShape) if f.name != "eyes_open"]
    for name in names:
        for value in (-1.0, 1.0):
            if name != "mouth_open" or value > 0:
                yield HeadShape(**{name: value})


# The mesh.


def test_topology_is_fixed():
    assert face_topology().shape == (2060, 3)
    assert set(face_topology().reshape(-1)) == set(range(NUM_VERTICES))
    assert NUM_VERTICES == 1103
    for shape in extremes():
        assert head_vertices(shape).shape == (NUM_VERTICES, 3)
        assert np.isfinite(head_vertices(shape)).all()


def test_mean_head_is_its_mirror_image():
    flip = mirror_vertices()
    assert (flip[flip] == np.arange(NUM_VERTICES)).all()
    for shape in (HeadShape(), *extremes()):
        vertices = head_vertices(shape)
        np.testing.assert_allclose(vertices[flip], vertices * (-1, 1, 1), atol=1e-12)
    # A wink on the left is the mirror image of one on the right.
    left, right = (head_vertices(HeadShape(eyes_open=e)) for e in ((0.0, 1.0), (1.0, 0.0)))
    assert np.abs(left - right).max() > 0.01
    np.testing.assert_allclose(left[flip], right * (-1, 1, 1), atol=1e-12)
    # So are the triangles, ears and all.
    mirrored = {tuple(sorted(t)) for t in flip[face_topology()].tolist()}
    assert mirrored == {tuple(sorted(t)) for t in face_topology().tolist()}


def test_triangles_turn_outwards():
    vertices = head_vertices(HeadShape())
    corners = vertices[face_topology()[:-12]]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outwards = np.einsum("ij,ij->i", normals, corners.mean(axis=1) - (0, 0, 0.1)) > 0
    assert outwards.mean() > 0.98  # not beside the nose


def test_points_are_where_the_head_has_them():
    vertices = head_vertices(HeadShape())
    points = dict(zip(POINT_NAMES, vertices[list(POINT_VERTICES)], strict=True))
    assert points["left_eye"][0] < -0.3 < 0.3 < points["right_eye"][0]
    assert points["nose"][0] == 0 and points["nose"][2] == vertices[:, 2].min()
    assert points["left_eye"][1] < points["nose"][1] < points["left_mouth"][1]
    flip = mirror_vertices()
    for a, b in POINT_FLIP_MAP:
        i, j = (POINT_VERTICES[POINT_NAMES.index(name)] for name in (a, b))
        assert flip[i] == j
    assert flip[POINT_VERTICES[NOSE]] == POINT_VERTICES[NOSE]


def test_expression_moves_what_it_should():
    calm, opened = head_vertices(HeadShape()), head_vertices(HeadShape(mouth_open=1.0))
    row = {b: slice(i * 33, (i + 1) * 33) for i, b in enumerate(ROWS.tolist())}
    middle = len(COLUMNS) // 2
    np.testing.assert_array_equal(opened[row[0.545]], calm[row[0.545]])  # upper lip
    assert opened[row[0.575]][middle, 1] - calm[row[0.575]][middle, 1] > 0.2
    assert opened[row[1.0]][middle, 1] - calm[row[1.0]][middle, 1] > 0.2
    for point in POINT_VERTICES:  # corners stay
        np.testing.assert_allclose(opened[point, 1], calm[point, 1], atol=0.16)
    smile = head_vertices(HeadShape(smile=1.0))[list(POINT_VERTICES)]
    calm = calm[list(POINT_VERTICES)]
    assert (smile[3:, 1] < calm[3:, 1] - 0.03).all()
    assert smile[RIGHT_MOUTH, 0] > calm[RIGHT_MOUTH, 0] + 0.03


@pytest.mark.parametrize(
    ("pose", "axis", "sign"), [((30, 0, 0), 0, 1), ((0, 20, 0), 1, 1), ((-30, 0, 0), 0, -1)]
)
def test_pose_turns_the_nose(pose, axis, sign):
    nose = np.array([0.0, 0, -1]) @ rotation(*(math.radians(a) for a in pose)).T
    assert nose[axis] * sign > 0.3


def test_positive_roll_is_clockwise():
    top = np.array([0.0, -1, 0]) @ rotation(0, 0, math.radians(20)).T
    assert top[0] > 0.3


# The head in the picture.


def test_depth_is_negative_towards_the_camera_and_zero_on_average():
    vertices = head().vertices
    ears = vertices[FACE_VERTICES:, 2]
    assert vertices[POINT_VERTICES[NOSE], 2] < -20 < 20 < ears.min()
    assert abs(vertices[:, 2].mean()) < 1e-9
    # Same scale as x and y: a head that turns by a right angle shows its depth.
    side = head(yaw=90).vertices
    np.testing.assert_allclose(np.ptp(side[:, 0]), np.ptp(vertices[:, 2]), rtol=1e-9)


def test_moved_head_is_a_head_there():
    there = head(yaw=20).moved((40.0, 60.0))
    np.testing.assert_allclose(there.vertices, head(yaw=20, centre=(40.0, 60.0)).vertices)


def test_boxes_hold_the_face_without_ears():
    frame = frame_of(head(yaw=10, roll=15))
    x0, y0, x1, y1 = frame.box(0)
    face, ears = np.split(frame.items[0].vertices[:, :2], [FACE_VERTICES])
    np.testing.assert_allclose([x0, y0], face.min(axis=0))
    np.testing.assert_allclose([x1, y1], face.max(axis=0))
    assert ears[:, 0].min() < x0
    assert 90 < y1 - y0 < 125
    # Cut to the picture.
    frame = frame_of(head(centre=(10.0, 195.0)))
    x0, y0, x1, y1 = frame.box(0)
    assert (x0, y1) == (0, 200) and y0 > 0 and x1 < 200


def test_points_are_vertices():
    frame = frame_of(head(yaw=-20, pitch=10, roll=5))
    points = frame.face_points(0)
    mesh = frame.mesh(0)
    np.testing.assert_allclose(points[:, :2], mesh[list(POINT_VERTICES), :2], rtol=1e-6)
    assert mesh.dtype == np.float32
    assert (points[:, 2] == 2).all()
    assert points[LEFT_EYE, 0] < points[NOSE, 0] < points[RIGHT_EYE, 0]


def test_points_lie_on_what_is_painted():
    """Irises are blue and lips red here; the points are found again by colour."""
    for pose in ({}, {"yaw": 25, "pitch": -10}, {"yaw": -30, "roll": 20}):
        frame = frame_of(head(**pose, size=140))
        plain = FaceFrame(frame.items, FRONT, 0.0, GREY)
        plain.background = dataclasses.replace(GREY.background, light=0.0, noise=0.0)
        image = plain.image.astype(float)
        points = plain.face_points(0)
        y, x = np.mgrid[0:200, 0:200] + 0.5
        inside = np.hypot(x - 100, y - 110) < 70
        blue = inside & (image[..., 2] > image[..., 0] + 60)
        for eye in (LEFT_EYE, RIGHT_EYE):
            near = blue & (np.hypot(x - points[eye, 0], y - points[eye, 1]) < 14)
            found = np.array([x[near].mean(), y[near].mean()])
            assert np.linalg.norm(found - points[eye, :2]) < 2.5
        red = inside & (image[..., 0] > 2.6 * image[..., 1]) & (image[..., 0] > 60)
        across = points[RIGHT_MOUTH, :2] - points[LEFT_MOUTH, :2]
        place = ((np.stack([x, y], 2) - points[LEFT_MOUTH, :2]) @ across)[red] / (across @ across)
        assert abs(np.quantile(place, 0.002)) < 0.1 and abs(np.quantile(place, 0.998) - 1) < 0.1


def test_far_side_is_hidden_by_the_head():
    visible = frame_of(head(yaw=70)).face_points(0)[:, 2]
    # The face looks to the image's right: its right side is turned away.
    assert visible.tolist() == [2, 1, 2, 2, 1]
    visible = frame_of(head(yaw=-70)).face_points(0)[:, 2]
    assert visible.tolist() == [1, 2, 2, 1, 2]


def test_a_hat_hides_eyes():
    hat = dataclasses.replace(LOOK, hat=np.array([200.0, 0, 0]), brim=0.5)
    assert frame_of(head(look=hat)).face_points(0)[LEFT_EYE, 2] == 2
    assert frame_of(head(look=hat, pitch=60)).face_points(0)[LEFT_EYE, 2] == 1


def test_hair_hides_the_face_from_behind():
    assert (frame_of(head(yaw=180)).face_points(0)[:, 2] == 1).all()


def test_occluders_and_heads_in_front_hide_points():
    behind = head()
    x, y, _ = frame_of(behind).face_points(0)[RIGHT_EYE]
    points = frame_of(square(x, y, 8), behind).face_points(1)
    assert points[:, 2].tolist() == [2, 1, 2, 2, 2]
    np.testing.assert_array_equal(points[:, :2], frame_of(behind).face_points(0)[:, :2])
    assert (frame_of(behind, square(x, y, 8)).face_points(0)[:, 2] == 2).all()  # it stands behind
    small = head(size=30, centre=(x, y))
    assert frame_of(small, behind).face_points(1)[RIGHT_EYE, 2] == 1
    assert frame_of(small, behind).face_points(1)[LEFT_MOUTH, 2] == 2
    assert (frame_of(behind, small).face_points(0)[:, 2] == 2).all()
    assert (frame_of(behind, small).face_points(1)[:, 2] == 1).all()


def test_points_outside_are_absent():
    points = frame_of(head(centre=(5.0, 100.0))).face_points(0)
    assert (points[LEFT_EYE] == 0).all() and (points[LEFT_MOUTH] == 0).all()
    assert points[RIGHT_EYE, 2] == 2


def test_tiny_faces_have_a_box_only():
    frame = frame_of(head(size=9))
    assert not frame.has_points(0) and frame.mesh(0) is None
    assert (frame.face_points(0) == 0).all()
    x0, y0, x1, y1 = frame.box(0)
    assert 4 < x1 - x0 < y1 - y0 < 12


def test_only_heads_have_faces():
    frame = frame_of(square(5, 5, 3), head(), dataclasses.replace(head(yaw=180), annotated=False))
    assert frame.faces == [1]
    with pytest.raises(ValueError, match="no head"):
        frame.box(0)


# The painter.


def quad(z, texture_color):
    points = np.array([(2.0, 3, z), (8, 3, z), (8, 6, z), (2, 6, z)])
    texture = np.full((4, 4, 3), texture_color, np.uint8)
    triangles = np.array([(0, 2, 1), (0, 3, 2)])
    return Surface(points, triangles, np.ones(4), np.zeros((4, 2)), texture)


def test_render_covers_pixels():
    color, alpha = render(quad(0.0, 100), (0, 0, 10, 8), 2.0)
    assert color.shape == (8, 10, 3) and alpha.shape == (8, 10)
    assert (alpha[4, 3:7] == 1).all() and (alpha[:2] == 0).all() and (alpha[:, 9:] == 0).all()
    assert (color[4, 3:7] == 100).all()
    moved, _ = render(quad(0.0, 100), (1, 0, 9, 8), 2.0)
    np.testing.assert_array_equal(moved, color[:, 1:])


def test_near_triangles_cover_far_ones():
    far, near = quad(5.0, 0), quad(1.0, 0)
    points = np.concatenate([near.points, far.points])
    shade = np.repeat([1.0, 0.25], 4)
    texture = np.full((4, 4, 3), 200, np.uint8)
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        triangles = np.concatenate([near.triangles, far.triangles + 4])[order]
        surface = Surface(points, triangles, shade, np.zeros((8, 2)), texture)
        color, _ = render(surface, (0, 0, 10, 8), 2.0)
        assert (color[4, 3:7] == 200).all()


def test_hides():
    surface = quad(0.0, 0)
    probes = np.array([(4.0, 4, 5), (4, 4, -5), (4, 4, 0.1), (9, 4, 5), (4, 7, math.inf)])
    hidden = hides(surface.points, surface.triangles, probes, 10.0)
    assert hidden.tolist() == [True, False, False, False, False]
    assert hides(surface.points, surface.triangles, np.array([(4, 4, math.inf)]), 10.0)[0]


def test_light_comes_from_its_direction():
    shape, look = HeadShape(), LOOK
    solid = head_solid(shape, look, rotation(0, 0, 0), 50.0, (100.0, 110.0))
    middle = len(COLUMNS) // 2
    cheeks = [20 * 33 + middle - 12, 20 * 33 + middle + 12]
    for side in (-1, 1):
        light = Light(np.array([side * 0.8, 0, -0.6]), 0.3)
        left, right = head_surface(solid, shape, look, light, 2).shade[cheeks]
        assert (right - left) * side > 0.3


# Pictures.


def digest(frame):
    content = hashlib.blake2b(frame.image.tobytes(), digest_size=8)
    for item in frame.faces:
        content.update(frame.face_points(item).tobytes())
        content.update(frame.items[item].vertices.tobytes())
    return content.hexdigest()


def test_pictures_do_not_depend_on_order_nor_process(frames):
    code = (
        "from tests.data.test_shapes_faces import digest\n"
        "from d2ext.data.shapes.face_scene import draw_faces\n"
        "print(*[digest(draw_faces(0, 'val', i, 256, 256)) for i in (3, 0, 1)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [digest(frames[i]) for i in (3, 0, 1)]
    assert digest(draw_faces(1, "val", 0, 256, 256)) != digest(frames[0])
    assert digest(draw_faces(0, "train", 0, 256, 256)) != digest(frames[0])


def test_pictures_are_varied_and_fair(frames):
    heads = [(f, i) for f in frames for i in f.faces]
    counts = [len(f.faces) for f in frames]
    assert min(counts) == 0 and 5 <= max(counts) <= 8 and 2 < np.mean(counts) < 4
    sizes = [f.items[i].scale * 2 for f, i in heads]
    assert min(sizes) < 16 and max(sizes) > 100
    yaws = np.degrees([f.items[i].pose[0] for f, i in heads])
    assert yaws.min() < -45 and yaws.max() > 45 and np.abs(yaws).max() <= 75
    visible = np.concatenate([f.face_points(i)[:, 2] for f, i in heads if f.has_points(i)])
    assert 0.6 < (visible == 2).mean() < 0.95 and (visible == 1).mean() > 0.04
    for frame, item in heads:
        x0, y0, x1, y1 = frame.box(item)
        assert 0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 256


def test_a_face_changes_the_picture_within_its_box_most(frames):
    """Boxes and heads belong together: without the head, its box looks different."""
    for frame in frames[:6]:
        for item in frame.faces:
            others = [i for i in frame.items if i is not frame.items[item]]
            without = FaceFrame(others, frame.light, frame.blur, frame)
            x0, y0, x1, y1 = (round(v) for v in frame.box(item))
            changed = cv2.absdiff(without.image, frame.image).max(axis=2) > 8
            assert changed[y0:y1, x0:x1].mean() > 0.4


# Sets.


@pytest.fixture(scope="module")
def name():
    name = register_shapes_faces(TINY, prefix="tiny")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_default_sets_are_registered():
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"shapes_{split}_faces")
        assert f"shapes_{split}_faces" in DatasetCatalog.list()
        assert metadata.evaluator_type == "faces" and metadata.thing_classes == ["face"]
        assert metadata.keypoint_names == POINT_NAMES
        assert metadata.mesh_flip == mirror_vertices().tolist()


def test_dicts(name):
    dicts = DatasetCatalog.get(name)
    annotations = [a for d in dicts for a in d["annotations"]]
    assert len(dicts) == 10 and any(not d["annotations"] for d in dicts)
    assert any("mesh" in a for a in annotations) and any("mesh" not in a for a in annotations)
    assert len({a["id"] for a in annotations}) == len(annotations)
    for index, record in enumerate(dicts):
        image = utils.read_image(record["file_name"], "RGB")
        np.testing.assert_array_equal(image, TINY.frame(index).image)
        assert image.shape == (record["height"], record["width"], 3) == (160, 128, 3)
        for annotation in record["annotations"]:
            assert annotation["category_id"] == 0 and len(annotation["keypoints"]) == 15
            points = np.reshape(annotation["keypoints"], (5, 3))
            if "mesh" not in annotation:
                assert (points == 0).all()
                continue
            mesh = annotation["mesh"]
            assert mesh.shape == (NUM_VERTICES, 3) and mesh.dtype == np.float32
            seen = points[:, 2] > 0
            np.testing.assert_allclose(
                points[seen, :2], mesh[list(POINT_VERTICES), :2][seen], rtol=1e-6
            )
    dicts[0]["annotations"] = None
    assert load_shapes_faces(TINY)[0]["annotations"] is not None


def test_annotations_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path))
    shapes = FaceSet("val", 4, 64, 64, seed=3)
    drawn = []
    draw = face_sets._draw_annotations
    monkeypatch.setattr(face_sets, "_draw_annotations", lambda s: drawn.append(s) or draw(s))
    loaded = []
    for version in ("1", "1", "2"):
        monkeypatch.setattr(files, "_version", lambda version=version: version)
        face_sets._load.cache_clear()  # a new process
        loaded.append(load_shapes_faces(shapes))
    assert drawn == [shapes, shapes]  # once for each version of the code
    first, again = ([a for d in x for a in d["annotations"]] for x in loaded[:2])
    assert [a.pop("mesh", np.zeros(0)).tolist() for a in first] == [
        a.pop("mesh", np.zeros(0)).tolist() for a in again
    ]
    assert first == again and len(first) == sum(len(f.faces) for f in shapes.frames()) > 4
    # Interrupted, it leaves nothing; and it is not in the way of the set's files.
    monkeypatch.setattr(files, "_version", lambda: "3")
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half") and 1 / 0)
    face_sets._load.cache_clear()
    with pytest.raises(ZeroDivisionError):
        load_shapes_faces(shapes)
    assert list((tmp_path / "shapes/3").iterdir()) == []
    assert not (tmp_path / "shapes/1" / shapes.name).exists()


def test_a_set_without_faces(tmp_path, monkeypatch):
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path))
    monkeypatch.setattr(FaceFrame, "faces", [])
    records = load_shapes_faces(FaceSet("val", 2, 40, 40, seed=3))
    assert [d["annotations"] for d in records] == [[], []]
    face_sets._load.cache_clear()


def test_annotation_file_and_topology(name, tmp_path):
    metadata = MetadataCatalog.get(name)
    with PathManager.open(metadata.json_file) as f:
        content = json.load(f)
    with PathManager.open(metadata.mesh_file) as f:
        lines = [line.split() for line in f]
    vertices = np.array([line[1:] for line in lines if line[0] == "v"], float)
    triangles = np.array([line[1:] for line in lines if line[0] == "f"], int)
    np.testing.assert_allclose(vertices, head_vertices(HeadShape()), atol=1e-5)
    np.testing.assert_array_equal(triangles - 1, face_topology())
    assert content["categories"][0]["mesh_file"] == "face.obj"
    assert content["categories"][0]["mesh_flip"] == metadata.mesh_flip
    given = [a for d in DatasetCatalog.get(name) for a in d["annotations"]]
    assert [a["id"] for a in content["annotations"]] == [a["id"] for a in given]
    for entry, annotation in zip(content["annotations"], given, strict=True):
        box = BoxMode.convert(entry["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        np.testing.assert_allclose(box, annotation["bbox"], atol=0.02)
        points, expected = (np.reshape(a["keypoints"], (5, 3)) for a in (entry, annotation))
        np.testing.assert_array_equal(points[:, 2], expected[:, 2])
        seen = points[:, 2] > 0
        np.testing.assert_allclose(points[seen, :2] + 0.5, expected[seen, :2], atol=0.01)
        assert ("mesh" in entry) == ("mesh" in annotation)
        if "mesh" in entry:
            mesh = np.reshape(entry["mesh"], (-1, 3)) + (0.5, 0.5, 0)
            np.testing.assert_allclose(mesh, annotation["mesh"], atol=0.01)


def test_paths():
    assert set_from_name(TINY.name) == TINY and TINY.name == "val-10-160x128-seed3-faces"
    assert PathManager.ls(TINY.root) == ["images", "annotations"]
    assert PathManager.ls(f"{TINY.root}/annotations") == ["faces.json", "face.obj"]
    assert not PathManager.exists(f"{TINY.root}/panoptic/000000000000.png")
    assert set_from_name("val-10-160x128-seed3") != TINY
    with pytest.raises(ValueError, match="no name of a set"):
        set_from_name("val-10x12-160x128-seed3-faces")


def test_export(tmp_path, name, capsys):
    arguments = [str(tmp_path), "--faces", "--num", "3", "--size", "160x128", "--seed", "3"]
    assert main(arguments) == 0
    assert "faces_val2017.json" in capsys.readouterr().out
    coco = COCO.__new__(COCO)
    sys.stdout, stdout = io.StringIO(), sys.stdout
    try:
        coco.__init__(str(tmp_path / "annotations/faces_val2017.json"))
    finally:
        sys.stdout = stdout
    assert len(coco.imgs) == 3
    assert len(coco.anns) == sum(len(TINY.frame(i).faces) for i in range(3))
    assert (tmp_path / "annotations" / coco.cats[1]["mesh_file"]).is_file()
    image = cv2.imread(str(tmp_path / "val2017" / coco.imgs[1]["file_name"]))[..., ::-1]
    assert np.abs(image.astype(float) - TINY.frame(1).image).mean() < 12
    # Again only when asked; another split beside it shares the topology.
    assert main(arguments) == 1
    assert main([*arguments, "--overwrite"]) == 0
    assert main([*arguments, "--split", "train"]) == 0


def test_a_picture_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path))
    drawn = []
    frame = FaceSet.frame
    monkeypatch.setattr(FaceSet, "frame", lambda self, i: drawn.append(i) or frame(self, i))
    path = f"{TINY.root}/images/{TINY.stem(2)}.bmp"
    contents = []
    for _ in range(2):
        with PathManager.open(path, "rb") as file:
            contents.append(file.read())
    assert drawn == [2]
    assert contents[0] == contents[1]
    picture = cv2.imdecode(np.frombuffer(contents[0], np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(picture[..., ::-1], TINY.frame(2).image)
