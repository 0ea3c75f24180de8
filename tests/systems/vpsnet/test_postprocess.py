"""Ids of objects over a video, and the panoptic map that has them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2ext.modeling.region_slots import EMPTY, Slots
from d2ext.systems.upsnet.panoptic_head import PanopticPrediction
from d2ext.systems.vpsnet.head import match_logits
from d2ext.systems.vpsnet.postprocess import (
    DUMMY,
    ObjectMemory,
    VPSNetPostprocessor,
    assign_objects,
    forget,
    match_scores,
    track,
    with_dummy,
)
from d2ext.testing import tiny_config

WEIGHTS = (1.0, 2.0, 10.0)
SIZE = (100, 200)


def candidates(
    boxes: list[list[float]], classes: list[int], scores: list[float] | None = None
) -> Instances:
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(boxes).float().view(-1, 4)),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        scores=torch.tensor(scores or [0.9] * len(classes)),
    )


def looks(*numbers: int, channels: int = 8) -> Tensor:
    """Embeddings of objects by number: equal ones match, others do not."""
    return 6.0 * torch.eye(channels)[list(numbers)]


def empty() -> ObjectMemory:
    return ObjectMemory.empty(8, torch.device("cpu"))


def follow(objects: ObjectMemory, frame: Instances, *numbers: int, limit: int = 0) -> Any:
    ids, objects = track(frame, looks(*numbers), objects, weights=WEIGHTS, limit=limit)
    assert ids.dtype == torch.int64
    return ids.tolist(), objects


A, B, C = [0.0, 0, 20, 20], [50.0, 0, 70, 20], [100.0, 50, 130, 90]


# ---------------------------------------------------------------- ids


def test_objects_keep_their_ids() -> None:
    ids, memory = follow(empty(), candidates([A, B], [0, 1]), 0, 1)
    assert ids == [1, 2]
    ids, memory = follow(memory, candidates([B, C, A], [1, 1, 0]), 1, 2, 0)
    assert ids == [2, 3, 1]
    # One is hidden for two frames, in one of which there is nothing.
    ids, memory = follow(memory, candidates([A], [0]), 0)
    assert ids == [1]
    ids, memory = follow(memory, candidates([], []))
    assert ids == [] and memory.frame == 4
    ids, memory = follow(memory, candidates([C, B], [1, 1]), 2, 1)
    assert ids == [3, 2]
    assert memory.seen.tolist() == [2, 4, 4] and memory.next_id == 4


def test_what_is_remembered() -> None:
    """Box and embedding of the last time, the class of the first."""
    _, memory = follow(empty(), candidates([A, B], [0, 1]), 0, 1)
    moved = [5.0, 0, 25, 20]
    score = torch.tensor([[20.0, 0, 0, 0, 0, 0, 0, 0]])
    ids, memory = track(candidates([moved], [2]), score, memory, weights=WEIGHTS)
    # 10 for "new", 120 for what it looks like.
    assert ids.tolist() == [1]
    assert memory.boxes.tolist() == [moved, B]
    assert memory.classes.tolist() == [0, 1] and memory.ids.tolist() == [1, 2]
    assert torch.equal(memory.embeddings[0], score[0])
    assert torch.equal(memory.embeddings[1], looks(1)[0])


def test_a_change_of_class_alone_makes_a_new_object() -> None:
    """ "New" has the bonus of the same class, so that looks must be worth more than that."""
    _, memory = follow(empty(), candidates([A], [0]), 0)
    weak = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    ids, _ = track(candidates([A], [0]), weak, memory, weights=WEIGHTS)
    assert ids.tolist() == [1]
    ids, memory = track(candidates([A], [1]), weak, memory, weights=WEIGHTS)
    assert ids.tolist() == [2] and memory.classes.tolist() == [0, 1]
    ids, _ = track(candidates([A], [1]), weak, memory, weights=(1.0, 2.0, 0.0))
    assert ids.tolist() == [1]  # without the bonus


def test_match_scores_term_by_term() -> None:
    _, memory = follow(empty(), candidates([A, B], [0, 1]), 0, 1)
    found = candidates([[10.0, 0, 30, 20]], [1], [0.5])
    embedding = 0.1 * looks(0)
    scores = match_scores(found, embedding, memory, (3.0, 5.0, 7.0))
    logits = torch.tensor([[0.0, 3.6, 0.0]])
    torch.testing.assert_close(match_logits(embedding, memory.embeddings), logits)
    expected = logits.log_softmax(dim=1) + 3 * np.log(0.5)
    expected += torch.tensor([[7.0, 5 * 200 / 600, 7.0]])
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("scores", "index", "new"),
    [
        ([[0.0, 1.0]], [0], []),
        ([[1.0, 0.0]], [-1], [0]),
        ([[0.5, 0.5]], [-1], [0]),  # of equal ones the first: new
        ([[0, 1.0, 1.0], [0, 0.5, 0.6]], [0, 1], []),
        ([[0, 2.0], [0, 3.0], [0, 2.5]], [-1, 0, -1], [0, 2]),  # displaced, and late
        ([[0, 3.0], [0, 3.0]], [0, -1], [1]),  # the first keeps it
        ([[0, 2.0], [5.0, 0], [0, 3.0], [5.0, 0]], [-1, -1, 0, -1], [1, 3, 0]),  # order of new ones
        ([[0, 3.0, 2.9], [0, 4.0, 0]], [-1, 0], [0]),  # who loses does not get the second best
    ],
)
def test_assign_objects(scores: Any, index: list[int], new: list[int]) -> None:
    found, added = assign_objects(np.array(scores, dtype=np.float32))
    assert found.tolist() == index and added == new


def test_displaced_candidates_get_new_ids_after_the_new_ones() -> None:
    _, memory = follow(empty(), candidates([A], [0]), 0)
    frame = candidates([B, C, A], [0, 1, 0])
    ids, memory = follow(memory, frame, 0, 3, 0)
    assert ids == [3, 2, 1]
    assert memory.boxes.tolist() == [A, C, B] and memory.classes.tolist() == [0, 1, 0]


def test_a_memory_is_not_changed() -> None:
    _, memory = follow(empty(), candidates([A, B], [0, 1]), 0, 1)
    before = [x.clone() for x in vars(memory).values() if isinstance(x, Tensor)]
    follow(memory, candidates([B, C], [1, 1]), 1, 2)
    after = [x for x in vars(memory).values() if isinstance(x, Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_not_a_number_makes_new_objects() -> None:
    _, memory = follow(empty(), candidates([A], [0]), 0)
    ids, memory = track(
        candidates([A, B], [0, 0]), torch.full((2, 8), torch.nan), memory, weights=WEIGHTS
    )
    assert ids.tolist() == [2, 3]
    assert candidates([A], [0], [0.0]).scores.log().isinf().all()
    ids, _ = follow(memory, candidates([A], [0], [0.0]), 0)
    assert ids == [4]


def test_the_memory_is_bounded() -> None:
    """New objects in every frame, one that stays, and one that comes back within the limit."""
    limit, frames, channels = 50, 3000, 8
    memory, given = empty(), 0
    start = time.process_time()
    for t in range(frames):
        boxes, classes, numbers = [A, B, C], [0, 2 * t + 2, 2 * t + 3], [0, 1, 2]
        returns = t > 0 and t % 20 == 0
        if returns:  # within the 24 frames that 50 objects last
            boxes, classes, numbers = [*boxes, [0.0, 50, 9, 59]], [*classes, 1], [*numbers, 3]
        frame = candidates(boxes, classes)
        ids, memory = track(frame, looks(*numbers), memory, weights=(1, 2, 100), limit=limit)
        stays, *others = ids.tolist()
        assert stays == 1
        if returns and t > 20:
            assert others.pop() == 44
        assert min(others) > given  # never one that is forgotten
        given = max(others)
    assert time.process_time() - start < 15  # measured: 3
    assert len(memory.ids) == limit and memory.next_id == given + 1 > 2 * frames
    held = [x for x in vars(memory).values() if isinstance(x, Tensor)]
    assert sum(x.untyped_storage().nbytes() for x in held) <= limit * 8 * (4 + channels + 3)


def test_forget_keeps_those_seen_last_in_the_order_of_their_ids() -> None:
    def memory(*seen: int) -> ObjectMemory:
        numbers = torch.arange(len(seen))
        return ObjectMemory(
            numbers[:, None].repeat(1, 4).float(),
            numbers[:, None].float(),
            numbers,
            numbers + 1,
            torch.tensor(seen),
            9,
            20,
        )

    kept = forget(memory(3, 5, 1, 8, 8), 3)
    assert kept.ids.tolist() == [2, 4, 5] and kept.seen.tolist() == [5, 8, 8]
    assert kept.classes.tolist() == kept.boxes[:, 0].tolist() == [1, 3, 4]
    assert kept.embeddings[:, 0].tolist() == [1, 3, 4]
    assert (kept.frame, kept.next_id) == (9, 20)
    assert forget(memory(4, 4, 4), 2).ids.tolist() == [1, 2]
    assert len(forget(memory(1, 2, 3), 0).ids) == len(forget(memory(1, 2, 3), 3).ids) == 3


# ---------------------------------------------------------------- panoptic maps


def postprocessor(**keys: Any) -> VPSNetPostprocessor:
    cfg = tiny_config("VPSNet")
    cfg.MODEL.VPSNET.update(keys)
    return VPSNetPostprocessor(cfg)


# Two stuff classes, three things.
STUFF = torch.tensor([1.0, 0, -9, -9, -9])[:, None, None].repeat(1, 8, 8)
NEGATIVE = torch.tensor([-2.0, -3, -1, -5, -6])[:, None, None].repeat(1, 8, 8)


def with_masks(boxes: list[list[float]], classes: list[int], first_id: int = 1) -> Instances:
    result = Instances(
        (32, 32),
        pred_boxes=Boxes(torch.tensor(boxes).view(-1, 4)),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        scores=torch.linspace(0.9, 0.7, len(classes)),
        mask_logits=torch.full((len(classes), 28, 28), 50.0),
        track_ids=torch.arange(len(classes)) + first_id,
    )
    return result


def things(output: dict[str, Any]) -> list[tuple[int, int]]:
    """(track id, area) of the things."""
    return [(x["track_id"], x["area"]) for x in output["panoptic_seg"][1] if x["isthing"]]


def as_things(score: Tensor, *boxes: list[float]) -> Tensor:
    """The semantic arg max inside boxes becomes thing 0."""
    score = score.clone()
    for x1, y1, x2, y2 in boxes:
        score[2, int(y1) // 4 : int(y2) // 4, int(x1) // 4 : int(x2) // 4] = 9
    return score


def test_ids_of_things_and_instances_beyond_sixteen_bits() -> None:
    boxes = [[0.0, 0, 8, 8], [16.0, 16, 28, 28]]
    found = with_masks(boxes, [0, 0], first_id=70_000)
    output = postprocessor()(as_things(STUFF, *boxes), found, found, (32, 32))
    assert [x for x, _ in things(output)] == [70_000, 70_001]
    assert output["instances"].track_ids.tolist() == [70_000, 70_001]
    ids, segments = output["panoptic_seg"]
    assert ids.dtype == torch.int32
    assert {x["id"] for x in segments} == set(ids.unique().tolist())
    assert not any("track_id" in x for x in segments if not x["isthing"])


def test_more_than_254_objects() -> None:
    boxes = [
        [2.0 * (i % 16), 2.0 * (i // 16), 2.0 * (i % 16) + 2, 2.0 * (i // 16) + 2]
        for i in range(256)
    ]
    found = with_masks(boxes, [0] * 256)
    output = postprocessor()(as_things(STUFF, [0.0, 0, 32, 32]), found, found, (32, 32))
    assert [x for x, _ in things(output)] == [*range(1, 257)]
    assert len(output["panoptic_seg"][0].unique()) == 256


def test_covered_instances_take_their_ids_with_them() -> None:
    """The second is dropped as a double of the first; the third keeps its id."""
    boxes = [[0.0, 0, 8, 8], [0.0, 0, 8, 8], [16.0, 16, 28, 28]]
    found = with_masks(boxes, [0, 0, 0])
    score = as_things(STUFF, boxes[0], boxes[2])
    for published in (False, True):
        output = postprocessor(PUBLISHED_ID_LOOKUP=published)(score, found, found, (32, 32))
        assert [x for x, _ in things(output)] == [1, 3]
        assert output["instances"].track_ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("published", "ids"), [(False, [10, 30, 40]), (True, [10, 20, 30])])
def test_ids_after_an_instance_without_pixels(published: bool, ids: list[int]) -> None:
    """Published: the place among those that have some, taken for the channel. One is enough."""
    labels = torch.full((8, 8), 1)
    for row, channel in ((0, 2), (2, 4), (4, 5)):  # channel 3 has none
        labels[row, row] = channel
    prediction = PanopticPrediction(
        labels.int(),
        torch.where(labels >= 2, 2, labels).int(),
        torch.arange(4),
        torch.zeros(4, dtype=torch.int64),
        torch.ones(4),
    )
    _, segments = postprocessor(PUBLISHED_ID_LOOKUP=published).segments(
        prediction, (8, 8), (8, 8), None, torch.tensor([10, 20, 30, 40])
    )
    assert [x["track_id"] for x in segments if x["isthing"]] == ids
    none = prediction._replace(labels=torch.ones(8, 8).int())
    _, segments = postprocessor(PUBLISHED_ID_LOOKUP=published).segments(
        none, (8, 8), (8, 8), None, torch.tensor([10, 20, 30, 40])
    )
    assert [x["id"] for x in segments] == [1] and not segments[0]["isthing"]


def dummy(size: tuple[int, int]) -> Instances:
    empty = Slots(
        torch.zeros(2, 3, 4), torch.tensor([[EMPTY] * 3, [0.5] * 3]), torch.zeros(2, 3).long()
    )
    slots = with_dummy(empty)
    assert slots.counts.tolist() == [1, 3] and slots.classes[1].tolist() == [0, 0, 0]
    return slots.instances(0, 1, size)


@pytest.mark.parametrize("published", [False, True])
def test_nothing_detected(published: bool) -> None:
    """Published: a channel of zeros, which wins where all stuff is negative, as the last stuff class."""
    post = postprocessor(PUBLISHED_DUMMY=published)
    if published:
        found = dummy((32, 32))
        assert found.pred_classes.tolist() == [DUMMY] and len(found) == 1
        found.mask_logits = torch.full((1, 28, 28), 5.0)
        found.track_ids = torch.tensor([4])
    else:
        found = with_masks([], [])
    output = post(NEGATIVE, found, found, (32, 32))
    assert len(output["instances"]) == 0 and output["instances"].track_ids.shape == (0,)
    _, segments = output["panoptic_seg"]
    assert [x["category_id"] for x in segments] == [2 if published else 1]
    assert [x["area"] for x in segments] == [1024]
    # Where stuff is positive, it makes no difference.
    _, segments = post(STUFF, found, found, (32, 32))["panoptic_seg"]
    assert [x["category_id"] for x in segments] == [1]


def test_the_dummy_is_remembered_as_an_object() -> None:
    found = dummy(SIZE)
    ids, memory = follow(empty(), found, 0)
    assert ids == [1] and memory.boxes.tolist() == [[0, 0, 1, 1]]
    ids, memory = follow(memory, candidates([A], [0]), 1)
    assert ids == [2]
    ids, _ = follow(memory, found, 0)
    assert ids == [1]
