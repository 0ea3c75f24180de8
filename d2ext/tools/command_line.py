"""What the commands share: parsers, and numbers on the command line."""

from __future__ import annotations

import argparse


class CommandError(ValueError):
    """The command cannot be carried out. The message says what to change."""


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring: first paragraph, options, the rest."""
    summary, _, details = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config_argument(
    parser: argparse.ArgumentParser, *, or_run: bool = False, or_exported: bool = False
) -> None:
    """Add ``--config-file``, which must be given, or, with ``or_run``, ``--run``, or, with
    ``or_exported``, ``--exported``."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--config-file", metavar="FILE", help="a path, or a name in the model zoo")
    if or_run:
        add_run_argument(group)
    if or_exported:
        add_exported_argument(group)


def add_exported_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--exported``, see :class:`~d2ext.export.ExportedFile`."""
    parser.add_argument(
        "--exported",
        metavar="FILE",
        help="a file of `d2ext export` (.onnx, .pt2), in place of a config and MODEL.WEIGHTS",
    )


def add_run_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--run``, see :func:`~d2ext.engine.run_folder.load_run`."""
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="the folder of a training (its OUTPUT_DIR), in place of a config and MODEL.WEIGHTS; it "
        "knows classes, their ids, keypoints and the trained weights",
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for ``add_argument(type=...)``."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 on")
    return int(text)
