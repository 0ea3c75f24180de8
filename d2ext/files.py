"""Writing files that appear only when complete."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

__all__ = ["atomic_write", "json_list"]


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under ``path`` only when it is complete on disk.

    The data goes to ``<path>.tmp-<process id>``, is flushed to the disk, and is then renamed. If
    the body raises (disk full, killed), ``path`` keeps what it held before and the temporary file
    is removed; after a kill the temporary file may stay behind.

    Args:
        path: local file name; its folder must exist.
        mode: ``"wb"`` or ``"w"`` (UTF-8).
    """
    name = os.fspath(path)
    temporary = f"{name}.tmp-{os.getpid()}"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


@contextmanager
def json_list(
    path: str | os.PathLike[str], *, key: str | None = None, others: Mapping[str, Any] | None = None
) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list element by element, without holding all of it in memory.

    Gives the function that appends an element (``ValueError`` for NaN and infinity, which JSON lacks).
    The file appears when the body ends without error, see :func:`atomic_write`.

    Args:
        path: local file name; its folder must exist.
        key: None for a plain list; otherwise the file holds an object, and the list is its ``key``.
        others: further members of that object, written after the list as they are then.
    """
    if key is None and others is not None:
        raise ValueError("`others` need a `key` for the list.")
    head = "[" if key is None else f"{{{json.dumps(key)}: ["
    count = 0

    with atomic_write(path, "w") as file:
        file.write(head)

        def write(element: Any) -> None:
            nonlocal count
            file.write((",\n" if count else "\n") + json.dumps(element, allow_nan=False))
            count += 1

        yield write
        file.write("\n]")
        if key is not None:
            for name, value in (others or {}).items():
                file.write(f", {json.dumps(name)}: {json.dumps(value)}")
            file.write("}")
        file.write("\n")
