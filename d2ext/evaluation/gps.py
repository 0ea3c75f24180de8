"""Geodesic point similarity of predicted surfaces, and AP and AR by it (NOTES.md, *GPS evaluation*).

GPS of a detection and a person is the mean over the person's points of exp(-d^2 / (2 k^2)), d the
distance over the surface between the annotated and the predicted vertex. GPSm is the root of GPS times
the IoU of the masks. Matching is COCO's, with four differences, all published: at most 20 detections of
an image; persons without points are ignored regions; a detection that finds no one at the last
threshold is ignored, or not, as the person is whose box it overlaps most, by 0.8 or more; and areas of
detections are those of boxes.

Letters: P points of a person.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from d2ext.data.coco_json import compressed_rle
from d2ext.data.densepose.fields import coarse_parts
from d2ext.data.densepose.geodesics import GeodesicDistances
from d2ext.data.densepose.parts import NUM_PARTS

# The published evaluation's side of the frame of points; that of training is 256.
EVALUATION_FRAME = 255
# k in metres, by group of parts: torso, hand, foot, upper leg, lower leg, upper arm, lower arm, head.
_GROUP_K = (0.351, 0.107, 0.126, 0.237, 0.173, 0.142, 0.128, 0.150)
_GROUP_SIZES = (2, 2, 2, 4, 4, 4, 4, 2)
# k of each part 1..24; that of background matters not, its distance is infinite.
PART_K = np.repeat((1.0, *_GROUP_K), (1, *_GROUP_SIZES))
# k of points of which only the vertex is known.
VERTEX_K = 0.255

MAX_DETECTIONS = 20
# Cells of the mean body on a side, and how far a point counts, in cells.
TEMPLATE_SIDE, _BLUR = 64, 1.5
# IoU of boxes from which an unmatched detection is that of an ignored person.
_SAME_PERSON = 0.8
_AREAS = {"all": (0, 1e10), "medium": (32**2, 96**2), "large": (96**2, 1e10)}

Annotation = dict[str, Any]


def pixels_of_points(
    x: np.ndarray, y: np.ndarray, person: Sequence[float], box: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Annotated points → pixels of a detection's box, cut to integers (so that -0.9 is 0).

    Args:
        x, y: (P,) in the frame of the person's box
        person, box: x, y, w, h

    Returns:
        columns, rows: (P,) int64 in the box
        inside: (P,) bool, they are in the box of whole pixels
    """
    columns, rows = (
        (values * person[2 + i] / EVALUATION_FRAME + person[i] - box[i]).astype(np.int64)
        for i, values in enumerate((x, y))
    )
    width, height = (max(int(side), 1) for side in box[2:])
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    return columns, rows, inside


def geodesic_distances(
    geodesics: GeodesicDistances, predicted: np.ndarray, annotated: np.ndarray
) -> np.ndarray:
    """(P,) float64 between vertices; infinite where one is -1, which is none."""
    result = np.full(len(predicted), np.inf)
    both = (predicted >= 0) & (annotated >= 0)
    result[both] = geodesics.distances(predicted[both], annotated[both])
    return result


def geodesic_point_similarity(distances: np.ndarray, k: np.ndarray | float) -> float:
    """GPS, 0..1, of (P,) distances and normalisers, metres both."""
    return float(np.exp(-(distances**2) / (2 * np.square(k))).mean())


