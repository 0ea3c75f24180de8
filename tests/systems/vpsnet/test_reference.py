"""VPSNet against the published implementation: the fixtures in tests/reference/vpsnet."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.checkpoint.convert import apply_rules
from d2ext.data.video.cityscapes_vps import read_train
from d2ext.data.video.register import register_videos
from d2ext.systems.upsnet.boxes import end_behind, inclusive
from d2ext.systems.vpsnet import losses as L
from d2ext.systems.vpsnet.checkpoint import _RULES
from d2ext.systems.vpsnet.head import (
    FusionNeck,
    TrackHead,
    match_logits,
    quarter_flow,
)
from d2ext.systems.vpsnet.model import VPSNet
from d2ext.systems.vpsnet.postprocess import (
    ObjectMemory,
    assign_objects,
    match_scores,
    track,
)
from d2ext.systems.vpsnet.roi_heads import VPSNetRoIAlign
from d2ext.systems.vpsnet.rpn import rounded_anchors
from d2ext.systems.vpsnet.targets import match_targets
from tests.reference.fixture import Fixture, draw_image, draw_tensor
from tests.systems.fixture_files import first_batch

REFERENCE = Path(__file__).parents[2] / "reference" / "vpsnet"
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4
CONFIG = "vpsnet/vpsnet_fusetrack_R_50_cityscapes_vps.yaml"
WEIGHTS = (1.0, 2.0, 10.0)


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draw_tensor(name, shape, 0))


def check(fixture: Fixture, outputs: dict[str, Tensor]) -> None:
    for name, value in outputs.items():
        assert fixture.compare(name, value.detach().numpy()) < RAW_TOLERANCE, name


def converted(fixture: Fixture, prefix: str) -> dict[str, Tensor]:
    """The fixture's parameters of one of our modules."""
    published = {k: torch.from_numpy(v) for k, v in fixture.state_dict().items()}
    return {k.removeprefix(prefix): v for k, v in apply_rules(published, _RULES).items()}


# ---------------------------------------------------------------- parts


def test_fusion_neck() -> None:
    fixture = Fixture(REFERENCE / "fuse_neck")
    neck = FusionNeck(256, published_warp=True)
    neck.load_state_dict(converted(fixture, "fusion."), strict=True)
    sizes = {f"p{i + 2}": (1, 256, 32 >> i, 48 >> i) for i in range(5)}
    current = {k: drawn(f"current.{k}", shape) for k, shape in sizes.items()}
    reference = {
        k: 0.6 * x.roll((1, 2), (2, 3)) + 0.5 * drawn(f"reference.{k}", tuple(x.shape))
        for k, x in current.items()
    }
    flow = 2 * F.interpolate(drawn("flow", (1, 2, 8, 12)), scale_factor=4, mode="bilinear")
    with torch.no_grad():
        gathered = neck.gather(current)
        warped = neck.warp(neck.gather(reference), flow)
        residual = neck.correct(gathered, warped, flow)
        final = neck.warp(warped, residual)
        fused = neck.attend(gathered, final)
        levels = neck(current, gathered, neck.gather(reference), flow)
    check(
        fixture,
        {
            "gathered": gathered,
            "warp_initial": warped,
            "residual_flow": residual,
            "warp_final": final,
            "fused": fused,
            **levels,
        },
    )


@pytest.fixture(scope="module")
def track_case() -> tuple[Fixture, TrackHead]:
    fixture = Fixture(REFERENCE / "track_head")
    head = TrackHead(256 * 49).requires_grad_(False)
    head.load_state_dict(converted(fixture, "track_head."), strict=True)
    return fixture, head


def detections(frame: list[dict[str, Any]]) -> Instances:
    result = Instances((128, 256))
    result.pred_boxes = Boxes(end_behind(torch.tensor([x["box"] for x in frame]).float()))
    result.pred_classes = torch.tensor([x["class"] - 1 for x in frame])
    result.scores = torch.tensor([x["score"] for x in frame])
    return result


