"""scripts/bootstrap.py: what stops an installation, what repeats it, what it shows."""

from __future__ import annotations

import collections
import importlib.util
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
    monkeypatch.setattr(module, "NEWEST_VENV", tmp_path / ".venv-newest")
    monkeypatch.setattr(module, "STAMPS", tmp_path / "stamps")
    module.STAMPS.mkdir()
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
    assert message in str(stopped.value.code)


def test_complete_prerequisites_do_not_stop(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 100e9))
    bootstrap.check_prerequisites()


def test_pip_failure_stops_with_advice(
    bootstrap: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="disk full, the package index out of reach"):
        bootstrap.pip(Path(sys.executable), "install", "--no-index", "surely-no-such-package")
    assert "surely-no-such-package" in capfd.readouterr().err


def test_only_what_is_missing_is_added_and_what_is_there_keeps_its_version(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runtime.in").write_text(
        "# a comment\npytest==0.1  # not this version\nopencv-python-headless==9\n"
        "not-there<2 ; python_version > '3'\n"
    )
    (tmp_path / "dev.in").write_text("-r runtime.in\nnor-this\n")
    (tmp_path / "unresolved.txt").write_text("neither==1\n")
    monkeypatch.setattr(bootstrap, "REQUIREMENTS", tmp_path)
    calls = []

    def pip(python: Path, *words: str, **variables: str) -> None:
        if "-c" in words:
            assert f"pytest=={pytest.__version__}\n" in Path(words[2]).read_text()
        calls.append([word for word in words if not word.startswith(("/", "-", "install"))])

    monkeypatch.setattr(bootstrap, "pip", pip)
    bootstrap.complete_environment(dev=False)
    bootstrap.complete_environment(dev=True)
    assert calls == [["not-there<2"], ["neither==1"], ["not-there<2", "nor-this"], ["neither==1"]]


def test_extension_is_built_again_only_after_a_change(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "d2ext").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    builds = []

    def build(python: Path) -> bool:
        builds.append(python)
        (tmp_path / "d2ext" / "d2ext_C.311.so").write_text("")
        return True

    torch = ["2.11.0", ".311.so"]
    facts = lambda *_, **__: f"{' '.join(torch)} {tmp_path / 'd2ext' / '__init__.py'}\n"  # noqa: E731
    monkeypatch.setattr(bootstrap.subprocess, "check_output", facts)
    linked = []
    monkeypatch.setattr(bootstrap, "pip", lambda *words, **_: linked.append(words))
    monkeypatch.setattr(bootstrap, "run_build", build)
    monkeypatch.delenv("D2EXT_BUILD", raising=False)

    def prepare() -> int:
        bootstrap.install_d2ext(Path(sys.executable))
        return len(builds)

    assert prepare() == 1
    assert prepare() == 1
    (tmp_path / "csrc" / "a.cpp").write_text("int b;")
    assert prepare() == 2
    (tmp_path / "d2ext" / "d2ext_C.311.so").unlink()
    assert prepare() == 3
    torch[0] = "2.12.0"  # of another environment, in whose place this one's library goes
    assert prepare() == 4
    (tmp_path / "setup.py").write_text("# changed")
    assert prepare() == 5
    monkeypatch.setenv("D2EXT_BUILD", "cpu")
    assert prepare() == 6
    assert len(linked) == 1
    (tmp_path / "pyproject.toml").write_text("# other commands")
    assert prepare() == 6 and len(linked) == 2


def test_build_shows_what_the_compiler_says_if_it_fails(
    bootstrap: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "setup.py").write_text("print('[d2ext] for the CPU'); print('[1/2] c++ -O3')")
    assert bootstrap.run_build(Path(sys.executable))
    assert capsys.readouterr().out == "[d2ext] for the CPU\n"
    (tmp_path / "setup.py").write_text("raise SystemExit('masks.cpp:7: error: expected ;')")
    assert not bootstrap.run_build(Path(sys.executable))
    assert "masks.cpp:7: error: expected ;" in capsys.readouterr().out


def test_a_long_build_says_that_it_goes_on(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bootstrap, "EVERY", 0.1)
    (tmp_path / "setup.py").write_text("import time; time.sleep(0.5)")
    assert bootstrap.run_build(Path(sys.executable))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and lines[0] == "[d2ext] still compiling: 0 s"


def test_failed_build_stops_with_advice_and_is_tried_again(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(bootstrap, "pip", lambda *_, **__: None)
    monkeypatch.setattr(bootstrap, "run_build", lambda python: False)
    for _ in range(2):
        with pytest.raises(SystemExit, match="D2EXT_BUILD=0"):
            bootstrap.install_d2ext(Path(sys.executable))
    assert not list((tmp_path / "stamps").glob("extension*"))


def test_finished_venv_is_left_alone_until_the_requirements_change(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for name in ("runtime.txt", "dev.txt", "unresolved.txt", "detectron2.txt"):
        (requirements / name).write_text(name)
    monkeypatch.setattr(bootstrap, "REQUIREMENTS", requirements)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    pip_package = tmp_path / ".venv/lib/python3/site-packages/pip"
    pip_package.mkdir(parents=True)
    (pip_package / "__main__.py").write_text("")
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(bootstrap, "pip", lambda python, *words, **env: installed.append(words))

    venv = tmp_path / ".venv"
    assert bootstrap.create_venv(True, venv) == python
    assert len(installed) == 2  # the pinned ones, and Detectron2
    bootstrap.create_venv(True, venv)
    bootstrap.create_venv(False, venv)  # a development environment holds all that the demo needs
    assert len(installed) == 2
    (requirements / "dev.txt").write_text("another version")
    bootstrap.create_venv(True, venv)
    assert len(installed) == 4
    venv.rename(bootstrap.NEWEST_VENV)
    (requirements / "dev.txt").write_text(
        "torch==2.11.0\nnvidia-nccl-cu13==2\nnumpy==1\ntriton==3\n"
    )
    bootstrap.create_venv(True, bootstrap.NEWEST_VENV)
    assert installed[4] == ("install", "torch!=2.13.0", "torchvision")
    assert str(bootstrap.NEWEST_VENV / "pins.txt") in installed[5] and len(installed) == 7
    assert (bootstrap.NEWEST_VENV / "pins.txt").read_text() == "numpy==1\n"
