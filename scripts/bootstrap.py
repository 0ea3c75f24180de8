"""Prepare the Python environment of a source checkout, then run a command in it.

    python scripts/bootstrap.py [--dev] [--newest-torch] [-- COMMAND ...]

If ``import detectron2`` works in the active environment, that one is used: what is missing is added,
what it has keeps its version. Otherwise ``.venv`` gets the pinned versions of ``requirements/``. Then
``csrc/`` is compiled in place. Stamps say what a step was made from: a second run does what changed.
With ``--newest-torch``, ``.venv-newest`` gets the newest PyTorch that pip offers, and the other pins.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
NEWEST_VENV = ROOT / ".venv-newest"
REQUIREMENTS = ROOT / "requirements"
STAMPS = ROOT / ".cache" / "bootstrap"
NEWEST_TORCH = ("torch!=2.13.0", "torchvision")  # 2.13.0 must not be used
# What comes with a version of PyTorch.
WITH_TORCH = re.compile("torch|triton|nvidia-|cuda-")
NEWEST_PYTHON = (3, 14)  # PyTorch 2.11.0 has wheels for CPython 3.10 to 3.14
EVERY = 8.0  # seconds between two lines
NEEDED_DISK_GB = (
    8.0  # 5.3 GB installed, of which PyTorch and its CUDA libraries 4.6; plus downloads
)


def say(message: str) -> None:
    print(f"[d2ext] {message}", flush=True)


def stop(message: str) -> NoReturn:
    sys.exit(f"\n[d2ext] cannot go on: {message}")  # status 1


def run(doing: str, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run``, with a line every few seconds in which nothing else may be seen."""
    ended = threading.Event()

    def tell() -> None:
        start = time.monotonic()
        while not ended.wait(EVERY):
            say(f"still {doing}: {time.monotonic() - start:.0f} s")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        return subprocess.run(command, **options)
    finally:
        ended.set()
        teller.join()


