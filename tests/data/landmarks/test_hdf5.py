"""The stacked hourglass's HDF5 files and COFW's, written here as they are published."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ext.config import load_config
from d2ext.data import build_mapper
from d2ext.data.errors import DatasetError
from d2ext.data.landmarks import instance_records, mapper, register_landmarks
from d2ext.data.landmarks.hourglass import HourglassDraws
from d2ext.evaluation.landmarks import LandmarkEvaluator, instance_norm
from d2ext.model_zoo import find_config_file
from tests.reference.fixture import Fixture, draw_image

h5py = pytest.importorskip("h5py")


@pytest.fixture
def name() -> Iterator[str]:
    made = f"landmarks_{uuid.uuid4().hex}"
    yield made
    if made in DatasetCatalog.list():
        DatasetCatalog.remove(made)
    MetadataCatalog.pop(made, None)


@pytest.mark.parametrize("codes", [False, True])
def test_hourglass_file_gives_the_published_samples(
    name: str, codes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ``train.h5`` and pictures through reader and mapper of the published config."""
    fixture = Fixture(Path(__file__).resolve().parents[2] / "reference/hourglass/data_and_eval")
    given = [fixture.manifest["inputs"][f"sample_{case}"] for case in "ab"]
    for number, seed in enumerate((3, 4)):
        picture = draw_image(400, 360, seed=seed)[:, :, ::-1]
        Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / f"{number}.png")
    images = [b"0.png", b"1.png"]
    points = np.array([g["keypoints_x_y_visible"] for g in given], dtype=np.float64)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["imgname"] = np.array([list(i) for i in images], np.float64) if codes else images
        file["center"] = np.array([g["center_xy"] for g in given])
        file["scale"] = np.array([g["scale"] for g in given])
        file["part"] = points[..., :2]
        file["visible"] = points[..., 2]
        file["normalize"] = 20 * np.array([g["scale"] for g in given])
    register_landmarks(name, "mpii", str(tmp_path / "train.h5"), str(tmp_path))
    cfg = load_config(find_config_file("landmarks/hourglass_2stack_mpii_256.yaml"))
    cfg.DATASETS.TRAIN = (name,)
    to_sample = build_mapper(cfg, is_train=True)
    records = instance_records(DatasetCatalog.get(name))
    for case, record, sample in zip("ab", records, given, strict=True):
        numbers = sample["random_numbers_in_order"]
        keys = ("rotation", "scale", "hue", "saturation", "brightness", "contrast")
        draws = HourglassDraws(flip=case == "a", **{k: numbers[k] for k in keys if k in numbers})
        monkeypatch.setattr(mapper, "draw_hourglass", lambda draws=draws: draws)
        result = to_sample(record)
        assert fixture.compare(f"training_image_{case}", result["image"] / 255) < 1e-6
        expected = fixture.expected[f"training_keypoints_{case}"]
        found = result["instances"].gt_keypoints.tensor[0].numpy()
        drawn = expected[:, 0] > 0
        np.testing.assert_array_equal(found[:, 2] > 0, drawn)
        np.testing.assert_allclose(found[drawn, :2] / 4, expected[drawn, :2], atol=1e-5)
    # The published metric's unit is the file's `normalize`.
    people = [a for r in DatasetCatalog.get(name) for a in r["annotations"]]
    units = instance_norm("hourglass", people, points, {})
    np.testing.assert_allclose(units, [20 * g["scale"] for g in given])
    assert "pck_hourglass" in LandmarkEvaluator(name, ["pck_hourglass"])._metrics


def cofw_file(path: Path, part: str = "Tr", points: int = 29) -> np.ndarray:
    """Two faces, one grey and one in colour, as MATLAB stores them: axes in reverse order."""
    rng = np.random.default_rng(0)
    values = np.round(rng.uniform(5, 35, (2, 3 * points)), 2)
    values[:, 2 * points :] = rng.integers(0, 2, (2, points))
    pictures = [
        rng.integers(0, 255, (40, 50), np.uint8),
        rng.integers(0, 255, (45, 60, 3), np.uint8),
    ]
    with h5py.File(path, "w") as file:
        file[f"phis{part}"] = values.T
        references = file.create_dataset(f"Is{part}", (1, 2), dtype=h5py.ref_dtype)
        for i, picture in enumerate(pictures):
            references[0, i] = file.create_dataset(f"#refs#/{i}", data=picture.T).ref
    return values


@pytest.mark.parametrize("part", ["Tr", "T"])
def test_cofw_file(name: str, part: str, tmp_path: Path) -> None:
    values = cofw_file(tmp_path / "COFW.mat", part)
    register_landmarks(name, "cofw", str(tmp_path / "COFW.mat"), str(tmp_path / "images"))
    first, second = DatasetCatalog.get(name)
    assert (first["width"], first["height"]) == (50, 40)
    rng = np.random.default_rng(0)
    rng.uniform(5, 35, (2, 87)), rng.integers(0, 2, (2, 29))
    grey, colour = (rng.integers(0, 255, s, np.uint8) for s in ((40, 50), (45, 60, 3)))
    np.testing.assert_array_equal(np.array(Image.open(first["file_name"])), grey)
    np.testing.assert_array_equal(np.array(Image.open(second["file_name"])), colour)
    points = np.array(second["annotations"][0]["keypoints"]).reshape(29, 3)
    # from 1-based indices to continuous coordinates
    np.testing.assert_allclose(points[:, 0], values[1, :29] - 0.5)
    np.testing.assert_allclose(points[:, 1], values[1, 29:58] - 0.5)
    np.testing.assert_array_equal(points[:, 2], 2 - values[1, 58:])


def test_wrong_files_are_explained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kind: str, file: str, message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            register_landmarks(name, kind, str(tmp_path / file), str(tmp_path))

    (tmp_path / "x.h5").write_text("x")
    refuse("mpii", "x.h5", "no HDF5 file")
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["part"] = np.zeros((1, 16, 2))
    refuse("mpii", "part.h5", "has no imgname, center, scale; it has part")
    refuse("cofw", "part.h5", "no form that is read")
    (tmp_path / "part.h5").rename(tmp_path / "part.mat")
    refuse("cofw", "part.mat", "neither IsTr and phisTr nor IsT and phisT")
    cofw_file(tmp_path / "few.mat", points=19)
    refuse("cofw", "few.mat", r"points of shape \(2, 57\), not \(N, 87\)")
    monkeypatch.setitem(sys.modules, "h5py", None)
    refuse("cofw", "few.mat", "needs h5py: pip install h5py")
