"""`d2ext COMMAND`: every command has a help for a newcomer, and the scripts are the same programs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import d2ext
from d2ext.tools import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", main.COMMANDS)
def test_each_command_has_a_help(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["python"])
    with pytest.raises(SystemExit) as stopped:
        main.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: d2ext {command} ")
    if command != "info":
        assert f"    d2ext {command} " in text  # an example


def test_an_interrupt_is_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("d2ext.tools.convert.run", interrupted)
    monkeypatch.setattr(sys, "argv", ["python"])
    assert main.main(["convert", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture) -> None:
    assert main.main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z-]+)  +\w", capsys.readouterr().out, flags=re.MULTILINE)
    assert listed == list(main.COMMANDS)
    assert main.main([]) == 2 and main.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"d2ext {d2ext.__version__}\n")
    assert main.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.stem)
def test_scripts_are_the_commands(script: Path) -> None:
    (module,) = re.findall(r"from (d2ext\.tools\.\w+) import run", script.read_text())
    assert module in {name for name, _ in main.COMMANDS.values()}
    assert callable(importlib.import_module(module).run)
    # A process that is spawned imports the script; it must not begin again.
    assert "__main__" in script.read_text()


def test_evaluation_is_offered_without_what_only_training_needs(
    capsys: pytest.CaptureFixture,
) -> None:
    from d2ext.tools import evaluate

    with pytest.raises(SystemExit):
        evaluate.run(["--help"])
    text = capsys.readouterr().out
    assert "--val-json" in text and "--resume" in text
    assert "--train-json" not in text and "--eval-only" not in text
    assert evaluate.run(["--config-file", "yolact/yolact_R_18_shapes.yaml", "SEED"]) == 2


def test_programs_start_from_any_folder(tmp_path: Path) -> None:
    for words in (["-m", "d2ext", "info"], [str(ROOT / "tools" / "train_net.py"), "--help"]):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert "PyTorch" in done.stdout or "usage: train_net.py" in done.stdout
