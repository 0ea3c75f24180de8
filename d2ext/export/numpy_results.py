"""From an exported file's outputs to results, with NumPy alone: copy this file into a program without
PyTorch. docs/export.md shows how; d2ext itself uses the models' own post-processing, which tests hold
against this.

A function for each system, named by ``results`` in the file's metadata; its keyword arguments, but those
of the image, are their ``options``::

    facts = json.loads(session.get_modelmeta().custom_metadata_map["d2ext"])
    result = results(facts, dict(zip(facts["outputs"], session.run(None, {"images": images}))), ...)

Boxes are (N, 4): x1, y1, x2, y2 in pixels of the image, (0, 0) the outer corner of its first pixel.
Letters: h, w size of the image, H, W of the network's input, N detections, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Results = dict[str, Array]


def results(facts: dict[str, Any], outputs: Results, index: int = 0, **image: Any) -> Results:
    """Results of one image of a batch.

    Args:
        facts: the file's metadata.
        outputs: by name.
        index: of the image.
        image: what the function of the system needs of it: ``size`` (h, w), ...
    """
    functions: dict[str, Callable[..., Results]] = {
        "yolact": yolact,
        "retinaface": retinaface,
        "centernet": centernet,
        "cornernet": cornernet,
        "landmarks": landmarks,
        "upsnet": upsnet,
        "vpsnet": vpsnet,
        "densepose": densepose,
        "densepose_embeddings": densepose_embeddings,
    }
    return functions[facts["results"]](
        {name: x[index] for name, x in outputs.items()}, **image, **facts["options"]
    )


def place(image: Array, facts: dict[str, Any]) -> tuple[Array, tuple[int, int]]:
    """An image (h, w, 3) in the middle of the input of a file for CornerNet or CenterNet.

    Returns:
        (1, 3, H, W) of the file's dtype, and ``corner``: x, y of the input's corner in pixels of the
        image.
    """
    given = facts["input"]
    unit, less = given["multiple"], given["less"]
    height, width = image.shape[:2]
    inner = np.array([height, width])
    # CenterNet's input, with less == 0, is never as large as the image: published.
    outer = -(-(inner + less) // unit) * unit - less if less else (inner // unit + 1) * unit
    outer = np.array([own or side for own, side in zip(given["shape"][2:], outer, strict=True)])
    if (outer < inner).any():
        raise ValueError(f"The image has {width}x{height} pixels, the input {outer[1]}x{outer[0]}.")
    (top, left), (rows, columns) = outer // 2 - inner // 2, inner // 2 + outer // 2
    image = image[:rows, :columns] if less else image  # published: a side as long loses a pixel
    images = np.zeros((1, 3, *outer), given["dtype"])
    images[0, :, top : top + image.shape[0], left : left + image.shape[1]] = image.transpose(
        2, 0, 1
    )
    return images, (-int(left), -int(top))


def yolact(
    one: Results, *, size: tuple[int, int], threshold: float, crop: str, truncate: bool
) -> Results:
    """boxes, scores, classes, masks (N, h, w) bool; YOLACT++ also mask_scores.

    Args:
        one: boxes (S, 4) relative to the image, scores (S,), -1 in empty slots, which come last,
            classes, coefficients (S, k), prototypes (H/4, W/4, k), count.
        size: (h, w); the input was the image, resized to the file's size.
    """
    height, width = size
    count = int(one["count"])
    boxes = one["boxes"][:count]
    masks = _sigmoid(
        one["coefficients"][:count] @ one["prototypes"].reshape(-1, one["prototypes"].shape[2]).T
    )
    masks = masks.reshape(count, *one["prototypes"].shape[:2])
    if crop == "before":
        masks = masks * _inside(boxes, masks.shape[1], masks.shape[2])
    masks = _resized(_resized(masks, 1, height), 2, width) > threshold
    if crop == "after":
        masks &= _inside(boxes, height, width)
    pixels = _clipped(boxes * np.array([width, height] * 2, boxes.dtype), size)
    result = {
        name: one[name][:count] for name in ("scores", "classes", "mask_scores") if name in one
    }
    return result | {"boxes": np.trunc(pixels) if truncate else pixels, "masks": masks}


def retinaface(
    one: Results,
    *,
    size: tuple[int, int],
    scale: float = 1.0,
    nms_threshold: float,
    max_detections: int,
    clip: bool,
    priors_per_cell: int = 0,
) -> Results:
    """boxes, scores, classes, points (N, P, 2), meshes (N, V, 3), as the model has them; best first.

    Args:
        one: scores (S,) best first, classes, boxes (S, 4) and points (S, P, 2) in pixels of the input,
            count of the slots above the score's threshold; with meshes the cells' context features
            ``vectors`` (cells, c), the slots' priors and their index, and the layer that makes vertices.
        size: (h, w).
        scale: pixels of the input per pixel of the image.
    """
    count = int(one["count"])
    boxes, classes = one["boxes"][:count] / scale, one["classes"][:count]
    keep = greedy_nms(boxes, classes, nms_threshold, max_detections)
    result = {"boxes": boxes[keep], "scores": one["scores"][keep], "classes": classes[keep]}
    if clip:
        result["boxes"] = _clipped(result["boxes"], size)
    if "points" in one:
        result["points"] = one["points"][keep] / scale
    if "vectors" in one:
        cells, kinds = np.divmod(one["index"][keep], priors_per_cell)
        weight = one["mesh_weight"].reshape(priors_per_cell, -1, one["vectors"].shape[1])
        bias = one["mesh_bias"].reshape(priors_per_cell, -1)
        offsets = np.einsum("nc,nvc->nv", one["vectors"][cells], weight[kinds]) + bias[kinds]
        priors = one["priors"][keep, None]  # centres and sides
        origin = np.concatenate([priors[..., :2], np.zeros_like(priors[..., :1])], axis=2)
        result["meshes"] = (
            origin + offsets.reshape(len(keep), -1, 3) * 0.1 * priors[..., 2:3]
        ) / scale
    return result


def centernet(
    one: Results,
    *,
    size: tuple[int, int],
    corner: tuple[float, float],
    scale: float = 1.0,
    stride: int,
    clip: bool,
    soft_nms: bool,
) -> Results:
    """boxes, scores, classes, centers (N, 2), with poses joints (N, J, 2) in COCO's convention, where a
    pixel's centre is a whole number; best first.

    Args:
        one: boxes (S, 4), centers (S, 2), joints (S, 2J) in cells of the maps, scores (S,), classes.
        size: (h, w).
        corner, scale: see :func:`place`; pixels of the input per pixel of the image.
    """
    if soft_nms:
        raise ValueError("Soft-NMS of CenterNet is not in this file: export without TEST.SOFT_NMS.")
    cell = (stride / scale, stride / scale)
    result = {
        name: _moved(one[name], cell, corner)
        for name in ("boxes", "centers", "joints")
        if name in one
    }
    if clip:
        result["boxes"] = _clipped(result["boxes"], size)
    if "joints" in result:
        result["joints"] = result["joints"].reshape(len(one["joints"]), -1, 2)
    return result | {"scores": one["scores"], "classes": one["classes"]}


def cornernet(
    one: Results,
    *,
    size: tuple[int, int],
    input_size: tuple[int, int],
    corner: tuple[float, float],
    scale: float = 1.0,
    stride: int,
    margin: float = math.inf,
    sigma: float,
    score_threshold: float,
    merge: bool,
    merge_exponent: float,
    keep_stale: bool,
    max_detections: int,
) -> Results:
    """boxes, scores, classes, corner_scores (N, 2), distances (N,) of the corners' embeddings, with
    triplets center_scores and centers (N, 2); best first.

    Args:
        one: of 2 views, the image and its mirror image (or of 1): boxes (2, S, 4) in cells of the maps,
            scores (2, S), classes, corner_scores, distances, count (2,) of the pairs that are not
            rejected; with triplets centers (2, K, 4): x, y, score, class.
        size, input_size: (h, w), (H, W).
        corner, scale: see :func:`place`; pixels of the input per pixel of the image.
        margin: a pair that exceeds the image by as many pixels of the input is rejected.
    """
    if merge:
        raise ValueError("Merging soft-NMS is not in this file: export with TEST.NMS_MERGE False.")
    rows, columns = (-(-side // stride) for side in input_size)
    cell = (input_size[1] / columns / scale, input_size[0] / rows / scale)
    used = np.arange(one["scores"].shape[1]) < one["count"][:, None]
    boxes = one["boxes"].copy()
    boxes[1:, :, [0, 2]] = columns - boxes[1:, :, [2, 0]]
    boxes = _moved(boxes[used], cell, corner)
    result = {name: one[name][used] for name in ("scores", "classes", "corner_scores", "distances")}
    limit, margin = np.array(size[::-1], boxes.dtype), margin / scale
    inside = ((boxes[:, :2] > -margin) & (boxes[:, 2:] < limit + margin)).all(axis=1)
    result = {name: x[inside] for name, x in result.items()}
    result["boxes"] = _clipped(boxes[inside], size)
    if "centers" in one:
        centers = one["centers"].copy()
        centers[1:, :, 0] = columns - centers[1:, :, 0]
        centers = centers.reshape(-1, 4)
        points = _moved(centers[:, :2], cell, corner)
        result = _confirmed(result, np.concatenate([points, centers[:, 2:]], axis=1))
    return _soft_nms(result, sigma, score_threshold, keep_stale, max_detections)


def landmarks(one: Results, *, matrix: Array, truncate: bool, threshold: float) -> Results:
    """points (K, 2) in pixels of the image, point_scores (K,), score (): the mean of those above the
    threshold.

    Args:
        one: points (K, 2) in pixels of the crop, scores (K,).
        matrix: (2, 3), from pixels of the crop to those of the image, see :func:`crop_matrix`.
    """
    points = one["points"].astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    above = one["scores"] > threshold
    score = (np.minimum(one["scores"], 1) * above).sum() / max(above.sum(), 1)
    return {
        "points": (np.trunc(points) if truncate else points).astype(np.float32),
        "point_scores": one["scores"],
        "score": score,
    }


def crop_matrix(box: Array, input_size: tuple[int, int], padding: float) -> Array:
    """(2, 3), from pixels of the crop (H, W) to those of the image, of a box x1, y1, x2, y2; ``padding``
    is ``MODEL.LANDMARKS.CROP.PADDING``. ``cv2.warpAffine`` wants it for centres of pixels:
    ``matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5``, with ``WARP_INVERSE_MAP``."""
    ratio = input_size[1] / input_size[0]
    center = (box[:2] + box[2:]) / 2
    width, height = np.maximum(box[2:] - box[:2], 1)
    height = max(height, width / ratio) * padding
    sides = np.array([height * ratio, height])
    return np.column_stack([np.diag(sides / input_size[::-1]), center - sides / 2])


def upsnet(
    one: Results, *, size: tuple[int, int], scale: float, heuristic: bool, **options: Any
) -> Results:
    """boxes, scores, classes, masks (N, h, w) bool, best first; panoptic (h, w) int32: 0 void, k the
    k-th row of segments (K, 4): category id, whether it is a thing, score, pixels; semantic (h, w): arg
    max of the classes, stuff first.

    Args:
        one: boxes (S, 4) in pixels of the input, scores (S,), classes, mask_logits (S, M, M), count, the
            same of the panoptic head's candidates, and semantic (C, H/4, W/4) logits.
        size: (h, w).
        scale: pixels of the input per pixel of the image.
        options: those of the file, and ``input_size``: of the resized image, without padding, what the
            input ``sizes`` said.
    """
    if heuristic:
        raise ValueError("Merging heuristics are not in this file: set TEST.PANOPTIC to head.")
    candidates = _used(one, "panoptic_")
    if len(candidates["scores"]) == 0:
        # Published: a channel of zeros, read as the last stuff class.
        candidates = {"classes": np.array([-1]), "scores": np.ones(1)}
        candidates["boxes"] = _single([0, 0, 1, 1])[None]
        candidates["mask_logits"] = 0 * one["panoptic_mask_logits"][:1]
    panoptic = _panoptic(one["semantic"], candidates, size=size, scale=scale, **options)
    return _instances(_used(one), size, scale) | panoptic


def vpsnet(
    one: Results,
    *,
    size: tuple[int, int],
    scale: float,
    last: Results | None = None,
    match_weights: Sequence[float],
    max_objects: int,
    **options: Any,
) -> Results:
    """As :func:`upsnet`, of a frame. With ids, also ``track_ids`` (N,) int64, from 1, a fifth column of
    the segments, 0 for stuff, and the objects of the video so far: ``object_boxes`` (M, 4) in pixels of
    the input, ``object_embeddings`` (M, D), ``object_classes``, ``object_ids``, ``object_seen`` (M,) and
    ``object_clock``: the number of frames so far, and the next id.

    Args:
        one: boxes (S, 4) in pixels of the input, scores (S,), classes, mask_logits (S, M, M), count,
            semantic (C, H/4, W/4) logits, and with ids embeddings (S, D).
        size, scale, options: see :func:`upsnet`.
        last: results of the frame before; None: the video begins.
    """
    candidates, ids = _used(one), None
    tracks: Results = {}
    real = candidates["classes"] >= 0  # published: -1 stands for "nothing detected"
    if "embeddings" in one:
        ids, tracks = _tracked(candidates, last, match_weights, max_objects)
        tracks["track_ids"] = ids[real]
    panoptic = _panoptic(one["semantic"], candidates, ids, size=size, scale=scale, **options)
    result = _instances({name: x[real] for name, x in candidates.items()}, size, scale)
    return result | panoptic | tracks


def _used(one: Results, prefix: str = "") -> Results:
    """What is in the slots in use."""
    names = ("boxes", "scores", "classes", "mask_logits", "embeddings")
    count = int(one[f"{prefix}count"])
    return {x: one[f"{prefix}{x}"][:count] for x in names if f"{prefix}{x}" in one}


def _tracked(
    candidates: Results, last: Results | None, weights: Sequence[float], limit: int
) -> tuple[Array, Results]:
    """Ids (N,) of a frame's candidates, and the objects of :func:`vpsnet`."""
    boxes, embeddings, classes = (candidates[x] for x in ("boxes", "embeddings", "classes"))
    none = np.zeros(0, np.int64)
    objects = last or {
        "object_boxes": boxes[:0],
        "object_embeddings": embeddings[:0],
        **dict.fromkeys(("object_classes", "object_ids", "object_seen"), none),
        "object_clock": np.array([0, 1]),
    }
    frame, next_id = objects["object_clock"]
    # Column 0: a new object.
    logits = np.pad(embeddings @ objects["object_embeddings"].T, [(0, 0), (1, 0)])
    logits = logits - logits.max(axis=1, keepdims=True)
    logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    same = classes[:, None] == objects["object_classes"]
    bonus = weights[1] * _overlaps(boxes, objects["object_boxes"]) + weights[2] * same
    scores = logits + weights[0] * np.log(candidates["scores"])[:, None]
    scores = scores + np.pad(bonus, [(0, 0), (1, 0)], constant_values=weights[2])
    wanted, index = scores.argmax(axis=1), np.full(len(boxes), -1)
    for column in np.unique(wanted[wanted > 0]):  # the one with the highest score gets the object
        rows = np.flatnonzero(wanted == column)
        index[rows[scores[rows, column].argmax()]] = column - 1
    known = np.flatnonzero(index >= 0)
    new = np.concatenate([np.flatnonzero(wanted == 0), np.flatnonzero((wanted > 0) & (index < 0))])
    ids = np.zeros(len(boxes), np.int64)
    ids[known] = objects["object_ids"][index[known]]
    ids[new] = next_id + np.arange(len(new))
    values = {"boxes": boxes, "embeddings": embeddings, "classes": classes, "ids": ids}
    values["seen"] = np.full(len(boxes), frame)
    moved = {}
    for name, own in values.items():
        old = objects[f"object_{name}"].copy()
        if name != "classes":  # that of the first detection stays
            old[index[known]] = own[known]
        moved[f"object_{name}"] = np.concatenate([old, own[new]])
    if 0 < limit < len(moved["object_ids"]):  # those seen last
        newest = np.sort(np.argsort(-moved["object_seen"], kind="stable")[:limit])
        moved = {name: x[newest] for name, x in moved.items()}
    return ids, moved | {"object_clock": np.array([frame + 1, next_id + len(new)])}


