"""``shapes://`` paths: files of `shapes` that are drawn when they are opened.

The handler is registered with ``detectron2.utils.file_io.PathManager``, through which Detectron2
reads every image and annotation, so its mappers, evaluators and visualizers work on `shapes` as on
files.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from detectron2.utils.file_io import PathHandler, PathManager

from d2ext.data.cache import cache_folder, folder_to_fill
from d2ext.data.shapes.body_coco import bodies_json
from d2ext.data.shapes.body_tables import body_npz, geodesics_npy, uv_symmetry_npz
from d2ext.data.shapes.coco import (
    id_to_rgb,
    instances_json,
    keypoints_json,
    panoptic_json,
    tracks_json,
)
from d2ext.data.shapes.face_coco import MESH_FILE, faces_json
from d2ext.data.shapes.face_mesh import topology_obj
from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.sets import PREFIX, BodySet, FaceSet, ShapesSet, VideoSet, set_from_name
from d2ext.data.shapes.video import Clip, flow_bytes

__all__ = [
    "BODY_FILES",
    "ShapesPathHandler",
    "encode_png",
    "register_path_handler",
    "versioned_cache",
]


def encode_png(image: np.ndarray) -> bytes:
    """PNG of (H, W) uint8 or (H, W, 3) uint8 RGB, compressed fast rather than well."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _encode_bmp(image: np.ndarray) -> bytes:
    # At 256 x 256, BMP takes 0.02 ms to write and 0.2 ms to read; PNG at its fastest 7 and 0.4.
    return cv2.imencode(".bmp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def _pair(shapes: ShapesSet, number: int) -> tuple[Clip, int, int]:
    """Clip, source and target of pair `number`: source picture * length + time of the target."""
    assert isinstance(shapes, VideoSet)  # other sets have no folder that needs it
    index, target = divmod(number, shapes.length)
    return shapes.clip(index // shapes.length), index % shapes.length, target


def _encode_flow(shapes: ShapesSet, number: int) -> bytes:
    clip, source, target = _pair(shapes, number)
    return flow_bytes(clip.flow(source, target))


def _encode_occlusion(shapes: ShapesSet, number: int) -> bytes:
    clip, source, target = _pair(shapes, number)
    return encode_png(clip.occlusion(source, target))


_Encoder = Callable[[ShapesSet, int], bytes]
# Folder -> extension and contents of the files in it.
_PICTURES: dict[str, tuple[str, _Encoder]] = {
    "images": (".bmp", lambda shapes, i: _encode_bmp(shapes.frame(i).image)),
    "panoptic": (".png", lambda shapes, i: encode_png(id_to_rgb(shapes.frame(i).panoptic))),
    "sem_seg": (".png", lambda shapes, i: encode_png(shapes.frame(i).sem_seg)),
    "semantic": (".png", lambda shapes, i: encode_png(shapes.frame(i).semantic)),
}
_MOTION: dict[str, tuple[str, _Encoder]] = {
    "flow": (".flo", _encode_flow),
    "occlusion": (".png", _encode_occlusion),
}


def _tracks_json(shapes: ShapesSet) -> dict[str, Any]:
    assert isinstance(shapes, VideoSet)  # _annotations
    return tracks_json(shapes, lambda index: shapes.stem(index) + ".bmp")


def _faces_json(shapes: ShapesSet) -> dict[str, Any]:
    assert isinstance(shapes, FaceSet)  # _annotations
    return faces_json((i, shapes.stem(i) + ".bmp", f) for i, f in enumerate(shapes.frames()))


def _bodies_json(shapes: ShapesSet) -> dict[str, Any]:
    assert isinstance(shapes, BodySet)  # _annotations
    return bodies_json((i, shapes.stem(i) + ".bmp", f) for i, f in enumerate(shapes.frames()))


# Sets whose pictures take 15 ms and more to draw, longer than a small model trains on them: what was
# drawn once is kept in the cache, 0.2 MB a picture.
_CACHED = (FaceSet, BodySet)

_Content = dict[str, Any] | str | bytes
# The mesh of all bodies, its geodesics, and the symmetry of its charts.
BODY_FILES: dict[str, Callable[[], bytes]] = {
    "body.npz": body_npz,
    "body_geodesics.npy": geodesics_npy,
    "body_uv_symmetry.npz": uv_symmetry_npz,
}


def _body_file(name: str, shapes: ShapesSet) -> bytes:
    return BODY_FILES[name]()


_BODY_ANNOTATIONS: dict[str, Callable[[ShapesSet], _Content]] = {
    "densepose.json": _bodies_json,
    **{name: partial(_body_file, name) for name in BODY_FILES},
}
_FACE_ANNOTATIONS: dict[str, Callable[[ShapesSet], _Content]] = {
    "faces.json": _faces_json,
    MESH_FILE: lambda shapes: topology_obj(),
}
_ANNOTATIONS: dict[str, Callable[[ShapesSet], _Content]] = {
    "instances.json": lambda shapes: instances_json(_named(shapes)),
    "instances_rle.json": lambda shapes: instances_json(_named(shapes), "rle"),
    "keypoints.json": lambda shapes: keypoints_json(_named(shapes)),
    "panoptic.json": lambda shapes: panoptic_json(_named(shapes)),
    "tracks.json": _tracks_json,
}


def _named(shapes: ShapesSet) -> Iterator[tuple[int, str, Frame]]:
    for index, frame in enumerate(shapes.frames()):
        if shapes.is_annotated(index):
            yield index, shapes.stem(index) + ".bmp", frame


class ShapesPathHandler(PathHandler):
    """Serves ``shapes://<name of the set>/<folder>/<file>``, read-only; see :class:`ShapesSet`.

    ``get_local_path`` writes the file or the whole folder into a cache (``$D2EXT_CACHE``, else the
    user's cache folder), for libraries that want real paths. Heads and bodies are always read from
    there.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        self._check_kwargs(kwargs)
        if mode not in ("r", "rt", "rb"):
            raise PermissionError(f"{path}: shapes:// is read-only, cannot open with mode {mode!r}")
        if isinstance(_parse(path)[0], _CACHED):
            return open(self._get_local_path(path), mode)
        data = io.BytesIO(_locate(path)())
        return data if mode == "rb" else io.TextIOWrapper(data, encoding="utf-8")

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        read = None if self._isdir(path) else _locate(path)
        target = versioned_cache() / path.rstrip("/")[len(PREFIX) :]
        if target.exists() and not force:
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if read is not None:
            _write_atomically(target, read())
            return str(target)
        with folder_to_fill(target) as folder:
            self._fill(path.rstrip("/"), folder)
            if force:
                shutil.rmtree(target, ignore_errors=True)
        return str(target)

    def _fill(self, path: str, folder: Path) -> None:
        for name in self._ls(path):
            if self._isdir(f"{path}/{name}"):
                (folder / name).mkdir()
                self._fill(f"{path}/{name}", folder / name)
            else:
                (folder / name).write_bytes(_locate(f"{path}/{name}")())

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isdir(path) or self._isfile(path)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        try:
            _locate(path)
        except FileNotFoundError:
            return False
        return True

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        try:
            shapes, folder, name = _parse(path)
        except FileNotFoundError:
            return False
        return not name and folder in ("", "annotations", *_folders(shapes))

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        self._check_kwargs(kwargs)
        if not self._isdir(path):
            raise FileNotFoundError(f"{path}: no such folder")
        return list(_names(path.rstrip("/")))


def _locate(path: str) -> Callable[[], bytes]:
    """What draws the contents of a file; FileNotFoundError if there is no such file."""
    shapes, folder, name = _parse(path)
    annotations = _annotations(shapes)
    if folder == "annotations" and name in annotations:
        return lambda: _encode(annotations[name](shapes))
    folders = _folders(shapes)
    if folder not in folders:
        raise FileNotFoundError(
            f"{path}: no such file; there are annotations/{{{','.join(annotations)}}} and "
            + ", ".join(f"{f}/{next(iter(_names(f'{shapes.root}/{f}')))}" for f in folders)
        )
    _, encode = folders[folder]
    index = _names(f"{shapes.root}/{folder}").get(name)
    if index is None:
        raise FileNotFoundError(
            f"{path}: no such file; {folder}/ of {shapes.name} begins with "
            f"{next(iter(_names(f'{shapes.root}/{folder}')))} and holds {shapes.num_frames} pictures"
        )
    return lambda: encode(shapes, index)


def _encode(content: _Content) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def _folders(shapes: ShapesSet) -> dict[str, tuple[str, _Encoder]]:
    if isinstance(shapes, _CACHED):
        return {"images": _PICTURES["images"]}
    return {**_PICTURES, **_MOTION} if isinstance(shapes, VideoSet) else _PICTURES


def _annotations(shapes: ShapesSet) -> dict[str, Callable[[ShapesSet], _Content]]:
    if isinstance(shapes, BodySet):
        return _BODY_ANNOTATIONS
    if isinstance(shapes, FaceSet):
        return _FACE_ANNOTATIONS
    videos = isinstance(shapes, VideoSet)
    return {n: f for n, f in _ANNOTATIONS.items() if videos or n != "tracks.json"}


@lru_cache(maxsize=64)
def _names(path: str) -> dict[str, int]:
    """Names in a folder, in order; for a folder of pictures with the number of the picture, for one of
    motion with that of the pair."""
    shapes, folder, _ = _parse(path)
    if not folder:
        return dict.fromkeys([*_folders(shapes), "annotations"], 0)
    if folder == "annotations":
        return dict.fromkeys(_annotations(shapes), 0)
    extension = _folders(shapes)[folder][0]
    numbers = range(shapes.num_frames)
    if folder in _MOTION:
        assert isinstance(shapes, VideoSet)
        return {
            shapes.pair_stem(i, target) + extension: i * shapes.length + target
            for i in numbers
            for target in range(shapes.length)
        }
    return {shapes.stem(i) + extension: i for i in numbers}


def _parse(path: str) -> tuple[ShapesSet, str, str]:
    """Set, folder and file name ("" if absent) of a path; FileNotFoundError without such a set."""
    name, _, rest = path.rstrip("/").removeprefix(PREFIX).partition("/")
    folder, _, file_name = rest.partition("/")
    try:
        return set_from_name(name), folder, file_name
    except ValueError as error:
        raise FileNotFoundError(f"{path}: {error}") from error


@lru_cache(maxsize=1)
def _version() -> str:
    """Changes with the code that draws, so that a cache never serves what an older version drew."""
    digest = hashlib.blake2b(cv2.__version__.encode(), digest_size=6)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def versioned_cache() -> Path:
    """This version's folder in the cache."""
    return cache_folder(f"shapes/{_version()}")


def _write_atomically(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, target)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def register_path_handler() -> None:
    """Make ``shapes://`` known to Detectron2's path manager; again is harmless."""
    PathManager.register_handler(ShapesPathHandler(), allow_override=True)
