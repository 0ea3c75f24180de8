"""python -m d2ext.info."""

from __future__ import annotations

from pathlib import Path

import torch

import d2ext
from d2ext import info
from d2ext.layers import _extension


def test_says_versions_and_what_is_compiled(capsys):
    assert info.run([]) == 0
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["d2ext"].strip() == d2ext.__version__
    assert facts["PyTorch"].strip() == torch.__version__
    for name in ("torchvision", "numpy", "detectron2", "compiled operators", "GPU"):
        assert facts[name].strip()
    assert facts["detectron2"].strip()[0].isdigit()


def test_names_the_slow_operators_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(_extension, "_info", _extension.ExtensionInfo())
    assert "assemble_binary_masks" in info.collect()["compiled operators"]


def test_shows_what_is_compiled_or_why_it_is_unusable(monkeypatch):
    built = _extension.ExtensionInfo(
        path=Path("d2ext_C.so"),
        torch="2.11.0",
        cuda="13.0",
        cuda_archs=("8.0", "9.0"),
        compiler="gcc 12",
    )
    monkeypatch.setattr(_extension, "_info", built)
    assert info.collect()["compiled operators"] == "CPU; CUDA 13.0 for architectures 8.0, 9.0"
    broken = _extension.ExtensionInfo(path=Path("d2ext_C.so"), error="undefined symbol")
    monkeypatch.setattr(_extension, "_info", broken)
    assert info.collect()["compiled operators"] == "unusable: undefined symbol"
