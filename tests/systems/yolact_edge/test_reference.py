"""YolactEdge against the published implementation: the fixtures in tests/reference/yolact_edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor, nn

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.data.video.flow_pairs import flow_pairs
from d2ext.layers import assemble_masks
from d2ext.systems.yolact.postprocess import Detections
from d2ext.systems.yolact_edge import YolactEdge, YolactEdgeMemory
from d2ext.systems.yolact_edge.flow import warp
from tests.reference.fixture import Fixture, draw_image
from tests.systems.fixture_files import classes, first_batch, load_batch
from tests.systems.yolact.test_reference import (
    load_objects,
    object_annotations,
    published_to_ours,
    set_masks,
    without_augmentation,
)

REFERENCE = Path(__file__).parents[2] / "reference" / "yolact_edge"
CASES = {
    "edge_resnet50": "yolact_edge_R_50_550",
    "edge_mobilenetv2": "yolact_edge_mobilenetv2_550",
    "edge_vid_resnet50": "yolact_edge_vid_R_50_550",
}
LOSSES = {"box": "B", "class": "C", "mask": "M", "semantic": "S", "warp": "W"}
NMS = {
    "fast": "fast_nms",
    "cross_class_fast": "cross_class_fast_nms",
    "traditional": "traditional_nms",
}
# DESIGN: raw outputs within 1e-4 relative.
TOLERANCE = 1e-4


class Case:
    """A fixture and the model with its weights."""

    def __init__(self, name: str) -> None:
        self.fixture = Fixture(REFERENCE / name)
        self.recorded = self.fixture.manifest["inputs"]
        self.model = self.build(CASES[name])
        self.frames = [
            {**self.read(frame), "video_id": 1, "frame": i, "is_first": i == 0}
            for i, frame in enumerate(self.recorded["frames"])
        ]

    def build(self, config: str, *overrides: Any) -> YolactEdge:
        cfg = model_zoo.get_config(f"yolact_edge/{config}.yaml")
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.IMS_PER_BATCH = 2  # frozen batch norms, as recorded
        cfg.merge_from_list(list(overrides))
        self.cfg = cfg
        model = build_model(cfg)
        published = {k: torch.from_numpy(v) for k, v in self.fixture.state_dict().items()}
        model.load_state_dict(convert_state_dict("yolact_edge", published), strict=True)
        return model.eval()

    def picture(self, picture: dict[str, Any]) -> np.ndarray:
        """BGR."""
        crop = picture["crop"]
        rows = slice(crop["top"], crop["top"] + crop["height"])
        columns = slice(crop["left"], crop["left"] + crop["width"])
        return draw_image(**picture["draw_image"])[rows, columns]

    def read(self, picture: dict[str, Any]) -> dict[str, Any]:
        rgb = self.picture(picture)[:, :, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))
        return {"image": image, "height": rgb.shape[0], "width": rgb.shape[1]}

    def check(self, actual: dict[str, Tensor]) -> None:
        for name, value in actual.items():
            assert self.fixture.compare(name, value.detach().numpy()) < TOLERANCE, name


# The ResNet's losses are YOLACT's of the same ResNet, its key frames those of the video model; what a
# user sees of it is in test_published_files.py.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param("edge_resnet50", marks=pytest.mark.attack),
        "edge_mobilenetv2",
        "edge_vid_resnet50",
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def video() -> Case:
    return Case("edge_vid_resnet50")


def _outputs(frame: str, raw: Any) -> dict[str, Tensor]:
    return {
        f"{frame}.proto": raw.prototypes,
        f"{frame}.head.loc": raw.offsets,
        f"{frame}.head.conf_logits": raw.logits,
        f"{frame}.head.mask_coeff": raw.coefficients,
    }


def _pyramid(frame: str, model: YolactEdge, sums: dict[int, Tensor]) -> dict[str, Tensor]:
    actual = {f"{frame}.fpn_phase_1.p{level}": x for level, x in sums.items()}
    outputs = model.backbone.outputs(sums)
    return actual | {f"{frame}.fpn_phase_2.{name}": x for name, x in outputs.items()}


@torch.no_grad()
def test_key_frame(case: Case) -> None:
    model = case.model
    images = model.preprocess(case.frames[:1])
    features = model.backbone.bottom_up(images)
    laterals = model.backbone.laterals(features)
    sums = model.backbone.merge(laterals)
    raw = model.head(list(model.backbone.outputs(sums).values()))
    layers = (1, 2, 3) if "res3" in features else (3, 4, 6)
    named = {
        f"frame0.backbone.layer{i}": features[name]
        for i, name in zip(layers, model.backbone.in_features, strict=True)
    }
    case.check(
        {
            "frame0.input": images,
            "frame0.lateral_c3": laterals[3],
            "priors": model.priors(raw.feature_sizes),
            **named,
            **_pyramid("frame0", model, sums),
            **_outputs("frame0", raw),
        }
    )


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
def test_frames_between(video: Case, number: int) -> None:
    """Both are carried over from frame 0, not from each other."""
    model, frame = video.model, f"frame{number}"
    network = model.non_key_network.network
    _, (key, *sums) = model.network(model.preprocess(video.frames[:1]))
    images = model.preprocess([video.frames[number]])
    lateral = network.finest_lateral(images)
    own = model.flow_net.features(lateral)
    motions = model.flow_net(own, key, finest=0)
    actual = {f"{frame}.lateral_c3": lateral, f"{frame}.flow_net_pre_convs": own}
    for level, motion in motions.items():
        actual |= {
            f"{frame}.flow{level + 1}": motion.flow,
            f"{frame}.flow{level + 1}_scale": motion.scale,
            f"{frame}.flow{level + 1}_bias": motion.bias,
        }
        if level:
            warped = warp(sums[level - 1], motion.flow)
            actual[f"{frame}.warped.p{level + 3}"] = warped
            actual[f"{frame}.transformed.p{level + 3}"] = warped * motion.scale + motion.bias
    carried = network.carried_sums(lateral, own, key, sums)
    raw, _ = network(images, key, *sums)
    video.check(actual | _pyramid(frame, model, carried) | _outputs(frame, raw))


def remember(network: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """From now on, equal inputs go through a network once."""
    forward, known = network.forward, {}

    def remembered(*inputs: Tensor) -> Any:
        key = tuple(x.double().sum().item() for x in inputs)
        if key not in known:
            known[key] = forward(*inputs)
        return known[key]

    patch.setattr(network, "forward", remembered)


def test_detections_of_the_whole_path(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames one after the other, with each kind of NMS."""
    recorded = case.recorded["postprocessing"]
    model, expected = case.model, case.fixture.expected
    remember(model.inference_network.network, monkeypatch)
    if model.flow_net is not None:
        remember(model.non_key_network.network, monkeypatch)
    for nms, name in NMS.items():
        model.nms = nms
        memory: YolactEdgeMemory | None = None
        for i, frame in enumerate(case.frames):
            stored = f"frame{i}.{name}"
            if f"{stored}.scores" not in expected:
                continue
            kept = recorded["detections_kept"][stored]
            if i > 0 and memory is None:
                _, memory = model.step(case.frames[:1], None)
            outputs, after = model.step([frame], memory)
            memory = after
            result = outputs[0]["instances"][:kept]
            classes, scores = expected[f"{stored}.classes"], expected[f"{stored}.scores"]
            relative = expected[f"{stored}.boxes"] * [640, 480, 640, 480]
            shown = result.pred_boxes.tensor.numpy()
            np.testing.assert_array_equal(result.pred_classes, classes)
            np.testing.assert_allclose(result.scores, scores, atol=1e-4)
            ordered = np.sort(relative.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
            clipped = np.clip(ordered, 0, [640, 480, 640, 480])
            # Coordinates are truncated, and one near a whole pixel may fall either way.
            assert (np.abs(shown - clipped) < 1.05).all()
            if nms == "fast":
                _check_final(case, f"frame{i}", outputs[0]["instances"])
    model.nms = "fast"


def _check_final(case: Case, frame: str, result: Instances) -> None:
    expected = case.fixture.expected
    count = len(expected[f"{frame}.final.classes"])
    np.testing.assert_array_equal(result.pred_classes[:count], expected[f"{frame}.final.classes"])
    np.testing.assert_allclose(
        result.pred_boxes.tensor[:count], expected[f"{frame}.final.boxes"], atol=0.05
    )
    masks = result.pred_masks[:count].numpy()
    reference = expected[f"{frame}.final.masks"].astype(bool)
    union = (masks | reference).sum(axis=(1, 2))
    iou = np.where(union > 0, (masks & reference).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)
    assert iou.min() >= 0.999, (frame, iou)


@torch.no_grad()
def test_mask_probabilities(case: Case) -> None:
    raw = case.model.inference_network(case.model.preprocess(case.frames[:1]))
    *fields, prototypes = raw[:5]
    count = len(case.fixture.expected["frame0.final.classes"])
    best = Detections(*(field[0, :count] for field in fields))
    soft = assemble_masks(prototypes[0], best.coefficients, best.boxes)
    case.check({"frame0.final.mask_probability": soft})


def _training_inputs(case: Case, folder: Path) -> list[dict[str, Any]]:
    """The fixture's batch, from files through the training loader."""
    loss = case.recorded["loss"]
    if "reference" not in loss["batch"][0]:
        images = [case.picture(pictures["target"]) for pictures in loss["batch"]]
        return load_objects(case.cfg, folder, images, loss["ground_truth"])
    cfg = without_augmentation(case.cfg)
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-1, -1]
    content: dict[str, Any] = {"videos": [], "annotations": [], "categories": classes(40)}
    for v, (pictures, objects) in enumerate(zip(loss["batch"], loss["ground_truth"], strict=True)):
        names = []
        for t, picture in enumerate((pictures["reference"], pictures["target"])):
            names.append(f"{v}/{t}.png")
            (folder / names[-1]).parent.mkdir(exist_ok=True)
            cv2.imwrite(str(folder / names[-1]), case.picture(picture))
        size = {"height": 480, "width": 640}
        content["videos"].append({"id": v, "file_names": names, **size})
        for annotation in object_annotations(size["height"], size["width"], objects):
            # The first frame is not annotated.
            lists = {f"{x}s": [None, annotation[x]] for x in ("bbox", "segmentation", "area")}
            common = {x: annotation[x] for x in ("category_id", "iscrowd")}
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "video_id": v, **common, **lists})
    (folder / "videos.json").write_text(json.dumps(content))
    files = {"train_video_json": str(folder / "videos.json"), "train_images": str(folder)}
    batch = load_batch(cfg, files)
    for inputs, objects in zip(batch, loss["ground_truth"], strict=True):
        set_masks(inputs, objects)
    return batch


