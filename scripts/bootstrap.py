"""Prepare the Python environment of a source checkout, then run a command in it.

    python scripts/bootstrap.py [--dev] [-- COMMAND ...]

Two cases:

- The Python that runs this script belongs to an active environment in which ``import detectron2``
  works: that environment is used as it is. Only packages that are missing are added to it, and
  nothing that it has changes its version.
- Otherwise ``.venv`` is created beside the Makefile and filled with the pinned versions of
  ``requirements/``.

Then the operators of ``csrc/`` are compiled in place. Each step leaves a stamp that says what it
was made from, so a second run does only what changed. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements"
STAMPS = ROOT / ".cache" / "bootstrap"

NEWEST_PYTHON = (3, 14)  # PyTorch 2.11.0 has wheels for CPython 3.10 to 3.14
NEEDED_DISK_GB = (
    8.0  # 5.3 GB installed, of which PyTorch and its CUDA libraries 4.6; plus downloads
)

# Modules that d2ext and Detectron2's Python part import, and the package that provides each.
RUNTIME_MODULES = {
    "torch": "torch>=2.4",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "cv2": "opencv-python-headless<5",
    "pycocotools": "pycocotools",
    "PIL": "Pillow",
    "fvcore": "fvcore",
    "iopath": "iopath",
    "tqdm": "tqdm",
    "tabulate": "tabulate",
    "termcolor": "termcolor",
    "yacs": "yacs",
    "yaml": "PyYAML",
    "cloudpickle": "cloudpickle",
    "omegaconf": "omegaconf<2.4",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
    "setuptools": "setuptools<81",
    "ninja": "ninja",
    "panopticapi": "panopticapi-lite",
}
DEV_MODULES = {
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "xdist": "pytest-xdist",
    "ruff": "ruff",
    "mypy": "mypy",
    "clang_format": "clang-format",
    "pdoc": "pdoc",
    "yaml-stubs": "types-PyYAML",
    "tabulate-stubs": "types-tabulate",
}


def say(message: str) -> None:
    print(f"[d2ext] {message}", flush=True)


def stop(message: str) -> NoReturn:
    """End with a message that says what to do, and status 1."""
    print(f"\n[d2ext] cannot go on: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


def digest(*parts: str | Path) -> str:
    """A short hash of strings and of files' contents."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


# ---------------------------------------------------------------- which environment


