"""CenterNet with triplets: configs, the centre check, options."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.checkpoint.convert import ConversionError
from d2ext.codecs.canvas import centered
from d2ext.systems.centernet_triplets.postprocess import (
    OUTSIDE_MARGIN,
    confirm_by_centers,
    confirm_slots,
    image_centers,
    to_instances,
)
from d2ext.systems.cornernet.postprocess import COLUMNS, image_rows
from d2ext.testing import random_inputs, tiny_config

CONFIGS = [
    name for name in model_zoo.available() if name.startswith("centernet_triplets/centernet")
]
# Values and entries of the published state dicts.
PUBLISHED = {
    "centernet_triplets/centernet_triplets_hourglass52_511.yaml": (104_900_000, 630),
    "centernet_triplets/centernet_triplets_hourglass104_511.yaml": (210_200_000, 1260),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name: str) -> None:
    cfg = model_zoo.get_config(name)
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    if name in PUBLISHED:
        values, entries = PUBLISHED[name]
        state = model.state_dict()
        assert len(state) == entries
        assert sum(x.numel() for x in state.values()) == pytest.approx(values, rel=1e-3)


def box_row(x1: float, y1: float, x2: float, y2: float, score: float, label: int) -> list[float]:
    return [x1, y1, x2, y2, score, score, score, label, 0.0]


def test_centres_confirm_small_boxes_in_the_middle_third() -> None:
    rows = torch.tensor([box_row(0, 0, 90, 90, 0.6, 1)])
    for x, y, label, passes in (
        (45, 45, 1, True),
        (31, 59, 1, True),
        (30, 45, 1, False),  # on the edge is outside
        (45, 60, 1, False),
        (45, 29, 1, False),
        (45, 45, 2, False),
    ):
        detections = confirm_by_centers(rows, torch.tensor([[x, y, 0.3, label]]))
        assert len(detections) == passes, (x, y, label)
        if passes:
            assert float(detections[0, 4]) == pytest.approx((2 * 0.6 + 0.3) / 3)
            assert detections[0, COLUMNS:].tolist() == pytest.approx([x, y, 0.3])


def test_large_boxes_need_a_centre_in_the_middle_fifth() -> None:
    rows = torch.tensor([box_row(0, 0, 150, 150, 0.6, 1), box_row(0, 0, 150, 151, 0.5, 1)])
    inside_third = torch.tensor([[55.0, 75, 0.3, 1]])
    assert confirm_by_centers(rows, inside_third)[:, 3].tolist() == [150]
    inside_fifth = torch.tensor([[65.0, 75, 0.3, 1]])
    assert confirm_by_centers(rows, inside_fifth)[:, 3].tolist() == [150, 151]


def test_the_first_centre_counts_not_the_best() -> None:
    rows = torch.tensor([box_row(0, 0, 90, 90, 0.6, 1), box_row(0, 0, 60, 60, 0.6, 0)])
    centers = torch.tensor(
        [[5.0, 5, 0.99, 1], [45, 45, 0.2, 1], [46, 46, 0.9, 1], [30, 30, 0.5, 0]]
    )
    detections = confirm_by_centers(rows, centers)
    # Sorted by the new score: 1.7 / 3 before 1.4 / 3.
    assert detections[:, 7].tolist() == [0, 1]
    assert float(detections[1, 4]) == pytest.approx(1.4 / 3)


def test_centres_do_not_confirm_rejected_boxes() -> None:
    """In slots these, and what no centre confirms, come last."""
    box = (0, 0, 90, 90)
    rows = [box_row(*box, -1.0, 1), box_row(*box, 0.2, 0), box_row(*box, 0.3, 1)]
    centers = torch.tensor([[45.0, 45, 0.9, 1]])
    slots = confirm_slots(torch.tensor(rows), centers)
    assert slots[:, 4].tolist() == pytest.approx([0.5, -1, -1])
    assert torch.equal(confirm_by_centers(torch.tensor(rows), centers), slots[:1])


@pytest.mark.parametrize(("boxes", "centers"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_confirm(boxes: int, centers: int) -> None:
    rows = torch.rand(boxes, COLUMNS)
    detections = confirm_by_centers(rows, torch.rand(centers, 4))
    assert detections.shape == (0, COLUMNS + 3)
    assert len(to_instances(detections, (10, 10), (20, 20))) == 0


def test_boxes_that_reach_far_out_are_rejected() -> None:
    canvas = centered((60, 60), (63, 63))
    cell = 63 / 16

    def detections(x1: float, y1: float, x2: float, y2: float) -> int:
        """Box in pixels of the image."""
        cells = [(v + 1) / cell for v in (x1, y1, x2, y2)]
        rows = torch.tensor([[[*cells, 0.5, 0.5, 0.5, 0.0, 0.0]]])
        return len(image_rows(rows, canvas, 4, OUTSIDE_MARGIN))

    assert detections(-4.9, -4.9, 64.9, 64.9) == 1
    assert detections(-5.1, 0, 30, 30) == 0
    assert detections(0, 0, 30, 65.1) == 0


def test_centres_of_the_mirror_image() -> None:
    canvas = centered((60, 60), (63, 63))
    centers = torch.tensor([[[3.0, 4, 0.5, 2]], [[13.0, 4, 0.4, 2]]])
    detections = image_centers(centers, canvas, 4)
    torch.testing.assert_close(detections[0, :2], detections[1, :2])
    assert detections[:, 2].tolist() == pytest.approx([0.5, 0.4])


def test_centres_are_those_of_the_unscaled_image() -> None:
    cfg = tiny_config("CenterNetTriplets")
    cfg.MODEL.CENTERNET_TRIPLETS.TEST.SCALES = [0.5, 2.0]
    with pytest.raises(ValueError, match=r"1\.0"):
        build_model(cfg)
    cfg.MODEL.CENTERNET_TRIPLETS.TEST.SCALES = [0.5, 1.0]
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    result = model(random_inputs(1))[0]["instances"]
    assert len(result) > 0
    boxes, centers = result.pred_boxes.tensor, result.centers
    assert ((centers > boxes[:, :2]) & (centers < boxes[:, 2:])).all()
    assert result.center_scores.shape == result.scores.shape


def test_a_checkpoint_of_cornernet_is_refused() -> None:
    with pytest.raises(ConversionError, match="ct_heats"):
        convert_state_dict("centernet_triplets", {"pre.0.conv.weight": torch.ones(1)})
