"""CenterNet's warp, mirror and colours against the published data sets, and on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fvcore.transforms.transform import TransformList

from d2ext.codecs.affine import affine_matrix, invert_affine
from d2ext.config import get_cfg
from d2ext.data import build_augmentations
from d2ext.data.augmentations import DetectionInput
from d2ext.data.augmentations.affine import PixelMirrorTransform, RandomAffineWarp, WarpTransform
from d2ext.data.augmentations.lighting import ColorLightingTransform, RandomColorLighting
from tests.reference.fixture import Fixture, draw_image

REFERENCE = Path(__file__).parents[1] / "reference"
# CenterNet's training mean and standard deviation, BGR in 0..1
MEAN = np.array([0.40789654, 0.44719302, 0.47026115])
STD = np.array([0.28863828, 0.27408164, 0.27809835])


def steps(tfm: Any) -> list[Any]:
    return tfm.transforms if isinstance(tfm, TransformList) else [tfm]


def test_matrices_are_the_published_ones() -> None:
    fixture = Fixture(REFERENCE / "centernet" / "preprocessing")
    # center, side, rotation, size (w, h), as the manifest lists them
    cases = [
        ((150, 200), 300, 0, (512, 512)),
        ((150.5, 99.25), 420, 0, (128, 96)),
        ((80, 60), 448, 0, (112, 80)),
        ((80, 60), 200, 17, (128, 128)),
        ((31, 77), 64, -30, (96, 128)),
    ]
    matrices = np.stack([affine_matrix(c, s, size, r) for c, s, r, size in cases])
    np.testing.assert_allclose(matrices, fixture.expected["affine"], rtol=1e-5, atol=1e-5)
    inverse = np.stack([invert_affine(m) for m in matrices])
    np.testing.assert_allclose(inverse, fixture.expected["affine_inverse"], rtol=1e-5, atol=1e-4)


class Numbers:
    """Stands in for NumPy's generator: the listed numbers, in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **lists: list[float]) -> None:
        self.lists = {name: list(values) for name, values in lists.items()}
        for name in ("choice", "randint", "uniform", "normal"):
            monkeypatch.setattr(np.random, name, getattr(self, name))

    def choice(self, values: Any) -> float:
        assert any(np.isclose(self.lists["choice"][0], v) for v in values)
        return self.lists["choice"].pop(0)

    def randint(self, *_: int) -> int:
        return int(self.lists["randint"].pop(0))

    def uniform(self, *_: float) -> float:
        return self.lists["random"].pop(0)

    def normal(self, mean: float, deviation: float, size: int = 1) -> np.ndarray:
        assert (mean, deviation) == (0, 1)
        return np.array([self.lists["randn"].pop(0) for _ in range(size)]).squeeze()


