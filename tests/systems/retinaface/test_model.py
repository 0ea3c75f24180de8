"""RetinaFace beyond the fixture: sizes, options of the papers, published files, odd annotations."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints
from torch import Tensor
from torch.nn import functional as F

from d2ext import model_zoo
from d2ext.checkpoint import ConversionError, convert_state_dict
from d2ext.checkpoint.torchvision import torchvision_backbone
from d2ext.codecs.prior_boxes import BACKGROUND, NEUTRAL
from d2ext.modeling.mobilenet import MobileNetV1
from d2ext.systems.retinaface.losses import RetinaFaceCriterion
from d2ext.systems.retinaface.model import RetinaFace
from d2ext.systems.retinaface.postprocess import Candidates, select
from d2ext.systems.retinaface.targets import match_priors, read_targets
from d2ext.testing import random_inputs, tiny_config
from tests.reference.fixture import Fixture
from tests.systems.retinaface.test_reference import REFERENCE


def _tiny(*options: Any) -> CfgNode:
    cfg = tiny_config("RetinaFace")
    cfg.merge_from_list([*options])
    return cfg


def _build(cfg: CfgNode) -> RetinaFace:
    torch.manual_seed(0)
    return build_model(cfg)


def _settled(cfg: CfgNode) -> RetinaFace:
    return settled(_build(cfg))


def settled(model: RetinaFace) -> RetinaFace:
    """In inference, with statistics of noise in its norms: the initial ones let nothing through."""
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model.network(model.preprocess(_images((96, 96), (96, 96))))
    return model.eval()


def _images(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)}
        for size in sizes
    ]


def test_images_of_several_sizes_as_if_alone() -> None:
    model = _settled(_tiny())
    inputs = _images((61, 83), (40, 50), (61, 83), (33, 97))
    inputs[2]["height"], inputs[2]["width"] = 122, 83
    together = [x["instances"] for x in model(inputs)]
    for x, expected in zip(inputs, together, strict=True):
        alone = model([x])[0]["instances"]
        assert len(alone) == len(expected) > 0
        for name in ("pred_boxes", "pred_keypoints"):
            one, other = (getattr(y.get(name), "tensor", y.get(name)) for y in (alone, expected))
            torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    assert [x.image_size for x in together] == [(61, 83), (40, 50), (122, 83), (33, 97)]
    plain = model([{"image": inputs[2]["image"]}])[0]["instances"]
    doubled = plain.pred_boxes.tensor * torch.tensor([1, 2, 1, 2])
    torch.testing.assert_close(together[2].pred_boxes.tensor, doubled, atol=4e-3, rtol=0)
    doubled = plain.pred_keypoints * torch.tensor([1, 2, 1])
    torch.testing.assert_close(together[2].pred_keypoints, doubled, atol=4e-3, rtol=0)


def test_a_padded_training_batch_has_the_targets_of_each_image() -> None:
    model = _build(_tiny())
    inputs = random_inputs(1, height=64, width=64) + random_inputs(1, height=32, width=48)
    encoded = []
    for batch in (inputs, inputs[1:]):
        images, targets = model.training_batch(batch)
        predictions = model.network(images)
        priors = model.priors(predictions.feature_sizes, predictions.input_size)
        target = targets[-1]
        match = match_priors(priors, target.boxes, target.classes)
        height, width = predictions.input_size
        places = (priors[match.labels > 0] * torch.tensor([width, height, width, height])).round()
        encoded.append(sorted(places.tolist()))
    assert encoded[0] == encoded[1] != []


@pytest.mark.parametrize("size", [(30, 50), (60, 40)])
def test_images_are_resized_as_published(size: tuple[int, int]) -> None:
    sizes = ("MODEL.RETINAFACE.TEST.MIN_SIZE", 64, "MODEL.RETINAFACE.TEST.MAX_SIZE", 90)
    model = _settled(_tiny(*sizes))
    inputs = _images(size)
    image = inputs[0]["image"].permute(1, 2, 0).numpy().astype(np.float32)
    factor = 90 / max(size) if round(64 / min(size) * max(size)) > 90 else 64 / min(size)
    expected = cv2.resize(image, None, fx=factor, fy=factor) - np.float32([104, 117, 123])
    actual = model.preprocess(inputs)[0].permute(1, 2, 0)
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    # Boxes of the whole image come back in its pixels.
    plain = _settled(_tiny())
    resized = {"image": torch.from_numpy(cv2.resize(image, None, fx=factor, fy=factor))}
    resized["image"] = resized["image"].permute(2, 0, 1)
    plain.clip_boxes = model.clip_boxes = False
    # Candidates, not detections: NMS counts whole pixels of the image.
    plain.nms_threshold = model.nms_threshold = 1.1
    of_resized = plain([resized])[0]["instances"].pred_boxes.tensor
    of_image = model(inputs)[0]["instances"].pred_boxes.tensor
    torch.testing.assert_close(of_image * factor, of_resized, atol=1e-2, rtol=0)


def test_pictures_resized_before_are_not_resized_again(caplog: pytest.LogCaptureFixture) -> None:
    cfg = _tiny("MODEL.RETINAFACE.TEST.MIN_SIZE", 64, "INPUT.MIN_SIZE_TEST", 100)
    assert _build(cfg).min_size == 0
    assert "INPUT.MIN_SIZE_TEST" in caplog.text


def test_boxes_are_clipped_on_request_alone() -> None:
    model = _settled(_tiny())
    inputs = _images((40, 50))
    clipped = model(inputs)[0]["instances"].pred_boxes.tensor
    model.clip_boxes = False
    free = model(inputs)[0]["instances"].pred_boxes.tensor
    assert free.amin() < 0
    high = torch.tensor([50.0, 40.0, 50.0, 40.0])
    torch.testing.assert_close(clipped, free.clamp(min=0).minimum(high))


def test_the_papers_network_trains() -> None:
    cfg = model_zoo.get_config("retinaface/R_50_dcn_5level_wider.yaml")
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    )
    cfg.merge_from_list(["MODEL.RETINAFACE.FPN_CHANNELS", 16])
    model = _build(cfg)
    assert len(model.head.logits) == 1 and len(model.head.context) == 5
    assert model.head.strides == [4, 8, 16, 32, 64]
    inputs = random_inputs(2, height=70, width=90)
    for x in inputs:
        x["instances"].gt_classes[:] = 0
        points = x["instances"].gt_keypoints.tensor
        x["instances"].gt_keypoints = Keypoints(torch.cat([points, points[:, :2]], dim=1))
    sum(model(inputs).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    result = model.eval()(_images((70, 90)))[0]["instances"]
    assert result.pred_keypoints.shape[1:] == (5, 3)


def test_boxes_alone() -> None:
    model = _build(_tiny("MODEL.KEYPOINT_ON", False))
    inputs = random_inputs(1)
    inputs[0]["instances"].remove("gt_keypoints")
    assert set(model(inputs)) == {"loss_box", "loss_class"}
    assert not model.eval()(inputs)[0]["instances"].has("pred_keypoints")


# Matching and losses


def test_matching_quirks() -> None:
    # Priors side by side, of 0.1; in centre form.
    priors = torch.tensor([[0.05 + 0.1 * i, 0.05, 0.1, 0.1] for i in range(5)])
    corner = torch.tensor([0.0, 0.0, 0.1, 0.1])
    boxes = torch.stack(
        [
            corner,
            corner + torch.tensor([0.01, 0.0, 0.0, 0.0]),  # the same best prior: the last has it
            torch.tensor([0.205, 0.0, 0.225, 0.1]),  # IoU 0.2 with prior 2: forced
            torch.tensor([0.41, 0.01, 0.42, 0.02]),  # IoU 0.01: dropped
        ]
    )
    classes = torch.zeros(4, dtype=torch.int64)
    labels, faces = match_priors(priors, boxes, classes, forced_iou=0.19)
    assert labels.tolist() == [1, BACKGROUND, 1, BACKGROUND, BACKGROUND]
    assert faces[[0, 2, 4]].tolist() == [1, 2, 3]
    # The dropped face takes over a positive prior.
    boxes[2] = corner + torch.tensor([0.4, 0.0, 0.4, 0.0])
    labels, faces = match_priors(priors, boxes, classes)
    assert labels.tolist() == [1, BACKGROUND, BACKGROUND, BACKGROUND, 1]
    assert faces[4] == 3
    # No face is matched well enough: no positives at all.
    labels, _ = match_priors(priors, boxes[3:], classes[3:])
    assert (labels == BACKGROUND).all()
    labels, _ = match_priors(priors, boxes[2:3] * 0.99, classes[2:3], positive_iou=0.99)
    assert (labels[4], NEUTRAL in labels) == (1, False)
    boxes = torch.cat([boxes[2:3], boxes[2:3] - torch.tensor([0.05, 0.0, 0.05, 0.0])])
    labels, _ = match_priors(priors, boxes, classes[:2], positive_iou=0.5, negative_iou=0.3)
    assert labels[4] == 1 and labels[3] in (1, NEUTRAL)


def test_only_annotated_points_are_trained() -> None:
    model = _build(_tiny())
    inputs = random_inputs(1)
    keypoints = inputs[0]["instances"].gt_keypoints.tensor
    keypoints[0, :, 2] = 0
    keypoints[1:, 0, 2] = 0
    images, targets = model.training_batch(inputs)
    predictions = model.network(images)
    losses = model.losses(predictions, targets)
    keypoints[0] = 1e6 * (1 - keypoints.new_tensor([0, 0, 1]))
    keypoints[1:, 0, :2] = -1e6
    _, far_away = model.training_batch(inputs)
    again = model.losses(predictions, far_away)
    assert losses["loss_landmark"].item() == again["loss_landmark"].item() > 0
    keypoints[..., 2] = 0
    _, nothing = model.training_batch(inputs)
    losses = model.losses(predictions, nothing)
    assert losses["loss_landmark"].item() == 0 and losses["loss_box"].item() > 0


def test_negatives_of_the_batch_and_of_empty_images() -> None:
    logits = torch.zeros(2, 4, 2)
    logits[0, :, 1] = torch.tensor([5.0, 1.0, 0.5, 0.0])
    logits[1, :, 1] = torch.tensor([4.0, 3.0, 2.0, 0.1])
    labels = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    by_image = RetinaFaceCriterion(negatives_per_positive=2)
    assert by_image.mine(logits, labels).tolist() == [[False, True, True, False], [False] * 4]
    by_batch = RetinaFaceCriterion(negatives_per_positive=2, mining="batch")
    assert by_batch.mine(logits, labels).tolist() == [[False] * 4, [True, True, False, False]]
    empty = RetinaFaceCriterion(negatives_per_positive=2, min_negatives=1)
    assert empty.mine(logits, labels).sum(dim=1).tolist() == [2, 1]
    both = RetinaFaceCriterion(negatives_per_positive=2, min_negatives=2, mining="batch")
    assert both.mine(logits, labels).sum(dim=1).tolist() == [1, 3]
    with pytest.raises(ValueError, match="MINING"):
        RetinaFaceCriterion(mining="pool")


def test_odd_annotations() -> None:
    instances = Instances((50, 60))
    instances.gt_boxes = Boxes(
        torch.tensor([[5.0, 5, 5, 20], [-10.0, 30, 12, 60], [0.0, 0, 60, 50], [9.0, 9, 9, 9]])
    )
    instances.gt_classes = torch.zeros(4, dtype=torch.int64)
    instances.gt_keypoints = Keypoints(torch.zeros(4, 3, 3))
    inputs = {"image": torch.zeros(3, 50, 60), "instances": instances}
    targets = read_targets(inputs, (50, 60), 3, torch.device("cpu"))
    assert len(targets.boxes) == 2  # those without area are left out, half outside is fine
    model = _build(_tiny())
    losses = model([inputs])
    assert all(torch.isfinite(x) for x in losses.values())
    crowd = Instances((50, 60))
    x, y = torch.rand(2, 1000) * 50
    crowd.gt_boxes = Boxes(torch.stack([x, y, x + 6, y + 7], dim=1))
    crowd.gt_classes = torch.zeros(1000, dtype=torch.int64)
    crowd.gt_keypoints = Keypoints(torch.rand(1000, 3, 3) * 50)
    assert all(torch.isfinite(x) for x in model([inputs | {"instances": crowd}]).values())
    with pytest.raises(ValueError, match=r"NUM_KEYPOINTS is 5"):
        read_targets(inputs, (50, 60), 5, torch.device("cpu"))
    instances.remove("gt_keypoints")
    with pytest.raises(ValueError, match="KEYPOINT_ON"):
        read_targets(inputs, (50, 60), 3, torch.device("cpu"))


# Post-processing


def _plain_nms(boxes: Tensor, threshold: float) -> list[int]:
    keep: list[int] = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        area = (x2 - x1 + 1) * (y2 - y1 + 1)
        for j in keep:
            a1, b1, a2, b2 = boxes[j].double().tolist()
            width = max(0, min(x2, a2) - max(x1, a1) + 1)
            height = max(0, min(y2, b2) - max(y1, b1) + 1)
            other = (a2 - a1 + 1) * (b2 - b1 + 1)
            if width * height / (area + other - width * height) > threshold:
                break
        else:
            keep.append(i)
    return keep


def _selected(candidates: Candidates, **options: Any) -> list[Tensor]:
    """Indices into K of each image's detections."""
    slots, counts, _ = select(candidates, **options)
    return [own[:count] for own, count in zip(slots, counts, strict=True)]