def mean_template(
    x: np.ndarray, y: np.ndarray, parts: np.ndarray, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of bodies in their boxes: for each cell the part of most points around it, and their mean
    U and V.

    Args:
        x, y: (n,) in the frame of the boxes
        parts: (n,) 0..24
        u, v: (n,)

    Returns:
        (64, 64) each: part int64, 1..24, U, V
    """
    column, row = (
        np.clip(a * TEMPLATE_SIDE / EVALUATION_FRAME, 0, TEMPLATE_SIDE - 1).astype(int)
        for a in (x, y)
    )
    totals = np.zeros((3, NUM_PARTS, TEMPLATE_SIDE, TEMPLATE_SIDE))
    known = parts > 0
    place = parts[known].astype(int) - 1, row[known], column[known]
    for total, values in zip(totals, (np.ones_like(u), u, v), strict=True):
        np.add.at(total, place, values[known])
    for total in totals.reshape(-1, TEMPLATE_SIDE, TEMPLATE_SIDE):
        total[:] = cv2.GaussianBlur(total, (0, 0), _BLUR, borderType=cv2.BORDER_CONSTANT)
    best = totals[0].argmax(axis=0)[None]
    count, mean_u, mean_v = (np.take_along_axis(t, best, axis=0)[0] for t in totals)
    there = count > 0
    divisor = np.where(there, count, 1)
    return np.where(there, best[0] + 1, 0), mean_u / divisor, mean_v / divisor


def mesh_alignment(
    embeddings: Mapping[str, Tensor],
    geodesics: Mapping[str, GeodesicDistances],
    key_vertices: Mapping[str, Mapping[str, int]],
) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """How well embeddings align meshes: key vertices of one → the most similar vertices of another.

    Args:
        embeddings: (V, D) normalised, by mesh
        geodesics: by mesh
        key_vertices: by mesh and name, vertices from 0; all meshes have the same names

    Returns:
        by mesh, and the mean over meshes: mean geodesic error (metres) and GPS (0..1, k = 0.255) over
        its pairs with the others
    """
    by_mesh = {}
    for name, own in embeddings.items():
        errors = []
        for other in embeddings:
            if other != name:
                names = sorted(key_vertices[name])
                source = [key_vertices[name][n] for n in names]
                similar = (own[source] @ embeddings[other].T).argmax(dim=1).cpu().numpy()
                target = np.array([key_vertices[other][n] for n in names])
                distance = geodesics[other].distances(similar, target)
                gps = geodesic_point_similarity(distance, VERTEX_K)
                errors.append((float(distance.mean()), gps))
        by_mesh[name] = _mean(errors)
    return by_mesh, _mean(list(by_mesh.values()))


def _mean(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = np.mean(values, axis=0).tolist()
    return first, second


def person_mask(annotation: Annotation, height: int, width: int) -> dict[str, Any]:
    """RLE of a person in the image, from the masks of the parts (``dp_masks``), which are stretched to
    the box linearly; without these from ``segmentation``, or the box.
    """
    parts = coarse_parts(annotation.get("dp_masks"))
    x, y, w, h = annotation["bbox"]
    if parts is None:
        segmentation = annotation.get("segmentation")
        if not segmentation:
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        return compressed_rle(segmentation, height, width)
    x0, y0, x1, y1 = int(x), int(y), int(x + w), int(y + h)
    size = max(y1 - y0, 1), max(x1 - x0, 1)
    stretched = _stretched(_stretched(parts > 0, size[0]).T, size[1]).T
    image = np.zeros((height, width), np.uint8, order="F")
    left, top = max(x0, 0), max(y0, 0)
    part = image[top : max(y0 + size[0], 0), left : max(x0 + size[1], 0)]
    cut = stretched[top - y0 :, left - x0 :] > 0.5
    part[:] = cut[: part.shape[0], : part.shape[1]]
    return mask_util.encode(image)


def _stretched(values: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation of rows; the first and the last stay where they are, as of scipy's zoom."""
    place = np.linspace(0, len(values) - 1, length)
    low = place.astype(np.int64)
    weight = (place - low)[:, None]
    return (1 - weight) * values[low] + weight * values[np.minimum(low + 1, len(values) - 1)]


class SurfaceScorer(COCOeval):
    """COCO's evaluation by another similarity than the IoU of boxes."""

    def __init__(
        self,
        annotations: COCO,
        detections: Sequence[Annotation],
        similarity: Callable[[Annotation, Annotation], float],
        first_threshold: float = 0.5,
    ) -> None:
        """
        Args:
            annotations: persons with points have ``dp_x``
            detections: with ``image_id``, ``category_id``, ``bbox`` (XYWH), ``score``
            similarity: (detection, person) → 0..1
            first_threshold: the others follow in steps of 0.05, to 0.95
        """
        self._similarity = similarity
        api = COCO()
        dataset = annotations.dataset
        api.dataset = {key: dataset[key] for key in ("images", "categories")}
        api.dataset["annotations"] = [
            {**d, "id": i, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
            for i, d in enumerate(detections, 1)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            api.createIndex()
        super().__init__(annotations, api, "bbox")
        count = round((0.95 - first_threshold) / 0.05) + 1
        self.params.iouThrs = np.linspace(first_threshold, 0.95, count)
        self.params.maxDets = [MAX_DETECTIONS]
        self.params.areaRng = [list(limits) for limits in _AREAS.values()]
        self.params.areaRngLbl = list(_AREAS)

    def _prepare(self) -> None:
        super()._prepare()
        for persons in self._gts.values():
            for person in persons:
                person["ignore"] = person["ignore"] or not person.get("dp_x")

    def _selected(self, image_id: Any, category: Any) -> list[Annotation]:
        """The detections that count, best first."""
        detections = self._dts[image_id, category]
        order = np.argsort([-d["score"] for d in detections], kind="mergesort")
        return [detections[i] for i in order[:MAX_DETECTIONS]]

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        """(detections, persons)."""
        persons, detections = self._gts[imgId, catId], self._selected(imgId, catId)
        if not persons or not detections:
            return []
        return np.array([[self._similarity(d, p) for p in persons] for d in detections])

    def evaluateImg(
        self,
        imgId: Any,
        catId: Any,
        aRng: Sequence[float],
        maxDet: int,
    ) -> dict[str, Any] | None:
        """As of the base class, with the second matching."""
        result = super().evaluateImg(imgId, catId, aRng, maxDet)
        if result is None or not result["dtIds"] or not result["gtIds"]:
            return result
        detections = [self.cocoDt.anns[i] for i in result["dtIds"]]
        persons = [self.cocoGt.anns[i] for i in result["gtIds"]]
        boxes = [[x["bbox"] for x in of] for of in (detections, persons)]
        overlaps = mask_util.iou(*boxes, [int(p["iscrowd"]) for p in persons])
        matches, ignored = result["dtMatches"], result["dtIgnore"]
        best = overlaps.argmax(axis=1)
        for i, detection in enumerate(detections):
            if matches[-1, i] == 0 and overlaps[i, best[i]] >= _SAME_PERSON:
                outside = not aRng[0] <= detection["area"] <= aRng[1]
                ignored[:, i] = result["gtIgnore"][best[i]] | ((matches[:, i] == 0) & outside)
        return result

    def metrics(self) -> dict[str, float]:
        """AP, AP50, AP75, APm, APl, AR, AR50, AR75, ARm, ARl in percent, NaN where there is no one to
        find; with lower thresholds AP20, AP30, AP40 too."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluate()
            self.accumulate()
        thresholds = self.params.iouThrs
        result = {}
        for name in ("AP", "AR"):
            # Axes of both but for that of AP's recalls: threshold, category, area, number.
            values = self.eval["precision" if name == "AP" else "recall"]
            low = (20, 30, 40) if name == "AP" else ()
            of = {name: values[..., 0, 0]}
            for percent in (*low, 50, 75):
                (row,) = np.nonzero(np.isclose(thresholds, percent / 100))
                if len(row):
                    of[f"{name}{percent}"] = values[row, ..., 0, 0]
            of |= {f"{name}m": values[..., 1, 0], f"{name}l": values[..., 2, 0]}
            for key, x in of.items():
                result[key] = 100 * float(x[x > -1].mean()) if (x > -1).any() else float("nan")
        return result
