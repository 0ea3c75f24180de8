"""``d2ext info``: versions, what is compiled, which GPU. For bug reports."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from importlib import metadata

import torch

from d2ext.layers._extension import SLOW_WITHOUT, extension_info
from d2ext.version import __version__

_PACKAGES = ("torchvision", "numpy", "opencv-python-headless", "pycocotools")


def collect() -> dict[str, str]:
    """Name -> what there is, in the order in which it is printed."""
    facts = {
        "d2ext": __version__,
        "Python": f"{platform.python_version()} ({platform.platform()})",
        "PyTorch": torch.__version__,
        "CUDA of PyTorch": torch.version.cuda or "none (CPU build)",
    }
    facts.update({name: _version(name) for name in _PACKAGES})
    facts["detectron2"] = _detectron2()
    facts.update(_compiled())
    facts["GPU"] = _gpus()
    facts["CPU"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _detectron2() -> str:
    try:
        detectron2 = importlib.import_module("detectron2")
    except ImportError as error:
        return f"cannot be imported: {error}"
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        compiled = "without its compiled part (d2ext does not need it)"
    else:
        compiled = "with its compiled part"
    return f"{detectron2.__version__}, {compiled}"


def _compiled() -> dict[str, str]:
    info = extension_info()
    if info.path is None:
        return {"compiled operators": f"none: slow {', '.join(SLOW_WITHOUT)}"}
    if info.error is not None:
        return {"compiled operators": f"unusable: {info.error}", "library": str(info.path)}
    cuda = "no CUDA"
    if info.cuda is not None:
        cuda = f"CUDA {info.cuda} for architectures {', '.join(info.cuda_archs)}"
    return {
        "compiled operators": f"CPU; {cuda}",
        "compiled with": f"{info.compiler}, PyTorch {info.torch}",
        "library": str(info.path),
    }


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    described = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        described.append(
            f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    return "; ".join(described)


def run(arguments: list[str] | None = None) -> int:
    """Print the facts; the exit status."""
    argparse.ArgumentParser(description="Show versions, what is compiled, GPUs.").parse_args(
        arguments
    )
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(run())
