"""The training stream: which image comes at which position, and its random numbers, as functions of
(seed, position) alone.

So neither the number of processes nor that of loader workers changes what is trained on, and a run
that is resumed continues as if it had not stopped.
"""

import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import Sampler

# The seed of the stream when cfg.SEED is negative (Detectron2: "not deterministic"). Resuming needs
# a seed that is the same in every run.
DEFAULT_SEED = 0

# Keep the numbers that shuffle apart from those that augment.
_SHUFFLE, _SAMPLE = 0, 1


def stream_seed(cfg: CfgNode) -> int:
    """The stream's seed: ``cfg.SEED``, or :data:`DEFAULT_SEED` if that is negative."""
    return cfg.SEED if cfg.SEED >= 0 else DEFAULT_SEED


@contextmanager
def sample_randomness(seed: int, position: int) -> Iterator[None]:
    """Inside, ``random``, ``numpy.random`` and torch (CPU) are seeded from (seed, position).

    Their previous states come back afterwards, so a loader that works in the main process does not
    disturb the model's random numbers.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed, _SAMPLE, position]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class StreamSampler(Sampler[tuple[int, int]]):
    """Endless (position, index) pairs; every epoch is a permutation of the data set.

    Position p belongs to epoch p // size. Process r of w takes the positions start + r,
    start + r + w, ....
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """
        Args:
            size: number of images, > 0
            seed: ≥ 0
            start: first position, ≥ 0: the number of samples already trained on by all processes
            rank, world_size: default to those of ``detectron2.utils.comm``
        """
        if size <= 0:
            raise ValueError(f"The data set must have at least one image, got {size}.")
        if seed < 0 or start < 0:
            raise ValueError(f"Seed and start must not be negative, got {seed} and {start}.")
        self.size = size
        self.seed = seed
        self.start = start
        self.rank = comm.get_rank() if rank is None else rank
        self.world_size = comm.get_world_size() if world_size is None else world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start + self.rank
        epoch, begin, order = self._locate(position, -1, 0, np.zeros(0, dtype=np.int64))
        while True:
            epoch, begin, order = self._locate(position, epoch, begin, order)
            yield position, int(order[position - begin])
            position += self.world_size

    def _locate(
        self, position: int, epoch: int, begin: int, order: np.ndarray
    ) -> tuple[int, int, np.ndarray]:
        """The epoch that holds ``position``, its first position, and its indices in order.

        ``epoch``, ``begin``, ``order`` are those of an earlier position.
        """
        if epoch >= 0 and position < begin + len(order):
            return epoch, begin, order
        epoch = position // self.size
        return epoch, epoch * self.size, self._rng(epoch).permutation(self.size)

    def _rng(self, epoch: int) -> np.random.RandomState:
        # RandomState's streams are frozen across NumPy versions; those of Generator are not.
        seeds = np.random.SeedSequence([self.seed, _SHUFFLE, epoch])
        return np.random.RandomState(np.random.MT19937(seeds))


class VideoSampler(Sampler[int]):
    """The frames of one process's videos, in order: whole videos, next to each other in the data set.

    A video belongs to the process in whose share of all frames its middle lies, so that the numbers of
    frames differ by a video's length at most.
    """

    def __init__(
        self,
        video_ids: Sequence[Hashable],
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """
        Args:
            video_ids: of all frames in order
            rank, world_size: default to those of ``detectron2.utils.comm``
        """
        rank = comm.get_rank() if rank is None else rank
        world_size = comm.get_world_size() if world_size is None else world_size
        starts = [i for i, v in enumerate(video_ids) if i == 0 or v != video_ids[i - 1]]
        ends = [*starts[1:], len(video_ids)]
        self.indices = [
            i
            for start, end in zip(starts, ends, strict=True)
            if (start + end) * world_size // (2 * len(video_ids)) == rank
            for i in range(start, end)
        ]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class RepeatFactorStreamSampler(StreamSampler):
    """A :class:`StreamSampler` in which images of rare classes come several times per epoch.

    Fractional factors (Gupta et al., LVIS, arXiv 1908.03195) are rounded at random in every epoch,
    so epochs differ in length.
    """

    def __init__(self, repeat_factors: torch.Tensor, **kwargs: int) -> None:
        """
        Args:
            repeat_factors: (number of images,) float, ≥ 0; Detectron2's
                ``RepeatFactorTrainingSampler.repeat_factors_from_category_frequency`` gives them
            kwargs: of :class:`StreamSampler`, without ``size``
        """
        factors = repeat_factors.double().numpy()
        if factors.sum() < 1:
            raise ValueError("The repeat factors must give at least one image per epoch.")
        super().__init__(len(factors), **kwargs)
        self._whole = np.floor(factors).astype(np.int64)
        self._fraction = factors - self._whole

    def _locate(
        self, position: int, epoch: int, begin: int, order: np.ndarray
    ) -> tuple[int, int, np.ndarray]:
        # Lengths of earlier epochs are known only by drawing them: cheap, also for many epochs.
        while epoch < 0 or position >= begin + len(order):
            begin, epoch = begin + len(order), epoch + 1
            rng = self._rng(epoch)
            repeats = self._whole + (rng.uniform(size=self.size) < self._fraction)
            order = rng.permutation(np.repeat(np.arange(self.size), repeats))
        return epoch, begin, order
