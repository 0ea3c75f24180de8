"""Reading images of every kind that people have, with one clear error for those that are broken."""

import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from detectron2.data.detection_utils import (
    SizeMismatchError,
    check_image_size,
    convert_PIL_to_numpy,
)
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from d2ext.data.errors import AnnotationError, ImageReadError

ImageReader = Callable[..., np.ndarray]

logger = logging.getLogger(__name__)

# Images of more pixels are refused: a few kilobytes may unpack to a machine's memory. The variable
# raises the limit; Pillow's own (which it refuses at twice) must not be lower.
MAX_MEGAPIXELS = float(os.environ.get("D2EXT_MAX_MEGAPIXELS", "400"))
Image.MAX_IMAGE_PIXELS = int(max(MAX_MEGAPIXELS * 1e6 / 2, Image.MAX_IMAGE_PIXELS or 0))

# Kinds of ISO media files that hold HEIC pictures.
_HEIC = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
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
    - Of 16-bit grey values the upper 8 of the bits that are used (8, 10, 12 or 16: cameras write 12 bits
      into files of 16) are taken; Pillow would clip them at 255.
    - Of a file with several pages the first is read, and the log says so.
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
        bgr = format == "BGR"
        array = convert_PIL_to_numpy(_to_8_bit(_upright(image)), "RGB" if bgr else format)
    except _DECODER_ERRORS as e:
        raise _broken(file_name, "image", e) from e
    if array.size == 0:
        raise ImageReadError(f"Cannot read image '{file_name}': it has no pixels.")
    # Detectron2 gives a view with channels in reverse, whose copy, which resizing makes, takes NumPy a
    # dozen times as long.
    return cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if bgr else array


