"""Which evaluator a data set gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, SemSegEvaluator

from d2ext.config import get_cfg, load_config
from d2ext.evaluation import EVALUATOR_REGISTRY, COCOEvaluator, build_evaluator
from d2ext.evaluation.build import IfPredicted
from d2ext.model_zoo import find_config_file

NAME = "evaluation_build"


@pytest.fixture
def metadata() -> Iterator[Any]:
    annotation = {"bbox": [0, 0, 2, 2], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}
    records = [
        {
            "file_name": "a.png",
            "image_id": 1,
            "height": 4,
            "width": 4,
            "sem_seg_file_name": "b.png",
            "annotations": [annotation],
        }
    ]
    DatasetCatalog.register(NAME, lambda: records)
    metadata = MetadataCatalog.get(NAME)
    metadata.thing_classes = metadata.stuff_classes = ["x"]
    metadata.thing_dataset_id_to_contiguous_id = {1: 0}
    metadata.stuff_dataset_id_to_contiguous_id = {2: 0}
    metadata.ignore_label = 255
    yield metadata
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def kinds(evaluator: DatasetEvaluator) -> list[str]:
    if isinstance(evaluator, DatasetEvaluators):
        return [kind for x in evaluator._evaluators for kind in kinds(x)]
    if isinstance(evaluator, IfPredicted):
        return kinds(evaluator._evaluator)
    return [type(evaluator).__name__]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("coco", ["COCOEvaluator"]),
        ("sem_seg", ["SemSegEvaluator"]),
        ("coco_panoptic_seg", ["COCOEvaluator", "SemSegEvaluator", "COCOPanopticEvaluator"]),
    ],
)
def test_kinds(metadata: Any, tmp_path: Path, kind: str, expected: list[str]) -> None:
    metadata.evaluator_type = kind
    evaluator = build_evaluator(get_cfg(), NAME, str(tmp_path))
    assert kinds(evaluator) == expected
    ours = evaluator if kind == "coco" else None
    assert ours is None or isinstance(ours, COCOEvaluator)
    assert kind != "sem_seg" or isinstance(evaluator, SemSegEvaluator)


def test_panoptic_data_without_semantic_files(metadata: Any, tmp_path: Path) -> None:
    metadata.evaluator_type = "coco_panoptic_seg"
    del DatasetCatalog.get(NAME)[0]["sem_seg_file_name"]
    evaluator = build_evaluator(get_cfg(), NAME, str(tmp_path))
    assert kinds(evaluator) == ["COCOEvaluator", "COCOPanopticEvaluator"]


def test_keypoint_constants_are_passed_on(metadata: Any, tmp_path: Path) -> None:
    metadata.evaluator_type = "coco"
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.2]
    evaluator = build_evaluator(cfg, NAME, str(tmp_path))
    assert list(evaluator._kpt_oks_sigmas) == [0.1, 0.2]


@pytest.mark.parametrize("system", ["centernet", "cornernet", "centernet_triplets"])
def test_published_configs_round_results(metadata: Any, tmp_path: Path, system: str) -> None:
    metadata.evaluator_type = "coco"
    base = {"centernet": "CenterNet", "cornernet": "CornerNet"}.get(system, "CenterNetTriplets")
    for name, rounds in ((f"Base-{base}", True), (f"{system}_shapes", False)):
        cfg = load_config(find_config_file(f"{system}/{name}.yaml"))
        assert build_evaluator(cfg, NAME, str(tmp_path))._published_rounding == rounds


def test_an_evaluator_of_one_s_own(
    metadata: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(cfg: Any, dataset_name: str, output_folder: str) -> DatasetEvaluator:
        assert (dataset_name, output_folder) == (NAME, str(tmp_path))
        return Counting()

    monkeypatch.setitem(EVALUATOR_REGISTRY._obj_map, "count", count)
    metadata.evaluator_type = "count"
    assert isinstance(build_evaluator(get_cfg(), NAME, str(tmp_path)), Counting)


def test_every_type_is_documented() -> None:
    table = build_evaluator.__doc__ or ""
    assert [name for name, _ in EVALUATOR_REGISTRY if f"``{name}``" not in table] == []


def test_errors_say_what_to_do(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no evaluator_type.*evaluator_type = 'coco'"):
        build_evaluator(get_cfg(), NAME, str(tmp_path))
    metadata.evaluator_type = "coco_style"
    with pytest.raises(ValueError, match=r"'coco_style', which is not known.*sem_seg"):
        build_evaluator(get_cfg(), NAME, str(tmp_path))
    with pytest.raises(ValueError, match=r"'absent' is not registered.*--val-json"):
        build_evaluator(get_cfg(), "absent", str(tmp_path))
    assert "absent" not in MetadataCatalog.list()


class Counting(DatasetEvaluator):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def process(self, inputs: list[Any], outputs: list[Any]) -> None:
        self.seen += inputs

    def evaluate(self) -> dict[str, dict[str, int]]:
        return {"count": {"n": len(self.seen)}}


def test_evaluators_run_only_on_what_is_predicted() -> None:
    inner = Counting()
    evaluator = IfPredicted("sem_seg", inner)
    evaluator.reset()
    evaluator.process([{"id": 1}], [{"instances": None}])
    assert evaluator.evaluate() == {}
    evaluator.process([{"id": 2}, {"id": 3}], [{"sem_seg": None}, {"instances": None}])
    assert evaluator.evaluate() == {"count": {"n": 1}} and inner.seen == [{"id": 2}]
    evaluator.reset()
    assert evaluator.evaluate() == {}
