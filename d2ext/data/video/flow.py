"""Optical flow: reading it, and what geometric augmentation makes of it."""

import numpy as np
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import Transform

from d2ext.data.errors import ImageReadError

# Middlebury: the number that files begin with, and the smallest value that means "unknown".
_MAGIC, _UNKNOWN = 202021.25, 1e9


def read_flow(file_name: str) -> np.ndarray:
    """A Middlebury ``.flo`` file.

    Returns:
        (H, W, 2) float32, x and y in pixels; NaN where the flow is unknown

    Raises:
        ImageReadError: no such file, or not one in this form
    """
    try:
        with PathManager.open(file_name, "rb") as f:
            data = f.read()
    except OSError as e:
        raise ImageReadError(f"Cannot read optical flow '{file_name}': {e}") from e
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != np.float32(_MAGIC):
        raise ImageReadError(f"'{file_name}' is no optical flow in Middlebury's form (.flo).")
    width, height = np.frombuffer(data, "<i4", 2, 4).tolist()
    if min(width, height) < 1 or len(data) != 12 + 8 * width * height:
        raise ImageReadError(
            f"Optical flow '{file_name}' has {len(data)} bytes, which are not those of "
            f"{height} x {width} pixels: it is truncated or not a .flo file."
        )
    flow = np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2)
    # Written so that NaN is unknown, too.
    return np.where((np.abs(flow) < _UNKNOWN).all(axis=2, keepdims=True), flow, np.float32(np.nan))


def transform_flow(
    flow: np.ndarray, transform: Transform, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The flow between two images that both were transformed.

    Every geometric transform of Detectron2 and d2ext is an affine map of coordinates. Values are taken
    from the nearest pixel, so that motions of two objects are not mixed.

    Args:
        flow: (H, W, 2) x and y in pixels; NaN is unknown
        transform: that was applied to both images
        height, width: of the result, pixels

    Returns:
        flow: (2, height, width) float32 in pixels of the result; 0 where it is not known
        valid: (height, width) bool, False outside of the image and where the flow is not known
    """
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    origin, right, down = transform.apply_coords(corners)
    linear = np.stack([right - origin, down - origin], axis=1)
    inverse = np.linalg.inv(linear)
    x = np.arange(width) + 0.5 - origin[0]
    y = (np.arange(height) + 0.5 - origin[1])[:, None]
    # Rounding must not lose the pixels at the border.
    columns = np.floor(inverse[0, 0] * x + inverse[0, 1] * y + 1e-6).astype(np.int64)
    rows = np.floor(inverse[1, 0] * x + inverse[1, 1] * y + 1e-6).astype(np.int64)
    inside = (columns >= 0) & (rows >= 0) & (columns < flow.shape[1]) & (rows < flow.shape[0])
    rows, columns = rows.clip(0, flow.shape[0] - 1), columns.clip(0, flow.shape[1] - 1)
    moved = flow[rows, columns] @ linear.T.astype(np.float32)
    valid = inside & ~np.isnan(moved).any(axis=2)
    moved[~valid] = 0
    return np.ascontiguousarray(moved.transpose(2, 0, 1)), valid