def _check_losses(case: Case, model: YolactEdge, losses: dict[str, Tensor], prefix: str) -> None:
    """Losses and the norms of their gradients."""
    expected = case.fixture.expected
    names = {f"loss_{name}": letter for name, letter in LOSSES.items()}
    recorded = {k for k in expected if k.startswith(prefix) and k.rsplit(".", 1)[1] in "BCMSW"}
    assert {f"{prefix}.{names[k]}" for k in losses} == recorded
    for key, value in losses.items():
        assert value.item() == pytest.approx(float(expected[f"{prefix}.{names[key]}"]), rel=1e-4), (
            key
        )
    model.zero_grad()
    sum(losses.values()).backward()
    _check_gradients(case, model, f"{prefix}.grad_norms")


def _check_gradients(case: Case, model: YolactEdge, name: str, tolerance: float = 1e-3) -> None:
    ours = dict(model.named_parameters())
    renamed = published_to_ours(case.fixture, "yolact_edge")
    published = case.recorded["grad_norms_parameters"]
    for parameter, norm in zip(published, case.fixture.expected[name], strict=True):
        if parameter not in renamed:  # what is left out has no gradient
            assert norm == 0
            continue
        gradient = ours[renamed[parameter]].grad
        actual = 0.0 if gradient is None else float(gradient.norm())
        assert actual == pytest.approx(float(norm), rel=tolerance, abs=1e-6), parameter