def test_nms_counts_whole_pixels_in_each_image_and_class() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 60, 2, generator=generator) * 30 - 10
    boxes = torch.cat([corner, corner + torch.rand(3, 60, 2, generator=generator) * 6], dim=2)
    scores = torch.linspace(1, 0, 60).expand(3, -1)
    classes = torch.randint(0, 2, (3, 60), generator=generator)
    scores = torch.cat([scores[:2], scores[2:] * 0.01])  # nothing in the last image
    found = _selected(
        Candidates(scores, classes, boxes, classes, boxes), nms_threshold=0.3, max_detections=25
    )
    for image in range(2):
        expected = []
        for label in (0, 1):
            members = ((classes[image] == label) & (scores[image] > 0.02)).nonzero()[:, 0]
            expected += members[_plain_nms(boxes[image, members], 0.3)].tolist()
        assert found[image].tolist() == sorted(expected)[:25]
    assert len(found[2]) == 0
    # Boxes beyond the corners of different images, which end up side by side if they are only shifted.
    corners = torch.tensor([[[90.0, 90, 100, 100]], [[-10.0, -10, 0, 0]]])
    one, zero = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    apart = _selected(Candidates(one, zero, corners, zero, corners), nms_threshold=0.0)
    assert [x.tolist() for x in apart] == [[0], [0]]


