"""What all meta-architectures share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.modeling.meta_arch import MetaArch, output_size


class Toy(MetaArch):
    """Predicts the mean of each channel, learns nothing but a factor."""

    RENAMED_PARAMETERS = (("old.", "scale."),)

    def __init__(self, **meta_arch: Any) -> None:
        super().__init__(pixel_mean=[1.0, 2.0, 3.0], pixel_std=[2.0, 2.0, 2.0], **meta_arch)
        self.scale = nn.Conv2d(3, 3, 1, bias=False)
        self.set_network(self.scale, lambda x: (x.mean(dim=(2, 3)),))

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        return self.normalize(torch.stack([self.upload(x) for x in batched_inputs]))

    def encode_targets(self, batched_inputs: list[dict[str, Any]], images: Tensor) -> Tensor:
        return torch.tensor([len(x["instances"]) for x in batched_inputs], dtype=torch.float32)

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": (predictions.mean(dim=(1, 2, 3)) - targets).abs().sum()}

    def postprocess(
        self, predictions: tuple[Tensor, ...], batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        sizes = [output_size(x) for x in batched_inputs]
        return [{"mean": m, "size": s} for m, s in zip(predictions[0], sizes, strict=True)]

    def draw_training(
        self, batched_inputs: list[dict[str, Any]], images: Tensor, targets: Any, predictions: Any
    ) -> tuple[str, Tensor]:
        boxes = Instances((8, 8), pred_boxes=Boxes(torch.tensor([[1.0, 1.0, 3.0, 3.0]])))
        return self.draw_pair(batched_inputs[0], boxes)


def image_of(size: tuple[int, int] = (8, 12), objects: int = 2) -> dict[str, Any]:
    boxes = torch.tensor([[2.0, 2.0, 6.0, 7.0]]).expand(objects, 4)
    return {
        "image": torch.full((3, *size), 5, dtype=torch.uint8),
        "instances": Instances(size, gt_boxes=Boxes(boxes)),
    }


def test_training_and_inference_take_the_same_way() -> None:
    model = Toy()
    nn.init.dirac_(model.scale.weight)
    # (5 - mean) / std is 2, 1.5, 1 in the three channels: 1.5 on average.
    assert model.train()([image_of()])["loss"].item() == pytest.approx(0.5)
    result = model.eval()([image_of()])[0]
    torch.testing.assert_close(result["mean"], torch.tensor([2.0, 1.5, 1.0]))
    assert not result["mean"].requires_grad
    assert set(model.state_dict()) == {"scale.weight"}


@pytest.mark.parametrize("absent", [{}, {"height": None, "width": None}])
def test_missing_output_sizes_are_the_images(absent: dict[str, Any]) -> None:
    assert output_size(image_of() | absent) == (8, 12)
    assert output_size(image_of() | {"height": 4, "width": 6}) == (4, 6)
    assert output_size(image_of() | {"height": 4, "width": None}) == (4, 12)


def test_training_without_instances_is_refused() -> None:
    inputs = image_of()
    del inputs["instances"]
    with pytest.raises(KeyError, match="is_train=True"):
        Toy().train()([image_of(), inputs])


def test_a_model_without_network_says_what_is_missing() -> None:
    model = MetaArch(pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    with pytest.raises(RuntimeError, match="set_network"):
        _ = model.network


def test_pictures_come_at_their_period() -> None:
    model = Toy(vis_period=2).train()
    with EventStorage(0) as storage:
        np.random.seed(0)
        model([image_of()])
        drawn = np.random.rand()
        np.random.seed(0)
        assert drawn == np.random.rand()  # colours are drawn at random
        assert len(storage._vis_data) == 1
        name, picture, _ = storage._vis_data[0]
        assert "annotations" in name.lower()
        assert picture.shape == (3, 8, 24) and picture.min() >= 0 and picture.max() <= 1
        left, right = np.split(picture, 2, axis=2)
        assert np.abs(left - right).max() > 0.1  # other boxes
        storage.step()
        model([image_of()])
        assert len(storage._vis_data) == 1


def test_keypoints_and_meshes_are_drawn() -> None:
    size = (40, 60)
    inputs = {
        "image": torch.full((3, *size), 100, dtype=torch.uint8),
        "instances": Instances(size, gt_boxes=Boxes(torch.zeros(0, 4))),
    }
    instances = Instances(size, pred_boxes=Boxes(torch.tensor([[22.0, 14.0, 38.0, 26.0]] * 2)))
    instances.pred_keypoints = torch.tensor([[[30.0, 20.0, 1.0]]] * 2)
    # One lies outside; the second face has none.
    meshes = torch.tensor([[[50.5, 10.5, 3.0], [12.5, 33.5, 0.0], [-4.0, 99.0, 0.0]]])
    instances.pred_face_meshes = torch.cat([meshes, torch.zeros_like(meshes)])
    _, picture = Toy().draw_pair(inputs, instances)
    left, right = (255 * picture).round().int().chunk(2, dim=2)
    assert (left == 100).all()
    assert right[:, 10, 50].tolist() == right[:, 33, 12].tolist() == [50, 177, 50]
    assert right[:, 0, 0].tolist() == [100] * 3
    red, green, _ = right[:, 20, 30].tolist()
    assert red > 200 and green < 60  # Detectron2's points


def test_parameters_of_earlier_versions_load(tmp_path: Any) -> None:
    weight = torch.arange(9.0).view(3, 3, 1, 1)
    torch.save({"model": {"old.weight": weight}}, tmp_path / "old.pth")
    model = nn.Sequential(Toy())  # also below a prefix
    model.load_state_dict({"0.old.weight": weight})
    torch.testing.assert_close(model[0].scale.weight.data, weight)
    toy = Toy()
    Checkpointer(toy, fit="exact").load(str(tmp_path / "old.pth"))
    torch.testing.assert_close(toy.scale.weight.data, weight)
