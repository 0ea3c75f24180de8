"""Published CenterNet checkpoints of every family → models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from d2ext import model_zoo
from d2ext.checkpoint import ConversionError, convert_state_dict
from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.systems.centernet.model import CenterNet
from d2ext.tools import convert
from tests.reference.fixture import draw_state_dict

REFERENCE = Path(__file__).parents[2] / "reference" / "centernet"
Names = dict[str, tuple[int, ...]]


# ---------------------------------------------------------------- published names and shapes


def _norm(name: str, channels: int) -> Names:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()}


def _conv_norm(conv: str, norm: str, i: int, o: int, kernel: int) -> Names:
    return {f"{conv}.weight": (o, i, kernel, kernel)} | _norm(norm, o)


def _tree(name: str, levels: int, i: int, o: int, extra: int, keep_input: bool) -> Names:
    """A DLA tree; ``extra``: channels of the children that come from outside."""
    names: Names = {}
    extra += i if keep_input else 0
    if levels == 1:
        for block, width in (("tree1", i), ("tree2", o)):
            names |= _conv_norm(f"{name}.{block}.conv1", f"{name}.{block}.bn1", width, o, 3)
            names |= _conv_norm(f"{name}.{block}.conv2", f"{name}.{block}.bn2", o, o, 3)
        names |= _conv_norm(f"{name}.root.conv", f"{name}.root.bn", 2 * o + extra, o, 1)
    else:
        names |= _tree(f"{name}.tree1", levels - 1, i, o, 0, False)
        names |= _tree(f"{name}.tree2", levels - 1, o, o, extra + o, False)
    if i != o:
        names |= _conv_norm(f"{name}.project.0", f"{name}.project.1", i, o, 1)
    return names


def _deform(name: str, i: int, o: int) -> Names:
    return {
        f"{name}.weight": (o, i, 3, 3),
        f"{name}.bias": (o,),
        f"{name}.conv_offset_mask.weight": (27, i, 3, 3),
        f"{name}.conv_offset_mask.bias": (27,),
    }


def _ida(name: str, widths: list[int], factors: list[int], o: int) -> Names:
    names: Names = {}
    for k, (i, factor) in enumerate(zip(widths, factors, strict=True), start=1):
        for part, width in (("proj", i), ("node", o)):
            names |= _norm(f"{name}.{part}_{k}.actf.0", o)
            names |= _deform(f"{name}.{part}_{k}.conv", width, o)
        names[f"{name}.up_{k}.weight"] = (o, 1, 2 * factor, 2 * factor)
    return names


def _heads(pose: bool, width: int, hidden: int) -> Names:
    channels = {"hm": 1 if pose else 80, "wh": 2, "reg": 2}
    channels |= {"hps": 34, "hm_hp": 17, "hp_offset": 2} if pose else {}
    names: Names = {}
    for head, o in channels.items():
        names |= {f"{head}.0.weight": (hidden, width, 3, 3), f"{head}.0.bias": (hidden,)}
        names |= {f"{head}.2.weight": (o, hidden, 1, 1), f"{head}.2.bias": (o,)}
    return names


def _dla(pose: bool) -> Names:
    names = _conv_norm("base.base_layer.0", "base.base_layer.1", 3, 16, 7)
    names |= _conv_norm("base.level0.0", "base.level0.1", 16, 16, 3)
    names |= _conv_norm("base.level1.0", "base.level1.1", 16, 32, 3)
    names |= _tree("base.level2", 1, 32, 64, 0, False)
    names |= _tree("base.level3", 2, 64, 128, 0, True)
    names |= _tree("base.level4", 2, 128, 256, 0, True)
    names |= _tree("base.level5", 1, 256, 512, 0, True)
    names |= {"base.fc.weight": (1000, 512, 1, 1), "base.fc.bias": (1000,)}
    names |= _ida("dla_up.ida_0", [512], [2], 256)
    names |= _ida("dla_up.ida_1", [256, 256], [2, 2], 128)
    names |= _ida("dla_up.ida_2", [128, 128, 128], [2, 2, 2], 64)
    names |= _ida("ida_up", [128, 256], [2, 4], 64)
    return names | _heads(pose, 64, 256)


def _resnet(depth: int) -> Names:
    blocks = {18: (2, 2, 2, 2), 101: (3, 4, 23, 3)}[depth]
    names = _conv_norm("conv1", "bn1", 3, 64, 7)
    width = 64
    for stage, count in enumerate(blocks, start=1):
        hidden = 32 * 2**stage
        o = hidden if depth == 18 else 4 * hidden
        for k in range(count):
            name = f"layer{stage}.{k}"
            sizes = [(width, hidden, 3), (hidden, o, 3)]
            if depth > 18:
                sizes = [(width, hidden, 1), (hidden, hidden, 3), (hidden, o, 1)]
            for n, (a, b, kernel) in enumerate(sizes, start=1):
                names |= _conv_norm(f"{name}.conv{n}", f"{name}.bn{n}", a, b, kernel)
            if k == 0 and (width != o or stage > 1):
                names |= _conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", width, o, 1)
            width = o
    return names


def _resdcn(depth: int) -> Names:
    names, i = _resnet(depth), 512 if depth == 18 else 2048
    for k, o in enumerate((256, 128, 64)):
        names |= _deform(f"deconv_layers.{6 * k}", i, o) | _norm(f"deconv_layers.{6 * k + 1}", o)
        names[f"deconv_layers.{6 * k + 3}.weight"] = (o, o, 4, 4)
        names |= _norm(f"deconv_layers.{6 * k + 4}", o)
        i = o
    return names | _heads(False, 64, 64)


def _plain_resnet(depth: int) -> Names:
    names, i = _resnet(depth), 512
    for k in range(3):
        names[f"deconv_layers.{3 * k}.weight"] = (i, 256, 4, 4)
        names |= _norm(f"deconv_layers.{3 * k + 1}", 256)
        i = 256
    return names | _heads(False, 256, 64)


FAMILIES: dict[str, tuple[Names, str, list[Any]]] = {
    "resdcn_101": (_resdcn(101), "centernet/centernet_R_101_dcn_512.yaml", []),
    "dla_34": (_dla(False), "centernet/centernet_dla34_512.yaml", []),
    "dla_34_pose": (_dla(True), "centernet/centernet_pose_dla34_512.yaml", []),
    "res_18": (
        _plain_resnet(18),
        "centernet/centernet_R_18_dcn_512.yaml",
        ["MODEL.DECONV.DEFORM", False, "MODEL.DECONV.CHANNELS", [256, 256, 256]],
    ),
}


def _build(config: str, options: list[Any], device: str = "meta") -> CenterNet:
    cfg = model_zoo.get_config(config)
    cfg.merge_from_list(options)
    cfg.MODEL.DEVICE = "cpu"
    if device == "cpu":
        return build_model(cfg)
    with torch.device(device):
        return META_ARCH_REGISTRY.get("CenterNet")(cfg)


def test_sizes_are_the_published_ones() -> None:
    """Entries and values, as far as they are known."""
    for names, entries, millions in (
        (_dla(False), 400, 20.2),
        (_dla(True), 412, 20.6),
        (_resdcn(18), 177, 14.4),
    ):
        assert len(names) == entries
        assert sum(int(np.prod(s)) for s in names.values()) / 1e6 == pytest.approx(
            millions, abs=0.06
        )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_load_strictly(family: str) -> None:
    names, config, options = FAMILIES[family]
    published = {k: torch.empty(s, device="meta") for k, s in names.items()}
    converted = convert_state_dict("centernet", {"state_dict": published, "epoch": 140})
    model = _build(config, options)
    model.load_state_dict(converted, strict=True, assign=True)
    if family.startswith("dla"):
        # the classifier and two dead projections
        assert len(published) - len(converted) == 2 + 2 * 6


def test_dla_of_imagenet_is_a_backbone(tmp_path: Path) -> None:
    """From the file of a classifier, by the tool and as it is, into the whole model's base."""
    generator = torch.Generator().manual_seed(0)
    base = {
        k.removeprefix("base."): torch.rand(s, generator=generator)
        for k, s in _dla(False).items()
        if k.startswith("base.")
    }
    source, target = tmp_path / "dla34.pth", tmp_path / "converted.pth"
    torch.save(base, source)
    config = "centernet/centernet_dla34_512.yaml"
    arguments = [str(source), str(target), "--config-file", config]
    assert convert.run(arguments) == 2  # it is no whole model
    assert convert.run([*arguments, "--system", "dla"]) == 0
    whole = {k: torch.zeros(s) for k, s in _dla(False).items()}
    whole |= {f"base.{k}": v for k, v in base.items()}
    expected = convert_state_dict("centernet", whole)
    for path in (source, target):
        model = _build(config, [], "cpu")
        Checkpointer(model, fit="finetune").load(str(path))
        state = model.state_dict()
        names = [k for k in state if k.startswith("backbone.bottom_up.")]
        assert len(names) > 150
        for name in names:
            if not name.endswith("num_batches_tracked"):
                assert state[name].equal(expected[name]), name