@pytest.mark.parametrize("classes", [1, 2])
def test_a_model_of_several_classes_keeps_a_box_of_each(classes: int) -> None:
    options = ("MODEL.KEYPOINT_ON", False, "MODEL.RETINAFACE.NUM_CLASSES", classes)
    model = _build(_tiny(*options)).eval()
    boxes = torch.tensor([[[5.0, 5, 20, 20]]]).expand(1, 3, 4)
    labels = torch.tensor([[0, classes - 1, 0]])
    candidates = Candidates(torch.tensor([[0.9, 0.8, 0.7]]), labels, boxes, labels, boxes)
    found = model.postprocess(candidates, _images((40, 40)))[0]["instances"]
    assert found.pred_classes.tolist() == list(range(classes))


def test_nms_says_whether_it_looked_at_enough_candidates() -> None:
    # Three boxes many times over: the others come after six, and below the threshold after seven.
    boxes = torch.tensor([[0.0, 0, 5, 5], [20.0, 0, 25, 5], [40.0, 0, 45, 5], [60.0, 0, 65, 5]])
    boxes = boxes[
        torch.tensor([[0, 0, 1, 1, 2, 2, 3], [0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1]])
    ]
    scores = torch.linspace(0.9, 0.3, 7).repeat(3, 1)
    scores[2, 6] = 0.0
    zero = torch.zeros(3, 7, dtype=torch.int64)
    candidates = Candidates(scores, zero, boxes, zero, boxes)
    some = select(candidates, max_detections=3, first=6)
    assert some.incomplete.tolist() == [False, True, False]
    full = select(candidates, max_detections=3)
    assert not full.incomplete.any()
    assert full.counts.tolist() == [3, 2, 1] and some.counts.tolist() == [3, 1, 1]
    assert [x[:2].tolist() for x in full.slots] == [[0, 2], [0, 6], [0, 1]]


