"""Reading checkpoint files without running any code that they may contain.

A ``.pth`` file is a pickle, and a pickle is a program. Files come from strangers, so they are read
with ``torch.load(weights_only=True)``; the NumPy pickles of Detectron2's model zoo (``.pkl``) are
read by an unpickler that knows arrays and nothing else.
"""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["CheckpointError", "load_untrusted"]

# How torch.save(..., _use_new_zipfile_serialization=False) and PyTorch before 1.6 begin a file: a
# pickle of protocol 2 of the integer 0x1950A86A20F9469CFC6C (torch.serialization.MAGIC_NUMBER).
_LEGACY_TORCH_HEAD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_ZIP_HEAD = b"PK\x03\x04"
_PICKLE_HEAD = b"\x80"
_TEXT_HEADS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"<!doctype html": "a web page: the download failed, fetch the file again",
    b"<html": "a web page: the download failed, fetch the file again",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model. The message says what to do."""


def load_untrusted(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint file; no code in the file is run.

    Args:
        path: a local file: ``.pth``/``.pt`` as ``torch.save`` writes it (zip or the older format),
            or a NumPy pickle of the Detectron2 model zoo (``.pkl``). The content decides, not the
            name.

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
        head = file.read(64)
    if not head:
        raise CheckpointError(f"Checkpoint {name!r} is empty. Fetch or save it again.")
    if head.startswith(_ZIP_HEAD) or head.startswith(_LEGACY_TORCH_HEAD):
        return _load_torch(name)
    if head.startswith(_PICKLE_HEAD):
        return _load_numpy_pickle(name)
    for text, meaning in _TEXT_HEADS.items():
        if head.lstrip().lower().startswith(text):
            raise CheckpointError(f"{name!r} is not a checkpoint but {meaning}.")
    raise CheckpointError(
        f"{name!r} is not a checkpoint: it is neither a file of torch.save nor a pickle of arrays."
    )


def _load_torch(name: str) -> Any:
    try:
        return torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?) ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(_damaged(name, error)) from error
        raise CheckpointError(_refused(name, found.group(1))) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        # torch reports a damaged archive as RuntimeError or OSError, a short old-style file as
        # EOFError.
        raise CheckpointError(_damaged(name, error)) from error


def _load_numpy_pickle(name: str) -> Any:
    try:
        with open(name, "rb") as file:
            # Model-zoo files were pickled by Python 2; latin1 is what NumPy asks for to read them.
            data = _ArrayUnpickler(file, encoding="latin1").load()
    except _ForbiddenGlobal as error:
        raise CheckpointError(_refused(name, str(error))) from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
    ) as error:
        # A damaged pickle makes the unpickler fail in any of these ways.
        raise CheckpointError(_damaged(name, error)) from error
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


class _ForbiddenGlobal(pickle.UnpicklingError):
    """The text is the dotted name of the global that the pickle asks for."""


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """What Python 3 calls to rebuild ``bytes`` in a pickle of protocol 2."""
    if encoding != "latin1":
        raise _ForbiddenGlobal(f"_codecs.encode({encoding})")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """What stands for ``b""`` in a pickle of protocol 2."""
    return b""


def _array_globals() -> dict[tuple[str, str], Callable[..., Any]]:
    # Pickles name the functions by the module of the NumPy that wrote them: numpy.core up to 1.x,
    # numpy._core since 2.0. __reduce__ gives this NumPy's own functions without importing either.
    reconstruct: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode_latin1,
        ("__builtin__", "bytes"): _empty_bytes,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[module, "_reconstruct"] = reconstruct
        known[module, "scalar"] = scalar
    return known


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and scalars, OrderedDict, and what pickle itself builds (dict, list,
    str, numbers). Any other global raises `_ForbiddenGlobal` before it is looked up."""

    _known = _array_globals()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise _ForbiddenGlobal(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenGlobal("a persistent object")
