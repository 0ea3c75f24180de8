"""What the documents say exists: commands, options, files, config keys, versions."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.config import get_cfg
from d2ext.tools import main
from tests.data.coco_files import write_coco

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks, comments and line breaks resolved."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def tool_commands() -> list[list[str]]:
    """What Python runs: `d2ext train ...` is `python -m d2ext train ...`."""
    found = [
        ["python", "-m", *words] if words[0] == "d2ext" else words for words in commands(README)
    ]
    return [words[1:] for words in found if words[0] == "python"]


COMMAND = re.compile(
    "train|evaluate|predict|convert|export|visualize-data|benchmark|compare|model|operators"
)


@functools.cache
def help_of(*tool: str) -> str:
    if tool[:2] == ("-m", "d2ext"):
        before, text = sys.argv, io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            main.main([*tool[2:], "--help"])
        sys.argv = before
        return text.getvalue()
    result = subprocess.run(
        [sys.executable, *tool, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("words", tool_commands(), ids=" ".join)
def test_the_tools_know_the_options(words: list[str]) -> None:
    # Each command has a help, and so have the commands of `d2ext benchmark`.
    start = 2 if words[0] == "-m" else 1
    count = start + sum(1 for _ in itertools.takewhile(COMMAND.fullmatch, words[start:]))
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(*words[:count])))
    used = {word.split("=")[0] for word in words[count:] if word.startswith("--")}
    assert used <= known


@pytest.mark.parametrize("words", tool_commands(), ids=" ".join)
def test_config_files_and_keys_exist(words: list[str]) -> None:
    for option, value in itertools.pairwise(words):
        if option == "--config-file":
            assert (ROOT / "configs" / value).is_file()
    for word in words:
        if re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)*", word):
            assert_key(word)


def test_tools_and_modules_in_the_text_exist() -> None:
    tools = re.findall(r"\b((?:tools|scripts)/\w+\.\w+)", README + CONTRIBUTING)
    modules = re.findall(r"python -m (d2ext[\w.]*)", README + CONTRIBUTING)
    assert "tools/train_net.py" in tools
    assert [name for name in tools if not (ROOT / name).is_file()] == []
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_config_keys_in_the_text_exist() -> None:
    inline = re.findall(r"`([A-Z_]+\.[A-Z_.]+)\b[^`]*`", README)
    assert "MODEL.WEIGHTS" in inline
    for key in inline:
        assert_key(key)


def assert_key(key: str) -> None:
    node = get_cfg()
    for part in key.split("."):
        assert part in node, f"{key} is no config key"
        node = node[part]


def test_make_targets_exist() -> None:
    text = README + CONTRIBUTING
    targets = {words[1] for words in commands(text) if words[0] == "make"}
    targets |= set(re.findall(r"`(?:\w+=\w+ )?make ([a-z-]+)", text))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "lint"} <= targets <= defined


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_versions_are_those_of_the_requirements() -> None:
    pins = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "requirements").glob("*.txt")
    )
    named = re.findall(r"\b([a-z][\w-]+==[\d.]+\d)", README)
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
    """A system is called done if and only if its meta-architecture, or ROI heads, are registered."""
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
    table = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| (done|in part|not yet) \|$", README, flags=re.MULTILINE
    )
    # The name is the link's text, where there is a link.
    rows = [(re.sub(r"^\[([^\]]+)\].*", r"\1", name), state) for name, state in table]
    assert {name for name, _ in rows} == set(architectures)
    for name, state in rows:
        model = architectures[name]
        registered = model in META_ARCH_REGISTRY or model in ROI_HEADS_REGISTRY
        assert (state != "not yet") == registered, name


def test_own_data_from_the_first_look_to_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands as they stand, with a small config: what one writes is what the next reads."""
    text = README.split("### Your own data")[1]
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
