"""The WIDER FACE protocol: average precision of faces in the easy, medium and hard setting.

WIDER FACE: arXiv 1511.06523. As the evaluation that is published with RetinaFace computes it:

- scores are min-max normalised over the whole set;
- a detection takes the face that it overlaps most (pixel areas, so sides are x1 - x0 + 1), if the IoU is
  at least 0.5. If that face does not count in the setting, the detection is left out; if it does, the
  first detection finds it and later ones are false positives, as are those that overlap no face;
- detections of images in which no face is annotated are left out;
- precision and recall are taken at 1,000 thresholds, and AP is the area under the precision envelope.

A division 0/0 (no detection above a threshold) is NaN in the published precision. It always comes with
recall 0, so it never reaches the published AP; here that precision is 1, as nothing that was proposed is
wrong. Scores that are all equal are NaN in the published code, which gives AP 0; here they count as 1. A
setting without faces has AP NaN in both.

Letters: N detections, M faces, T thresholds. Boxes are x, y, w, h in pixels.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from d2ext.data.coco_json import read_text
from d2ext.data.errors import DatasetError

logger = logging.getLogger(__name__)

SETTINGS = ("easy", "medium", "hard")
_MAIN_FILE = "wider_face_val.mat"
# Where the official files lie below the data set's folder: as the data, the evaluation tools and
# RetinaFace's repositories have them.
_FOLDERS = ("", "ground_truth", "eval_tools/ground_truth", "wider_face_split")
# Without the official files: lower faces do not count. On the validation set this leaves 32,764 faces,
# where "hard" has 31,958.
_MIN_HEIGHT = 10.0
# No score at least this high: the detections were probably cut at a high threshold.
_LOW_SCORE = 0.1


@dataclass(frozen=True)
class WiderImage:
    """The faces of one image.

    Attributes:
        boxes: (M, 4) float64 x, y, w, h.
        counts: setting → (M,) bool, the face counts.
    """

    boxes: np.ndarray
    counts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Curve:
    """Precision and recall of one setting.

    Attributes:
        ap: 0 to 1; NaN if no face counts.
        precision, recall: (T,), at normalised scores of at least 1 - (t + 1) / T.
        faces: how many count.
    """

    ap: float
    precision: np.ndarray
    recall: np.ndarray
    faces: int


def pixel_iou(detections: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """IoU of areas of pixels: a box of corners x0, x1 has x1 - x0 + 1 columns, where x1 = x0 + w.

    Args:
        detections: (N, 4) x, y, w, h.
        faces: (M, 4) x, y, w, h.

    Returns:
        (N, M) float64; 0 where boxes do not touch.
    """
    a, b = np.asarray(detections, np.float64)[:, None], np.asarray(faces, np.float64)[None]
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    inter = (high - low + 1).clip(min=0).prod(axis=-1)
    areas = (a[..., 2:] + 1).prod(axis=-1) + (b[..., 2:] + 1).prod(axis=-1)
    return inter / np.where(inter > 0, areas - inter, 1.0)


def match_image(overlaps: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """The face of each detection.

    Args:
        overlaps: (N, M), M > 0.

    Returns:
        (N,) index of the face that it overlaps most (the first of equals), or -1.
    """
    best = overlaps.argmax(axis=1)
    return np.where(overlaps[np.arange(len(best)), best] >= threshold, best, -1)


def count_matches(faces: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each detection adds in one setting.

    Args:
        faces: (N,) index into ``counts`` or -1, in the order of falling scores for each face.
        counts: (M,) bool.

    Returns:
        finds: (N,) bool, it is the first on a face that counts.
        proposed: (N,) bool, it counts as a proposal: it is not on a face that does not count.
    """
    matched = faces >= 0
    on_counted = matched & counts[faces] if len(counts) else matched
    finds = np.zeros(len(faces), dtype=bool)
    finds[np.unique(faces, return_index=True)[1]] = True
    return finds & on_counted, ~matched | on_counted


