"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2ext.files import atomic_write


def test_atomic_write_replaces_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with atomic_write(path, "w") as file:
        file.write("first")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="stop"), atomic_write(path, "w") as file:
        file.write("second")
        raise RuntimeError("stop")
    assert path.read_text() == "first"
    assert [x.name for x in tmp_path.iterdir()] == ["x.txt"]
