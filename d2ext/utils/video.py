"""Reading and writing of videos: files and streams with PyAV, cameras with OpenCV."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

# Containers that are written, and what encodes in them: the first that PyAV was built with.
_CODECS = dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv"), ("libx264", "mpeg4")) | {
    ".avi": ("mjpeg",)
}
VIDEO_SUFFIXES = tuple(_CODECS)
# Where nothing tells a rate, frames a second.
DEFAULT_RATE = 25.0
# Rates above are time bases (a browser's WebM counts milliseconds).
_HIGHEST_RATE = 240.0
# Ticks a second of what is written: fine enough for any frame time, as MPEG has it.
_TICKS = 90_000
# A stream is opened again so many times in a row, after so many seconds.
_RECONNECTIONS, _PAUSE = 5, 1.0


class VideoError(ValueError):
    """A video cannot be read, or written under the given name."""


class VideoFrame(NamedTuple):
    """A picture of a video."""

    image: np.ndarray
    """(height, width, 3), BGR, uint8, upright."""
    time: float
    """Seconds since the beginning."""
    name: str = ""
    """Of the frame's file, where it has one."""


def is_stream(source: str) -> bool:
    """Whether ``source`` is an address (``rtsp://...``), not a file."""
    return "://" in source


class VideoReader:
    """Frames of a video file or a stream, turned as the file says; damaged ones are left out.

    Args:
        source: a file, or the address of a stream (``rtsp://``, ``http://``, ...), to which the
            connection is made again where it breaks.

    Attributes:
        rate: frames a second on average.
        length: frames that a file announces, or None.
        skipped: frames that could not be decoded so far.

    Raises:
        VideoError: the file is missing, empty or no video, or the stream does not answer.
    """

    def __init__(self, source: str | Path) -> None:
        self.name = str(source)
        self.skipped = 0
        self._live = False
        if not is_stream(self.name) and not Path(source).is_file():
            raise VideoError(f"There is no video file '{source}'.")
        self._open()
        stream = self._container.streams.video[0]
        announced = [float(x) for x in (stream.average_rate, stream.guessed_rate) if x]
        self.rate = next((x for x in announced if 0 < x <= _HIGHEST_RATE), DEFAULT_RATE)
        self.length = stream.frames or None
        # An address that ends somewhere is a file on a server.
        self._live = is_stream(self.name) and not self._container.duration

    def _open(self) -> None:
        import av

        options = {"rtsp_transport": "tcp"} if self.name.startswith("rtsp") else {}
        try:
            self._container: Any = av.open(self.name, options=options, timeout=10.0)
        except av.error.FFmpegError as error:
            what = "Cannot open stream" if is_stream(self.name) else "Cannot read"
            raise VideoError(
                f"{what} '{self.name}': {error.strerror} (empty, truncated or not a video?)."
            ) from error
        if not self._container.streams.video:
            raise VideoError(f"'{self.name}' has no pictures, only sound or text.")

    def __iter__(self) -> Iterator[VideoFrame]:
        import av

        failures, shown, start = 0, 0, time.monotonic()
        while True:
            try:
                for frame in self._decode():
                    # Streams count from anywhere, and anew when they are opened again.
                    seconds = time.monotonic() - start if self._live else frame.time
                    if seconds is None or not math.isfinite(seconds):
                        seconds = shown / self.rate
                    shown, failures = shown + 1, 0
                    image = frame.to_ndarray(format="bgr24")
                    # The file's angle is that of the picture, counter-clockwise.
                    yield VideoFrame(
                        np.ascontiguousarray(np.rot90(image, frame.rotation // 90)), seconds
                    )
            except av.error.FFmpegError as error:
                if not self._live:
                    self.skipped += 1  # the container itself is damaged: nothing more can be read
                    break
                failures += 1
                if failures > _RECONNECTIONS:
                    raise VideoError(f"Stream '{self.name}' is lost: {error.strerror}.") from error
            if not self._live:
                break
            time.sleep(_PAUSE * failures)
            self._container.close()
            self._open()
        if self.length is not None:
            self.skipped = max(self.skipped, self.length - shown)

    def _decode(self) -> Iterator[Any]:
        """Decoded frames; those that fail are counted."""
        import av

        for packet in self._container.demux(video=0):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                self.skipped += 1

    def release(self) -> None:
        """Close the file or the connection."""
        self._container.close()


class CameraReader:
    """Frames of a camera, as :class:`VideoReader` gives them.

    Args:
        number: of the camera, from 0.

    Raises:
        VideoError: there is no such camera.
    """

    length = None
    skipped = 0

    def __init__(self, number: int) -> None:
        self.name = f"camera {number}"
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            raise VideoError(f"There is no {self.name}, or another program uses it.")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and 0 < rate <= _HIGHEST_RATE else DEFAULT_RATE

    def __iter__(self) -> Iterator[VideoFrame]:
        start = time.monotonic()
        while True:
            success, image = self._capture.read()
            if not success:
                return
            yield VideoFrame(image, time.monotonic() - start)

    def release(self) -> None:
        """Give the camera back."""
        self._capture.release()


def check_video_path(path: Path) -> None:
    """Raise :class:`VideoError` unless the suffix of ``path`` is one of :data:`VIDEO_SUFFIXES`."""
    if path.suffix.lower() not in _CODECS:
        raise VideoError(
            f"Cannot write a video '{path}': choose a name that ends with one of "
            f"{', '.join(VIDEO_SUFFIXES)}."
        )


@contextmanager
def video_writer(path: Path, rate: float) -> Iterator[Callable[[np.ndarray, float | None], None]]:
    """Write a video that appears when the body ends without error.

    Gives the function that appends a picture (height, width, 3), BGR, uint8, and its time in seconds
    (None: the next at ``rate``). The first picture's size is that of the video, with a line repeated
    where a side is odd, as codecs want it; others are resized to it.

    Args:
        path: its suffix, one of :data:`VIDEO_SUFFIXES`, chooses container and codec; its folder must
            exist. AVI has a constant rate: there times do not count.
        rate: frames a second.

    Raises:
        VideoError: unknown suffix.
        OSError: the file cannot be opened, or not all of it could be written.
    """
    import av

    check_video_path(path)
    suffix = path.suffix.lower()
    codec = next(name for name in _CODECS[suffix] if name in av.codecs_available)
    timed = suffix != ".avi"
    # FFmpeg chooses the container by the suffix, so it stays at the end of the temporary name.
    temporary = path.with_name(f"{path.stem}.tmp-{os.getpid()}{path.suffix}")
    frame_rate = Fraction(rate).limit_denominator(1001)
    count, last = 0, -1
    try:
        with av.open(str(temporary), "w") as container:
            stream: Any = container.add_stream(codec, rate=frame_rate)
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"

            def write(image: np.ndarray, seconds: float | None = None) -> None:
                nonlocal count, last
                if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                    raise ValueError(
                        f"A frame of shape {image.shape}, {image.dtype}; not bytes, BGR."
                    )
                if count == 0:
                    stream.width, stream.height = (side + side % 2 for side in image.shape[1::-1])
                    if timed:
                        stream.codec_context.time_base = Fraction(1, _TICKS)
                height, width = image.shape[:2]
                if (width + width % 2, height + height % 2) != (stream.width, stream.height):
                    image = cv2.resize(image, (stream.width, stream.height))
                elif (height, width) != (stream.height, stream.width):
                    rows, columns = stream.height - height, stream.width - width
                    image = np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="bgr24")
                if timed:
                    ticks = round((count / rate if seconds is None else seconds) * _TICKS)
                    frame.time_base = Fraction(1, _TICKS)
                else:
                    ticks = count
                    frame.time_base = 1 / frame_rate
                frame.pts = last = max(ticks, last + 1)  # times go forward, whatever a camera says
                count += 1
                container.mux(stream.encode(frame))

            yield write
            if count:
                container.mux(stream.encode())
        if count == 0:
            raise OSError(f"There is no frame to write to '{path}'.")
        os.replace(temporary, path)
    except OSError as error:
        if error.filename != str(temporary):
            raise
        raise OSError(
            error.errno, error.strerror, str(path)
        ) from error  # the name that was asked for
    finally:
        temporary.unlink(missing_ok=True)
