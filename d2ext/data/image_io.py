"""Reading images of every kind that people have, with one clear error for those that are broken."""

import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.data.detection_utils import (
    SizeMismatchError,
    check_image_size,
    convert_PIL_to_numpy,
)
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from d2ext.data.errors import AnnotationError, ImageReadError

ImageReader = Callable[..., np.ndarray]

# What Pillow's decoders raise on broken files, beside OSError (whose subclasses are "no such file",
# "cannot identify image file" and "image file is truncated").
_DECODER_ERRORS = (
    OSError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(file_name: str, format: str | None = "BGR") -> np.ndarray:
    """Read an image file like ``detectron2.data.detection_utils.read_image``, and more kinds.

    - The EXIF orientation is applied. An unreadable EXIF block is ignored.
    - Grey, palette, CMYK and RGBA images become colour images; alpha is dropped.
    - 16-bit grey values are scaled from [0, 65535] to [0, 255] (Pillow would clip them at 255).
    - Floating-point images must be finite, in [0, 1] or in [0, 255].

    Args:
        file_name: path, or any address that Detectron2's ``PathManager`` opens
        format: ``"BGR"``, ``"YUV-BT.601"``, a Pillow mode such as ``"RGB"`` or ``"L"``,
            or None to keep the channels of the file

    Returns:
        H×W×C array, uint8 in [0, 255] (float64 for ``"YUV-BT.601"``); H×W×1 for ``"L"``

    Raises:
        ImageReadError: missing, empty, truncated or undecodable file, or zero pixels
    """
    image = _open(file_name, "image")
    try:
        array = convert_PIL_to_numpy(_to_8_bit(_upright(image)), format)
    except _DECODER_ERRORS as e:
        raise _broken(file_name, "image", e) from e
    if array.size == 0:
        raise ImageReadError(f"Cannot read image '{file_name}': it has no pixels.")
    return array


def read_record_image(
    record: dict[str, Any], format: str | None, reader: ImageReader = read_image
) -> np.ndarray:
    """The image of a data set dict, by :func:`read_image` or the like; ``height`` and ``width`` are set.

    Raises:
        SampleError: see :func:`read_image`; also a size other than the dict's
    """
    image = reader(record["file_name"], format=format)
    try:
        check_image_size(record, image)
    except SizeMismatchError as e:
        raise AnnotationError(str(e)) from e
    return image


class ImageCache:
    """:func:`read_image` that keeps images in memory, the first that come, until a limit is reached.

    For small sets that are read many times, and for images that are drawn when they are opened. Each
    worker of a loader has its own.
    """

    def __init__(self, max_bytes: int) -> None:
        self.free = max_bytes
        self._images: dict[tuple[str, str | None], np.ndarray] = {}

    def __call__(self, file_name: str, format: str | None = "BGR") -> np.ndarray:
        """As :func:`read_image`; the array may not be changed."""
        key = file_name, format
        image = self._images.get(key)
        if image is None:
            image = read_image(file_name, format)
            image.setflags(write=False)
            if image.nbytes <= self.free:
                self._images[key] = image
                self.free -= image.nbytes
        return image


def read_label_map(file_name: str) -> np.ndarray:
    """Read a single-channel image whose pixel values are labels (for example a ``sem_seg`` file).

    Unlike Detectron2's reader, which converts palette images to luminance, the values of palette
    and 16-bit files are taken as they are.

    Returns:
        H×W array, uint8 if all labels are below 256, otherwise float32 (exact for 16 bits; the
        type that Detectron2's resize and OpenCV's both take)

    Raises:
        ImageReadError: unreadable file, or a file with several channels
    """
    labels = np.asarray(_open(file_name, "label map"))
    if labels.ndim != 2 or labels.size == 0:
        raise ImageReadError(
            f"Label map '{file_name}' has shape {labels.shape}; expected one channel whose values "
            "are class ids."
        )
    return labels.astype(np.uint8 if labels.max() < 256 else np.float32)


def read_color_map(file_name: str) -> np.ndarray:
    """Read an image whose three 8-bit channels are one value (a panoptic PNG), as they are stored.

    Returns:
        H×W×3 uint8, R, G, B

    Raises:
        ImageReadError: unreadable file, or a file of another mode than RGB
    """
    image = _open(file_name, "panoptic map")
    if image.mode != "RGB" or 0 in image.size:
        raise ImageReadError(
            f"Panoptic map '{file_name}' has mode {image.mode} and size {image.size}; expected an "
            "RGB image whose pixels are segment ids R + 256 G + 65536 B."
        )
    return np.asarray(image)


def _open(file_name: str, what: str) -> Image.Image:
    """The decoded file; raises :class:`ImageReadError`."""
    try:
        with PathManager.open(file_name, "rb") as f, warnings.catch_warnings():
            # Large photographs are legitimate; Pillow still refuses files twice that large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(f)
            image.load()
            return image
    except FileNotFoundError as e:
        raise ImageReadError(f"Cannot read {what} '{file_name}': there is no such file.") from e
    except _DECODER_ERRORS as e:
        raise _broken(file_name, what, e) from e


def _broken(file_name: str, what: str, error: Exception) -> ImageReadError:
    reason = str(error) or type(error).__name__
    return ImageReadError(
        f"Cannot read {what} '{file_name}': {reason} (empty, truncated or not an image?)"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, if the file has a readable one."""
    try:
        return ImageOps.exif_transpose(image)
    except (*_DECODER_ERRORS, AttributeError):
        # Cameras and editors write broken EXIF blocks; the pixels are fine.
        return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Bring deep modes (16-bit grey, 32-bit integer, float) to 8 bits; others stay as they are."""
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("the image has NaN or infinite values")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 255:
            raise ValueError(
                f"floating-point values in [{low:g}, {high:g}]; expected [0, 1] or [0, 255]"
            )
        scale = 255.0 if high <= 1 else 1.0
        return Image.fromarray(np.rint(values * scale).astype(np.uint8))
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integer pixel values outside [0, 65535]")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image
