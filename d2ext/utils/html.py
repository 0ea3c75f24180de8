"""Pages that tools write: one HTML file with tables and pictures beside it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from tabulate import tabulate

__all__ = ["escape", "page", "table"]

_STYLE = """body { font: 15px/1.5 sans-serif; max-width: 1300px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right;
border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; vertical-align: top } .plots img { max-width: 49% }
.pictures { table-layout: fixed; width: 100% } .pictures td, .pictures th { padding: .2em;
text-align: center }"""


def page(title: str, parts: Iterable[str]) -> str:
    """A page of parts that are HTML, below its title."""
    title = escape(title)
    head = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    return "\n".join([head, f"<style>{_STYLE}</style><h1>{title}</h1>", *parts])


def table(rows: Any, headers: Any, *, formatted: bool = False) -> str:
    """Rows as :func:`tabulate.tabulate` takes them; numbers with two decimals, or as they are if
    ``formatted``."""
    return str(
        tabulate(
            rows,
            headers=headers,
            tablefmt="html",
            floatfmt=".2f",
            missingval="–",
            disable_numparse=formatted,
        )
    )
