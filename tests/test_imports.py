"""The package's parts import each other in one direction only (CONTRIBUTING.md, *The house*)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import d2ext

PACKAGE = Path(d2ext.__file__).parent

# All parts but `tools`, which nothing imports.
ALL = {
    "version",
    "files",
    "pickles",
    "layers",
    "utils",
    "codecs",
    "checkpoint",
    "config",
    "modeling",
}
ALL |= {
    "data",
    "evaluation",
    "systems",
    "engine",
    "export",
    "model_zoo",
    "info",
    "testing",
    "__init__",
}
ABOVE = {"systems", "info", "testing", "__init__"}
# What each part may import from the rest of d2ext, as CONTRIBUTING.md says. A part that is not listed is
# an error, so that whoever adds one decides where it stands. Imports inside functions count, too.
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "files": set(),
    "pickles": set(),
    "layers": set(),
    "utils": {"files"},
    "codecs": {"layers"},
    "checkpoint": {"files", "pickles"},
    "config": set(),
    "modeling": {"layers", "codecs", "config"},
    "data": {"codecs", "files", "pickles", "utils", "config"},
    "evaluation": {"codecs", "data", "files", "utils", "config"},
    "systems": ALL - ABOVE - {"engine", "export", "model_zoo"},
    "engine": ALL - ABOVE,
    "export": ALL - ABOVE,
    "model_zoo": {"config", "files"},
    "info": ALL,
    "testing": ALL,
    "tools": ALL,
    "__main__": {"tools"},
    "__init__": ALL - {"info", "testing"},
}
# The only imports between systems: the left one is built on the right one.
SYSTEM_ARROWS = {
    ("yolact_edge", "yolact"),
    ("vpsnet", "upsnet"),
    ("centernet_triplets", "cornernet"),
}
# Optional packages are imported where they are used, never when a module of d2ext is imported.
OPTIONAL = {"tensorboard", "panopticapi", "hotcoco", "trackeval", "norfair", "scipy", "skimage"}
OPTIONAL |= {
    "matplotlib",
    "av",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "h5py",
    "wandb",
    "mlflow",
    "clearml",
    "gradio",
}


def module_name(path: Path, root: Path) -> list[str]:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imported_modules(
    tree: ast.Module, inside: list[str], is_package: bool
) -> list[tuple[ast.stmt, list[str]]]:
    """(statement, path below d2ext) of each import of d2ext in a module, relative ones too."""
    found: list[tuple[ast.stmt, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found += [(node, name[1:]) for name in names if name[0] == "d2ext"]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                package = inside if is_package else inside[:-1]
                base = ["d2ext", *package[: len(package) - node.level + 1], *base]
            if base[:1] == ["d2ext"]:
                found += [(node, [*base[1:], alias.name]) for alias in node.names]
    # `import d2ext` and `from d2ext import get_cfg` run the package's own __init__.py.
    return [(node, path if path and path[0] in ALLOWED else ["__init__"]) for node, path in found]


def violations(root: Path) -> list[str]:
    """Every import below ``root`` that points the wrong way, as ``file:line: what``."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        if "configs" in path.relative_to(root).parts:
            continue  # lazy configs, data of the model zoo
        inside = module_name(path, root)
        part = inside[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, target in imported_modules(tree, inside, path.name == "__init__.py"):
            where = f"{path.relative_to(root)}:{node.lineno}"
            if part not in ALLOWED:
                wrong.append(f"{where}: part {part!r} has no place in ALLOWED")
            elif target[0] == part:
                if part == "systems" and len(inside) > 1 and len(target) > 1:
                    pair = (inside[1], target[1])
                    if pair[0] != pair[1] and pair not in SYSTEM_ARROWS:
                        wrong.append(f"{where}: system {pair[0]} imports {pair[1]}")
            elif target[0] not in ALLOWED[part]:
                wrong.append(f"{where}: {part} imports {target[0]}")
    return wrong


def test_imports_point_one_way() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layers/crop.py", "from d2ext.data import catalog"),
        ("layers/crop.py", "from ..systems.yolact import model"),
        ("layers/crop.py", "def f():\n    import d2ext.config"),
        ("codecs/heatmap.py", "import d2ext.modeling.losses"),
        ("modeling/losses.py", "from d2ext import systems"),
        ("systems/yolact/model.py", "from d2ext.systems.upsnet import head"),
        ("systems/yolact/model.py", "from ..cornernet import head"),
        ("systems/upsnet/__init__.py", "from ..vpsnet import head"),
        ("novelty/thing.py", "from d2ext import layers"),
        ("checkpoint/convert.py", "def f():\n    import d2ext.systems"),
        ("engine/trainer.py", "from d2ext.systems import yolact"),
        ("engine/trainer.py", "from d2ext.tools import train"),
        ("config/loading.py", "def f():\n    from d2ext.model_zoo import find_config_file"),
        ("layers/crop.py", "from typing import Any\nfrom d2ext.config import get_cfg"),
        ("modeling/losses.py", "import d2ext"),
        ("modeling/losses.py", "from d2ext import get_cfg"),
    ],
)
def test_wrong_directions_are_found(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("systems/yolact_edge/model.py", "from d2ext.systems.yolact import head"),
        ("systems/vpsnet/model.py", "from ..upsnet.head import Head"),
        ("systems/yolact/model.py", "from d2ext.systems.yolact.head import Head"),
        ("systems/yolact/model.py", "from .head import Head\nfrom d2ext.layers import crop"),
        ("systems/__init__.py", "from d2ext.systems import yolact, upsnet"),
        ("modeling/losses.py", "from ..layers import crop\nimport torch"),
        ("engine/trainer.py", "from d2ext.model_zoo import get_config\nimport d2ext.evaluation"),
        ("modeling/losses.py", "from d2ext.config import CONFIG_REGISTRY"),
        ("tools/train.py", "from d2ext import get_cfg\nfrom d2ext.systems import yolact"),
    ],
)
def test_right_directions_pass(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []


def top_level_imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Imports that run with the module: not those in functions, nor those for type checkers."""
    found: list[ast.Import | ast.ImportFrom] = []
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))
    return found


def test_optional_packages_are_imported_lazily() -> None:
    eager = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in top_level_imports(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for name in names:
                if name.split(".")[0] in OPTIONAL or name == "torch.utils.tensorboard":
                    eager.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}")
    assert eager == []
