"""RetinaFace against the published implementation: the fixture in tests/reference/retinaface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.codecs.canvas import scale_points
from d2ext.codecs.prior_boxes import decode_boxes, decode_points, encode_boxes, encode_points
from d2ext.systems.retinaface.model import RetinaFace
from tests.reference.fixture import Fixture, draw_image
from tests.systems.fixture_files import load_batch

REFERENCE = Path(__file__).parents[2] / "reference" / "retinaface"
# DESIGN: raw outputs within 1e-4 relative. The runs agree to 2e-6 in float64 (NOTES.md).
TOLERANCE = 1e-5


def _read(height: int, width: int, seed: int) -> dict[str, Any]:
    image = draw_image(height, width, seed).transpose(2, 0, 1)
    return {"image": torch.from_numpy(np.ascontiguousarray(image))}


class Case:
    """The fixture, the model with its weights, and what the model says of the fixture's image."""

    def __init__(self) -> None:
        self.fixture = Fixture(REFERENCE / "mobilenet025")
        cfg = model_zoo.get_config("retinaface/mobilenet025_wider.yaml")
        cfg.MODEL.DEVICE = "cpu"
        self.model: RetinaFace = build_model(cfg)
        published = {k: torch.from_numpy(v) for k, v in self.fixture.state_dict().items()}
        self.model.load_state_dict(convert_state_dict("retinaface", published), strict=True)
        self.model.eval()
        image = self.fixture.manifest["inputs"]["image"]
        self.inputs = [_read(image["height"], image["width"], image["seed"])]
        with torch.no_grad():
            self.images = self.model.preprocess(self.inputs)
            self.bottom_up = self.model.backbone.bottom_up(self.images)
            self.pyramid = self.model.backbone(self.images)
            self.raw = self.model.network(self.images)
            self.context = [
                module(x)
                for module, x in zip(self.model.head.context, self.pyramid.values(), strict=True)
            ]
        self.priors = self.model.priors(self.raw.feature_sizes, self.raw.input_size)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_every_stage(case: Case) -> None:
    actual: dict[str, Tensor] = {
        **{f"body.c{i}": case.bottom_up[f"stage{i - 2}"] for i in (3, 4, 5)},
        **{f"fpn.{name}": x for name, x in case.pyramid.items()},
        **{f"ssh.p{i + 3}": x for i, x in enumerate(case.context)},
        "loc": case.raw.offsets,
        "conf_logits": case.raw.logits,
        "conf": case.raw.logits.softmax(dim=-1),
        "landm": case.raw.points.flatten(2),
        "priors": case.priors,
    }
    height, width = case.raw.input_size
    assert (height, width) == (125, 157)
    boxes = decode_boxes(case.raw.offsets[0], case.priors)
    points = decode_points(case.raw.points[0], case.priors)
    actual["decoded_boxes"] = scale_points(boxes, (width, height))
    actual["decoded_landmarks"] = scale_points(points, (width, height)).flatten(1)
    errors = {name: case.fixture.compare(name, x) for name, x in actual.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("prepared", [True, False])
def test_detections(case: Case, prepared: bool) -> None:
    network = case.model.inference_network
    assert not network._plain  # the config's copy with folded norms
    network._plain = not prepared
    try:
        instances = case.model(case.inputs)[0]["instances"]
        predictions = case.model.inference_network(case.images)
    finally:
        network._plain = False
    expected = torch.from_numpy(case.fixture.expected["detections"])
    assert len(instances) == len(expected) == 306
    torch.testing.assert_close(instances.pred_boxes.tensor, expected[:, :4], atol=0.01, rtol=0)
    torch.testing.assert_close(instances.scores, expected[:, 4], atol=1e-5, rtol=0)
    assert instances.pred_keypoints[..., 2].eq(1).all()
    points = instances.pred_keypoints[..., :2].flatten(1)
    torch.testing.assert_close(points, expected[:, 5:], atol=0.01, rtol=0)
    prior_of_score = dict(zip(predictions[0][0].tolist(), predictions[3][0].tolist(), strict=True))
    priors = [prior_of_score[score] for score in instances.scores.tolist()]
    assert priors == case.fixture.expected["detections_prior_index"].tolist()


def _training_inputs(case: Case, folder: Path) -> list[dict[str, Any]]:
    """The fixture's batch, from files, in the published form, through the training loader."""
    lines = []
    batch = case.fixture.manifest["inputs"]["loss"]["ground_truth_pixels"]
    for seed, faces in zip((115, 116, 117), batch, strict=True):
        cv2.imwrite(str(folder / f"{seed}.png"), draw_image(125, 157, seed))
        lines.append(f"# {seed}.png")
        for face in faces:
            x1, y1, x2, y2 = face["box_xyxy"]
            points = np.full((5, 3), -1.0)
            if face["label"] == 1:
                # Every other point is hidden, which makes no difference.
                points = np.insert(
                    np.reshape(face["landmarks_xy"], (5, 2)), 2, [0, 1, 0, 1, 0], axis=1
                )
            numbers = [x1, y1, x2 - x1, y2 - y1, *points.flatten().tolist(), 0.5]
            lines.append(" ".join(str(x) for x in numbers))
    (folder / "label.txt").write_text("\n".join(lines))
    cfg = model_zoo.get_config("retinaface/mobilenet025_wider.yaml")
    cfg.INPUT.AUGMENTATION.NAME = "none"
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    files = {"train_json": str(folder / "label.txt"), "train_images": str(folder)}
    return load_batch(cfg, {**files, "landmarks": "faces"})


def test_targets_and_losses(case: Case, tmp_path: Path) -> None:
    model, expected = case.model, case.fixture.expected
    images, targets = model.training_batch(_training_inputs(case, tmp_path))
    with torch.no_grad():
        predictions = model.network(images)
    matches = model.criterion.match(case.priors, targets)
    labels = torch.stack([m.labels for m in matches])
    # The published label -1 is a face without points.
    has_points = torch.stack(
        [t.annotated.any(dim=1)[m.objects] for t, m in zip(targets, matches, strict=True)]
    )
    published = torch.where((labels > 0) & ~has_points, -1, labels)
    assert torch.equal(published, torch.from_numpy(expected["target_conf"]))
    assert (labels > 0).any(dim=1).tolist() == [True, False, True]

    positive = (labels > 0).nonzero()
    assert positive.tolist() == expected["target_positive_index"].tolist()
    objects = [int(matches[i].objects[j]) for i, j in positive.tolist()]
    faces = list(zip(positive[:, 0].tolist(), objects, strict=True))
    priors = case.priors[positive[:, 1]]
    boxes = torch.stack([targets[i].boxes[j] for i, j in faces])
    points = torch.stack([targets[i].points[j] for i, j in faces])
    assert case.fixture.compare("target_loc", encode_boxes(boxes, priors)) < 1e-6
    trained = torch.tensor([bool(targets[i].annotated[j].any()) for i, j in faces])
    torch.testing.assert_close(
        encode_points(points, priors).flatten(1)[trained],
        torch.from_numpy(expected["target_landm"])[trained],
        atol=1e-5,
        rtol=1e-5,
    )
    mined = model.criterion.mine(predictions.logits, labels)
    assert mined.sum(dim=1).tolist() == expected["num_negatives"].tolist()

    losses = model.losses(predictions, targets)
    assert float(losses["loss_box"]) == pytest.approx(2 * float(expected["loss_loc"]), rel=1e-5)
    assert float(losses["loss_class"]) == pytest.approx(float(expected["loss_conf"]), rel=1e-5)
    assert float(losses["loss_landmark"]) == pytest.approx(float(expected["loss_landm"]), rel=1e-5)
    assert float(sum(losses.values())) == pytest.approx(float(expected["loss_total"]), rel=1e-5)
