"""Loaders: one stream for any number of workers and processes, exact resumption, bad samples."""

import copy
import gc
import itertools
import json
import logging
import os
import random
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset

from d2ext.config import ConfigError, get_cfg
from d2ext.data import (
    MAPPER_REGISTRY,
    DatasetError,
    ImageReadError,
    build_test_loader,
    build_train_loader,
)
from d2ext.data.build import StreamDataset, _report_in_worker
from d2ext.data.errors import SampleError
from tests.data.scenes import paint_scene, write_image


@pytest.fixture
def register():
    """Register lists of dicts; returns the name. Unregistered after the test."""
    names = []

    def add(records, classes=("a", "b", "c", "d", "e")):
        name = f"test_build_{uuid.uuid4().hex}"
        DatasetCatalog.register(name, lambda: copy.deepcopy(records))
        if classes is not None:
            MetadataCatalog.get(name).thing_classes = list(classes)
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def records(tmp_path):
    result = []
    for i in range(6):
        scene = paint_scene(60, 80, seed=i)
        file_name = write_image(tmp_path / f"{i}.png", scene.image)
        annotations = copy.deepcopy(scene.polygon_annotations)
        result.append(
            {
                "file_name": file_name,
                "height": 60,
                "width": 80,
                "image_id": i,
                "annotations": annotations,
            }
        )
    return result


def make_cfg(*names, workers=0, batch=2):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = names
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.AUGMENTATION.NAME = "ssd"
    cfg.INPUT.AUGMENTATION.SIZE = 64
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.SOLVER.IMS_PER_BATCH = batch
    cfg.DATALOADER.NUM_WORKERS = workers
    return cfg


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def fingerprint(sample):
    instances = sample["instances"]
    return (
        sample["image_id"],
        sample["image"].numpy().tobytes(),
        instances.gt_boxes.tensor.numpy().tobytes(),
        instances.gt_masks.tensor.numpy().tobytes(),
    )


def fingerprints(batches):
    return [fingerprint(sample) for batch in batches for sample in batch]


class TestDeterminism:
    @pytest.fixture
    def name(self, register, records):
        return register(records)

    def test_epochs(self, name):
        ids = [
            s["image_id"] for batch in take(build_train_loader(make_cfg(name)), 9) for s in batch
        ]
        assert all(sorted(ids[i : i + 6]) == list(range(6)) for i in (0, 6, 12))
        assert len({tuple(ids[i : i + 6]) for i in (0, 6, 12)}) > 1

    @pytest.mark.parametrize("workers", [1, 2])
    def test_independent_of_workers(self, name, workers):
        reference = fingerprints(take(build_train_loader(make_cfg(name)), 6))
        assert len(set(reference)) == 12
        loader = build_train_loader(make_cfg(name, workers=workers))
        assert fingerprints(take(loader, 6)) == reference

    def test_independent_of_the_global_random_state(self, name):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        first = fingerprints(take(build_train_loader(make_cfg(name)), 3))
        torch.manual_seed(2), np.random.seed(2), random.seed(2)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        loader = iter(build_train_loader(make_cfg(name)))
        assert fingerprints([next(loader)]) == first[:2]
        assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]

    @pytest.mark.parametrize("start_iter", [1, 4])
    def test_resumes_exactly(self, name, start_iter):
        whole = fingerprints(take(build_train_loader(make_cfg(name)), start_iter + 3))
        resumed = build_train_loader(make_cfg(name), start_iter=start_iter)
        assert fingerprints(take(resumed, 3)) == whole[2 * start_iter :]

    @pytest.mark.parametrize("start_iter", [0, 3])
    def test_processes_split_each_batch(self, name, monkeypatch, start_iter):
        whole = take(build_train_loader(make_cfg(name, batch=4), start_iter=start_iter), 3)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        for rank in range(2):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            part = take(build_train_loader(make_cfg(name, batch=4), start_iter=start_iter), 3)
            assert [len(batch) for batch in part] == [2, 2, 2]
            assert fingerprints(part) == fingerprints([batch[rank::2] for batch in whole])

    def test_seed_changes_the_stream(self, name):
        cfg = make_cfg(name)
        reference = fingerprints(take(build_train_loader(cfg), 3))
        cfg.SEED = 5
        assert fingerprints(take(build_train_loader(cfg), 3)) != reference

    def test_uneven_batch(self, name, monkeypatch):
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 3.*2"):
            build_train_loader(make_cfg(name, batch=3))

    def test_several_data_sets(self, register, records):
        names = register(records[:2]), register(records[2:])
        batches = take(build_train_loader(make_cfg(*names, batch=6)), 1)
        assert sorted(s["image_id"] for s in batches[0]) == list(range(6))

    def test_repeat_factors(self, register, records):
        for record in records[1:]:
            record["annotations"] = [a for a in record["annotations"] if a["category_id"] > 0]
        cfg = make_cfg(register(records))
        cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
        cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
        cfg.DATALOADER.REPEAT_SQRT = False
        # Class 0 is in one of 6 images: that image comes 6 times per epoch of 11.
        ids = [s["image_id"] for batch in take(build_train_loader(cfg), 11) for s in batch]
        assert ids.count(0) == 12 and all(ids.count(i) == 2 for i in range(1, 6))

    def test_unknown_sampler(self, name):
        cfg = make_cfg(name)
        cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
        with pytest.raises(ValueError, match="RandomSubsetTrainingSampler"):
            build_train_loader(cfg)


