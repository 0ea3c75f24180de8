"""Reading checkpoint files without running any code that they may contain.

A ``.pth`` file is a pickle, and a pickle is a program, so files of ``torch.save`` and the NumPy pickles
of Detectron2's model zoo (``.pkl``) are read by :mod:`d2ext.pickles`, which takes them as data.
(``torch.load(weights_only=True)`` runs no foreign code either, but builds much that no checkpoint holds,
and a small file can keep it busy for hours.) A file's kind is recognised by its content, not its name.
"""

import os
import struct
import zipfile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from d2ext.pickles import Refused, checked, read_pickle

__all__ = ["CheckpointError", "as_tensors", "load_untrusted"]

# How torch.save(..., _use_new_zipfile_serialization=False) and PyTorch before 1.6 begin a file: a
# pickle of protocol 2 of the integer 0x1950A86A20F9469CFC6C (torch.serialization.MAGIC_NUMBER).
_LEGACY_TORCH_HEAD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_ZIP_HEAD = b"PK\x03\x04"
_PICKLE_HEAD = b"\x80"
# How files begin that are no checkpoints of PyTorch, what they are, and what to do.
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"<!doctype html": "a web page: the download failed, fetch the file again",
    b"<html": "a web page: the download failed, fetch the file again",
    b"\x89hdf": "an HDF5 file (Keras?): d2ext reads weights of PyTorch",
    b"\x93numpy": "a single NumPy array: a checkpoint has named ones",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"bzh": "a bzip2 archive: unpack it first",
    b"7z\xbc": "a 7-Zip archive: unpack it first",
    b"gguf": "a GGUF file: d2ext reads weights of PyTorch",
    b"{": "a JSON file: name the file of the weights",
}
# A file may unpack to this many times its size, and to this many bytes in any case.
_MOST_UNPACKED, _LEAST_LIMIT = 16, 64 << 20


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model. The message says what to do."""


def load_untrusted(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint file; no code in the file is run.

    Args:
        path: a local file: ``.pth``/``.pt`` as ``torch.save`` writes it (zip or the older format),
            a NumPy pickle of the Detectron2 model zoo (``.pkl``), or a safetensors file.

    Returns:
        The object in the file, usually a dict; its tensors are on the CPU. A NumPy pickle holds
        ``numpy.ndarray`` where a ``.pth`` file holds tensors.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, cut short, not a checkpoint, or holds objects other
            than tensors, arrays, numbers, strings and containers of them.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"Checkpoint {name!r} does not exist or is not a file.")
    with open(name, "rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"Checkpoint {name!r} is empty. Fetch or save it again.")
    try:
        return checked(_read(name, head))
    except Refused as error:
        raise CheckpointError(_refused(name, str(error))) from error
    except CheckpointError:
        raise
    except _DAMAGED as error:
        raise CheckpointError(_damaged(name, error)) from error


def as_tensors(data: Any) -> Any:
    """The same with NumPy arrays and numbers, of which older pickles consist, as tensors.

    Raises:
        CheckpointError: an array of a type that PyTorch lacks.
    """
    if isinstance(data, dict):
        return {key: as_tensors(value) for key, value in data.items()}
    if not isinstance(data, np.ndarray | np.generic):
        return data
    try:
        return torch.from_numpy(np.asarray(data, data.dtype.newbyteorder("=")))
    except TypeError as error:
        raise CheckpointError(
            f"The checkpoint holds an array of type {data.dtype}, which PyTorch has not."
        ) from error


# How readers fail on damaged files: torch reports a damaged archive as RuntimeError or OSError, a short
# old-style file as EOFError; a damaged pickle fails in any of the others.
_DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
)


def _read(name: str, head: bytes) -> Any:
    # safetensors: the length of its JSON header, and the header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(name):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(name)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if head.startswith(_ZIP_HEAD):
        return _read_zip(name)
    if head.startswith(_LEGACY_TORCH_HEAD):
        with open(name, "rb") as file:
            return _read_legacy(file, os.path.getsize(name))
    if head.startswith(_PICKLE_HEAD):
        with open(name, "rb") as file:
            return read_pickle(file.read())
    for beginning, meaning in _OTHERS.items():
        if head.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{name!r} is not a checkpoint but {meaning}.")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{name!r} is not a checkpoint but a tar archive: unpack it first.")
    raise CheckpointError(
        f"{name!r} is not a checkpoint: it is neither a file of torch.save nor a pickle of arrays."
    )


def _read_zip(name: str) -> Any:
    size = os.path.getsize(name)
    with zipfile.ZipFile(name) as archive:
        entries = archive.infolist()
    names = {entry.filename.partition("/")[2] or entry.filename for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{name!r} is a TorchScript program, not a checkpoint: loading it would run it. Whoever "
            "made it can save its state_dict() with torch.save."
        )
    if "data.pkl" not in names:
        raise CheckpointError(
            f"{name!r} is a zip archive without a checkpoint: unpack it, and name the file of the "
            "weights."
        )
    unpacked = sum(entry.file_size for entry in entries)
    overlapping = sum(entry.compress_size for entry in entries) > size
    if overlapping or unpacked > max(_MOST_UNPACKED * size, _LEAST_LIMIT):
        raise CheckpointError(
            f"Checkpoint {name!r} has {size} bytes and would unpack to {unpacked}: it is refused."
        )
    return _read_torch_zip(name)


def _read_torch_zip(name: str) -> Any:
    reader = torch._C.PyTorchFileReader(name)
    if reader.has_record("byteorder") and reader.get_record("byteorder") != b"little":
        raise CheckpointError(f"Checkpoint {name!r} was written on a machine of other byte order.")
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            content = reader.get_record(f"data/{key}")
            storages[key] = torch.empty(len(content), dtype=torch.uint8)
            storages[key].numpy()[:] = np.frombuffer(content, np.uint8)
        if storages[key].numel() != count * dtype.itemsize:
            raise ValueError(f"storage {key} has not {count} elements of type {dtype}")
        return storages[key]

    return read_pickle(reader.get_record("data.pkl"), storage)


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """A file as PyTorch before 1.6 wrote it: pickles, and the storages' contents after them."""
    storages: dict[str, tuple[Tensor, int]] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            needed = count * dtype.itemsize + sum(len(known) for known, _ in storages.values())
            if needed > size:
                raise ValueError(f"storage {key} is larger than the file")
            storages[key] = torch.empty(count * dtype.itemsize, dtype=torch.uint8), count
        if storages[key][0].numel() != count * dtype.itemsize:
            raise ValueError(f"storage {key} has not {count} elements of type {dtype}")
        return storages[key][0]

    for _ in range(3):  # the magic number, the protocol's, facts of the machine
        read_pickle(file)
    data = read_pickle(file, storage)
    keys = read_pickle(file)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError("its storages are others than its tensors need")
    for key in map(str, keys):
        content, count = storages[key]
        (stored,) = struct.unpack("<q", file.read(8))
        if stored != count or file.readinto(content.numpy()) != len(content):  # type: ignore[attr-defined]
            raise ValueError(f"storage {key} is cut short")
    return data


def _damaged(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"Checkpoint {name!r} is damaged or cut short ({reason}). Fetch it again, or use an "
        "earlier checkpoint of the same run."
    )


def _refused(name: str, what: str) -> str:
    return (
        f"Checkpoint {name!r} holds {what!r}, which is not a tensor, array, number, string or "
        "container of these. Loading it would run code from the file, so it is refused. Ask its "
        "author for a file that holds only the state dict. If you trust the author, load it "
        "yourself in an isolated environment and save the plain state dict with torch.save."
    )