def wider_curves(
    detections: Mapping[str, np.ndarray],
    images: Mapping[str, WiderImage],
    *,
    iou: float = 0.5,
    thresholds: int = 1000,
) -> dict[str, Curve]:
    """Precision, recall and AP in each setting.

    Args:
        detections: image → (N, 5) x, y, w, h, score. Images without an entry have none; the published
            code takes the rows in the order of the file, here the higher score comes first.
        images: image → its faces.
        iou: overlap from which on a detection is on a face.
        thresholds: T.

    Raises:
        ValueError: detections of an image that is not in ``images``.
    """
    unknown = sorted(set(detections) - set(images))
    if unknown:
        raise ValueError(
            f"There are detections of {len(unknown)} unknown images: {unknown[0]!r} ..."
        )
    ordered = {k: d[np.argsort(-d[:, 4], kind="stable")] for k, d in detections.items() if len(d)}
    levels = 1 - (np.arange(thresholds) + 1) / thresholds
    faces, scores, offset = [], [], 0
    for name, image in images.items():
        if name in ordered and len(image.boxes):
            of_image = match_image(pixel_iou(ordered[name][:, :4], image.boxes), iou)
            faces.append(np.where(of_image >= 0, of_image + offset, -1))
            scores.append(ordered[name][:, 4])
        offset += len(image.boxes)
    everything = np.concatenate([d[:, 4] for d in ordered.values()]) if ordered else np.zeros(0)
    face = np.concatenate(faces) if faces else np.zeros(0, np.int64)
    score = _normalised(np.concatenate(scores) if scores else np.zeros(0), everything)
    # A stable order keeps the one within an image, by which a face knows its first detection.
    falling = np.argsort(-score, kind="stable")
    face, score = face[falling], score[falling]
    ends = np.searchsorted(-score, -levels, side="right")
    settings = next(iter(images.values())).counts if images else {}
    curves = {}
    for setting in settings:
        counts = np.concatenate([image.counts[setting] for image in images.values()])
        finds, proposed = count_matches(face, counts)
        found, proposals = (np.concatenate([[0], x.cumsum()])[ends] for x in (finds, proposed))
        curves[setting] = _curve(found, proposals, int(counts.sum()))
    return curves


def _normalised(scores: np.ndarray, everything: np.ndarray) -> np.ndarray:
    """Scores so that all of the set lie in 0..1; as published, the range holds 0..1's near ends."""
    if not len(everything):
        return scores
    low, high = min(everything.min(), 1.0), max(everything.max(), 0.0)
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)


def _curve(found: np.ndarray, proposals: np.ndarray, faces: int) -> Curve:
    precision = np.where(proposals > 0, found / np.maximum(proposals, 1), 1.0)
    if faces == 0:
        return Curve(float("nan"), precision, np.full(len(found), np.nan), 0)
    recall = found / faces
    x = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return Curve(float((np.diff(x) * envelope[1:]).sum()), precision, recall, faces)


def find_wider_mat(root: str) -> str | None:
    """The folder of the official files at or below ``root``, if they are there."""
    folders = [os.path.join(root, folder) if folder else root for folder in _FOLDERS]
    names = [_MAIN_FILE, *(f"wider_{setting}_val.mat" for setting in SETTINGS)]
    for folder in folders:
        if all(PathManager.isfile(os.path.join(folder, name)) for name in names):
            return folder
    return None


def read_wider_mat(folder: str) -> dict[str, WiderImage]:
    """The faces of the validation set and which of them count, from the four official files.

    Args:
        folder: with ``wider_face_val.mat`` and ``wider_{easy,medium,hard}_val.mat``.

    Returns:
        "event/image" without the ending → its faces.

    Raises:
        DatasetError: files that cannot be used, or SciPy is missing.
    """
    main = _load_mat(os.path.join(folder, _MAIN_FILE), "event_list", "file_list", "face_bbx_list")
    lists = {
        s: _load_mat(os.path.join(folder, f"wider_{s}_val.mat"), "gt_list")[0] for s in SETTINGS
    }
    result = {}
    for e, (event, names, boxes) in enumerate(zip(*(x[:, 0] for x in main), strict=True)):
        for i, (name, faces) in enumerate(zip(names[:, 0], boxes[:, 0], strict=True)):
            counts = {}
            for setting, events in lists.items():
                counts[setting] = np.zeros(len(faces), dtype=bool)
                counts[setting][events[e, 0][i, 0].astype(np.int64).ravel() - 1] = True
            key = f"{event[0]}/{name[0]}"
            result[key] = WiderImage(faces.astype(np.float64).reshape(-1, 4), counts)
    return result


