"""Images of every kind are read; broken ones give one kind of error that names the file."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image

from d2ext.data import ImageReadError, read_image
from d2ext.data.image_io import ImageCache, read_label_map

COLORS = np.array([[[200, 100, 50], [0, 255, 10]]], np.uint8)  # 1×2, RGB


def save(image: Image.Image, path, **kwargs) -> str:
    image.save(path, **kwargs)
    return str(path)


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L", "YUV-BT.601", None])
def test_ordinary_images_as_detectron2_reads_them(tmp_path, image_format):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    file = save(Image.fromarray(pixels), tmp_path / "a.png")
    expected = detection_utils.read_image(file, image_format)
    result = read_image(file, image_format)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)


def test_default_is_bgr(tmp_path):
    file = save(Image.fromarray(COLORS), tmp_path / "a.png")
    image = read_image(file)
    np.testing.assert_array_equal(image, COLORS[:, :, ::-1])
    assert image.flags.c_contiguous  # what follows is slow otherwise


def test_grey(tmp_path):
    file = save(Image.fromarray(np.array([[0, 77, 255]], np.uint8)), tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(file)[0], [[0] * 3, [77] * 3, [255] * 3])


def test_one_bit(tmp_path):
    file = save(Image.fromarray(np.array([[False, True]])), tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(file)[0], [[0] * 3, [255] * 3])


def test_alpha_is_dropped(tmp_path):
    rgba = np.concatenate([COLORS, np.array([[[0], [128]]], np.uint8)], axis=2)
    file = save(Image.fromarray(rgba), tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(file, "RGB"), COLORS)
    grey_alpha = save(Image.fromarray(rgba[..., :1].repeat(2, 2), "LA"), tmp_path / "b.png")
    assert read_image(grey_alpha, "RGB")[0, 0].tolist() == [200] * 3


def test_palette(tmp_path):
    image = Image.fromarray(np.array([[1, 0]], np.uint8), "P")
    image.putpalette([0, 255, 10, 200, 100, 50])
    np.testing.assert_array_equal(read_image(save(image, tmp_path / "a.png"), "RGB"), COLORS)


def test_cmyk(tmp_path):
    image = Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).convert("CMYK")
    result = read_image(save(image, tmp_path / "a.jpg", quality=95), "RGB")
    assert np.abs(result.astype(int) - [255, 0, 0]).max() <= 6


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256, 257 * 3, 257 * 100, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        file = save(Image.fromarray(values), tmp_path / name)
        assert read_image(file)[0, :, 0].tolist() == [0, 0, 1, 3, 100, 255]


def test_float_images(tmp_path):
    file = save(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), tmp_path / "a.tif")
    assert read_image(file)[0, :, 0].tolist() == [0, 128, 255]
    file = save(Image.fromarray(np.array([[0, 200.0]], np.float32)), tmp_path / "b.tif")
    assert read_image(file)[0, :, 0].tolist() == [0, 200]
    for bad in (np.nan, np.inf, -1, 1000):
        file = save(Image.fromarray(np.array([[0, bad]], np.float32)), tmp_path / "c.tif")
        with pytest.raises(ImageReadError, match=r"c\.tif"):
            read_image(file)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(tmp_path, shape):
    file = save(Image.fromarray(np.full((*shape, 3), 9, np.uint8)), tmp_path / "a.png")
    result = read_image(file)
    assert result.shape == (*shape, 3) and (result == 9).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255  # left half white → top half after the rotation
    file = save(Image.fromarray(pixels), tmp_path / "a.jpg", exif=exif, quality=95)
    result = read_image(file)
    assert result.shape == (20, 10, 3)
    assert result[:8].min() > 200 and result[12:].max() < 50


def test_broken_exif_is_ignored(tmp_path):
    file = save(
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)),
        tmp_path / "a.jpg",
        exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage",
    )
    assert read_image(file).shape == (4, 6, 3)


def jpeg_bytes() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is not an image",
        jpeg_bytes()[:700],
        jpeg_bytes()[: len(jpeg_bytes()) // 2],
        b"\x89PNG\r\n\x1a\n" + b"\x00" * 40,
        b"GIF89a",
    ],
    ids=["empty", "text", "truncated header", "truncated", "broken PNG", "broken GIF"],
)
def test_broken_files(tmp_path, content):
    file = tmp_path / "broken.jpg"
    file.write_bytes(content)
    with pytest.raises(ImageReadError, match=r"Cannot read image '.*broken\.jpg'"):
        read_image(str(file))


def test_truncated_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ImageReadError, match=r"a\.png"):
        read_image(str(file))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageReadError, match=r"none\.jpg': there is no such file"):
        read_image(str(tmp_path / "none.jpg"))
    with pytest.raises(ImageReadError, match=tmp_path.name):
        read_image(str(tmp_path))


class TestLabelMap:
    def test_palette_indices_are_labels(self, tmp_path):
        labels = np.array([[0, 1], [2, 255]], np.uint8)
        image = Image.fromarray(labels, "P")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
        result = read_label_map(save(image, tmp_path / "a.png"))
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, labels)

    def test_sixteen_bits(self, tmp_path):
        labels = np.array([[0, 1000]], np.uint16)
        result = read_label_map(save(Image.fromarray(labels), tmp_path / "a.png"))
        np.testing.assert_array_equal(result, labels)

    def test_colour_image_is_refused(self, tmp_path):
        file = save(Image.fromarray(COLORS), tmp_path / "a.png")
        with pytest.raises(ImageReadError, match="one channel"):
            read_label_map(file)
        with pytest.raises(ImageReadError, match="no such file"):
            read_label_map(str(tmp_path / "none.png"))


def test_cache_keeps_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for i in range(3):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.full((10, 20, 3), 10 * i, dtype=np.uint8)).save(files[-1])
    read = []
    monkeypatch.setattr(
        "d2ext.data.image_io.read_image", lambda *a: (read.append(a[0]), read_image(*a))[1]
    )
    cache = ImageCache(1300)  # two images of 600 bytes
    for _ in range(2):
        for i, file in enumerate(files):
            image = cache(file, format="RGB")
            assert image.shape == (10, 20, 3) and (image == 10 * i).all()
            assert not image.flags.writeable
    assert read == [*files, files[2]]
    assert cache(files[0], format="L").shape[:2] == (10, 20)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_bits_that_are_used(tmp_path: Path, bits: int) -> None:
    values = np.linspace(0, 2**bits - 1, 1000).astype(np.uint16)[None]
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = read_image(str(tmp_path / "deep.png"), "L")[0, :, 0]
    assert (image[0], image[-1]) == (0, 255) and len(np.unique(image)) == 256
    np.testing.assert_allclose(image, values[0] / (2**bits - 1) * 255, atol=1)
    steps = np.arange(256, dtype=np.uint16)[None] << (bits - 8)  # as from a sensor of 8 bits
    Image.fromarray(steps).save(tmp_path / "steps.png")
    assert len(np.unique(read_image(str(tmp_path / "steps.png"), "L"))) == 256


def test_five_channels_are_named(tmp_path: Path) -> None:
    # TIFF's tags: width, height, bits, no compression, RGB, where the pixels are, channels, rows, bytes.
    values = (
        (256, 2),
        (257, 2),
        (258, 8),
        (259, 1),
        (262, 2),
        (273, 8),
        (277, 5),
        (278, 2),
        (279, 20),
    )
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values)
    head = struct.pack("<4sI20sH", b"II*\0", 28, bytes(20), len(values))
    (tmp_path / "bands.tif").write_bytes(head + tags + bytes(4))
    with pytest.raises(ImageReadError, match=r"bands\.tif.*channels.*: save those"):
        read_image(str(tmp_path / "bands.tif"))


def test_pages_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pages = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    image = read_image(str(tmp_path / "scan.tif"), "RGB")
    assert image[0, 0].tolist() == [255, 0, 0]
    assert "2 pages" in caplog.text


def test_large_images_have_a_limit_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (1000, 300)).save(tmp_path / "large.png")
    assert read_image(str(tmp_path / "large.png")).shape == (300, 1000, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ImageReadError, match="D2EXT_MAX_MEGAPIXELS"):
        read_image(str(tmp_path / "large.png"))


def test_heic_names_its_package(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(ImageReadError):  # the package, or the broken file
        read_image(str(tmp_path / "IMG_0001.HEIC"))