def region_features(fixture: Fixture, number: int) -> Tensor:
    frame = fixture.manifest["inputs"]["frames"][number]
    shape = (256, 7, 7)
    return 0.15 * torch.stack(
        [
            drawn(f"object.{x['object']}", shape) + 0.35 * drawn(f"noise.{number}.{i}", shape)
            for i, x in enumerate(frame)
        ]
    )


def test_ids_of_three_frames(track_case: tuple[Fixture, TrackHead]) -> None:
    fixture, head = track_case
    expected = fixture.expected
    memory = ObjectMemory.empty(1024, torch.device("cpu"))
    features: dict[int, Tensor] = {}
    for number, frame in enumerate(fixture.manifest["inputs"]["frames"]):
        candidates, regions = detections(frame), region_features(fixture, number)
        embeddings = head(regions)
        if number:
            logits = match_logits(embeddings, memory.embeddings)
            scores = match_scores(candidates, embeddings, memory, WEIGHTS)
            name = f"frame{number}"
            iou = pairwise_iou(candidates.pred_boxes, Boxes(memory.boxes))
            check(
                fixture,
                {
                    f"{name}.match_score": logits,
                    f"{name}.log_softmax": logits.log_softmax(dim=1),
                    f"{name}.iou": iou,
                    f"{name}.comprehensive_score": scores,
                },
            )
        ids, memory = track(candidates, embeddings, memory, weights=WEIGHTS)
        np.testing.assert_array_equal(ids - 1, expected[f"frame{number}.ids"])
        np.testing.assert_allclose(
            inclusive(memory.boxes), expected[f"frame{number}.remembered_boxes"]
        )
        np.testing.assert_array_equal(memory.classes, expected[f"frame{number}.remembered_labels"])
        # The published memory holds the features of the regions; ours, what the head makes of them.
        features |= {int(i): region for i, region in zip(ids, regions, strict=True)}
        remembered = torch.stack([features[int(i)] for i in memory.ids])
        np.testing.assert_allclose(head(remembered), memory.embeddings, atol=1e-4)
        norms = remembered.flatten(1).norm(dim=1)
        np.testing.assert_allclose(
            norms, expected[f"frame{number}.remembered_feature_norm"], rtol=1e-5
        )


def test_ids_from_given_scores(track_case: tuple[Fixture, TrackHead]) -> None:
    """Displaced candidates, and new objects of both kinds, in four frames."""
    fixture, _ = track_case
    memory = ObjectMemory.empty(1, torch.device("cpu"))
    for number, frame in enumerate(fixture.manifest["inputs"]["given"]):
        candidates = Instances((128, 256))
        candidates.pred_boxes = Boxes(end_behind(torch.tensor(frame["boxes"])))
        candidates.pred_classes = torch.tensor(frame["classes"])
        candidates.scores = torch.tensor(frame["scores"])
        embeddings = torch.zeros((len(candidates), 1))
        if number:
            # With embeddings of 0 the log-softmax of the match is the same for all columns.
            count = len(memory.ids)
            scores = match_scores(candidates, embeddings, memory, WEIGHTS) + np.log(count + 1)
            scores = scores + torch.tensor(frame["match"]).log_softmax(dim=1)
            check(fixture, {f"given.frame{number}.comprehensive_score": scores})
            index, new = assign_objects(scores.numpy())
            index[new] = np.arange(len(new)) + count
            np.testing.assert_array_equal(index, fixture.expected[f"given.frame{number}.ids"])
            # The next frame's memory, by the published rule: a winner's box, in the order of the ids.
            boxes = torch.cat([memory.boxes, torch.zeros((len(new), 4))])
            boxes[index] = candidates.pred_boxes.tensor
            classes = torch.cat([memory.classes, candidates.pred_classes[new]])
            ids = torch.arange(len(classes)) + 1
            memory = ObjectMemory(boxes, torch.zeros((len(ids), 1)), classes, ids, ids * 0)
        else:
            ids, memory = track(candidates, embeddings, memory, weights=WEIGHTS)
            np.testing.assert_array_equal(ids - 1, fixture.expected["given.frame0.ids"])


