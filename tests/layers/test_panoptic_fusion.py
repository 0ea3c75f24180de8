"""Panoptic fusion: each implementation against naive loops, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ext.layers import has_cuda_extension, has_extension
from d2ext.layers.panoptic_fusion import (
    fuse_panoptic,
    fuse_panoptic_reference,
    prune_masks,
    prune_masks_reference,
)

needs_extension = pytest.mark.skipif(not has_extension(), reason="d2ext_C is not compiled")
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_cuda_extension()),
    reason="no CUDA device, or d2ext_C is not compiled for CUDA",
)
COMPILED = [
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda]),
]
IMPLEMENTATIONS = ["reference", *COMPILED]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

STUFF, THINGS = 3, 4
SIZE = (20, 28)


class Scene:
    """Random arguments; boxes in and partly outside the map, of one pixel, and with fractions."""

    def __init__(self, seed: int, count: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # Mostly negative logits in every other scene, so that zeros outside of boxes win.
        self.score = (2 * draw(STUFF + THINGS, 5, 7) - 2 * (seed % 2)).to(dtype)
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([SIZE[1], SIZE[0]])
        sides = torch.rand(count, 2, generator=generator) ** 2 * 24
        self.boxes = torch.cat([corner - 4, corner - 4 + sides], dim=1)
        if count > 2:
            self.boxes[0] = torch.tensor([0.0, 0.0, SIZE[1] - 1.0, SIZE[0] - 1.0])
            self.boxes[1] = torch.tensor([6.5, 7.5, 6.5, 7.5])
        if dtype == torch.float64:
            self.boxes = self.boxes.double()
        self.classes = torch.randint(0, THINGS, (count,), generator=generator)
        self.scores = torch.rand(count, generator=generator)
        self.masks = (draw(count, 6, 6) + 0.3).to(dtype)

    def to(self, device: str) -> Scene:
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        return self


def prune(implementation: str, scene: Scene, fraction: float = 0.3) -> list[int]:
    function = prune_masks_reference if implementation == "reference" else prune_masks
    scene.to("cuda" if implementation == "cuda" else "cpu")
    arguments = (scene.masks, scene.boxes, scene.classes, scene.scores, SIZE, fraction)
    return function(*arguments).tolist()


def fuse(
    implementation: str, scene: Scene, size: tuple[int, int] = SIZE, unknown: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    function = fuse_panoptic_reference if implementation == "reference" else fuse_panoptic
    scene.to("cuda" if implementation == "cuda" else "cpu")
    labels, semantic = function(
        scene.score,
        scene.boxes,
        scene.classes,
        scene.masks,
        size,
        num_stuff=STUFF,
        unknown=unknown,
    )
    assert labels.dtype == semantic.dtype == torch.int32
    return labels.cpu().numpy(), semantic.cpu().numpy()


# ---------------------------------------------------------------- naive loops


def line_taps(index: int, cells: int, pixels: int) -> tuple[int, int, float]:
    source = max((index + 0.5) * cells / pixels - 0.5, 0.0)
    low = min(int(source), cells - 1)
    return low, min(low + 1, cells - 1), min(source - low, 1.0)


def naive_value(grid: list[list[float]], y: int, x: int, height: int, width: int) -> float:
    y0, y1, v = line_taps(y, len(grid), height)
    x0, x1, u = line_taps(x, len(grid[0]), width)
    top = grid[y0][x0] * (1 - u) + grid[y0][x1] * u
    bottom = grid[y1][x0] * (1 - u) + grid[y1][x1] * u
    return top * (1 - v) + bottom * v


def naive_prune(scene: Scene, fraction: float) -> list[int]:
    masks = scene.masks.double().tolist()
    covered: dict[int, set[tuple[int, int]]] = {}
    kept = []
    for i in sorted(range(len(masks)), key=lambda k: -float(scene.scores[k])):
        x1, y1, x2, y2 = (math.trunc(v) for v in scene.boxes[i].tolist())
        pixels = {
            (y, x)
            for y in range(max(y1, 0), min(y2 + 1, SIZE[0]))
            for x in range(max(x1, 0), min(x2 + 1, SIZE[1]))
            if naive_value(masks[i], y - y1, x - x1, y2 - y1 + 1, x2 - x1 + 1) > 0
        }
        own = covered.setdefault(int(scene.classes[i]), set())
        if pixels and len(pixels & own) / len(pixels) <= fraction:
            kept.append(i)
            own |= pixels
    return kept


def naive_logits(scene: Scene, size: tuple[int, int], unknown: bool) -> np.ndarray:
    """(S + n [+ 1], H, W): all channels, as the published head writes them."""
    height, width = size
    score, masks = scene.score.double().tolist(), scene.masks.double().tolist()
    count = len(masks)
    semantic = np.array(
        [
            [[naive_value(c, y, x, height, width) for x in range(width)] for y in range(height)]
            for c in score
        ]
    )
    views, pasted = np.zeros((count, *size)), np.zeros((count, *size))
    for i in range(count):
        box = scene.boxes[i].tolist()
        x1, y1, x2, y2 = (math.trunc(v) for v in box)
        for y in range(height):
            for x in range(width):
                if x1 <= x <= round(box[2]) and y1 <= y <= round(box[3]):
                    views[i, y, x] = semantic[STUFF + int(scene.classes[i]), y, x]
                if x1 <= x <= x2 and y1 <= y <= y2:
                    sides = (y2 - y1 + 1, x2 - x1 + 1)
                    pasted[i, y, x] = naive_value(masks[i], y - y1, x - x1, *sides)
    channels = [semantic[:STUFF], views + pasted]
    if unknown:
        rest = semantic[STUFF:].max(axis=0)
        if count:
            rest = rest - views.max(axis=0)
        channels.append(rest[None])
    return np.concatenate(channels)


def assert_arg_max(labels: np.ndarray, logits: np.ndarray, tolerance: float) -> None:
    """Labels choose the first of the largest logits; others only where they differ by rounding."""
    chosen = np.take_along_axis(logits, labels[None].astype(np.int64), axis=0)[0]
    assert (logits.max(axis=0) - chosen <= tolerance).all()
    assert (labels == logits.argmax(axis=0)).mean() > 0.98


# ---------------------------------------------------------------- prune_masks


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_pruning_against_naive_loops(implementation: str, seed: int) -> None:
    scene = Scene(seed, 12)
    for fraction in (0.0, 0.3, 0.8, 1.0):
        expected = naive_prune(scene, fraction)
        assert prune(implementation, scene, fraction) == expected
    assert 0 < len(naive_prune(scene.to("cpu"), 0.0)) < 12


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pruning_counts_the_union_of_what_is_kept(implementation: str) -> None:
    """Two halves cover a third mask wholly, though neither covers more than half of it."""
    scene = Scene(0, 3)
    scene.boxes = torch.tensor([[0.0, 0, 9, 9], [10.0, 0, 19, 9], [0.0, 0, 19, 9]])
    scene.masks = torch.ones(3, 6, 6)
    scene.classes = torch.tensor([1, 1, 1])
    scene.scores = torch.tensor([0.9, 0.8, 0.7])
    assert prune(implementation, scene, 0.6) == [0, 1]
    scene.classes[1] = 2  # another class covers nothing
    assert prune(implementation, scene, 0.6) == [0, 1, 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pruning_at_the_limit_and_with_ties(implementation: str) -> None:
    scene = Scene(0, 3)
    scene.boxes = torch.tensor([[0.0, 0, 9, 9], [7.0, 0, 16, 9], [0.0, 0, 9, 9]])
    scene.masks = torch.ones(3, 6, 6)
    scene.classes = torch.zeros(3, dtype=torch.int64)
    scene.scores = torch.full((3,), 0.5)
    # 3 of 10 columns are covered: 0.3 is not more than 0.3. Equal scores keep their order.
    assert prune(implementation, scene, 0.3) == [0, 1]
    assert prune(implementation, scene, 0.29) == [0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pruning_nothing_and_masks_that_vanish(implementation: str) -> None:
    assert prune(implementation, Scene(0, 0)) == []
    scene = Scene(0, 3)
    scene.masks = torch.full((3, 6, 6), -1.0)
    assert prune(implementation, scene) == []
    scene.masks += 2
    scene.boxes = torch.tensor([[40.0, 0, 50, 9], [5.0, 5, 2, 2], [-9.0, -9, -3, -3]])
    assert prune(implementation, scene) == []


# ---------------------------------------------------------------- fuse_panoptic


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_fusion_against_naive_loops(implementation: str, count: int, unknown: bool) -> None:
    for seed in (0, 1):
        scene = Scene(seed, count)
        logits = naive_logits(scene, SIZE, unknown)
        labels, semantic = fuse(implementation, scene, unknown=unknown)
        assert_arg_max(labels, logits, 1e-5)
        everything = naive_logits(Scene(seed, 0), SIZE, False)
        assert (semantic[semantic < STUFF] == everything.argmax(axis=0)[semantic < STUFF]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_outside_of_boxes_wins_over_negative_logits(implementation: str) -> None:
    scene = Scene(0, 2)
    scene.score = torch.full_like(scene.score, -2.0)
    scene.score[STUFF:] = -3.0
    scene.boxes = torch.tensor([[0.0, 0, 27, 9], [0.0, 0, 5, 19]])
    scene.masks = torch.full((2, 6, 6), -1.0)
    labels, semantic = fuse(implementation, scene, unknown=False)
    # Inside the first box the second is 0, and elsewhere the first; in both, stuff is best.
    assert (labels[:10, 6:] == STUFF + 1).all()
    assert (labels[10:, :] == STUFF).all()
    assert (labels[:10, :6] == 0).all()
    assert (semantic == 0).all()
    # There the best thing is that of the instances: unknown is 0, and above all others.
    labels, _ = fuse(implementation, scene)
    assert (labels[:10, :6] == STUFF + 2).all()
    assert (labels[10:, 6:] == STUFF).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_logits_choose_the_first_channel(implementation: str) -> None:
    scene = Scene(0, 2)
    scene.score = torch.ones_like(scene.score)
    scene.boxes = torch.tensor([[0.0, 0, 27, 19], [0.0, 0, 27, 19]])
    scene.masks = torch.zeros(2, 6, 6)
    labels, semantic = fuse(implementation, scene)
    assert (labels == 0).all() and (semantic == 0).all()
    scene.masks += 1
    assert (fuse(implementation, scene)[0] == STUFF).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_thing_in_its_own_box_is_never_unknown(implementation: str) -> None:
    """Where the best thing is the class of the box, unknown is exactly 0, whatever the rounding."""
    scene = Scene(3, 1)
    scene.score[:STUFF] = -9.0
    scene.score[STUFF:] = torch.rand(THINGS, 5, 7)
    scene.score[STUFF + 1] += 2.0
    scene.classes = torch.tensor([1])
    scene.boxes = torch.tensor([[0.0, 0, 27, 19]])
    # The instance's logit is exactly its negated mask's excess: slightly above 0 everywhere.
    scene.masks = torch.full((1, 6, 6), -1.0)
    labels, _ = fuse(implementation, scene, size=(40, 56))
    assert (labels[:20, :28] == STUFF).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_stand_in_has_no_logits(implementation: str) -> None:
    scene = Scene(0, 1)
    scene.classes = torch.tensor([-1])
    scene.score = -scene.score.abs() - 0.1
    labels, _ = fuse(implementation, scene, unknown=False)
    assert (labels == STUFF).all()


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (61, 5), (40, 56)])
def test_compiled_agrees_with_reference_at_any_size(
    implementation: str, size: tuple[int, int]
) -> None:
    for seed in range(4):
        scene = Scene(seed, 7)
        expected, semantic = fuse("reference", scene, size)
        labels, own = fuse(implementation, scene, size)
        assert (labels != expected).mean() <= 0.002
        assert (semantic != own).mean() <= 0.002


@pytest.mark.parametrize("implementation", COMPILED)
def test_more_instances_than_a_block_holds(implementation: str) -> None:
    scene = Scene(5, 600)
    expected, _ = fuse("reference", scene)
    labels, _ = fuse(implementation, scene)
    assert (labels != expected).mean() <= 0.002
    assert prune(implementation, scene) == prune("reference", scene)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(implementation: str, dtype: torch.dtype) -> None:
    scene = Scene(1, 6, dtype)
    expected, _ = fuse("reference", scene)
    kept = prune("reference", scene)
    for name in ("score", "masks"):
        value = getattr(scene, name)
        setattr(scene, name, value.transpose(-1, -2).contiguous().transpose(-1, -2))
    scene.boxes = scene.boxes.T.contiguous().T
    labels, _ = fuse(implementation, scene)
    assert (labels != expected).mean() <= 0.002
    assert prune(implementation, scene) == kept


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    scene = Scene(0, 5, dtype)
    instances = (scene.masks, scene.boxes, scene.classes)
    torch.library.opcheck(
        torch.ops.d2ext.prune_masks.default, (*instances, scene.scores, *SIZE, 0.3)
    )
    torch.library.opcheck(
        torch.ops.d2ext.fuse_panoptic.default,
        (scene.score, scene.boxes, scene.classes, scene.masks, *SIZE, STUFF, True),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(2, 4)}, "boxes"),
        ({"classes": torch.zeros(3)}, "classes"),
        ({"masks": torch.zeros(3, 6)}, "masks"),
        ({"masks": torch.zeros(3, 6, 6, dtype=torch.int64)}, "masks"),
        ({"score": torch.zeros(7, 5)}, "score"),
        ({"score": torch.zeros(STUFF, 5, 7)}, "num_stuff"),
    ],
)
def test_wrong_arguments(implementation: str, changes: dict[str, Tensor], message: str) -> None:
    scene = Scene(0, 3)
    for name, value in changes.items():
        setattr(scene, name, value)
    with pytest.raises(ValueError, match=message):
        fuse(implementation, scene)
    if "score" not in changes:
        with pytest.raises(ValueError, match=message):
            prune(implementation, scene)


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("cpu", marks=needs_extension)]
)
def test_wrong_classes_and_sizes(implementation: str) -> None:
    scene = Scene(0, 3)
    with pytest.raises(ValueError, match="size"):
        fuse(implementation, scene, size=(0, 5))
    scene.classes[1] = THINGS
    with pytest.raises(IndexError, match="classes"):
        fuse(implementation, scene)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fraction", [math.nan, math.inf, -0.1])
def test_a_fraction_that_is_none(implementation: str, fraction: float) -> None:
    with pytest.raises(ValueError, match="overlap_fraction"):
        prune(implementation, Scene(0, 3), fraction)
