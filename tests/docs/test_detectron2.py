"""docs/detectron2.md: its code runs as it stands, block after block."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog

from d2ext import model_zoo

PAGE = (Path(__file__).resolve().parents[2] / "docs/detectron2.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks() -> dict[str, str]:
    """Python code by the heading that it stands under."""
    sections = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    code = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in sections}
    return {name: "\n".join(found) for name, found in code.items() if found}


@pytest.fixture(scope="module")
def names(blocks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's first two sections leave: a trained model and its predictor."""
    names: dict[str, Any] = {}
    (test_set,) = model_zoo.get_config("yolact/yolact_R_18_shapes.yaml").DATASETS.TEST
    few = DatasetCatalog.get(test_set)[:8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DatasetCatalog.data, test_set, lambda: few)
        patch.chdir(tmp_path_factory.mktemp("page"))
        exec(blocks["Config and training"], names)
        exec(blocks["Prediction"], names)
    return names


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    scope = dict(names)
    exec(code, scope)
    return scope


def test_training_and_prediction(names: dict[str, Any]) -> None:
    assert set(names["trainer"]._last_eval_results) == {"bbox", "segm"}
    assert names["instances"].pred_masks.shape[1:] == (120, 160)
    assert len(names["instances"]) > 0


def test_lazy_config(blocks: dict[str, str], names: dict[str, Any]) -> None:
    scope = run(blocks["Lazy configs"], names)
    assert [x["image"].shape for x in scope["batch"]] == [(3, 160, 160)] * 2
    assert len(scope["optimizer"].state) > 0


def test_tracking(blocks: dict[str, str], names: dict[str, Any]) -> None:
    if importlib.util.find_spec("scipy") is None:
        pytest.skip("detectron2.tracking needs scipy")
    first, second = run(blocks["Tracking"], names)["tracks"]
    assert 0 < len(first) <= 10
    assert sorted(first) == sorted(second)


def test_supervision(blocks: dict[str, str], names: dict[str, Any]) -> None:
    if importlib.util.find_spec("supervision") is None:
        pytest.skip("needs supervision (pip install supervision)")
    detections = run(blocks["supervision"], names)["detections"]
    assert len(detections) == len(names["instances"])
    assert detections.mask.shape[1:] == (120, 160)


def test_configs_that_the_page_names_exist() -> None:
    named = re.findall(r'--config-file (\S+)|get_config(?:_file)?\("(\S+?)"', PAGE)
    assert len(named) > 2
    for name in (a or b for a, b in named):
        model_zoo.find_config_file(name)
    # "Beside one YAML config of each system lies a lazy config of the same name."
    configs = Path(__file__).resolve().parents[2] / "configs"
    for system in sorted({x.parent.name for x in configs.glob("*/*.yaml")} - {"baselines"}):
        (lazy,) = (configs / system).glob("*.py")
        assert lazy.with_suffix(".yaml").is_file()
