"""Objects on the seams of tiles come out once and whole."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2ext.config import ConfigError
from d2ext.data.shapes.face_mesh import NUM_VERTICES, POINT_VERTICES
from d2ext.data.shapes.face_scene import draw_faces
from d2ext.engine import tiling
from d2ext.engine.tiling import TiledPredictor


def predict(images: list[np.ndarray], masks: bool = True) -> list[dict[str, Instances]]:
    """Finds what is connected and of one grey value, which is its class; the larger the surer."""
    outputs = []
    for image in images:
        boxes, classes, found = [], [], []
        for value in np.unique(image[image > 0]):
            count, labels, stats, _ = cv2.connectedComponentsWithStats(
                (image[:, :, 0] == value).astype(np.uint8)
            )
            for k in range(1, count):
                x, y, w, h = stats[k, :4].tolist()
                boxes.append([x, y, x + w, y + h])
                classes.append(int(value) - 1)
                found.append(labels == k)
        instances = Instances(image.shape[:2])
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        instances.scores = instances.pred_boxes.area() / 1e6
        centers = instances.pred_boxes.get_centers()
        instances.pred_keypoints = torch.cat([centers, torch.ones(len(boxes), 1)], 1)[:, None]
        if masks:
            instances.pred_masks = torch.tensor(np.array(found).reshape(-1, *image.shape[:2]))
        outputs.append({"instances": instances})
    return outputs


def scene(seed: int, height: int = 300, width: int = 410) -> np.ndarray:
    """Ellipses and rectangles apart from each other, of up to the whole image's length."""
    random, image = np.random.default_rng(seed), np.zeros((height, width, 3), np.uint8)
    for _ in range(200):
        long = random.random() < 0.1
        w, h = random.integers(5, 35, 2) * ((6, 1) if long else (1, 1))
        if long and random.random() < 0.5:
            w, h = h, w
        x, y = random.integers(0, max(width - w, 1)), random.integers(0, max(height - h, 1))
        if (
            w > width
            or h > height
            or image[max(y - 3, 0) : y + h + 3, max(x - 3, 0) : x + w + 3].any()
        ):
            continue
        value = int(random.integers(1, 4))
        if random.random() < 0.5:
            image[y : y + h, x : x + w] = value
        else:
            part = np.zeros((h, w), np.uint8)
            cv2.ellipse(part, (w // 2, h // 2), ((w - 1) // 2, (h - 1) // 2), 0, 0, 360, value, -1)
            image[y : y + h, x : x + w] = part[:, :, None]
    return image


def rows(instances: Instances) -> list[tuple[int, ...]]:
    boxes = instances.pred_boxes.tensor.round().int().tolist()
    return [(c, *b) for c, b in zip(instances.pred_classes.tolist(), boxes, strict=True)]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(("size", "overlap"), [(100, 0.25), (128, 0.4), (500, 0.2)])
def test_equals_prediction_on_the_whole(size: int, overlap: float, masks: bool) -> None:
    tiled = TiledPredictor(lambda x: predict(x, masks), size, overlap, batch_size=3)
    for seed in range(5):
        image = scene(seed)
        (whole,), (output,) = predict([image], masks), tiled([image])
        expected, result = whole["instances"], output["instances"]
        assert sorted(rows(result)) == sorted(rows(expected))
        assert result.image_size == (300, 410) and result.has("pred_masks") == masks
        assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
        place = {row: i for i, row in enumerate(rows(expected))}
        order = [place[row] for row in rows(result)]
        if masks:
            assert torch.equal(result.pred_masks, expected.pred_masks[order])
        if size == 500:
            assert torch.equal(result.pred_keypoints, expected.pred_keypoints[order])


def test_two_of_a_class_that_overlap_stay_two() -> None:
    """Their boxes nearly agree where the tiles overlap; but each tile has both."""
    image = np.zeros((100, 180, 3), np.uint8)
    for i in range(40):
        image[30 + i, 60 + 2 * i : 65 + 2 * i] = 1  # the one below a diagonal, the other above
        image[22 + i, 60 + 2 * i : 65 + 2 * i] = 1
    (whole,), (tiled,) = predict([image]), TiledPredictor(predict, 100, 0.3)([image])
    assert len(whole["instances"]) == 2
    assert sorted(rows(tiled["instances"])) == sorted(rows(whole["instances"]))


def test_points_move_with_their_tile_and_low_scores_go() -> None:
    image = np.zeros((90, 200, 3), np.uint8)
    image[10:30, 150:190] = 1
    image[50:52, 150:152] = 2
    (output,) = TiledPredictor(predict, 90, 0.2, threshold=1e-5)([image])
    assert rows(output["instances"]) == [(0, 150, 10, 190, 30)]
    assert output["instances"].pred_keypoints.tolist() == [[[170.0, 20.0, 1.0]]]


def test_nothing_is_found(caplog: pytest.LogCaptureFixture) -> None:
    (output,) = TiledPredictor(predict, 90)([np.zeros((90, 200, 3), np.uint8)])
    assert len(output["instances"]) == 0 and output["instances"].pred_masks.shape == (0, 90, 200)


def test_what_cannot_be_merged_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = scene(0)
    TiledPredictor(lambda x: [o | {"sem_seg": 0} for o in predict(x)], 200)([image])
    assert caplog.text.count("sem_seg is left out") == 1
    with pytest.raises(ConfigError, match="gives sem_seg"):
        TiledPredictor(lambda x: [{"sem_seg": 0} for _ in x], 200)([image])
    monkeypatch.setattr(tiling, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="masks"):
        TiledPredictor(predict, 200)([image])


@pytest.mark.parametrize(("size", "overlap"), [(256, 0.6), (300, 0.5)])
def test_a_crowd_of_faces_whose_cut_ones_are_guessed(size: int, overlap: float) -> None:
    """As RetinaFace predicts: boxes are not clipped, so that those of cut faces end beyond the tile,
    where points and meshes are a guess."""
    frames = [draw_faces(0, "val", i, 256, 256) for i in range(8)]
    boxes, meshes = [], []
    for column, frame in enumerate(frames):
        shift = np.array([256.0 * column, 0, 0])
        for item in frame.faces:
            if (mesh := frame.mesh(item)) is not None:
                x0, y0, x1, y1 = frame.items[item].extent
                boxes.append([x0 + shift[0], y0, x1 + shift[0], y1])
                meshes.append(mesh + shift)
    image = np.hstack([np.zeros((256, 256, 3), np.uint8)] * len(frames))

    def detect(tiles: list[np.ndarray]) -> list[dict[str, Instances]]:
        outputs = []
        for tile in tiles:
            left, right = _left(tile, image), _left(tile, image) + tile.shape[1]
            seen = [min(b[2], right) - max(b[0], left) >= 0.5 * (b[2] - b[0]) for b in boxes]
            found = Instances(tile.shape[:2])
            own = torch.tensor([b for b, s in zip(boxes, seen, strict=True) if s]).reshape(-1, 4)
            own_meshes = np.array([m for m, s in zip(meshes, seen, strict=True) if s])
            cut = (own[:, 0] < left) | (own[:, 2] > right)
            own = own - torch.tensor([left, 0, left, 0])
            found.pred_face_meshes = torch.from_numpy(
                own_meshes.reshape(-1, NUM_VERTICES, 3)
            ).float()
            found.pred_face_meshes[..., 0] -= left
            found.pred_face_meshes[cut] *= 1.1
            found.pred_keypoints = found.pred_face_meshes[:, list(POINT_VERTICES)]
            found.pred_boxes = Boxes(own.float())
            found.scores = torch.where(cut, 0.95, 0.9)  # the guess is surer
            found.pred_classes = torch.zeros(len(own), dtype=torch.int64)
            outputs.append({"instances": found})
        return outputs

    (output,) = TiledPredictor(detect, size, overlap, batch_size=2)([image])
    found = output["instances"]
    assert len(found) == len(boxes) > 15
    place = found.pred_boxes.tensor[:, 0].argsort()
    expected = torch.tensor(boxes)[:, 0].argsort()
    torch.testing.assert_close(
        found.pred_boxes.tensor[place], torch.tensor(boxes)[expected].float(), atol=1e-3, rtol=0
    )
    targets = torch.from_numpy(np.array(meshes)).float()[expected]
    torch.testing.assert_close(found.pred_face_meshes[place], targets, atol=1e-3, rtol=0)
    points = targets[:, list(POINT_VERTICES)]
    torch.testing.assert_close(found.pred_keypoints[place], points, atol=1e-3, rtol=0)


def _left(tile: np.ndarray, image: np.ndarray) -> int:
    """The column of the image where a view of it begins."""
    return (tile.ctypes.data - image.ctypes.data) % image.strides[0] // image.strides[1]
