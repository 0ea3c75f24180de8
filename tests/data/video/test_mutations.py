"""Property: a file of videos that is wrong somewhere is understood, or refused with one error.

As :mod:`tests.data.test_mutations`, whose changes these are: through registration, the loaders' checks,
and the mapper of pairs on every annotated frame.
"""

import copy
import json
import logging
import os
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.config import ConfigError, get_cfg
from d2ext.data import build_test_loader, custom, get_dataset_dicts
from d2ext.data.build import build_mapper
from d2ext.data.errors import DataError
from d2ext.data.video.records import flatten
from tests.data.test_mutations import mutate
from tests.data.video.test_panoptic_video import clips, write_clips
from tests.data.video.test_readers import coco, polygon_of, rle_of, write_frames, ytvis

CASES = int(os.environ.get("D2EXT_MUTATIONS", "600")) // 8


def coco_with_masks():
    content = coco(track_id=8)
    masks = rle_of(2, 3, 8, 6), polygon_of(20, 10, 6, 6)
    for annotation, mask in zip(content["annotations"], masks, strict=True):
        annotation["segmentation"] = mask
        annotation["iscrowd"] = 0
    return content


KINDS = {"ytvis": ytvis, "coco": coco_with_masks, "panoptic": clips}


def configure():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "YOLACT"
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MAPPER = "ClipMapper"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.AUGMENTATION.NAME = "ssd"
    cfg.INPUT.AUGMENTATION.SIZE = 32
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-2, 2]
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def run(folder, content, name):
    """Number of samples."""
    path = folder / "videos.json"
    path.write_text(json.dumps(content))
    try:
        custom.register_own_dataset(name, train_video_json=str(path), train_images=str(folder))
        cfg = configure()
        custom.apply_dataset_to_config(cfg, name)
        cfg.INPUT.MASK_FORMAT = "bitmask"
        (dataset,) = cfg.DATASETS.TRAIN
        frames = flatten(DatasetCatalog.get(dataset))
        tested = sum(len(batch) for batch in build_test_loader(cfg, dataset))
        assert 0 < tested <= len(frames)
        records = get_dataset_dicts(cfg, [dataset], is_train=True)
        mapper = build_mapper(cfg, is_train=True)
        count = 0
        for record in mapper.samples(records, [dataset]):
            sample = mapper(record)
            for one in (sample, sample["reference"]):
                if "instances" in one:
                    assert len(one["instances"].gt_ids) == len(one["instances"])
                    assert one["instances"].gt_ids.dtype == torch.int64
            assert sample["reference"]["image"].shape == sample["image"].shape
            count += 1
        return count
    finally:
        custom._registered.pop(name, None)
        if f"{name}_train" in DatasetCatalog.list():
            DatasetCatalog.remove(f"{name}_train")
        MetadataCatalog.pop(f"{name}_train", None)


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind, tmp_path, monkeypatch):
    if kind == "panoptic":
        monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
        write_clips(tmp_path, clips())
    else:
        write_frames(tmp_path, [*(f"a/{i}.jpg" for i in range(11)), "b/0.jpg", "b/1.jpg"])
    samples = {"ytvis": 3, "coco": 2, "panoptic": 4}[kind]
    logging.disable(logging.CRITICAL)
    refused, wrong = 0, []
    only = os.environ.get("D2EXT_MUTATION")
    try:
        assert run(tmp_path, KINDS[kind](), "unchanged") == samples
        for number in range(CASES) if only is None else [int(only)]:
            content = copy.deepcopy(KINDS[kind]())
            done = mutate(content, random.Random(f"{kind}{number}"))
            np.random.seed(number)
            try:
                run(tmp_path, content, f"mutated_videos_{number}")
            except (DataError, ConfigError):
                refused += 1
            except Exception as error:
                if only is not None:
                    raise
                wrong.append(f"{number} ({'; '.join(done)}): {type(error).__name__}: {error}")
    finally:
        logging.disable(logging.NOTSET)
    assert not wrong, f"{len(wrong)} cases are wrong:\n" + "\n".join(wrong[:40])
    most = 0.98 if kind == "panoptic" else 0.9  # PNGs and file must agree
    assert only is not None or 0.15 < refused / CASES < most
