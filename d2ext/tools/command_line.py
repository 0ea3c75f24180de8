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


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-file``, which must be given."""
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a path, or a name in the model zoo"
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for ``add_argument(type=...)``."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 on")
    return int(text)
