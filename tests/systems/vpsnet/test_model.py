"""VPSNet's memory, variants and training, on a tiny model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.utils._pytree import tree_leaves

from d2ext import VideoPredictor
from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.config import ConfigError
from d2ext.engine.optimizer import build_optimizer
from d2ext.engine.tracking import give_ids
from d2ext.modeling.flow import build_flow
from d2ext.systems.vpsnet import VPSNet, VPSNetMemory
from d2ext.testing import random_inputs, tiny_config

Video = list[dict[str, Any]]


def config(**keys: Any) -> Any:
    """``MODEL__VPSNET__TRACK=False`` sets MODEL.VPSNET.TRACK."""
    cfg = tiny_config("VPSNet")
    cfg.MODEL.RESNETS.NORM = "BN"  # as the published models
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


def build(**keys: Any) -> VPSNet:
    torch.manual_seed(0)
    model: VPSNet = build_model(config(**keys))
    if model.fusion is not None:  # so that the fused features differ from the own
        torch.nn.init.normal_(model.fusion.refine.weight, std=0.1)
    return model.eval()


def video(length: int, video_id: int = 0, seed: int = 0, **size: int) -> Video:
    """Frames of one scene, which moves to the right."""
    image = random_inputs(1, seed=seed, **size)[0]["image"]
    return [
        {"image": image.roll(2 * t, 2), "video_id": video_id, "frame": t, "is_first": t == 0}
        for t in range(length)
    ]


def summary(output: dict[str, Any]) -> tuple[Any, ...]:
    instances, (ids, segments) = output["instances"], output["panoptic_seg"]
    tracks = instances.track_ids if instances.has("track_ids") else None
    numbers = [{k: v for k, v in x.items() if k != "score"} for x in segments]
    return instances.scores, instances.pred_boxes.tensor, tracks, ids, numbers, output["sem_seg"]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for x, y in zip(summary(a), summary(b), strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
        else:
            assert x == y


def tensors(memory: VPSNetMemory) -> list[Tensor]:
    parts = [*vars(memory).values(), *(list(vars(x).values()) for x in memory.objects)]
    return [x for x in tree_leaves(parts) if isinstance(x, Tensor)]


@pytest.fixture(scope="module")
def model() -> VPSNet:
    return build()


# ---------------------------------------------------------------- memory


def test_step_is_a_function_of_its_arguments(model: VPSNet) -> None:
    first, second = video(2)
    _, memory = model.step([first], None)
    before = [x.clone() for x in tensors(memory)]
    (a,), _ = model.step([second], memory)
    model.step([first], None)
    (b,), _ = model.step([second], memory)
    assert_same(a, b)
    assert len(before) == 7
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(memory), strict=True))
    (alone,), _ = model.step([second], None)
    assert not torch.allclose(alone["sem_seg"], a["sem_seg"], atol=1e-4)  # fusion
    assert a["instances"].track_ids.dtype == torch.int64
    assert alone["instances"].track_ids.tolist() == [*range(1, len(alone["instances"]) + 1)]


def test_forward_keeps_the_memory_and_begins_anew(model: VPSNet) -> None:
    frames, other = video(3), video(2, video_id=1, seed=1)
    memory, expected = None, []
    for x in frames:
        (output,), memory = model.step([x], memory)
        expected.append(output)
    (begun,), _ = model.step(other[:1], None)

    def check(inputs: dict[str, Any], output: dict[str, Any]) -> None:
        assert_same(model([inputs])[0], output)

    for x, output in zip(frames, expected, strict=True):
        check(x, output)
    check({**other[0], "is_first": False}, begun)  # the caller forgot to say so
    check(frames[0], expected[0])
    check({**frames[0], "is_first": False}, expected[0])  # the same video from its start
    check(frames[1], expected[1])
    model.train()
    model.eval()
    check(frames[1], model.step([frames[1]], None)[0][0])  # it has forgotten
    check(frames[1] | {"is_first": True}, model.step([frames[1]], None)[0][0])


def test_a_single_frame_is_a_video_of_its_own(model: VPSNet) -> None:
    image = {"image": video(1)[0]["image"]}
    first = model([image])[0]
    assert_same(model([image])[0], first)
    assert 1 in first["instances"].track_ids


def test_a_frame_of_another_size_is_fused_with_itself_and_keeps_the_ids(model: VPSNet) -> None:
    first, _ = video(2)
    other = {**video(1, seed=1, height=70, width=50)[0], "frame": 1, "is_first": False}
    _, memory = model.step([first], None)
    (changed,), later = model.step([other], memory)
    (alone,), _ = model.step([other], None)
    torch.testing.assert_close(changed["sem_seg"], alone["sem_seg"])
    assert changed["panoptic_seg"][0].shape == (70, 50)
    # The objects are remembered; new ones get numbers that were not used.
    old = memory.objects[0].ids
    assert later.objects[0].ids[: len(old)].equal(old)
    new = set(changed["instances"].track_ids.tolist()) - set(old.tolist())
    assert new and min(new) == int(old.max()) + 1


def test_videos_in_step_give_what_each_gives_alone(model: VPSNet) -> None:
    """The second begins anew when the first is in its third frame; its images are smaller."""
    videos = [video(4), video(4, 1, seed=1, height=57, width=74)]
    videos[1][2]["is_first"] = True
    alone = []
    for frames in videos:
        memory, outputs = None, []
        for x in frames:
            (output,), memory = model.step([x], memory)
            outputs.append(output)
        alone.append(outputs)
    together = None
    for t, frames in enumerate(zip(*videos, strict=True)):
        outputs, together = model.step(list(frames), together)
        for output, expected in zip(outputs, alone, strict=True):
            assert_same(output, expected[t])
    assert alone[1][2]["instances"].track_ids.min() == 1


def test_padding_that_changes_does_not_separate_a_frame_from_the_one_before(
    model: VPSNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video's size changes, and with it the padding of the other one's frames."""
    first, second = video(2)
    large = {**video(1, 1, seed=1, height=120, width=130)[0], "frame": 1, "is_first": False}
    _, memory = model.step([first, video(1, 1, seed=1)[0]], None)
    network, calls = model.inference_network, []

    def spy(*args: Any) -> Any:
        calls.append(args)
        return network(*args)

    spy.mode = network.mode
    monkeypatch.setattr(model, "_inference", (spy,))
    model._predict(
        model.preprocess([second, large]),
        [(60, 80), (120, 130)],
        [False, False],
        [second, large],
        memory,
    )
    ((images, _, flow, gathered, own),) = calls
    assert own.tolist() == [False, True]
    height, width = memory.gathered.shape[-2:]
    assert gathered.shape[-1] == images.shape[-1] // 4 > width
    assert torch.equal(gathered[0, :, :height, :width], memory.gathered[0])
    expected = model.predict_flow(model.preprocess([second]), memory.images[:1], [second])
    assert expected[0, 0, 20:40, 20:60].median() == pytest.approx(-2, abs=0.3)
    torch.testing.assert_close(flow[0, :, :60, :80], expected[0, :, :60, :80])


