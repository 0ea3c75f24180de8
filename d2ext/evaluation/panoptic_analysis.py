"""Where panoptic quality is lost: per class, per image, between classes.

Written into a folder:

- ``categories.csv``: PQ, SQ, RQ, matches, wrong and missed segments of each class, and what it is
  confused with most;
- ``images.csv``: the same for each image, worst first;
- ``confusion.csv``, ``confusion_pixels.csv``: rows annotated, columns predicted, in segments and pixels;
- ``analysis.json``: all of it but the matrices;
- ``confusion.png``, and ``worst/``: the worst images, picture, annotations and prediction side by side.

PQ of an image is the mean over the classes that occur in it, so that it is what panopticapi gives for a
data set of this one image.
"""

import csv
import heapq
import io
import itertools
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from d2ext.data.errors import DatasetError
from d2ext.data.image_io import read_image
from d2ext.data.panoptic import (
    contiguous_segment,
    is_panoptic,
    panoptic_classes,
    read_panoptic_json,
    read_segments,
)
from d2ext.evaluation.panoptic_match import Counts, match_segments
from d2ext.evaluation.panoptic_pictures import draw_comparison, draw_confusion
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

# Rows of the tables in the log.
_LOGGED = 8


@dataclass
class _Image:
    """One image's result. ``prediction`` is the map as PNG, only of images that may be drawn."""

    image_id: Any
    file_name: str
    counts: Counts
    quality: tuple[float, float, float]  # PQ, SQ, RQ in [0, 1]
    predicted_void: float  # share of the pixels with a class that are predicted to have none
    prediction: bytes | None
    segments: list[dict[str, Any]]