def test_rotation_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image turns, and the boxes do not."""
    fixture = Fixture(REFERENCE / "centernet" / "targets")
    inputs, name = fixture.manifest["inputs"], "pose_crop_flip_rotate"
    drawn = {k: np.atleast_1d(v) for k, v in inputs[name].items() if k != "meaning"}
    Numbers(monkeypatch, **drawn)
    listed = np.array(inputs["boxes_x1_y1_x2_y2_category"])
    aug_input = DetectionInput(draw_image(220, 260, seed=5), boxes=listed[:, :4])
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATION.NAME = "centernet"
    cfg.INPUT.AUGMENTATION.SIZE = 256
    cfg.INPUT.AUGMENTATION.AFFINE.ROTATE_PROB = 0.5
    build_augmentations(cfg, True)[0](aug_input)
    image = ((aug_input.image / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert fixture.compare(f"{name}_input", image) < 2e-4  # the published matrix is of float32
    boxes = np.clip(aug_input.boxes / 4, 0, 63)[:5]
    expected = fixture.expected[f"{name}_wh"][:5]
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], expected, atol=1e-4)
    cells = np.floor((boxes[:, :2] + boxes[:, 2:]) / 2)
    np.testing.assert_array_equal(
        cells[:, 1] * 64 + cells[:, 0], fixture.expected[f"{name}_ind"][:5]
    )


@pytest.mark.parametrize("name", ["plain", "crop_flip", "shift_scale"])
def test_warps_are_the_published_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warped image, and the centres and sizes of warped boxes."""
    fixture = Fixture(REFERENCE / "centernet" / "targets")
    inputs = fixture.manifest["inputs"]
    drawn = {"plain": {"random": [0.9]}}.get(name, inputs.get(name))
    Numbers(monkeypatch, **{k: np.atleast_1d(v) for k, v in drawn.items() if k != "meaning"})
    mode = {"plain": "letterbox", "crop_flip": "crop", "shift_scale": "shift"}[name]
    listed = np.array(inputs["boxes_x1_y1_x2_y2_category"])
    aug_input = DetectionInput(draw_image(220, 260, seed=5), boxes=listed[:, :4])
    RandomAffineWarp((256, 256), mode)(aug_input)
    image = ((aug_input.image / 255 - MEAN) / STD).transpose(2, 0, 1)
    assert fixture.compare(f"{name}_input", image) < 1e-5

    # The published code maps boxes right to output cells, a quarter of the pixels, in float32.
    boxes = np.clip(aug_input.boxes / 4, 0, 63)
    sides = (boxes[:, 2:] - boxes[:, :2])[:5]
    center = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:5]
    expected = fixture.expected
    np.testing.assert_allclose(sides, expected[f"{name}_wh"][:5], atol=1e-4)
    cells = np.floor(center)
    np.testing.assert_array_equal(cells[:, 1] * 64 + cells[:, 0], expected[f"{name}_ind"][:5])
    np.testing.assert_allclose(center - cells, expected[f"{name}_reg"][:5], atol=1e-4)
    # the last box lies outside the image
    assert (boxes[5, 2:] - boxes[5, :2]).min() == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_normal_numbers_are_cut(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves and angles at two deviations, the window's factor at one."""
    Numbers(monkeypatch, randn=[9.0 * sign, -9.0 * sign, 9.0 * sign, 9.0 * sign], random=[0.1, 0.9])
    augmentation = RandomAffineWarp((64, 64), "shift", rotate_prob=0.5, rotate=25.0)
    (warp,) = steps(augmentation.get_transform(np.zeros((100, 200, 3), np.uint8)))
    center, side = (100 + 40 * sign, 50 - 40 * sign), 200 * (1 + 0.4 * sign)
    np.testing.assert_allclose(warp.matrix, affine_matrix(center, side, (64, 64), 50.0 * sign))
    np.testing.assert_allclose(warp.box_matrix, affine_matrix(center, side, (64, 64)))


def test_mirror_moves_boxes_one_pixel_more_than_the_image() -> None:
    mirror = PixelMirrorTransform(100)
    np.testing.assert_array_equal(
        mirror.apply_box(np.array([[10.0, 5, 30, 20]])), [[69, 5, 89, 20]]
    )
    # a keypoint at the centre of the first pixel is at that of the last
    np.testing.assert_array_equal(mirror.apply_coords(np.array([[0.5, 3.0]])), [[99.5, 3.0]])
    image = np.arange(100, dtype=np.uint8)[None, :, None]
    np.testing.assert_array_equal(mirror.apply_image(image)[0, :, 0], np.arange(100)[::-1])


def test_labels_masks_and_new_area() -> None:
    # A window of 20 pixels whose left half lies outside the image.
    matrix = affine_matrix((0, 5), 20, (20, 10))
    tfm = WarpTransform(matrix, 10, 10, 20, 10)
    labels = np.full((10, 10), 7, np.int64)
    warped = tfm.apply_labels(labels)
    assert warped.dtype == np.int64
    assert (warped[:, :10] == 255).all() and (warped[:, 10:] == 7).all()
    mask = tfm.apply_segmentation(np.ones((10, 10), bool))
    assert mask.dtype == bool and not mask[:, :10].any() and mask[:, 10:].all()
    for dtype in (np.uint8, np.float32):
        image = tfm.apply_image(np.full((10, 10, 3), 9, dtype))
        assert image.dtype == dtype and not image[:, :10].any() and (image[:, 10:] == 9).all()


def test_what_leaves_the_window_is_cut() -> None:
    tfm = WarpTransform(affine_matrix((50, 50), 40, (80, 80)), 100, 100, 80, 80)
    boxes = np.array([[20.0, 40, 50, 60], [0, 0, 20, 20]])
    np.testing.assert_allclose(tfm.apply_box(boxes), [[0, 20, 40, 60], [0, 0, 0, 0]])
    square = np.array([[20.0, 40], [50, 40], [50, 60], [20, 60]])
    (polygon,) = tfm.apply_polygons([square, square - 100])
    # The centre of the first pixel is 0.5, before and after.
    assert polygon.min() == 0 and polygon[:, 0].max() == 39.5


def test_polygons_and_keypoints_follow_the_image_and_boxes_the_published_map() -> None:
    tfm = WarpTransform(affine_matrix((10, 10), 10, (40, 40)), 20, 20, 40, 40)
    image = np.zeros((20, 20), np.float32)
    image[8, 12] = 1.0
    y, x = np.unravel_index(tfm.apply_image(image).argmax(), (40, 40))
    # pixel (12, 8) and its centre
    np.testing.assert_allclose(tfm.apply_coords(np.array([[12.5, 8.5]])), [[x + 0.5, y + 0.5]])
    np.testing.assert_allclose(tfm.apply_box(np.array([[12.0, 8, 13, 9]])), [[x, y, x + 4, y + 4]])
    np.testing.assert_allclose(
        tfm.apply_coords(np.array([[-12.5, 8.5]])), [[x - 100 + 0.5, y + 0.5]]
    )


def test_windows_of_the_crop() -> None:
    np.random.seed(0)
    augmentation = RandomAffineWarp((64, 64), "crop", flip_prob=0.0)
    windows = []
    for _ in range(500):
        (warp,) = steps(augmentation.get_transform(np.zeros((300, 400, 3), np.uint8)))
        inverse = invert_affine(warp.matrix)
        windows.append([*(inverse @ [32, 32, 1]), inverse[0, 0] * 64])
    x, y, side = np.array(windows).T
    assert set(np.round(side / 400, 2)) == {0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3}
    # 128 pixels from the edges, in both axes
    assert x.min() >= 128 - 1e-6 and x.max() < 272 and y.min() >= 128 - 1e-6 and y.max() < 172
    assert x.min() < 131 and x.max() > 268


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (2, 1), (255, 256), (257, 100)])
@pytest.mark.parametrize("mode", ["crop", "shift", "letterbox"])
def test_extreme_shapes(size: tuple[int, int], mode: str) -> None:
    np.random.seed(0)
    for _ in range(20):
        aug_input = DetectionInput(
            np.zeros((*size, 3), np.uint8), boxes=np.array([[0.0, 0, size[1], size[0]]])
        )
        RandomAffineWarp((40, 50), mode)(aug_input)
        assert aug_input.image.shape == (40, 50, 3)
        assert (aug_input.boxes >= 0).all() and (aug_input.boxes <= [50, 40, 50, 40]).all()


