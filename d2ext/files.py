"""Writing files so that a reader never sees half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under ``path`` only when all of it is on disk.

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