def _instances(candidates: Results, size: tuple[int, int], scale: float) -> Results:
    """boxes, scores, classes and masks of :func:`upsnet`."""
    last = _single([0, 0, 1, 1])  # boxes end behind their last pixel
    boxes = (candidates["boxes"] - last) / np.float32(scale) + last
    boxes = np.minimum(boxes, _single([*size[::-1]] * 2))
    masks = np.zeros((len(boxes), *size), bool)
    for mask, box, logits in zip(masks, boxes, candidates["mask_logits"], strict=True):
        mask[:] = _pasted(_sigmoid(logits), box, *map(np.arange, size)) >= 0.5
    result = {name: candidates[name] for name in ("scores", "classes")}
    return result | {"boxes": boxes, "masks": masks}


def _panoptic(
    score: Array,
    candidates: Results,
    ids: Array | None = None,
    *,
    size: tuple[int, int],
    input_size: tuple[int, int],
    scale: float,
    num_stuff: int,
    overlap_fraction: float,
    unknown: bool,
    category_ids: str,
    stuff_area_limit: int,
    published_id_lookup: bool = False,
) -> Results:
    """panoptic, segments and semantic of :func:`upsnet`; with ids (N,) those of :func:`vpsnet`."""
    boxes, classes, scores, logits = (
        candidates[x] for x in ("boxes", "classes", "scores", "mask_logits")
    )
    boxes = boxes - _single([0, 0, 1, 1])  # they end behind their last pixel
    keep = _pruned(boxes, classes, logits, [4 * x for x in score.shape[1:]], overlap_fraction)
    if len(keep) == 0 and len(boxes):  # published: the first one, without its mask
        keep, logits = [0], 0 * logits
    boxes, classes, scores, logits = (x[keep] for x in (boxes, classes, scores, logits))
    rows, columns = (
        np.minimum((np.arange(own) * scale).astype(np.int64), side - 1)
        for own, side in zip(size, input_size, strict=True)
    )
    labels, semantic = _fused(score, boxes, classes, logits, rows, columns, num_stuff, unknown)
    ids = None if ids is None else ids[keep]
    if ids is not None and published_id_lookup:
        # The place among the instances that have pixels, taken for the channel.
        present = np.isin(num_stuff + np.arange(len(ids)), labels)
        ids = ids[(present.cumsum() - 1).clip(0)]
    table = _cleaned(labels, semantic, classes, num_stuff, len(score), stuff_area_limit)
    labels = table[labels]
    joint = category_ids == "joint"
    panoptic, segments = np.zeros(size, np.int32), []
    for label in [*range(num_stuff, num_stuff + len(classes)), *range(num_stuff)]:
        pixels, thing = labels == label, label - num_stuff
        if not pixels.any():
            continue
        category = classes[thing] + num_stuff * joint if thing >= 0 else label + 1 - joint
        row = [category, thing >= 0, scores[thing] if thing >= 0 else 1.0, pixels.sum()]
        if ids is not None:
            row.append(ids[thing] if thing >= 0 else 0)
        segments.append(row)
        panoptic[pixels] = len(segments)
    table = np.array(segments, np.float64).reshape(-1, 4 if ids is None else 5)
    return {"panoptic": panoptic, "segments": table, "semantic": semantic}


