"""Where files lie that d2ext computes and can compute again."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path


def cache_folder(part: str) -> Path:
    """A folder in the cache, made if necessary.

    The cache is ``$D2EXT_CACHE``, else ``d2ext`` in the user's cache folder; where that cannot be
    written, a temporary folder of this process.

    Args:
        part: path of the folder in the cache
    """
    given = os.environ.get("D2EXT_CACHE")
    if given:
        folder = Path(given, part)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = cache / "d2ext" / part
    if cache.is_absolute():  # else the user has no home
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(_temporary_folder().name, part)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def folder_to_fill(target: Path) -> Iterator[Path]:
    """An empty folder that becomes ``target`` when the block has filled it, whole or not at all.

    Where another process was faster, its folder stays: it holds the same.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise


@lru_cache(maxsize=1)
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """A private folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="d2ext-")
