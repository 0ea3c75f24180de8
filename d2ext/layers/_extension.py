"""Finds and loads the compiled operators (``csrc/``, built by ``setup.py``), if they are there.

Importing d2ext never fails because they are absent: every operator then runs its plain PyTorch
implementation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

SLOW_WITHOUT = (
    "assemble_masks",
    "assemble_binary_masks",
    "corner_pool",
    "prune_masks",
    "fuse_panoptic",
    "soft_nms",
    "deform_conv2d",
)
"""Operators whose plain PyTorch implementation is several times slower than the compiled one."""

_OPERATORS = (
    "assemble_masks",
    "assemble_binary_masks",
    "corner_pool",
    "deform_conv2d",
    "nms",
    "overlapped",
    "soft_nms",
    "prune_masks",
    "fuse_panoptic",
)
"""What a library compiled from this csrc/ holds."""

_FOR_GPUS = ("nms", "overlapped")
"""Those of them without a kernel for CPUs."""


@dataclass(frozen=True)
class ExtensionInfo:
    """How the compiled operators were built.

    Attributes:
        path: the library's file; None if d2ext was installed uncompiled.
        torch: version of PyTorch that it was compiled against.
        cuda: version of CUDA that it was compiled for; None if it has CPU kernels only.
        cuda_archs: GPU architectures, as in ``TORCH_CUDA_ARCH_LIST``.
        compiler: C++ compiler.
        error: why an existing library cannot be used; None if it can be, or if there is none.
    """

    path: Path | None = None
    torch: str | None = None
    cuda: str | None = None
    cuda_archs: tuple[str, ...] = ()
    compiler: str | None = None
    error: str | None = None

    @property
    def usable(self) -> bool:
        return self.path is not None and self.error is None


def _find_library(folder: Path) -> Path | None:
    """The library in ``folder`` that was built for this Python; None if there is none."""
    candidates = (folder / f"d2ext_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _release(version: str) -> list[str]:
    """Major and minor number: PyTorch keeps its binary interface within them."""
    return version.split("+")[0].split(".")[:2]


def _is_compiled(operator: str) -> bool:
    """Whether the loaded library has the operator, with a kernel for CPUs unless it is for GPUs."""
    return hasattr(torch.ops.d2ext, operator) and (
        operator in _FOR_GPUS
        or torch._C._dispatch_has_kernel_for_dispatch_key(f"d2ext::{operator}", "CPU")
    )


def _load(folder: Path) -> ExtensionInfo:
    path = _find_library(folder)
    if path is None:
        return ExtensionInfo()
    try:
        torch.ops.load_library(path)
    except OSError as error:  # undefined symbols: compiled against another PyTorch
        return ExtensionInfo(path=path, error=str(error))
    built = dict(line.split("=", 1) for line in torch.ops.d2ext._build_info().splitlines())
    mismatch = None
    if _release(built["torch"]) != _release(torch.__version__):
        mismatch = f"compiled against PyTorch {built['torch']}, but this is {torch.__version__}"
    missing = [name for name in _OPERATORS if not _is_compiled(name)]
    if missing:
        mismatch = f"compiled from an older csrc/, without {', '.join(missing)}"
    return ExtensionInfo(
        path=path,
        torch=built["torch"],
        cuda=built.get("cuda"),
        cuda_archs=tuple(filter(None, built.get("cuda_archs", "").split(";"))),
        compiler=built.get("compiler"),
        error=mismatch,
    )


_info = _load(Path(__file__).resolve().parent.parent)
if _info.error is not None:
    warnings.warn(
        f"d2ext: the compiled operators in {_info.path} cannot be used ({_info.error}). Compile "
        "them again: pip install --no-build-isolation --force-reinstall --no-deps .",
        RuntimeWarning,
        stacklevel=2,
    )

_warned: set[str] = set()


def extension_info() -> ExtensionInfo:
    """How the compiled operators were built, and whether they can be used."""
    return _info


def has_extension() -> bool:
    """Whether the compiled operators can be used (on CPU tensors at least)."""
    return _info.usable


def has_cuda_extension() -> bool:
    """Whether the compiled operators can be used on CUDA tensors."""
    return _info.usable and _info.cuda is not None


def compiled_for(device: torch.device) -> bool:
    """Whether the compiled operators can be used on tensors of ``device``.

    Where they cannot on a CPU or a GPU, the first call warns, naming the slow operators.
    """
    usable = has_cuda_extension() if device.type == "cuda" else has_extension()
    if usable and device.type in ("cpu", "cuda", "meta"):
        return True
    if device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        _warn_uncompiled(device.type)
    return False


def _warn_uncompiled(device_type: str) -> None:
    if device_type in _warned:
        return
    _warned.add(device_type)
    build = "D2EXT_BUILD=cuda " if device_type == "cuda" else ""
    warnings.warn(
        f"d2ext: the operators are not compiled for {device_type.upper()}; plain PyTorch is used "
        f"instead, and these are slow: {', '.join(SLOW_WITHOUT)}. To compile them: "
        f"{build}pip install --no-build-isolation .",
        RuntimeWarning,
        stacklevel=4,
    )


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Register the gradient of ``d2ext::name``; second derivatives raise an error.

    Registered on the operators themselves, so that torch.autograd, torch.compile and export see it.
    """
    torch.library.register_autograd(f"d2ext::{name}", backward, setup_context=setup_context)

    def no_second_derivatives(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{name}: second derivatives are not implemented; use d2ext.layers.{name}_reference "
            "for them"
        )

    torch.library.register_autograd(f"d2ext::{name}_backward", no_second_derivatives)