def is_environment() -> bool:
    """Whether packages may be added here: a venv, a conda environment, an unmanaged Python."""
    in_venv = sys.prefix != sys.base_prefix
    in_conda = (Path(sys.prefix) / "conda-meta").is_dir()
    managed = (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()
    return in_venv or in_conda or not managed


def has_working_detectron2() -> bool:
    """Whether ``import detectron2`` works here; says why not if it is there but broken."""
    if importlib.util.find_spec("detectron2") is None:
        return False
    # Importing it takes seconds: the answer is kept for as long as the folder is unchanged.
    location = importlib.util.find_spec("detectron2").submodule_search_locations[0]
    key = digest(sys.executable, location, str(os.stat(location).st_mtime_ns))
    stamp = STAMPS / f"detectron2-{key}"
    if stamp.exists():
        return True
    test = subprocess.run(
        [sys.executable, "-c", "import detectron2.config, detectron2.modeling"],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )
    if test.returncode != 0:
        reason = (test.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"the active environment has a detectron2 that does not import ({reason}): not used.")
        return False
    say(f"using the active environment {sys.prefix}: it has detectron2.")
    write_stamp(stamp, {"location": location})
    return True


def write_stamp(path: Path, content: dict[str, object]) -> None:
    """Write a stamp whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


# ---------------------------------------------------------------- pip

# Lines of pip's output that are not about this installation's success.
NOISE = ("WARNING: Location ", "Looking in ", "Requirement already", "Ignoring ", "[notice]")


def pip(python: Path, *arguments: str, **variables: str) -> None:
    """Run pip, showing its progress line by line; stop with a reason if it fails."""
    command = [str(python), "-m", "pip", *arguments]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    environment = {**os.environ, **quiet, **variables}
    tail: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.strip() or line.startswith(NOISE):
                continue
            tail = [*tail[-39:], line.rstrip()]
            if progress := progress_line(line):
                print("   ", progress, flush=True)
    if process.returncode != 0:
        print("\n".join(f"    {line}" for line in tail), file=sys.stderr)
        stop(f"`pip {arguments[0]}` failed, its last lines are above. {pip_hint(tail)}")


def progress_line(line: str) -> str | None:
    """What to show of one line that pip prints: packages, large downloads, errors."""
    if line.startswith("Collecting"):
        return line.split(" (from")[0].strip()
    if match := re.search(r"Downloading (\S+) \(([\d.]+ [MG]B)\)", line):
        unit = 1000 if match[2].endswith("GB") else 1
        large = float(match[2].split()[0]) * unit >= 20
        return f"  downloading {match[2]}" if large else None
    if line.startswith("Installing collected packages"):
        return "installing ..."
    return line.rstrip() if line.startswith(("ERROR", "error", "Building wheel")) else None


def pip_hint(lines: list[str]) -> str:
    text = "\n".join(lines)
    if "No space left on device" in text:
        return "The disk is full: free some space and run the same command again."
    unreachable = ("(from versions: none)", "ConnectionError", "Retrying (", "timed out")
    if any(sign in text for sign in unreachable):
        return (
            "The package index could not be reached: check the network or pip's settings "
            "(`pip config list`)."
        )
    if "No matching distribution found" in text or "Could not find a version" in text:
        return (
            "The package index lacks that version for this Python and platform: check pip's "
            "settings (`pip config list`), or try another Python: `make PYTHON=python3.11 ...`."
        )
    return "What was installed so far is kept: run the same command again after mending the cause."


# ---------------------------------------------------------------- .venv with pinned versions


def check_prerequisites() -> None:
    """Stop before a long download if it cannot end well."""
    if sys.version_info[:2] > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        stop(
            f"the pinned PyTorch has no build for Python {python_version()}. "
            f"Choose an older one, for example `make PYTHON=python{newest} ...`."
        )
    if sys.maxsize < 2**32:
        stop("PyTorch needs a 64-bit Python.")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            stop(
                f"{sys.executable} lacks the standard module `{module}`. On Debian and Ubuntu the "
                "package python3-venv has it; or choose another Python with `make PYTHON=...`."
            )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDED_DISK_GB:
        stop(
            f"{ROOT} has {free:.1f} GB of free disk space, the installation needs "
            f"{NEEDED_DISK_GB:.0f} GB."
        )


def python_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def requirement_files(dev: bool) -> list[Path]:
    names = ["dev.txt" if dev else "runtime.txt", "unresolved.txt", "detectron2.txt"]
    return [REQUIREMENTS / name for name in names]


def create_venv(dev: bool) -> Path:
    """Create or complete ``.venv``; returns its interpreter."""
    python = venv_python()
    files = requirement_files(dev)
    stamp = VENV / ("d2ext-dev.json" if dev else "d2ext-runtime.json")
    for candidate in (VENV / "d2ext-dev.json", stamp):  # dev.txt holds all of runtime.txt
        if python.exists() and candidate.exists():
            wanted = digest(*requirement_files(dev or candidate.name == "d2ext-dev.json"))
            if json.loads(candidate.read_text(encoding="utf-8"))["requirements"] == wanted:
                return python

    started = time.monotonic()
    works = (
        python.exists()
        and not subprocess.run(
            [str(python), "-m", "pip", "--version"], capture_output=True
        ).returncode
    )
    if not works:
        check_prerequisites()
        say(f"creating .venv with Python {python_version()} ({sys.executable})")
        made = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True
        )
        if made.returncode != 0:
            stop(f"`python -m venv` failed:\n{made.stdout}{made.stderr}")
    say("installing the pinned packages of requirements/ (about 5 GB, minutes on the first run)")
    pins, unresolved, detectron2 = files
    # The lists are complete, so nothing is left to resolve: --no-deps keeps each version as pinned.
    pip(python, "install", "--no-deps", "-r", str(pins), "-r", str(unresolved))
    install_detectron2(python, detectron2)
    write_stamp(stamp, {"requirements": digest(*files), "python": python_version()})
    say(f"packages installed in {time.monotonic() - started:.0f} s")
    return python


def install_detectron2(python: Path, requirements: Path) -> None:
    """Install Detectron2's Python part: its wheel is tagged for one Python and runs on all."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = subprocess.check_output([str(python), "-c", query], text=True).strip()
    pip(
        python, "install", "--upgrade", "--no-deps", "--only-binary=:all:",
        "--python-version", "3.10", "--implementation", "cp", "--abi", "none", "--platform", "any",
        "--target", target, "-r", str(requirements),
    )  # fmt: skip


# ---------------------------------------------------------------- an environment with Detectron2


def complete_environment(dev: bool) -> Path:
    """Add to the active environment what it lacks, and nothing else; returns its interpreter."""
    modules = {**RUNTIME_MODULES, **(DEV_MODULES if dev else {})}
    missing = {name: package for name, package in modules.items() if not module_exists(name)}
    if not missing:
        return Path(sys.executable)
    if importlib.util.find_spec("pip") is None:
        stop(f"{sys.executable} has no pip; install these by hand: {' '.join(missing.values())}")
    say(f"adding what it lacks: {', '.join(missing.values())}")
    unresolved = missing.pop("panopticapi", None)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        # What the environment has keeps its version.
        for distribution in importlib.metadata.distributions():
            name, version = distribution.metadata["Name"], distribution.version
            if name and version and name.lower() != "d2ext":
                constraints.write(f"{name}=={version}\n")
        constraints.flush()
        if missing:
            pip(Path(sys.executable), "install", "-c", constraints.name, *missing.values())
        if unresolved:
            pip(Path(sys.executable), "install", "--no-deps", unresolved)
    return Path(sys.executable)


def module_exists(name: str) -> bool:
    """Whether a module, or a folder of type stubs, lies on the path. Imports nothing."""
    if name.endswith("-stubs"):
        return any((Path(folder) / name).is_dir() for folder in sys.path if folder)
    return importlib.util.find_spec(name) is not None


# ---------------------------------------------------------------- d2ext itself


PROBE = """
import importlib.util, json, os, shutil
from importlib.metadata import version
d2ext = importlib.util.find_spec("d2ext")
print(json.dumps({
    "torch": version("torch"),
    "setuptools": version("setuptools"),
    "nvcc": shutil.which("nvcc"),
    "d2ext": d2ext.origin if d2ext else None,
}))
"""


# setup.py, without the notice that newer setuptools want the licence in a form that older ones
# reject.
BUILD = r"""
import runpy, sys, warnings
warnings.filterwarnings("ignore", message=r"[\s\S]*project\.license")
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def probe(python: Path) -> dict[str, str | None]:
    """What an environment holds, asked from outside the checkout. Imports nothing heavy."""
    answer = subprocess.check_output(
        [str(python), "-c", PROBE], text=True, cwd=tempfile.gettempdir(), env=without_pythonpath()
    )
    return json.loads(answer)


def without_pythonpath() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def link_package(python: Path, facts: dict[str, str | None]) -> None:
    """Install d2ext in editable mode: ``import d2ext`` then works from any folder."""
    if facts["d2ext"] == str(ROOT / "d2ext" / "__init__.py"):
        return
    if facts["d2ext"]:
        say(f"the environment has another d2ext ({facts['d2ext']}): it is replaced by this one.")
    say("linking d2ext into the environment (pip install -e .)")
    # Without build isolation the environment's own setuptools serves and nothing is downloaded.
    new_enough = int((facts["setuptools"] or "0").split(".")[0]) >= 68
    isolation = ["--no-build-isolation"] if new_enough else []
    pip(python, "install", "--no-deps", *isolation, "-e", str(ROOT), D2EXT_BUILD="0")


def run_build(python: Path) -> bool:
    """Run setup.py, showing one line per file; all of the output if it fails. Returns success."""
    output: list[str] = []
    with subprocess.Popen(
        [str(python), "-u", "-c", BUILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            # Ninja's "[2/5] c++ ... -c .../csrc/cpu/masks.cpp -o ..."
            step = re.match(r"(\[\d+/\d+\]).* -c (\S+)", line)
            if step:
                print("   ", step[1], os.path.relpath(step[2], ROOT), flush=True)
            elif line.startswith("[d2ext]"):
                print(line.rstrip(), flush=True)
    if process.returncode != 0:
        print("".join(output), file=sys.stderr)
    return process.returncode == 0


def build_extension(python: Path, facts: dict[str, str | None]) -> None:
    """Compile ``csrc/`` in place when it, setup.py, PyTorch or ``D2EXT_BUILD`` changed."""
    choice = os.environ.get("D2EXT_BUILD", "")
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    compiler = os.environ.get("CXX") or next(filter(None, found), None)
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    names = " ".join(str(path.relative_to(ROOT)) for path in sources)
    settings = [facts["torch"], facts["nvcc"], os.environ.get("CUDA_HOME"), choice, compiler]
    wanted = digest(ROOT / "setup.py", names, *sources, json.dumps(settings))
    stamp = STAMPS / f"extension-{digest(str(python))}.json"
    if stamp.exists():
        made = json.loads(stamp.read_text(encoding="utf-8"))
        if made["sources"] == wanted and all((ROOT / name).exists() for name in made["libraries"]):
            return
    if choice == "0":
        say("D2EXT_BUILD=0: csrc/ is not compiled, the plain PyTorch operators are used.")
    elif compiler is None:
        say(
            "warning: no C++ compiler found (c++, g++, clang++ or $CXX). d2ext works without: its "
            "operators then run in plain PyTorch, mask assembly several times slower."
        )
    else:
        say(f"compiling csrc/ with {compiler}")
        started = time.monotonic()
        if not run_build(python):
            stop(
                "compiling csrc/ failed, the compiler's message is above. To go on without "
                "compiled operators set D2EXT_BUILD=0; for the CPU part only D2EXT_BUILD=cpu."
            )
        say(f"compiled in {time.monotonic() - started:.0f} s")
    libraries = [str(path.relative_to(ROOT)) for path in (ROOT / "d2ext").glob("*.so")]
    write_stamp(stamp, {"sources": wanted, "libraries": libraries})


# ---------------------------------------------------------------- main


def prepare(dev: bool) -> Path:
    """Make the environment ready; returns its interpreter."""
    own = VENV.exists() and Path(sys.prefix).resolve() == VENV.resolve()
    if not own and is_environment() and has_working_detectron2():
        python = complete_environment(dev)
    else:
        python = create_venv(dev)
    facts = probe(python)
    link_package(python, facts)
    build_extension(python, facts)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dev", action="store_true", help="also what tests and linters need")
    parser.add_argument("command", nargs="*", help="run in the environment once it is ready")
    args = parser.parse_args()
    python = prepare(args.dev)
    if not args.command:
        say(f"ready: {python}")
        return
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = args.command
    executable = shutil.which(command[0], path=environment["PATH"])
    if executable is None:
        stop(f"`{command[0]}` is not in the environment of {python}.")
    sys.stdout.flush()
    os.execve(executable, command, environment)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted. Run the same command again to go on.")
