"""What is installed: the wheel's contents, and what ``import d2ext`` needs and loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Nothing of these may be needed to import d2ext. `detectron2._C` is Detectron2's compiled part and
# `d2ext._C` ours.
NOT_NEEDED = (
    "tensorboard",
    "torch.utils.tensorboard",
    "panopticapi",
    "hotcoco",
    "trackeval",
    "norfair",
    "scipy",
    "skimage",
    "black",
    "hydra",
    "ninja",
    "detectron2._C",
    "d2ext._C",
    "d2ext.d2ext_C",
)


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without compiling and without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy of what git holds or would add: building writes build/ and egg-info beside pyproject.toml.
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listing.stdout.decode().split("\0")):
        origin, target = ROOT / name, source / name
        if origin.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(origin))
        elif origin.is_file() and not name.startswith("tests/"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(origin.read_bytes())
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(folder / "dist")],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "D2EXT_BUILD": "0"},
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (made,) = (folder / "dist").glob("*.whl")
    return made


def test_wheel_holds_every_config_and_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        f"d2ext/model_zoo/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for path in (ROOT / "configs").rglob("*.*")
    }
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "d2ext").rglob("*.py")}
    assert configs
    assert configs <= names
    assert modules <= names
    assert "d2ext/py.typed" in names
    outside = [name for name in names if not name.startswith(("d2ext/", "d2ext-"))]
    assert outside == []


def test_wheel_has_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entries,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert archive.read(entries).decode().split() == [
        "[console_scripts]",
        "d2ext",
        "=",
        "d2ext.tools.main:main",
    ]


def test_wheel_names_its_licence_and_requirements(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata_name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = archive.read(metadata_name).decode()
    assert "License: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    # The index has no detectron2 and torch is not to be pinned by a library.
    assert not any("detectron2" in line for line in requirements)
    assert any(line.startswith("Requires-Dist: torch>=") for line in requirements)


def test_installed_wheel_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import d2ext, json\n"
        "from d2ext import model_zoo\n"
        "files = [model_zoo.get_config_file(name) for name in model_zoo.available()]\n"
        "print(json.dumps([d2ext.__file__, files]))"
    )
    module, files = json.loads(run_python(code, str(tmp_path)).splitlines()[-1])
    assert Path(module).is_relative_to(tmp_path)
    assert files
    assert all(Path(file).is_relative_to(tmp_path) for file in files)


def test_import_needs_no_optional_package_and_loads_nothing_heavy() -> None:
    code = (
        "import importlib.abc, json, sys\n"
        "blocked = json.loads(sys.argv[1])\n"
        "class Blocker(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if any(name == b or name.startswith(b + '.') for b in blocked):\n"
        "            raise ModuleNotFoundError(f'blocked: {name}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import detectron2.engine, detectron2.evaluation, detectron2.model_zoo\n"
        "import detectron2.modeling, detectron2.data\n"
        "before = set(sys.modules)\n"
        "import d2ext\n"
        "added = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "from d2ext.config import get_cfg\n"
        "print(json.dumps([get_cfg().MODEL.DEVICE, sorted(added)]))"
    )
    device, added = json.loads(run_python(code, json.dumps(NOT_NEEDED)).splitlines()[-1])
    assert device in {"cpu", "cuda"}
    assert "d2ext" in added
    assert set(added).isdisjoint(
        {"matplotlib", "tensorboard", "scipy", "skimage", "hydra", "triton"}
    )


def test_version_is_readable_without_pytorch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "print(runpy.run_path(sys.argv[1])['__version__'])"
    )
    version = run_python(code, str(ROOT / "d2ext" / "version.py")).strip()
    assert version.split(".")[0].isdigit()