def densepose(one: Results, *, size: tuple[int, int], input_size: tuple[int, int]) -> Results:
    """boxes, scores, classes, best first; surfaces (N,) of arrays (C, h', w'), one of the size of each
    person's box, cut to whole pixels (:func:`whole_boxes`): part 1..24 or 0, U, V, both 0 where the part
    is; and by the names of the file's outputs: ``sigma_2``, ``kappa_u``, ``kappa_v`` of the part before
    softplus, ``fine_segm_confidence``, ``coarse_segm_confidence``.

    Args:
        one: boxes (S, 4) in pixels of the input, scores (S,), classes, count; of the slots in use the
            maps coarse_segm (n, 2 or 15, M, M) logits, background first, fine_segm (n, 25, M, M), u, v.
        size: (h, w).
        input_size: of the resized image, without padding: what the input ``sizes`` said.
    """
    result, rows = _in_image(one, size, input_size)
    known = ("coarse_segm", "fine_segm")
    names = ["u", "v", *sorted(x for x in one if x.startswith(("sigma", "kappa")))]
    names += sorted(x for x in one if x.endswith("_segm_confidence"))
    surfaces = np.empty(len(rows), object)
    for i, (row, box) in enumerate(zip(rows, whole_boxes(result["boxes"]), strict=True)):
        maps = {x: _resized_to(one[x][row], box) for x in (*known, *names)}
        part = np.where(_foreground(maps["coarse_segm"]), maps["fine_segm"].argmax(axis=0), 0)
        planes = [part.astype(np.float32)]
        for name in names:
            if name.endswith("_segm_confidence"):
                planes.append(maps[name][0])
            else:
                own = np.take_along_axis(maps[name], part[None], axis=0)[0]
                planes.append(np.where(part > 0, own, np.float32(0)))
        surfaces[i] = np.stack(planes)
    return result | {"surfaces": surfaces}


