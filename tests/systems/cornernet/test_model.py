"""CornerNet's configs, its parts and its options, and bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.convert import ConversionError
from d2ext.codecs.canvas import centered
from d2ext.systems.cornernet import model as cornernet_model
from d2ext.systems.cornernet.model import CornerNet, canvas_side
from d2ext.systems.cornernet.postprocess import (
    COLUMNS,
    SuppressionOptions,
    best_rows,
    image_rows,
    suppress,
    suppress_slots,
)
from d2ext.testing import random_inputs, tiny_config

CONFIGS = [name for name in model_zoo.available() if name.startswith("cornernet/cornernet_")]
# Values and entries of the published state dicts, batch norm counters included.
PUBLISHED = {
    "cornernet/cornernet_hourglass104_511.yaml": (201_200_000, 1128),
    "cornernet/cornernet_squeeze_511.yaml": (31_800_000, 990),
}


def meta_model(name: str) -> CornerNet:
    cfg = model_zoo.get_config(name)
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name: str) -> None:
    state = meta_model(name).state_dict()
    if name not in PUBLISHED:
        return
    values, entries = PUBLISHED[name]
    # The published fire modules have one norm over both halves, ours one for each: 5 entries more, of
    # which only the counter is a value more.
    fire_modules = sum(key.endswith("expand1x1.weight") for key in state)
    assert len(state) - 5 * fire_modules == entries
    assert sum(x.numel() for x in state.values()) == pytest.approx(values, rel=2e-3)


def test_one_stack_and_several_scales_as_published() -> None:
    one, two = (
        meta_model(f"cornernet/cornernet_hourglass{n}_511.yaml").state_dict() for n in (52, 104)
    )
    # CornerNet-52 is the first stack of CornerNet-104.
    linked = [name for name in two if ".1." in name.replace(".link", ".1.") and name not in one]
    assert one.keys() == two.keys() - linked and len(linked) == 564
    model = meta_model("cornernet/cornernet_hourglass104_511_multi_scale.yaml")
    assert model.scales == [0.5, 0.75, 1.0, 1.25, 1.5] and model.flip
    assert model.suppression.merge and model.suppression.merge_exponent == 10


def published_squeeze_names(model: CornerNet) -> dict[str, torch.Tensor]:
    """A state dict as CornerNet-Lite writes it, made from ours by hand-written replacements."""
    words = [
        ("head.top_left.", "tl."),
        ("head.bottom_right.", "br."),
        ("backbone.", "hg."),
        (".conv.norm.", ".bn."),
        ("squeeze.norm.", "bn1."),
        ("squeeze.", "conv1."),
        ("expand1x1.norm.", "half_a."),
        ("expand3x3.norm.", "half_b."),
        ("expand1x1.", "conv_1x1."),
        ("expand3x3.", "conv_3x3."),
        (".upsample.", ".up2."),
        (".inner.", ".low2."),
        (".up.", ".up1."),
        (".down.", ".low1."),
        (".out.", ".low3."),
        ("hg.stem.", "hg.pre."),
        ("hg.stacks.", "hg.hgs."),
        ("hg.convs.", "hg.cnvs."),
        ("hg.links.", "hg.inters."),
        ("conv1.norm.", "bn1."),
        ("conv2.norm.", "bn2."),
        (".skip.norm.", ".skip.1."),
        (".skip.weight", ".skip.0.weight"),
    ]
    links = {"hg.link_inputs.": "hg.inters_.", "hg.link_outputs.": "hg.cnvs_."}
    pooling = {
        "vertical": "p1_conv1",
        "horizontal": "p2_conv1",
        "output": "conv2",
    }
    predictions = {"heat": "heats", "embedding": "tags", "offset": "offs"}
    published: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        name = name.replace(".inner.", ".low2.")  # of the second of two in a row
        parts = name.split(".")
        if parts[0] in ("tl", "br"):
            corner, stack, what, *rest = parts
            if what == "pooling":
                tail = ".".join(rest)
                tail = tail.replace("merge.norm", "p_bn1").replace("merge", "p_conv1")
                tail = tail.replace("skip.1.", "bn1.").replace("skip.norm.", "bn1.")
                tail = tail.replace("skip.0.", "conv1.").replace("skip.weight", "conv1.weight")
                first, _, last = tail.partition(".")
                name = f"{corner}_modules.{stack}.{pooling.get(first, first)}.{last}"
            else:
                layer = {"hidden": "0.conv", "output": "1"}[rest[0]]
                name = f"{corner}_{predictions[what]}.{stack}.{layer}.{rest[1]}"
        for ours, theirs in links.items():
            if name.startswith(ours):
                stack, *rest = name.removeprefix(ours).split(".")
                leaf = "1." + rest[1] if rest[0] == "norm" else "0." + rest[0]
                name = f"{theirs}{stack}.{leaf}"
        published[f"module.{name}"] = value
    for name in [n for n in published if ".half_a." in n]:
        first, second = published.pop(name), published.pop(name.replace("half_a", "half_b"))
        whole = first if first.dim() == 0 else torch.cat([first, second])
        published[name.replace("half_a", "bn2")] = whole
    return published


def test_squeeze_checkpoints_convert() -> None:
    cfg = tiny_config("CornerNet")
    cfg.MODEL.CORNERNET_HOURGLASS.BLOCK = "fire"
    cfg.MODEL.CORNERNET_HOURGLASS.STEM_BLOCKS = 2
    cfg.MODEL.CORNERNET.HEAD_KERNEL = 1
    torch.manual_seed(0)
    model = build_model(cfg)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    published = published_squeeze_names(model)
    names = {name.removeprefix("module.") for name in published}
    # Some of the published names, as CornerNet-Lite has them.
    assert {
        "hg.pre.2.skip.0.weight",
        "hg.hgs.0.up1.0.conv_3x3.weight",
        "hg.hgs.1.low2.low2.0.bn2.running_mean",
        "hg.hgs.0.low2.up2.bias",
        "hg.inters_.0.1.weight",
        "tl_modules.1.p_bn1.bias",
        "br_modules.0.conv2.bn.weight",
        "br_offs.1.0.conv.bias",
        "tl_tags.0.1.weight",
    } <= names
    converted = convert_state_dict("cornernet", published)
    assert converted.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(converted[name], value), name


def test_checkpoints_without_counters_convert() -> None:
    state = {
        "pre.0.conv.weight": torch.ones(1),
        "pre.0.bn.weight": torch.ones(1),
        "pre.0.bn.running_var": torch.ones(1),
    }
    converted = convert_state_dict("cornernet", state)
    assert converted["backbone.stem.0.conv.norm.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    "state",
    [
        {"backbone.weight": torch.ones(1)},
        # CenterNet with triplets has centres.
        {"pre.0.conv.weight": torch.ones(1), "ct_heats.0.1.weight": torch.ones(1)},
    ],
)
def test_other_checkpoints_are_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConversionError):
        convert_state_dict("cornernet", state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.CORNERNET.TEST.SCALES", [], "SCALES"),
        ("MODEL.CORNERNET.TEST.SCALES", [1.0, 0.0], "SCALES"),
        ("MODEL.CORNERNET.TEST.TOP_K", 0, "TOP_K"),
        ("MODEL.CORNERNET_HOURGLASS.BLOCK", "dense", "CORNERNET_HOURGLASS.BLOCK"),
        ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "build_cornernet_hourglass_backbone"),
        ("MODEL.INFERENCE.MODE", "fast", "INFERENCE.MODE"),
    ],
)
def test_wrong_settings_are_explained(key: str, value: object, message: str) -> None:
    cfg = tiny_config("CornerNet")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_training_needs_instances() -> None:
    model = build_model(tiny_config("CornerNet")).train()
    inputs = random_inputs(1)
    del inputs[0]["instances"]
    with pytest.raises(KeyError, match="instances"):
        model(inputs)


@pytest.mark.parametrize("architecture", ["CornerNet", "CornerNetSaccade", "CenterNetTriplets"])
def test_checkpoints_of_earlier_versions_load(architecture: str, tmp_path: Path) -> None:
    """Backbone and head were parts of `network`; their order, the optimizer's, is the same."""
    model, other = (build_model(tiny_config(architecture)) for _ in range(2))
    state = model.state_dict()
    torch.save({"model": {f"network.{k}": v for k, v in state.items()}}, tmp_path / "old.pth")
    Checkpointer(other, fit="exact").load(str(tmp_path / "old.pth"))
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    first = [name.split(".")[0] for name, _ in model.named_parameters()]
    assert first == sorted(first) and set(first) == {"backbone", "head"}


