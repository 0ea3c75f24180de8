"""Reading and writing of videos with OpenCV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

# What OpenCV's own build can encode: no codec from outside is needed.
_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
VIDEO_SUFFIXES = tuple(_CODECS)
# Where a file or a camera does not tell its rate.
_DEFAULT_RATE = 25.0


class VideoError(ValueError):
    """A video cannot be read, or written under the given name."""


class VideoReader:
    """Frames of a video file or of a camera.

    Args:
        source: a file, or the number of a camera.

    Attributes:
        width, height: of the frames.
        rate: frames a second.
        length: frames that a file announces, or None.

    Raises:
        VideoError: the file is missing, empty or no video, or there is no such camera.
    """

    def __init__(self, source: str | Path | int) -> None:
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        if not isinstance(source, int) and not Path(source).is_file():
            raise VideoError(f"There is no video file '{source}'.")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        self.width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if not self._capture.isOpened() or self.width < 1 or self.height < 1:
            self._capture.release()
            raise VideoError(f"Cannot read {self.name} (empty, truncated or not a video?).")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and rate > 0 else _DEFAULT_RATE
        length = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.length = length if length > 0 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frames (height, width, 3), BGR, uint8."""
        while True:
            has_frame, frame = self._capture.read()
            if not has_frame:
                return
            yield frame

    def release(self) -> None:
        """Close the file or give the camera back."""
        self._capture.release()


def check_video_path(path: Path) -> None:
    """Raise :class:`VideoError` unless the suffix of ``path`` is one of :data:`VIDEO_SUFFIXES`."""
    if path.suffix.lower() not in _CODECS:
        raise VideoError(
            f"Cannot write a video '{path}': choose a name that ends with one of "
            f"{', '.join(VIDEO_SUFFIXES)}."
        )


@contextmanager
def video_writer(
    path: Path, width: int, height: int, rate: float
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a video that appears when the body ends without error.

    Gives the function that appends a frame (height, width, 3), BGR, uint8.

    Args:
        path: its suffix, one of :data:`VIDEO_SUFFIXES`, chooses container and codec; its folder must
            exist.
        width, height: of every frame.
        rate: frames a second.

    Raises:
        VideoError: unknown suffix.
        OSError: the file cannot be opened, or not all of it could be written.
    """
    check_video_path(path)
    count = 0
    # OpenCV chooses the container by the suffix, so it stays at the end of the temporary name.
    temporary = path.with_name(f"{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        codec = cv2.VideoWriter.fourcc(*_CODECS[path.suffix.lower()])
        writer = cv2.VideoWriter(str(temporary), codec, rate, (width, height))
        try:
            if not writer.isOpened():
                raise OSError(f"Cannot open '{path}' for writing.")

            def write(frame: np.ndarray) -> None:
                nonlocal count
                if frame.shape != (height, width, 3):
                    raise ValueError(f"Frame of shape {frame.shape}, expected {height}x{width}x3.")
                writer.write(np.ascontiguousarray(frame))
                count += 1

            yield write
        finally:
            writer.release()
        # OpenCV does not say that a disk is full: look whether all can be read back.
        if _readable_frames(temporary) < count:
            raise OSError(f"Cannot write all of '{path}': is the disk full?")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _readable_frames(path: Path) -> int:
    # Read, not asked of the header: some are written first, and announce what never followed.
    capture = cv2.VideoCapture(str(path))
    try:
        count = 0
        while capture.grab():
            count += 1
        return count
    finally:
        capture.release()