def test_exact_flow_is_not_stretched_over_the_padding() -> None:
    model = build(FLOW__NAME="Exact")
    x = video(1)[0]
    x["flow"] = torch.arange(60 * 80.0).view(1, 60, 80).repeat(2, 1, 1)
    images = model.preprocess([x])
    assert images.shape[-2:] != (60, 80)
    flow = model.predict_flow(images, images, [x])
    assert flow.shape[-2:] == images.shape[-2:]
    assert torch.equal(flow[0, :, :60, :80], x["flow"])
    assert flow.count_nonzero() == x["flow"].count_nonzero()


# ---------------------------------------------------------------- what is detected


def test_ids_beyond_bytes(model: VPSNet) -> None:
    """As after a long video: nothing holds ids in 8 or 16 bits."""
    first, second = video(2)
    _, memory = model.step([first], None)
    (objects,) = memory.objects
    shifted = copy.copy(objects)
    object.__setattr__(shifted, "next_id", 2**31 + 5)
    memory = VPSNetMemory(memory.images, memory.gathered, memory.sizes, [shifted])
    (output,), later = model.step([second], memory)
    assert output["instances"].track_ids.max() >= 2**31 + 5
    assert later.objects[0].next_id > 2**31 + 5


@pytest.mark.parametrize("published", [False, True])
def test_nothing_detected(published: bool) -> None:
    """Published: a dummy, which is remembered; it is no instance."""
    model = build(UPSNET__TEST__SCORE_THRESH=1.1, VPSNET__PUBLISHED_DUMMY=published)
    memory = None
    for x in video(3):
        (output,), memory = model.step([x], memory)
        instances, (_, segments) = output["instances"], output["panoptic_seg"]
        assert len(instances) == 0 and instances.track_ids.shape == (0,)
        assert instances.pred_masks.shape == (0, 60, 80)
        assert segments and not any(s["isthing"] for s in segments)
        (objects,) = memory.objects
        assert objects.ids.tolist() == ([1] if published else [])
        assert objects.classes.tolist() == ([-1] if published else [])
    assert objects.frame == 3


def test_at_most_so_many_objects() -> None:
    model = build(UPSNET__TEST__MAX_INSTANCES=5, VPSNET__MAX_OBJECTS=7)
    memory, ids = None, set()
    for x in video(3):
        (output,), memory = model.step([x], memory)
        assert len(output["instances"]) == 5
        ids |= set(output["instances"].track_ids.tolist())
        assert len(memory.objects[0].ids) <= 7
    assert memory.objects[0].next_id == max(ids) + 1 > 7


