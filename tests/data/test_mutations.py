"""Property: a file that is wrong somewhere is understood, or refused with one error before training.

A valid file of instances, keypoints or panoptic annotations is changed at random places (drop, retype,
null, out of range, reorder) and taken through all that reads it: registration, the loader, the targets
of a tiny model, and evaluation on its own annotations, which must score 100. ``D2EXT_MUTATIONS`` sets
the number of cases, ``D2EXT_MUTATION`` runs a single one again by its number.
"""

import contextlib
import copy
import io
import json
import logging
import math
import os
import random
import time

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from d2ext.config import ConfigError
from d2ext.data import build_train_loader, custom
from d2ext.data.errors import DataError
from d2ext.data.panoptic import read_segments
from d2ext.evaluation import build_evaluator
from d2ext.testing import tiny_config
from tests.data.panoptic_files import id_to_rgb
from tests.data.scenes import write_image

CASES = int(os.environ.get("D2EXT_MUTATIONS", "600"))
SIZE = (24, 32)  # height, width
DROP = object()


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def images():
    return [
        {"id": 5 + i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]}
        for i in range(3)
    ]


def annotation(number, category, x, y, w, h, **others):
    return {
        "id": number,
        "image_id": 5 + number % 3,
        "category_id": category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        **others,
    }


def instances():
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[5:14, 4:20] = 1
    rle = {"size": [*SIZE], "counts": mask_util.encode(mask)["counts"].decode()}
    runs = [4 * 24 + 5, 9, *[15, 9] * 15, 24 * 32 - 19 * 24 - 14]
    assert sum(runs) == 24 * 32
    return {
        "info": {},
        "images": images(),
        "annotations": [
            annotation(1, 2, 3.5, 4, 12, 9, segmentation=rectangle(3.5, 4, 12, 9)),
            annotation(2, 7, 10, 2, 9, 18, segmentation=rectangle(10, 2, 9, 18)),
            annotation(3, 2, 4, 5, 16, 9, segmentation=rle),
            annotation(4, 7, 4, 5, 16, 9, segmentation={"size": [*SIZE], "counts": runs}),
            annotation(
                5, 7, 20, 8, 10, 10, iscrowd=1, segmentation={"size": [*SIZE], "counts": runs}
            ),
            annotation(
                6, 2, 2, 2, 20, 20, segmentation=rectangle(2, 2, 8, 8) + rectangle(12, 12, 10, 10)
            ),
        ],
        "categories": [{"id": 7, "name": "pear"}, {"id": 2, "name": "apple"}],
    }


def keypoints():
    points = [[8, 6, 2, 14, 6, 1, 11, 12, 2], [4, 4, 2, 0, 0, 0, 9, 9, 2]]
    return {
        "images": images(),
        "annotations": [
            annotation(i, 1, 2 + i, 3, 18, 14, keypoints=[*points[i % 2]], num_keypoints=3 - i % 2)
            for i in range(1, 6)
        ],
        "categories": [
            {
                "id": 1,
                "name": "fish",
                "keypoints": ["left_fin", "right_fin", "tail"],
                "skeleton": [[1, 3], [2, 3]],
                "flip_pairs": [[0, 1]],
                "sigmas": [0.05, 0.05, 0.1],
            }
        ],
    }


def panoptic_ids(i):
    ids = np.full(SIZE, 1, np.int64)
    ids[12:] = 70000
    ids[4:14, 3 : 15 + i] = 300
    ids[8:20, 20:30] = 301
    return ids


def panoptic():
    listed = [(1, 12), (70000, 40), (300, 7), (301, 3)]
    annotations = [
        {
            "image_id": 5 + i,
            "file_name": f"{i}.png",
            "segments_info": [
                {"id": s, "category_id": c, "iscrowd": 0, "area": int((panoptic_ids(i) == s).sum())}
                for s, c in listed
            ],
        }
        for i in range(3)
    ]
    categories = [
        {"id": 40, "name": "grass", "isthing": 0, "color": [0, 200, 0]},
        {"id": 7, "name": "pear", "isthing": 1, "color": [200, 200, 0]},
        {"id": 12, "name": "sky", "isthing": 0, "color": [0, 0, 200]},
        {"id": 3, "name": "apple", "isthing": 1, "color": [200, 0, 0]},
    ]
    return {"images": images(), "annotations": annotations, "categories": categories}


