"""What every architecture must do: train, train on nothing, predict, and be evaluated."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import d2ext.systems
from d2ext.engine.trainer import compile_for_training
from d2ext.modeling.meta_arch import MetaArch
from d2ext.testing import (
    NUM_CLASSES,
    NUM_KEYPOINTS,
    random_inputs,
    tiny_architectures,
    tiny_config,
    tiny_tasks,
)


@pytest.fixture(params=tiny_architectures())
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def model(architecture: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    cfg = tiny_config(architecture)
    cfg.MODEL.DEVICE = device
    return build_model(cfg)


@pytest.fixture(autouse=True)
def storage() -> Iterator[None]:
    """Detectron2's ROI heads count their samples in it."""
    with EventStorage():
        yield


@pytest.fixture
def without_tf32() -> Iterator[None]:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [x.allow_tf32 for x in backends]
    for x in backends:
        x.allow_tf32 = False
    yield
    for x, old in zip(backends, before, strict=True):
        x.allow_tf32 = old


def _inference(architecture: str, model: nn.Module, inputs: list[dict[str, Any]]) -> Any:
    # GeneralizedRCNN leaves it to the caller to do without gradients.
    with torch.set_grad_enabled(architecture != "DensePose"):
        return model.eval()(inputs)


def _empty(instances: Instances) -> Instances:
    return instances[torch.zeros(len(instances), dtype=torch.bool)]


def test_every_registered_architecture_is_tested() -> None:
    registered = {
        name
        for name, cls in META_ARCH_REGISTRY
        if cls.__module__.startswith(d2ext.systems.__name__)
    }
    # ROI heads of Detectron2's GeneralizedRCNN.
    registered.add("DensePose")
    assert registered == set(tiny_architectures()), "each has a row in d2ext.testing._TINY"


def test_training_lowers_the_loss(model: nn.Module) -> None:
    model.train()
    inputs = random_inputs()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    totals = []
    for _ in range(12):
        losses = model(copy.deepcopy(inputs))
        assert all(value.dim() == 0 for value in losses.values())
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.7 * totals[0], totals