class TestBadSamples:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_replaced_and_reported_once(self, register, records, tmp_path, caplog, workers):
        (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])
        (tmp_path / "3.png").unlink()
        records[4]["width"] = 81
        name = register(records)
        with caplog.at_level(logging.ERROR):
            batches = take(build_train_loader(make_cfg(name, workers=workers)), 9)
        ids = [s["image_id"] for batch in batches for s in batch]
        # 2, 3 and 4 are unusable; 5, the next in the data set, stands in for them.
        assert all(sorted(ids[i : i + 6]) == [0, 1, 5, 5, 5, 5] for i in (0, 6, 12))
        messages = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert len(messages) == 3
        for file in ("2.png", "3.png", "4.png"):
            assert sum(file in message for message in messages) == 1

    def test_the_last_is_replaced_by_the_first(self, register, records, tmp_path):
        (tmp_path / "5.png").write_bytes(b"")
        batches = take(build_train_loader(make_cfg(register(records))), 3)
        assert sorted(s["image_id"] for b in batches for s in b) == [0, 0, 1, 2, 3, 4]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_strict(self, register, records, tmp_path, workers):
        (tmp_path / "2.png").write_bytes(b"")
        cfg = make_cfg(register(records), workers=workers)
        cfg.INPUT.STRICT = True
        with pytest.raises(ImageReadError, match=r"2\.png"):
            take(build_train_loader(cfg), 3)

    def test_too_many_in_a_row(self, register, records, tmp_path):
        for i in range(1, 6):
            (tmp_path / f"{i}.png").write_bytes(b"")
        cfg = make_cfg(register(records))
        cfg.INPUT.MAX_BAD_SAMPLES = 5
        assert {s["image_id"] for b in take(build_train_loader(cfg), 4) for s in b} == {0}
        cfg.INPUT.MAX_BAD_SAMPLES = 3
        with pytest.raises(DatasetError, match=r"4 samples in a row.*MAX_BAD_SAMPLES"):
            take(build_train_loader(cfg), 4)

    def test_all_are_bad(self, register, records, tmp_path):
        for i in range(6):
            (tmp_path / f"{i}.png").unlink()
        with pytest.raises(DatasetError, match="6 samples in a row"):
            take(build_train_loader(make_cfg(register(records))), 1)

    def test_errors_of_libraries_name_file_and_annotation(self):
        """They are bad samples; those of the program itself concern all samples and end the run."""

        def mapper(record):
            assert record["annotations"] != [] and record["annotations"][-1]["id"] != "c", "no mask"
            return record

        annotations = [{"id": "a"}, {"id": "b"}, {"id": "c"}]
        records = [
            {"file_name": "x.png", "annotations": annotations},
            {"file_name": "y.png", "annotations": annotations[:2]},
            {"file_name": "z.png", "annotations": []},
        ]
        dataset = StreamDataset(records, mapper, seed=0, max_bad=10, strict=False)
        sample, (bad,) = dataset[0, 0]
        assert sample is records[1] and bad.file_name == "x.png"
        assert "'x.png', annotation c cannot be used: AssertionError: no mask" in bad.reason
        with pytest.raises(SampleError, match=r"'z\.png' cannot be used") as caught:
            StreamDataset(records, mapper, seed=0, max_bad=10, strict=True)[0, 2]
        assert isinstance(caught.value.__cause__, AssertionError)
        with pytest.raises(DatasetError, match="2 samples in a row"):
            StreamDataset(records[::2], mapper, seed=0, max_bad=10, strict=False)[0, 0]

    def test_a_share_of_bad_samples_ends_the_run(self, register, records, tmp_path):
        for i in (0, 2, 4):  # never two in a row
            (tmp_path / f"{i}.png").write_bytes(b"")
        cfg = make_cfg(register(records))
        take(build_train_loader(cfg), 9)
        cfg.INPUT.MAX_BAD_SAMPLES = 2
        with pytest.raises(DatasetError, match=r"3 files .*more than 10 % of the 6 samples"):
            take(build_train_loader(cfg), 9)

    def test_replacement_has_the_randomness_of_the_position(self):
        def mapper(record):
            if record["bad"]:
                np.random.uniform()
                raise SampleError("bad")
            return {"number": np.random.uniform()}

        records = [{"bad": True, "file_name": "x"}, {"bad": False, "file_name": "y"}]
        dataset = StreamDataset(records, mapper, seed=0, max_bad=10, strict=False)
        (replaced, bad), (direct, none) = dataset[9, 0], dataset[9, 1]
        assert replaced == direct and len(bad) == 1 and not none