def densepose_embeddings(
    one: Results, *, size: tuple[int, int], input_size: tuple[int, int], mesh: str = ""
) -> Results:
    """boxes, scores, classes, best first; surfaces (N,) of arrays (h', w') int64, one of the size of
    each person's box, cut to whole pixels (:func:`whole_boxes`): the nearest vertex of the mesh, -1
    where there is no person.

    Args:
        one: as of :func:`densepose`, with the maps coarse_segm and embedding (n, D, M, M); and
            ``vertices_<mesh>`` (V, D) of each mesh.
        size, input_size: as of :func:`densepose`.
        mesh: its name; default: the first one.
    """
    result, rows = _in_image(one, size, input_size)
    mesh = mesh or sorted(x for x in one if x.startswith("vertices_"))[0].removeprefix("vertices_")
    vertices = one[f"vertices_{mesh}"]
    squares = (vertices * vertices).sum(axis=1)
    surfaces = np.empty(len(rows), object)
    for i, (row, box) in enumerate(zip(rows, whole_boxes(result["boxes"]), strict=True)):
        inside = _foreground(_resized_to(one["coarse_segm"][row], box))
        embeddings = _resized_to(one["embedding"][row], box)[:, inside].T
        surfaces[i] = np.full(inside.shape, -1, np.int64)
        surfaces[i][inside] = (squares - 2 * embeddings @ vertices.T).argmin(axis=1)
    return result | {"surfaces": surfaces}