def test_wrong_settings_are_explained() -> None:
    with pytest.raises(ValueError, match=r"AFFINE\.MODE"):
        RandomAffineWarp(mode="warp")
    with pytest.raises(ValueError, match="one pixel"):
        RandomAffineWarp(size=(0, 10))
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT"):
        RandomColorLighting(image_format="L")
    with pytest.raises(ValueError, match="order"):
        ColorLightingTransform(order=("brightness", "contrast", "hue"))
    with pytest.raises(ValueError, match="3 channels"):
        RandomColorLighting().get_transform(np.zeros((2, 2, 1), np.uint8))


class TestColours:
    def published(self, image_format: str) -> ColorLightingTransform:
        fixture = Fixture(REFERENCE / "cornernet" / "targets")
        drawn = fixture.manifest["inputs"]["colour_jitter"]
        brightness, contrast, saturation = (1 + x for x in drawn["uniform"])
        return ColorLightingTransform(
            brightness, contrast, saturation, drawn["lighting_normal"], image_format=image_format
        )

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    @pytest.mark.parametrize("image_format", ["BGR", "RGB"])
    def test_as_published(self, dtype: type, image_format: str) -> None:
        fixture = Fixture(REFERENCE / "cornernet" / "targets")
        order = slice(None) if image_format == "BGR" else slice(None, None, -1)
        image = draw_image(180, 240, seed=1).astype(dtype)[:, :, order]
        before = image.copy()
        result = self.published(image_format).apply_image(image)
        assert result.dtype == np.float32 and (image == before).all()
        result = result[:, :, order].transpose(2, 0, 1) / 255
        assert fixture.compare("colour_jitter", result) < 1e-5

    def test_nothing_is_clipped(self) -> None:
        bright = ColorLightingTransform(brightness=1.4).apply_image(
            np.full((2, 2, 3), 250, np.uint8)
        )
        np.testing.assert_allclose(bright, 350, rtol=1e-6)

    def test_grey_is_that_of_the_unchanged_image(self) -> None:
        """Saturation 0 after a change of brightness: the grey level before it."""
        image = np.random.default_rng(0).integers(0, 255, (4, 5, 3)).astype(np.float32)
        first = ColorLightingTransform(saturation=0.0).apply_image(image)
        later = ColorLightingTransform(brightness=1.3, saturation=0.0).apply_image(image)
        np.testing.assert_allclose(first, later, atol=1e-3)
        order = ("saturation", "brightness", "contrast")
        swapped = ColorLightingTransform(1.3, 1.0, 0.0, order=order).apply_image(image)
        np.testing.assert_allclose(swapped, 1.3 * first, rtol=1e-5)

    def test_distribution(self) -> None:
        np.random.seed(0)
        augmentation = RandomColorLighting(0.4, 0.1)
        drawn = [augmentation.get_transform(np.zeros((1, 1, 3), np.uint8)) for _ in range(1500)]
        for name in ("brightness", "contrast", "saturation"):
            values = np.array([getattr(t, name) for t in drawn])
            assert 0.6 <= values.min() < 0.61 and 1.39 < values.max() <= 1.4
        amounts = np.array([t.lighting for t in drawn])
        assert np.abs(amounts.std(axis=0) - 0.1).max() < 0.01
        assert len({tuple(t.order) for t in drawn}) == 6


def test_the_recipe() -> None:
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATION.NAME = "centernet"
    cfg.INPUT.AUGMENTATION.SIZE = 512
    warp, colors = build_augmentations(cfg, True)
    assert isinstance(warp, RandomAffineWarp) and warp.size == (512, 512) and warp.mode == "crop"
    assert warp.border == 128 and warp.flip_prob == 0.5
    assert isinstance(colors, RandomColorLighting) and colors.image_format == cfg.INPUT.FORMAT
    cfg.INPUT.AUGMENTATION.COLOR_JITTER = cfg.INPUT.AUGMENTATION.LIGHTING = 0.0
    assert len(build_augmentations(cfg, True)) == 1
    assert len(build_augmentations(cfg, False)) == 1
