"""The stacked hourglass against the published implementation: tests/reference/hourglass/hg2_mpii."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints
from torch import Tensor

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.codecs.landmark_heatmaps import decode_hourglass, draw_targets
from d2ext.data.landmarks.hourglass import HourglassDraws, hourglass_sample
from d2ext.systems.landmarks.model import LandmarkNet
from tests.reference import GRADIENT_TOLERANCE
from tests.reference.fixture import Fixture, draw_image

REFERENCE = Path(__file__).parents[2] / "reference" / "hourglass"
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4


def rgb_image(height: int, width: int, seed: int) -> Tensor:
    bgr = draw_image(height, width, seed)
    return torch.from_numpy(np.ascontiguousarray(bgr[:, :, ::-1].transpose(2, 0, 1)))


class Case:
    """The fixture, the model with its weights, and what the model says of the fixture's person."""

    def __init__(self) -> None:
        self.fixture = Fixture(REFERENCE / "hg2_mpii")
        cfg = model_zoo.get_config("landmarks/hourglass_2stack_mpii_256.yaml")
        cfg.MODEL.DEVICE = "cpu"
        # The fixture's scale is that of the published files, enlarged already.
        cfg.MODEL.LANDMARKS.CROP.PADDING = 1.0
        cfg.MODEL.LANDMARKS.TEST.HEATMAPS = True
        self.model: LandmarkNet = build_model(cfg)
        self.published = {k: torch.from_numpy(v) for k, v in self.fixture.state_dict().items()}
        self.converted = convert_state_dict("landmarks", self.published)
        self.model.load_state_dict(self.converted, strict=True)
        self.model.eval()
        person = self.fixture.manifest["inputs"]
        (x, y), half = person["center_xy"], 100 * person["scale"]
        image = rgb_image(400, 360, 3)
        instances = Instances((400, 360))
        instances.pred_boxes = Boxes(torch.tensor([[x - half, y - half, x + half, y + half]]))
        self.inputs: list[dict[str, Any]] = [{"image": image, "instances": instances}]
        seen: dict[str, Tensor] = {}
        backbone = self.model.backbone

        def remember(name: str) -> Any:
            return lambda module, inputs, output: seen.__setitem__(name, output)

        bottom = backbone.stacks[0].hourglass.low2.low2.low2.low2
        hooks = [bottom.register_forward_hook(remember("hourglass_0_bottom"))]
        for i, name in ((0, "hourglass_0"), (1, "hourglass_last")):
            hooks.append(backbone.stacks[i].hourglass.register_forward_hook(remember(name)))
        for part in ("merge_maps", "merge_features"):
            published = {"merge_maps": "merge_preds_0"}.get(part, f"{part}_0")
            hooks.append(
                getattr(backbone.stacks[0], part).register_forward_hook(remember(published))
            )
        with torch.no_grad():
            self.crop = self.model.preprocess(self.inputs)
            seen["pre"] = backbone.stem(self.crop)
            features = backbone(self.crop)
            mirrored = backbone(self.crop.flip(-1))
        # copies: the hooks see the mirrored call too
        self.features = features
        self.mirrored = mirrored
        with torch.no_grad():
            backbone(self.crop)
        for hook in hooks:
            hook.remove()
        self.seen = seen
        self.raw = tuple(torch.cat([features[f"maps{i}"], mirrored[f"maps{i}"]]) for i in (1, 2))


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_crop(case: Case) -> None:
    # stored before the division by 255
    assert case.fixture.compare("crop", 255 * case.crop[0].numpy()) < RAW_TOLERANCE


def test_stem_hourglass_and_features(case: Case) -> None:
    actual = {**case.seen, "features_0": case.features["stack1"]}
    expected = set(case.fixture.expected)
    assert set(actual) <= expected and len(actual) == 7
    for name, value in actual.items():
        assert case.fixture.compare(name, value.numpy()) < RAW_TOLERANCE, name


