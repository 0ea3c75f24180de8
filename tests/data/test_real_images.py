"""The whole data path on real images: every one goes through, with sound annotations."""

import itertools
from collections import Counter

import pytest
import torch

from d2ext.config import get_cfg
from d2ext.data import build_test_loader, build_train_loader
from d2ext.data.custom import check_config_against_data, register_own_dataset

pytestmark = pytest.mark.real_data


def make_cfg(real_coco, name="ssd"):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.AUGMENTATION.NAME = name
    cfg.INPUT.STRICT = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 7
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_one_epoch_of_the_published_recipe(real_coco):
    cfg = make_cfg(real_coco)
    ids, crowds = [], 0
    for batch in itertools.islice(build_train_loader(cfg), 14):
        for sample in batch:
            ids.append(sample["image_id"])
            instances = sample["instances"]
            crowds += len(sample["crowd_instances"])
            assert sample["image"].shape == (3, 550, 550)
            assert torch.isfinite(sample["image"]).all()
            boxes = instances.gt_boxes.tensor
            assert (boxes >= 0).all() and (boxes <= 550).all()
            tight = instances.gt_masks.get_bounding_boxes().tensor
            # Masks lie in their boxes: up to pixels that the border only touches.
            assert (tight[:, :2] >= boxes[:, :2] - 2).all()
            assert (tight[:, 2:] <= boxes[:, 2:] + 2).all()
            assert instances.gt_masks.nonempty().all()
    # 100 images, of which 2 have no annotation; each once.
    assert len(set(ids)) == 98 and set(Counter(ids).values()) == {1}
    assert crowds > 0


def test_all_validation_images(real_coco):
    cfg = make_cfg(real_coco)
    sizes = [
        (s["image"].shape[1:], (s["height"], s["width"]))
        for (s,) in build_test_loader(cfg, "coco_2017_val")
    ]
    assert len(sizes) == 50 and all(tuple(a) == b for a, b in sizes)


def test_semantic_labels(real_coco):
    cfg = make_cfg(real_coco)
    cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_separated",)
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    for sample in batch:
        assert sample["sem_seg"].shape == (550, 550)
        things = torch.zeros(550, 550, dtype=torch.bool)
        for mask in sample["instances"].gt_masks.tensor:
            things |= mask
        # Thing pixels have semantic label 0, up to polygons and resampling along borders.
        inside = sample["sem_seg"][things]
        assert (inside == 0).float().mean() > 0.85


def test_as_own_data(real_coco):
    name = "test_real_images_own"
    register_own_dataset(
        name,
        str(real_coco / "annotations/instances_train2017.json"),
        str(real_coco / "train2017"),
        str(real_coco / "annotations/instances_val2017.json"),
        str(real_coco / "val2017"),
    )
    cfg = make_cfg(real_coco)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{name}_train",), (f"{name}_val",)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    check_config_against_data(cfg)
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    assert len(batch) == 7
