"""Files that say what a surface is: meshes, distances on them, mirror tables."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from torch import Tensor

from d2ext.data.errors import DatasetError
from d2ext.pickles import checked, read_pickle


class MissingSurfaceFile(DatasetError):
    """A file of a surface is not there."""


def surface_file(path: str | os.PathLike[str], purpose: str) -> str:
    """The local path of a file.

    Args:
        path: as Detectron2's path manager knows it
        purpose: what the file is for, for messages

    Raises:
        MissingSurfaceFile: it does not exist
    """
    try:
        file = PathManager.get_local_path(os.fspath(path))
    except FileNotFoundError:
        file = ""
    if not os.path.isfile(file):
        raise MissingSurfaceFile(
            f"There is no file '{path}', {purpose}. The files of human bodies come with the DensePose "
            "project (CC BY-NC 4.0) and derive from the body model SMPL (its own licence, "
            "smpl.is.tue.mpg.de): d2ext does not bring them along."
        )
    return file


def read_arrays(path: str | os.PathLike[str], purpose: str = "arrays") -> dict[str, np.ndarray]:
    """The arrays of an .npy (under ""), .npz or .pkl file as float32; a pickle is read as data.

    Args:
        path, purpose: of :func:`surface_file`

    Raises:
        DatasetError: the file does not exist, or holds no arrays
    """
    file = surface_file(path, purpose)
    try:
        if file.endswith((".npy", ".npz")):
            content: Any = np.load(file, allow_pickle=False)
            content = content if isinstance(content, np.ndarray) else dict(content)
        else:
            with open(file, "rb") as stream:
                content = checked(read_pickle(stream))
    except (ValueError, IndexError, KeyError, TypeError, EOFError) as e:
        raise DatasetError(f"'{path}', {purpose}, cannot be read: {e}") from e
    if isinstance(content, np.ndarray):
        content = {"": content}
    if not isinstance(content, dict):
        raise DatasetError(f"'{path}' holds a {type(content).__name__}, not arrays by name.")
    arrays = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            arrays[str(name)] = value.astype(np.float32, copy=False)
        elif isinstance(value, Tensor):
            arrays[str(name)] = value.float().numpy()
    return arrays