def test_match_loss(track_case: tuple[Fixture, TrackHead]) -> None:
    fixture, head = track_case
    logits = match_logits(*(head(region_features(fixture, i)) for i in (1, 0)))
    check(fixture, {"train.match_score": logits})
    positive = fixture.expected["train.weights"] > 0
    targets = torch.from_numpy(fixture.expected["train.target_ids"]).long()
    loss = L.match_loss([logits[positive]], [targets[positive]])
    np.testing.assert_allclose(0.5 * loss, fixture.expected["train.loss_match"][0], rtol=1e-5)


def test_operators() -> None:
    fixture = Fixture(REFERENCE / "operators")
    rois = torch.tensor(fixture.manifest["inputs"]["rois"])
    feature = drawn("a", (1, 16, 20, 28))
    for size, stride in ((7, 4), (14, 8)):
        pooled = VPSNetRoIAlign(size, [stride])([feature], [Boxes(end_behind(rois[:, 1:]))])
        check(fixture, {f"roi_align_{size}": pooled})
    anchors = [rounded_anchors(s, [8 * s], [0.5, 1, 2]) for s in (4, 8, 16, 32, 64)]
    np.testing.assert_array_equal(inclusive(torch.stack(anchors)), fixture.expected["anchors"])
    sides = torch.tensor([20.0, 111, 112, 113, 223, 224, 300, 447, 448, 449, 900])
    squares = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    levels = VPSNetRoIAlign(7, [4, 8, 16, 32]).levels(squares)
    np.testing.assert_array_equal(levels, fixture.expected["roi_level"])


# ---------------------------------------------------------------- the whole model