@pytest.mark.parametrize(
    ("side", "unit", "expected"),
    [(511, 128, 511), (512, 128, 639), (1, 128, 127), (300, 128, 383), (60, 16, 63), (33, 96, 95)],
)
def test_canvas_side(side: int, unit: int, expected: int) -> None:
    assert canvas_side(side, unit) == expected
    if unit == 128:
        assert expected == side | 127  # as published


def trained_on(boxes: list[list[float]], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Losses of one image with these boxes, after a backward pass."""
    torch.manual_seed(0)
    model = build_model(tiny_config("CornerNet")).train()
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes)) % 3
    losses = model([{"image": torch.rand(3, *size) * 255, "instances": instances}])
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    return losses


@pytest.mark.parametrize("objects", [1, 1000])
def test_batch_of_one_image(objects: int) -> None:
    """The published code fails on one image, and beyond 128 objects."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand((objects, 2), generator=generator) * 60
    sides = 1 + torch.rand((objects, 2), generator=generator) * 20
    losses = trained_on(torch.cat([corners, corners + sides], 1).tolist(), (80, 90))
    if objects == 1:
        assert losses["loss_push"].item() == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("size", [(16, 400), (300, 9), (1, 1)])
def test_images_far_from_square(size: tuple[int, int]) -> None:
    height, width = size
    if height * width > 1:  # batch norm wants two values to train on
        trained_on([[0, 0, width, height], [width / 2, 0, width + 50, height / 3]], size)
    model = build_model(tiny_config("CornerNet")).eval()
    result = model([{"image": torch.rand(3, *size) * 255}])[0]["instances"]
    assert result.image_size == size
    assert (result.pred_boxes.tensor[:, 2:] <= torch.tensor([width, height])).all()


def test_objects_outside_and_in_one_cell() -> None:
    same = [[10.0, 10, 30, 30]] * 3
    outside = [[-40.0, -40, -3, -2], [70, 70, 90, 99]]
    trained_on([*same, *outside, [10.1, 10.2, 10.3, 10.4]], (64, 64))


def test_objects_outside_change_nothing() -> None:
    inside = [[10.0, 10, 30, 30], [40, 5, 60, 50]]
    with_more = trained_on([*inside, [-40.0, -40, -3, -2]], (64, 64))
    for name, value in trained_on(inside, (64, 64)).items():
        assert value.item() == pytest.approx(with_more[name].item(), rel=1e-5), name


def test_images_of_several_sizes_train_together() -> None:
    model = build_model(tiny_config("CornerNet"))
    inputs = random_inputs(2)
    small = random_inputs(1, height=20, width=90)[0]
    images, targets = model.training_batch([*inputs, small])
    assert images.shape == (3, 3, 63, 95)
    pixels = images[2] * model.pixel_std + model.pixel_mean
    expected = torch.zeros(3, 63, 95)
    expected[:, 21:41, 2:92] = small["image"].float()
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)
    # Corners move with their image.
    first = small["instances"].gt_boxes.tensor[0]
    cell = int(targets.top_left.index[2, 0])
    assert divmod(cell, 24) == (int((first[1] + 21) * 16 / 63), int((first[0] + 2) * 24 / 95))