def test_nms_looks_at_more_candidates_where_the_first_are_too_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _settled(_tiny())
    model.score_threshold, model.nms_threshold, model.max_detections = 0.0, 0.0, 100
    inputs = _images((61, 83), (61, 83))
    full = [x["instances"] for x in model(inputs)]
    looked_at = []

    def spy(*args: Any, **options: Any) -> Any:
        looked_at.append(options["first"])
        return select(*args, **options)

    monkeypatch.setattr("d2ext.systems.retinaface.model.select", spy)
    model.max_detections = 35
    some = [x["instances"] for x in model(inputs)]
    assert looked_at == [70, 140, None]
    for one, other in zip(some, full, strict=True):
        assert len(other) > len(one) == 35
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor[:35])


def test_shapes_do_not_depend_on_values() -> None:
    model = _settled(_tiny())
    images = model.preprocess(_images((61, 83), (61, 83)))
    with torch.no_grad():
        expected = model._decode(model.network(images))
        compiled = torch.compile(
            lambda x: model._decode(model.network(x)), fullgraph=True, backend="eager"
        )
        found = compiled(images)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


# Published files


def _published(backbone: str) -> dict[str, Tensor]:
    """Names and shapes of the published files; ResNet-50 with torchvision's names."""
    shapes = dict(Fixture(REFERENCE / "mobilenet025").manifest["parameters"])
    if backbone == "mobilenet":
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
    from torchvision.models import resnet50

    state = {f"body.{k}": v for k, v in resnet50().state_dict().items() if not k.startswith("fc.")}
    inputs = {"fpn.output1.0": 512, "fpn.output2.0": 1024, "fpn.output3.0": 2048}
    for name, shape in shapes.items():
        if name.startswith("body."):
            continue
        shape = [4 * n if n % 16 == 0 else n for n in shape]
        if (layer := name.removesuffix(".weight")) in inputs:
            shape[1] = inputs[layer]
        state[name] = torch.zeros(shape)
    return state