class PanopticAnalysis(DatasetEvaluator):
    """Compares panoptic predictions with the annotations image by image; see the module's header."""

    def __init__(self, dataset_name: str, output_dir: str, *, num_pictures: int = 12) -> None:
        """
        Args:
            dataset_name: a panoptic data set
            output_dir: folder to write into
            num_pictures: how many of the worst images to draw

        Raises:
            DatasetError: not a panoptic data set, or its file cannot be read
        """
        if not is_panoptic(MetadataCatalog.get(dataset_name)):
            raise DatasetError(
                f"Data set '{dataset_name}' is not a panoptic one; the analysis (TEST.ANALYZE, "
                "--analyze) is of panoptic predictions."
            )
        self._metadata = MetadataCatalog.get(dataset_name)
        self._classes = panoptic_classes(dataset_name)
        self._output_dir = Path(output_dir)
        self._num_pictures = num_pictures
        content = read_panoptic_json(self._metadata.panoptic_json)
        self._annotations = {entry["image_id"]: entry for entry in content["annotations"]}
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        size = len(self._classes.full) + 1
        self._images: list[_Image] = []
        self._worst: list[tuple[float, int]] = []
        self._confusion = np.zeros((size, size), np.int64)
        self._pixels = np.zeros((size, size), np.int64)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Compare some images.

        Args:
            inputs: with ``image_id`` and ``file_name``
            outputs: with ``panoptic_seg``: H×W map and its segments (``id``, ``category_id``,
                ``isthing``); or None for the segments, in which case the map holds
                ``category * label_divisor + instance`` and -1 for void

        Raises:
            ValueError: a map with ids that are not among its segments, or unknown classes
        """
        for one_input, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            ids = ids.cpu().numpy().astype(np.int64)
            if segments is None:
                ids, segments = self._decode(ids)
            self._compare(one_input, ids, segments)

    def evaluate(self) -> dict[str, Any]:
        """Write the analysis (main process). No results of its own: those are the evaluator's."""
        comm.synchronize()
        gathered = comm.gather((self._images, self._confusion, self._pixels))
        if not comm.is_main_process():
            return {}
        images = sorted(
            itertools.chain.from_iterable(images for images, _, _ in gathered),
            key=lambda i: math.inf if math.isnan(i.quality[0]) else i.quality[0],
        )
        confusion = sum(confusion for _, confusion, _ in gathered)
        pixels = sum(pixels for _, _, pixels in gathered)
        counts = Counts.zeros(len(self._classes.full))
        for image in images:
            counts.add(image.counts)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        categories = self._category_rows(counts, confusion)
        rows = [_image_row(image) for image in images]
        self._write_csv("categories.csv", categories)
        self._write_csv("images.csv", rows)
        self._write_matrix("confusion.csv", confusion, "no such segment", "missed")
        self._write_matrix("confusion_pixels.csv", pixels, "void", "void")
        self._write_json(counts, categories, rows)
        draw_confusion(
            self._output_dir / "confusion.png", confusion, self._classes.unique_names, num_shown=30
        )
        self._draw_worst([i for i in images if i.prediction is not None][: self._num_pictures])
        self._log(categories, rows)
        return {}

    def _compare(
        self, one_input: dict[str, Any], ids: np.ndarray, segments: list[dict[str, Any]]
    ) -> None:
        image_id, file_name = one_input["image_id"], one_input["file_name"]
        if image_id not in self._annotations:
            raise ValueError(
                f"Image '{file_name}' (id {image_id}) is not in '{self._metadata.panoptic_json}'."
            )
        targets, infos = self._targets_of(image_id)
        if targets.shape != ids.shape:
            raise ValueError(
                f"The panoptic map of '{file_name}' has height and width {ids.shape}, the annotations "
                f"{targets.shape}: models predict at the size of the original image."
            )
        labels = np.array([self._classes.dataset_ids[s["category_id"]] for s in infos], np.int64)
        crowd = np.array([bool(s.get("iscrowd", 0)) for s in infos], bool)
        places = _places(ids, segments, file_name)
        predicted = np.array(
            [self._classes.predicted_label(s, file_name) for s in segments], np.int64
        )
        matches = match_segments(targets, labels, crowd, places, predicted, len(self._classes.full))
        self._confusion += matches.confusion
        self._pixels += matches.pixels
        *quality, _ = matches.counts.mean_quality()
        known = matches.pixels[:-1]
        void = float(known[:, -1].sum() / max(known.sum(), 1))
        self._images.append(
            _Image(
                image_id,
                file_name,
                matches.counts,
                (quality[0], quality[1], quality[2]),
                void,
                None,
                [dict(s) for s in segments],
            )
        )
        self._keep_if_bad(places, quality[0])

    def _targets_of(self, image_id: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """H×W uint16, 0 void, i+1 the i-th annotated segment; and these segments."""
        entry = self._annotations[image_id]
        path = os.path.join(self._metadata.panoptic_root, entry["file_name"])
        return read_segments(path, entry["segments_info"], allow_absent=True), entry[
            "segments_info"
        ]

    def _keep_if_bad(self, places: np.ndarray, pq: float) -> None:
        """Keep the last image's map if the image is among the worst so far."""
        if math.isnan(pq) or not self._num_pictures:
            return
        number = len(self._images) - 1
        encoded = cv2.imencode(".png", places.astype(np.uint16))[1].tobytes()
        self._images[number].prediction = encoded
        heapq.heappush(self._worst, (-pq, -number))  # the best of them first
        if len(self._worst) > self._num_pictures:
            _, dropped = heapq.heappop(self._worst)
            self._images[-dropped].prediction = None

    def _decode(self, ids: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Category * label_divisor + instance, -1 void → ids from 1 on and segments."""
        divisor = self._metadata.label_divisor
        things = set(self._metadata.thing_dataset_id_to_contiguous_id.values())
        segments = [
            {"id": i + 1, "category_id": i // divisor, "isthing": i // divisor in things}
            for i in np.unique(ids).tolist()
            if i >= 0
        ]
        return ids + 1, segments

    def _category_rows(self, counts: Counts, confusion: np.ndarray) -> list[dict[str, Any]]:
        names = self._classes.unique_names
        quality = counts.quality()
        rows = []
        for label, name in enumerate(names):
            others = confusion[label, :-1].copy()
            others[label] = 0
            most = int(others.argmax())
            rows.append(
                {
                    "category": name,
                    "isthing": int(label >= len(self._classes.stuff)),
                    **_percent(quality[label]),
                    "matched": int(counts.tp[label]),
                    "wrong": int(counts.fp[label]),
                    "missed": int(counts.fn[label]),
                    "as_other_class": int(others.sum()),
                    "most_as": names[most] if others[most] else "",
                    "most_as_count": int(others[most]),
                }
            )
        return rows

    def _write_csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        with atomic_write(self._output_dir / name, "w") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def _write_matrix(self, name: str, matrix: np.ndarray, row: str, column: str) -> None:
        names = self._classes.unique_names
        with atomic_write(self._output_dir / name, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["annotated \\ predicted", *names, column])
            for label, values in zip([*names, row], matrix.tolist(), strict=True):
                writer.writerow([label, *values])

    def _write_json(
        self, counts: Counts, categories: list[dict[str, Any]], images: list[dict[str, Any]]
    ) -> None:
        stuff = len(self._classes.stuff)
        groups = {"All": slice(None), "Things": slice(stuff, None), "Stuff": slice(0, stuff)}
        summary = {}
        for group, selected in groups.items():
            *quality, number = counts.mean_quality(selected)
            summary[group] = {**_percent(np.array(quality)), "categories": number}
        content = {"quality": summary, "categories": categories, "images": images}
        with atomic_write(self._output_dir / "analysis.json", "w") as file:
            json.dump(content, file, indent=1)

    def _draw_worst(self, images: list[_Image]) -> None:
        folder = self._output_dir / "worst"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        for rank, image in enumerate(images):
            assert image.prediction is not None
            places = cv2.imdecode(np.frombuffer(image.prediction, np.uint8), cv2.IMREAD_UNCHANGED)
            targets, infos = self._targets_of(image.image_id)
            picture = draw_comparison(
                read_image(image.file_name, "BGR"),
                _drawable(targets, [contiguous_segment(s, self._metadata) for s in infos]),
                _drawable(places, image.segments),
                self._metadata,
                f"{os.path.basename(image.file_name)}: PQ {100 * image.quality[0]:.1f}, "
                f"{image.counts.tp.sum()} matched, {image.counts.fp.sum()} wrong, "
                f"{image.counts.fn.sum()} missed",
            )
            name = f"{rank:02d}_{str(image.image_id).replace('/', '_')}.png"
            cv2.imwrite(str(folder / name), picture)

    def _log(self, categories: list[dict[str, Any]], images: list[dict[str, Any]]) -> None:
        occurring = [row for row in categories if row["PQ"] is not None]
        worst = sorted(occurring, key=lambda row: row["PQ"])[:_LOGGED]
        ranked = [row for row in images if row["PQ"] is not None][:_LOGGED]
        text = io.StringIO()
        for title, rows in (("Worst classes", worst), ("Worst images", ranked)):
            table = tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".1f")
            text.write(f"\n{title}\n{table}\n")
        logger.info(f"Panoptic analysis, in '{self._output_dir}':{text.getvalue()}")


def _places(ids: np.ndarray, segments: list[dict[str, Any]], file_name: str) -> np.ndarray:
    """Map of segment ids → H×W uint16: 0 void, i+1 the i-th segment."""
    values, inverse = np.unique(ids, return_inverse=True)
    table = {0: 0, **{segment["id"]: place + 1 for place, segment in enumerate(segments)}}
    unknown = [v for v in values.tolist() if v not in table]
    if unknown:
        raise ValueError(
            f"The panoptic map of '{file_name}' has ids {unknown[:5]} that its segments_info lacks."
        )
    places = np.array([table[v] for v in values.tolist()], np.uint16)
    return places[inverse.reshape(ids.shape)]


def _drawable(
    places: np.ndarray, segments: list[dict[str, Any]]
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Map and segments as the visualizer takes them: numbered by their places, all present."""
    present = set(np.unique(places).tolist())
    infos = [{**s, "id": i + 1} for i, s in enumerate(segments) if i + 1 in present]
    return torch.from_numpy(places.astype(np.int32)), infos


def _image_row(image: _Image) -> dict[str, Any]:
    return {
        "image_id": image.image_id,
        "file_name": image.file_name,
        **_percent(np.array(image.quality)),
        "matched": int(image.counts.tp.sum()),
        "wrong": int(image.counts.fp.sum()),
        "missed": int(image.counts.fn.sum()),
        # Percent of the pixels with a class that are predicted to have none.
        "predicted_void": round(100 * image.predicted_void, 2),
    }


def _percent(quality: np.ndarray) -> dict[str, float | None]:
    """PQ, SQ, RQ in percent; None where nothing occurred (JSON has no NaN)."""
    values = [None if math.isnan(v) else 100 * float(v) for v in quality]
    return dict(zip(("PQ", "SQ", "RQ"), values, strict=True))