def is_image(file_name: str) -> bool:
    """Whether a file begins like an image of a kind that is known, whatever its name; broken ones
    with the name of an image count, so that they are told."""
    if file_name.lower().endswith((".jpg", ".jpeg", ".png")):
        return True
    with open(file_name, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = f.read(12)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
            return True
        f.seek(0)
        try:
            Image.open(f)
        except Image.DecompressionBombError:
            return True
        except _DECODER_ERRORS:
            return False
    return True


def as_bgr(image: str | os.PathLike[str] | Image.Image | np.ndarray) -> np.ndarray:
    """An image of any kind as ``DefaultPredictor`` takes it.

    Args:
        image: path, see :func:`read_image`; Pillow image; or array, H×W, H×W×1, H×W×3 in BGR or H×W×4 in
            BGRA, of uint8, of uint16 in [0, 65535], or of floats in [0, 1] or in [0, 255]

    Returns:
        H×W×3 uint8, BGR

    Raises:
        ImageReadError: anything else
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.fspath(image), "BGR")
    try:
        if isinstance(image, Image.Image):
            array = convert_PIL_to_numpy(_to_8_bit(_upright(image)), "BGR")
        elif isinstance(image, np.ndarray):
            array = _bgr_of_array(image)
        else:
            raise TypeError(f"{type(image).__name__} is no path, Pillow image or NumPy array")
    except _DECODER_ERRORS as e:
        raise ImageReadError(f"Cannot use the image: {e}.") from e
    if array.size == 0:
        raise ImageReadError("Cannot use the image: it has no pixels.")
    return np.ascontiguousarray(array)


def _bgr_of_array(array: np.ndarray) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(f"an array of shape {array.shape}; expected H×W, or H×W×1, ×3 or ×4")
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise ValueError(f"an array of {array.dtype}; expected uint8, uint16 or floats")
    if array.size == 0:
        return array
    bytes_ = _bytes_of(array).reshape(*array.shape[:2], channels)
    return bytes_.repeat(3, axis=2) if channels == 1 else bytes_[:, :, :3]


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


def label_bits(file_name: str) -> int:
    """Bits of a pixel of a label map: 1, 8, 16 or 32."""
    mode = _open(file_name, "label map").mode
    return {"1": 1, "I": 32, "F": 32}.get(mode, 16 if mode.startswith("I;16") else 8)


def label_values(labels: np.ndarray) -> list[int]:
    """Which values a label map of :func:`read_label_map` has, ascending."""
    if labels.dtype == np.uint8:  # twenty times as fast
        return np.flatnonzero(np.bincount(labels.reshape(-1))).tolist()
    return np.unique(labels).astype(int).tolist()


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
            head = f.read(12)
            f.seek(0)
            if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
                _register_heic()
            image = Image.open(f)
            pages = getattr(image, "n_frames", 1)  # first: counting leaves a TIFF unread
            image.load()
    except FileNotFoundError as e:
        raise ImageReadError(f"Cannot read {what} '{file_name}': there is no such file.") from e
    except UnidentifiedImageError as e:
        if head[:4] not in _TIFF:
            raise _broken(file_name, what, e) from e
        raise ImageReadError(
            f"Cannot read {what} '{file_name}': it is a TIFF of a kind that Pillow lacks, such as one "
            "of 2 or more than 4 channels. Images have 1, 3 or 4 channels, and the model sees three of "
            "them: save those that it is to see."
        ) from e
    except ImportError as e:
        raise ImageReadError(f"Cannot read {what} '{file_name}': {e}.") from e
    except Image.DecompressionBombError as e:
        raise ImageReadError(
            f"The {what} '{file_name}' is larger than the limit of {MAX_MEGAPIXELS:g} megapixels: set "
            "D2EXT_MAX_MEGAPIXELS in the environment to a higher one, or cut the image."
        ) from e
    except _DECODER_ERRORS as e:
        raise _broken(file_name, what, e) from e
    if pages > 1 and image.format != "MPO":  # a phone's stereo pair
        logger.warning("'%s' has %d pages: the first is read.", file_name, pages)
    return image


def _register_heic() -> None:
    """Let Pillow read phones' HEIC, where a package for it is installed."""
    try:
        import pillow_heif
    except ImportError:
        raise ImportError("it is a HEIC picture, `pip install pillow-heif` reads it") from None
    pillow_heif.register_heif_opener()


def _broken(file_name: str, what: str, error: Exception) -> ImageReadError:
    reason = str(error) or type(error).__name__
    return ImageReadError(
        f"Cannot read {what} '{file_name}': {reason} (empty, truncated or not an image?)"
    )


def stored_size(file_name: str) -> tuple[tuple[int, int], int]:
    """Height and width of an image file as it is stored, and its EXIF orientation (1: upright; 5 to 8
    exchange the sides). Reads the header alone; errors are Pillow's."""
    with PathManager.open(file_name, "rb") as f, Image.open(f) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return (image.height, image.width), orientation


def upright_size(file_name: str) -> tuple[int, int]:
    """Height and width of an image file as :func:`read_image` gives it; see :func:`stored_size`."""
    (height, width), orientation = stored_size(file_name)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, if the file has a readable one."""
    try:
        return ImageOps.exif_transpose(image)
    except (*_DECODER_ERRORS, AttributeError):
        # Cameras and editors write broken EXIF blocks; the pixels are fine.
        return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Bring deep modes (16-bit grey, 32-bit integer, float) to 8 bits; others stay as they are."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return Image.fromarray(_bytes_of(np.asarray(image)))
    return image


def _bytes_of(values: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] or [0, 255], or integers of 16 bits → uint8; uint8 as it is."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("the image has NaN or infinite values")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 255:
            raise ValueError(
                f"floating-point values in [{low:g}, {high:g}]; expected [0, 1] or [0, 255]"
            )
        return np.rint(values * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixel values outside [0, 65535]")
    bits = next(bits for bits in (8, 10, 12, 16) if values.max() < 2**bits)
    return (values >> (bits - 8)).astype(np.uint8)  # the upper 8: 256 values stay 256
