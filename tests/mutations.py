"""Mutation test of a system: changes one constant after another and says which changes no test notices.

    python -m tests.mutations centernet            # a table on standard output, survivors first
    python -m tests.mutations centernet --list     # only what would be changed

Constants are numbers in the system's room and in what it builds on: module constants, defaults, operands
of arithmetic and comparisons; and numbers in its published configs. Integers change by one up and down,
others, and integers from 100 on, by a tenth. The system's own tests run once, in a copy of the checkout;
then, for each change, those that call the changed function, fastest first, until one fails.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

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
    "yolact": (("d2ext/codecs/prior_boxes.py",), ("tests/codecs/test_prior_boxes.py",)),
    "cornernet": (("d2ext/codecs/corners.py",), ("tests/codecs/test_corners.py",)),
    "landmarks": (
        (
            *(f"d2ext/codecs/landmark{x}.py" for x in ("_heatmaps", "_integral", "_simcc", "s")),
            "d2ext/data/landmarks/hourglass.py",
        ),
        ("tests/codecs/test_landmarks.py", "tests/data/landmarks/test_hourglass.py"),
    ),
    "upsnet": (("d2ext/codecs/image_scale.py",), ("tests/codecs/test_image_scale.py",)),
    "densepose": (("d2ext/codecs/densepose.py",), ("tests/codecs/test_densepose.py",)),
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
    function: str | None = None
    """Qualified name of the function whose body holds it."""


class Test(NamedTuple):
    """A test: its seconds, its name, and the (file, function) that it and its fixtures call."""

    seconds: float
    name: str
    calls: set[tuple[str, str]]


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
            function = function_of(node, parents)
            yield Mutation(file, node.lineno, start, end, number, changed, function)


def function_of(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str | None:
    """Qualified name of the function whose body holds ``node``, None for none, as in a default."""
    names: list[str] = []
    while node in parents:
        child, node = node, parents[node]
        if isinstance(node, ast.FunctionDef):
            if not names and child not in node.body:
                return None
            names[:0] = [node.name, "<locals>"]
        elif isinstance(node, ast.ClassDef):
            if not names:
                return None
            names.insert(0, node.name)
    return ".".join(names[:-1]) or None


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
    published = [p for p in configs if not p.stem.lower().endswith(("shapes", "overfit"))]
    found = [m for file in (*files, *MORE.get(system, ((), ()))[0]) for m in in_python(file)]
    return found + [m for p in published for m in in_yaml(str(p.relative_to(ROOT)))]


class Observer:
    """Plugin of pytest: which functions of the given files a test, or a fixture that it uses, calls."""

    def __init__(self, files: set[str]) -> None:
        self.files = files
        self.calls: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.used: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    def _observed(self, key: str) -> Any:
        before, calls, start = sys.getprofile(), self.calls[key], time.process_time()

        def called(frame: FrameType, event: str, _: Any) -> None:
            code = frame.f_code
            if event == "call" and code.co_filename in self.files:
                calls.add((code.co_filename, code.co_qualname))

        sys.setprofile(called)
        try:
            return (yield)
        finally:
            sys.setprofile(before)
            self.seconds[key] += time.process_time() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        return (yield from self._observed(f"{fixturedef.baseid}:{fixturedef.argname}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        used = item._fixtureinfo.name2fixturedefs.values()
        names = (f"{d.baseid}:{d.argname}" for definitions in used for d in definitions)
        self.used[item.nodeid] = [item.nodeid, *names]
        return (yield from self._observed(item.nodeid))

    def found(self) -> list[Test]:
        """The tests that ran, fastest first."""
        return sorted(
            Test(
                sum(self.seconds[k] for k in keys),
                name,
                set().union(*(self.calls[k] for k in keys)),
            )
            for name, keys in self.used.items()
        )


def in_child(work: Callable[[], Any]) -> Any:
    """The result of ``work`` in a process of its own, which prints nothing; None if it ended itself."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        with open(write, "wb") as file:
            file.write(pickle.dumps(work()))
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        content = file.read()
    os.waitpid(child, 0)
    return pickle.loads(content) if content else None


def run_tests(tests: Iterable[str], *plugins: object) -> int:
    """Exit status of pytest, which ends at the first test that fails."""
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests], plugins=plugins))


