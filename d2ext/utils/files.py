"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; it is renamed to ``path`` if the body ends without error.

    The temporary file lies in the same folder, is hidden, and has the same suffix. After an error it
    is removed, and ``path`` keeps what it held. Missing folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that renaming is atomic; the same suffix, because OpenCV's writers
    # choose the format by it.
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def json_list(
    path: str | os.PathLike[str], *, key: str | None = None, others: Mapping[str, Any] | None = None
) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list element by element, so that it never lies in memory as a whole.

    Gives the function that appends an element (``ValueError`` for NaN and infinity, which JSON lacks).
    The file appears when the body ends without error, see :func:`replacing`.

    Args:
        path: the file.
        key: None for a plain list; otherwise the file holds an object, and the list is its ``key``.
        others: further members of that object, written after the list as they are then.
    """
    if key is None and others is not None:
        raise ValueError("`others` need a `key` for the list.")
    head = "[" if key is None else f"{{{json.dumps(key)}: ["
    count = 0

    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
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
