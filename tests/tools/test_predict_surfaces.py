"""`d2ext predict` with surfaces of persons: pictures, IUV files, textures, points on a body, videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from d2ext.codecs.densepose import decode_result
from d2ext.config import load_config
from d2ext.data.densepose.charts import read_chart_triangles, read_chart_vertices
from d2ext.data.image_io import read_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.testing import tiny_config
from d2ext.tools import predict
from d2ext.utils.surfaces import SurfaceDrawer, apply_texture, atlas_tiles
from d2ext.utils.video import VideoReader
from tests.tools.test_predict_faces import run, save

DATA = "shapes_val_bodies"
THRESHOLD = ("--confidence-threshold", 0.0)


def surface_config(folder: Path, name: str, **options: Any) -> str:
    cfg = tiny_config("DensePose")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.2
    cfg.TEST.DETECTIONS_PER_IMAGE = 4
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (DATA,)
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return save(cfg, folder, name)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return surface_config(tmp_path_factory.mktemp("model"), "charts")


@pytest.fixture(scope="module")
def picture() -> str:
    return PathManager.get_local_path(DatasetCatalog.get(DATA)[4]["file_name"])


def test_files_of_surfaces(config: str, picture: str, tmp_path: Path) -> None:
    folders = ("--save-surfaces", tmp_path / "s", "--save-points", tmp_path / "p")
    found = run(config, tmp_path / "out", "--input", picture, *THRESHOLD, *folders)
    image, stem = read_image(picture, "BGR"), Path(picture).stem
    assert len(found) > 1
    iuv = cv2.imread(str(tmp_path / "s" / f"{stem}_{found[0]['image_id']}_IUV.png"))
    persons = cv2.imread(str(tmp_path / "s" / f"{stem}_{found[0]['image_id']}_INDS.png"), -1)
    assert persons.shape == image.shape[:2] and persons.dtype == np.uint8
    # The last is painted first.
    surface, numbers = np.zeros_like(image), np.zeros(image.shape[:2], np.uint8)
    mesh = read_chart_triangles(MetadataCatalog.get(DATA).densepose_mesh)
    charts = read_chart_vertices(MetadataCatalog.get(DATA).densepose_mesh)
    assert mesh.positions is not None
    for i in range(len(found), 0, -1):
        result = found[i - 1]
        values = decode_result(result["densepose"]["data"]).permute(1, 2, 0).numpy()
        assert list(values.shape) == [*result["densepose"]["shape"][1:], 3]
        x, y = (int(side) for side in result["bbox"][:2])
        there = values[..., 0] > 0
        surface[y : y + len(values), x : x + len(values[0])][there] = values[there]
        numbers[y : y + len(values), x : x + len(values[0])][there] = i
        points = np.load(tmp_path / "p" / f"{stem}_{result['image_id']}_{i}.npz")
        rows, columns = np.nonzero(there)
        assert np.array_equal(points["pixels"], np.stack([columns + x, rows + y], axis=1))
        assert np.array_equal(points["parts"], values[there][:, 0])
        # On the mean body, next to the vertex that is said to be nearest, which is on the part.
        away = np.linalg.norm(points["points"] - mesh.positions[points["vertices"]], axis=1)
        assert away.max(initial=0) < 0.1  # metres
        on_part = set(zip(charts.parts.tolist(), charts.vertices.tolist(), strict=True))
        pairs = zip(points["parts"].tolist(), points["vertices"].tolist(), strict=True)
        assert set(pairs) <= on_part
    assert np.array_equal(iuv, surface) and np.array_equal(persons, numbers)
    assert len(np.unique(persons)) > 2


def test_pictures(config: str, picture: str, tmp_path: Path) -> None:
    run(config, tmp_path / "s", "--input", picture, *THRESHOLD, "--save-surfaces", tmp_path)
    (path,) = tmp_path.glob("*_IUV.png")
    surface = cv2.imread(str(path)).transpose(2, 0, 1)
    image = read_image(picture, "BGR")
    rng = np.random.default_rng(0)
    atlas = rng.integers(0, 256, (120, 80, 3), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / "atlas.png"), atlas)
    for option, expected in (
        (("--draw", "u"), SurfaceDrawer("u")(image[:, :, ::-1], surface)[:, :, ::-1]),
        (("--draw", "isolines"), SurfaceDrawer("isolines")(image[:, :, ::-1], surface)[:, :, ::-1]),
        (
            ("--texture", tmp_path / "atlas.png"),
            apply_texture(image, surface, atlas_tiles(atlas)),
        ),
    ):
        out = tmp_path / option[0] / Path(str(option[1])).stem
        out.mkdir(parents=True)
        run(config, out / "x", "--input", picture, *THRESHOLD, *option)
        (drawn,) = (out / "x").glob("*.png")
        assert np.array_equal(cv2.imread(str(drawn)), expected)
    # Boxes and names, too.
    (drawn,) = (tmp_path / "s").glob("*.png")
    parts = SurfaceDrawer("parts")(image[:, :, ::-1], surface)[:, :, ::-1]
    close = (np.abs(cv2.imread(str(drawn)).astype(int) - parts) <= 2).all(axis=2).mean()
    assert 0.4 < close < 1


def test_a_video_with_a_texture(config: str, picture: str, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    image = read_image(picture, "BGR")
    for i in range(3):
        # 8, 9, 10: numbers, not letters, say the order.
        assert cv2.imwrite(str(frames / f"{8 + i}.png"), np.roll(image, 4 * i, axis=1))
    atlas = np.zeros((60, 40, 3), np.uint8)
    atlas[..., 1] = 255
    assert cv2.imwrite(str(tmp_path / "atlas.png"), atlas)
    command = ["--config-file", config, "--video-input", str(frames), "--output"]
    command += [str(tmp_path / "clip.mp4"), "--texture", str(tmp_path / "atlas.png")]
    assert predict.run([*command, *map(str, THRESHOLD), "--save-surfaces", str(tmp_path)]) == 0
    for i, frame in enumerate(VideoReader(tmp_path / "clip.mp4"), 1):
        persons = cv2.imread(str(tmp_path / f"{7 + i}_{i}_INDS.png"), -1) > 0
        inner = cv2.erode(persons.astype(np.uint8), np.ones((3, 3))) > 0
        assert inner.any()
        error = np.abs(frame.image[inner].astype(int) - (0, 255, 0))
        assert error.mean() < 50  # edges are blurred


def test_embeddings_by_their_mesh(picture: str, tmp_path: Path) -> None:
    mesh = MetadataCatalog.get(DATA)
    options = {
        "MODEL.ROI_DENSEPOSE_HEAD.PREDICTOR_NAME": "DensePoseEmbeddingPredictor",
        "MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBED_SIZE": 4,
    }
    charts = read_chart_vertices(mesh.densepose_mesh)
    count = int(charts.vertices.max()) + 1
    body = {"TYPE": "vertex_direct", "NUM_VERTICES": count}
    config = surface_config(
        tmp_path,
        "cse",
        **options,
        **{"MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS": {mesh.densepose_mesh_name: body}},
    )
    weights = torch.load(tmp_path / "cse.pth", weights_only=True)
    (name,) = (k for k in weights["model"] if k.endswith(".embeddings"))
    weights["model"][name] = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    torch.save(weights, tmp_path / "cse.pth")
    found = run(
        config, tmp_path / "out", "--input", picture, *THRESHOLD, "--save-surfaces", tmp_path
    )
    (output,) = BatchPredictor(load_config(config))([read_image(picture, "BGR")])
    assert len(output["instances"].pred_densepose.vertices[mesh.densepose_mesh_name]) == count
    on_charts = np.column_stack([charts.parts, charts.uv * 255]).astype(np.uint8)
    known = {tuple(row) for row in on_charts.tolist()}
    for result in found:
        parts, u, v = decode_result(result["densepose"]["data"]).flatten(1).tolist()
        assert {x for x in zip(parts, u, v, strict=True) if x[0]} <= known
    assert any(decode_result(r["densepose"]["data"])[0].any() for r in found)


def test_wrong_commands(config: str, picture: str, tmp_path: Path, capsys: Any) -> None:
    def message(*arguments: object, path: str = config) -> str:
        command = ["--config-file", path, "--input", picture, "--output", str(tmp_path / "out")]
        assert predict.run([*command, *map(str, arguments)]) in (1, 2)
        return capsys.readouterr().err

    assert "not merged from tiles" in message("--tile", 128, *THRESHOLD)
    assert "6 rows and 4 columns" in message("--texture", picture)
    np.savez(tmp_path / "half.npy", a=np.zeros(3))
    points = ("--save-points", tmp_path / "p", "--body")
    assert "no triangles" in message(*points, tmp_path / "half.npy.npz")
    np.save(tmp_path / "few.npy", np.zeros((7, 3)))
    mesh = PathManager.get_local_path(MetadataCatalog.get(DATA).densepose_mesh)
    assert "the body 7" in message(*points, mesh, tmp_path / "few.npy")
    boxes = tiny_config("CenterNet")
    other = save(boxes, tmp_path, "boxes")
    assert "predicts no surfaces" in message("--draw", "parts", path=other)
