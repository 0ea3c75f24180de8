"""Where AP of boxes, masks and keypoints is lost, by hotcoco: TIDE's error types (Bolya et al., "TIDE: A
General Toolbox for Identifying Object Detection Errors", ECCV 2020), confusions, sizes, scores, images.

Written into a folder:

- ``index.html``: all of it on one page, with the pictures;
- ``instances.json``: the same as numbers, by task (``bbox``, ``segm``, ``keypoints``);
- ``<task>/``: the pictures; in ``worst/`` the images with most errors, annotations beside detections.

Confusions, sizes and images are those of the detections above one score, the one of the best F1 at an
overlap of 0.5, which is also a good ``--confidence-threshold``. The confusions of
keypoints are those of their boxes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from d2ext.data.errors import DatasetError
from d2ext.data.image_io import read_image
from d2ext.evaluation.panoptic_pictures import captioned, picture_scale
from d2ext.files import atomic_write
from d2ext.utils.drawing import write_picture
from d2ext.utils.html import escape, page, table

logger = logging.getLogger(__name__)

# Overlap (IoU or OKS) from which on a detection is right, as TIDE's.
_OVERLAP = 0.5
_SCORE_BINS = 10
# COCO's sizes: areas in pixels from 0, 32 x 32 and 96 x 96 on.
_SIZES = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, math.inf)}
_TIDE = {
    "Cls": "wrong class",
    "Loc": "wrong place",
    "Both": "wrong class and place",
    "Dupe": "an object a second time",
    "Bkg": "nothing there",
    "Miss": "not found",
}
_RIGHT, _WRONG = (0.1, 0.8, 0.2), (0.95, 0.15, 0.1)  # RGB


def check_hotcoco() -> None:
    """Raise :class:`DatasetError` where hotcoco is not installed."""
    if find_spec("hotcoco") is None:
        raise DatasetError(
            "--analyze (TEST.ANALYZE) of boxes, masks and keypoints needs hotcoco: pip install hotcoco"
        )


class InstanceAnalysis:
    """Collects the analyses of tasks and writes them; see the module's header.

    Args:
        output_dir: folder to write into
        num_pictures: how many images to draw for a task
    """

    def __init__(self, output_dir: str, *, num_pictures: int = 12) -> None:
        check_hotcoco()
        self._folder = Path(output_dir)
        self._num_pictures = num_pictures
        self._tasks: dict[str, dict[str, Any]] = {}

    def add(self, coco_eval: Any, task: str, find_file: Callable[[Any], str | None]) -> None:
        """Analyse a task and draw its pictures.

        Args:
            coco_eval: pycocotools' evaluation: annotations, detections and parameters are taken from it
            task: "bbox", "segm" or "keypoints"
            find_file: image id -> path of the image, None where it is not known
        """
        data = _Data(coco_eval, task)
        if not data.detections:
            logger.warning("%s: there is no detection to analyse.", task)
            return
        folder = self._folder / task
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "worst").mkdir(parents=True)
        everything = data.evaluate(data.detections)
        threshold = _best_threshold(everything, data.detections)
        kept = [x for x in data.detections if x["score"] >= threshold["score"]]
        used = data.evaluate(kept)
        diagnosis = used.image_diagnostics(iou_thr=_OVERLAP, score_thr=0.0)
        results = everything.results(per_class=True)
        tide = everything.tide_errors(pos_thr=_OVERLAP)
        scores = everything.calibration(n_bins=_SCORE_BINS, iou_threshold=_OVERLAP)
        confusion = used.confusion_matrix(iou_thr=_OVERLAP)
        _plot(folder, everything, results, tide, scores, confusion)
        images = data.image_rows(diagnosis)
        for rank, row in enumerate(images[: self._num_pictures]):
            file = find_file(row["image_id"])
            if file is None or not row["wrong"] + row["missed"]:
                continue
            name = f"{rank:02d}_{str(row['image_id']).replace('/', '_')}.png"
            write_picture(folder / "worst" / name, data.draw(row, file, kept, diagnosis))
            row["picture"] = f"{task}/worst/{name}"
        self._tasks[task] = {
            "metrics": _percent(results["metrics"]),
            "classes": _percent(results["per_class"]),
            "errors": {
                name: {
                    "detections" if name != "Miss" else "objects": tide["counts"][name],
                    "AP50 lost": 100 * tide["delta_ap"][name],
                }
                for name in _TIDE
            },
            "threshold": threshold,
            "sizes": data.size_rows(diagnosis, results["metrics"]),
            "scores": [
                {
                    "from": x["bin_lower"],
                    "to": x["bin_upper"],
                    "detections": x["count"],
                    "right": x["avg_accuracy"] if x["count"] else None,
                }
                for x in scores["bins"]
            ],
            "confusion": {
                "classes": [*confusion["cat_names"], "none"],
                "matrix": np.asarray(confusion["matrix"]).tolist(),
            },
            "suspect_annotations": [
                {**x, "image_id": data.image_ids[x["image_id"]]} for x in diagnosis["label_errors"]
            ],
            "images": images,
        }

    def write(self) -> None:
        """Write page and numbers, and what is worst into the log; then forget them."""
        if not self._tasks:
            return
        with atomic_write(self._folder / "instances.json", "w") as file:
            json.dump(self._tasks, file, indent=1)
        with atomic_write(self._folder / "index.html", "w") as file:
            file.write(_page(self._tasks))
        for task, found in self._tasks.items():
            lost = sorted(found["errors"].items(), key=lambda x: -x[1]["AP50 lost"])
            logger.info(
                "Analysis of %s: AP50 lost to %s; best F1 %.3f at score %.3f.",
                task,
                ", ".join(f"{_TIDE[name]} {x['AP50 lost']:.1f}" for name, x in lost[:3]),
                found["threshold"]["F1"],
                found["threshold"]["score"],
            )
        logger.info("The analysis is in %s", self._folder / "index.html")
        self._tasks = {}


class _Data:
    """A task's annotations and detections as hotcoco takes them: images numbered from 0."""

    def __init__(self, coco_eval: Any, task: str) -> None:
        self.task, self._params = task, coco_eval.params
        content = coco_eval.cocoGt.dataset
        self.image_ids = [image["id"] for image in content["images"]]
        self._numbers = {image_id: i for i, image_id in enumerate(self.image_ids)}
        self._images = [{**x, "id": i} for i, x in enumerate(content["images"])]
        self._categories = content["categories"]
        self._names = {x["id"]: x["name"] for x in self._categories}
        self.annotations = self._numbered(content["annotations"])
        self.detections = self._numbered(coco_eval.cocoDt.dataset["annotations"])

    def _numbered(self, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**x, "image_id": self._numbers[x["image_id"]]} for x in entries]

    def evaluate(self, detections: list[dict[str, Any]]) -> Any:
        """hotcoco's evaluation; it numbers the detections from 1 on."""
        import hotcoco

        annotations = hotcoco.COCO(
            {
                "images": self._images,
                "annotations": self.annotations,
                "categories": self._categories,
            }
        )
        evaluation = hotcoco.COCOeval(annotations, annotations.load_res(detections), self.task)
        parameters = evaluation.params
        parameters.img_ids = [self._numbers[x] for x in self._params.imgIds]
        parameters.max_dets = [int(x) for x in self._params.maxDets]
        if self.task == "keypoints":
            parameters.kpt_oks_sigmas = [float(x) for x in self._params.kpt_oks_sigmas]
        # It warns that other sigmas than COCO's are not COCO's, and prints what pycocotools has printed.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore", UserWarning)
            evaluation.run()
        return evaluation

    def image_rows(self, diagnosis: dict[str, Any]) -> list[dict[str, Any]]:
        """What was right and wrong in each image, most errors first."""
        rows = [
            {
                "image_id": self.image_ids[number],
                "right": x["tp"],
                "wrong": x["fp"],
                "missed": x["fn"],
            }
            for number, x in diagnosis["img_summary"].items()
        ]
        return sorted(rows, key=lambda x: (-x["wrong"] - x["missed"], self._numbers[x["image_id"]]))

    def size_rows(
        self, diagnosis: dict[str, Any], metrics: dict[str, float]
    ) -> list[dict[str, Any]]:
        """Annotated objects and how many of them were found, by size."""
        status, rows = diagnosis["gt_status"], []
        for size, (least, most) in _SIZES.items():
            inside = [a["id"] for a in self.annotations if least <= a["area"] < most]
            counted = [status[i] for i in inside if status.get(i) in ("matched", "fn")]
            shown = _percent({key: metrics.get(key + size, -1.0) for key in ("AP", "AR")})
            found = counted.count("matched")
            rows.append({"size": size, "annotated": len(counted), "found": found, **shown})
        return rows

    def draw(
        self,
        row: dict[str, Any],
        file: str,
        detections: list[dict[str, Any]],
        diagnosis: dict[str, Any],
    ) -> np.ndarray:
        """Annotations beside detections, right ones green, missed and wrong ones red; BGR."""
        # Loads matplotlib, which an evaluation without pictures does without.
        from detectron2.utils.visualizer import Visualizer

        image = read_image(file, "BGR")
        scale = picture_scale(max(image.shape[:2]))
        number, panels = self._numbers[row["image_id"]], []
        shown = [(x, diagnosis["gt_status"].get(x["id"])) for x in self.annotations]
        found = [(x, diagnosis["dt_status"].get(i + 1)) for i, x in enumerate(detections)]
        for title, entries in (("annotations", shown), ("detections", found)):
            here = [(x, state) for x, state in entries if x["image_id"] == number]
            picture = Visualizer(image[..., ::-1], scale=scale)
            if here:
                picture.overlay_instances(**self._overlay(here), alpha=0.4)
            panels.append(captioned(picture.output.get_image()[..., ::-1], title))
        name = Path(file).name
        text = f"{name}: {row['right']} right, {row['wrong']} wrong, {row['missed']} missed"
        return captioned(np.concatenate(panels, axis=1), text)

    def _overlay(self, entries: list[tuple[dict[str, Any], str | None]]) -> dict[str, Any]:
        boxes = np.array([x["bbox"] for x, _ in entries], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [
            self._names[x["category_id"]] + (f" {x['score']:.2f}" if "score" in x else "")
            for x, _ in entries
        ]
        colors = [_WRONG if state in ("fn", "fp") else _RIGHT for _, state in entries]
        overlay: dict[str, Any] = {"boxes": boxes, "labels": labels, "assigned_colors": colors}
        if self.task == "segm":
            overlay["masks"] = [_mask(x["segmentation"]) for x, _ in entries]
        if self.task == "keypoints":
            points = np.array([x["keypoints"] for x, _ in entries], np.float64)
            overlay["keypoints"] = points.reshape(len(entries), -1, 3)
        return overlay


def _mask(segmentation: Any) -> Any:
    """Polygons or RLE as Detectron2's visualizer takes them."""
    return segmentation if isinstance(segmentation, dict) else [np.asarray(p) for p in segmentation]


def _best_threshold(evaluation: Any, detections: list[dict[str, Any]]) -> dict[str, float]:
    """The score with the best F1 of all classes together, and F1, precision and recall there."""
    diagnosis = evaluation.image_diagnostics(iou_thr=_OVERLAP, score_thr=0.0)
    state = diagnosis["dt_status"]
    scored = [
        (detections[i - 1]["score"], x == "tp") for i, x in state.items() if x in ("tp", "fp")
    ]
    objects = sum(x in ("matched", "fn") for x in diagnosis["gt_status"].values())
    if not scored:
        return {"score": 0.0, "F1": 0.0, "precision": 0.0, "recall": 0.0}
    scores, right = (np.array(x) for x in zip(*sorted(scored, key=lambda x: -x[0]), strict=True))
    found, count = right.cumsum(), np.arange(1, len(right) + 1)
    f1 = 2 * found / (count + objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores stay together
    best = int(f1.argmax())
    return {
        "score": float(scores[best]),
        "F1": float(f1[best]),
        "precision": float(found[best] / count[best]),
        "recall": float(found[best] / max(objects, 1)),
    }


def _percent(metrics: dict[str, float]) -> dict[str, float | None]:
    """From hotcoco's 0..1; its -1, where nothing is annotated, becomes None."""
    return {k: 100 * v if v is not None and v >= 0 else None for k, v in metrics.items()}


def _plot(
    folder: Path, evaluation: Any, results: Any, tide: Any, scores: Any, confusion: Any
) -> None:
    """hotcoco's figures: errors, confusion, classes, precision and recall, scores."""
    from hotcoco import plot
    from matplotlib import pyplot

    figures = [
        plot.tide_errors(tide, save_path=folder / "errors.png"),
        plot.confusion_matrix(confusion, save_path=folder / "confusion.png"),
        plot.pr_curve_iou_sweep(evaluation, save_path=folder / "precision_recall.png"),
        plot.reliability_diagram(scores, save_path=folder / "scores.png"),
    ]
    if results["per_class"]:
        figures.append(plot.per_category_ap(results, save_path=folder / "classes.png"))
    for figure, *_ in figures:
        pyplot.close(figure)


def _page(tasks: dict[str, dict[str, Any]]) -> str:
    """The HTML page; pictures by relative paths."""
    parts = [
        '<p>Numbers: <a href="instances.json">instances.json</a>. Overlap is IoU, of keypoints OKS.</p>',
    ]
    for task, found in tasks.items():
        threshold = found["threshold"]
        plots = "".join(
            f'<img src="{task}/{name}.png" alt="{name}">'
            for name in ("errors", "precision_recall", "confusion", "classes", "scores")
            if name != "classes" or found["classes"]
        )
        errors = [[f"{k}: {_TIDE[k]}", *x.values()] for k, x in found["errors"].items()]
        pictures = [row for row in found["images"] if "picture" in row]
        parts += [
            f"<h2>{task}</h2>",
            table([found["metrics"]], "keys"),
            "<h3>What goes wrong</h3><p>How many points of AP50 each type of error costs (TIDE).</p>",
            table(errors, ["error", "how many", "AP50 lost"]),
            f'<div class="plots">{plots}</div>',
            f"<h3>At score {threshold['score']:.3f}</h3><p>Of all scores this one gives the best F1, "
            f"{threshold['F1']:.3f}, with precision {threshold['precision']:.3f} and recall "
            f"{threshold['recall']:.3f}; confusion, sizes and images below are of detections from it on."
            "</p>",
            table(found["sizes"], "keys"),
            "<h3>Scores</h3><p>How many of the detections are right.</p>",
            table(found["scores"], "keys"),
            "<h3>Images with most errors</h3><p>Right ones are green, missed and wrong ones red.</p>",
            *(f'<p><img src="{escape(row["picture"])}" alt=""></p>' for row in pictures),
        ]
        if found["suspect_annotations"]:
            keys = ("image_id", "type", "gt_category", "dt_category", "dt_score", "iou")
            rows = [{k: x.get(k) for k in keys} for x in found["suspect_annotations"][:20]]
            parts += ["<h3>Annotations that may be wrong</h3>", table(rows, "keys")]
    return page("Analysis", parts)
