"""The evaluator of panoptic videos, end to end from registered records and PNGs."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from panopticapi.utils import id2rgb
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data.panoptic import read_panoptic_json, read_segments
from d2ext.data.shapes.clips import load_shapes_video
from d2ext.data.shapes.sets import VideoSet
from d2ext.evaluation import COCOPanopticEvaluator, VideoPanopticEvaluator, build_evaluator

SIZE = 32
# Numbers of things and of stuff have nothing to do with each other.
CAR = {"category_id": 1, "isthing": True}
ROAD = {"category_id": 1, "isthing": False}


def scene(t: int) -> np.ndarray:
    """Segment ids: a car (2) of 64 pixels that moves over a road (1), 64 pixels void at the top."""
    ids = np.ones((SIZE, SIZE), np.int32)
    ids[:2] = 0
    ids[10:18, 2 * t : 2 * t + 8] = 2
    return ids


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    """Two videos of 8 frames, of which every second is annotated."""
    videos, images, entries = [], [], []
    for number in range(2):
        frames: list[dict[str, Any]] = []
        for t in range(8):
            frame = {"file_name": f"{number}/{t}.png", "height": SIZE, "width": SIZE}
            frame.update(video_id=number, frame=t, image_id=100 * number + t)
            if t % 2 == 0:
                path = tmp_path / f"{frame['image_id']}.png"
                Image.fromarray(id2rgb(scene(t))).save(path)
                frame["pan_seg_file_name"] = str(path)
                # The car is track 7 of both videos.
                segments = [{"id": 1, **ROAD}, {"id": 2, **CAR, "track_id": 7}]
                frame["segments_info"] = [{**s, "iscrowd": 0} for s in segments]
                sizes = {"height": SIZE, "width": SIZE}
                images.append({"id": frame["image_id"], "file_name": frame["file_name"], **sizes})
                ids = [{"id": 1, "category_id": 12}, {"id": 2, "category_id": 11}]
                entries.append(
                    {"image_id": frame["image_id"], "file_name": path.name, "segments_info": ids}
                )
            frames.append(frame)
        videos.append({"video_id": number, "length": 8, "frames": frames})
    names = [("truck", 10, 1), ("car", 11, 1), ("road", 12, 0)]
    categories = [{"id": i, "name": n, "isthing": thing} for n, i, thing in names]
    content = {"images": images, "annotations": entries, "categories": categories}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    name = "panoptic_videos"
    DatasetCatalog.register(name, lambda: videos)
    MetadataCatalog.get(name).set(
        evaluator_type="video_panoptic_seg",
        panoptic_json=str(tmp_path / "panoptic.json"),
        panoptic_root=str(tmp_path),
        thing_classes=["truck", "car"],
        stuff_classes=["things", "road"],
        thing_dataset_id_to_contiguous_id={10: 0, 11: 1},
        stuff_dataset_id_to_contiguous_id={12: 1},
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def run(
    name: str, folder: Path, track: Any, *, left_out: tuple[int, ...] = (), cfg: Any = None
) -> dict[str, Any]:
    """Right maps with other segment ids; ``track(video, t)``: the id of the car, None: no key."""
    evaluator = build_evaluator(cfg or get_cfg(), name, str(folder))
    evaluator.reset()
    for video in DatasetCatalog.get(name):
        for frame in video["frames"]:
            if frame["image_id"] in left_out:
                continue
            # 5 road, 9 car; where nothing is labelled something may be predicted.
            ids = np.array([5, 5, 9])[scene(frame["frame"])]
            car: dict[str, Any] = {"id": 9, **CAR}
            number = track(frame["video_id"], frame["frame"])
            if number is not None:
                car["track_id"] = number
            output = (torch.from_numpy(ids), [{"id": 5, **ROAD}, car])
            inputs = {"image_id": frame["image_id"], "file_name": frame["file_name"]}
            evaluator.process([inputs], [{"panoptic_seg": output}])
    return evaluator.evaluate()


def test_perfect(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    process = COCOPanopticEvaluator.process
    monkeypatch.setattr(
        COCOPanopticEvaluator,
        "process",
        lambda self, inputs, outputs: (
            kept.append(inputs[0]["image_id"]) or process(self, inputs, outputs)
        ),
    )
    results = run(dataset, tmp_path / "out", lambda video, t: 3)
    assert kept == [0, 2, 4, 6, 100, 102, 104, 106]  # PNGs of others would fill the memory
    scores = results["video_panoptic_seg"]
    # Windows of 15 frames are longer than the clips, and so are out of the mean.
    assert {k: v for k, v in scores.items() if not np.isnan(v)} == pytest.approx(
        dict.fromkeys([k for k in scores if not k.startswith(("VPQ_10", "VPQ_15"))], 100)
    )
    assert {"VPQ", "VPQ_th", "VPQ_st", "VPQ_0", "VPQ_5_th", "STQ"} < scores.keys()
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_identity_that_changes(dataset: str, tmp_path: Path) -> None:
    # In video 1 half of the annotated frames have another id: AQ 0.5 there.
    results = run(dataset, tmp_path / "out", lambda video, t: 4 if video == 1 and t >= 4 else 3)
    scores = results["video_panoptic_seg"]
    assert scores["AQ"] == pytest.approx(75) and scores["IoU"] == pytest.approx(100)
    assert scores["STQ"] == pytest.approx(100 * 0.75**0.5)


def test_crowd(dataset: str, tmp_path: Path) -> None:
    for frame in DatasetCatalog.get(dataset)[0]["frames"][::2]:
        frame["segments_info"][1]["iscrowd"] = 1
    # Ids that change do no harm where the annotations have a crowd.
    results = run(dataset, tmp_path / "out", lambda video, t: t if video == 0 else 3)
    scores = results["video_panoptic_seg"]
    assert {key: scores[key] for key in ("STQ", "AQ", "IoU")} == pytest.approx(
        {"STQ": 100, "AQ": 100, "IoU": 100}
    )
    assert scores["VPQ"] == pytest.approx(100)


def test_frame_without_prediction(dataset: str, tmp_path: Path) -> None:
    results = run(dataset, tmp_path / "out", lambda video, t: 3, left_out=(0, 1))
    scores = results["video_panoptic_seg"]
    # One of 4 annotated frames of video 0: TPA 3/4 of the track, IoU 3/4.
    assert scores["AQ"] == pytest.approx(100 * (0.75**2 + 1) / 2)
    # 7 of 8 frames of both classes, and the class "nothing" of the published code.
    assert scores["IoU"] == pytest.approx(100 * 2 * (7 / 8) / 3)


def test_without_ids(dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        results = run(dataset, tmp_path / "out", lambda video, t: None)
    # Single frames need no ids.
    hundred = {"VPQ_0": 100, "VPQ_0_th": 100, "VPQ_0_st": 100}
    assert results["video_panoptic_seg"] == pytest.approx(hundred)
    assert "have no track_id" in caplog.text
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_windows_of_frames(dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every second frame is annotated: 2 and 3 frames are 2 annotated ones."""
    cfg = get_cfg()
    cfg.TEST.VPQ_WINDOWS = (3, 0, 2)
    with caplog.at_level(logging.INFO):
        # The id of video 1 changes once: 1 of its 3 windows of two, and no single frame.
        results = run(
            dataset, tmp_path / "out", lambda video, t: 4 if video and t >= 4 else 3, cfg=cfg
        )
    scores = results["video_panoptic_seg"]
    assert scores["VPQ_0"] == pytest.approx(100)
    # Things: 5 matches, 2 predicted halves, 1 missed.
    things = 100 * 5 / 6.5
    assert scores["VPQ_2_th"] == scores["VPQ_3_th"] == pytest.approx(things)
    assert scores["VPQ_2_st"] == pytest.approx(100)
    assert scores["VPQ_th"] == pytest.approx((100 + 2 * things) / 3)
    assert "k=2 (2 annotated)" in caplog.text and "windows of VPQ are equal" in caplog.text
    written = json.loads((tmp_path / "out/vpq.json").read_text())
    assert written["results"]["VPQ_2_th"] == pytest.approx(things)
    assert [(w["k"], w["annotated_frames"]) for w in written["windows"]] == [(0, 1), (2, 2), (3, 2)]
    car = next(c for c in written["windows"][1]["categories"] if c["category"] == "car")
    assert (car["iou"], car["tp"], car["fp"], car["fn"], car["isthing"]) == (5, 5, 2, 1, 1)
    assert written["windows"][0]["categories"][1]["PQ"] is None  # no truck anywhere
    cfg.TEST.VPQ_WINDOWS = (-1,)
    with pytest.raises(ValueError, match="VPQ_WINDOWS"):
        build_evaluator(cfg, dataset, str(tmp_path))


