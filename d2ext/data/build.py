"""Loaders: deterministic, resumable, and robust against single bad samples."""

import gc
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from d2ext.config import ConfigError
from d2ext.data.coco_json import TOLERATED_MISSING
from d2ext.data.dataset_dicts import check_same_classes, get_dataset_dicts
from d2ext.data.dataset_facts import dataset_facts
from d2ext.data.dataset_mapper import MAPPER_REGISTRY, D2extDatasetMapper
from d2ext.data.errors import DataError, DatasetError, SampleError, shorten
from d2ext.data.sampler import (
    RepeatFactorStreamSampler,
    StreamSampler,
    VideoSampler,
    sample_randomness,
    stream_seed,
)
from d2ext.utils.parent import end_with_parent

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Record]

# A run ends when more of its samples than this cannot be used, if they are more than
# INPUT.MAX_BAD_SAMPLES, too: the share of images that may be missing when data are registered.
TOLERATED_BAD = TOLERATED_MISSING
# What libraries raise for a sample that they cannot take.
_LIBRARY_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError, cv2.error),
)


class BadSample(NamedTuple):
    """A sample that could not be used."""

    file_name: str
    reason: str


def _map(mapper: Mapper, record: Record) -> Record:
    """What the mapper makes of a dict. The one place where errors of libraries about a sample
    (pycocotools, NumPy, OpenCV, torch) become a :class:`SampleError` with file and annotation."""
    try:
        return mapper(record)
    except DataError:
        raise
    except _LIBRARY_ERRORS as e:
        where = f"Sample '{record['file_name']}'"
        failing = _failing_annotation(mapper, record)
        if failing is not None:
            where += f", annotation {failing.get('id', record['annotations'].index(failing))}"
        raise SampleError(f"{where} cannot be used: {type(e).__name__}: {e}") from e


def _failing_annotation(mapper: Mapper, record: Record) -> Record | None:
    """The annotation with which alone the mapper fails, too."""
    for annotation in record.get("annotations", ()):
        try:
            mapper({**record, "annotations": [annotation]})
        except _LIBRARY_ERRORS:
            return annotation
    return None


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
                    return _map(self.mapper, record), bad
            except SampleError as e:
                if self.strict:
                    raise
                bad.append(BadSample(e.file_name or record["file_name"], str(e)))
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
            return _map(self.mapper, record), []
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

    def __init__(self, dataset: Dataset, *, max_bad: float = math.inf, **kwargs: Any) -> None:
        """
        Args:
            dataset: gives pairs (sample or None, bad samples)
            max_bad: more bad files are a :class:`DatasetError`
            kwargs: of ``DataLoader``
        """
        self.bad_samples: dict[str, BadSample] = {}
        self.max_bad = max_bad
        super().__init__(dataset, collate_fn=_collate, worker_init_fn=_init_worker, **kwargs)

    def __iter__(self) -> Iterator[list[Record]]:
        for batch, bad in super().__iter__():
            for sample in bad:
                if sample.file_name not in self.bad_samples:
                    self.bad_samples[sample.file_name] = sample
                    logger.error(f"Sample left out: {sample.reason}")
            if len(self.bad_samples) > self.max_bad:
                raise DatasetError(
                    f"Samples of {len(self.bad_samples)} files cannot be used: "
                    f"{shorten(list(self.bad_samples))}. That is more than INPUT.MAX_BAD_SAMPLES and "
                    f"more than {100 * TOLERATED_BAD:g} % of the {len(self.dataset)} samples. Repair "
                    "the data set; the log has each reason."
                )
            if batch:
                yield batch


class TestDataLoader(ReportingDataLoader):
    """One that says at its end how many images were evaluated, over all processes."""

    __test__ = False  # no test, whatever pytest thinks of the name

    def __iter__(self) -> Iterator[list[Record]]:
        used = 0
        video: Any = None
        for batch in super().__iter__():
            used += len(batch)
            for sample in batch:
                if "is_first" in sample:  # of a video, whose first frame may have been left out
                    sample["is_first"] = sample["is_first"] or sample["video_id"] != video
                    video = sample["video_id"]
            yield batch
        bad = list(self.bad_samples.values())
        gathered = comm.all_gather((used, bad))
        used, bad = sum(n for n, _ in gathered), [sample for _, b in gathered for sample in b]
        if not used:
            raise DatasetError(
                f"None of {len(bad)} images could be read, so nothing was evaluated; the first: "
                f"{bad[0].reason}"
            )
        text = f"{used} of {used + len(bad)} images were evaluated."
        if bad:
            logger.warning(f"{text} The others have no predictions.")
        else:
            logger.info(text)


def _collate(
    items: list[tuple[Record | None, list[BadSample]]],
) -> tuple[list[Record], list[BadSample]]:
    batch = [sample for sample, _ in items if sample is not None]
    return batch, [one for _, bad in items for one in bad]