def test_losses_and_gradients_of_images(case: Case, tmp_path: Path) -> None:
    if case.model.flow_net is not None:
        return  # below
    model = case.model.train()
    try:
        _check_losses(case, model, model(_training_inputs(case, tmp_path)), "loss.full")
    finally:
        model.eval()


def test_losses_and_gradients_of_videos(video: Case, tmp_path: Path) -> None:
    """Both steps, with the same weights."""
    model, inputs = video.model.train(), _training_inputs(video, tmp_path)
    assert model.training_steps == ("images", "full", "carried")
    try:
        losses, carried = model(inputs, "full")
        _check_losses(video, model, losses, "loss.full")
        losses, _ = model(inputs, "carried", carried)
        _check_losses(video, model, losses, "loss.partial")
    finally:
        model.eval()


def test_flow_pretraining(video: Case, tmp_path: Path) -> None:
    """From files in the form of FlyingChairs through the training loader."""
    recorded, expected = video.recorded["flow_pretraining"], video.fixture.expected
    model = video.build("yolact_edge_flow_R_50_550").train()
    for i in (1, 2):
        cv2.imwrite(str(tmp_path / f"0_img{i}.ppm"), video.picture(recorded[f"image_{i}"]))
    # The recorded flow is in the net's units: half the map is 8.
    truth = recorded["ground_truth_flow"]
    flow = np.full((480, 640, 2), (truth["x"] * 640 / 16, truth["y"] * 480 / 16), np.float32)
    assert cv2.writeOpticalFlow(str(tmp_path / "0_flow.flo"), flow)
    DatasetCatalog.register("flow_fixture", lambda: flow_pairs(str(tmp_path)))
    try:
        inputs = first_batch(without_augmentation(video.cfg), "flow_fixture")
    finally:
        DatasetCatalog.remove("flow_fixture")
        MetadataCatalog.pop("flow_fixture", None)
    losses = model(inputs)
    # These data are resized as bytes (NOTES.md §8); the fixture's pictures were not.
    assert losses["loss_flow"].item() == pytest.approx(
        float(expected["loss.flow_pretraining.F"]), rel=2e-4
    )
    losses["loss_flow"].backward()
    _check_gradients(video, model, "loss.flow_pretraining.grad_norms", 2e-3)


def test_yolact_checkpoint_loads_as_image_model() -> None:
    """The published loader renames YOLACT's pyramid, too (yolact_edge/NOTES.md §7)."""
    fixture = Fixture(REFERENCE.parent / "yolact" / "resnet50")
    published = {k: torch.from_numpy(v) for k, v in fixture.state_dict().items()}
    cfg = model_zoo.get_config("yolact_edge/yolact_edge_R_50_550.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    model.load_state_dict(convert_state_dict("yolact_edge", published), strict=True)
