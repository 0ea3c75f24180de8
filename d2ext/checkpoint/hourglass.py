"""Published names of CornerNet's stacked hourglass → those of ``StackedHourglass``.

CornerNet, both CenterNets and CornerNet-Lite share them, behind different prefixes.
"""

from __future__ import annotations

import re

from d2ext.checkpoint.convert import Rule

# Parts of a residual block: published → ours.
_RESIDUAL = {
    "conv1": "conv1",
    "bn1": "conv1.norm",
    "conv2": "conv2",
    "bn2": "conv2.norm",
    "skip.0": "skip",
    "skip.1": "skip.norm",
}
_RESIDUAL_PATTERN = r"(conv1|bn1|conv2|bn2|skip\.0|skip\.1)\.(\w+)"
_BRANCH = {"up1": "up", "low1": "down", "low3": "out"}


def hourglass_rules(source: str = "", target: str = "backbone.") -> tuple[Rule, ...]:
    """How the names of a stacked hourglass of residual blocks become ours.

    Args:
        source: regular expression before the published names, without groups.
        target: what our names begin with.
    """

    def place(match: re.Match[str], where: str) -> str:
        """The last two groups are a part of a residual block and its leaf."""
        return f"{target}{where}.{_RESIDUAL[match[match.re.groups - 1]]}.{match[match.re.groups]}"

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
            rf"{source}pre\.(\d)\.{_RESIDUAL_PATTERN}",
            lambda m: place(m, f"stem.{m[1]}"),
        ),
        Rule(rf"{source}kps\.(\d)\.((?:low2\.)*)(up1|low1|low3)\.(\d)\.{_RESIDUAL_PATTERN}", level),
        Rule(rf"{source}kps\.(\d)\.((?:low2\.)+)(\d)\.{_RESIDUAL_PATTERN}", bottom),
        *conv_norm(r"cnvs\.(\d)", r"convs.\1.conv"),
        *conv_norm(r"inters_\.(\d)", r"link_inputs.\1"),
        *conv_norm(r"cnvs_\.(\d)", r"link_outputs.\1"),
        Rule(rf"{source}inters\.(\d)\.{_RESIDUAL_PATTERN}", lambda m: place(m, f"links.{m[1]}")),
    )
