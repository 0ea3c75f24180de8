"""Bodies of `shapes`: one mesh with charts, and annotations that are what the picture shows."""

import dataclasses
import hashlib
import json
import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from d2ext.data.densepose import (
    DensePoseAnnotations,
    SurfacePoints,
    SurfaceSymmetry,
    read_uv_symmetry,
)
from d2ext.data.densepose.parts import COARSE_PARTS
from d2ext.data.shapes import BodySet, ShapesSet, load_shapes_bodies, register_shapes_bodies
from d2ext.data.shapes.__main__ import main
from d2ext.data.shapes.bodies import Body, BodyFrame
from d2ext.data.shapes.body_coco import BODY_MESH, body_annotations
from d2ext.data.shapes.body_mesh import body_mesh, mirror_chart
from d2ext.data.shapes.body_paint import BodyLook, Cloth, paint_charts, vertex_normals
from d2ext.data.shapes.body_pose import BodyPose, mirror_pose, pose_vertices, view
from d2ext.data.shapes.body_raster import shown_points
from d2ext.data.shapes.body_scene import draw_bodies, draw_body_clip, draw_look, draw_pose
from d2ext.data.shapes.body_tables import (
    body_npz,
    geodesics_npy,
    uv_symmetry_npz,
)
from d2ext.data.shapes.face_paint import Light
from d2ext.data.shapes.items import Cover
from d2ext.data.shapes.scene import Draws
from d2ext.data.shapes.sets import set_from_name

TINY = BodySet("val", 6, 160, 128, seed=3)
CLOTH = Cloth(2, 300.0, (0, 0), np.linspace((20, 60, 150), (220, 200, 90), 256).astype(np.uint8))
LOOK = BodyLook(
    skin=np.array([230.0, 180, 150]),
    hair=np.array([60.0, 40, 30]),
    shoes=np.array([90.0, 20, 20]),
    shirt=CLOTH,
    trousers=dataclasses.replace(CLOTH, texture=4),
    sleeves=1.4,
    legs=2.1,
    hair_length=0.3,
)
EVEN = Light(np.array([0.0, 0, -1]), 1.25)  # no shades
GREY = ShapesSet("val", 1, 200, 200).frame(0)  # a backdrop
A_POSE = BodyPose(np.zeros((15, 3)), np.ones(15))
FLIP = np.array([-1.0, 1, 1])


@pytest.fixture(scope="module")
def frames():
    return [draw_bodies(0, "val", index, 256, 256) for index in range(30)]


def body(yaw=0.0, pitch=0.0, roll=0.0, pose=A_POSE, scale=100.0, centre=(100.0, 100.0)):
    turn = view(*(math.radians(a) for a in (yaw, pitch, roll)))
    return Body(pose, LOOK, turn, scale, centre)


def frame_of(*items):
    return BodyFrame(list(items), EVEN, 0.0, GREY)


@pytest.fixture(scope="module")
def symmetry(tmp_path_factory):
    path = tmp_path_factory.mktemp("symmetry") / "tables.npz"
    path.write_bytes(uv_symmetry_npz())
    return SurfaceSymmetry(read_uv_symmetry(path), {BODY_MESH: torch.tensor(body_mesh().mirror)})


# Pictures of one body.


def test_near_surfaces_hide_far_ones():
    mesh = body_mesh()
    front, back = body().shown, body(yaw=180).shown
    for shown, seen, hidden in ((front, 2, 1), (back, 1, 2)):
        parts = mesh.parts[shown.triangles]
        assert (parts == seen).sum() > 1500 and (parts == hidden).sum() < 200
        np.testing.assert_allclose(shown.weights.sum(axis=1), 1)
        assert shown.weights.min() >= -1e-8
    # Against all triangles, one pixel at a time.
    person = body(yaw=70, pitch=20)
    points, (left, top, width, _) = person.points, person.window
    row, column = np.divmod(person.shown.pixels, width)
    for i in range(0, len(row), 211):
        x, y = column[i] + left + 0.5, row[i] + top + 0.5
        depths = []
        for corner in points[mesh.triangles]:
            m = np.vstack([corner[:, :2].T, np.ones(3)])
            if abs(np.linalg.det(m)) > 1e-9:
                w = np.linalg.solve(m, (x, y, 1))
                depths += [w @ corner[:, 2]] if (w >= 0).all() else []
        shown = points[mesh.triangles[person.shown.triangles[i]]]
        np.testing.assert_allclose(person.shown.weights[i] @ shown[:, :2], (x, y), atol=1e-6)
        assert person.shown.weights[i] @ shown[:, 2] == pytest.approx(min(depths), abs=1e-6)


