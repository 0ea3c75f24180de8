"""Files of all systems, exported once for all tests of this folder."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.export.cases import CASES, Exported, export_case


@pytest.fixture(scope="session")
def exported_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Name of a case → its model and files."""
    return functools.cache(lambda name: export_case(CASES[name], tmp_path_factory.mktemp(name)))
