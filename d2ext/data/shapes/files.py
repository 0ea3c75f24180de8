"""``shapes://`` paths: files of `shapes` that are drawn when they are opened.

The handler is registered with ``detectron2.utils.file_io.PathManager``, through which Detectron2 reads every
image and annotation, so its mappers, evaluators and visualizers work on `shapes` as on files.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from detectron2.utils.file_io import PathHandler, PathManager

from d2ext.data.shapes.coco import id_to_rgb, instances_json, keypoints_json, panoptic_json
from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.sets import PREFIX, ShapesSet

__all__ = ["ShapesPathHandler", "encode_png", "image_name", "register_path_handler"]


def image_name(index: int) -> str:
    """Name of an image without its extension: 12 digits, as in COCO."""
    return f"{index:012d}"


def encode_png(image: np.ndarray) -> bytes:
    """PNG of (H, W) uint8 or (H, W, 3) uint8 RGB, compressed fast rather than well."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _encode_bmp(image: np.ndarray) -> bytes:
    # At 256 x 256, BMP takes 0.02 ms to write and 0.2 ms to read; PNG at its fastest 7 and 0.4.
    return cv2.imencode(".bmp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


# Folder -> extension and contents of the files in it.
_FOLDERS: dict[str, tuple[str, Callable[[Frame], bytes]]] = {
    "images": (".bmp", lambda frame: _encode_bmp(frame.image)),
    "panoptic": (".png", lambda frame: encode_png(id_to_rgb(frame.panoptic))),
    "sem_seg": (".png", lambda frame: encode_png(frame.sem_seg)),
    "semantic": (".png", lambda frame: encode_png(frame.semantic)),
}
_ANNOTATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "instances.json": instances_json,
    "instances_rle.json": lambda frames: instances_json(frames, "rle"),
    "keypoints.json": keypoints_json,
    "panoptic.json": panoptic_json,
}


def _annotation_file(shapes: ShapesSet, name: str) -> bytes:
    frames = ((i, image_name(i) + ".bmp", frame) for i, frame in enumerate(shapes.frames()))
    return json.dumps(_ANNOTATIONS[name](frames)).encode()


class ShapesPathHandler(PathHandler):
    """Serves ``shapes://<name of the set>/<folder>/<file>``, read-only; see :class:`ShapesSet`.

    ``get_local_path`` writes the file or the whole folder into a cache (``$D2EXT_CACHE``, else the user's cache
    folder), for libraries that want real paths.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _read(self, path: str) -> bytes:
        shapes, folder, name = _parse(path)
        if folder == "annotations" and name in _ANNOTATIONS:
            return _annotation_file(shapes, name)
        if folder in _FOLDERS:
            extension, encode = _FOLDERS[folder]
            stem, found = os.path.splitext(name)
            if found == extension and stem.isdecimal() and len(stem) == 12:
                if int(stem) < shapes.num:
                    return encode(shapes.frame(int(stem)))
                raise FileNotFoundError(f"{path}: {shapes.name} has {shapes.num} images, from 0 on")
        raise FileNotFoundError(
            f"{path}: no such file; there are annotations/{{{','.join(_ANNOTATIONS)}}} and "
            + ", ".join(f"{f}/{image_name(0)}{e}" for f, (e, _) in _FOLDERS.items())
        )

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        self._check_kwargs(kwargs)
        if mode not in ("r", "rt", "rb"):
            raise PermissionError(f"{path}: shapes:// is read-only, cannot open with mode {mode!r}")
        data = io.BytesIO(self._read(path))
        return data if mode == "rb" else io.TextIOWrapper(data, encoding="utf-8")

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        target = _cache_folder() / path.rstrip("/")[len(PREFIX) :]
        if target.exists() and not force:
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self._isdir(path):
            _write_atomically(target, self._read(path))
            return str(target)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            filled = Path(temporary) / target.name
            self._fill(path.rstrip("/"), filled)
            if force:
                shutil.rmtree(target, ignore_errors=True)
            try:
                filled.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster, with the same files
                    raise
        return str(target)

    def _fill(self, path: str, folder: Path) -> None:
        folder.mkdir()
        for name in self._ls(path):
            if self._isdir(f"{path}/{name}"):
                self._fill(f"{path}/{name}", folder / name)
            else:
                (folder / name).write_bytes(self._read(f"{path}/{name}"))

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isdir(path) or self._isfile(path)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        folder, _, name = path.rpartition("/")
        return bool(name) and self._isdir(folder) and name in _names(folder)

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        try:
            _, folder, name = _parse(path)
        except FileNotFoundError:
            return False
        return not name and (not folder or folder in _FOLDERS or folder == "annotations")

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        self._check_kwargs(kwargs)
        if not self._isdir(path):
            raise FileNotFoundError(f"{path}: no such folder")
        return list(_names(path.rstrip("/")))


@lru_cache(maxsize=64)
def _names(path: str) -> dict[str, None]:
    """Names in a folder, in order (a dict, so that looking one up is fast)."""
    shapes, folder, _ = _parse(path)
    if not folder:
        return dict.fromkeys([*_FOLDERS, "annotations"])
    if folder == "annotations":
        return dict.fromkeys(_ANNOTATIONS)
    return dict.fromkeys(image_name(i) + _FOLDERS[folder][0] for i in range(shapes.num))


def _parse(path: str) -> tuple[ShapesSet, str, str]:
    """Set, folder and file name (each "" if absent) of a path; FileNotFoundError if there is no such set."""
    name, _, rest = path.rstrip("/").removeprefix(PREFIX).partition("/")
    folder, _, file_name = rest.partition("/")
    try:
        return ShapesSet.from_name(name), folder, file_name
    except ValueError as error:
        raise FileNotFoundError(f"{path}: {error}") from error


@lru_cache(maxsize=1)
def _version() -> str:
    """Changes with the code that draws, so that a cache never serves what an older version drew."""
    digest = hashlib.blake2b(cv2.__version__.encode(), digest_size=6)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _cache_folder() -> Path:
    """This version's folder in the user's cache; a private temporary one if that cannot be written."""
    chosen = os.environ.get("D2EXT_CACHE")
    if chosen:
        root = Path(chosen)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2ext"
    folder = root / f"shapes-{_version()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        if chosen:
            raise
    return _private_folder()


@lru_cache(maxsize=1)
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="d2ext-shapes-"))


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