def whole_boxes(boxes: Array) -> Array:
    """Boxes (N, 4) → int64 x, y, width, height, cut to whole pixels, at least one."""
    sides = np.maximum((boxes[:, 2:] - boxes[:, :2]).astype(np.int64), 1)
    return np.concatenate([boxes[:, :2].astype(np.int64), sides], axis=1)


def greedy_nms(boxes: Array, classes: Array, threshold: float, limit: int) -> Array:
    """Indices of those boxes (N, 4), best first, that no better one of their class overlaps by more than
    the threshold, at most ``limit``. Sides count whole pixels, one more than the difference."""
    boxes = boxes.astype(np.float64)
    keep: list[int] = []
    left = np.arange(len(boxes))
    while len(left) and len(keep) < limit:
        best, left = left[0], left[1:]
        keep.append(int(best))
        overlap = _pixel_overlap(boxes[best], boxes[left])
        left = left[(overlap <= threshold) | (classes[left] != classes[best])]
    return np.array(keep, np.int64)


def _in_image(
    one: Results, size: tuple[int, int], input_size: tuple[int, int]
) -> tuple[Results, Array]:
    """boxes, scores and classes in the image, without boxes that have no area there; their slots."""
    count = int(one["count"])
    factors = [own / other for own, other in zip(size[::-1], input_size[::-1], strict=True)]
    boxes = (one["boxes"][:count] * _single(factors * 2)).clip(0, _single([*size[::-1]] * 2))
    rows = (boxes[:, 2:] > boxes[:, :2]).all(axis=1).nonzero()[0]
    return {
        "boxes": boxes[rows],
        "scores": one["scores"][rows],
        "classes": one["classes"][rows],
    }, rows