# ---------------------------------------------------------------- variants and predictors


@pytest.mark.parametrize(
    ("fusion", "track"), [(True, True), (False, True), (True, False), (False, False)]
)
def test_variants(fusion: bool, track: bool) -> None:
    model = build(VPSNET__FUSION=fusion, VPSNET__TRACK=track)
    assert model.has_memory == (fusion or track)
    assert model.gives_ids == track
    assert (model.flow is None) == (not fusion)
    first, second = video(2)
    (alone,), _ = model.step([second], None)
    _, memory = model.step([first], None)
    (output,), _ = model.step([second], memory)
    instances, (_, segments) = output["instances"], output["panoptic_seg"]
    assert instances.has("track_ids") == track
    assert all(("track_id" in x) == (track and x["isthing"]) for x in segments)
    assert torch.allclose(alone["sem_seg"], output["sem_seg"]) == (not fusion)
    assert set(model.stages([first])) == {
        *("preprocess", "network", "choice", "results"),
        *(("flow",) if fusion else ()),
        *(("tracking",) if track else ()),
    }
    for stage in model.stages([first]).values():
        stage()


def test_a_tracker_gives_ids_to_fuse() -> None:
    """The panoptic map's, too, each instance's to one thing; other things, some of them without a
    pixel, -1."""
    model = build(VPSNET__TRACK=False)
    output = model(video(1))[0]
    masks = torch.zeros((2, 60, 80), dtype=torch.bool)
    masks[0, :20], masks[1, 20:40] = True, True
    output["instances"] = Instances(
        (60, 80),
        pred_boxes=Boxes(torch.tensor([[0.0, 0, 80, 20], [0, 20, 80, 40]])),
        pred_classes=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.8]),
        pred_masks=masks,
    )
    ids = masks[0] * 1 + masks[1] * 2 - 1 * ~masks.any(0)
    ids[31:40], ids[50:] = 3, 4  # both 2 and 3 are parts of the second
    segments: list[dict[str, Any]] = [
        {"id": i, "isthing": i != 4, "category_id": 0, "area": 400 - i} for i in range(6)
    ]
    output["panoptic_seg"] = ids, segments

    def tracker(instances: Instances, frame: int) -> Instances:
        instances.track_ids = torch.tensor([70_000, 9])
        return instances

    give_ids(output, tracker, 0)
    assert [x.get("track_id") for x in segments] == [-1, 70_000, 9, -1, None, -1]
    assert output["instances"].track_ids.tolist() == [70_000, 9]


def test_copies_and_predictors(model: VPSNet, tmp_path: Any) -> None:
    frames = video(2)
    expected = [model([x])[0] for x in frames]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for x, output in zip(frames, expected, strict=True):
            assert_same(copied([x])[0], output)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    cfg = config(WEIGHTS=str(tmp_path / "model.pth"))
    bgr = [x["image"].permute(1, 2, 0).numpy()[:, :, ::-1].copy() for x in frames]
    image = DefaultPredictor(cfg)
    for _ in range(2):
        assert_same(image(bgr[0]), expected[0])
    predictor = VideoPredictor(cfg)
    for _ in range(2):
        for picture, output in zip(bgr, expected, strict=True):
            assert_same(predictor(picture), output)
        predictor.reset()


def test_low_precision_reaches_the_flow_network(model: VPSNet) -> None:
    keys = {"FLOW__NAME": "PyramidFlow"}
    exact = build(**keys)
    rough = build(**keys, INFERENCE__DTYPE="bfloat16", INFERENCE__CHANNELS_LAST=True)
    first, second = video(2)
    outputs = []
    for one in (exact, rough):
        _, memory = one.step([first], None)
        (output,), _ = one.step([second], memory)
        outputs.append(output["sem_seg"])
    assert rough._flow_network[0]._prepared is not None
    assert next(rough._flow_network[0]._prepared.parameters()).dtype == torch.bfloat16
    difference = (outputs[0] - outputs[1]).abs().max()
    assert 0 < difference < 0.1 * outputs[0].abs().max()


# ---------------------------------------------------------------- training