def test_vertices_are_the_nearest():
    person = body(yaw=40)
    surface, mesh = frame_of(person).surface(0), body_mesh()
    shown, (left, top, width, _) = person.shown, person.window
    np.testing.assert_array_equal(
        (surface.rows - top) * width + surface.columns - left, shown.pixels
    )
    corners = mesh.triangles[shown.triangles]
    places = np.einsum("nk,nkc->nc", shown.weights, person.points[corners])
    nearest = np.linalg.norm(person.points[corners] - places[:, None], axis=2).min(axis=1)
    own = np.linalg.norm(person.points[surface.vertices] - places, axis=1)
    assert own.mean() < 1.1 * nearest.mean()


def test_windows_and_sub_pixels_agree():
    person, mesh = body(yaw=30), body_mesh()
    whole = person.shown
    moved, again = body(yaw=30).moved(7, -4), body(yaw=30, centre=(107.0, 96.0))
    np.testing.assert_allclose(moved.points, again.points)
    assert moved.window == again.window
    np.testing.assert_array_equal(whole.pixels, again.shown.pixels)
    # Of 3 x 3 sub-pixels the middle one has the pixel's centre.
    fine = shown_points(person.points, mesh.triangles, person.window, 3)
    width = person.window[2]
    row, column = np.divmod(fine.pixels, 3 * width)
    middle = (row % 3 == 1) & (column % 3 == 1)
    np.testing.assert_array_equal(row[middle] // 3 * width + column[middle] // 3, whole.pixels)
    same = np.abs(fine.weights[middle] - whole.weights).max(axis=1) < 1e-6
    assert same.mean() > 0.99  # centres on an edge belong to either triangle


def test_mirrored_person_has_the_mirrored_annotation(symmetry):
    """The tables turn the annotation of a picture into that of the mirrored picture."""
    turn = view(0.5, 0.2, 0.1)
    pose = draw_pose(Draws(0, "test", "pose", 5))
    left = Body(pose, LOOK, turn, 110.0, (90.0, 100.0))
    mirrored = np.diag(FLIP) @ turn @ np.diag(FLIP)
    right = Body(mirror_pose(pose), LOOK, mirrored, 110.0, (110.0, 100.0))
    np.testing.assert_allclose(
        right.points[body_mesh().mirror], left.points * FLIP + (200, 0, 0), atol=1e-9
    )
    frame, other = frame_of(left), frame_of(right)
    np.testing.assert_array_equal(other.mask(0), frame.mask(0)[:, ::-1])
    (given,), (expected,) = body_annotations(frame, 0), body_annotations(other, 0)
    annotations = DensePoseAnnotations([_surface_points(given)]).mirrored(symmetry)
    points = annotations.points()
    # What the mirrored picture shows at the mirrored points.
    x0, y0, width, height = expected["bbox"]
    column = np.floor(points.x.numpy() * width / 256 + x0).astype(int)
    row = np.floor(points.y.numpy() * height / 256 + y0).astype(int)
    surface = other.surface(0)
    place = np.full((200, 200), -1)
    place[surface.rows, surface.columns] = np.arange(len(surface.rows))
    index = place[row, column]
    assert len(index) > 80 and (index >= 0).all()
    np.testing.assert_array_equal(points.parts, surface.parts[index])
    np.testing.assert_allclose(np.stack([points.u, points.v], 1), surface.uv[index], atol=0.0045)
    np.testing.assert_array_equal(points.vertices, surface.vertices[index])
    differ = (annotations.masks[0].numpy() != _surface_points(expected).mask).mean()
    assert differ < 0.01


def _surface_points(annotation):
    mask = np.zeros((256, 256), np.uint8)
    for part, rle in enumerate(annotation["dp_masks"], 1):
        if rle:
            mask[mask_util.decode(rle) > 0] = part
    values = [annotation[f"dp_{k}"] for k in ("x", "y", "I", "U", "V", "vertex")]
    return SurfacePoints(*values, annotation["ref_model"], mask)


def test_points_lie_on_their_pixels(frames):
    mesh, counts = body_mesh(), []
    for frame in frames[:12]:
        for annotation in body_annotations(frame, 0):
            x0, y0, width, height = annotation["bbox"]
            item = frame.bodies[(annotation["id"] - 1) % 1000]
            mask = frame.mask(item)
            assert cv2.boundingRect(mask) == (x0, y0, width, height)
            decoded = mask_util.decode(mask_util.frPyObjects(annotation["segmentation"], 256, 256))
            union = np.bitwise_or.reduce(decoded, axis=2)
            iou = (union & mask).sum() / (union | mask).sum()
            assert iou > 0.9
            if "dp_x" not in annotation:
                continue
            points = _surface_points(annotation)
            x = np.array(points.x) * width / 256 + x0
            y = np.array(points.y) * height / 256 + y0
            surface = frame.surface(item)
            place = np.full((256, 256), -1)
            place[surface.rows, surface.columns] = np.arange(len(surface.rows))
            index = place[np.floor(y).astype(int), np.floor(x).astype(int)]
            assert (index >= 0).all() and len(set(index)) == len(index)
            np.testing.assert_allclose(x, surface.columns[index] + 0.5, atol=2e-3)
            np.testing.assert_array_equal(points.parts, surface.parts[index])
            np.testing.assert_allclose(points.u, surface.uv[index, 0], atol=1e-5)
            np.testing.assert_allclose(points.v, surface.uv[index, 1], atol=1e-5)
            # The vertex belongs to the part, and the mask to the points.
            of_part = {
                p: set(mesh.triangles[mesh.parts == p].reshape(-1)) for p in set(points.parts)
            }
            assert all(v in of_part[p] for v, p in zip(points.vertices, points.parts, strict=True))
            coarse = points.mask[np.int64(points.y), np.int64(points.x)]
            agree = coarse == np.array(COARSE_PARTS)[points.parts]
            assert agree.mean() > 0.98
            counts.append(len(x))
    assert 70 < np.mean(counts) < 160


def mirrored_uv(surface):
    return np.array([mirror_chart(p, c) for p, c in zip(surface.parts, surface.uv, strict=True)])


def test_colors_of_parts_are_the_looks():
    """Texture and chart belong together: the picture has a part's colour where the map has the part."""
    frame = frame_of(body(yaw=0, scale=105.0, centre=(100.0, 105.0)))
    surface, image = frame.surface(0), frame.image
    assert image.shape == (200, 200, 3) and frame.mask(0).sum() == len(surface.rows)
    inner = cv2.erode(frame.mask(0), np.ones((3, 3), np.uint8))[surface.rows, surface.columns] > 0
    colors = image[surface.rows, surface.columns].astype(float)
    # Sleeves end below the elbow.
    bare = np.isin(surface.parts, (19, 21)) & (surface.uv[:, 1] > 0.5)
    bare |= np.isin(surface.parts, (20, 22)) & (mirrored_uv(surface)[:, 1] > 0.5)
    hands, feet = np.isin(surface.parts, (3, 4)), np.isin(surface.parts, (5, 6))
    skin, shoes = LOOK.skin * 1.25, LOOK.shoes * 1.25
    for own, color in ((hands, skin), (bare, skin), (feet, shoes)):
        own = own & inner
        assert own.sum() > 20
        off = np.abs(colors[own] - np.clip(color, 0, 255)).max(axis=1)
        assert np.mean(off > 60) < 0.1


def test_from_behind_is_darker():
    """What looks away of torso, legs and arms has `back` times its colours; nothing else has."""
    mesh = body_mesh()
    normals = vertex_normals(pose_vertices(A_POSE))[mesh.triangles].mean(axis=1)
    behind = [p for p in range(1, 25) if normals[mesh.parts == p, 2].mean() > 0.5]
    assert len(behind) == 9
    even, dark = paint_charts(LOOK), paint_charts(dataclasses.replace(LOOK, back=0.4))
    factor = np.where(np.isin(np.arange(1, 25), behind), 0.4, 1)[:, None, None, None]
    np.testing.assert_allclose(dark[1:], even[1:] * factor, rtol=1e-6)
    looks = [draw_look(Draws(0, "test", "look", i)).back for i in range(20)]
    assert min(looks) >= 0.3 and max(looks) <= 0.5


def test_covers_and_persons_hide_what_is_behind(frames):
    front = body(centre=(100.0, 100.0))
    behind = body(yaw=90, centre=(110.0, 100.0))
    frame = frame_of(front, behind)
    assert frame.bodies == [0, 1]
    assert frame.mask(0).sum() == frame_of(front).mask(0).sum()
    assert frame.mask(1).sum() < frame_of(behind).mask(0).sum()
    assert not (frame.mask(0) & frame.mask(1)).any()
    assert len(frame.surface(1).rows) == frame.mask(1).sum()
    covered = next(f for f in frames if any(isinstance(item, Cover) for item in f.items))
    cover = next(i for i, item in enumerate(covered.items) if isinstance(item, Cover))
    with pytest.raises(ValueError, match="no person"):
        covered.surface(cover)
    for item in covered.bodies:
        assert not (covered.mask(item) & covered.mask(cover)).any()


# Clips.


def test_a_point_of_the_surface_keeps_its_place_through_a_clip():
    """A point on the mesh is followed from frame to frame: wherever it is seen, the pixel there has its
    part, U and V, and in even light its colour."""
    clip = draw_body_clip(0, "test", 1, 256, 256, 6)
    clip = [BodyFrame([dataclasses.replace(f.items[0], look=LOOK)], EVEN, 0.0, f) for f in clip]
    mesh, rng = body_mesh(), np.random.default_rng(0)
    triangles = rng.integers(len(mesh.triangles), size=3000)
    weights = rng.dirichlet((2, 2, 2), size=len(triangles))
    corners, uv = mesh.triangles[triangles], mesh.uv[triangles]
    uv = np.einsum("nk,nkc->nc", weights, uv)
    colors = [np.full((len(triangles), 3), np.nan) for _ in clip]
    places, seen_often = [], np.zeros(len(triangles), int)
    for time, frame in enumerate(clip):
        person = frame.items[0]
        points = np.einsum("nk,nkc->nc", weights, person.points[corners])
        normals = vertex_normals(pose_vertices(person.pose)) @ person.turn.T
        places.append(points[:, :2])
        surface = frame.surface(0)
        index = np.full((256, 256), -1)
        index[surface.rows, surface.columns] = np.arange(len(surface.rows))
        column, row = np.floor(points[:, :2]).astype(int).T
        within = (column >= 0) & (column < 256) & (row >= 0) & (row < 256)
        # Seen: turned to the camera, and what the pixel shows is no farther in front than it slopes.
        turned = np.einsum("nk,nkc->nc", weights, normals[corners])[:, 2] < -0.5
        pixel = np.where(within, index[row.clip(0, 255), column.clip(0, 255)], -1)
        rows, columns = person.places()
        depth = np.full((256, 256), np.inf)
        shown = person.points[mesh.triangles[person.shown.triangles], 2]
        inside = (rows >= 0) & (rows < 256) & (columns >= 0) & (columns < 256)
        depth[rows[inside], columns[inside]] = (person.shown.weights * shown).sum(axis=1)[inside]
        near = points[:, 2] < depth[row.clip(0, 255), column.clip(0, 255)] + 2.5
        seen = np.flatnonzero(turned & near & (pixel >= 0))
        assert len(seen) > 300
        same = surface.parts[pixel[seen]] == mesh.parts[triangles[seen]]
        assert same.mean() > 0.9  # the others lie within a pixel of a border
        error = np.abs(surface.uv[pixel[seen]] - uv[seen]).max(axis=1)[same]
        assert np.median(error) < 0.03 and np.quantile(error, 0.95) < 0.15
        colors[time][seen] = frame.image[row[seen], column[seen]]
        seen_often[seen] += 1
    moved = np.linalg.norm(places[-1] - places[0], axis=1)
    assert np.median(moved) > 3 and (seen_often > 3).sum() > 200
    change = np.abs(colors[-1] - colors[0]).max(axis=1)
    follow = np.isfinite(change)
    # Points that are not the same show what the pattern makes of it.
    others = np.abs(colors[-1][follow] - np.roll(colors[0][follow], 1, axis=0)).max(axis=1)
    assert np.mean(change[follow]) < 0.5 * np.mean(others)


# Sets.


def digest(frame):
    content = hashlib.blake2b(frame.image.tobytes(), digest_size=8)
    content.update(json.dumps(body_annotations(frame, 0)).encode())
    return content.hexdigest()


def test_pictures_do_not_depend_on_what_was_drawn_before(frames):
    assert digest(draw_bodies(0, "val", 3, 256, 256)) == digest(frames[3])
    assert digest(draw_bodies(1, "val", 3, 256, 256)) != digest(frames[3])
    assert digest(draw_bodies(0, "train", 3, 256, 256)) != digest(frames[3])
    first, again = (draw_body_clip(0, "val", 0, 64, 64, 2)[1] for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)


def test_pictures_are_varied_and_fair(frames):
    persons = [(f, i) for f in frames for i in f.bodies]
    assert {len(f.bodies) for f in frames} >= {1, 2, 3}
    sizes = [f.items[i].scale * 1.75 for f, i in persons]
    assert min(sizes) < 60 and max(sizes) > 170
    facing = [f.items[i].turn[2, 2] for f, i in persons]  # 1: to the camera, -1: away
    assert min(facing) < -0.8 and max(facing) > 0.8
    assert min(f.items[i].turn[1, 1] for f, i in persons) > 0.9  # upright
    shares = [
        frame.mask(item).sum() / len(frame.items[item].shown.pixels) for frame, item in persons
    ]
    assert min(shares) > 0.45 and 0.02 < np.mean(np.array(shares) < 0.9) < 0.7
    assert any(isinstance(item, Cover) for f in frames for item in f.items)


@pytest.fixture(scope="module")
def name():
    name = register_shapes_bodies(TINY, prefix="tiny")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_dicts_and_files(name):
    dicts, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    with PathManager.open(metadata.json_file) as f:
        content = json.load(f)
    given = [a for d in dicts for a in d["annotations"]]
    assert len(dicts) == len(content["images"]) == 6 and len(given) == len(content["annotations"])
    assert any("dp_x" in a for a in given)
    for entry, annotation in zip(content["annotations"], given, strict=True):
        for key in annotation.keys() - {"category_id", "bbox_mode"}:
            assert entry[key] == annotation[key]
        if "dp_x" in entry:
            assert len(entry["dp_masks"]) == 14 and entry["ref_model"] == BODY_MESH
            assert max(entry["dp_x"] + entry["dp_y"]) < 256 and min(entry["dp_x"]) > 0
    with PathManager.open(metadata.densepose_mesh, "rb") as f:
        assert f.read() == body_npz()
    assert metadata.evaluator_type == "densepose" and metadata.densepose_mesh_name == BODY_MESH
    assert PathManager.isfile(metadata.densepose_geodesics)
    assert PathManager.isfile(metadata.densepose_uv_symmetry)
    assert read_uv_symmetry(metadata.densepose_uv_symmetry).shape == (2, 24, 256, 256)
    assert set_from_name(TINY.name) == TINY and TINY.name == "val-6-160x128-seed3-bodies"
    assert load_shapes_bodies(TINY)[0]["annotations"] is not dicts[0]["annotations"]
    for split in ("train", "val"):
        assert f"shapes_{split}_bodies" in DatasetCatalog.list()


def test_export(tmp_path, capsys):
    arguments = [str(tmp_path), "--bodies", "--num", "2", "--size", "160x128", "--seed", "3"]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "annotations/densepose_val2017.json").read_text())
    assert [i["file_name"] for i in content["images"]] == ["000000000000.jpg", "000000000001.jpg"]
    image = cv2.imread(str(tmp_path / "val2017/000000000001.jpg"))[..., ::-1]
    assert np.abs(image.astype(float) - TINY.frame(1).image).mean() < 12
    assert read_uv_symmetry(tmp_path / "annotations/body_uv_symmetry.npz").shape[1] == 24
    assert (tmp_path / "annotations/body_geodesics.npy").read_bytes() == geodesics_npy()
    assert main(arguments) == 1 and "already holds" in capsys.readouterr().err
