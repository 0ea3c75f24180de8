"""Loaders: deterministic, resumable, and robust against single bad samples."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from d2ext.config import ConfigError
from d2ext.data.dataset_dicts import get_dataset_dicts
from d2ext.data.dataset_mapper import MAPPER_REGISTRY
from d2ext.data.errors import DatasetError, SampleError
from d2ext.data.sampler import (
    RepeatFactorStreamSampler,
    StreamSampler,
    sample_randomness,
    stream_seed,
)

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Record]


class BadSample(NamedTuple):
    """A sample that could not be used."""

    file_name: str
    reason: str


class StreamDataset(Dataset):
    """Maps (position, index) to a training sample; unusable ones are replaced by their successors.

    Which sample takes the place of a bad one depends on the data set alone, so the stream stays a
    function of (seed, position).
    """

    def __init__(
        self, records: Sequence[Record], mapper: Mapper, *, seed: int, max_bad: int, strict: bool
    ) -> None:
        """
        Args:
            records: data set dicts
            mapper: raises :class:`SampleError` for a dict that it cannot use
            seed: of the stream
            max_bad: how many bad samples in a row are replaced
            strict: raise for the first bad sample
        """
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self.max_bad = max_bad
        self.strict = strict

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Record, list[BadSample]]:
        """The sample at (position, index), and the bad ones that it replaces."""
        position, index = key
        bad: list[BadSample] = []
        while True:
            record = self.records[(index + len(bad)) % len(self.records)]
            try:
                with sample_randomness(self.seed, position):
                    return self.mapper(record), bad
            except SampleError as e:
                if self.strict:
                    raise
                bad.append(BadSample(record["file_name"], str(e)))
                if len(bad) > self.max_bad or len(bad) >= len(self.records):
                    raise DatasetError(
                        f"{len(bad)} samples in a row cannot be used; the last: {e} "
                        "Repair the data set. (INPUT.MAX_BAD_SAMPLES allows more.)"
                    ) from e


class InferenceDataset(Dataset):
    """Maps an index to a test sample, or to None if it cannot be used."""

    def __init__(self, records: Sequence[Record], mapper: Mapper, *, strict: bool) -> None:
        self.records = records
        self.mapper = mapper
        self.strict = strict

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Record | None, list[BadSample]]:
        record = self.records[index]
        try:
            return self.mapper(record), []
        except SampleError as e:
            if self.strict:
                raise
            return None, [BadSample(record["file_name"], str(e))]


class ReportingDataLoader(DataLoader):
    """A ``DataLoader`` of lists of samples that reports bad ones, each file once, in the main
    process. Batches of which nothing is left are skipped.

    Attributes:
        bad_samples: file name → :class:`BadSample`, all that have come up so far
    """

    def __init__(self, dataset: Dataset, **kwargs: Any) -> None:
        """Arguments of ``DataLoader``; the data set gives pairs (sample or None, bad samples)."""
        self.bad_samples: dict[str, BadSample] = {}
        super().__init__(dataset, collate_fn=_collate, worker_init_fn=_init_worker, **kwargs)

    def __iter__(self) -> Iterator[list[Record]]:
        for batch, bad in super().__iter__():
            for sample in bad:
                if sample.file_name not in self.bad_samples:
                    self.bad_samples[sample.file_name] = sample
                    logger.error(f"Sample left out: {sample.reason}")
            if batch:
                yield batch


def _collate(
    items: list[tuple[Record | None, list[BadSample]]],
) -> tuple[list[Record], list[BadSample]]:
    batch = [sample for sample, _ in items if sample is not None]
    return batch, [one for _, bad in items for one in bad]


def _init_worker(worker_id: int) -> None:
    """One thread per worker: parallelism comes from the number of workers.

    What a forked worker inherits is the parent's to tidy up: an earlier loader's iterator among it
    would try to end workers that are not this process's, and print a traceback.
    """
    gc.freeze()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def build_mapper(cfg: CfgNode, *, is_train: bool) -> Mapper:
    """What ``INPUT.MAPPER`` names in ``MAPPER_REGISTRY``.

    Raises:
        ConfigError: it names none.
    """
    if cfg.INPUT.MAPPER not in MAPPER_REGISTRY:
        raise ConfigError(
            f"INPUT.MAPPER is {cfg.INPUT.MAPPER!r}; known are "
            f"{', '.join(sorted(name for name, _ in MAPPER_REGISTRY))}."
        )
    return MAPPER_REGISTRY.get(cfg.INPUT.MAPPER)(cfg, is_train)


def _samples(mapper: Mapper, records: list[Record], names: Sequence[str]) -> list[Record]:
    expand = getattr(mapper, "samples", None)
    return records if expand is None else expand(records, names)


def build_train_loader(
    cfg: CfgNode, *, start_iter: int = 0, mapper: Mapper | None = None
) -> ReportingDataLoader:
    """An endless loader of training batches.

    The stream of samples, random numbers included, depends on ``cfg.SEED`` and the data alone: not
    on ``cfg.DATALOADER.NUM_WORKERS``, not on the number of processes, not on interruptions. Rank r
    of w processes gets every w-th sample of each batch of ``cfg.SOLVER.IMS_PER_BATCH``.
    Images are not grouped by aspect ratio (``cfg.DATALOADER.ASPECT_RATIO_GROUPING`` has no effect):
    groups would depend on what came before and so could not be resumed.

    Args:
        cfg: reads ``DATASETS``, ``DATALOADER``, ``INPUT``, ``SEED``, ``SOLVER.IMS_PER_BATCH``
        start_iter: iterations already done; the stream starts at start_iter × IMS_PER_BATCH
        mapper: defaults to what ``INPUT.MAPPER`` names in ``MAPPER_REGISTRY``

    Returns:
        loader of lists of ``IMS_PER_BATCH / number of processes`` model inputs

    Raises:
        DatasetError: the data cannot be used
        ValueError: the batch cannot be split evenly, or an unknown sampler
    """
    batch_size, world_size = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}; it must be a positive multiple of the number "
            f"of processes, {world_size}."
        )
    records = get_dataset_dicts(cfg, cfg.DATASETS.TRAIN, is_train=True)
    mapper = mapper or build_mapper(cfg, is_train=True)
    records = _samples(mapper, records, cfg.DATASETS.TRAIN)
    dataset = StreamDataset(
        DatasetFromList(records, copy=False),
        mapper,
        seed=stream_seed(cfg),
        max_bad=cfg.INPUT.MAX_BAD_SAMPLES,
        strict=cfg.INPUT.STRICT,
    )
    return ReportingDataLoader(
        dataset,
        batch_size=batch_size // world_size,
        sampler=_build_sampler(cfg, records, start_iter * batch_size),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _build_sampler(cfg: CfgNode, records: list[Record], start: int) -> StreamSampler:
    name, seed = cfg.DATALOADER.SAMPLER_TRAIN, stream_seed(cfg)
    if name == "TrainingSampler":
        return StreamSampler(len(records), seed=seed, start=start)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorStreamSampler(factors, seed=seed, start=start)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is '{name}'; d2ext's resumable loader has TrainingSampler and "
        "RepeatFactorTrainingSampler."
    )


def build_test_loader(
    cfg: CfgNode, dataset_name: str, *, mapper: Mapper | None = None
) -> ReportingDataLoader:
    """A loader of the images of one data set, in order, one per batch, split over the processes.

    An unusable image is reported and left out unless ``cfg.INPUT.STRICT``; evaluators then count it
    as an image without detections.

    Raises:
        DatasetError: unregistered or empty data set
    """
    records = get_dataset_dicts(cfg, [dataset_name], is_train=False)
    mapper = mapper or build_mapper(cfg, is_train=False)
    records = _samples(mapper, records, [dataset_name])
    dataset = InferenceDataset(
        DatasetFromList(records, copy=False), mapper, strict=cfg.INPUT.STRICT
    )
    return ReportingDataLoader(
        dataset,
        batch_size=1,
        sampler=InferenceSampler(len(dataset)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