def test_hourglass_of_another_detector_is_a_backbone() -> None:
    manifest = json.loads((REFERENCE / "hourglass_ctdet" / "manifest.json").read_text())
    published = {k: torch.empty(s, device="meta") for k, s in manifest["parameters"]}
    published["t_heats.0.1.weight"] = torch.empty(80, 256, 1, 1, device="meta")
    converted = convert_state_dict(
        "cornernet_hourglass", {f"module.{k}": v for k, v in published.items()}
    )
    own = _build("centernet/centernet_hourglass104_512.yaml", []).backbone.state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in own.items()}
    with pytest.raises(ConversionError, match=r"pre\.0\.conv"):
        convert_state_dict("cornernet_hourglass", {"hm.2.weight": torch.zeros(1)})


def test_pose_hourglass_names() -> None:
    """Heads of two stacks; the hourglass itself is compared in test_reference.py."""
    model = _build("centernet/centernet_pose_hourglass_512.yaml", [])
    heads = {"hm": 1, "wh": 2, "hps": 34, "reg": 2, "hm_hp": 17, "hp_offset": 2}
    names: Names = {}
    for head, o in heads.items():
        for s in range(2):
            names |= {f"{head}.{s}.0.conv.weight": (256, 256, 3, 3)}
            names |= {f"{head}.{s}.0.conv.bias": (256,)}
            names |= {f"{head}.{s}.1.weight": (o, 256, 1, 1), f"{head}.{s}.1.bias": (o,)}
    published = {k: torch.empty(s, device="meta") for k, s in names.items()}
    published["pre.0.conv.weight"] = torch.empty(128, 3, 7, 7, device="meta")
    converted = convert_state_dict("centernet", published)
    own = {k: v.shape for k, v in model.state_dict().items() if k.startswith("head.")}
    assert own == {k: v.shape for k, v in converted.items() if k.startswith("head.")}