def test_mirror_image_finds_the_mirrored_boxes() -> None:
    canvas = centered((50, 60), (63, 63))
    row = torch.tensor([[[3.0, 4.0, 9.0, 10.0, 0.5, 0.4, 0.6, 2.0, 0.1]]])
    mirrored = row.clone()
    mirrored[..., 0], mirrored[..., 2] = 16 - 9.0, 16 - 3.0
    both = image_rows(torch.cat([row, mirrored]), canvas, 4)
    torch.testing.assert_close(both[0], both[1])
    scale = 63 / 16
    torch.testing.assert_close(
        both[0, :4],
        torch.tensor([3 * scale - 1, 4 * scale - 6, 9 * scale - 1, 10 * scale - 6]),
    )
    assert torch.equal(both[0, 4:], row[0, 0, 4:])


def test_scaled_canvas_is_clipped_then_scaled_back() -> None:
    canvas = centered((50, 60), (63, 63), 2.0)
    row = torch.tensor([[[-1.0, 4.0, 99.0, 10.0, 0.5, 0.4, 0.6, 2.0, 0.1]]])
    detections = image_rows(row, canvas, 4)
    scale = 63 / 16
    expected = torch.tensor([0, (4 * scale - 6) / 2, 30, (10 * scale - 6) / 2])
    torch.testing.assert_close(detections[0, :4], expected)
    rejected = row.clone()
    rejected[..., 4] = -1
    assert image_rows(rejected, canvas, 4).shape == (0, COLUMNS)