def _init_worker(worker_id: int) -> None:
    """One thread per worker: parallelism comes from the number of workers. It ends with its trainer.
    Ctrl-C reaches both, and the trainer may still need it for its iteration.

    What a forked worker inherits is the parent's to tidy up: an earlier loader's iterator among it
    would try to end workers that are not this process's, and print a traceback.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_in_worker
    gc.freeze()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _report_in_worker(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What the thread that hands tensors to the trainer reports: that the trainer went away in the
    middle of fetching one is no news, since then all end; samples' errors take another way."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


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


class JointDataLoader:
    """Two endless loaders of equal batches side by side.

    Samples alternate, so that equal parts of a batch hold equally many of both; those of the second
    loader have ``joint: True``.
    """

    def __init__(self, own: ReportingDataLoader, joint: ReportingDataLoader) -> None:
        self.own, self.joint, self.dataset = own, joint, own.dataset

    def __iter__(self) -> Iterator[list[Record]]:
        for own, joint in zip(self.own, self.joint, strict=False):
            yield [x for a, b in zip(joint, own, strict=True) for x in ({**a, "joint": True}, b)]


def build_train_loader(
    cfg: CfgNode, *, start_iter: int = 0, mapper: Mapper | None = None
) -> ReportingDataLoader | JointDataLoader:
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
        loader of lists of ``IMS_PER_BATCH / number of processes`` model inputs; with
        ``DATASETS.TRAIN_JOINT`` of as many of these, too

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
    mapper = mapper or build_mapper(cfg, is_train=True)
    _warn_without_mirrors(cfg)
    loader = _train_loader(cfg, cfg.DATASETS.TRAIN, mapper, start_iter)
    if not cfg.DATASETS.TRAIN_JOINT:
        return loader
    check_same_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TRAIN_JOINT))
    images = D2extDatasetMapper(cfg, is_train=True)
    return JointDataLoader(loader, _train_loader(cfg, cfg.DATASETS.TRAIN_JOINT, images, start_iter))


def _train_loader(
    cfg: CfgNode, names: Sequence[str], mapper: Mapper, start_iter: int
) -> ReportingDataLoader:
    """The stream of some data sets."""
    batch_size, world_size = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    records = get_dataset_dicts(cfg, names, is_train=True)
    records = _samples(mapper, records, names)
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
        max_bad=max(cfg.INPUT.MAX_BAD_SAMPLES, TOLERATED_BAD * len(records)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _warn_without_mirrors(cfg: CfgNode) -> None:
    """Say so where keypoints are trained on mirrored images and none of them changes places."""
    landmarks = cfg.INPUT.MAPPER == "build_top_down_mapper"
    if landmarks:
        recipe = cfg.INPUT.LANDMARKS.RECIPE
        mirrors = recipe == "hourglass" or (recipe != "none" and cfg.INPUT.LANDMARKS.FLIP_PROB > 0)
        key = "INPUT.LANDMARKS.FLIP_PROB 0"
    elif cfg.INPUT.AUGMENTATION.NAME == "default":
        mirrors, key = cfg.INPUT.RANDOM_FLIP == "horizontal", "INPUT.RANDOM_FLIP none"
    else:
        mirrors = cfg.INPUT.AUGMENTATION.NAME != "none" and cfg.INPUT.AUGMENTATION.FLIP_PROB > 0
        key = "INPUT.AUGMENTATION.FLIP_PROB 0"
    if not mirrors or not (landmarks or cfg.MODEL.KEYPOINT_ON):
        return
    for name in cfg.DATASETS.TRAIN:
        facts = dataset_facts(name)
        if facts.keypoints and len(facts.keypoints) > 1 and not facts.flip_pairs:
            logger.warning(
                f"Images of '{name}' are mirrored, but none of its keypoints "
                f"({shorten(facts.keypoints)}) is known to change places with another. If some do, "
                "name them by left_ and right_ or give 'flip_pairs' in the category; or set "
                f"{key}."
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
) -> TestDataLoader:
    """A loader of the images of one data set, in order, one per batch, split over the processes.

    Of videos, each process gets whole ones; frames carry ``video_id``, ``frame`` and ``is_first``, which
    is True for the first frame of a video that can be used.

    An unusable image is reported and left out unless ``cfg.INPUT.STRICT``; evaluators then count it
    as an image without detections.

    Raises:
        DatasetError: unregistered or empty data set; at the end of the loader, no image was usable
    """
    records = get_dataset_dicts(cfg, [dataset_name], is_train=False)
    mapper = mapper or build_mapper(cfg, is_train=False)
    records = _samples(mapper, records, [dataset_name])
    dataset = InferenceDataset(
        DatasetFromList(records, copy=False), mapper, strict=cfg.INPUT.STRICT
    )
    return TestDataLoader(
        dataset,
        batch_size=1,
        sampler=VideoSampler([r["video_id"] for r in records])
        if "is_first" in records[0]
        else InferenceSampler(len(dataset)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
