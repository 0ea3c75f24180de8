"""Mutation test of a system: changes one constant after another and says which changes no test notices.

    python -m tests.mutations centernet            # a table on standard output, survivors first
    python -m tests.mutations centernet --list     # only what would be changed

Constants are numbers in the system's room and in what it builds on: module constants, defaults, operands
of arithmetic and comparisons; and numbers in its published configs. Integers change by one up and down,
others, and integers from 100 on, by a tenth. Only the system's own tests run, in a copy of the checkout.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Imported once: each change gets a process that has them.
import cv2  # noqa: F401
import detectron2.engine  # noqa: F401
import pytest
import torch
import torchvision  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
# Beside its room and the tests of it: what a system builds on, and the tests of that.
MORE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "centernet": (
        ("d2ext/modeling/heatmap_losses.py", "d2ext/data/augmentations/affine.py"),
        ("tests/data/test_affine.py", "tests/modeling/test_heatmap_losses.py"),
    ),
}
# Files of a room without constants of targets, losses or post-processing.
_LEFT_OUT = ("__init__.py", "checkpoint.py")
# Keyword arguments that say where, not how much.
_PLACES = {"dim", "axis", "dims", "ndmin", "repeats", "start_dim"}
_NUMBER = re.compile(r"(?<![\w.\"'-])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.\"'])")
_LARGE = 100


class Mutation(NamedTuple):
    """``text`` in place of the characters ``start`` to ``end`` of ``file``."""

    file: str
    line: int
    start: int
    end: int
    before: str
    text: str


def variants(number: str) -> list[str]:
    """What a number becomes."""
    value = float(number) if {".", "e"} & set(number) else int(number, 0)
    if value == 0 and isinstance(value, float):
        return ["0.1"]
    if isinstance(value, int) and value < _LARGE:
        return [str(value + 1), str(value - 1)]
    return [str(round(value * 1.1)) if isinstance(value, int) else repr(value * 1.1)]


def in_python(file: str) -> Iterator[Mutation]:
    """Of the constants of a module."""
    text = (ROOT / file).read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(text)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or type(node.value) not in (int, float):
            continue
        above = parents[node]
        while isinstance(above, (ast.UnaryOp, ast.Tuple, ast.List)):
            above = parents[above]
        if isinstance(above, ast.keyword) and above.arg in _PLACES:
            continue
        kinds = (ast.Assign, ast.AnnAssign, ast.arguments, ast.BinOp, ast.Compare, ast.keyword)
        if not isinstance(above, kinds):
            continue
        number = ast.get_source_segment(text, node) or ""
        start = starts[node.lineno - 1] + node.col_offset
        end = start + len(number)
        if (
            text[start:end] != number
        ):  # columns are bytes, and something before it has more than one
            continue
        for changed in variants(number):
            yield Mutation(file, node.lineno, start, end, number, changed)


def in_yaml(file: str) -> Iterator[Mutation]:
    """Of the numbers of a config."""
    start = 0
    for number, line in enumerate((ROOT / file).read_text().splitlines(keepends=True), start=1):
        key, _, value = line.partition("#")[0].partition(":")
        if key.strip() not in ("VERSION", "_BASE_", "SEED", "CHECKPOINT_PERIOD", "EVAL_PERIOD"):
            offset = start + len(key) + 1
            for match in _NUMBER.finditer(value):
                for changed in variants(match[0]):
                    place = offset + match.start(), offset + match.end()
                    yield Mutation(file, number, *place, match[0], changed)
        start += len(line)


def mutations(system: str) -> list[Mutation]:
    """All of a system."""
    room = sorted((ROOT / "d2ext/systems" / system).glob("*.py"))
    files = [str(p.relative_to(ROOT)) for p in room if p.name not in _LEFT_OUT]
    configs = sorted((ROOT / "configs" / system).glob("*.yaml"))
    published = [p for p in configs if not p.stem.endswith(("shapes", "overfit"))]
    found = [m for file in (*files, *MORE.get(system, ((), ()))[0]) for m in in_python(file)]
    return found + [m for p in published for m in in_yaml(str(p.relative_to(ROOT)))]


def default_tests(system: str) -> list[str]:
    """A system's tests, that of the recipes first."""
    room = f"tests/systems/{system}"
    recipe = f"{room}/test_recipe.py"
    first = [recipe] if (ROOT / recipe).exists() else []
    return [*first, room, *MORE.get(system, ((), ()))[1]]


def survives(copy: Path, mutation: Mutation, tests: Sequence[str]) -> bool:
    """Whether the tests pass in a copy of the checkout with this change."""
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(text[: mutation.start] + mutation.text + text[mutation.end :])
    try:
        child = os.fork()
        if child == 0:
            os._exit(_run(copy, tests))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        path.write_text(text)


def _run(copy: Path, tests: Sequence[str]) -> int:
    """Exit status of the tests of the copy, in a process that has the libraries, and nothing of ours."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "d2ext")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    os.chdir(copy)
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


def main() -> int:
    """Run the tool; its exit status is 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system")
    parser.add_argument("--list", action="store_true", help="only say what would be changed")
    parser.add_argument("--only", default="", help="part of the name of a file")
    parser.add_argument("--tests", default="", help="file of tests, in place of all of the system")
    parser.add_argument("--pytest", default="", help="further arguments, such as \"-k 'not slow'\"")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    found = [m for m in mutations(args.system) if args.only in m.file]
    tests = [args.tests] if args.tests else default_tests(args.system)
    tests += shlex.split(args.pytest)
    rows: list[tuple[bool, Mutation]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        if not args.list:
            shutil.copytree(
                ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "output", "build")
            )
        for number, m in enumerate(found, start=1):
            alive = not args.list and survives(copy, m, tests)
            rows.append((alive, m))
            if not args.list:
                print(f"{number}/{len(found)}", m.file, m.line, m.text, alive, file=sys.stderr)
    print(f"{len(found)} mutations, {sum(alive for alive, _ in rows)} survive\n")
    print("| | file | constant | becomes |\n| --- | --- | --- | --- |")
    for alive, m in sorted(rows, key=lambda row: not row[0]):
        state = "" if args.list else "survives" if alive else "killed"
        print(f"| {state} | {m.file}:{m.line} | {m.before} | {m.text} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