def build(fixture: Fixture, **upsnet: Any) -> VPSNet:
    """The published model with the fixture's weights."""
    cfg = model_zoo.get_config(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 100
    cfg.MODEL.UPSNET.TEST.update(upsnet)
    model: VPSNet = build_model(cfg)
    published = {k: torch.from_numpy(v) for k, v in fixture.state_dict().items()}
    model.load_state_dict(convert_state_dict("vpsnet", published), strict=True)
    return model


def frame_of(fixture: Fixture, first: int) -> Tensor:
    """256 columns of the fixture's image, from ``first`` on: (3, H, 256) RGB."""
    frames = fixture.manifest["inputs"]["frames"]
    image = draw_image(frames["height"], frames["width"], frames["seed"])
    columns = image[:, first : first + 256, ::-1]
    return torch.from_numpy(columns.astype(np.float32).transpose(2, 0, 1).copy())


class VideoCase:
    """The fixture ``fusetrack_3frames`` and what we compute for it."""

    def __init__(self) -> None:
        self.fixture = Fixture(REFERENCE / "fusetrack_3frames")
        self.expected = self.fixture.expected
        self.model = build(self.fixture, STUFF_AREA_LIMIT=200).eval()
        self.inputs = [
            {"image": frame_of(self.fixture, 4 * t), "video_id": 1, "frame": t} for t in range(3)
        ]
        self.predictions: list[Any] = []
        self.flows: list[Tensor] = []
        self.candidates: list[Instances] = []
        self.scores: list[Tensor] = []
        self.maps: list[Any] = []
        self.outputs: list[dict[str, Any]] = []
        spied = {
            (self.model, "_predict"): self.predictions,
            (self.model, "predict_flow"): self.flows,
            (self.model, "_candidates"): self.candidates,
            (self.model.postprocessor, "fuse"): self.maps,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.model.inference_network, "decode", lambda x: x)  # keeps the features
            for (owner, name), results in spied.items():
                patch.setattr(owner, name, _recorded(getattr(owner, name), results))
            memory = None
            self.memories = []
            for x in self.inputs:
                outputs, memory = self.model.step([x], memory)
                self.outputs += outputs
                self.memories.append(memory)


def _recorded(function: Any, results: list[Any]) -> Any:
    def recorded(*args: Any) -> Any:
        results.append(function(*args))
        return results[-1]

    return recorded


@pytest.fixture(scope="module")
def video() -> VideoCase:
    return VideoCase()


def test_flow(video: VideoCase) -> None:
    for t, flow in enumerate(video.flows):
        check(
            video.fixture,
            {f"frame{t}.flow.full": flow, f"frame{t}.fuse.quarter_flow": quarter_flow(flow)},
        )


@pytest.mark.parametrize("t", range(3))
def test_network(video: VideoCase, t: int) -> None:
    _, predictions = video.predictions[t]
    levels = ["p2", "p3", "p4", "p5", "p6"] if t == 1 else ["p2", "p3", "p6"]
    outputs = {f"fuse.{name}": predictions.features[name] for name in levels}
    for level, logits in zip(("p2", "p3", "p4", "p5", "p6"), predictions.logits, strict=True):
        height, width = predictions.features[level].shape[-2:]
        maps = logits.view(1, height, width, 3).permute(0, 3, 1, 2)
        outputs[f"rpn.cls_score.{level}"] = maps
    outputs["semantic.score"] = predictions.semantic.score
    if t == 1:
        outputs["fuse.gathered"] = predictions.gathered
    check(video.fixture, {f"frame{t}.{name}": value for name, value in outputs.items()})


@pytest.mark.parametrize("t", range(3))
def test_candidates_and_ids(video: VideoCase, t: int) -> None:
    ((candidates, _),) = video.candidates[t]
    expected = {
        name: video.expected[f"frame{t}.{name}"]
        for name in ("candidates.boxes", "candidates.classes", "candidates.scores", "track.ids")
    }
    np.testing.assert_array_equal(candidates.pred_classes + 1, expected["candidates.classes"])
    np.testing.assert_allclose(candidates.scores, expected["candidates.scores"], atol=1e-4)
    boxes = inclusive(candidates.pred_boxes.tensor)
    np.testing.assert_allclose(boxes, expected["candidates.boxes"], atol=0.05)
    check(video.fixture, {f"frame{t}.candidates.mask_logits": candidates.mask_logits})
    np.testing.assert_array_equal(candidates.track_ids - 1, expected["track.ids"])
    np.testing.assert_array_equal(candidates.track_ids, video.outputs[t]["instances"].track_ids)
    assert len(video.memories[t].objects[0].ids) == video.expected[f"frame{t}.track.memory_size"]


@pytest.mark.parametrize("t", [1, 2])
def test_match_scores(video: VideoCase, t: int) -> None:
    ((candidates, embeddings),) = video.candidates[t]
    objects = video.memories[t - 1].objects[0]
    logits = match_logits(embeddings, objects.embeddings)
    scores = match_scores(candidates, embeddings, objects, WEIGHTS)
    check(
        video.fixture,
        {
            f"frame{t}.track.match_score": logits,
            f"frame{t}.track.comprehensive_score": scores,
        },
    )


@pytest.mark.parametrize("t", range(3))
def test_panoptic_map(video: VideoCase, t: int) -> None:
    prediction = video.maps[t]
    np.testing.assert_array_equal(prediction.keep, video.expected[f"frame{t}.panoptic.keep"])
    np.testing.assert_array_equal(
        prediction.classes + 1, video.expected[f"frame{t}.panoptic.classes"]
    )
    # The fixture's own check: a change of 1e-6 in the weights moves 3e-5 of the pixels.
    for name, labels in (
        ("panoptic.map", prediction.labels),
        ("semantic.argmax", prediction.semantic),
    ):
        differ = labels.numpy() != video.expected[f"frame{t}.{name}"][0]
        assert differ.mean() < 1e-4, name


@pytest.mark.parametrize("t", [1, 2])
def test_cleaned_map_with_ids(video: VideoCase, t: int) -> None:
    """Also the published fault: ids are looked up by the place among the instances that are there."""
    ids, segments = video.outputs[t]["panoptic_seg"]
    expected = video.expected[f"frame{t}.panoptic.three_channel"]
    semantic, objects = torch.full_like(ids, 255), torch.full_like(ids, 255)
    for segment in segments:
        # Our things come first, Cityscapes' stuff does.
        category = segment["category_id"] + (11 if segment["isthing"] else -1)
        semantic[ids == segment["id"]] = category
        objects[ids == segment["id"]] = segment.get("track_id", category)
    assert (semantic.numpy() != expected[..., 0]).mean() < 1e-4
    things = (expected[..., 0] != 255) & (expected[..., 0] >= 11)
    assert (objects.numpy()[things] != expected[..., 2][things]).mean() < 1e-4
    assert things.any()


def write_training_files(fixture: Fixture, folder: Path) -> None:
    """The pair of frames, as the training part of Cityscapes-VPS in its folder."""
    inputs, expected = fixture.manifest["inputs"], fixture.expected
    (folder / "train/img").mkdir(parents=True)
    (folder / "train/labelmap").mkdir()
    content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": f"thing{i}"} for i in range(11, 19)]
    for t, (gt, column) in enumerate(((inputs["reference_gt"], 0), (inputs["gt"], 8))):
        stem = f"0003_{13 + t:04d}_frankfurt_000000_{t:06d}"
        name = f"{stem}_leftImg8bit.png"
        frame = frame_of(fixture, column).numpy().transpose(1, 2, 0)[:, :, ::-1]
        cv2.imwrite(str(folder / "train/img" / name), frame.astype(np.uint8))
        labels = expected["semantic_label"] if t else np.full((128, 256), 255, np.uint8)
        content["images"].append({"id": t, "file_name": name, "height": 128, "width": 256})
        for i, (x1, y1, x2, y2) in enumerate(gt["boxes"]):
            mask = np.zeros((128, 256), np.uint8)
            mask[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = 1
            if t == 0:  # a reference's masks and labels are not used
                labels[mask > 0] = 10 + gt["labels"][i]
            rle = mask_util.encode(np.asfortranarray(expected["gt_masks"][i] if t else mask))
            annotation = {"image_id": t, "category_id": 10 + gt["labels"][i], "iscrowd": 0}
            annotation |= {"id": len(content["annotations"]) + 1, "inst_id": gt["ids"][i]}
            annotation["bbox"] = [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
            annotation["segmentation"] = {"size": [128, 256], "counts": rle["counts"].decode()}
            content["annotations"].append(annotation)
        cv2.imwrite(str(folder / "train/labelmap" / f"{stem}_gtFine_color.png"), labels)
    (folder / "instances_train_city_vps_rle.json").write_text(json.dumps(content))


class TrainingCase:
    """The fixture ``fusetrack_training``: a pair of frames with annotations, from files through the
    training loader."""

    def __init__(self, folder: Path) -> None:
        self.fixture = Fixture(REFERENCE / "fusetrack_training")
        self.expected = self.fixture.expected
        self.model = build(self.fixture).train()
        write_training_files(self.fixture, folder)
        cfg = model_zoo.get_config(CONFIG)
        cfg.INPUT.AUGMENTATION.NAME = "none"
        cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-1, -1]
        register_videos("vps_fixture", partial(read_train, "vps_fixture", str(folder)))
        try:
            # Both frames are samples; the second one's reference is the first.
            self.batch = first_batch(cfg, "vps_fixture", count=2)[1:]
        finally:
            DatasetCatalog.remove("vps_fixture")
            MetadataCatalog.remove("vps_fixture")
        # Things without an instance, which published data do not have, become void in our reader.
        labels = torch.from_numpy(self.expected["semantic_label"]).long()
        other = self.batch[0]["sem_seg"] != labels
        assert self.batch[0]["sem_seg"][other].eq(255).all() and labels[other].eq(13).all()
        self.batch[0]["sem_seg"] = labels
        images, (self.targets,) = self.model.training_batch(self.batch)
        references = self.model.preprocess([self.batch[0]["reference"]])
        features = self.model.backbone(references)
        flow = self.model.predict_flow(images, references, self.batch)
        gathered = self.model.fusion.gather(features)
        predictions = self.model.network(images, None, flow, gathered)
        self.predictions = predictions._replace(reference=features)
        rpn = self.model.proposal_generator
        self.anchors = rpn.anchor_generator([*predictions.features.values()])

    def stored_anchors(self) -> tuple[Tensor, Tensor]:
        """Labels (A,) and box targets (A, 4), in our order."""
        labels, targets = [], []
        for stride in (4, 8, 16, 32, 64):
            label, target = (
                self.expected[f"rpn.{x}.s{stride}"] for x in ("labels", "bbox_targets")
            )
            labels.append(label.transpose(1, 2, 0).reshape(-1))
            targets.append(target.transpose(2, 3, 0, 1).reshape(-1, 4))
        return torch.from_numpy(np.concatenate(labels)).long(), torch.from_numpy(
            np.concatenate(targets)
        )

    def places(self, name: str, instances: Instances) -> Tensor:
        """Where the fixture's objects are: the data set's reader has another order."""
        boxes = end_behind(torch.tensor(self.fixture.manifest["inputs"][name]["boxes"]))
        equal = (boxes[:, None] == instances.gt_boxes.tensor).all(dim=2)
        assert equal.sum(dim=1).eq(1).all()
        return equal.int().argmax(dim=1)

    def stored_regions(self) -> Instances:
        count = int(self.expected["rcnn.num_pos"])
        classes = torch.from_numpy(self.expected["rcnn.labels"]).long()
        place = self.places("gt", self.targets.instances)
        index = torch.full_like(classes, -1)
        index[:count] = place[torch.from_numpy(self.expected["rcnn.assigned_gt"]).long()]
        return Instances(
            (128, 256),
            proposal_boxes=Boxes(end_behind(torch.from_numpy(self.expected["rcnn.rois"]))),
            gt_classes=torch.where(classes == 0, 8, classes - 1),
            gt_deltas=torch.from_numpy(self.expected["rcnn.bbox_targets"]),
            gt_index=index,
        )


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainingCase:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return TrainingCase(tmp_path_factory.mktemp("cityscapes_vps"))


def test_anchor_labels(training: TrainingCase) -> None:
    """Our drawing differs; what may be drawn, and the targets, do not."""
    rpn = training.model.proposal_generator
    stored, targets = training.stored_anchors()
    every = torch.cat([x.tensor for x in training.anchors])
    drawn_labels, _ = rpn.label_and_sample_anchors(
        training.anchors, [training.targets.rpn_instances]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpn, "_subsample_labels", lambda label: label)
        (labels,), (boxes,) = rpn.label_and_sample_anchors(
            training.anchors, [training.targets.rpn_instances]
        )
    counts = training.expected["rpn.num_pos_neg"].tolist()
    assert [int((drawn_labels[0] == x).sum()) for x in (1, 0)] == counts
    assert bool((labels[stored >= 0] == stored[stored >= 0]).all())
    assert int((labels == 1).sum()) == counts[0]
    positive = stored == 1
    deltas = rpn.box2box_transform.get_deltas(every[positive], boxes[positive])
    np.testing.assert_allclose(deltas, targets[positive], atol=1e-5)


def test_region_targets(training: TrainingCase) -> None:
    """The stored regions, offered as proposals, get the stored classes, objects and targets."""
    stored = training.stored_regions()
    count = len(training.targets.instances)
    # The first ones are the objects' boxes, which are added.
    own = training.targets.instances.gt_boxes.tensor
    rest = (stored.proposal_boxes.tensor[:, None] - own).abs().amax(-1).amin(1) > 1e-3
    proposals = Instances((128, 256), proposal_boxes=stored.proposal_boxes[rest])
    sampled = training.model.roi_heads.sample(proposals, training.targets)
    ours = {tuple(b): i for i, b in enumerate(sampled.proposal_boxes.tensor.tolist())}
    pairs = [
        (i, ours[tuple(box)])
        for i, box in enumerate(stored.proposal_boxes.tensor.tolist())
        if tuple(box) in ours
    ]
    assert len(pairs) > 500 - count
    positives = 0
    for i, j in pairs:
        assert sampled.gt_classes[j] == stored.gt_classes[i]
        assert sampled.gt_index[j] == stored.gt_index[i]
        if stored.gt_classes[i] < 8:
            positives += 1
            np.testing.assert_allclose(sampled.gt_deltas[j], stored.gt_deltas[i], atol=1e-4)
    assert positives >= int(training.expected["rcnn.num_pos"]) - count
    regions = stored[stored.gt_classes < 8]
    masks = training.model.roi_heads.mask_targets(regions, training.targets, 28)
    np.testing.assert_array_equal(masks, training.expected["mask.targets"])
    columns = match_targets(regions.gt_index, training.targets)
    # Column 0: no object of the reference.
    place = training.places("reference_gt", training.batch[0]["reference"]["instances"])
    place = torch.cat([torch.zeros(1, dtype=torch.long), place + 1])
    expected = place[torch.from_numpy(training.expected["track.target_ids"]).long()]
    np.testing.assert_array_equal(columns, expected[: len(regions)])


def test_losses_and_gradients(training: TrainingCase, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = training.expected, training.model
    labels, targets = training.stored_anchors()
    every = torch.cat([x.tensor for x in training.anchors])
    boxes = model.proposal_generator.box2box_transform.apply_deltas(targets, every)
    regions = training.stored_regions()
    # What the published code drew at random.
    monkeypatch.setattr(
        model.proposal_generator, "label_and_sample_anchors", lambda *_: ([labels], [boxes])
    )
    monkeypatch.setattr(model.roi_heads, "sample", lambda *_: regions)
    losses = model.losses(training.predictions, [training.targets])
    names = training.fixture.manifest["inputs"]["losses"]
    published = dict(zip(names, expected["losses"].tolist(), strict=True))
    ours = {
        "loss_rpn_cls": published["loss_rpn_cls"],
        "loss_rpn_loc": published["loss_rpn_bbox"],
        "loss_cls": published["loss_cls"],
        "loss_box_reg": published["loss_bbox"],
        "loss_match": published["loss_match"],
        "loss_mask": published["loss_mask"],
        "loss_sem_seg": published["loss_segm"],
        "loss_panoptic": published["loss_pano"],
    }
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(ours, rel=1e-4)
    total = sum(losses.values())
    assert total.item() == pytest.approx(published["loss"], rel=1e-4)
    model.zero_grad()
    total.backward()
    renamed = published_to_ours(training.fixture)
    parameters = dict(model.named_parameters())
    compared = 0
    for name, norm in zip(
        training.fixture.manifest["inputs"]["grad_norms_of"], expected["grad_norms"], strict=True
    ):
        parameter = parameters.get(renamed[name])
        if norm < 0:  # frozen
            assert parameter is None or parameter.grad is None, name
            continue
        assert parameter is not None and parameter.grad is not None, name
        compared += 1
        assert float(parameter.grad.norm()) == pytest.approx(float(norm), rel=1e-3), name
    assert compared > 100


def published_to_ours(fixture: Fixture) -> dict[str, str]:
    """Which published name became which of ours, told by values that differ."""
    tagged = {}
    for i, (name, shape) in enumerate(fixture.manifest["parameters"]):
        tagged[name] = torch.full((shape[0] if shape else 1,), float(i))
    names = {float(v[0]): k for k, v in convert_state_dict("vpsnet", tagged).items()}
    return {n: names[float(v[0])] for n, v in tagged.items() if float(v[0]) in names}
