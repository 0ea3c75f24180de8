"""Published configs compared with the facts of tests/reference/*/NOTES.md, number by number."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from d2ext import model_zoo


def _flat(value: Any) -> list[Any]:
    """Nested lists and tuples as one list."""
    if isinstance(value, (list, tuple)):
        return [y for x in value for y in _flat(x)]
    return [value]


def assert_recipe(config: str, facts: dict[str, Any]) -> None:
    """The values of a config: ``facts`` holds keys with points, and what they are."""
    cfg = model_zoo.get_config(config)
    for key, expected in facts.items():
        actual = _flat(reduce(getattr, key.split("."), cfg))
        same = [
            pytest.approx(x, rel=1e-6) if type(x) in (int, float) else x for x in _flat(expected)
        ]
        assert actual == same, key


def under(prefix: str, facts: dict[str, Any]) -> dict[str, Any]:
    """``facts`` with the node ``prefix`` before each key."""
    return {f"{prefix}.{key}": value for key, value in facts.items()}