def _resized_to(maps: Array, box: Array) -> Array:
    """Maps (C, M, M) → (C, height, width) of a box x, y, width, height."""
    return _resized(_resized(maps, 2, box[2]), 1, box[3])


def _foreground(coarse: Array) -> Array:
    return coarse[1:].max(axis=0) > coarse[0]


def _confirmed(result: Results, centers: Array) -> Results:
    """Boxes with a centre of their class in their middle, see CenterNetTriplets."""
    low, high = result["boxes"][:, :2], result["boxes"][:, 2:]
    small = ((high - low).prod(axis=1) <= 150 * 150)[:, None]
    begin = np.where(small, (2 * low + high) / 3, (3 * low + 2 * high) / 5)
    end = np.where(small, (low + 2 * high) / 3, (2 * low + 3 * high) / 5)
    points = centers[None, :, :2]
    inside = ((points > begin[:, None]) & (points < end[:, None])).all(axis=2)
    inside &= centers[None, :, 3] == result["classes"][:, None]
    keep = inside.any(axis=1)
    matched = centers[inside[keep].argmax(axis=1)]
    result = {name: x[keep] for name, x in result.items()}
    result |= {"centers": matched[:, :2], "center_scores": matched[:, 2]}
    result["scores"] = (2 * result["scores"] + matched[:, 2]) / 3
    order = np.argsort(-result["scores"], kind="stable")
    return {name: x[order] for name, x in result.items()}


