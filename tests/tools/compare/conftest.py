"""Fixtures of the tests of `d2ext compare`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from d2ext.tools.command_line import CommandError
from d2ext.tools.compare import runner, validation_images
from d2ext.tools.main import main


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two validation images are measured once, one of them is drawn."""
    for name, value in (("MEASURED", 2), ("DRAWN", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(validation_images, name, value)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``processes(n)``: so many trainings and evaluations get a process, which imports for seconds; the
    others run in the test's own."""

    def arrange(number: int) -> None:
        original = runner.start
        started: list[str] = []

        def start(
            command: str, arguments: Sequence[str], folder: Path, environment: Any = None
        ) -> None:
            started.append(command)
            if len(started) <= number:
                original(command, arguments, folder, environment)
            elif main([command, *arguments, "OUTPUT_DIR", str(folder)]):
                raise CommandError(f"{command} has failed")

        monkeypatch.setattr(runner, "start", start)

    return arrange