def _load_mat(path: str, *keys: str) -> list[np.ndarray]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as e:
        raise DatasetError(f"Reading '{path}' needs SciPy: pip install scipy.") from e
    try:
        content = loadmat(path)
        return [content[key] for key in keys]
    except (OSError, ValueError, KeyError, NotImplementedError, MatReadError) as e:
        raise DatasetError(f"'{path}' is no file of WIDER FACE's evaluation: {e}") from e


def wider_images(records: list[dict[str, Any]], image_root: str) -> dict[str, WiderImage]:
    """The faces of annotations, where the official files are missing, in one setting, "all".

    Faces that are crowds (WIDER's ``invalid``) or lower than 10 pixels do not count.

    Args:
        records: Detectron2's dicts.
        image_root: folder that the names of images are relative to.
    """
    images = {}
    for record in records:
        annotations = record.get("annotations", [])
        boxes = np.array(
            [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in annotations],
            dtype=np.float64,
        ).reshape(-1, 4)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
        counts = {"all": ~crowd & (boxes[:, 3] >= _MIN_HEIGHT) & (boxes[:, 2] > 0)}
        images[wider_key(record["file_name"], image_root)] = WiderImage(boxes, counts)
    return images


def wider_key(file_name: str, image_root: str) -> str:
    """ "event/image" without the ending: the name of an image in the protocol."""
    return os.path.splitext(os.path.relpath(file_name, image_root))[0].replace(os.sep, "/")


def wider_detections(instances: Instances) -> np.ndarray:
    """Detections in the precision of the text files.

    Args:
        instances: on the CPU, with ``pred_boxes`` and ``scores``.

    Returns:
        (N, 5) float64 x, y, w, h, score, by falling score. Corners are cut to whole pixels towards 0,
        and w = int(x1) - int(x0), as published.
    """
    boxes = instances.pred_boxes.tensor.detach().double().numpy()
    scores = instances.scores.detach().double().numpy()
    order = np.argsort(-scores, kind="stable")
    corners = np.trunc(boxes[order])
    return np.column_stack([corners[:, :2], corners[:, 2:] - corners[:, :2], scores[order]])


def write_wider_results(detections: Mapping[str, np.ndarray], folder: str) -> None:
    """Write WIDER's text files, ``event/image.txt``: name, number, then "x y w h score" a line.

    Args:
        detections: "event/image" → (N, 5) x, y, w, h, score.
    """
    for key, rows in detections.items():
        path = os.path.join(folder, f"{key}.txt")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lines = [key.rsplit("/", 1)[-1], str(len(rows))]
        lines += ["{:g} {:g} {:g} {:g} {:.9g}".format(*row) for row in rows.tolist()]
        # Not flushed to the disk one by one, which would take longer than the evaluation: a file that is
        # cut short has another number of lines than it says.
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def read_wider_results(folder: str) -> dict[str, np.ndarray]:
    """Read what :func:`write_wider_results` or another detector has written.

    Raises:
        DatasetError: no files, or lines that are not five numbers; with the line's number.
    """
    paths = [
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in sorted(names)
        if name.endswith(".txt")
    ]
    if not paths:
        raise DatasetError(f"Folder '{folder}' has no .txt file of detections.")
    return {wider_key(path, folder): _read_result(path) for path in paths}


def _read_result(path: str) -> np.ndarray:
    lines = [line for line in enumerate(read_text(path).splitlines(), 1) if line[1].strip()]
    rows = []
    for number, line in lines[2:]:
        try:
            rows.append([float(v) for v in line.split()])
        except ValueError:
            rows.append([])
        if len(rows[-1]) != 5:
            raise DatasetError(f"Line {number} of '{path}' is not 'x y w h score': {line!r}.")
    if len(lines) < 2 or lines[1][1].strip() != str(len(rows)):
        raise DatasetError(
            f"'{path}' needs the image's name, the number of detections ({len(rows)} follow) and "
            "then a line for each."
        )
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


