#!/usr/bin/env python3
"""Times UPSNet's panoptic head, alone and as a share of the whole inference.

    python scripts/benchmark_upsnet.py [--device cuda] [--dtype bfloat16] [--mode eager]

The network has random weights; box and mask heads and the panoptic head are given as many boxes as are
asked for, of 5 to 65 % of the image's sides, anywhere, as in an image full of objects. "whole" is one
image on the device (uint8, already of the network's size) to all three results at its original size.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2ext import model_zoo
from d2ext.layers.panoptic_fusion import fuse_panoptic_reference, prune_masks_reference
from d2ext.systems.upsnet.boxes import inclusive
from d2ext.systems.upsnet.model import UPSNet


def random_candidates(
    count: int, size: tuple[int, int], classes: int, device: torch.device
) -> Instances:
    """Boxes in an image of a size, best first."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([size[1], size[0]])
    half = 0.5 * (0.05 + 0.6 * torch.rand(count, 2, generator=generator)) * extent
    centre = torch.rand(count, 2, generator=generator) * extent
    low = (centre - half).clamp(min=0).minimum(extent - 2)
    high = (centre + half).minimum(extent).maximum(low + 1)
    scores = torch.rand(count, generator=generator).sort(descending=True).values
    result = Instances(size, pred_boxes=Boxes(torch.cat([low, high], dim=1)), scores=scores)
    result.pred_classes = torch.randint(0, classes, (count,), generator=generator)
    return result.to(device)


def milliseconds(function: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """Of single calls, each waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for i in range(calls + 3):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if i >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    return times


@torch.no_grad()
def benchmark(
    config: str,
    *,
    device: str,
    dtype: str,
    mode: str,
    instances: int,
    size: tuple[int, int],
    calls: int,
) -> dict[str, Any]:
    """Medians of ``panoptic_head_ms``, ``whole_ms`` and, for the head in plain PyTorch,
    ``reference_ms``; ``share`` of the head in the whole; ``images_per_second``; how many of the
    ``instances`` were ``kept``."""
    cfg = model_zoo.get_config(config)
    cfg.MODEL.DEVICE = device
    cfg.MODEL.INFERENCE.DTYPE = dtype
    cfg.MODEL.INFERENCE.MODE = mode
    cfg.MODEL.INFERENCE.CHANNELS_LAST = device.startswith("cuda")
    torch.manual_seed(0)
    model: UPSNet = build_model(cfg).eval()
    place = model.device
    candidates = random_candidates(instances, size, model.roi_heads.num_classes, place)
    select = model.select

    def forced(boxes: Tensor, probabilities: Tensor, size: Any) -> tuple[Instances, Instances]:
        select(boxes, probabilities, size)  # takes its time; random weights select nothing of use
        return candidates[:], candidates[:]

    model.select = forced  # type: ignore[method-assign]
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, device=place)
    # COCO's images have 640 pixels where the network's input has 1333.
    original = (size[0] * 640 // 1333, size[1] * 640 // 1333)
    inputs = [{"image": image, "height": original[0], "width": original[1]}]
    images = model.preprocess(inputs)
    padded = (images.shape[-2], images.shape[-1])
    predictions = model.inference_network(images)
    score = predictions.semantic.score[0].float()
    # Random mask logits are near 0: as many pixels set as in a real mask.
    masks = model.predict_masks(predictions, [candidates])[0] + 1.0
    head = functools.partial(
        model.postprocessor.fuse,
        score,
        Instances(size, **candidates.get_fields(), mask_logits=masks),
    )
    boxes, classes = inclusive(candidates.pred_boxes.tensor), candidates.pred_classes

    def reference() -> None:
        keep = prune_masks_reference(masks, boxes, classes, candidates.scores, padded)
        fuse_panoptic_reference(
            score, boxes[keep], classes[keep], masks[keep], padded, num_stuff=model.num_stuff
        )

    keep = head().keep
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        "dtype": dtype,
        "mode": mode,
        "size": list(size),
        "instances": instances,
        "kept": len(keep),
    }
    for name, function, count in (
        ("panoptic_head", head, calls),
        ("whole", lambda: model(inputs), calls),
        ("reference", reference, max(calls // 10, 1)),
    ):
        result[f"{name}_ms"] = statistics.median(milliseconds(function, place, count))
    result["share"] = result["panoptic_head_ms"] / result["whole_ms"]
    result["images_per_second"] = 1e3 / result["whole_ms"]
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        head()
        result["head_peak_mib"] = (torch.cuda.max_memory_allocated(place) - before) / 2**20
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="upsnet/upsnet_R_50_coco.yaml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", default="eager", help="as MODEL.INFERENCE.MODE")
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--calls", type=int, default=50)
    args = parser.parse_args(arguments)
    figures = benchmark(
        args.config_file,
        device=args.device,
        dtype=args.dtype,
        mode=args.mode,
        instances=args.instances,
        size=(args.height, args.width),
        calls=args.calls,
    )
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