def test_several_scales_and_merging() -> None:
    torch.manual_seed(0)
    cfg = tiny_config("CornerNet")
    cfg.MODEL.CORNERNET.TEST.SCALES = [0.5, 1.0, 1.5]
    cfg.MODEL.CORNERNET.TEST.NMS_MERGE = True
    model = build_model(cfg).eval()
    inputs = random_inputs(1)
    result = model(inputs)[0]["instances"]
    assert len(result) > 0
    boxes = result.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes[:, 2] <= 80).all() and (boxes[:, 3] <= 60).all()
    # One scale alone gives other detections.
    model.scales = [1.0]
    single = model(inputs)[0]["instances"]
    assert not torch.equal(single.scores, result.scores)
    model.suppression = model.suppression._replace(merge=False)
    assert not torch.equal(
        model(inputs)[0]["instances"].pred_boxes.tensor, single.pred_boxes.tensor
    )


def some_rows(count: int, spread: float) -> torch.Tensor:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, spread, (count, 2))
    high = low + rng.uniform(20, 60, (count, 2))
    columns = [low, high, rng.uniform(0.1, 1, (count, 3)), rng.integers(0, 2, (count, 1))]
    return torch.from_numpy(np.concatenate([*columns, np.zeros((count, 1))], 1)).float()


def test_stale_rows_count_as_published_or_not() -> None:
    rows = some_rows(80, spread=10)
    published = suppress(rows, SuppressionOptions(max_detections=1000))
    clean = suppress(rows, SuppressionOptions(max_detections=1000, keep_stale=False))
    # Overlapping boxes are dropped by overwriting them, and what was moved stays as well.
    assert len(published) == 80 and len(clean) < 80
    assert (clean[:, 4].diff() <= 0).all() and (published[:, 4].diff() <= 0).all()
    assert suppress(rows[:0], SuppressionOptions()).shape == (0, COLUMNS)


@pytest.mark.parametrize("keep_stale", [True, False])
@pytest.mark.parametrize("limit", [0, 20, 100, 1000])
def test_slots_are_suppressed_as_rows(keep_stale: bool, limit: int) -> None:
    options = SuppressionOptions(keep_stale=keep_stale, max_detections=limit)
    images = [some_rows(count, spread=10) for count in (80, 200, 30)]
    images[0][::3, 4] = -1.0
    images[1][:, 4] = (images[1][:, 4] * 20).round() / 20  # ties
    images[2][:, 4] = -1.0
    images.append(images[0][:0])
    slots, counts = suppress_slots(images, options)
    assert slots.shape == (4, 200, COLUMNS)
    for rows, own, count in zip(images, slots, counts, strict=True):
        assert torch.equal(own[:count], suppress(rows, options))
    assert counts[1] > 0 and counts.tolist()[2:] == [0, 0]


