"""Fixtures of the tools' tests."""

from collections.abc import Callable
from typing import Any

import pytest

from d2ext.tools import predict
from tests.engine.conftest import toy_json, train_ranks  # noqa: F401  (fixtures)


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``interrupt_at(n)``: the n-th call of the model by `d2ext predict` is interrupted by Ctrl-C."""

    def arrange(number: int) -> None:
        original, calls = predict.predict, []

        def interrupted(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(predict, "predict", interrupted)

    return arrange
