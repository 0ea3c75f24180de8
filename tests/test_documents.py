"""What the documents say exists: commands, options, files, config keys, versions."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.config import get_cfg
from d2ext.tools import main
from d2ext.version import __version__
from tests.data.coco_files import write_coco

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README, CONTRIBUTING, _ = (path.read_text(encoding="utf-8") for path in FILES)
# What users read; the changelog may name what is gone.
TEXT = "\n".join([README, CONTRIBUTING, *(path.read_text(encoding="utf-8") for path in PAGES)])


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks, comments and line breaks resolved."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def tool_commands() -> list[list[str]]:
    """The words after `python` of what the pages let Python run, each command once; `d2ext train ...` is
    `python -m d2ext train ...`."""
    found = [["python", "-m", *w] if w[0] == "d2ext" else w for w in commands(TEXT)]
    return [list(w) for w in dict.fromkeys(tuple(w[1:]) for w in found if w[0] == "python")]


COMMAND = re.compile(
    "train|evaluate|predict|web|convert|visualize-data|benchmark|compare|export|model|operators|training|info"
)


@functools.cache
def help_of(*tool: str) -> str:
    """What `--help` prints; of a script what it says of itself and of its options."""
    if tool[:2] != ("-m", "d2ext"):
        if tool[0] == "-m":
            return printed(lambda: runpy.run_module(tool[1], run_name="__main__"))
        if tool[0].startswith("tools/"):
            name = {"train_net": "train", "demo": "predict"}.get(
                Path(tool[0]).stem, Path(tool[0]).stem
            )
            return help_of("-m", "d2ext", name)
        return (ROOT / tool[0]).read_text(encoding="utf-8")
    return printed(lambda: main.main([*tool[2:], "--help"]))


def printed(program: Callable[[], object]) -> str:
    """What a program prints when it is asked for help."""
    before, text = sys.argv, io.StringIO()
    sys.argv = [before[0], "--help"]
    # Torchrun's does not exit.
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        program()
    sys.argv = before
    return text.getvalue()


def test_the_tools_know_the_options() -> None:
    unknown = []
    for words in tool_commands():
        # Each command has a help, and so have the commands of `d2ext benchmark` and `d2ext compare`.
        start = 2 if words[0] == "-m" else 1
        count = start
        if words[:2] == ["-m", "d2ext"]:
            count += sum(1 for _ in itertools.takewhile(COMMAND.fullmatch, words[start:]))
        known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(*words[:count])))
        used = {word.split("=")[0] for word in words[count:] if word.startswith("--")}
        unknown += [(" ".join(words), option) for option in used - known]
    assert not unknown


def test_config_files_and_keys_of_commands_exist() -> None:
    missing = []
    for words in tool_commands():
        for option, value in itertools.pairwise(words):
            if option == "--config-file" and not re.fullmatch(
                r"CONFIG|output/.*|COCO-.*|toy/.*", value
            ):
                path = ROOT / "configs" / value.removeprefix("configs/")
                missing += [] if path.is_file() else [value]
        for word in words:
            if re.fullmatch(r"[A-Z_]+(\.[A-Z_0-9]+)+", word):
                assert_key(word)
    assert not missing


def test_tools_and_modules_in_the_text_exist() -> None:
    tools = re.findall(r"\b((?:tools|scripts)/\w+\.\w+)", TEXT)
    modules = re.findall(r"python -m (d2ext[\w.]*)", TEXT)
    assert "tools/train_net.py" in tools
    assert [name for name in tools if not (ROOT / name).is_file()] == []
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_config_keys_in_the_text_exist() -> None:
    inline = re.findall(
        r"`((?:MODEL|INPUT|SOLVER|TEST|DATASETS|DATALOADER)\.[A-Z_0-9.]+)\b[^`]*`", TEXT
    )
    assert "MODEL.WEIGHTS" in inline
    for key in inline:
        if not key.startswith("MODEL.TOY."):  # of CONTRIBUTING's walk
            assert_key(key)


def assert_key(key: str) -> None:
    node = get_cfg()
    for part in key.split("."):
        assert part in node, f"{key} is no config key"
        node = node[part]


def test_make_targets_exist() -> None:
    text = TEXT
    targets = {words[1] for words in commands(text) if words[0] == "make"}
    targets |= set(re.findall(r"`(?:\w+=\w+ )?make ([a-z-]+)", text))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "lint"} <= targets <= defined


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub and the site name them."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if file == ROOT / "docs" / "contributing.md":  # which includes it
            file = ROOT / "CONTRIBUTING.md"
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^[a-z_0-9]+$", contents, flags=re.MULTILINE))
    assert listed == {path.stem for path in PAGES} - {"index"}


def test_the_table_of_models_is_what_its_script_writes() -> None:
    specification = importlib.util.spec_from_file_location("table", ROOT / "scripts/model_table.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.table()


def test_versions_are_those_of_the_requirements() -> None:
    pins = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "requirements").glob("*.txt")
    )
    named = re.findall(r"\b([a-z][\w-]+==[\d.]+\d)", TEXT)
    assert {name.split("==")[0] for name in named} >= {"torch", "torchvision", "sal-detectron2"}
    for requirement in named:
        assert re.search(rf"^{re.escape(requirement)}\b", pins, flags=re.MULTILINE), requirement


@pytest.mark.parametrize("source", blocks(README, "python"))
def test_python_examples_import_what_exists(source: str) -> None:
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports
    exec(compile(ast.Module(imports, type_ignores=[]), "README.md", "exec"), {})
    names = re.findall(r'"([\w/]+\.yaml)"', source)
    from d2ext import model_zoo

    for name in names:
        model_zoo.get_config(name)


def test_table_of_systems_is_honest() -> None:
    """What it names is registered, as a meta-architecture or as ROI heads."""
    from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

    import d2ext  # noqa: F401  (registers)

    architectures = {
        "YOLACT, YOLACT++": "YOLACT",
        "CornerNet, -Squeeze, -Saccade": "CornerNetSaccade",
        "CenterNet (triplets)": "CenterNetTriplets",
        "CenterNet (points)": "CenterNet",
        "UPSNet": "UPSNet",
        "LandmarkNet": "LandmarkNet",
        "YolactEdge": "YolactEdge",
        "VPSNet": "VPSNet",
        "RetinaFace": "RetinaFace",
        "DensePose": "DensePoseROIHeads",
    }
    # The name is the link's text.
    names = re.findall(r"^\| \[([^\]]+)\].* \| [^|]+ \|$", README, flags=re.MULTILINE)
    assert names == list(architectures)
    for name, model in architectures.items():
        assert model in META_ARCH_REGISTRY or model in ROI_HEADS_REGISTRY, name


def test_own_data_from_the_first_look_to_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands as they stand, with a small config: what one writes is what the next reads."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8").split("## Your own data")[1]
    steps = commands(f"```bash\n{blocks(text, 'bash')[0]}```")
    assert [words[:2] for words in steps] == [
        ["d2ext", name] for name in ("visualize-data", "train", "evaluate", "predict")
    ]
    json_file, images, _ = write_coco(tmp_path / "set")
    for name in ("train", "val"):
        shutil.copytree(images, tmp_path / name)
        shutil.copy(json_file, tmp_path / f"{name}.json")
    shutil.copytree(images, tmp_path / "photos")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet50.pth")
    monkeypatch.chdir(tmp_path)
    small = ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]
    for words in steps:
        words = ["yolact/yolact_R_18_shapes.yaml" if ".yaml" in w else w for w in words[1:]]
        if words[0] == "train":
            words = ["train", "--epochs", "1", *words[1:], *small]
        assert main.main(words) == 0, words
        for name in {"mine_train", "mine_val"} & set(DatasetCatalog.list()):  # another process
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)
    assert len(list((tmp_path / "output/data").iterdir())) >= 3
    names = {file.name for file in (tmp_path / "predictions").iterdir()}
    assert "coco_results.json" in names and len(names) >= 5
    assert (tmp_path / "output/mine/evaluation/results.json").is_file()


def test_the_release_is_called_alike_everywhere() -> None:
    release = re.search(r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = (ROOT / "CITATION.cff").read_text()
    assert release is not None
    assert release[1] == __version__
    assert f"\nversion: {release[1]}\ndate-released: {release[2]}\n" in citation
