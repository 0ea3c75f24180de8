"""Fixtures of the tests of `d2ext compare`."""

import pytest

from d2ext.tools.compare import validation_images


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two validation images are measured once, one of them is drawn."""
    for name, value in (("MEASURED", 2), ("DRAWN", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(validation_images, name, value)