def test_heatmaps_of_every_stack(case: Case) -> None:
    maps = torch.cat([case.features["maps1"], case.features["maps2"]])
    compare = case.fixture.compare
    assert compare("heatmaps_last_stack", maps[1].numpy()) < RAW_TOLERANCE
    assert compare("heatmaps_other_stacks", maps[:1].numpy()) < RAW_TOLERANCE
    flipped = case.mirrored["maps2"][0].numpy()
    assert compare("heatmaps_of_flipped_input_last", flipped) < RAW_TOLERANCE
    moments = torch.stack([maps.mean((-2, -1)), maps.std((-2, -1), unbiased=False)], dim=-1)
    assert compare("heatmaps_mean_std_per_stack_and_joint", moments.numpy()) < RAW_TOLERANCE


def test_flip_test_and_decoded_joints(case: Case) -> None:
    points, scores, maps = case.model._decode(case.raw)
    # The published maps are clipped after the average; here that is the decoder's part.
    averaged = maps.clamp(max=1)[0].numpy()
    assert case.fixture.compare("averaged_heatmaps", averaged) < RAW_TOLERANCE
    expected = case.fixture.expected
    np.testing.assert_allclose(points[0] / 4, expected["keypoints_heatmap"][:, :2], atol=1e-4)
    np.testing.assert_allclose(scores[0], expected["keypoints_heatmap"][:, 2], atol=1e-4)
    np.testing.assert_allclose(scores[0], expected["peak_value"], atol=1e-4)
    cells, _ = decode_hourglass(maps)
    np.testing.assert_array_equal((cells + 0.5).floor()[0], expected["peak_xy"])


def test_final_joints(case: Case) -> None:
    with torch.no_grad():
        detections = case.model(case.inputs)[0]["instances"]
    expected = case.fixture.expected["keypoints_image"]
    np.testing.assert_array_equal(detections.pred_keypoints[0, :, :2], expected[:, :2])
    np.testing.assert_allclose(detections.pred_keypoints[0, :, 2], expected[:, 2], atol=1e-4)
    # Detectron2 and the published code agree on the coordinates: these are whole numbers.
    assert (detections.pred_keypoints[..., :2] == detections.pred_keypoints[..., :2].trunc()).all()


def test_chunks_and_many_persons_give_the_same(case: Case) -> None:
    instances = Instances.cat([case.inputs[0]["instances"]] * 3)
    shift = torch.tensor([[0.0], [7.0], [0.0]])
    instances.pred_boxes = Boxes(instances.pred_boxes.tensor + shift)
    case.model.max_crops = 2
    with torch.no_grad():
        detections = case.model([{**case.inputs[0], "instances": instances}])[0]["instances"]
    expected = case.fixture.expected["keypoints_image"]
    for i in (0, 2):
        np.testing.assert_array_equal(detections.pred_keypoints[i, :, :2], expected[:, :2])
    assert not torch.equal(detections.pred_keypoints[1], detections.pred_keypoints[0])


def test_unused_skip_layers_are_all_that_is_left_out(case: Case) -> None:
    """Published values: 8.46 M in 742 entries with 2 stacks."""
    assert len(case.published) == 742
    left = len(case.published) - len(case.converted)
    skips = [k for k in case.published if ".skip_layer." in k]
    shortcuts = [k for k in case.converted if ".shortcut." in k]
    # Only the first and the last block of the stem change the width.
    assert shortcuts == [
        f"backbone.stem{i}.shortcut.{x}" for i in (1, 3) for x in ("weight", "bias")
    ]
    assert left == len(skips) - len(shortcuts) > 0


