"""Builds the compiled operators (``csrc/`` -> ``d2ext.d2ext_C``); metadata is in pyproject.toml.

``D2EXT_BUILD`` chooses what is compiled:

- unset or ``auto``: CPU and CUDA operators if there are a GPU and a CUDA toolkit of the major version
  that PyTorch was built with; else CPU operators if there is a C++ compiler; else none.
- ``cuda`` / ``cpu``: exactly that; an error if it cannot be.
- ``0``: nothing.

A build that was begun and fails is an error: d2ext is never silently installed uncompiled.

An extension works only with the PyTorch that it was compiled against, so PyTorch is no build
requirement: the installed one is used, under pip's build isolation too.
``TORCH_CUDA_ARCH_LIST`` sets the GPU architectures; by default those of the GPUs in this machine,
or, without one, ``DEFAULT_CUDA_ARCHS``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "0", "cpu", "cuda")
# Without a GPU to ask, one architecture, since each doubles the build: Ampere's code, which Ada runs
# as well, and its PTX, which the driver of a later GPU compiles at load. An older GPU (Turing) needs
# TORCH_CUDA_ARCH_LIST.
DEFAULT_CUDA_ARCHS = "8.0+PTX"
SLOW_OPERATORS = (
    "assemble_masks, assemble_binary_masks, corner_pool, prune_masks, fuse_panoptic, soft_nms, "
    "deform_conv2d"
)


def say(message: str) -> None:
    print(f"[d2ext] {message}", file=sys.stderr, flush=True)


def requested_build() -> str:
    choice = os.environ.get("D2EXT_BUILD", "").strip().lower() or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"D2EXT_BUILD={choice}: must be one of {', '.join(CHOICES)}")
    return choice


def find_torch() -> bool:
    """Make the installed PyTorch importable.

    pip's build isolation hides the environment's packages, but the extension must be compiled
    against the very PyTorch that will load it: look in the interpreter's own site-packages.
    """
    if importlib.util.find_spec("torch"):
        return True
    for folder in dict.fromkeys(sysconfig.get_path(name) for name in ("platlib", "purelib")):
        if (Path(folder) / "torch" / "__init__.py").is_file():
            sys.path.append(folder)
            scripts = sysconfig.get_path("scripts")  # ninja, where pip put it
            os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])
            return True
    return False


def find_compiler() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cuda_toolkit(wanted: str | None) -> tuple[Path | None, str]:
    """The folder of a toolkit whose major version is that of ``wanted``; else None and why."""
    if wanted is None:
        return None, "this PyTorch was built without CUDA"
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        named.append(str(Path(nvcc).resolve().parent.parent))
    named.append("/usr/local/cuda")
    seen = []
    for folder in (Path(name) for name in named if name):
        compiler = folder / "bin" / "nvcc"
        if not compiler.is_file() or not (folder / "include" / "cuda_runtime.h").is_file():
            continue
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", text)
        if release and release[1] == wanted.split(".")[0]:
            return folder, f"CUDA {release[1]}.{release[2]} in {folder}"
        seen.append(f"{folder}: {release[0] if release else 'unknown version'}")
    found = (
        "; ".join(dict.fromkeys(seen)) or "none found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    )
    return None, f"PyTorch needs a toolkit of CUDA {wanted}; {found}"


def choose_build(choice: str) -> tuple[str, Path | None]:
    """("0" | "cpu" | "cuda", the toolkit's folder for "cuda")."""
    if choice == "0":
        return "0", None
    if not find_torch():
        if choice != "auto":
            raise SystemExit(
                f"D2EXT_BUILD={choice}, but PyTorch is not there to compile against. Install torch "
                "first, then: pip install --no-build-isolation ."
            )
        say(
            "PyTorch was not found: the operators are NOT compiled and these will be slow: "
            f"{SLOW_OPERATORS}. To compile them: pip install --no-build-isolation ."
        )
        return "0", None
    import torch

    if find_compiler() is None:
        if choice != "auto":
            raise SystemExit(f"D2EXT_BUILD={choice}, but there is no C++ compiler (c++, g++, $CXX)")
        say(
            "no C++ compiler (c++, g++, $CXX): the operators are NOT compiled and these will be "
            f"slow: {SLOW_OPERATORS}"
        )
        return "0", None
    toolkit, reason = cuda_toolkit(torch.version.cuda)
    if choice == "cuda" and toolkit is None:
        raise SystemExit(f"D2EXT_BUILD=cuda: {reason}")
    if choice == "auto" and toolkit is not None and not torch.cuda.is_available():
        toolkit, reason = None, "no GPU here (D2EXT_BUILD=cuda compiles for one all the same)"
    if choice != "cpu" and toolkit is not None:
        say(f"compiling for the CPU and for {reason}")
        return "cuda", toolkit
    say("compiling for the CPU" + ("" if choice == "cpu" else f" only: {reason}"))
    return "cpu", None


def cuda_settings(toolkit: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Macros and include folders of the CUDA build; sets what torch's build helper reads."""
    import torch

    os.environ["CUDA_HOME"] = str(toolkit)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            capabilities = {torch.cuda.get_device_capability(i) for i in range(count)}
            archs = ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
        else:
            archs = DEFAULT_CUDA_ARCHS
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")
    say(f"GPU architectures: {archs}")
    macros = [
        ("D2EXT_CUDA_VERSION", f'"{torch.version.cuda}"'),
        ("D2EXT_CUDA_ARCHS", f'"{archs}"'),
    ]
    # Headers that a small toolkit lacks come with PyTorch's own CUDA packages.
    packages = Path(torch.__file__).parent.parent / "nvidia"
    major = torch.version.cuda.split(".")[0]
    folders = [packages / f"cu{major}" / "include", packages / "cuda_runtime" / "include"]
    return macros, [str(folder) for folder in folders if folder.is_dir()]


def extension_arguments() -> dict[str, object]:
    build, toolkit = choose_build(requested_build())
    if build == "0":
        return {}
    macros, includes = cuda_settings(toolkit) if toolkit else ([], [])

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Says how to go on without compiling when compiling fails."""

        def run(self) -> None:
            try:
                super().run()
            except BaseException:
                hint = "D2EXT_BUILD=cpu or D2EXT_BUILD=0" if toolkit else "D2EXT_BUILD=0"
                say(f"compiling csrc/ failed (see above). To install without it, set {hint}.")
                raise

    sources = sorted((ROOT / "csrc").glob("**/*.cpp"))
    # No -std: torch's BuildExtension adds the one that its headers need (C++17; later C++20).
    flags = ["-O3", "-g0", "-fvisibility=hidden"]
    if sys.platform == "linux":
        # OpenMP is not linked: its functions come from the runtime that PyTorch has loaded, so
        # that both share one pool of threads.
        flags.append("-fopenmp")
    compile_args = {"cxx": flags}
    if toolkit:
        sources += sorted((ROOT / "csrc" / "cuda").glob("**/*.cu"))
        compile_args["nvcc"] = ["-O3", "--threads=2"]
        compile_args["nvcc"] += os.environ.get("D2EXT_NVCC_FLAGS", "").split()
    kind = CUDAExtension if toolkit else CppExtension
    extension = kind(
        "d2ext.d2ext_C",
        [str(path.relative_to(ROOT)) for path in sources],
        define_macros=macros,
        include_dirs=includes,
        extra_compile_args=compile_args,
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.*h")],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**extension_arguments())