class TestWholeDataSet:
    """What concerns the data set as a whole is an error before training starts."""

    def load(self, name, **keys):
        cfg = make_cfg(name)
        for key, value in keys.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        return take(build_train_loader(cfg), 1)

    def test_no_data_set_given(self):
        with pytest.raises(DatasetError, match=r"DATASETS\.TRAIN"):
            build_train_loader(make_cfg())

    def test_unregistered(self):
        with pytest.raises(DatasetError, match="'nonsense' is not registered"):
            self.load("nonsense")

    def test_empty(self, register):
        name = register([])
        with pytest.raises(DatasetError, match="has no images"):
            self.load(name)
        with pytest.raises(DatasetError, match="has no images"):
            build_test_loader(make_cfg(), name)

    def test_without_any_annotation(self, register, records):
        for record in records:
            record["annotations"] = []
        name = register(records)
        with pytest.raises(DatasetError, match=r"FILTER_EMPTY_ANNOTATIONS: False"):
            self.load(name)
        (batch,) = self.load(name, DATALOADER__FILTER_EMPTY_ANNOTATIONS=False)
        assert [len(s["instances"]) for s in batch] == [0, 0]

    def test_missing_annotation_file(self, monkeypatch):
        def load():
            return json.loads(Path("does/not/exist.json").read_text())

        name = f"test_build_{uuid.uuid4().hex}"
        DatasetCatalog.register(name, load)
        try:
            with pytest.raises(DatasetError, match=r"does/not/exist\.json.*DETECTRON2_DATASETS"):
                self.load(name)
        finally:
            DatasetCatalog.remove(name)

    @pytest.mark.parametrize("category", [5, -1, None, "cat", 1.5])
    def test_class_outside_the_set(self, register, records, category):
        records[3]["annotations"][1]["category_id"] = category
        with pytest.raises(DatasetError, match=r"1 annotations.*outside \[0, 4\].*3\.png.*a, b, c"):
            self.load(register(records))

    def test_no_masks(self, register, records):
        for record in records:
            for annotation in record["annotations"]:
                annotation.pop("segmentation")
        name = register(records)
        with pytest.raises(DatasetError, match=r"No annotation.*MODEL\.MASK_ON: False"):
            self.load(name)
        assert len(self.load(name, MODEL__MASK_ON=False)) == 1

    def test_an_object_without_mask_among_others(self, register, records, caplog):
        first = records[0]["annotations"][0]
        first.update(id=7, segmentation=[])
        with caplog.at_level("WARNING"):
            self.load(register(records))
        assert "1 annotations without segmentation are left out" in caplog.text
        assert f"annotation 7 of '{records[0]['file_name']}'" in caplog.text

    def test_rle_where_polygons_are_wanted(self, register, records):
        records[0]["annotations"] = copy.deepcopy(paint_scene(60, 80).rle_annotations)
        name = register(records)
        with pytest.raises(DatasetError, match=r"5 masks.*INPUT\.MASK_FORMAT: bitmask"):
            self.load(name, INPUT__MASK_FORMAT="polygon")
        assert len(self.load(name)) == 1

    def test_different_classes(self, register, records):
        names = register(records[:2]), register(records[2:], classes=("a", "b", "c", "e", "d"))
        with pytest.raises(DatasetError, match="classes differ"):
            build_train_loader(make_cfg(*names))

    def test_useless_annotations_are_counted_once(self, register, records, caplog):
        records[0]["annotations"][0]["bbox"] = [3, 3, 3, 9]
        records[1]["annotations"][0]["bbox"] = [3, 3, 3, 9]
        records[2]["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
        with caplog.at_level(logging.WARNING):
            self.load(register(records))
        (message,) = [r.getMessage() for r in caplog.records if "describe nothing" in r.message]
        assert "2 (box without area or not finite), 1 (polygons with fewer than three" in message

    def test_images_with_only_crowds_train(self, register, records):
        for annotation in records[0]["annotations"]:
            annotation["iscrowd"] = 1
        for record in records[1:]:
            record["annotations"] = []
        (batch,) = self.load(register(records))
        assert [s["image_id"] for s in batch] == [0, 0]
        assert all(len(s["instances"]) == 0 and len(s["crowd_instances"]) for s in batch)

    def test_list_of_the_catalog_is_not_modified(self, records):
        name = f"test_build_{uuid.uuid4().hex}"
        records[0]["annotations"][0]["bbox"] = [3, 3, 3, 9]
        before = copy.deepcopy(records)
        DatasetCatalog.register(name, lambda: records)
        try:
            self.load(name)
            assert records == before
        finally:
            DatasetCatalog.remove(name)


class TestTestLoader:
    def test_all_images_in_order(self, register, records):
        records[1]["annotations"] = []
        name = register(records)
        for workers in (0, 2):
            loader = build_test_loader(make_cfg(workers=workers), name)
            assert len(loader) == 6
            assert [[s["image_id"] for s in b] for b in loader] == [[i] for i in range(6)]

    def test_processes_share_the_images(self, register, records, monkeypatch):
        name = register(records)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
        monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda value: [value])
        ids = []
        for rank in range(4):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            ids += [b[0]["image_id"] for b in build_test_loader(make_cfg(), name)]
        assert ids == list(range(6))

    def test_bad_image_is_left_out_of_the_evaluation(self, register, records, tmp_path, caplog):
        (tmp_path / "2.png").write_bytes(b"")
        name = register(records)

        class Ids(DatasetEvaluator):
            def reset(self):
                self.ids = []

            def process(self, inputs, outputs):
                self.ids += [x["image_id"] for x in inputs]

            def evaluate(self):
                return {"ids": self.ids}

        with caplog.at_level(logging.WARNING):
            loader = build_test_loader(make_cfg(), name)
            result = inference_on_dataset(torch.nn.Identity(), loader, Ids())
        assert result == {"ids": [0, 1, 3, 4, 5]}
        assert "5 of 6 images were evaluated" in caplog.text
        assert sum("2.png" in r.getMessage() for r in caplog.records) == 1

        assert [len(batch) for batch in loader] == [1] * 5

        cfg = make_cfg()
        cfg.INPUT.STRICT = True
        with pytest.raises(ImageReadError, match=r"2\.png"):
            list(build_test_loader(cfg, name))

        for i in range(6):
            (tmp_path / f"{i}.png").write_bytes(b"")
        with pytest.raises(DatasetError, match="None of 6 images could be read"):
            inference_on_dataset(torch.nn.Identity(), build_test_loader(make_cfg(), name), Ids())