@pytest.mark.parametrize("architecture", ["CornerNet", "CenterNetTriplets"])
def test_results_in_slots_are_those_of_rows(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; images of two sizes, one of which has fewer pairs."""
    torch.manual_seed(0)
    cfg = tiny_config(architecture)
    cfg.MODEL[
        CornerNet.config_key if architecture == "CornerNet" else "CENTERNET_TRIPLETS"
    ].merge_from_list(["TEST.SCALES", [1.0, 0.5]])
    model = build_model(cfg).eval()
    inputs = [*random_inputs(2), *random_inputs(1, height=20, width=20)]
    expected = model(inputs)
    monkeypatch.setattr(cornernet_model, "in_slots", lambda *_: True)
    for a, b in zip(model(inputs), expected, strict=True):
        for name, value in b["instances"].get_fields().items():
            own = a["instances"].get(name)
            assert torch.equal(getattr(own, "tensor", own), getattr(value, "tensor", value))
    assert len(expected[0]["instances"]) > 0


def test_ties_at_the_limit_stay() -> None:
    rows = some_rows(6, spread=100)
    rows[:, 4] = torch.tensor([0.5, 0.2, 0.9, 0.5, 0.5, 0.1])
    assert best_rows(rows, 2)[:, 4].tolist() == pytest.approx([0.9, 0.5, 0.5, 0.5])
    assert len(best_rows(rows, 10)) == 6


def test_inference_in_low_precision_is_close() -> None:
    torch.manual_seed(0)
    cfg = tiny_config("CornerNet")
    model = build_model(cfg).eval()
    cfg.MODEL.INFERENCE.DTYPE = "bfloat16"
    cfg.MODEL.INFERENCE.CHANNELS_LAST = True
    faster = build_model(cfg).eval()
    faster.load_state_dict(copy.deepcopy(model.state_dict()))
    inputs = random_inputs(1)
    images = model.preprocess(inputs)
    (exact,), (close,) = model.inference_network(images), faster.inference_network(images)
    assert close.dtype == torch.float32 and close.shape == exact.shape
    best = min(int((x[0, :, 4] > -1).sum()) for x in (exact, close))
    torch.testing.assert_close(close[0, :best, 4], exact[0, :best, 4], atol=0.02, rtol=0.05)
    # What benchmarks call is what the model does.
    direct = model(inputs)[0]["instances"]
    staged = model.postprocess((exact,), inputs)[0]["instances"]
    torch.testing.assert_close(staged.scores, direct.scores)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("CornerNet", {"top_left", "bottom_right"}),
        ("CornerNetSaccade", {"top_left", "bottom_right", "attention"}),
        ("CenterNetTriplets", {"top_left", "bottom_right", "centers"}),
    ],
)
def test_heat_maps_lie_on_the_image(architecture: str, names: set[str]) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config(architecture)).eval()
    inputs = random_inputs(1, height=50, width=70)[0]
    inputs.update(height=100, width=140)
    (shown,) = model.heatmaps([inputs])
    assert shown.keys() == names
    for heat in shown.values():
        assert heat.shape == (100, 140) and heat.min() >= 0 and heat.max() <= 1
    if architecture == "CornerNet":
        # Nothing is lost on the way from the cells to the image.
        with torch.no_grad():
            maps = model.network(model.preprocess([inputs])[:1])
        for name, own in zip(("top_left", "bottom_right"), maps, strict=True):
            best = float(own.heat.sigmoid().max())
            assert float(shown[name].max()) == pytest.approx(best, abs=0.02)


@pytest.mark.parametrize("architecture", ["CornerNet", "CornerNetSaccade", "CenterNetTriplets"])
def test_mixed_precision_trains(architecture: str) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config(architecture)).train().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(random_inputs(2))
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_scaled_image_is_what_opencv_makes(scale: float) -> None:
    """Published: the bytes of the image are resized, then normalised."""
    cfg = tiny_config("CornerNet")
    cfg.MODEL.CORNERNET.TEST.SCALES = [scale]
    model = build_model(cfg).eval()
    image = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    size = int(61 * scale), int(45 * scale)
    expected = cv2.resize(image, size).astype(np.float32).transpose(2, 0, 1)
    inputs = [{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}]
    drawn = model.preprocess(inputs, scale)[0] * model.pixel_std + model.pixel_mean
    canvas = model.canvas((45, 61), scale)
    top, left = (
        outer // 2 - inner // 2 for inner, outer in zip(size[::-1], canvas.size, strict=True)
    )
    window = drawn[:, top : top + size[1], left : left + size[0]]
    np.testing.assert_allclose(window, expected, atol=1e-3)
