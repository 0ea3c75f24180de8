"""Panoptic quality, its analysis and its fast path agree with panopticapi and are right."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import DatasetError
from d2ext.data.custom import register_own_dataset
from d2ext.data.panoptic import panoptic_classes, read_segments
from d2ext.evaluation import COCOPanopticEvaluator, PanopticAnalysis, build_evaluator
from d2ext.evaluation.panoptic_match import Counts, match_segments
from tests.data.panoptic_files import SIZE, paint_ids, save, write_panoptic

REAL = "coco_2017_val_panoptic_separated"


def spoil(ids: np.ndarray, segments: list[dict[str, Any]], categories: list[int], seed: int) -> Any:
    """Moved, cut, joined, renamed and dropped segments: map of ids, id → category id."""
    rng = np.random.RandomState(seed)
    result = np.roll(ids, rng.randint(-6, 7, 2), (0, 1)).copy()
    classes = {s["id"]: s["category_id"] for s in segments}
    for segment_id in list(classes):
        fate = rng.rand()
        if fate < 0.1:
            result[result == segment_id] = 0
        elif fate < 0.2:
            classes[segment_id] = int(rng.choice(categories))
        elif fate < 0.3:
            result[result == segment_id] = int(rng.choice(list(classes)))
        elif fate < 0.4:
            ys, xs = np.nonzero(result == segment_id)
            half = xs > np.median(xs) if len(xs) else xs
            new = int(rng.randint(1 << 20, 1 << 24))
            if np.any(half) and new not in classes:
                result[ys[half], xs[half]] = new
                classes[new] = classes[segment_id]
    return result, {i: c for i, c in classes.items() if (result == i).any()}


def output_of(name: str, ids: np.ndarray, classes: dict[int, int]) -> dict[str, Any]:
    """A model's output for a map of ids with the data set's category ids."""
    metadata = MetadataCatalog.get(name)
    segments = []
    for segment_id, category in classes.items():
        isthing = category in metadata.thing_dataset_id_to_contiguous_id
        kind = "thing" if isthing else "stuff"
        contiguous = metadata.get(f"{kind}_dataset_id_to_contiguous_id")[category]
        segments.append({"id": segment_id, "category_id": contiguous, "isthing": isthing})
    return {"panoptic_seg": (torch.from_numpy(ids.astype(np.int32)), segments)}


class Annotated:
    """JSON file and PNGs of a registered data set, with spoiled predictions."""

    def __init__(self, name: str, count: int) -> None:
        metadata = MetadataCatalog.get(name)
        content = json.loads(Path(metadata.panoptic_json).read_text())
        self.folder = metadata.panoptic_root
        self.categories = {c["id"]: c for c in content["categories"]}
        self.entries = content["annotations"][:count]
        self.predictions = []
        for seed, entry in enumerate(self.entries):
            with Image.open(Path(self.folder, entry["file_name"])) as png:
                rgb = np.asarray(png).astype(np.int64)
            ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
            self.predictions.append(spoil(ids, entry["segments_info"], [*self.categories], seed))

    def panopticapi(self, folder: Path) -> list[Any]:
        """Its statistics of each image alone."""
        stats = []
        folder.mkdir(exist_ok=True)
        for entry, (ids, classes) in zip(self.entries, self.predictions, strict=True):
            Image.fromarray(id2rgb(ids)).save(folder / entry["file_name"])
            segments = [{"id": i, "category_id": c} for i, c in classes.items()]
            pair = (entry, {"file_name": entry["file_name"], "segments_info": segments})
            with contextlib.redirect_stdout(io.StringIO()):
                stats.append(
                    pq_compute_single_core(0, [pair], self.folder, str(folder), self.categories)
                )
        return stats


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A panoptic data set with crowds and void, 8 images."""
    folder = tmp_path_factory.mktemp("own")
    write_panoptic(folder, 8)
    name = f"test_quality_{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2EXT_CACHE", str(folder / "cache"))
        register_own_dataset(
            name,
            val_panoptic_json=str(folder / "panoptic.json"),
            val_panoptic_root=str(folder / "panoptic"),
            val_images=str(folder / "images"),
        )
    yield f"{name}_val"
    DatasetCatalog.remove(f"{name}_val")
    MetadataCatalog.remove(f"{name}_val")