def digest(*parts: object) -> str:
    """A short hash of values and of files' contents."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def is_stamped(stamp: Path, wanted: str) -> bool:
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted


def pip(python: Path, *arguments: str, **variables: str) -> None:
    """Run pip; stop if it fails. Its own last lines say why."""
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    command = [str(python), "-m", "pip", *arguments]
    environment = {**os.environ, **quiet, **variables}
    if run("installing", command, cwd=ROOT, env=environment).returncode:
        stop(
            f"`pip {arguments[0]}` failed, see above. Is the disk full, the package index out of reach "
            "(`pip config list`), or a version missing for this Python (make PYTHON=python3.11 ...)? "
            "What was installed so far is kept: run the same command again."
        )


def has_working_detectron2() -> bool:
    """Whether ``import detectron2`` works in an environment that packages may be added to."""
    managed = (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()
    own = sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()
    spec = importlib.util.find_spec("detectron2")
    if (managed and not own) or spec is None or spec.origin is None:
        return False
    # Importing it takes seconds: the answer is kept for as long as the file is unchanged.
    stamp = STAMPS / f"detectron2-{digest(sys.executable)}"
    wanted = digest(spec.origin, os.stat(spec.origin).st_mtime_ns)
    if not is_stamped(stamp, wanted):
        test = [sys.executable, "-c", "import detectron2.config, detectron2.modeling"]
        result = subprocess.run(test, cwd=tempfile.gettempdir(), capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            say(f"the environment's detectron2 does not import ({reason}): not used.")
            return False
        say(f"using the active environment {sys.prefix}: it has detectron2.")
        stamp.write_text(wanted, encoding="utf-8")
    return True


def complete_environment(dev: bool) -> None:
    """Add to the active environment what it lacks; what it has keeps its version."""
    known = list(importlib.metadata.distributions())
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.writelines(f"{x.metadata['Name']}=={x.version}\n" for x in known if x.version)
        constraints.flush()
        if lacking := missing("runtime.in", *(["dev.in"] if dev else [])):
            say(f"adding what it lacks: {', '.join(lacking)}")
            pip(Path(sys.executable), "install", "-c", constraints.name, *lacking)
    if lacking := missing("unresolved.txt"):
        pip(Path(sys.executable), "install", "--no-deps", *lacking)


def missing(*files: str) -> list[str]:
    """What requirements ask for, without comments and markers, and is not installed."""
    text = "\n".join((REQUIREMENTS / file).read_text(encoding="utf-8") for file in files)
    entries = [re.split("[#;]", line)[0].strip() for line in text.splitlines()]
    names = {e: re.split("[<=>]", e)[0] for e in entries if e and not e.startswith("-")}
    if importlib.util.find_spec("cv2"):  # any of OpenCV's four packages serves
        names = {entry: name for entry, name in names.items() if not name.startswith("opencv")}
    return [e for e, name in names.items() if not any(importlib.metadata.distributions(name=name))]


def check_prerequisites() -> None:
    """Stop before a long download if it cannot end well."""
    version, newest = (".".join(map(str, v[:2])) for v in (sys.version_info, NEWEST_PYTHON))
    if sys.version_info[:2] > NEWEST_PYTHON:
        stop(
            f"the pinned PyTorch has no build for Python {version}: make PYTHON=python{newest} ..."
        )
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        stop(
            f"{sys.executable} lacks `venv` or `ensurepip`. On Debian and Ubuntu the package "
            "python3-venv has them; or choose another Python: make PYTHON=..."
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDED_DISK_GB:
        stop(f"{ROOT} has {free:.1f} GB of free disk space, {NEEDED_DISK_GB:.0f} GB are needed.")


def create_venv(dev: bool, venv: Path) -> Path:
    """Create or complete ``.venv`` or ``.venv-newest``; returns its interpreter."""
    python = venv / "bin" / "python"
    others = [REQUIREMENTS / "unresolved.txt", REQUIREMENTS / "detectron2.txt"]
    wanted = {x: digest(REQUIREMENTS / f"{x}.txt", *others) for x in ("dev", "runtime")}
    kinds = ("dev",) if dev else ("dev", "runtime")  # dev holds all of runtime
    if any(python.exists() and is_stamped(venv / f"d2ext-{x}", wanted[x]) for x in kinds):
        return python
    if not (python.exists() and any(venv.glob("lib/*/site-packages/pip/__main__.py"))):
        check_prerequisites()
        say(f"creating {venv.name} with {sys.executable}")
        if subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)]).returncode:
            stop("`python -m venv` failed, see above.")
    say("installing the pinned packages of requirements/ (about 5 GB, minutes on the first run)")
    pins = REQUIREMENTS / f"{kinds[-1]}.txt"
    # The lists are complete, so nothing is left to resolve: --no-deps keeps each version as pinned.
    if venv == NEWEST_VENV:
        lines = pins.read_text(encoding="utf-8").splitlines(keepends=True)
        pins = venv / "pins.txt"
        pins.write_text("".join(x for x in lines if not WITH_TORCH.match(x)), encoding="utf-8")
        pip(python, "install", *NEWEST_TORCH)
    pip(python, "install", "--no-deps", "-r", str(pins), "-r", str(others[0]))
    # Detectron2's Python part: its wheel is tagged for one Python and runs on all.
    pip(
        python, "install", "--upgrade", "--no-deps", "--only-binary=:all:", "--python-version", "3.10",
        "--implementation", "cp", "--abi", "none", "--platform", "any", "-r", str(others[1]),
        "--target", str(next(venv.glob("lib/*/site-packages"))),
    )  # fmt: skip
    (venv / f"d2ext-{kinds[-1]}").write_text(wanted[kinds[-1]], encoding="utf-8")
    return python


def install_d2ext(python: Path) -> None:
    """Link d2ext into the environment; compile ``csrc/`` in place when what it depends on changed."""
    query = "import importlib.metadata as m, importlib.util as u, sysconfig; "
    query += "suffix = sysconfig.get_config_var('EXT_SUFFIX'); spec = u.find_spec('d2ext'); "
    query += "print(m.version('torch'), suffix, spec and spec.origin)"
    command, outside = [str(python), "-c", query], tempfile.gettempdir()
    facts = subprocess.check_output(command, text=True, cwd=outside)
    torch, suffix, linked = facts.split(maxsplit=2)
    stamp, wanted = STAMPS / f"link-{digest(str(python))}", digest(ROOT / "pyproject.toml")
    if linked.strip() != str(ROOT / "d2ext" / "__init__.py") or not is_stamped(stamp, wanted):
        # Without build isolation the environment's own setuptools serves.
        pip(python, "install", "--no-deps", "--no-build-isolation", "-e", ".", D2EXT_BUILD="0")
        stamp.write_text(wanted, encoding="utf-8")
    tools = [shutil.which(name) for name in ("c++", "g++", "clang++", "nvcc")]
    settings = [os.environ.get(name) for name in ("D2EXT_BUILD", "CXX", "CUDA_HOME")]
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    wanted = digest(torch, tools, settings, sources, ROOT / "setup.py", *sources)
    # Environments of the same Python share the file: the stamp is the file's.
    library, stamp = ROOT / "d2ext" / f"d2ext_C{suffix}", STAMPS / f"extension{suffix}"
    if not is_stamped(stamp, f"{wanted} {library.exists()}"):
        say("compiling csrc/ (a minute or more; D2EXT_BUILD=0 goes without)")
        if not run_build(python):
            stop("compiling csrc/ failed, see above. To go on without, set D2EXT_BUILD=0.")
        stamp.write_text(f"{wanted} {library.exists()}", encoding="utf-8")


def run_build(python: Path) -> bool:
    """Run setup.py; show what it says itself, and the compiler's words if it fails."""
    command = [str(python), "setup.py", "build_ext", "--inplace"]
    result = run("compiling", command, cwd=ROOT, capture_output=True, text=True)
    lines = (result.stdout + result.stderr).splitlines(keepends=True)
    print(*(x for x in lines if result.returncode or x.startswith("[d2ext]")), sep="", end="")
    return not result.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="also what tests and linters need")
    parser.add_argument("--newest-torch", action="store_true", help="in an environment of its own")
    parser.add_argument("command", nargs="*", help="run in the environment once it is ready")
    args = parser.parse_args()
    STAMPS.mkdir(parents=True, exist_ok=True)
    python = Path(sys.executable)
    if args.newest_torch:
        python = create_venv(args.dev, NEWEST_VENV)
    elif Path(sys.prefix).resolve() != VENV.resolve() and has_working_detectron2():
        complete_environment(args.dev)
    else:
        python = create_venv(args.dev, VENV)
    install_d2ext(python)
    if not args.command:
        return say(f"ready: {python}")
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    executable = shutil.which(args.command[0], path=path)
    if executable is None:
        stop(f"`{args.command[0]}` is not in the environment of {python}.")
    sys.stdout.flush()
    os.execve(executable, args.command, {**os.environ, "PATH": path})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted. Run the same command again to go on.")