def test_class_left_out(dataset: str, tmp_path: Path) -> None:
    MetadataCatalog.get(dataset).vpq_left_out = ["road"]
    scores = run(dataset, tmp_path, lambda video, t: t)["video_panoptic_seg"]
    assert scores["VPQ_5"] == scores["VPQ_5_th"] == 0 and np.isnan(scores["VPQ_5_st"])
    del MetadataCatalog.get(dataset).vpq_left_out
    MetadataCatalog.get(dataset).vpq_left_out = ["sea"]
    with pytest.raises(ValueError, match="sea"):
        run(dataset, tmp_path, lambda video, t: t)


def test_twice_and_after_reset(dataset: str, tmp_path: Path) -> None:
    evaluator = VideoPanopticEvaluator(dataset, windows=(5, 0))
    frames = [f for video in DatasetCatalog.get(dataset) for f in video["frames"]]

    def process(count: int) -> None:
        for frame in frames[:count]:
            segments = [{"id": 1, **ROAD}, {"id": 2, **CAR, "track_id": frame["frame"] // 4 + 1}]
            maps = torch.from_numpy(scene(frame["frame"]))
            evaluator.process([frame], [{"panoptic_seg": (maps, segments)}])

    process(12)
    first = evaluator.evaluate()
    assert (
        evaluator.evaluate() == first
    )  # frames without prediction were added for it, not for good
    process(0)
    for frame in frames[12:]:
        maps = torch.zeros((SIZE, SIZE), dtype=torch.int32)
        evaluator.process([frame], [{"panoptic_seg": (maps, [])}])
    assert evaluator.evaluate() == first
    evaluator.reset()
    process(16)
    assert evaluator.evaluate()["video_panoptic_seg"]["VPQ_0"] == pytest.approx(100)


def test_frames_are_found_by_name(dataset: str, caplog: pytest.LogCaptureFixture) -> None:
    for video in DatasetCatalog.get(dataset):
        for frame in video["frames"]:
            frame["file_name"] = f"{frame['video_id']}/{frame['image_id']:04}.png"
    evaluator = VideoPanopticEvaluator(dataset)
    maps = torch.from_numpy(scene(0))
    output = {"panoptic_seg": (maps, [{"id": 1, **ROAD}, {"id": 2, **CAR, "track_id": 1}])}
    # Names without folder and ending; the id is another data set's.
    evaluator.process([{"image_id": 7_000, "file_name": "elsewhere/0000.jpg"}], [output])
    evaluator.process([{"image_id": 7_001, "file_name": "elsewhere/0101.jpg"}], [output])
    evaluator.process([{"image_id": 7_002, "file_name": "elsewhere/else.jpg"}], [output])
    with caplog.at_level(logging.WARNING):
        scores = evaluator.evaluate()["video_panoptic_seg"]
    assert "1 predictions are of frames" in caplog.text and "else.jpg" in caplog.text
    assert "7 of 8 annotated frames have no prediction" in caplog.text
    assert scores["VPQ_0_th"] == pytest.approx(100 / 4.5)  # 1 match, 7 missed


def test_wrong_predictions(dataset: str) -> None:
    evaluator = VideoPanopticEvaluator(dataset)
    frame = DatasetCatalog.get(dataset)[0]["frames"][0]
    maps = torch.from_numpy(scene(0))
    for segments, message in (
        ([{"id": 1, **ROAD}], r"ids \[2\]"),
        ([{"id": 1, **ROAD}, {"id": 2, "category_id": 5, "isthing": True}], "thing class 5"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluator.process([frame], [{"panoptic_seg": (maps, segments)}])
    with pytest.raises(ValueError, match=r"\(32, 31\)"):
        evaluator.process([frame], [{"panoptic_seg": (maps[:, 1:] * 0, [])}])


def test_warnings(dataset: str, caplog: pytest.LogCaptureFixture) -> None:
    first, second = DatasetCatalog.get(dataset)
    first["frames"][0]["segments_info"][1]["area"] = 65  # 64 in the PNG
    del first["frames"][2]["pan_seg_file_name"]
    evaluator = VideoPanopticEvaluator(dataset)
    for frame in [*first["frames"], *second["frames"]]:
        segments = [
            {"id": 1, **ROAD},
            {"id": 2, **CAR, "track_id": -1 if frame["frame"] == 6 else 1},
        ]
        output = {"panoptic_seg": (torch.from_numpy(scene(frame["frame"])), segments)}
        evaluator.process([frame], [output])
    with caplog.at_level(logging.WARNING):
        scores = evaluator.evaluate()["video_panoptic_seg"]
    assert "1 annotated segments state another area" in caplog.text
    assert "it is 2 frames, but 1 times it is another" in caplog.text
    assert "2 predicted things have no track_id" in caplog.text
    assert scores["VPQ_0_th"] == pytest.approx(100 * (6 + 64 / 65) / 7)


def test_written_predictions(dataset: str, tmp_path: Path) -> None:
    """They are a panoptic video themselves, with ids that stay."""
    run(dataset, tmp_path / "out", lambda video, t: 70_000 + video)
    content = read_panoptic_json(str(tmp_path / "out/panoptic_video.json"))
    assert [i["id"] for i in content["images"]] == [0, 2, 4, 6, 100, 102, 104, 106]
    ids = {c["name"]: c["id"] for c in content["categories"]}
    assert ids == {"truck": 10, "car": 11, "road": 12}
    colors = set()
    for entry in content["annotations"]:
        path = tmp_path / "out/panoptic_video" / entry["file_name"]
        places = read_segments(str(path), entry["segments_info"])
        t = entry["image_id"] % 100
        np.testing.assert_array_equal(places == 2, scene(t) == 2)
        road, car = entry["segments_info"]
        assert (road["category_id"], car["category_id"], car["area"]) == (12, 11, 64)
        assert "track_id" not in road and car["track_id"] == 70_000 + entry["image_id"] // 100
        colors.add((entry["image_id"] // 100, car["id"]))
    assert len(colors) == 2


def test_analysis(dataset: str, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.TEST.ANALYZE, cfg.TEST.VPQ_WINDOWS = True, (0, 2)
    for video in DatasetCatalog.get(dataset):
        for frame in video["frames"]:
            frame["file_name"] = str(tmp_path / f"image_{frame['image_id']}.png")
            Image.new("RGB", (SIZE, SIZE), (90, 60, 30)).save(frame["file_name"])
    run(dataset, tmp_path / "out", lambda video, t: 4 if video and t == 4 else 3, cfg=cfg)
    worst, best = json.loads((tmp_path / "out/analysis/clips.json").read_text())["clips"]
    assert (worst["video_id"], worst["id_switches"], best["id_switches"]) == (1, 2, 0)
    assert best["VPQ"] == pytest.approx(100) and worst["VPQ_0"] == pytest.approx(100)
    # Of 3 windows of two frames 1 is right; the others have two halves each.
    assert worst["VPQ_2_th"] == pytest.approx(100 / 4)
    shared = {"category": "car", "track_id": 7}
    assert worst["switches"] == [
        {"frame": 4, "image_id": 104, **shared, "before": 3, "after": 4},
        {"frame": 6, "image_id": 106, **shared, "before": 4, "after": 3},
    ]
    pictures = sorted((tmp_path / "out/analysis/worst_clips").iterdir())
    assert [p.name for p in pictures] == ["00_1.png", "01_0.png"]
    reds = [
        int((np.asarray(Image.open(p)).reshape(-1, 3) == (255, 0, 0)).all(axis=1).sum())
        for p in pictures
    ]
    assert reds[0] > 2000 and reds[1] == 0  # frames with changes are marked


def test_analysis_of_things_without_ids(dataset: str, tmp_path: Path) -> None:
    output, analysis = str(tmp_path / "out"), str(tmp_path / "analysis")
    evaluator = VideoPanopticEvaluator(dataset, output, analysis_dir=analysis)
    for video in DatasetCatalog.get(dataset):
        for frame in video["frames"]:
            maps = torch.from_numpy(scene(frame["frame"]))
            evaluator.process(
                [frame], [{"panoptic_seg": (maps, [{"id": 1, **ROAD}, {"id": 2, **CAR}])}]
            )
    assert evaluator.evaluate()["video_panoptic_seg"]["VPQ_0"] == pytest.approx(100)
    clips = json.loads((tmp_path / "analysis/clips.json").read_text())["clips"]
    assert [clip["id_switches"] for clip in clips] == [0, 0]
    # There are no images: they are grey.
    picture = np.asarray(Image.open(tmp_path / "analysis/worst_clips/00_0.png"))
    assert (picture[100, 100] == 128).all()


def test_published_numbers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The fixture of test_vpq.py as a data set, its stuff known by its class."""
    folder = Path(__file__).resolve().parents[1] / "reference/vpsnet/vpq"
    expected = np.load(folder / "outputs.npz")
    given = json.loads((folder / "manifest.json").read_text())["inputs"]
    things, stuff = (
        [c for c in given["categories"] if c["isthing"] == isthing] for isthing in (1, 0)
    )
    numbers = {c["id"]: i for i, c in enumerate(things)}
    numbers.update({c["id"]: i for i, c in enumerate(stuff, 1)})

    def segments(kind: str, i: int) -> list[dict[str, Any]]:
        result = []
        for s in given[f"{kind}_segments_info"][i]:
            isthing = s["category_id"] in [c["id"] for c in things]
            track = {"track_id": s["id"]} if isthing else {}
            result.append(
                {**s, **track, "category_id": numbers[s["category_id"]], "isthing": isthing}
            )
        return result

    frames = []
    for i, ids in enumerate(expected["gt_ids"]):
        Image.fromarray(id2rgb(ids)).save(tmp_path / f"{i}.png")
        files = {"file_name": f"{i}.jpg", "pan_seg_file_name": str(tmp_path / f"{i}.png")}
        sizes = {"height": ids.shape[0], "width": ids.shape[1]}
        place = {"image_id": i, "video_id": i // 6, "frame": 4 + i % 6 * 5}
        frames.append({**files, **sizes, **place, "segments_info": segments("gt", i)})
    videos = [{"video_id": v, "frames": frames[6 * v : 6 * v + 6]} for v in range(2)]
    DatasetCatalog.register("vpq_fixture", lambda: videos)
    request.addfinalizer(lambda: DatasetCatalog.remove("vpq_fixture"))
    request.addfinalizer(lambda: MetadataCatalog.remove("vpq_fixture"))
    MetadataCatalog.get("vpq_fixture").set(
        thing_classes=[c["name"] for c in things],
        stuff_classes=["things", *(c["name"] for c in stuff)],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(things)},
        stuff_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(stuff, 1)},
    )
    evaluator = VideoPanopticEvaluator("vpq_fixture", windows=(15, 5, 10, 0))
    for i, ids in enumerate(expected["pred_ids"].astype(np.int64)):
        output = torch.from_numpy(ids), segments("pred", i)
        evaluator.process([{"image_id": i}], [{"panoptic_seg": output}])
    scores = evaluator.evaluate()["video_panoptic_seg"]
    for group, suffix in enumerate(("", "_th", "_st")):
        each = [scores[f"VPQ_{k}{suffix}"] for k in given["windows_k"]]
        np.testing.assert_allclose(each, expected["vpq_all_things_stuff"][:, group], rtol=1e-6)
        assert scores[f"VPQ{suffix}"] == pytest.approx(float(expected["vpq"][group]), rel=1e-6)


def test_visibility(dataset: str, tmp_path: Path) -> None:
    for video in DatasetCatalog.get(dataset):
        for frame in video["frames"][::2]:
            frame["segments_info"][1]["visibility"] = 0.2 if frame["frame"] == 0 else 0.8
    results = run(dataset, tmp_path, lambda video, t: 3, left_out=(0,))
    visibility = results["video_panoptic_visibility"]
    assert visibility["tubes_0_hidden"] == 2 and visibility["recall_0_hidden"] == 50
    assert visibility["tubes_0_visible"] == 6 and visibility["recall_0_visible"] == 100
    written = json.loads((tmp_path / "vpq.json").read_text())["results"]
    assert written["iou_0_hidden"] == 50


def test_several_processes(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluators = [
        VideoPanopticEvaluator(dataset, str(tmp_path / "out"), windows=(2, 0)) for _ in range(2)
    ]
    for rank, video in enumerate(DatasetCatalog.get(dataset)):
        for frame in video["frames"]:
            track = 2 if rank and frame["frame"] >= 4 else 1
            segments = [{"id": 1, **ROAD}, {"id": 2, **CAR, "track_id": track}]
            maps = torch.from_numpy(scene(frame["frame"]))
            evaluators[rank].process([frame], [{"panoptic_seg": (maps, segments)}])
    sent: list[bytes] = []
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda data, dst: sent.append(pickle.dumps(data)) or [])
    assert evaluators[1].evaluate() is None
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    monkeypatch.setattr(comm, "gather", lambda data, dst: [data, *map(pickle.loads, sent)])
    first = evaluators[0].evaluate()
    assert evaluators[0].evaluate() == first
    scores = first["video_panoptic_seg"]
    # Of 6 windows of two frames 5 are right.
    assert scores["VPQ_0"] == 100 and scores["VPQ_2_th"] == pytest.approx(100 * 5 / 6.5)
    assert scores["AQ"] == pytest.approx(75)
    written = json.loads((tmp_path / "out/panoptic_video.json").read_text())
    assert (
        len(written["annotations"]) == len(list((tmp_path / "out/panoptic_video").iterdir())) == 8
    )


def test_shapes_have_visibility(tmp_path: Path) -> None:
    frame = load_shapes_video(VideoSet("val", 1, 64, 64, length=10, every=5), "panoptic")[0][
        "frames"
    ][9]
    things = [s for s in frame["segments_info"] if s["isthing"]]
    assert all(0 < s["visibility"] <= 1 for s in things) and things
    assert all("visibility" not in s for s in frame["segments_info"] if not s["isthing"])


def test_things_without_ids_are_new_in_every_frame(dataset: str) -> None:
    evaluator = VideoPanopticEvaluator(dataset, windows=(0, 2))
    for video in DatasetCatalog.get(dataset):
        for frame in video["frames"]:
            track = {"track_id": 1} if frame["frame"] < 4 else {}
            segments = [{"id": 1, **ROAD}, {"id": 2, **CAR, **track}]
            maps = torch.from_numpy(scene(frame["frame"]))
            evaluator.process([frame], [{"panoptic_seg": (maps, segments)}])
    scores = evaluator.evaluate()["video_panoptic_seg"]
    # Of 3 windows of two frames 1 is right; the others have two halves each.
    assert scores["VPQ_0_th"] == pytest.approx(100) and scores["VPQ_2_th"] == pytest.approx(25)