def observe(files: Iterable[str], tests: Sequence[str]) -> list[Test]:
    """The tests, run once: which functions of the files they call."""
    observer = Observer({os.path.abspath(file) for file in files})
    if run_tests(tests, observer):
        raise RuntimeError("The tests fail without any change.")
    return observer.found()


def exchange(path: str, text: str) -> None:
    """Give the functions of an imported module the code of ``text``, which has the same lines."""
    codes: dict[tuple[str, int], CodeType] = {}
    pending = [compile(text, path, "exec", dont_inherit=True)]
    while pending:
        code = pending.pop()
        codes[code.co_qualname, code.co_firstlineno] = code
        pending += [x for x in code.co_consts if isinstance(x, CodeType)]
    for function in [x for x in gc.get_objects() if isinstance(x, FunctionType)]:
        code = function.__code__
        if code.co_filename == path:
            function.__code__ = codes.get((code.co_qualname, code.co_firstlineno), code)


def survives(mutation: Mutation, tests: Sequence[Test], limit: float) -> bool:
    """Whether the tests, in order up to ``limit`` seconds in all, pass with this change in the current
    folder, a copy of the checkout."""
    path = Path(mutation.file)
    absolute, function = str(path.absolute()), mutation.function
    selected, total = [], 0.0
    for test in tests:
        calls = {name for file, name in test.calls if file == absolute}
        if path.suffix == ".yaml" or (function in calls if function else calls):
            total += test.seconds
            if selected and total > limit:
                break
            selected.append(test.name)
    if not selected:
        return True
    before = path.read_text()
    text = before[: mutation.start] + mutation.text + before[mutation.end :]

    def work() -> int:
        if function:
            exchange(absolute, text)
        return run_tests(selected)

    path.write_text(text)
    try:
        return in_child(work) == 0
    finally:
        path.write_text(before)


def main() -> int:
    """Run the tool; its exit status is 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system")
    parser.add_argument("--list", action="store_true", help="only say what would be changed")
    parser.add_argument("--only", default="", help="files: a regular expression")
    parser.add_argument("--tests", default="", help="tests, in place of all of the system")
    parser.add_argument("--pytest", default="", help="further arguments, such as \"-k 'not slow'\"")
    parser.add_argument("--again", default="", help="table of before: only what survived")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of tests for a change")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    found = [m for m in mutations(args.system) if re.search(args.only, m.file)]
    if args.again:
        alive = {x for x in Path(args.again).read_text().splitlines() if x.startswith("| survives")}
        found = [m for m in found if row(m, "survives") in alive]
    # Constants outside functions need a process that has nothing of ours yet.
    found.sort(key=lambda m: m.function is not None or m.file.endswith(".yaml"))
    rows = [(False, m) for m in found] if args.list else check(args, found)
    print(f"{len(rows)} mutations, {sum(alive for alive, _ in rows)} survive\n")
    print("| | file | constant | becomes |\n| --- | --- | --- | --- |")
    for alive, m in sorted(rows, key=lambda row: (not row[0], row[1])):
        print(row(m, "" if args.list else "survives" if alive else "killed"))
    return 0


def row(m: Mutation, state: str) -> str:
    """Of the table."""
    return f"| {state} | {m.file}:{m.line} | {m.before} | {m.text} |"


def check(args: argparse.Namespace, found: list[Mutation]) -> list[tuple[bool, Mutation]]:
    """Which changes survive."""
    chosen = args.tests.split() or [
        f"tests/systems/{args.system}",
        "tests/systems/test_defaults.py",
        *MORE.get(args.system, ((), ()))[1],
    ]
    chosen += shlex.split(args.pytest)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "checkout"
        ignored = shutil.ignore_patterns(".git", "output", "build")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "d2ext")]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        os.chdir(copy)
        tests = in_child(lambda: observe({m.file for m in found}, chosen))
        if tests is None:
            raise RuntimeError("The tests fail without any change.")
        imported = False
        for number, m in enumerate(found, start=1):
            if not imported and (m.function or m.file.endswith(".yaml")):
                imported = True
                with contextlib.redirect_stdout(sys.stderr):
                    run_tests(["--collect-only", *chosen])
            alive = survives(m, tests, args.limit)
            rows.append((alive, m))
            print(f"{number}/{len(found)}", m.file, m.line, m.text, alive, file=sys.stderr)
    return rows


if __name__ == "__main__":
    sys.exit(main())
