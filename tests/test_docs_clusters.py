"""docs/clusters.md: its commands and options exist."""

from __future__ import annotations

import pytest

from tests.test_documents import ROOT, commands, help_of

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
STARTED = [words for words in commands(PAGE) if "tools/train_net.py" in words]


def options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def test_every_way_is_shown() -> None:
    assert [words[0] for words in STARTED].count("python") == 3
    assert {words[0] for words in STARTED} == {"python", "torchrun", "srun"}


@pytest.mark.parametrize("words", STARTED, ids=" ".join)
def test_options_exist(words: list[str]) -> None:
    tool = words.index("tools/train_net.py")
    assert options(words[tool:]) <= set(help_of("tools/train_net.py").replace(",", " ").split())
    assert (ROOT / words[words.index("--config-file") + 1]).is_file()
    if words[0] == "torchrun":
        known = help_of("-m", "torch.distributed.run").replace(",", " ").split()
        assert options(words[:tool]) <= set(known)
