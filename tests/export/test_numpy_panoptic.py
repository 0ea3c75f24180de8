"""Panoptic maps of an exported file's outputs by NumPy: the post-processor's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from d2ext.export import numpy_results
from d2ext.modeling.region_slots import Slots
from d2ext.systems.upsnet.model import EXPORTED_OPTIONS
from d2ext.systems.upsnet.postprocess import UPSNetPostprocessor
from d2ext.systems.vpsnet.postprocess import (
    ObjectMemory,
    VPSNetPostprocessor,
    track,
    with_dummy,
)

STUFF, THINGS, SLOTS = 3, 4, 6
INPUT, SIZE, SCALE = (60, 90), (40, 60), 1.5


def slots(seed: int, count: int, logit: float) -> Slots:
    """Overlapping boxes, one without a whole pixel, of which ``count`` are in use."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(1, SLOTS, 2, generator=generator) * torch.tensor([50.0, 30.0])
    sides = torch.rand(1, SLOTS, 2, generator=generator) * 40
    corners[:, 3], sides[:, 3] = torch.tensor([10.0, 20.0]), 0.2
    boxes = torch.cat([corners, corners + sides], dim=2)
    scores = torch.linspace(0.9, 0.4, SLOTS)[None].masked_fill(torch.arange(SLOTS) >= count, -1.0)
    classes = torch.randint(0, 2, (1, SLOTS), generator=generator)
    masks = torch.randn(1, SLOTS, 28, 28, generator=generator) + logit
    return Slots(boxes, scores, classes, masks)


CASES: list[tuple[str, dict[str, Any], int, float]] = [
    ("many", {}, SLOTS, 1.0),
    ("joint", {"category_ids": "joint", "unknown": False}, 4, 2.0),
    ("small stuff", {"stuff_area_limit": 1500}, 3, -1.0),
    ("no candidates", {}, 0, 0.0),
    ("without pixels", {}, 3, -50.0),
]


@pytest.mark.parametrize(("name", "options", "count", "logit"), CASES, ids=[x[0] for x in CASES])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_post_processors(
    name: str, options: dict[str, Any], count: int, logit: float, seed: int
) -> None:
    post = UPSNetPostprocessor(
        num_stuff=STUFF, num_things=THINGS, **{"stuff_area_limit": 100} | options
    )
    detections, candidates = slots(seed, SLOTS, 0.5), slots(seed + 10, count, logit)
    score = (
        torch.randn(1, STUFF + THINGS, 16, 24, generator=torch.Generator().manual_seed(seed)) - 1
    )
    found = [x.instances(0, int(x.counts), INPUT) for x in (detections, candidates)]
    expected = post(score[0], *found, SIZE, (SCALE, SCALE))

    outputs = detections.outputs() | candidates.outputs("panoptic_") | {"semantic": score}
    facts = {"results": "upsnet", "options": {x: getattr(post, x) for x in EXPORTED_OPTIONS}}
    facts["options"]["heuristic"] = False
    arrays = {x: values.numpy() for x, values in outputs.items()}
    results = numpy_results.results(facts, arrays, size=SIZE, input_size=INPUT, scale=SCALE)

    panoptic, infos = expected["panoptic_seg"]
    assert (results["panoptic"] != panoptic.numpy()).mean() < 2e-3
    rows = [[x["category_id"], x["isthing"], x["score"]] for x in infos]
    np.testing.assert_allclose(results["segments"][:, :3], np.array(rows, float).reshape(-1, 3))
    assert abs(results["segments"][:, 3] - [x["area"] for x in infos]).max() < 6
    assert any(x["isthing"] for x in infos) == (count > 0), name
    instances = expected["instances"]
    np.testing.assert_allclose(results["boxes"], instances.pred_boxes.tensor, atol=1e-4)
    assert (results["masks"] != instances.pred_masks.numpy()).mean() < 1e-3
    assert (results["classes"] == instances.pred_classes.numpy()).all()


WEIGHTS = [1.0, 2.0, 0.5]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("limit", [0, 7])
def test_tracks_are_the_models(published: bool, limit: int) -> None:
    """Of a video in which objects come back, and frames without candidates."""
    post = VPSNetPostprocessor(
        num_stuff=STUFF,
        num_things=THINGS,
        unknown=False,
        stuff_area_limit=10,
        published_dummy=published,
        published_id_lookup=published,
    )
    names = (*EXPORTED_OPTIONS, "published_id_lookup")
    options = {x: getattr(post, x) for x in names}
    facts = {"options": options | {"match_weights": WEIGHTS, "max_objects": limit}}
    facts["results"] = "vpsnet"
    objects, last = ObjectMemory.empty(5, torch.device("cpu")), None
    generator = torch.Generator().manual_seed(0)
    known = hidden = 0
    for frame in range(24):
        found = slots(frame % 5, (4, 6, 0, 6, 5, 3)[frame % 6], 1.0)
        if frame % 2:  # the second one lies behind the first one
            found.boxes[:, 1], found.classes[:, :2] = found.boxes[:, 0], torch.tensor([0, 1])
            found.mask_logits[:, 0], found.mask_logits[:, 1] = 20.0, 1.0
        found = with_dummy(found) if published else found
        embeddings = 0.3 * torch.randn(1, SLOTS, 5, generator=generator)
        score = torch.randn(1, STUFF + THINGS, 16, 24, generator=generator) - 1
        candidates = found.instances(0, int(found.counts), INPUT)
        arguments = candidates, embeddings[0, : len(candidates)], objects
        candidates.track_ids, objects = track(*arguments, weights=WEIGHTS, limit=limit)
        expected = post(score[0], candidates, candidates, SIZE, (SCALE, SCALE))

        outputs = found.outputs() | {"semantic": score, "embeddings": embeddings}
        arrays = {x: values.numpy() for x, values in outputs.items()}
        given = {"size": SIZE, "input_size": INPUT, "scale": SCALE}
        before = set() if last is None else set(last["object_ids"].tolist())
        last = numpy_results.results(facts, arrays, **given, last=last)
        assert last["track_ids"].tolist() == expected["instances"].track_ids.tolist()
        panoptic, infos = expected["panoptic_seg"]
        assert (last["panoptic"] != panoptic.numpy()).mean() < 2e-3
        rows = [[x["category_id"], x["isthing"], x.get("track_id", 0)] for x in infos]
        np.testing.assert_array_equal(last["segments"][:, [0, 1, 4]], np.array(rows, float))
        assert last["object_ids"].tolist() == objects.ids.tolist()
        np.testing.assert_allclose(last["object_boxes"], objects.boxes, rtol=1e-6)
        known += len(before & set(last["track_ids"].tolist()))
        hidden += sum(x["isthing"] for x in infos) < len(candidates)
    assert known > 10 and hidden > 5 and (len(objects.ids) == 7) == bool(limit)


def test_heuristics_are_refused() -> None:
    options = dict.fromkeys(EXPORTED_OPTIONS) | {"heuristic": True}
    facts = {"results": "upsnet", "options": options}
    with pytest.raises(ValueError, match=r"TEST\.PANOPTIC"):
        numpy_results.results(facts, {}, size=SIZE, input_size=INPUT, scale=SCALE)