@pytest.mark.parametrize(
    "names", [["model.weight"], ["hm.2.weight", "strange.weight"], ["prediction_layers.0.weight"]]
)
def test_other_checkpoints_are_refused(names: list[str]) -> None:
    with pytest.raises(ConversionError):
        convert_state_dict("centernet", {name: torch.zeros(1) for name in names})


# ---------------------------------------------------------------- DLA by its published names


class PublishedDLA:
    """The network as the notes describe it, in functions of the published state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def norm(self, name: str, x: Tensor) -> Tensor:
        s = self.state
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-5)

    def conv(self, conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{conv}.weight"]
        return self.norm(norm, F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2))

    def block(self, name: str, x: Tensor, stride: int, shortcut: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", f"{name}.bn1", x, stride).relu()
        return (self.conv(f"{name}.conv2", f"{name}.bn2", y) + shortcut).relu()

    def tree(
        self, name: str, levels: int, x: Tensor, stride: int, children: list[Tensor], keep: bool
    ) -> Tensor:
        bottom = F.max_pool2d(x, stride) if stride > 1 else x
        if keep:
            children = [*children, bottom]
        if levels == 2:
            first = self.tree(f"{name}.tree1", 1, x, stride, [], False)
            return self.tree(f"{name}.tree2", 1, first, 1, [*children, first], False)
        shortcut = bottom
        if f"{name}.project.0.weight" in self.state:
            shortcut = self.conv(f"{name}.project.0", f"{name}.project.1", bottom)
        first = self.block(f"{name}.tree1", x, stride, shortcut)
        second = self.block(f"{name}.tree2", first, 1, first)
        joined = torch.cat([second, first, *children], dim=1)
        return self.conv(f"{name}.root.conv", f"{name}.root.bn", joined).relu()

    def deform(self, name: str, x: Tensor) -> Tensor:
        s, conv = self.state, f"{name}.conv"
        inner = f"{conv}.conv_offset_mask"
        raw = F.conv2d(x, s[f"{inner}.weight"], s[f"{inner}.bias"], padding=1)
        y = deform_conv2d(
            x,
            raw[:, :18],
            s[f"{conv}.weight"],
            s[f"{conv}.bias"],
            padding=1,
            mask=raw[:, 18:].sigmoid(),
        )
        return self.norm(f"{name}.actf.0", y).relu()

    def ida(self, name: str, layers: list[Tensor], start: int, end: int) -> None:
        for i in range(start + 1, end):
            k = i - start
            weight = self.state[f"{name}.up_{k}.weight"]
            factor = weight.shape[-1] // 2
            x = self.deform(f"{name}.proj_{k}", layers[i])
            x = F.conv_transpose2d(
                x, weight, stride=factor, padding=factor // 2, groups=weight.shape[0]
            )
            layers[i] = self.deform(f"{name}.node_{k}", x + layers[i - 1])

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv("base.base_layer.0", "base.base_layer.1", x).relu()
        x = self.conv("base.level0.0", "base.level0.1", x).relu()
        x = self.conv("base.level1.0", "base.level1.1", x, 2).relu()
        layers = [x]
        for level, depth in ((2, 1), (3, 2), (4, 2), (5, 1)):
            layers.append(self.tree(f"base.level{level}", depth, layers[-1], 2, [], level > 2))
        layers = layers[1:]
        fused = []
        for i in range(3):
            self.ida(f"dla_up.ida_{i}", layers, 2 - i, 4)
            fused.insert(0, layers[-1])
        self.ida("ida_up", fused, 0, 3)
        maps = {}
        for head in ("hm", "wh", "reg"):
            s = self.state
            y = F.conv2d(fused[-1], s[f"{head}.0.weight"], s[f"{head}.0.bias"], padding=1).relu()
            maps[head] = F.conv2d(y, s[f"{head}.2.weight"], s[f"{head}.2.bias"])
        return maps


def test_dla_computes_what_its_published_names_mean() -> None:
    names = [[name, list(shape)] for name, shape in _dla(False).items()]
    published = {k: torch.from_numpy(v) for k, v in draw_state_dict(names, 3, 0.7).items()}
    # small offsets, so that the taps stay in the image
    for name in published:
        if "conv_offset_mask" in name:
            published[name] = published[name] * 0.2
    model = _build("centernet/centernet_dla34_512.yaml", [], "cpu").eval()
    model.load_state_dict(convert_state_dict("centernet", published), strict=True)
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = PublishedDLA(published)(x)
        features = model.backbone(x)["dla_up"]
        actual = model.head([features])
    for ours, theirs in (("heatmap", "hm"), ("size", "wh"), ("offset", "reg")):
        difference = (actual[ours] - expected[theirs]).norm() / expected[theirs].norm()
        assert difference < 1e-5, theirs