def test_the_compiled_network_trains_alike(
    architecture: str, model: nn.Module, device: str, without_tf32: None
) -> None:
    """On the CPU what is captured, on a GPU what is generated from it."""
    if device == "cpu" and architecture not in ("UPSNet", "DensePose"):
        pytest.skip("tracing takes as long as many other tests: on a GPU only")
    compiled = copy.deepcopy(model).train()
    names = list(compiled.state_dict())
    compile_for_training(compiled, **({"backend": "eager"} if device == "cpu" else {}))
    assert list(compiled.state_dict()) == names
    results = []
    for one in (model.train(), compiled):
        torch.manual_seed(0)  # regions are sampled
        losses = one(random_inputs())
        sum(losses.values()).backward()
        gradient = sum(p.grad.norm() for p in one.parameters() if p.grad is not None)
        results.append([*losses.values(), gradient])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_training_graphs_train_alike(
    architecture: str, model: nn.Module, device: str, without_tf32: None
) -> None:
    if device == "cpu" or type(model).forward is not MetaArch.forward:
        pytest.skip("for d2ext's models with one step an iteration, on a GPU")
    graphed = copy.deepcopy(model).train()
    graphed.use_training_graphs()
    results = []
    for one in (model.train(), graphed):
        numbers = []
        for seed in (1, 2, 3):  # captured, and called twice with other images
            torch.manual_seed(seed)
            one.zero_grad()
            losses = one(random_inputs(seed=seed))
            sum(losses.values()).backward()
            norms = [p.grad.norm() for p in one.parameters() if p.grad is not None]
            numbers += [*losses.values(), sum(norms)]
        results.append([*numbers, *(x.float().sum() for x in one.buffers())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_every_trainable_parameter_gets_a_gradient(model: nn.Module) -> None:
    model.train()
    sum(model(random_inputs()).values()).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


@pytest.mark.parametrize("kind", ["no_instances", "some_without", "only_crowd", "empty_masks"])
def test_trains_without_objects(architecture: str, model: nn.Module, kind: str) -> None:
    if architecture == "DensePose" and kind == "empty_masks":
        pytest.skip("Detectron2's RPN wants boxes that have an area, as its mappers leave them")
    model.train()
    inputs = random_inputs()
    for i, x in enumerate(inputs):
        if kind == "some_without" and i == 0:
            continue
        if kind == "only_crowd":
            x["crowd_instances"] = x["instances"]
        if kind == "empty_masks":
            x["instances"].gt_masks = BitMasks(torch.zeros_like(x["instances"].gt_masks.tensor))
            x["instances"].gt_boxes = Boxes(torch.zeros(len(x["instances"]), 4))
        else:
            x["instances"] = _empty(x["instances"])
    losses = model(inputs)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_training_is_drawn(architecture: str, model: nn.Module) -> None:
    model.train()
    model.vis_period = 1
    with EventStorage() as storage:
        model(random_inputs())
        ((_, picture, _),) = storage._vis_data
    if "bbox" in tiny_tasks(architecture):  # two images side by side; others draw crops
        assert picture.shape == (3, 60, 160)
    # Detectron2's own pictures are bytes.
    assert picture.min() >= 0 and picture.max() <= (255 if picture.dtype == np.uint8 else 1)


def test_inference_has_the_contracted_form(architecture: str, model: nn.Module) -> None:
    inputs = random_inputs(3)
    inputs[0].update(height=33, width=47)
    inputs[1] = {"image": torch.zeros(3, 40, 30, dtype=torch.uint8)}
    results = _inference(architecture, model, inputs)
    sizes = [(33, 47), (40, 30), (60, 80)]
    for result, size in zip(results, sizes, strict=True):
        instances = result["instances"]
        assert instances.image_size == size
        assert len(instances) > 0
        if "segm" in tiny_tasks(architecture):
            assert instances.pred_masks.shape[1:] == size
            assert instances.pred_masks.dtype == torch.bool
        if "keypoints" in tiny_tasks(architecture):
            assert instances.pred_keypoints.shape == (len(instances), NUM_KEYPOINTS, 3)
        if "densepose" in tiny_tasks(architecture):
            assert len(instances.pred_densepose) == len(instances)
        if "panoptic" in tiny_tasks(architecture):
            panoptic, segments = result["panoptic_seg"]
            assert panoptic.shape == size
            assert set(panoptic.unique().tolist()) - {0} == {s["id"] for s in segments}
            assert result["sem_seg"].shape[1:] == size
        assert instances.pred_classes.dtype == torch.int64
        assert int(instances.pred_classes.max()) < NUM_CLASSES
        boxes = instances.pred_boxes.tensor
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= size[1]).all() and (boxes[:, 3] <= size[0]).all()
        assert not instances.scores.requires_grad


def test_inference_does_not_depend_on_the_batch(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # cuDNN rounds to TF32 in some of the algorithms it may choose.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model.eval()
    inputs = random_inputs(3)
    together = [x["instances"] for x in model(inputs)]
    for x, expected in zip(inputs, together, strict=True):
        alone = model([x])[0]["instances"]
        torch.testing.assert_close(alone.scores, expected.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(alone.pred_classes, expected.pred_classes)


def test_predictor_reads_a_saved_checkpoint(
    architecture: str, device: str, model: nn.Module, tmp_path: Path
) -> None:
    DetectionCheckpointer(model, save_dir=str(tmp_path)).save("model")
    cfg = tiny_config(architecture)
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    image = random_inputs(1)[0]["image"].permute(1, 2, 0).numpy()
    # The predictor takes BGR and turns it to the config's format.
    result = DefaultPredictor(cfg)(np.ascontiguousarray(image[:, :, ::-1]))["instances"]
    expected = model.eval()([{"image": torch.from_numpy(image).permute(2, 0, 1).float()}])
    torch.testing.assert_close(result.scores, expected[0]["instances"].scores)
    assert result.image_size == image.shape[:2]


def _write_dataset(folder: Path, inputs: list[dict[str, Any]]) -> Path:
    annotations = []
    for x in inputs:
        annotated = x["instances"]
        for box, label, points in zip(
            annotated.gt_boxes, annotated.gt_classes, annotated.gt_keypoints.tensor, strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": x["image_id"],
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "keypoints": points.flatten().tolist(),
                    "num_keypoints": len(points),
                    "iscrowd": 0,
                }
            )
    content = {
        "images": [
            {"id": x["image_id"], "file_name": x["file_name"], "height": 60, "width": 80}
            for x in inputs
        ],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"class{i}"} for i in range(NUM_CLASSES)],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_evaluator_takes_the_output(architecture: str, model: nn.Module, tmp_path: Path) -> None:
    tasks = [x for x in tiny_tasks(architecture) if x not in ("panoptic", "densepose")]
    inputs = random_inputs(3)
    name = f"tiny_{tmp_path.name}"
    json_file = _write_dataset(tmp_path, inputs)
    DatasetCatalog.register(name, lambda: inputs)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        thing_classes=[f"class{i}" for i in range(NUM_CLASSES)],
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(NUM_CLASSES)},
    )
    try:
        evaluator = COCOEvaluator(
            name,
            tasks=tasks,
            output_dir=str(tmp_path),
            use_fast_impl=False,
            kpt_oks_sigmas=[0.1] * NUM_KEYPOINTS,
        )
        evaluator.reset()
        evaluator.process(inputs, _inference(architecture, model, inputs))
        results = evaluator.evaluate()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert set(tasks) <= set(results)
    assert (tmp_path / "coco_instances_results.json").stat().st_size > 2
