"""Samples that are two frames under one augmentation: clips for pair models, pairs with optical flow."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList
from fvcore.transforms.transform import Transform

from d2ext.config import ConfigError
from d2ext.data.dataset_dicts import load_dataset
from d2ext.data.dataset_mapper import MAPPER_REGISTRY, D2extDatasetMapper
from d2ext.data.errors import AnnotationError, DatasetError, SampleError
from d2ext.data.video.flow import read_flow, transform_flow
from d2ext.data.video.records import flatten, is_video

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class PairMapper(D2extDatasetMapper):
    """A :class:`D2extDatasetMapper` of two images, both transformed by what is drawn for the first."""

    def pair(self, target: Record, reference: Record | None, flow: np.ndarray | None) -> Record:
        """
        Args:
            target, reference: data set dicts; None: the target is its own reference
            flow: (H, W, 2) from target to reference, NaN where unknown; None: not wanted

        Returns:
            the target's sample with ``reference``, that of the other, and, if wanted, ``flow``
            (2, h, w) float32 in pixels of the sample's image and ``flow_valid`` (h, w) bool

        Raises:
            SampleError: either cannot be used, or their sizes differ
        """
        sample, transforms = self.map(target)
        if reference is None:
            sample["reference"] = dict(sample)
        else:
            # Reading checks that the reference has this size, too.
            reference = {**reference, "height": sample["height"], "width": sample["width"]}
            try:
                sample["reference"], _ = self.map(reference, transforms)
            except SampleError as e:
                e.file_name = reference["file_name"]  # which may be that of other samples, too
                raise
        if flow is not None:
            self.add_flow(sample, flow, transforms)
        return sample

    def add_flow(self, sample: Record, flow: np.ndarray, transforms: Transform) -> None:
        """Give a sample its ``flow`` and ``flow_valid``, see :meth:`pair`, in place."""
        if flow.shape[:2] != (sample["height"], sample["width"]):
            raise AnnotationError(
                f"The optical flow of '{sample['file_name']}' has height and width "
                f"{flow.shape[:2]}, the image {(sample['height'], sample['width'])}."
            )
        moved, valid = transform_flow(flow, transforms, *sample["image"].shape[1:])
        sample["flow"], sample["flow_valid"] = torch.from_numpy(moved), torch.from_numpy(valid)


@MAPPER_REGISTRY.register()
class ClipMapper(PairMapper):
    """Training samples of pair models: a target frame and an earlier or later one of its video.

    Beside what :class:`D2extDatasetMapper` gives, ``instances.gt_ids`` (int64, constant over the video),
    ``reference``, the other frame's sample (with ``instances`` if that frame is annotated), and with
    ``INPUT.VIDEO.FLOW`` the flow, see :meth:`PairMapper.pair`. The reference is uniform among the frames
    at ``INPUT.VIDEO.REFERENCE_OFFSETS`` that the video has in the target's size; where it has none, it
    is the one nearest to them, or the target itself. An image is a video of one frame.

    With ``INPUT.VIDEO.REFERENCES`` "annotated" the offsets count annotated frames, others are
    never taken, and the target is its own reference only where the offsets reach no other.

    In a test frames are single images, with ``INPUT.VIDEO.FLOW`` with the flow to the frame before (0 in
    the first) where the data set has it.
    """

    with_track_ids = True

    @configurable
    def __init__(
        self,
        *args: Any,
        reference_offsets: Sequence[int] = (-5, -2),
        references: str = "any",
        flow: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: of :class:`D2extDatasetMapper`
            reference_offsets: smallest and largest offset of the reference's number to the target's
            references: "any" frame, or only "annotated" ones
            flow: give the optical flow
        """
        super().__init__(*args, **kwargs)
        low, high = reference_offsets
        if low > high:
            raise ConfigError(
                f"INPUT.VIDEO.REFERENCE_OFFSETS is [{low}, {high}]: the smaller one goes first."
            )
        if references not in ("any", "annotated"):
            raise ConfigError(
                f"INPUT.VIDEO.REFERENCES is {references!r}; known are 'any' and 'annotated'."
            )
        self.reference_offsets = low, high
        self.annotated_references = references == "annotated"
        self.flow = flow
        self._frames: Sequence[Record] = []
        self._places: dict[tuple[str, int], int] = {}
        self._sizes: list[tuple[int, int]] = []
        self._videos = np.zeros(0, np.int64)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        video = cfg.INPUT.VIDEO
        return {
            **super().from_config(cfg, is_train),
            "reference_offsets": video.REFERENCE_OFFSETS,
            "references": video.REFERENCES,
            "flow": video.FLOW,
        }

    def samples(self, records: list[Record], dataset_names: Sequence[str]) -> list[Record]:
        """The dicts as they are; keeps the frames of the data sets' videos that references can be.

        They are serialised, and forked workers share them.
        """
        if self.is_train:
            loaded = [load_dataset(name) for name in dataset_names]
            frames = [frame for videos in loaded if is_video(videos) for frame in flatten(videos)]
            if self.flow and frames and not any("flow_file_name" in frame for frame in frames):
                raise DatasetError(
                    f"INPUT.VIDEO.FLOW is set, but no frame of {', '.join(dataset_names)} has optical "
                    "flow (flow_file_name)."
                )
            videos = np.cumsum([frame["is_first"] for frame in frames], dtype=np.int64)
            if self.annotated_references:
                keep = np.array(["annotations" in frame for frame in frames], bool)
                frames, videos = [f for f, k in zip(frames, keep, strict=True) if k], videos[keep]
            if len(np.unique(videos)) == len(videos):
                logger.warning(
                    f"No video of {', '.join(dataset_names)} has several frames that can be references: "
                    "each image is its own, so that nothing moves."
                )
            self._videos = videos  # number of each frame's video, ascending
            self._places = {(f["file_name"], f["frame"]): i for i, f in enumerate(frames)}
            self._sizes = [(f.get("height", 0), f.get("width", 0)) for f in frames]
            self._frames = DatasetFromList(frames, copy=False) if frames else []
        return records

    def __call__(self, dataset_dict: Record) -> Record:
        if not self.is_train:
            sample, transforms = self.map(dataset_dict)
            if self.flow and ("flow_file_name" in sample or self._is_first(sample)):
                before = None if self._is_first(sample) else {"frame": sample["frame"] - 1}
                self.add_flow(sample, self._read_flow(sample, before), transforms)
            return sample
        target = {"frame": 0, **dataset_dict}
        if "annotations" in target:  # those of an image have no track
            numbered = enumerate(target["annotations"])
            target["annotations"] = [{"track_id": i + 1, **a} for i, a in numbered]
        reference = self._draw_reference(target)
        flow = self._read_flow(target, reference) if self.flow else None
        return self.pair(target, reference, flow)

    @staticmethod
    def _is_first(frame: Record) -> bool:
        """Whether no frame is before it; an image is a video of one frame."""
        return not frame.get("frame")

    def _draw_reference(self, target: Record) -> Record | None:
        """The dict of another frame; None: the target is the reference."""
        place = self._places.get((target["file_name"], target["frame"]))
        if place is None or "video_length" not in target:  # an image, even if a video has it, too
            return None
        first, end = np.searchsorted(self._videos, self._videos[place] + np.array([0, 1])).tolist()
        low, high = (min(max(place + o, first), end - 1) for o in self.reference_offsets)
        candidates = [i for i in range(low, high + 1) if self._sizes[i] == self._sizes[place]]
        if self.annotated_references and candidates != [place]:
            candidates = [i for i in candidates if i != place]
        if not candidates:
            return None
        selected = candidates[np.random.randint(len(candidates))]
        return None if selected == place else self._frames[selected]

    def _read_flow(self, target: Record, reference: Record | None) -> np.ndarray:
        file_name = target.get("flow_file_name")
        if reference is not None and file_name is not None:
            return read_flow(file_name.format(frame=reference["frame"]))
        shape = target["height"], target["width"], 2
        return np.full(shape, 0 if reference is None else np.nan, np.float32)

    def _read_sem_seg(self, dataset_dict: Record) -> np.ndarray | None:
        if "is_first" in dataset_dict and "annotations" not in dataset_dict:
            return None  # a reference that is not annotated
        return super()._read_sem_seg(dataset_dict)


@MAPPER_REGISTRY.register()
class FlowPairMapper(PairMapper):
    """Samples of data sets of pairs: ``image``, ``reference`` (its ``image``), ``flow``, ``flow_valid``.

    Their dicts have ``file_name``, ``reference`` (``file_name``) and ``flow_file_name``, the flow from
    the image to the reference.
    """

    def __call__(self, dataset_dict: Record) -> Record:
        missing = {"reference", "flow_file_name"} - dataset_dict.keys()
        if missing:
            raise AnnotationError(
                f"'{dataset_dict['file_name']}' is of no pair with optical flow: it has no "
                f"{' and no '.join(sorted(missing))}."
            )
        flow = read_flow(dataset_dict["flow_file_name"])
        target = {k: v for k, v in dataset_dict.items() if k != "reference"}
        sample = self.pair(target, dataset_dict["reference"], flow)
        for x in (sample, sample["reference"]):
            if x["image"].is_floating_point():
                # The published code resizes these images as bytes (yolact_edge/NOTES.md §8).
                x["image"] = x["image"].round()
        return sample
