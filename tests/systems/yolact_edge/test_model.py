"""YolactEdge's memory, key frames and training steps, on a tiny model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances

from d2ext.config import ConfigError
from d2ext.systems.yolact_edge import YolactEdge, YolactEdgeMemory
from d2ext.testing import random_inputs, tiny_config


def _build(**keys: Any) -> YolactEdge:
    cfg = tiny_config("YolactEdge")
    for key, value in keys.items():
        cfg.MODEL.YOLACT_EDGE[key] = value
    torch.manual_seed(0)
    model = build_model(cfg)
    for parameter in model.flow_net.parameters():  # so that carried features differ from the own
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _video(length: int, video_id: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    frames = random_inputs(length, seed=seed)
    return [
        {
            "image": x["image"],
            "height": 60,
            "width": 80,
            "video_id": video_id,
            "frame": i,
            "is_first": i == 0,
        }
        for i, x in enumerate(frames)
    ]


def _same(a: Instances, b: Instances) -> bool:
    return len(a) == len(b) and torch.allclose(a.scores, b.scores, atol=1e-5)


def test_a_frame_depends_on_its_key_frame_alone() -> None:
    model, frames = _build(), _video(5)
    outputs = [model([x])[0] for x in frames]
    assert [x["key_distance"] for x in outputs] == [0, 1, 2, 3, 4]
    _, memory = model.step(frames[:1], None)
    for frame, output in zip(frames[1:], outputs[1:], strict=True):
        again, _ = model.step([frame], memory)
        assert _same(again[0]["instances"], output["instances"])
    alone = model([{**frames[3], "is_first": True}])[0]
    assert not _same(alone["instances"], outputs[3]["instances"])


def test_what_follows_the_decoded_predictions_is_no_result() -> None:
    model, frames = _build(), _video(1)
    raw = model.inference_network(model.preprocess(frames))
    (output,) = model.postprocess(raw, frames)
    assert _same(output["instances"], model(frames)[0]["instances"])
    assert not output["instances"].has("mask_scores")


def test_step_does_not_change_the_memory() -> None:
    model, frames = _build(), _video(6)
    _, memory = model.step(frames[:1], None)
    before = [x.clone() for x in memory.tensors()]
    model.step([frames[1]], memory)
    model.step([frames[5]], memory)
    assert all(torch.equal(x, y) for x, y in zip(before, memory.tensors(), strict=True))
    assert memory.key_frames.tolist() == [0]


@pytest.mark.parametrize(
    ("interval", "phase", "keys"),
    [(5, 0, [0, 5]), (5, 2, [0, 1, 2, 7]), (1, 0, list(range(8))), (3, 1, [0, 1, 4, 7])],
)
def test_key_frames(interval: int, phase: int, keys: list[int]) -> None:
    model = _build(KEY_INTERVAL=interval, KEY_PHASE=phase)
    distances = [model([x])[0]["key_distance"] for x in _video(8)]
    assert [i for i, d in enumerate(distances) if d == 0] == keys


def test_key_frames_that_the_caller_chooses_and_frames_that_are_missing() -> None:
    model, frames = _build(), _video(12)
    chosen = [frames[0], frames[1], {**frames[2], "key_frame": True}, frames[3]]
    chosen += [{**frames[5], "key_frame": False}, frames[6], frames[11]]
    distances = [model([x])[0]["key_distance"] for x in chosen]
    # 5 is made no key frame, so 6 counts from 2; at 11 the last key frame is too long ago.
    assert distances == [0, 1, 0, 1, 3, 4, 0]


def test_a_new_video_begins_anew_even_where_the_caller_forgets() -> None:
    model = _build()
    first, second = _video(3), _video(3, video_id=1, seed=1)
    for x in first:
        model([x])
    expected = _build()([second[0]])[0]["instances"]
    forgotten = {**second[0], "is_first": False}
    assert _same(model([forgotten])[0]["instances"], expected)
    # The same video again, from the start.
    again = {**second[0], "is_first": False}
    assert model([second[1]])[0]["key_distance"] == 1
    output = model([again])[0]
    assert output["key_distance"] == 0 and _same(output["instances"], expected)
    # Plain images, as DefaultPredictor gives them.
    image = {"image": second[1]["image"], "height": 60, "width": 80}
    assert model([image])[0]["key_distance"] == model([image])[0]["key_distance"] == 0
    _, memory = model.step([first[0]], None)
    assert model.step([image], memory)[0][0]["key_distance"] == 0


def test_videos_in_step_give_what_each_gives_alone() -> None:
    """One is a frame ahead, so that key frames and others share a batch."""
    model = _build(KEY_INTERVAL=3)
    videos = [_video(7), _video(7, 1, seed=1), _video(7, 2, seed=2)]
    videos[1] = [{**x, "frame": x["frame"] + 1} for x in videos[1]]
    alone = [[model([x])[0] for x in video] for video in videos]
    model.train()
    model.eval()
    for i, frames in enumerate(zip(*videos, strict=True)):
        for output, video in zip(model(list(frames)), alone, strict=True):
            assert output["key_distance"] == video[i]["key_distance"]
            assert _same(output["instances"], video[i]["instances"]), i


def test_a_scene_change_makes_a_key_frame() -> None:
    model, frames = _build(MIN_SIMILARITY=0.9), _video(1)
    still = [{**frames[0], "frame": i, "is_first": i == 0} for i in range(3)]
    other = {**_video(1, seed=5)[0], "frame": 3, "is_first": False}
    other["image"] = 255 - other["image"].flip(1)
    distances = [model([x])[0]["key_distance"] for x in [*still, other]]
    assert distances == [0, 1, 2, 0]


def test_frames_of_different_sizes_share_the_memory() -> None:
    model, frames = _build(), _video(2)
    frames[1]["image"] = frames[1]["image"].repeat(1, 2, 2)
    frames[1].update(height=120, width=160)
    outputs = [model([x])[0]["instances"] for x in frames]
    assert outputs[1].image_size == (120, 160) and outputs[1].pred_masks.shape[1:] == (120, 160)


def test_what_each_step_trains() -> None:
    model = _build()
    model.train()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert any(n.startswith("backbone.bottom_up.") for n in frozen)
    assert any(n.startswith("backbone.lateral") for n in frozen)
    assert not model.backbone.bottom_up.training and model.head.training
    losses, carried = model(random_inputs(), "full")
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.flow_net.parameters())
    model.zero_grad()
    losses, _ = model(random_inputs(), "carried", carried)
    assert "loss_warp" in losses
    sum(losses.values()).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == expected


def test_published_convolutions_of_the_warp_loss() -> None:
    """Published: the convolution of P3 for the coarser level of two, P5."""
    model = _build().train()
    inputs = random_inputs()
    _, carried = model(inputs, "full")

    def warp_loss(published: bool) -> float:
        model.published_warp_convs = published
        return model(inputs, "carried", carried)[0]["loss_warp"].item()

    own, published = warp_loss(False), warp_loss(True)
    assert own != published
    backbone = model.backbone
    backbone.output5.load_state_dict(backbone.output3.state_dict())
    assert warp_loss(False) == published


def test_flow_stage_learns_the_flow() -> None:
    model = _build(STAGE="flow").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-3)
    inputs = random_inputs()
    for x in inputs:  # the reference is the image, rolled by 2 rows and 3 columns
        x["flow"] = torch.tensor([3.0, 2.0]).view(2, 1, 1).expand(2, 60, 80)
        x["flow_valid"] = torch.ones(60, 80, dtype=torch.bool)
    values = []
    for _ in range(30):
        loss = model(inputs)["loss_flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    large = {**inputs[1], "image": inputs[1]["image"].repeat(1, 2, 2)}
    large["flow"] = torch.ones(2, 120, 160)
    large["flow_valid"] = torch.arange(160).expand(120, 160) > 40
    alone = [model([x])["loss_flow"].item() for x in (inputs[0], large)]
    assert model([inputs[0], large])["loss_flow"].item() == pytest.approx(sum(alone) / 2, rel=1e-5)
    unknown = [{**x, "flow_valid": torch.zeros(60, 80, dtype=torch.bool)} for x in inputs]
    assert model(unknown)["loss_flow"].item() == 0


def test_wrong_configs_and_inputs_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="STAGE"):
        _build(STAGE="clip")
    for phase in (3, -1):
        with pytest.raises(ConfigError, match="KEY_PHASE"):
            _build(KEY_INTERVAL=3, KEY_PHASE=phase)
    cfg = tiny_config("YolactEdge")
    cfg.MODEL.YOLACT.BOTTOM_UP = "build_mobilenetv2_backbone"
    cfg.MODEL.YOLACT.IN_FEATURES = ["group3", "group4", "group6"]
    with pytest.raises(ConfigError, match="needs a ResNet"):
        build_model(cfg)
    inputs = random_inputs()
    for x in inputs:
        del x["reference"]
    with pytest.raises(ConfigError, match="ClipMapper"):
        _build().train()(inputs)
    with pytest.raises(ConfigError, match="FlowPairMapper"):
        _build(STAGE="flow").train()(inputs)


def test_memory_is_a_dataclass_of_tensors() -> None:
    model = _build()
    _, memory = model.step(_video(1), None)
    assert isinstance(memory, YolactEdgeMemory)
    assert memory.flow_features.shape == (1, 8, 8, 8)
    assert [tuple(x.shape) for x in memory.sums] == [(1, 16, 4, 4), (1, 16, 2, 2)]


def test_passes_of_an_evaluation_shift_the_key_frames() -> None:
    model, frames = _build(TEST_ALL_PHASES=True, KEY_INTERVAL=3, KEY_PHASE=1), _video(6)
    seen = []
    for _ in model.evaluation_passes():
        seen.append([model([x])[0]["key_distance"] for x in frames])
    assert seen == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 0]]
    assert model.key_phase == 1
    assert len(list(_build().evaluation_passes())) == 1


def test_prepared_flow_net_gives_the_same() -> None:
    """Its channels are padded for inference."""
    net = _build().flow_net
    prepared = copy.deepcopy(net).requires_grad_(False)
    prepared.prepare_inference()
    assert all(x.weight.shape[0] % 8 == 0 for x in (*prepared.flow, *prepared.up_flow))
    current, key = torch.rand(2, 8, 12, 10), torch.rand(2, 8, 12, 10)
    for finest in (0, 1):
        with torch.no_grad():
            expected, actual = (x(current, x.encode_key(key), finest) for x in (net, prepared))
        for level, motion in expected.items():
            for x, y in zip(motion, actual[level], strict=True):
                torch.testing.assert_close(x, y)
    # Nothing in inference uses the finest flow.
    assert [*net(current, net.encode_key(key))] == [2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cudagraph", "compile_cudagraph"])
def test_graphs_give_what_eager_inference_gives(cuda: torch.device, mode: str) -> None:
    """Also where the memory changes between replays, and with several videos."""
    cfg = tiny_config("YolactEdge")
    cfg.MODEL.DEVICE = str(cuda)
    torch.manual_seed(0)
    eager = build_model(cfg).eval()
    cfg.MODEL.INFERENCE.MODE = mode
    graphs = build_model(cfg)
    graphs.load_state_dict(eager.state_dict())
    graphs.eval()
    for batch in zip(_video(12), _video(12, 1, seed=1), strict=True):
        expected, actual = eager(list(batch)), graphs(list(batch))
        for x, y in zip(expected, actual, strict=True):
            assert x["key_distance"] == y["key_distance"]
            torch.testing.assert_close(
                x["instances"].scores, y["instances"].scores, atol=1e-3, rtol=1e-3
            )
