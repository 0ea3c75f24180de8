"""The fixtures in tests/reference/densepose: their proposals, and comparisons of several tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn

from d2ext.codecs.densepose import ChartResult
from d2ext.data.densepose import DensePoseAnnotations, SurfacePoints
from tests.reference.fixture import Fixture

REFERENCE = Path(__file__).parents[2] / "reference" / "densepose"
# DESIGN: raw outputs within 1e-4 relative. The runs agree to 2e-6 (NOTES.md).
TOLERANCE = 1e-5


def surface_points(published: dict[str, Any] | None) -> SurfacePoints | None:
    """An annotation as fixtures have it: part masks are rectangles, painted in order."""
    if published is None:
        return None
    mask = np.zeros((256, 256), np.uint8)
    for part, x0, y0, x1, y1 in published["mask_rectangles"]:
        mask[y0:y1, x0:x1] = part
    if published.get("single_mask"):
        mask = mask.clip(max=1)
    return points_with_mask(published, mask)


def points_with_mask(published: dict[str, Any], mask: np.ndarray) -> SurfacePoints:
    """Points of an annotation, and a mask (256, 256)."""
    return SurfacePoints(
        published["dp_x"],
        published["dp_y"],
        published.get("dp_I"),
        published.get("dp_U"),
        published.get("dp_V"),
        published.get("dp_vertex"),
        published.get("ref_model"),
        mask,
    )


def proposals(targets: dict[str, Any], *, masks: bool = False) -> list[Instances]:
    """The matched proposals of a fixture's ``inputs.targets``, all foreground."""
    images = targets["proposals"]
    height, width = targets["image_size_hw"]
    result = []
    for persons in images if isinstance(images[0], list) else [images]:
        x = Instances((height, width))
        x.proposal_boxes = Boxes([p["proposal_box"] for p in persons])
        x.gt_boxes = Boxes([p["gt_box"] for p in persons])
        x.gt_classes = torch.zeros(len(persons), dtype=torch.int64)
        x.gt_densepose = DensePoseAnnotations([surface_points(p["densepose"]) for p in persons])
        if masks:
            drawn = torch.zeros(len(persons), height, width, dtype=torch.bool)
            for mask, person in zip(drawn, persons, strict=True):
                x0, y0, x1, y1 = person["instance_mask_rectangle"]
                mask[y0:y1, x0:x1] = True
            x.gt_masks = BitMasks(drawn)
        result.append(x)
    return result


def load(module: nn.Module, fixture: Fixture, prefix: str) -> None:
    """Load the fixture's parameters that begin with ``prefix`` and stand in the module; all must be
    given."""
    module.load_state_dict(
        {
            name.removeprefix(prefix): torch.from_numpy(value)
            for name, value in fixture.state_dict().items()
            if name.startswith(prefix) and name.removeprefix(prefix) in module.state_dict()
        },
        strict=True,
    )


def check_losses(fixture: Fixture, losses: dict[str, Tensor], prefix: str = "") -> None:
    expected = {
        name: float(fixture.expected[name])
        for name in fixture.expected
        if name.startswith(f"{prefix}loss_densepose")
    }
    actual = {f"{prefix}{name}": float(value.detach()) for name, value in losses.items()}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(actual[name] - value) <= 1e-5 * abs(value), (name, actual[name], value)


def check_gradients(
    fixture: Fixture, loss: Tensor, tensors: dict[str, Tensor], prefix: str = ""
) -> None:
    """Norms of the loss's gradients; ``tensors`` by the names in the fixture."""
    names = fixture.manifest["inputs"]["grad_norms_of"]
    gradients = torch.autograd.grad(loss, [tensors[name] for name in names], allow_unused=True)
    norms = [0.0 if g is None else float(g.norm()) for g in gradients]
    expected = fixture.expected[f"{prefix}grad_norms"]
    np.testing.assert_allclose(norms, expected, rtol=2e-5, atol=1e-7)
    if f"{prefix}grad.head_features" in fixture.expected:
        gradient = gradients[names.index("head_features")]
        assert gradient is not None
        assert fixture.compare(f"{prefix}grad.head_features", gradient) < TOLERANCE


def check_result(fixture: Fixture, name: str, result: ChartResult) -> None:
    labels = fixture.expected[f"{name}.labels"]
    assert np.array_equal(result.labels, labels), float((result.labels.numpy() != labels).mean())
    np.testing.assert_allclose(result.uv, fixture.expected[f"{name}.uv"], atol=1e-5, rtol=1e-5)
    for confidence, value in result.confidences.items():
        expected = fixture.expected[f"{name}.{confidence}"]
        np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5)