class WiderFaceEvaluator(DatasetEvaluator):
    """AP in WIDER FACE's settings, and the text files of the detections.

    With the official ``.mat`` files below ``root`` the settings are easy, medium and hard; otherwise
    there is one, "all" (:func:`wider_images`).
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        root: str | None = None,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            dataset_name: registered, with ``image_root`` in its metadata.
            output_dir: where ``wider_face/event/image.txt`` are written.
            root: where the official files are; default ``dataset_root`` of the metadata.
            distributed: gather the predictions of all processes.

        Raises:
            DatasetError: official files of other images than the data set's.
        """
        metadata = MetadataCatalog.get(dataset_name)
        records = DatasetCatalog.get(dataset_name)
        self._name, self._output_dir, self._distributed = dataset_name, output_dir, distributed
        self._image_root = metadata.image_root
        self._images: dict[str, WiderImage] | None
        self._images = wider_images(records, self._image_root)
        root = root or metadata.get("dataset_root")
        folder = find_wider_mat(root) if root else None
        annotated = any("annotations" in record for record in records)
        if (
            folder is not None
            and (official := read_wider_mat(folder)).keys() >= self._images.keys()
        ):
            self._images = {key: official[key] for key in self._images}
        elif not annotated:
            self._images = None
            logger.warning(
                "'%s' has no annotations: detections are written, not scored.", dataset_name
            )
        else:
            logger.warning(
                "'%s' is scored on its annotations, as one setting 'all' (faces that are not invalid "
                "and at least %g pixels high): there are no official files %s and "
                "wider_{easy,medium,hard}_val.mat of these images in '%s'. The published settings "
                "need them; they come with the evaluation tools on WIDER FACE's web site.",
                *(dataset_name, _MIN_HEIGHT, _MAIN_FILE, root),
            )
        self._detections: dict[str, np.ndarray] = {}
        # Of the last evaluation, in the main process.
        self.curves: dict[str, Curve] = {}

    def reset(self) -> None:
        """Forget all predictions."""
        self._detections = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the predictions of some images: ``file_name`` of inputs, ``instances`` of outputs."""
        for one_input, output in zip(inputs, outputs, strict=True):
            key = wider_key(one_input["file_name"], self._image_root)
            self._detections[key] = wider_detections(output["instances"].to("cpu"))

    def evaluate(self) -> dict[str, Any] | None:
        """Gather, write and score.

        Returns:
            ``{"wider_face": {"AP-<setting>": percent}}``; None in all processes but the main one.

        Raises:
            ValueError: boxes that all lie in 0..1: they were not scaled to pixels.
        """
        detections = self._detections
        if self._distributed:
            gathered = comm.gather(detections, dst=0)
            if not comm.is_main_process():
                return None
            detections = dict(itertools.chain.from_iterable(d.items() for d in gathered))
        _check(detections)
        if self._output_dir:
            folder = os.path.join(self._output_dir, "wider_face")
            try:
                write_wider_results(detections, folder)
                logger.info("Detections are in %s as WIDER FACE's text files.", folder)
            except OSError as error:  # a full disk should cost the files, not the scores
                logger.error("Could not write %s (%s). Scores are not affected.", folder, error)
        if self._images is None:
            return OrderedDict()
        self.curves = wider_curves(detections, self._images)
        rows = [[s, c.faces, 100 * c.ap, 100 * c.recall[-1]] for s, c in self.curves.items()]
        table = tabulate(rows, headers=["setting", "faces", "AP", "recall"], floatfmt=".2f")
        logger.info("WIDER FACE, %s:\n%s", self._name, table)
        results = {f"AP-{setting}": 100 * curve.ap for setting, curve in self.curves.items()}
        return OrderedDict(wider_face=results)


def _check(detections: Mapping[str, np.ndarray]) -> None:
    """What users ran into: raise for fractions instead of pixels, warn of a high threshold."""
    rows = np.concatenate([np.zeros((0, 5)), *detections.values()])
    if len(rows) and (rows[:, :2] + rows[:, 2:4]).max() <= 1:
        raise ValueError("All predicted boxes lie in 0..1: pred_boxes are pixels of the image.")
    lowest = float(rows[:, 4].min()) if len(rows) else 0.0
    if lowest >= _LOW_SCORE:
        logger.warning(
            "No detection has a score below %g (lowest %.3g). Published figures keep all above 0.02; a "
            "threshold of 0.6 costs 8 to 11 points of AP.",
            *(_LOW_SCORE, lowest),
        )
