"""The toy training of tests/engine."""

from tests.engine.conftest import _logging, build, toy_json  # noqa: F401  (fixtures)