KINDS = {"instances": instances, "keypoints": keypoints, "panoptic": panoptic}
MODELS = {"instances": "YOLACT", "keypoints": "CenterNet", "panoptic": "UPSNet"}


def places(value, path=()):
    """Paths of all values in a JSON document; of long lists the first few."""
    for key in list(value) if isinstance(value, dict) else range(min(len(value), 8)):
        yield (*path, key)
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))


def retyped(value, rng):
    if isinstance(value, int | float) and rng.random() < 0.5 and math.isfinite(value):
        return rng.choice([str(value), float(value), value + 0.5, int(value), bool(value)])
    options = [str(value), [value], {"value": value}, True, "", [], {}, "x"]
    if isinstance(value, list) and value:
        options += [value[0], [[v] for v in value], dict(enumerate(map(str, value)))]
    return rng.choice(options)


def out_of_range(value, rng):
    if not isinstance(value, int | float):
        return rng.choice([None, -1, math.nan, "\ufeff", "a" * 300])
    return rng.choice(
        [-1, 0, 1, 2, 10**9, 1e30, -1e30, 10**30, math.nan, math.inf, -value, value * 1000, 2**63]
    )


def mutate(content, rng):
    """Change one to three places of a document in place; returns what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice(list(places(content)))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        value = parent[path[-1]]
        before = repr(value)[:80]
        how = rng.choice(["drop", "retype", "null", "range", "reorder"])
        if how == "reorder" and isinstance(value, list):
            rng.shuffle(value)
            new = value
        elif how == "drop":
            new = DROP
            del parent[path[-1]]
        else:
            new = {"null": lambda v, r: None, "range": out_of_range}.get(how, retyped)(value, rng)
            parent[path[-1]] = new
        shown = "dropped" if new is DROP else repr(new)[:80]
        done.append(f"{'.'.join(map(str, path))}: {before} -> {shown}")
    return done


def configure(kind):
    cfg = tiny_config(MODELS[kind])
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MASK_FORMAT = (32,), "bitmask"
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TRAIN = 40
    return cfg


class Runner:
    """Takes files of one kind through everything. Models are built once for each set of classes."""

    def __init__(self, folder, kind):
        self.folder, self.kind = folder, kind
        self.cfg = configure(kind)
        self.models = {}
        (folder / "images").mkdir()
        (folder / "panoptic").mkdir()
        rng = np.random.default_rng(0)
        for i in range(3):
            write_image(folder / f"images/{i}.png", rng.integers(0, 255, (*SIZE, 3), np.uint8))
            write_image(folder / f"panoptic/{i}.png", id_to_rgb(panoptic_ids(i)))

    def run(self, content, name, learn=False):
        """Scores of the annotations as predictions, by task; ``learn``: two steps of training, too."""
        path = self.folder / "panoptic.json"
        path.write_text(json.dumps(content))
        key = "panoptic_json" if self.kind == "panoptic" else "json"
        files = {f"{s}_{key}": str(path) for s in ("train", "val")}
        files |= {f"{s}_images": str(self.folder / "images") for s in ("train", "val")}
        try:
            custom.register_own_dataset(name, **files)
            cfg = self.cfg.clone()
            custom.apply_dataset_to_config(cfg, name)
            custom.check_config_against_data(cfg)
            self.train(cfg, learn)
            return self.evaluate(cfg, f"{name}_val")
        finally:
            custom._registered.pop(name, None)
            for split in ("train", "val"):
                if f"{name}_{split}" in DatasetCatalog.list():
                    DatasetCatalog.remove(f"{name}_{split}")
                MetadataCatalog.pop(f"{name}_{split}", None)

    def train(self, cfg, learn):
        architecture = cfg.MODEL[cfg.MODEL.META_ARCHITECTURE.upper()]
        key = (str(architecture), str(cfg.MODEL.ROI_HEADS), str(cfg.MODEL.ROI_KEYPOINT_HEAD))
        if key not in self.models:
            self.models[key] = build_model(cfg).train()
        model, batches = self.models[key], iter(build_train_loader(cfg))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4) if learn else None
        for _ in range(2):
            if optimizer is None:
                model.training_batch(next(batches))
                continue
            loss = sum(model(next(batches)).values())
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def evaluate(self, cfg, name):
        evaluator = build_evaluator(cfg, name, str(self.folder / "out"))
        evaluator.reset()
        self.empty_masks = False
        for record in DatasetCatalog.get(name):
            evaluator.process([record], [self.predictions(cfg, name, record)])
        results = evaluator.evaluate()
        if self.empty_masks:
            results.pop("segm", None)  # COCO counts an object whose polygon has no pixel as missed
        return {
            task: values["PQ" if task == "panoptic_seg" else "AP"]
            for task, values in results.items()
            if task in ("bbox", "segm", "keypoints", "panoptic_seg")
        }

    def predictions(self, cfg, name, record):
        """The annotations of an image as a model would give them."""
        size = (record["height"], record["width"])
        result = Instances(size)
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        result.pred_boxes = Boxes(boxes.float())
        result.scores = torch.linspace(0.99, 0.9, len(annotations))
        result.pred_classes = torch.tensor(
            [a["category_id"] for a in annotations], dtype=torch.int64
        )
        if cfg.MODEL.KEYPOINT_ON:
            count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
            # A person without points is ignored, and what is predicted near them is.
            points = [
                a.get("keypoints") or [x + w / 2, y + h / 2, 1] * count
                for a in annotations
                for x, y, w, h in [a["bbox"]]
            ]
            result.pred_keypoints = torch.tensor(points, dtype=torch.float32).reshape(-1, count, 3)
        else:
            masks = [
                decode(a.get("segmentation") or rectangle(*a["bbox"]), *size) for a in annotations
            ]
            result.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *size))
            self.empty_masks |= not bool(result.pred_masks.flatten(1).any(dim=1).all())
        output = {"instances": result}
        if self.kind == "panoptic":
            places_ = read_segments(record["pan_seg_file_name"], record["segments_info"])
            infos = [{**s, "id": i + 1} for i, s in enumerate(record["segments_info"])]
            output["panoptic_seg"] = (torch.from_numpy(places_.astype(np.int64)), infos)
        return output


def decode(segmentation, height, width):
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(
        mask_util.merge(segmentation) if isinstance(segmentation, list) else segmentation
    )


def is_right(scores):
    """100 for all that can be scored. COCO's AP is -1 or NaN where nothing is annotated."""
    return all(math.isnan(v) or v == -1 or v > 99.99 for v in scores.values())


