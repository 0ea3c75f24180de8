"""Fixtures that several test files share."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
# Half of the suite's time: whole published networks, programs that are started, several processes.
# `make test-fast` leaves them out.
SLOW = (
    *(
        "/test_reference.py",
        "/test_published_files.py",
        "/test_path.py",
        "/test_saccade.py",
        "/test_convert.py",
        "/test_detectron2_models.py",
    ),
    *(
        "engine/test_processes.py",
        "export/test_systems.py",
        "reliability/test_interrupts.py",
        "reliability/test_orphans.py",
        "tools/compare/",
        "tools/test_main.py",
        "tools/test_train.py",
    ),
    *("docs/", "test_docs_clusters.py", "test_package.py", "scripts/test_demo.py"),
)


def pytest_configure() -> None:
    """Each start of a training writes and reads its whole config several times: here by PyYAML's part
    in C, which gives the same. Detectron2 also colours it for the log, and makes an OmegaConf of it for
    each of three keys that it looks up."""
    from detectron2.config import CfgNode  # which reads DETECTRON2_DATASETS, see below
    from detectron2.engine import defaults

    if yaml.__with_libyaml__:
        yaml.SafeLoader, yaml.SafeDumper = yaml.CSafeLoader, yaml.CSafeDumper
    look_up = defaults._try_get_key

    def try_get_key(cfg: Any, *keys: str, default: Any = None) -> Any:
        if isinstance(cfg, CfgNode) and keys[0] in cfg:
            return cfg[keys[0]]
        return look_up(cfg, *keys, default=default)

    defaults._try_get_key = try_get_key
    defaults._highlight = lambda code, filename: code


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow ones, which begin; attacks that take minutes run only when they are asked for."""
    for item in items:
        if item.get_closest_marker("attack") and "attack" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m attack"))
        if any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)
    # A worker takes whole files (pytest --dist loadfile): none should be busy alone in the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _give_memory_back() -> Iterator[None]:
    """A file's models go; the C library would keep their memory, gigabytes after the largest."""
    yield
    if sys.platform == "linux":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def find_real_data() -> Path | None:
    """The folder that holds the real ``coco/``, or None."""
    candidates = [os.environ.get("DETECTRON2_DATASETS"), REPOSITORY.parent / "shared" / "data"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "coco/annotations/instances_val2017.json").is_file():
            return Path(candidate)
    return None


# Detectron2 reads the variable when it registers its built-in data sets, that is on import.
if (_found := find_real_data()) is not None:
    os.environ.setdefault("DETECTRON2_DATASETS", str(_found))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real images (``coco/``, ``landmarks/``, ``video/``, ``flow/``)."""
    found = find_real_data()
    if found is None:
        pytest.skip("real images not found: set DETECTRON2_DATASETS or provide ../shared/data")
    return found


@pytest.fixture(scope="session")
def real_coco(real_data: Path) -> Path:
    """Folder ``coco/`` of the real images, in the official layout."""
    return real_data / "coco"


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device; the test is skipped on machines without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
