"""YOLACT's losses on cases worked out by hand; the fixtures cover the whole."""

from __future__ import annotations

import pytest
import torch

from d2ext.codecs.prior_boxes import prior_boxes, to_corners
from d2ext.systems.yolact.head import MaskScorer, YOLACTPredictions
from d2ext.systems.yolact.losses import YOLACTCriterion, _binary_cross_entropy, mask_iou
from d2ext.systems.yolact.targets import YOLACTTargets, resize_masks


def test_masks_are_resized_without_antialiasing() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[0, :, 3:5] = 1
    # Cells of 4 pixels are sampled between their middle pixels 1|2 and 5|6: both 0.
    assert resize_masks(mask, (2, 2)).sum() == 0
    assert torch.equal(resize_masks(mask, (8, 8)), mask)
    assert resize_masks(torch.zeros(0, 8, 8), (2, 2)).shape == (0, 2, 2)


def test_mask_iou_by_hand() -> None:
    soft = torch.tensor([[[0.9, 0.6], [0.4, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    target = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(mask_iou(soft, target), torch.tensor([1 / 3, 0.0]))


def _case(objects: int = 1, priors_side: int = 4) -> tuple[YOLACTPredictions, torch.Tensor, list]:
    """One image whose objects are the first priors themselves, predictions all zero."""
    priors = prior_boxes([(priors_side, priors_side)], [[25.0]], [1.0], 100, square=True)
    count = len(priors)
    boxes = to_corners(priors[:objects])
    masks = torch.zeros(objects, 100, 100)
    for i, (x1, y1, x2, y2) in enumerate((boxes * 100).round().long().tolist()):
        masks[i, y1:y2, x1:x2] = 1
    target = YOLACTTargets(boxes, torch.zeros(objects).long(), masks, torch.zeros(0, 4))
    predictions = YOLACTPredictions(
        torch.zeros(1, count, 4),
        torch.zeros(1, count, 3),
        torch.zeros(1, count, 2),
        torch.zeros(1, 20, 20, 2),
        torch.zeros(1, 2, 10, 10),
        ((priors_side, priors_side),),
    )
    return predictions, priors, [target]


def test_losses_by_hand() -> None:
    predictions, priors, targets = _case()
    losses = YOLACTCriterion()(predictions, priors, targets)
    log2, log3 = torch.tensor(2.0).log(), torch.tensor(3.0).log()
    # The object is a prior: offset 0.
    assert losses["loss_box"] == 0
    # 1 positive and 3 negatives over 3 equal classes, divided by 1 positive.
    torch.testing.assert_close(losses["loss_class"], 4 * log3)
    # The box [0, 5) cells is widened to [0, 6): 36 cells at probability 1/2, divided by 25 cells.
    torch.testing.assert_close(losses["loss_mask"], 6.125 * 36 * log2 / 25)
    torch.testing.assert_close(losses["loss_semantic"], 2 * log2)


def test_many_positives_are_thinned_and_scaled_back() -> None:
    predictions, priors, targets = _case(objects=16)
    every = YOLACTCriterion()(predictions, priors, targets)["loss_mask"]
    torch.manual_seed(0)
    few = [
        YOLACTCriterion(max_masks=4)(predictions, priors, targets)["loss_mask"] for _ in range(60)
    ]
    assert len({float(x) for x in few}) > 1
    torch.testing.assert_close(torch.stack(few).mean(), every, rtol=0.03, atol=0)


def test_small_objects_do_not_train_the_mask_scorer() -> None:
    predictions, priors, targets = _case()
    predictions = predictions._replace(prototypes=torch.zeros(1, 80, 80, 2))
    scorer = MaskScorer(2)
    torch.nn.init.ones_(scorer.output.bias)
    large = YOLACTCriterion()(predictions, priors, targets, scorer)
    assert large["loss_mask_iou"] > 0
    limit = YOLACTCriterion(min_mask_iou_area=400)
    assert limit(predictions, priors, targets, scorer)["loss_mask_iou"] == 0


@pytest.mark.parametrize(
    ("name", "positives_of_others", "expected"),
    [("local", 5, 3), ("local", -3, 3), ("global", 5, 2), ("global", -3, 0.25)],
)
def test_normalizer_of_four_processes(
    monkeypatch: pytest.MonkeyPatch, name: str, positives_of_others: int, expected: float
) -> None:
    """Positives here, or their mean over the processes; 1 positive at least counts in all."""
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda count: count.add_(positives_of_others)
    )
    criterion = YOLACTCriterion(normalizer=name)
    assert criterion._count(3, torch.device("cpu")) == expected


def test_normalizer_is_checked() -> None:
    with pytest.raises(ValueError, match="NORMALIZER"):
        YOLACTCriterion(normalizer="batch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_confident_wrong_masks_have_bounded_gradients_in_low_precision(dtype: torch.dtype) -> None:
    # A logit of 9 everywhere: 1 - p is 1e-4, which low precision rounds away.
    predictions, priors, targets = _case()
    targets = [targets[0]._replace(masks=torch.zeros_like(targets[0].masks))]
    prototypes = torch.full((1, 20, 20, 2), 4.5, dtype=dtype, requires_grad=True)
    coefficients = torch.ones(1, 16, 2, dtype=dtype)
    predictions = predictions._replace(prototypes=prototypes, coefficients=coefficients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = YOLACTCriterion()(predictions, priors, targets)["loss_mask"]
    # 36 cells of softplus(9) over 25
    torch.testing.assert_close(loss, torch.tensor(6.125 * 36 * 9.0001 / 25), rtol=1e-3, atol=0)
    loss.backward()
    assert prototypes.grad is not None and prototypes.grad.abs().max() < 1


def test_nan_stays_nan_and_the_rest_is_pytorch_s() -> None:
    probabilities = torch.tensor([0.0, 0.3, float("nan"), 1.0], requires_grad=True)
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss = _binary_cross_entropy(probabilities, target)
    assert loss.isnan().tolist() == [False, False, True, False]
    expected = torch.nn.functional.binary_cross_entropy(
        probabilities[[0, 1, 3]], target[[0, 1, 3]], reduction="none"
    )
    assert torch.equal(loss[[0, 1, 3]], expected)