def train(model: VPSNet, inputs: Video) -> dict[str, Tensor]:
    model.train().zero_grad()
    losses = model(inputs)
    assert all(torch.isfinite(x) for x in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    return losses


def test_what_is_trained() -> None:
    """Not the flow network; and batch norms keep their statistics."""
    model = build(FLOW__NAME="PyramidFlow")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = build_optimizer(config(FLOW__NAME="PyramidFlow"), model)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
    train(model, random_inputs())
    assert model.training and not any(x.training for x in model.flow.modules())
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[0] for k in changed} == {
        *("backbone", "fusion", "track_head", "proposal_generator", "roi_heads", "sem_seg_head")
    }
    assert not any("running" in k for k in changed)
    assert any("fusion.residual_flow" in k for k in changed)
    assert float(model.track_head.fc1.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    "kind", ["reference without annotations", "no objects", "crowd alone", "other ids"]
)
def test_pairs_without_matches(kind: str) -> None:
    model = build()
    inputs = random_inputs()
    for x in inputs:
        empty = x["instances"][:0]
        if kind == "reference without annotations":
            del x["reference"]["instances"]
        elif kind == "no objects":
            x["instances"] = x["reference"]["instances"] = empty
        elif kind == "crowd alone":
            x["crowd_instances"], x["instances"] = x["instances"], empty
        else:
            x["reference"]["instances"] = copy.deepcopy(x["instances"])
            x["reference"]["instances"].gt_ids += 100
    losses = train(model, inputs)
    # With no object in the reference "new" is the only column.
    assert (losses["loss_match"].item() == 0) == (kind not in ("crowd alone", "other ids"))


def test_mixed_precision() -> None:
    torch.manual_seed(0)
    exact = train(build(), random_inputs())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = train(build(), random_inputs())
    for name in ("loss_cls", "loss_sem_seg", "loss_panoptic"):
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.1), name


def test_losses_of_variants() -> None:
    names = set(train(build(), random_inputs()))
    assert names == {
        *("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"),
        *("loss_sem_seg", "loss_sem_seg_roi", "loss_panoptic", "loss_match"),
    }
    assert set(train(build(VPSNET__TRACK=False), random_inputs())) == names - {"loss_match"}
    assert set(train(build(VPSNET__FUSION=False), random_inputs())) == names


def test_the_reference_is_seen(model: VPSNet) -> None:
    """Other pixels there change every loss of the fused frame."""
    model = build(UPSNET__LOSS__SEMANTIC_ROI_WEIGHT=0.0).train()
    inputs, others = random_inputs(1), random_inputs(1)
    others[0]["reference"]["image"] = 255 - others[0]["reference"]["image"]
    torch.manual_seed(0)
    a = model(inputs)
    torch.manual_seed(0)
    b = model(others)
    for name in ("loss_sem_seg", "loss_panoptic", "loss_rpn_cls", "loss_match"):
        assert abs((a[name] - b[name]).item()) > 1e-6, name


def test_wrong_inputs_and_configs_say_what_to_do() -> None:
    model = build().train()
    inputs = random_inputs(1)
    del inputs[0]["reference"]
    with pytest.raises(ConfigError, match="ClipMapper"):
        model(inputs)
    inputs = random_inputs(1)
    del inputs[0]["instances"]
    with pytest.raises(KeyError, match="data mapper"):
        model(inputs)
    with pytest.raises(ConfigError, match=r"MODEL\.UPSNET\.TEST\.PANOPTIC"):
        build(UPSNET__TEST__PANOPTIC="heuristic")
    with pytest.raises(ConfigError, match=r"MODEL\.FLOW\.NAME"):
        build(FLOW__NAME="Farneback")


def test_new_neck_is_trained() -> None:
    """Not only has each of its last layers a gradient, it is not zero."""
    model = build_model(tiny_config("VPSNet")).train()
    sum(model(random_inputs()).values()).backward()
    for layer in (model.fusion.refine, model.fusion.residual_flow[-1], model.fusion.spatial4):
        assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["DIS", "PyramidFlow"])
def test_checkpoint_with_another_flow_network(name: str, tmp_path: Path) -> None:
    """The flow network of the config has its own weights; all else comes from the checkpoint."""
    cfg = tiny_config("VPSNet")
    cfg.MODEL.FLOW.NAME = "PyramidFlow"
    torch.manual_seed(0)
    trained = build_model(cfg)
    checkpoint = tmp_path / "model.pth"
    torch.save({"model": trained.state_dict()}, checkpoint)
    torch.manual_seed(1)
    cfg.MODEL.FLOW.NAME = name
    if name == "PyramidFlow":
        cfg.MODEL.FLOW.WEIGHTS = str(tmp_path / "flow.pth")
        other = build_flow(cfg).state_dict(prefix="flow.")
        torch.save({"model": other}, cfg.MODEL.FLOW.WEIGHTS)
    model = build_model(cfg)
    Checkpointer(model, fit="exact").load(str(checkpoint))
    loaded = model.state_dict()
    for key, value in trained.state_dict().items():
        if not key.startswith("flow."):
            assert torch.equal(loaded[key], value), key
        elif name == "PyramidFlow":
            assert torch.equal(loaded[key], other[key]), key
