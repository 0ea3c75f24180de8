"""Pictures of surfaces: styles, isolines, and textures without seams."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from d2ext.utils.surfaces import (
    STYLES,
    SurfaceDrawer,
    apply_texture,
    atlas_tiles,
    draw_isolines,
    texture_colors,
)


def test_tiles_lie_below_each_other() -> None:
    atlas = np.zeros((12, 8, 3), np.uint8)
    for column in range(4):
        for row in range(6):
            atlas[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 6 * column + row + 1
    assert np.array_equal(atlas_tiles(atlas)[:, 0, 1, 0], np.arange(1, 25))
    with pytest.raises(ValueError, match="6 rows and 4 columns"):
        atlas_tiles(atlas.transpose(1, 0, 2))


def test_texture_is_bilinear_within_a_tile() -> None:
    """U to the right, V up; on the edge of a tile nothing of its neighbours."""
    side = 5
    tiles = np.full((24, side, side, 3), 255.0)
    steps = np.arange(side) / (side - 1)
    tiles[6, ..., 0] = 200 * steps
    tiles[6, ..., 1] = 100 * steps[::-1, None]
    tiles[6, ..., 2] = 0
    u, v = np.random.default_rng(0).random((2, 300))
    u[:4], v[:4] = (0, 0, 1, 1), (0, 1, 0, 1)
    colors = texture_colors(tiles, np.full(300, 7), u, v)
    expected = np.stack([200 * u, 100 * v, 0 * u], axis=1)
    np.testing.assert_allclose(colors, expected, atol=1e-4)


def test_styles_change_persons_only() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    surface = np.zeros((3, 40, 30), np.uint8)
    surface[0, 10:30, 5:25] = 2
    surface[0, 10:30, 15:25] = 9
    surface[1] = np.linspace(0, 255, 30)
    surface[2] = np.linspace(0, 255, 40)[:, None]
    inside = surface[0] > 0
    drawn = [SurfaceDrawer(style)(image, surface) for style in STYLES]
    around = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3))) > 0
    for picture in drawn:
        assert np.array_equal(picture[~around], image[~around])
        assert (picture != image)[inside].any()
    assert all((drawn[i] != drawn[j]).any() for i in range(4) for j in range(i))
    tiles = np.zeros((24, 3, 3, 3), np.uint8)
    tiles[1], tiles[8] = 70, 140
    textured = SurfaceDrawer(tiles=tiles)(image, surface)
    assert (textured[10:30, 5:15] == 70).all() and (textured[10:30, 15:25] == 140).all()


def test_isolines_are_where_u_and_v_step() -> None:
    surface = np.zeros((3, 60, 60), np.uint8)
    surface[0] = 3
    surface[1] = np.arange(60) * 255 // 59
    surface[2] = 128
    picture = draw_isolines(np.zeros((60, 60, 3), np.uint8), surface)
    columns = np.flatnonzero(picture[30].any(axis=1))
    assert len(columns) == 9  # 0.1 to 0.9
    np.testing.assert_allclose(surface[1, 30, columns] / 255, np.arange(1, 10) / 10, atol=0.02)
    assert (picture == picture[:1]).all()


def test_a_published_result_and_atlas(real_data: Path) -> None:
    """The atlas shows the mesh's triangles, white on black: a published IUV picture lands on them only
    if parts, U and V are understood."""
    folder = real_data / "densepose"
    atlas = cv2.imread(str(folder / "texture_atlas_200.png"))
    surface = cv2.imread(str(folder / "demo_im_IUV.png")).transpose(2, 0, 1)
    chart = cv2.morphologyEx(atlas, cv2.MORPH_CLOSE, np.ones((9, 9)))
    image = np.zeros((*surface.shape[1:], 3), np.uint8)
    textured = apply_texture(image, surface, atlas_tiles(chart))
    assert (textured[surface[0] > 0] > 128).mean() > 0.985  # 0.99; with V down 0.96