@pytest.fixture(params=["own", pytest.param("real", marks=pytest.mark.real_data)])
def annotated(request: pytest.FixtureRequest) -> tuple[str, Annotated]:
    name = request.getfixturevalue("own") if request.param == "own" else REAL
    if request.param == "real":
        request.getfixturevalue("real_data")
    return name, Annotated(name, 12)


def match_all(name: str, annotated: Annotated) -> list[Any]:
    classes = panoptic_classes(name)
    results = []
    for entry, (ids, predicted) in zip(annotated.entries, annotated.predictions, strict=True):
        segments = entry["segments_info"]
        places = np.zeros(ids.shape, np.int64)
        for place, segment_id in enumerate(predicted):
            places[ids == segment_id] = place + 1
        results.append(
            match_segments(
                read_segments(f"{annotated.folder}/{entry['file_name']}", segments),
                np.array([classes.dataset_ids[s["category_id"]] for s in segments], np.int64),
                np.array([bool(s["iscrowd"]) for s in segments]),
                places,
                np.array([classes.dataset_ids[c] for c in predicted.values()], np.int64),
                len(classes.full),
            )
        )
    return results


def test_matching_agrees_with_panopticapi(annotated: tuple[str, Annotated], tmp_path: Path) -> None:
    """Every count of every class on every image."""
    name, data = annotated
    ids = panoptic_classes(name).dataset_ids
    seen = np.zeros(4)
    for result, stat in zip(match_all(name, data), data.panopticapi(tmp_path), strict=True):
        counts = result.counts
        for category, label in ids.items():
            if category not in data.categories:  # "things"
                continue
            expected = stat[category]
            counted = (counts.tp[label], counts.fp[label], counts.fn[label])
            assert counted == (expected.tp, expected.fp, expected.fn)
            assert counts.iou[label] == pytest.approx(expected.iou, abs=1e-9)
            seen += [*counted, counts.iou[label]]
        mean = counts.mean_quality()[:3]
        average = stat.pq_average(data.categories, None)[0]
        assert mean == pytest.approx([average[k] for k in ("pq", "sq", "rq")], abs=1e-9)
    assert (seen > 5).all()


def test_confusion_counts_every_segment_and_pixel_once(annotated: tuple[str, Annotated]) -> None:
    name, data = annotated
    for result, entry, (ids, _) in zip(
        match_all(name, data), data.entries, data.predictions, strict=True
    ):
        regular = [s for s in entry["segments_info"] if not s["iscrowd"]]
        assert result.confusion[:-1].sum() == len(regular)
        assert result.pixels.sum() == ids.size
        # What is matched for PQ is on the diagonal.
        assert (np.diag(result.confusion)[:-1] == result.counts.tp).all()


def evaluate(name: str, data: Annotated, evaluator: Any, left_out: int = 0) -> Any:
    records = {r["image_id"]: r for r in DatasetCatalog.get(name)}
    evaluator.reset()
    pairs = list(zip(data.entries, data.predictions, strict=True))
    for entry, (ids, classes) in pairs[left_out:]:
        evaluator.process([records[entry["image_id"]]], [output_of(name, ids, classes)])
    return evaluator.evaluate()


@pytest.mark.skipif(importlib.util.find_spec("hotcoco") is None, reason="needs hotcoco")
@pytest.mark.real_data
@pytest.mark.usefixtures("real_data")
def test_hotcoco_agrees_with_panopticapi(tmp_path: Path) -> None:
    """On all real validation images, which is the condition for offering it."""
    data = Annotated(REAL, 50)
    results = [
        evaluate(REAL, data, COCOPanopticEvaluator(REAL, str(tmp_path), backend=backend))
        for backend in ("panopticapi", "hotcoco")
    ]
    first, second = (r["panoptic_seg"] for r in results)
    assert first.keys() == second.keys() and 5 < first["PQ"] < 95
    for metric, value in first.items():
        assert second[metric] == pytest.approx(value, abs=1e-9), metric


