"""From a panoptic data set to UPSNet's targets: the two forms of its label maps agree."""

from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetCatalog

from d2ext import model_zoo
from d2ext.data import D2extDatasetMapper
from d2ext.data.dataset_facts import check_config_against_data
from d2ext.systems.upsnet.targets import read_targets

CONFIG = "upsnet/upsnet_shapes.yaml"


@pytest.mark.parametrize("flip", ["none", "horizontal"])
def test_full_and_separated_labels_agree(flip: str) -> None:
    cfg = model_zoo.get_config(CONFIG)
    cfg.INPUT.RANDOM_FLIP = flip
    cfg.DATALOADER.NUM_WORKERS = 0
    separated = cfg.clone()
    separated.INPUT.SEM_SEG_WITH_THINGS = False
    records = DatasetCatalog.get("shapes_val_panoptic")[:3]
    mappers = [D2extDatasetMapper(c, True) for c in (cfg, separated)]
    for mapper in mappers:
        mapper.augmentations.augs[-1].prob = 1.0 if flip == "horizontal" else 0.0
    for record in records:
        labels = []
        for mapper, with_things in zip(mappers, (True, False), strict=True):
            targets = read_targets(
                mapper(record), num_stuff=6, with_things=with_things, device=torch.device("cpu")
            )
            labels.append(targets.semantic)
            assert targets.pixel == 160 / 256
        full, made = labels
        assert full.shape == (160, 160)
        assert set(full.unique().tolist()) - {255} <= set(range(14))
        assert (full >= 6).logical_and(full < 14).any()
        # Polygons outline pixels that the map gives to a neighbour; crowds have no label in one.
        differing = (full != made) & (made != 255)
        assert differing.float().mean() < 0.01
        # Masks lie where the map has their class.
        for mask, kind in zip(targets.masks, targets.instances.gt_classes, strict=True):
            assert (full[mask] == 6 + kind).float().mean() > 0.5


def test_class_counts_are_checked() -> None:
    cfg = model_zoo.get_config(CONFIG)
    check_config_against_data(cfg)
    for key in ("MODEL.UPSNET.NUM_STUFF", "MODEL.ROI_HEADS.NUM_CLASSES"):
        wrong = cfg.clone()
        wrong.merge_from_list([key, 5])
        with pytest.raises(Exception, match=key):
            check_config_against_data(wrong)