def test_eight_stacks_have_the_published_size() -> None:
    """32.94 M values in 2752 entries, unused skip layers of 256 and (in the stem) 128 included."""
    cfg = model_zoo.get_config("landmarks/hourglass_8stack_mpii_256.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    state = model.state_dict()
    # In each hourglass 3 blocks on each of 4 levels and one below; one after each hourglass.
    skips = 8 * (3 * 4 + 1 + 1)
    values = sum(x.numel() for x in state.values()) + skips * (256 * 256 + 256) + 128 * 128 + 128
    assert len(state) + 2 * (skips + 1) == 2752
    assert values == pytest.approx(32.94e6, abs=5e3)


@pytest.fixture(scope="module")
def samples() -> list[tuple[Tensor, Tensor]]:
    """The two training samples: image (3, 256, 256) in 0..255, joints (16, 3) in heat-map pixels."""
    inputs = Fixture(REFERENCE / "data_and_eval").manifest["inputs"]
    flip = Fixture(REFERENCE / "hg2_mpii").manifest["inputs"]["flip_pairs"]
    result = []
    for sample, seed in (("sample_a", 3), ("sample_b", 4)):
        given = inputs[sample]
        numbers = dict(given["random_numbers_in_order"])
        numbers["flip"] = numbers["flip"].startswith("yes")
        image = draw_image(400, 360, seed)[:, :, ::-1]
        joints = np.array(given["keypoints_x_y_visible"], dtype=np.float64)
        center, scale = given["center_xy"], given["scale"]
        drawn = hourglass_sample(image, joints, center, scale, flip, HourglassDraws(**numbers))
        result.append(
            (255 * torch.from_numpy(drawn[0]).permute(2, 0, 1), torch.from_numpy(drawn[1]))
        )
    return result


def crop_sample(image: Tensor, joints: Tensor) -> dict[str, Any]:
    """As the mapper gives it: joints in pixels of the crop, v = 0 where they have no place."""
    instances = Instances((256, 256))
    points = torch.cat([4 * joints[:, :2], 2.0 * (joints[:, :1] != 0)], dim=1).float()
    instances.gt_keypoints = Keypoints(points[None])
    return {"image": image.float(), "crop": True, "instances": instances}


def test_loss_and_gradients(case: Case, samples: list[tuple[Tensor, Tensor]]) -> None:
    fixture, model = case.fixture, case.model
    inputs = [crop_sample(*sample) for sample in samples]
    images, targets = model.training_batch(inputs)
    points, labelled = targets
    assert fixture.compare("training_images", images.numpy()) < RAW_TOLERANCE
    (target,), weights = model.head.codec.encode(points, labelled)
    assert fixture.compare("training_heatmaps", target.numpy()) < 1e-6
    # A joint that is not annotated learns an empty map.
    assert not labelled.all() and weights.eq(1).all()

    parameters = {
        "grad_pre_0_conv_weight": model.backbone.stem_conv.weight,
        "grad_outs_0_conv_weight": model.backbone.stacks[0].predictor.weight,
        "grad_outs_last_conv_bias": model.backbone.stacks[1].predictor.bias,
    }
    features = model.backbone(images)
    raw = model.head(
        [features[name] for name in model.head.in_features]
    )  # batch norms as in evaluation
    stacks = [((maps - target) ** 2).mean(dim=(1, 2, 3)) for maps in raw]
    per_stack = torch.stack(stacks, dim=1).detach()
    assert fixture.compare("loss_per_image_and_stack", per_stack.numpy()) < RAW_TOLERANCE
    losses = model.losses(raw, targets)
    assert list(losses) == ["loss_heatmap"]
    loss = losses["loss_heatmap"]
    assert fixture.compare("loss_total", loss.detach().numpy()) < RAW_TOLERANCE
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert fixture.compare(name, gradient.numpy()) < GRADIENT_TOLERANCE, name


def test_target_maps_of_listed_points() -> None:
    data = Fixture(REFERENCE / "data_and_eval")
    text = data.manifest["inputs"]["gaussian_maps"]
    points = torch.tensor(json.loads(text[text.index("[[") :]))
    cells = points[None].float() - 0.5
    labelled = torch.ones(1, len(points), dtype=torch.bool)
    (maps,), weights = draw_targets(cells, labelled, (64, 64), sigma=1.0, center="hourglass")
    np.testing.assert_allclose(maps[0], data.expected["gaussian_maps"], atol=1e-6)
    assert weights.eq(1).all()
