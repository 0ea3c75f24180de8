"""Published names of CornerNet's hourglass → those of ``CornerNetHourglass``.

CornerNet, both CenterNets and CornerNet-Lite share them, behind different prefixes.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from d2ext.checkpoint.convert import Rule, StateDict

# Parts of a block: published → ours. Names of fire modules' parts come from `name_fire_parts`.
_PARTS = {
    "conv1": "conv1",
    "bn1": "conv1.norm",
    "conv2": "conv2",
    "bn2": "conv2.norm",
    "skip.0": "skip",
    "skip.1": "skip.norm",
    "fire_conv1": "squeeze",
    "fire_bn1": "squeeze.norm",
    "fire_conv_1x1": "expand1x1",
    "fire_conv_3x3": "expand3x3",
    "fire_bn2_1x1": "expand1x1.norm",
    "fire_bn2_3x3": "expand3x3.norm",
}
_PART_PATTERN = "(" + "|".join(re.escape(part) for part in _PARTS) + r")\.(\w+)"
_BRANCH = {"up1": "up", "low1": "down", "low3": "out"}


def hourglass_rules(source: str = "", target: str = "backbone.") -> tuple[Rule, ...]:
    """How the names of a stacked hourglass become ours.

    Args:
        source: regular expression before the published names, without groups.
        target: prefix of our names.
    """

    def place(match: re.Match[str], where: str) -> str:
        """The last two groups are a part of a block and its leaf."""
        return f"{target}{where}.{_PARTS[match[match.re.groups - 1]]}.{match[match.re.groups]}"

    def level(match: re.Match[str]) -> str:
        inner = ".inner" * match[2].count("low2")
        return place(match, f"stacks.{match[1]}{inner}.{_BRANCH[match[3]]}.{match[4]}")

    def bottom(match: re.Match[str]) -> str:
        inner = ".inner" * match[2].count("low2")
        return place(match, f"stacks.{match[1]}{inner}.{match[3]}")

    def conv_norm(published: str, ours: str) -> tuple[Rule, Rule]:
        """A convolution and its norm, published as .conv and .bn or as .0 and .1."""
        return (
            Rule(rf"{source}{published}\.(?:conv|0)\.weight", rf"{target}{ours}.weight"),
            Rule(rf"{source}{published}\.(?:bn|1)\.(\w+)", lambda m: _norm(m, f"{target}{ours}")),
        )

    def _norm(match: re.Match[str], ours: str) -> str:
        return f"{match.expand(ours)}.norm.{match[match.re.groups]}"

    return (
        *conv_norm(r"pre\.0", "stem.0.conv"),
        Rule(
            rf"{source}pre\.(\d)\.{_PART_PATTERN}",
            lambda m: place(m, f"stem.{m[1]}"),
        ),
        Rule(
            rf"{source}(?:kps|hgs)\.(\d)\.((?:low2\.)*)(up1|low1|low3)\.(\d)\.{_PART_PATTERN}",
            level,
        ),
        Rule(rf"{source}(?:kps|hgs)\.(\d)\.((?:low2\.)+)(\d)\.{_PART_PATTERN}", bottom),
        # Squeeze up-samples by transposed convolutions.
        Rule(
            rf"{source}(?:kps|hgs)\.(\d)\.((?:low2\.)*)up2\.(\w+)",
            lambda m: f"{target}stacks.{m[1]}{'.inner' * m[2].count('low2')}.upsample.{m[3]}",
        ),
        *conv_norm(r"cnvs\.(\d)", r"convs.\1.conv"),
        *conv_norm(r"inters_\.(\d)", r"link_inputs.\1"),
        *conv_norm(r"cnvs_\.(\d)", r"link_outputs.\1"),
        Rule(rf"{source}inters\.(\d)\.{_PART_PATTERN}", lambda m: place(m, f"links.{m[1]}")),
    )


def name_fire_parts(state_dict: StateDict) -> dict[str, Tensor]:
    """Give CornerNet-Squeeze's fire modules names that residual blocks do not have.

    Their norm over both halves becomes one for each half.
    """
    marker = ".conv_1x1.weight"
    modules = {name.removesuffix(marker) for name in state_dict if name.endswith(marker)}
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        path, _, leaf = name.rpartition(".")
        module, _, part = path.rpartition(".")
        if module not in modules:
            renamed[name] = value
        elif part == "bn2":
            halves = value.chunk(2) if value.dim() else (value, value)
            for half, own in zip(("1x1", "3x3"), halves, strict=True):
                renamed[f"{module}.fire_bn2_{half}.{leaf}"] = own.clone()
        else:
            renamed[f"{module}.fire_{part}.{leaf}"] = value
    return renamed


def add_counters(converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add, in place, the batch norms' counters that PyTorch 0.4.0 did not have."""
    for name in list(converted):
        if name.endswith(".running_var"):
            counter = name.removesuffix("running_var") + "num_batches_tracked"
            converted.setdefault(counter, torch.tensor(0))
    return converted
