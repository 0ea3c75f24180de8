"""A comparison: arms that are trained alike, and what is reported about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

# Functions without arguments that return a :class:`Comparison`; the command line writes - for _.
COMPARISONS = Registry("COMPARISONS")

# Name of a plot → its points: x, y and the standard error of y (0: none is drawn).
Series = dict[str, list[tuple[float, float, float]]]


@dataclass(frozen=True)
class Arm:
    """A config file, and KEY VALUE pairs that change it. With ``trained_by``, the name of another arm,
    it is not trained: that one's weights are evaluated. With ``build``, which makes a model that
    `d2ext evaluate` does not know, they are only measured."""

    title: str
    config: str
    overrides: tuple[str, ...] = ()
    trained_by: str = ""
    build: Callable[[CfgNode], nn.Module] | None = None


@dataclass(frozen=True)
class Plot:
    """Titles of the axes, and whether y is logarithmic."""

    x: str
    y: str
    log: bool = False


@dataclass(frozen=True)
class Comparison:
    """Arms side by side.

    Attributes:
        summary: one line for the help.
        arms: by name, in the order of the table.
        columns: of the table: key of the results (``task/metric``) → title. The first is drawn against
            training time.
        overrides: KEY VALUE pairs for all arms.
        evaluations: points on the curve against training time.
        prepared: what arms begin with, by name: trained before them, once for all seeds. In the
            overrides of an arm ``{name}`` stands for the file of its weights.
        curves: name of a plot → x → key of the results.
        measure: (config of a finished run, its model) → further results, and series for ``plots``.
        plots: by name; ``time`` is always drawn.
    """

    summary: str
    arms: Mapping[str, Arm]
    columns: Mapping[str, str]
    overrides: tuple[str, ...] = ()
    evaluations: int = 1
    prepared: Mapping[str, Arm] = field(default_factory=dict)
    curves: Mapping[str, Mapping[float, str]] = field(default_factory=dict)
    measure: Callable[[CfgNode, nn.Module], tuple[dict[str, float], Series]] | None = None
    plots: Mapping[str, Plot] = field(default_factory=dict)
