"""The stream is a function of (seed, position)."""

import itertools
import random

import numpy as np
import pytest
import torch

from d2ext.config import get_cfg
from d2ext.data.sampler import (
    RepeatFactorStreamSampler,
    StreamSampler,
    VideoSampler,
    sample_randomness,
    stream_seed,
)


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def plain(**kwargs):
    return StreamSampler(7, **{"seed": 3, "rank": 0, "world_size": 1, **kwargs})


def repeated(**kwargs):
    factors = torch.tensor([1.0, 2.5, 0.3, 1.0])
    return RepeatFactorStreamSampler(factors, **{"seed": 3, "rank": 0, "world_size": 1, **kwargs})


def test_epochs_are_different_permutations():
    stream = take(plain(), 70)
    assert [position for position, _ in stream] == list(range(70))
    epochs = [[index for _, index in stream[i : i + 7]] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 7


@pytest.mark.parametrize("make", [plain, repeated])
def test_seed_decides(make):
    assert take(make(), 50) == take(make(), 50)
    assert take(make(), 50) != take(make(seed=4), 50)


@pytest.mark.parametrize("make", [plain, repeated])
@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 100])
def test_resumes_exactly(make, start):
    assert take(make(start=start), 30) == take(make(), start + 30)[start:]


@pytest.mark.parametrize("make", [plain, repeated])
@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_processes_share_one_stream(make, world_size):
    whole = take(make(start=5), 12 * world_size)
    parts = [take(make(start=5, rank=r, world_size=world_size), 12) for r in range(world_size)]
    interleaved = [item for group in zip(*parts, strict=True) for item in group]
    assert interleaved == whole


def test_repeat_factors_are_met_on_average():
    # 4.8 per epoch on average; 4800 samples are about 1000 epochs.
    counts = np.bincount([index for _, index in take(repeated(), 4800)], minlength=4)
    np.testing.assert_allclose(counts / 1000, [1, 2.5, 0.3, 1], rtol=0.1)


def test_stream_of_the_current_numpy_is_the_frozen_one():
    # Pins the shuffle, so that a run resumed after an upgrade of NumPy sees the same order.
    assert [index for _, index in take(plain(), 7)] == [1, 0, 2, 6, 5, 3, 4]


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one image"):
        StreamSampler(0, seed=0)
    with pytest.raises(ValueError, match="negative"):
        StreamSampler(1, seed=-1)
    with pytest.raises(ValueError, match="at least one image"):
        RepeatFactorStreamSampler(torch.tensor([0.2, 0.2]), seed=0)


def draw():
    return random.random(), np.random.uniform(), torch.rand(1).item()


def test_sample_randomness_depends_on_seed_and_position():
    def within(seed, position):
        with sample_randomness(seed, position):
            return draw()

    assert within(1, 2) == within(1, 2)
    results = [within(seed, position) for seed in range(3) for position in range(100)]
    for kind in zip(*results, strict=True):
        assert len(set(kind)) == 300


def test_sample_randomness_gives_the_old_state_back():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [draw(), draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = draw()
    with pytest.raises(RuntimeError), sample_randomness(5, 5):
        draw()
        raise RuntimeError
    assert [first, draw()] == expected


def test_negative_seed_is_a_fixed_one():
    cfg = get_cfg()
    assert cfg.SEED < 0 and stream_seed(cfg) == 0
    cfg.SEED = 17
    assert stream_seed(cfg) == 17


@pytest.mark.parametrize("lengths", [[5], [3, 4, 2, 6, 1], [1] * 7, [2, 90, 2, 2]])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_process_gets_whole_videos(lengths, world_size):
    video_ids = [f"v{i}" for i, length in enumerate(lengths) for _ in range(length)]
    parts = [
        list(VideoSampler(video_ids, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert [i for part in parts for i in part] == list(range(len(video_ids)))
    owners = [{video_ids[i] for i in part} for part in parts]
    assert sum(map(len, owners)) == len(lengths)
    even = len(video_ids) / world_size
    assert all(abs(len(part) - even) <= max(lengths) for part in parts)
