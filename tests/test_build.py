"""setup.py: what D2EXT_BUILD makes of the machine, and that a failing build fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("d2ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Makes a folder that looks like a CUDA toolkit of the given release, and the only one."""

    def make(release: str, name: str = "cuda") -> Path:
        folder = tmp_path / name
        (folder / "bin").mkdir(parents=True)
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
        nvcc = folder / "bin" / "nvcc"
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
        )
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(folder))
        return folder

    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nvcc" else real(name))
    return make


def test_unknown_choice_is_an_error_that_names_the_choices(build, monkeypatch):
    monkeypatch.setenv("D2EXT_BUILD", "gpu")
    with pytest.raises(SystemExit, match="auto, 0, cpu, cuda"):
        build.requested_build()
    for value, expected in [("", "auto"), ("CPU", "cpu"), ("0", "0")]:
        monkeypatch.setenv("D2EXT_BUILD", value)
        assert build.requested_build() == expected


def test_toolkit_must_have_the_major_version_of_pytorch(build, toolkit):
    folder = toolkit("13.1")
    found, reason = build.cuda_toolkit("13.0")
    assert found == folder and "13.1" in reason
    # /usr/local/cuda of the machine may serve where the named folder does not.
    found, reason = build.cuda_toolkit("5.5")
    assert found is None and "release 13.1" in reason and "5.5" in reason
    assert build.cuda_toolkit(None) == (None, "this PyTorch was built without CUDA")


def test_folder_without_headers_is_no_toolkit(build, toolkit):
    folder = toolkit("5.5")
    assert build.cuda_toolkit("5.0")[0] == folder
    (folder / "include" / "cuda_runtime.h").unlink()
    assert build.cuda_toolkit("5.0")[0] is None


def test_auto_takes_cuda_then_the_compiler_then_nothing(build, toolkit, monkeypatch, capfd):
    monkeypatch.setattr(torch.version, "cuda", "5.5")
    monkeypatch.setattr(build, "find_compiler", lambda: "/usr/bin/c++")
    assert build.choose_build("auto") == ("cpu", None)
    folder = toolkit("5.5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build.choose_build("auto") == ("cpu", None)
    assert "no GPU here" in capfd.readouterr().err
    assert build.choose_build("cuda") == ("cuda", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build.choose_build("auto") == ("cuda", folder)
    assert build.choose_build("cpu") == ("cpu", None)
    assert build.choose_build("0") == ("0", None)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    capfd.readouterr()
    assert build.choose_build("auto") == ("0", None)
    message = capfd.readouterr().err
    assert "no C++ compiler" in message and build.SLOW_OPERATORS in message


def test_what_was_asked_for_and_cannot_be_is_an_error(build, toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "5.5")
    monkeypatch.setattr(build, "find_compiler", lambda: "/usr/bin/c++")
    with pytest.raises(SystemExit, match=r"D2EXT_BUILD=cuda: .*CUDA 5\.5"):
        build.choose_build("cuda")
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler"):
        build.choose_build("cpu")
    monkeypatch.setattr(build, "find_torch", lambda: False)
    with pytest.raises(SystemExit, match="--no-build-isolation"):
        build.choose_build("cpu")


def test_without_pytorch_nothing_is_compiled_and_the_way_out_is_named(build, monkeypatch, capfd):
    monkeypatch.setattr(build, "find_torch", lambda: False)
    assert build.choose_build("auto") == ("0", None)
    message = capfd.readouterr().err
    assert build.SLOW_OPERATORS in message and "pip install --no-build-isolation ." in message


def test_slow_operators_are_those_that_the_package_warns_of(build):
    from d2ext.layers import _extension

    assert tuple(build.SLOW_OPERATORS.split(", ")) == _extension.SLOW_WITHOUT


def test_finds_the_environments_pytorch_under_build_isolation():
    # As in pip's isolated build: this interpreter, without its site-packages.
    code = """
import importlib.util, runpy, sys
sys.path = [entry for entry in sys.path if "site-packages" not in entry]
sys.path_importer_cache.clear()
find_torch = runpy.run_path("setup.py", run_name="imported")["find_torch"]
assert importlib.util.find_spec("torch") is None
assert find_torch()
print(importlib.util.find_spec("torch").origin)
"""
    # setup.py itself needs setuptools, which pip puts into the build environment.
    import setuptools

    if not Path(torch.__file__).is_relative_to(sys.prefix):
        pytest.skip("PyTorch is not in this interpreter's own site-packages")
    shim = "import sys, types; m = types.ModuleType('setuptools'); m.setup = None; "
    shim += "sys.modules['setuptools'] = m\n"
    done = subprocess.run(
        [sys.executable, "-c", shim + code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == torch.__file__ and setuptools.__version__


def test_pytorch_chooses_the_c_plus_plus_standard(build, monkeypatch):
    """Its headers need C++17 or, later, C++20; torch's build helper adds what is missing."""
    monkeypatch.setenv("D2EXT_BUILD", "cpu")
    monkeypatch.setattr(build, "find_compiler", lambda: "/usr/bin/c++")
    (extension,) = build.extension_arguments()["ext_modules"]
    flags = [flag for group in extension.extra_compile_args.values() for flag in group]
    assert "-O3" in flags and not any("std" in flag for flag in flags)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="no C++ compiler"
)
def test_a_build_that_fails_fails_loudly(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").write_text("#error this cannot be compiled\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "D2EXT_BUILD": "cpu"},
    )
    assert done.returncode != 0
    assert "this cannot be compiled" in done.stdout + done.stderr
    assert "D2EXT_BUILD=0" in done.stderr