@pytest.fixture
def quiet(caplog, monkeypatch):
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind, tmp_path, quiet, monkeypatch):
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    runner = Runner(tmp_path, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        scores = runner.run(KINDS[kind](), "unchanged")
    assert len(scores) >= 2 and all(v > 99.99 for v in scores.values()), scores
    refused, wrong = 0, []
    only = os.environ.get("D2EXT_MUTATION")
    numbers = range(CASES // len(KINDS)) if only is None else [int(only)]
    start = time.perf_counter()
    for number in numbers:
        content = copy.deepcopy(KINDS[kind]())
        done = mutate(content, random.Random(f"{kind}{number}"))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                learn = number % (CASES // 50) == 0  # 50 cases of all
                scores = runner.run(content, f"mutated_{number}", learn)
            if not is_right(scores):
                wrong.append(f"{number} ({'; '.join(done)}): {scores}")
        except (DataError, ConfigError) as error:
            refused += 1
            if only is not None:
                print(error)
        except Exception as error:
            if only is not None:
                raise
            wrong.append(f"{number} ({'; '.join(done)}): {type(error).__name__}: {error}")
    print(f"{kind}: {len(numbers)} cases, {refused} refused, {time.perf_counter() - start:.1f} s")
    assert not wrong, f"{len(wrong)} cases are wrong:\n" + "\n".join(wrong[:40])
    assert only is not None or 0.2 < refused / len(numbers) < 0.9
