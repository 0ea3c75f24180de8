"""Videos as cameras, browsers and phones write them."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from d2ext.utils.video import VideoError, VideoReader, video_writer

av = pytest.importorskip("av")

FIELD = Path(__file__).resolve().parents[3] / "shared" / "field" / "cases"


def pictures(count: int, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """A white square that goes right, on grey: its place tells which frame it is."""
    images = np.full((count, *size, 3), 90, dtype=np.uint8)
    for i, image in enumerate(images):
        image[8:24, 2 * i : 2 * i + 12] = 255
    return list(images)


def written(
    path: Path, images: list[np.ndarray], rate: float = 25, times: list[float] | None = None
) -> Path:
    with video_writer(path, rate) as write:
        for i, image in enumerate(images):
            write(image, None if times is None else times[i])
    return path


def place(image: np.ndarray) -> float:
    """Column of the white square's left border."""
    bright = (image[12:20].mean(axis=(0, 2)) > 170).nonzero()[0]
    return float(bright.min())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_frames_come_back_in_order(tmp_path: Path, suffix: str) -> None:
    images = pictures(12)
    reader = VideoReader(written(tmp_path / f"x{suffix}", images))
    frames = list(reader)
    assert reader.rate == pytest.approx(25)
    assert [x.image.shape for x in frames] == [(48, 64, 3)] * 12
    np.testing.assert_allclose([place(x.image) for x in frames], [place(x) for x in images], atol=1)
    np.testing.assert_allclose([x.time for x in frames], np.arange(12) / 25, atol=1e-3)
    assert reader.skipped == 0


def test_times_are_kept(tmp_path: Path) -> None:
    times = [0.0, 0.114, 0.2, 0.9, 0.9, 3.9]
    reader = VideoReader(written(tmp_path / "x.mp4", pictures(6), times=times))
    np.testing.assert_allclose([x.time for x in reader], times, atol=1e-3)


def test_odd_sides_are_not_cut(tmp_path: Path) -> None:
    images = pictures(3, (47, 63))
    frames = list(VideoReader(written(tmp_path / "x.mp4", images)))
    assert frames[0].image.shape == (48, 64, 3)
    np.testing.assert_allclose(frames[0].image[:47, :63].astype(int), images[0], atol=30)


def test_pictures_of_other_sizes_are_resized(tmp_path: Path) -> None:
    images = [pictures(1, (48, 64))[0], pictures(1, (24, 32))[0]]
    frames = list(VideoReader(written(tmp_path / "x.mp4", images)))
    assert {x.image.shape for x in frames} == {(48, 64, 3)}


@pytest.mark.skipif(not FIELD.is_dir(), reason="needs ../shared/field")
def test_phones_turn_their_pictures() -> None:
    frame = next(iter(VideoReader(FIELD / "phone-rotated" / "phone.mp4")))
    assert frame.image.shape == (160, 96, 3)
    corner = frame.image[:20, :20].reshape(-1, 3).mean(axis=0)  # red is up on the left
    assert corner[2] > corner[0] + 50


@pytest.mark.skipif(not FIELD.is_dir(), reason="needs ../shared/field")
def test_browsers_count_milliseconds(tmp_path: Path) -> None:
    reader = VideoReader(FIELD / "browser-webm" / "recording.webm")
    assert reader.rate <= 240
    with video_writer(tmp_path / "x.mp4", reader.rate) as write:
        for frame in reader:
            write(frame.image, frame.time)
    frames = list(VideoReader(tmp_path / "x.mp4"))
    assert len(frames) == 40 and frames[-1].time == pytest.approx(3.9, abs=0.05)
    assert reader.skipped == 0


def test_damaged_frames_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "x.avi", pictures(20))
    content = bytearray(path.read_bytes())
    chunks = [i for i in range(len(content)) if content[i : i + 4] == b"00dc"]
    content[chunks[9] + 8 : chunks[11]] = bytes(chunks[11] - chunks[9] - 8)  # two pictures
    path.write_bytes(content)
    reader = VideoReader(path)
    frames = list(reader)
    assert 17 <= len(frames) < 20
    assert reader.skipped == 20 - len(frames)
    assert place(frames[-1].image) == pytest.approx(38, abs=1)  # those behind are there


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server on this machine that has the files of ``tmp_path``."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_addresses_play(tmp_path: Path, address: str) -> None:
    written(tmp_path / "clip.mkv", pictures(12))
    assert len(list(VideoReader(f"{address}/clip.mkv"))) == 12
    with pytest.raises(VideoError, match="Cannot open stream"):
        VideoReader(f"{address}/none.mkv")


@pytest.mark.parametrize("content", [b"", b"this is no video", bytes(5000)])
def test_files_that_are_no_videos(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"x\.mp4"):
        VideoReader(path)
    with pytest.raises(VideoError, match="no video file"):
        VideoReader(tmp_path / "absent.mp4")


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), video_writer(tmp_path / "x.mp4", 25) as write:
        write(pictures(1)[0], None)
        raise RuntimeError
    with pytest.raises(VideoError, match="choose a name"), video_writer(tmp_path / "x.gif", 25):
        pass
    assert not list(tmp_path.iterdir())