@pytest.mark.parametrize(
    ("backbone", "config", "entries", "parameters"),
    [("mobilenet", "mobilenet025_wider", 300, 426_608), ("resnet", "R_50_wider", 456, 27_293_600)],
)
def test_published_files(backbone: str, config: str, entries: int, parameters: int) -> None:
    published = _published(backbone)
    assert len(published) == entries
    cfg = model_zoo.get_config(f"retinaface/{config}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = _build(cfg)
    assert sum(p.numel() for p in model.parameters()) == parameters
    model.load_state_dict(convert_state_dict("retinaface", published), strict=True)
    wrapped = {"state_dict": {f"module.{k}": v for k, v in published.items()}}
    assert convert_state_dict("retinaface", wrapped).keys() == model.state_dict().keys()


def test_the_published_backbone() -> None:
    body = {k: v for k, v in _published("mobilenet").items() if k.startswith("body.")}
    trained = {k.removeprefix("body."): torch.full_like(v, 2) for k, v in body.items()}
    trained |= {"fc.weight": torch.zeros(1000, 256), "fc.bias": torch.zeros(1000)}
    assert torchvision_backbone(trained) == "mobilenet_v1"
    wrapped = {"state_dict": {f"module.{k}": v for k, v in trained.items()}}
    converted = convert_state_dict("mobilenet_v1", wrapped)
    backbone = MobileNetV1()
    backbone.load_state_dict(converted, strict=True)
    assert all((x == 2).all() for x in backbone.parameters())


def test_wrong_files_are_refused() -> None:
    with pytest.raises(ConversionError, match="SCRFD"):
        convert_state_dict("retinaface", {"bbox_head.weight": torch.zeros(1)})
    published = _published("mobilenet")
    published["ClassHead.3.conv1x1.bias"] = torch.zeros(4)
    with pytest.raises(ConversionError, match=r"ClassHead\.3"):
        convert_state_dict("retinaface", published)


def test_swapped_channels_change_the_result() -> None:
    model = _settled(_tiny())
    inputs = _images((40, 50))
    swapped = [{"image": inputs[0]["image"].flip(0)}]
    scores, other = (model(x)[0]["instances"].scores for x in (inputs, swapped))
    assert len(scores) != len(other) or not torch.allclose(scores, other, atol=1e-4)


def test_priors_of_many_sizes_are_not_kept_for_ever() -> None:
    model = _settled(_tiny())
    for width in range(32, 72):
        model(_images((32, width)))
    assert len(model._priors) <= 32
    cells = F.max_pool2d(torch.zeros(1, 1, 32, 71), 1, stride=8).shape[-2:]
    assert next(reversed(model._priors))[0][0] == tuple(cells)