def test_mirroring_without_partners_is_told(register, records, caplog):
    name = register(records)
    MetadataCatalog.get(name).set(keypoint_names=["a", "b"], keypoint_flip_map=[])
    for record in records:
        for annotation in record["annotations"]:
            annotation["keypoints"] = [1, 1, 2, 2, 2, 2]
    cfg = make_cfg(name)
    cfg.MODEL.KEYPOINT_ON = True
    for recipe, key, value in (
        ("default", "INPUT.RANDOM_FLIP", "none"),
        ("ssd", "INPUT.AUGMENTATION.FLIP_PROB", 0.0),
    ):
        cfg.INPUT.AUGMENTATION.NAME = recipe
        quiet = cfg.clone()
        quiet.merge_from_list([key, value])
        caplog.clear()
        build_train_loader(quiet)
        assert "mirrored" not in caplog.text
        build_train_loader(cfg)
        assert "none of its keypoints (a, b) is known to change places" in caplog.text
        assert f"or set {key} {value}"[:-2] in caplog.text


class Cycle:
    """What only the garbage collector ends; it notes which process did."""

    def __init__(self, log: Path) -> None:
        self.itself, self.log = self, log

    def __del__(self) -> None:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_workers_leave_the_garbage_of_their_parent_alone(register, records, tmp_path):
    """A loader's iterator is such: ended by a worker of another loader, it prints a traceback."""
    log = tmp_path / "ended"
    name = register(records)

    def collect(record):
        gc.collect()
        return record

    gc.disable()
    try:
        Cycle(log)
        assert len(list(build_test_loader(make_cfg(workers=1), name, mapper=collect))) == 6
        assert not log.exists()
    finally:
        gc.enable()
    gc.collect()
    assert log.read_text() == f"{os.getpid()}\n"