def test_without_hotcoco_the_error_says_how_to_get_it(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hotcoco", None)
    monkeypatch.setitem(__import__("sys").modules, "hotcoco.panoptic", None)
    evaluator = COCOPanopticEvaluator(own, str(tmp_path), backend="hotcoco")
    with pytest.raises(ImportError, match="pip install hotcoco"):
        evaluate(own, Annotated(own, 8), evaluator)
    cfg = get_cfg()
    cfg.TEST.PANOPTIC_BACKEND = "hot"
    with pytest.raises(ValueError, match="choose 'panopticapi' or 'hotcoco'"):
        build_evaluator(cfg, own, str(tmp_path))


class TestEvaluator:
    def test_output_is_left_as_it_is(self, own: str, tmp_path: Path) -> None:
        data = Annotated(own, 1)
        output = output_of(own, *data.predictions[0])
        before = [dict(s) for s in output["panoptic_seg"][1]]
        evaluator = COCOPanopticEvaluator(own, str(tmp_path))
        evaluator.reset()
        evaluator.process([DatasetCatalog.get(own)[0]], [output])
        assert output["panoptic_seg"][1] == before

    def test_numbers_of_any_type(self, own: str, tmp_path: Path) -> None:
        """Detectron2's evaluator would take a NumPy ``True`` for stuff."""
        ids, segments = paint_ids(0)
        output = output_of(own, ids, {s["id"]: s["category_id"] for s in segments})
        for segment in output["panoptic_seg"][1]:
            segment["isthing"] = np.bool_(segment["isthing"])
            segment["category_id"] = torch.tensor(segment["category_id"])
        evaluator = COCOPanopticEvaluator(own, str(tmp_path))
        evaluator.reset()
        evaluator.process([DatasetCatalog.get(own)[0]], [output])
        results = evaluator.evaluate()
        # One of eight images is perfect.
        assert results["panoptic_seg"]["PQ"] == pytest.approx(100 / (1 + 7 / 2))

    def test_processes_of_panopticapi(
        self, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = Annotated(own, 8)
        alone = evaluate(own, data, COCOPanopticEvaluator(own, str(tmp_path)))
        monkeypatch.setattr("d2ext.evaluation.panoptic._PARALLEL_FROM", 1)
        monkeypatch.setattr("multiprocessing.cpu_count", lambda: 2)
        shared = evaluate(own, data, COCOPanopticEvaluator(own, str(tmp_path)))
        assert shared["panoptic_seg"] == pytest.approx(alone["panoptic_seg"], abs=1e-9)

    def test_image_without_prediction_counts_as_void(
        self, own: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = Annotated(own, 8)
        data.predictions = [
            (paint_ids(i)[0], {s["id"]: s["category_id"] for s in e["segments_info"]})
            for i, e in enumerate(data.entries)
        ]
        results = evaluate(own, data, COCOPanopticEvaluator(own, str(tmp_path)), left_out=2)
        assert "2 of 8 images have no prediction" in caplog.text
        # 6 of 8 images are perfect: 6 / (6 + 2 / 2) of each class.
        assert results["panoptic_seg"]["PQ"] == pytest.approx(600 / 7)
        assert results["panoptic_seg"]["SQ"] == pytest.approx(100)

    @pytest.mark.parametrize("selected", [(1, 70000), (300,), ()])
    def test_without_things_or_stuff(self, tmp_path: Path, selected: tuple[int, ...]) -> None:
        """Only stuff, only things, only void: no division by zero."""
        content = write_panoptic(tmp_path / "set", 1)
        ids, segments = paint_ids(0)
        ids[~np.isin(ids, selected)] = 0
        content["annotations"][0]["segments_info"] = [s for s in segments if s["id"] in selected]
        save(tmp_path / "set", content)
        Image.fromarray(id2rgb(ids)).save(tmp_path / "set/panoptic/scene_0.png")
        name = f"test_part_{uuid.uuid4().hex}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
            register_own_dataset(
                name,
                val_panoptic_json=str(tmp_path / "set/panoptic.json"),
                val_panoptic_root=str(tmp_path / "set/panoptic"),
                val_images=str(tmp_path / "set/images"),
            )
        name = f"{name}_val"
        cfg = get_cfg()
        cfg.TEST.ANALYZE = True
        evaluator = build_evaluator(cfg, name, str(tmp_path / "out"))
        evaluator.reset()
        output = output_of(name, ids, {i: {1: 12, 70000: 40, 300: 7}[i] for i in selected})
        evaluator.process(DatasetCatalog.get(name), [output])
        results = evaluator.evaluate()["panoptic_seg"]
        for metric, group in (("PQ_th", (300,)), ("PQ_st", (1, 70000)), ("PQ", (1, 300, 70000))):
            if set(group) & set(selected):
                assert results[metric] == pytest.approx(100)
            else:
                assert math.isnan(results[metric])
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class TestAnalysis:
    def test_tables_and_pictures(self, own: str, tmp_path: Path) -> None:
        data = Annotated(own, 8)
        cfg = get_cfg()
        cfg.TEST.ANALYZE = True
        results = evaluate(own, data, build_evaluator(cfg, own, str(tmp_path)))["panoptic_seg"]
        folder = tmp_path / "analysis"
        content = json.loads((folder / "analysis.json").read_text())
        for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
            for metric in ("PQ", "SQ", "RQ"):
                value = content["quality"][group][metric]
                assert value == pytest.approx(results[metric + suffix], abs=1e-9)
        images = content["images"]
        assert [i["PQ"] for i in images] == sorted(i["PQ"] for i in images)
        stats = dict(
            zip(
                (e["image_id"] for e in data.entries), data.panopticapi(tmp_path / "p"), strict=True
            )
        )
        for row in images:
            pq = stats[row["image_id"]].pq_average(data.categories, None)[0]["pq"]
            assert row["PQ"] == pytest.approx(100 * pq, abs=1e-9)
        with (folder / "images.csv").open() as file:
            assert [int(r["image_id"]) for r in csv.DictReader(file)] == [
                i["image_id"] for i in images
            ]
        with (folder / "categories.csv").open() as file:
            rows = {row["category"]: row for row in csv.DictReader(file)}
        assert list(rows) == ["sky", "grass", "apple", "pear"]
        assert sum(int(r["missed"]) + int(r["matched"]) for r in rows.values()) == 8 * 5
        with (folder / "confusion.csv").open() as file:
            table = list(csv.reader(file))
        assert table[0][1:] == ["sky", "grass", "apple", "pear", "missed"]
        assert sum(int(v) for row in table[1:-1] for v in row[1:]) == 8 * 5
        pictures = sorted((folder / "worst").glob("*.png"))
        assert [int(p.stem.split("_")[1]) for p in pictures] == [i["image_id"] for i in images]
        picture = cv2.imread(str(pictures[0]))
        width = 3 * 400  # small images are enlarged
        assert picture.shape == (round(SIZE[0] * 400 / SIZE[1]) + 2 * 26, width, 3)
        # Annotated and prediction differ there, and both from the image.
        panels = [picture[52:, i * 400 : (i + 1) * 400].astype(int) for i in range(3)]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(panels[a] - panels[b]).mean() > 3
        assert cv2.imread(str(folder / "confusion.png")).std() > 5

    def test_renamed_class_is_found(self, own: str, tmp_path: Path) -> None:
        """Pears taken for apples, and one apple missed."""
        data = Annotated(own, 8)
        data.predictions = []
        for number, entry in enumerate(data.entries):
            ids, _ = paint_ids(number)
            classes = {s["id"]: s["category_id"] for s in entry["segments_info"]}
            classes = {i: 3 if c == 7 else c for i, c in classes.items()}
            if number == 5:
                ids[ids == 9_000_000] = 0
                del classes[9_000_000]
            data.predictions.append((ids, classes))
        evaluate(own, data, PanopticAnalysis(own, str(tmp_path), num_pictures=2))
        content = json.loads((tmp_path / "analysis.json").read_text())
        rows = {row["category"]: row for row in content["categories"]}
        pear, apple = rows["pear"], rows["apple"]
        assert pear["PQ"] == 0 and pear["missed"] == 16 and pear["as_other_class"] == 16
        assert (pear["most_as"], pear["most_as_count"]) == ("apple", 16)
        assert (apple["matched"], apple["missed"], apple["wrong"]) == (7, 1, 16)
        assert (apple["as_other_class"], apple["most_as"]) == (0, "")
        assert content["images"][0]["image_id"] == 15
        assert content["images"][0]["predicted_void"] > 0 == content["images"][1]["predicted_void"]
        assert len(list((tmp_path / "worst").glob("*.png"))) == 2

    def test_maps_without_segments(self, own: str, tmp_path: Path) -> None:
        """category * label_divisor + instance, as Detectron2's bottom-up models give."""
        evaluator = PanopticAnalysis(own, str(tmp_path))
        evaluator.reset()
        record = DatasetCatalog.get(own)[0]
        # Classes as COCOPanopticEvaluator reads them: contiguous thing ids, else stuff.
        ids = torch.full(SIZE, -1)
        ids[20:] = 2 * 1000
        evaluator.process([record], [{"panoptic_seg": (ids, None)}])
        evaluator.evaluate()
        rows = json.loads((tmp_path / "analysis.json").read_text())["categories"]
        assert [row["category"] for row in rows if row["wrong"] + row["matched"]] == ["grass"]

    def test_errors(self, own: str, tmp_path: Path) -> None:
        record = DatasetCatalog.get(own)[0]
        evaluator = PanopticAnalysis(own, str(tmp_path))
        full = torch.ones(SIZE, dtype=torch.int32)
        for segments, message in (
            ([], "ids \\[1\\] that its segments_info lacks"),
            ([{"id": 1, "category_id": 9, "isthing": True}], "predicted thing class 9"),
            ([{"id": 1, "category_id": 0, "isthing": False}], "predicted stuff class 0"),
        ):
            with pytest.raises(ValueError, match=message):
                evaluator.process([record], [{"panoptic_seg": (full, segments)}])
        with pytest.raises(ValueError, match="size of the original image"):
            evaluator.process([record], [{"panoptic_seg": (full[1:], [])}])
        with pytest.raises(ValueError, match="is not in"):
            evaluator.process([{**record, "image_id": 99}], [{"panoptic_seg": (full, [])}])
        cfg = get_cfg()
        cfg.TEST.ANALYZE = True
        with pytest.raises(
            DatasetError, match=r"no analysis of data set 'shapes_val_faces'.*'faces'"
        ):
            build_evaluator(cfg, "shapes_val_faces", str(tmp_path))


def test_quality_of_counts() -> None:
    counts = Counts.zeros(3)
    counts.iou[:] = [1.6, 0, 0]
    counts.tp[:], counts.fp[:], counts.fn[:] = [2, 0, 0], [1, 0, 0], [1, 2, 0]
    quality = counts.quality()
    assert quality[0].tolist() == pytest.approx([1.6 / 3, 0.8, 2 / 3])
    assert quality[1].tolist() == [0, 0, 0] and np.isnan(quality[2]).all()
    assert counts.mean_quality() == pytest.approx((1.6 / 6, 0.4, 1 / 3, 2))
    assert counts.mean_quality(slice(2, 3))[3] == 0


def test_only_the_worst_are_drawn_and_replace_older_pictures(own: str, tmp_path: Path) -> None:
    data = Annotated(own, 7)
    for count in (2, 1):
        evaluate(own, data, PanopticAnalysis(own, str(tmp_path), num_pictures=count))
        images = json.loads((tmp_path / "analysis.json").read_text())["images"]
        quality = {i["image_id"]: i["PQ"] for i in images}
        drawn = [int(p.stem.split("_")[1]) for p in sorted((tmp_path / "worst").glob("*.png"))]
        assert [quality[i] for i in drawn] == sorted(quality.values())[:count]