def _soft_nms(
    result: Results, sigma: float, threshold: float, keep_stale: bool, limit: int
) -> Results:
    """Gaussian soft-NMS in each class, as published: a discarded row is overwritten by the last one,
    whose own row stays (*stale*) with its former score."""
    order = np.argsort(result["classes"], kind="stable")
    result = {name: x[order] for name, x in result.items()}
    boxes, scores = result["boxes"].astype(np.float32), result["scores"].astype(np.float32)
    rows, keep = np.arange(len(scores)), np.zeros(len(scores), bool)
    ends = np.searchsorted(result["classes"], np.unique(result["classes"]), "right")
    for begin, end in zip([0, *ends], ends, strict=False):
        row, count = begin, end
        while row < count:
            best = row + scores[row:count].argmax()
            for column in (boxes, scores, rows):
                column[[row, best]] = column[[best, row]]
            left = np.arange(row + 1, count)
            overlap = _pixel_overlap(boxes[row], boxes[left])
            weighted = scores[left] * np.exp(-(overlap * overlap) / np.float32(sigma))
            dropped = (overlap > 0) & (weighted < threshold)
            sources, number, position = np.arange(len(left)), len(left), 0
            stale = np.zeros(len(left), bool)
            while dropped.any() and position < number:
                if dropped[sources[position]]:
                    number -= 1
                    stale[number] = position != number
                    sources[position] = sources[number]
                else:
                    position += 1
            scores[left] = np.where(stale, scores[left], weighted[sources])
            boxes[left], rows[left] = boxes[left][sources], rows[left][sources]
            count -= int(dropped.sum())
            row += 1
        keep[begin:count] = True
    result = {name: x[rows] for name, x in result.items()} | {"boxes": boxes, "scores": scores}
    if not keep_stale:
        result = {name: x[keep] for name, x in result.items()}
    order = np.argsort(-result["scores"], kind="stable")
    if len(order) > limit > 0:  # and what ties with the last one
        order = order[result["scores"][order] >= result["scores"][order[limit - 1]]]
    return {name: x[order] for name, x in result.items()}


def _tents(cell: Array, cells: int) -> Array:
    """(n,) places between cells → (n, cells) their weights."""
    return np.maximum(
        1 - abs(cell.astype(np.float32)[:, None] - np.arange(cells, dtype=np.float32)), 0
    )


def _pasted(grid: Array, box: Array, rows: Array, columns: Array, *, whole: bool = False) -> Array:
    """Values (M, M) spread over a box, at given pixels: bilinear, zeros around.

    Args:
        whole: the box is one of whole pixels, its ends included; its border is repeated up to them.
    """
    lines = []
    for pixels, low, high in ((rows, box[1], box[3]), (columns, box[0], box[2])):
        low, length = (int(low), int(high) - int(low) + 1) if whole else (low, high - low)
        cell = (pixels + np.float32(0.5) - low) * np.float32(
            len(grid) / (max(length, 1) if whole else length)
        ) - np.float32(0.5)
        weights = _tents(cell.clip(0, len(grid) - 1) if whole else cell, len(grid))
        inside = (pixels >= low) & (pixels < low + length)
        lines.append(weights * inside[:, None] if whole else weights)
    return lines[0] @ grid @ lines[1].T


def _pruned(
    boxes: Array, classes: Array, logits: Array, size: Sequence[int], overlap_fraction: float
) -> list[int]:
    """Which masks, best first, have pixels and are not covered by better ones of their class."""
    covered: dict[int, Array] = {}
    keep = []
    for i, (box, kind) in enumerate(zip(boxes, classes.tolist(), strict=True)):
        mask = _pasted(logits[i], box, *map(np.arange, size), whole=True) > 0
        before = covered.setdefault(kind, np.zeros(size, bool))
        if mask.any() and (mask & before).sum() / mask.sum() <= overlap_fraction:
            before |= mask
            keep.append(i)
    return keep