def test_a_mapper_of_one_s_own(register, records, monkeypatch):
    class PairMapper:
        def __init__(self, cfg, is_train):
            self.is_train = is_train

        def samples(self, records, dataset_names):
            assert dataset_names == ([name] if not self.is_train else (name,))
            return [{**a, "next": b} for a, b in itertools.pairwise(records)]

        def __call__(self, record):
            return {"pair": (record["image_id"], record["next"]["image_id"])}

    name = register(records)
    cfg = make_cfg(name)
    cfg.INPUT.MAPPER = "PairMapper"
    with pytest.raises(
        ConfigError, match=r"INPUT.MAPPER is 'PairMapper'; known.*D2extDatasetMapper"
    ):
        build_train_loader(cfg)
    monkeypatch.setitem(MAPPER_REGISTRY._obj_map, "PairMapper", PairMapper)
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert [x["pair"] for (x,) in build_test_loader(cfg, name)] == pairs
    assert all(x["pair"] in pairs for x in next(iter(build_train_loader(cfg))))


def test_a_worker_whose_trainer_goes_away_reports_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _report_in_worker(ConnectionResetError, ConnectionResetError(104, "reset"), None)
    assert not capsys.readouterr().err
    _report_in_worker(RuntimeError, RuntimeError("shown"), None)
    assert "RuntimeError: shown" in capsys.readouterr().err
