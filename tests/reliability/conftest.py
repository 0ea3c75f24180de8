"""Attacks that take minutes run only when they are asked for: ``pytest tests/reliability -m attack``."""

from __future__ import annotations

import pytest

from tests.engine.conftest import _logging, build, toy_json  # noqa: F401  (fixtures)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("attack") and "attack" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m attack"))