def _fused(
    score: Array,
    boxes: Array,
    classes: Array,
    logits: Array,
    rows: Array,
    columns: Array,
    num_stuff: int,
    unknown: bool,
) -> tuple[Array, Array]:
    """At pixels ``rows`` x ``columns`` of the input: labels (stuff, instances, unknown) and classes."""
    shape = len(rows), len(columns)
    lines = [
        _tents(((pixels + 0.5) / 4 - 0.5).clip(0, cells - 1), cells)
        for pixels, cells in ((rows, score.shape[1]), (columns, score.shape[2]))
    ]

    def view(channel: int) -> Array:
        return lines[0] @ score[channel] @ lines[1].T

    best, label = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int64)
    thing, semantic = best.copy(), label + num_stuff
    for c in range(len(score)):
        highest, where = (best, label) if c < num_stuff else (thing, semantic)
        values = view(c)
        where[values > highest] = c
        np.maximum(highest, values, out=highest)
    semantic = np.where(thing > best, semantic, label)
    inside = np.full(shape, -np.inf, np.float32)
    for i, (box, kind) in enumerate(zip(boxes, classes.tolist(), strict=True)):
        values = np.zeros(shape, np.float32)
        if kind >= 0:
            whole = np.concatenate([np.trunc(box[:2]), np.round(box[2:])])
            within = [(p >= whole[a]) & (p <= whole[a + 2]) for p, a in ((rows, 1), (columns, 0))]
            values = np.where(within[0][:, None] & within[1], view(num_stuff + kind), values)
        inside = np.maximum(inside, values)
        if kind >= 0:
            values = values + _pasted(logits[i], box, rows, columns, whole=True)
        label[values > best] = num_stuff + i
        best = np.maximum(best, values)
    if unknown:
        label[(thing - inside if len(boxes) else thing) > best] = num_stuff + len(boxes)
    return label, semantic


def _cleaned(
    labels: Array, semantic: Array, classes: Array, num_stuff: int, num_classes: int, limit: int
) -> Array:
    """Label → what it becomes: an instance of which half is one stuff class becomes that, small stuff
    and "unknown" void, -1."""
    count = num_stuff + len(classes) + 1
    pixels = np.bincount((labels * num_classes + semantic).ravel(), minlength=count * num_classes)
    pixels = pixels.reshape(count, num_classes)
    table, votes = np.arange(count), pixels[num_stuff:-1]
    winner = votes.argmax(axis=1)
    stuff = (winner < num_stuff) & (2 * votes.max(axis=1) >= votes.sum(axis=1))
    unchanged = np.where(classes < 0, num_stuff - 1, table[num_stuff:-1])
    table[num_stuff:-1] = np.where(stuff, winner, unchanged)
    table[-1] = -1
    areas = np.bincount(table[:-1], weights=pixels[:-1].sum(axis=1), minlength=count)
    small = (table < num_stuff) & (areas[table] < limit)
    return np.where(small, -1, table)


def _overlaps(boxes: Array, others: Array) -> Array:
    """IoU (N, M) of boxes (N, 4) and (M, 4)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    common = (np.minimum(boxes[:, None, 2:], others[:, 2:]) - low).clip(0).prod(axis=2)
    areas, other = ((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (boxes, others))
    return np.where(common > 0, common / (areas[:, None] + other - common).clip(1e-9), 0)


def _pixel_overlap(box: Array, boxes: Array) -> Array:
    """IoU of a box (4,) with boxes (N, 4), sides counted in whole pixels."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + 1
    common = sides.prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    union = (box[2:] - box[:2] + 1).prod() + areas - common
    return np.where((sides > 0).all(axis=1), common / union, np.float32(0))


def _moved(points: Array, cell: tuple[float, float], corner: tuple[float, float]) -> Array:
    """Cells (N, 2n) x, y, x, y, ... → pixels of the image."""
    repeats = points.shape[1] // 2
    return points * np.tile(_single(cell), repeats) + np.tile(_single(corner), repeats)


def _single(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)


def _clipped(boxes: Array, size: tuple[int, int]) -> Array:
    """Corners in order, in the image."""
    low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])
    return np.concatenate([low, high], axis=1).clip(0, np.array([*size[::-1]] * 2, boxes.dtype))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _inside(boxes: Array, height: int, width: int) -> Array:
    """(N, height, width) bool: cells of a grid in boxes relative to it, a cell wider on each side."""
    sides = []
    for axis, length in ((1, height), (0, width)):
        ends = np.sort(boxes[:, [axis, axis + 2]] * length, axis=1) + _single([-1, 1])
        low, high = ends.clip(0, length).T[:, :, None]
        sides.append((np.arange(length) >= low) & (np.arange(length) < high))
    return sides[0][:, :, None] & sides[1][:, None, :]


def _resized(masks: Array, axis: int, length: int) -> Array:
    """Bilinear along one axis, pixels being areas."""
    old = masks.shape[axis]
    position = ((np.arange(length, dtype=np.float32) + 0.5) * (old / length) - 0.5).clip(0)
    first = np.minimum(position.astype(np.int64), old - 1)
    part = (position - first).reshape([-1 if i == axis else 1 for i in range(masks.ndim)])
    second = np.minimum(first + 1, old - 1)
    return masks.take(first, axis) * (1 - part) + masks.take(second, axis) * part
