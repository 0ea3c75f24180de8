"""scripts/bootstrap.py: what stops an installation, what repeats it, what it shows."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module whose files lie in a temporary checkout."""
    specification = importlib.util.spec_from_file_location(
        "bootstrap", ROOT / "scripts/bootstrap.py"
    )
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMPS", tmp_path / "stamps")
    return module


@pytest.mark.parametrize(
    ("version", "missing", "free", "message"),
    [
        ((3, 99), None, 100e9, "no build for Python 3.99"),
        ((3, 11), "ensurepip", 100e9, "python3-venv"),
        ((3, 11), None, 2e9, "2.0 GB of free disk space"),
    ],
)
def test_missing_prerequisites_stop_with_advice(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: tuple[int, int],
    missing: str | None,
    free: float,
    message: str,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(bootstrap.sys, "version_info", version)
    monkeypatch.setattr(
        bootstrap.importlib.util,
        "find_spec",
        lambda name: None if name == missing else find_spec(name),
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    with pytest.raises(SystemExit) as stopped:
        bootstrap.check_prerequisites()
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_complete_prerequisites_do_not_stop(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 100e9))
    bootstrap.check_prerequisites()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "Collecting numpy==2.2.6 (from -r requirements/dev.txt (line 4))\n",
            "Collecting numpy==2.2.6",
        ),
        ("  Downloading torch-2.whl (530.6 MB)\n", "  downloading 530.6 MB"),
        ("  Downloading big.whl (1.2 GB)\n", "  downloading 1.2 GB"),
        ("  Downloading six.whl (1.6 MB)\n", None),
        (
            "ERROR: No matching distribution found for x\n",
            "ERROR: No matching distribution found for x",
        ),
        ("  Using cached something\n", None),
    ],
)
def test_progress_shows_packages_large_downloads_and_errors(
    bootstrap: ModuleType, line: str, shown: str | None
) -> None:
    assert bootstrap.progress_line(line) == shown


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: Retrying (Retry(total=0)) after connection broken by", "could not be reached"),
        ("ERROR: Could not find a version (from versions: none)", "could not be reached"),
        (
            "ERROR: No matching distribution found for torch==9 (from versions: 2.4)",
            "another Python",
        ),
    ],
)
def test_pip_failures_are_explained(bootstrap: ModuleType, line: str, advice: str) -> None:
    assert advice in bootstrap.pip_hint(["Collecting torch", line])


def test_pip_failure_stops_and_shows_its_output(
    bootstrap: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bootstrap.pip(Path(sys.executable), "install", "--no-index", "surely-no-such-package")
    assert "surely-no-such-package" in capsys.readouterr().err


def test_extension_is_built_again_only_after_a_change(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "d2ext").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    (tmp_path / "setup.py").write_text("")
    builds = []

    def build(python: Path) -> bool:
        builds.append(python)
        (tmp_path / "d2ext" / "d2ext_C.so").write_text("")
        return True

    monkeypatch.setattr(bootstrap, "run_build", build)
    monkeypatch.delenv("D2EXT_BUILD", raising=False)
    monkeypatch.setenv("CXX", "c++")
    facts = {"torch": "2.11.0", "nvcc": None, "d2ext": None, "setuptools": "80"}
    python = Path(sys.executable)

    def prepare() -> int:
        bootstrap.build_extension(python, facts)
        return len(builds)

    assert prepare() == 1
    assert prepare() == 1
    (tmp_path / "csrc" / "a.cpp").write_text("int b;")
    assert prepare() == 2
    (tmp_path / "d2ext" / "d2ext_C.so").unlink()
    assert prepare() == 3
    facts["torch"] = "2.12.0"
    assert prepare() == 4
    monkeypatch.setenv("D2EXT_BUILD", "0")
    assert prepare() == 4


def test_failed_build_shows_the_compiler_and_is_tried_again(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "setup.py").write_text("raise SystemExit('masks.cpp:7: error: expected ;')")
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.delenv("D2EXT_BUILD", raising=False)
    for _ in range(2):
        with pytest.raises(SystemExit):
            bootstrap.build_extension(Path(sys.executable), {"torch": "2", "nvcc": None})
        shown = capsys.readouterr().err
        assert "masks.cpp:7: error: expected ;" in shown
        assert "D2EXT_BUILD=0" in shown
    assert not (tmp_path / "stamps").exists()


def test_build_shows_one_line_per_file(
    bootstrap: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "csrc" / "masks.cpp"
    step = f"[1/2] c++ -O3 -Iinclude -c -c {source} -o masks.o"
    (tmp_path / "setup.py").write_text(f"print({step!r}); print('running build_ext')")
    assert bootstrap.run_build(Path(sys.executable))
    assert capsys.readouterr().out.split() == ["[1/2]", "csrc/masks.cpp"]


def test_finished_venv_is_left_alone_until_the_requirements_change(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for name in ("runtime.txt", "dev.txt", "unresolved.txt", "detectron2.txt"):
        (requirements / name).write_text(name)
    monkeypatch.setattr(bootstrap, "REQUIREMENTS", requirements)
    python = bootstrap.venv_python()
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(bootstrap, "pip", lambda python, *words, **env: installed.append(words))
    monkeypatch.setattr(bootstrap, "install_detectron2", lambda *a: None)

    assert bootstrap.create_venv(dev=True) == python
    assert len(installed) == 1
    bootstrap.create_venv(dev=True)
    bootstrap.create_venv(dev=False)  # a development environment holds all that the demo needs
    assert len(installed) == 1
    (requirements / "dev.txt").write_text("another version")
    bootstrap.create_venv(dev=True)
    assert len(installed) == 2


def test_stamp_is_whole(bootstrap: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "stamp.json"
    bootstrap.write_stamp(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["stamp.json"]
