#!/usr/bin/env python
"""Predict on images, folders, videos or a camera, with any system: pictures and COCO results.

    python tools/demo.py --config-file yolact/yolact_R_50_550.yaml --output out/ \\
        --input photo.jpg holiday/ "frames/*.png" --opts MODEL.WEIGHTS model_final.pth
    python tools/demo.py --config-file ... --video-input clip.mp4 --output clip_out.mp4
    python tools/demo.py --config-file ... --webcam 0 --output camera.mp4
    python tools/demo.py --config-file centernet/centernet_dla34_512.yaml --draw heatmaps ...
    python tools/demo.py --config-file landmarks/hourglass_2stack_coco_256x192.yaml --input a.jpg \\
        --output out/ --detector faster_rcnn.yaml --detector-weights detector.pth --opts ...

A model that looks into boxes (landmarks) gets them from --detector, any detector of d2ext or
Detectron2 (a path, or a name in either model zoo), or from --boxes, a JSON list of detections in COCO's
result form, whose image_id is that of coco_images.json below; of a list with categories, those of the
model's own data set. Without them the whole image is its box.

Pictures keep their names, and below a folder also the sub-folder; kinds other than JPEG and PNG become
PNG. Beside them (named after the file, where the output is one file) appear

- coco_results.json: a list of COCO results (box, score, category, mask as RLE), as COCO's tools read
  them;
- coco_images.json: which file has which image_id, in COCO's format (images, categories). The id is the
  number that is the file's name, if all files have such names and all differ (as in COCO); otherwise
  files count from 1. In a video it is the number of the frame, from 1.

A file that cannot be read is reported and skipped. Exit status: 0; 1 if something was skipped or could
not be written; 2 if there is nothing to do or the command is wrong.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
import tqdm
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.logger import setup_logger

from d2ext.config import add_options_argument, load_config
from d2ext.data.coco_results import category_ids
from d2ext.data.errors import ImageReadError
from d2ext.data.image_io import read_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.top_down import BoxFile, BoxSource, Detector
from d2ext.files import atomic_write, json_list
from d2ext.model_zoo import find_config_file
from d2ext.utils.drawing import PictureDrawer, VideoDrawer, class_metadata, name_classes, select
from d2ext.utils.heatmaps import SeesHeatmaps
from d2ext.utils.video import (
    VIDEO_SUFFIXES,
    VideoError,
    VideoReader,
    check_video_path,
    video_writer,
)

logger = logging.getLogger("d2ext.demo")

# What is taken from a folder; files named on the command line are tried whatever their names.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
# What pictures are written as under their own names.
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png"}
# What is no name of a folder, whether it can be written or not.
MOVIE_SUFFIXES = {*VIDEO_SUFFIXES, ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv"}
RESULTS, IMAGES = "coco_results.json", "coco_images.json"

Item = TypeVar("Item")


class DemoError(ValueError):
    """The command cannot be carried out. The message says what to change."""


class Job(NamedTuple):
    """One image to predict on."""

    source: Path
    target: Path
    """Where its picture goes."""
    image_id: int


class Options(NamedTuple):
    """What the command line says of the output."""

    output: Path
    threshold: float
    batch_size: int
    max_drawn: int
    max_frames: int | None
    pictures: bool
    heatmaps: bool = False
    """Draw the model's heat maps, corners and centres as well."""


# Which files


def find_sources(inputs: Iterable[str]) -> list[tuple[Path, Path]]:
    """Files, folders and patterns → (file, name of its picture below the output folder).

    Files that do not exist stay in the list, for the report; a file that is named twice appears once.
    """
    found: dict[Path, Path] = {}
    for entry in inputs:
        path = Path(entry).expanduser()
        matches = [path] if path.exists() else [Path(m) for m in sorted(glob.glob(str(path)))]
        if not matches and not glob.has_magic(entry):
            matches = [path]
        for match in matches:
            if match.is_dir():
                inside = sorted(f for f in match.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
                for file in inside:
                    if file.is_file():
                        found.setdefault(file, file.relative_to(match))
            else:
                found.setdefault(match, Path(match.name))
    return list(found.items())


def plan_images(inputs: Sequence[str], output: Path) -> list[Job]:
    """The images to predict on, with different targets and ids.

    Raises:
        DemoError: there is none, or a picture would overwrite an input.
    """
    sources = find_sources(inputs)
    if not any(source.exists() for source, _ in sources):
        raise DemoError(f"No image found in {' '.join(map(repr, inputs))}.")
    if is_file_name(output):
        if len(sources) > 1:
            raise DemoError(
                f"--output '{output}' is one file and there are {len(sources)} images: name a folder."
            )
        if output.suffix.lower() not in PICTURE_SUFFIXES:
            raise DemoError(f"--output '{output}': pictures are written as .jpg or .png.")
        targets = [output]
    else:
        targets = [output / name for name in unique_names([name for _, name in sources])]
    originals = {source.resolve() for source, _ in sources}
    for target in targets:
        if target.resolve() in originals:
            raise DemoError(f"'{target}' would overwrite an input: choose another --output.")
    ids = image_ids([source for source, _ in sources])
    return [
        Job(source, target, image_id)
        for (source, _), target, image_id in zip(sources, targets, ids, strict=True)
    ]


def is_file_name(output: Path) -> bool:
    """Whether ``--output`` names a file: it ends like one and is no folder."""
    return output.suffix.lower() in IMAGE_SUFFIXES | MOVIE_SUFFIXES and not output.is_dir()


def unique_names(names: Sequence[Path]) -> list[Path]:
    """Names of pictures: JPEG or PNG, no two equal even where upper and lower case are one."""
    taken: set[str] = set()
    result = []
    for name in names:
        if name.suffix.lower() not in PICTURE_SUFFIXES:
            name = name.with_name(name.name + ".png")
        candidate = name
        for i in itertools.count(2):
            if str(candidate).lower() not in taken:
                break
            candidate = name.with_name(f"{name.stem}_{i}{name.suffix}")
        taken.add(str(candidate).lower())
        result.append(candidate)
    return result


def image_ids(files: Sequence[Path]) -> list[int]:
    """COCO's ids where all names are different numbers, otherwise 1, 2, ..."""
    if all(file.stem.isascii() and file.stem.isdigit() for file in files):
        numbers = [int(file.stem) for file in files]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(files) + 1))


# Prediction and results


class ResultWriter:
    """Writes COCO results and the list of images as they come.

    Args:
        output: the output folder or file.
        metadata: class names, and the data set's own category ids where it has them.
    """

    def __init__(self, stack: ExitStack, output: Path, metadata: Metadata) -> None:
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        self._category = {contiguous: category for category, contiguous in ids.items()}
        self._metadata = metadata
        self._others: dict[str, Any] = {}
        self._add_categories(torch.tensor([0]))
        self._result = stack.enter_context(json_list(self._path(output, RESULTS)))
        self._image = stack.enter_context(
            json_list(self._path(output, IMAGES), key="images", others=self._others)
        )

    def _add_categories(self, classes: torch.Tensor) -> None:
        self._metadata = name_classes(self._metadata, classes)
        self._others["categories"] = [
            {"id": self._category.get(i, i), "name": name}
            for i, name in enumerate(self._metadata.thing_classes)
        ]

    @staticmethod
    def _path(output: Path, name: str) -> Path:
        path = output.with_name(f"{output.stem}_{name}") if is_file_name(output) else output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(
        self, image_id: int, file: str, shape: tuple[int, ...], output: dict[str, Any]
    ) -> None:
        """Add one image of ``shape`` (H, W, ...) and the instances found in it."""
        height, width = shape[:2]
        self._image({"id": image_id, "file_name": file, "height": height, "width": width})
        if "instances" in output:
            self._add_categories(output["instances"].pred_classes)
            for result in instances_to_coco_json(output["instances"], image_id):
                category = result["category_id"]
                result["category_id"] = self._category.get(category, category)
                self._result(result)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def predict(
    predictor: BatchPredictor,
    images: list[np.ndarray],
    options: Options,
    image_ids: Sequence[int] = (),
    boxes: BoxSource | None = None,
) -> list[dict[str, Any] | str]:
    """The output for each image, instances chosen by score, or why there is none.

    Args:
        boxes: gives the boxes to look into; wants ``image_ids``.
    """
    try:
        found = None if boxes is None else boxes(image_ids, images)
        outputs = predictor(images) if found is None else predictor(images, found)
        if options.heatmaps and images:
            maps = predictor.model.heatmaps(predictor.upload(images, found))
            outputs = [o | {"heatmaps": m} for o, m in zip(outputs, maps, strict=True)]
    except torch.cuda.OutOfMemoryError:
        if len(images) == 1:
            height, width = images[0].shape[:2]
            return [f"{width}x{height} pixels do not fit into the device's memory"]
        return [
            output
            for i, image in enumerate(images)
            for output in predict(predictor, [image], options, image_ids[i : i + 1], boxes)
        ]
    for output in outputs:
        if "instances" in output:
            output["instances"] = select(output["instances"], options.threshold)
    return list(outputs)


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write a BGR picture whole or not at all.

    Raises:
        OSError: the disk is full or not writable.
    """
    encoded, data = cv2.imencode(path.suffix.lower(), image)
    if not encoded:
        raise OSError(f"cannot encode '{path}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data.tobytes())


def run_on_images(
    predictor: BatchPredictor,
    jobs: Sequence[Job],
    metadata: Metadata,
    options: Options,
    boxes: BoxSource | None = None,
) -> list[str]:
    """Predict on images; what went wrong, a line for each."""
    problems: list[str] = []
    drawer = PictureDrawer(metadata, options.max_drawn)
    instances = 0
    with ExitStack() as stack:
        results = ResultWriter(stack, options.output, metadata)
        progress = stack.enter_context(tqdm.tqdm(total=len(jobs), unit="image"))
        for batch in batches(jobs, options.batch_size):
            read: list[tuple[Job, np.ndarray]] = []
            for job in batch:
                try:
                    read.append((job, read_image(str(job.source), "BGR")))
                except ImageReadError as error:
                    problems.append(str(error))
            images, ids = [image for _, image in read], [job.image_id for job, _ in read]
            outputs = predict(predictor, images, options, ids, boxes)
            for (job, image), output in zip(read, outputs, strict=True):
                if isinstance(output, str):
                    problems.append(f"'{job.source}': {output}")
                    continue
                instances += len(output.get("instances", ()))
                if options.pictures:
                    write_picture(job.target, drawer(image, output))
                # last, for it shifts keypoints to COCO's convention in place
                results.write(job.image_id, str(job.source), image.shape, output)
            progress.update(len(batch))
    logger.info("%d instances in %d images.", instances, len(jobs) - len(problems))
    logger.info("Results in %s", options.output)
    return problems


def run_on_video(
    predictor: BatchPredictor,
    reader: VideoReader,
    target: Path,
    metadata: Metadata,
    options: Options,
    boxes: BoxSource | None = None,
) -> list[str]:
    """Predict on a video file or a camera; what went wrong, a line for each.

    Ctrl-C ends the video; what was predicted until then is written.

    Raises:
        VideoError: no frame can be read.
        OSError: the video cannot be written.
    """
    problems: list[str] = []
    wanted = min(n for n in (options.max_frames, reader.length, sys.maxsize) if n is not None)
    number = 0
    with ExitStack() as stack:
        stack.callback(reader.release)
        results = ResultWriter(stack, target, metadata)
        show: Callable[[np.ndarray], None] | None = None
        if options.pictures:
            writer = video_writer(target, reader.width, reader.height, reader.rate)
            show = stack.enter_context(writer)
        drawer = VideoDrawer(metadata, options.max_drawn)
        total = wanted if wanted < sys.maxsize else None
        progress = stack.enter_context(tqdm.tqdm(total=total, unit="frame"))
        try:
            for frames in batches(itertools.islice(reader, wanted), options.batch_size):
                ids = range(number + 1, number + 1 + len(frames))
                outputs = predict(predictor, frames, options, ids, boxes)
                for frame, output in zip(frames, outputs, strict=True):
                    number += 1
                    if isinstance(output, str):
                        raise VideoError(f"Cannot predict on {reader.name}: {output}.")
                    if show is not None:
                        show(drawer(frame, output))
                    results.write(number, f"{reader.name}#{number}", frame.shape, output)
                    progress.update()
        except KeyboardInterrupt:
            logger.info("Interrupted: finishing what was predicted until now.")
            wanted = number
        if number == 0:
            raise VideoError(f"No frame could be read from {reader.name}.")
    if options.max_frames is None and reader.length is not None and number < lowest(wanted):
        problems.append(
            f"{reader.name} ends after {number} of {wanted} frames: is the file truncated?"
        )
    logger.info("%d frames. Results in %s", number, target.parent)
    return problems


def lowest(frames: int) -> int:
    """The fewest frames that count as all of those which a file announces.

    Containers announce lengths from durations, which rounding makes wrong by a frame or two.
    """
    return frames - max(2, frames // 100)


# Command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a path, or a name in the model zoo"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="images, folders (searched in depth), patterns"
    )
    source.add_argument("--video-input", metavar="FILE", help="a video file")
    source.add_argument(
        "--webcam",
        nargs="?",
        const=0,
        type=int,
        metavar="INDEX",
        help="a camera (default 0), until Ctrl-C or --max-frames",
    )
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="a folder; or a file for one image or video"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="draw and write instances from this score on (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="images per pass (default: 1)"
    )
    parser.add_argument(
        "--max-drawn",
        type=int,
        default=200,
        metavar="N",
        help="draw only the best N instances of a picture; all are written (default: %(default)s)",
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop a video after N frames")
    parser.add_argument(
        "--draw",
        choices=("results", "heatmaps"),
        default="results",
        help="heatmaps: also the heat maps, corners and centres that CornerNet, CenterNet and their "
        "like read their results from",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write COCO results only")
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="text file, one class name a line; default: those of the config's data set",
    )
    looked_into = parser.add_mutually_exclusive_group()
    looked_into.add_argument(
        "--detector",
        metavar="CONFIG",
        help="config of a detector that finds the boxes to look into",
    )
    looked_into.add_argument(
        "--boxes", metavar="FILE", help="JSON list of detections (COCO's result form): the boxes"
    )
    parser.add_argument("--detector-weights", metavar="FILE", help="the detector's checkpoint")
    parser.add_argument(
        "--detector-classes",
        nargs="+",
        metavar="NAME",
        help="of the detector, to look into (default: the model's own class if the detector has it, "
        "otherwise all)",
    )
    parser.add_argument(
        "--box-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="look into boxes from this score on (default: %(default)s)",
    )
    add_options_argument(parser)
    chosen = parser.parse_args(arguments)
    if (chosen.detector_weights or chosen.detector_classes) and not chosen.detector:
        parser.error("--detector-weights and --detector-classes belong to --detector.")
    if not 0 <= chosen.confidence_threshold <= 1:
        parser.error("--confidence-threshold is a score in 0..1.")
    for name in ("batch_size", "max_drawn", "max_frames"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1.")
    return chosen


def plan_video(source: str | int, options: Options) -> Path:
    """Where the video goes; its results go beside it.

    Raises:
        VideoError: the output is no name of a video.
        DemoError: it would overwrite the input.
    """
    name = f"camera_{source}.mp4" if isinstance(source, int) else f"{Path(source).stem}.mp4"
    target = options.output if is_file_name(options.output) else options.output / name
    check_video_path(target)
    if not isinstance(source, int) and target.resolve() == Path(source).resolve():
        raise DemoError(f"'{target}' would overwrite the input: choose another --output.")
    return target


def read_class_names(path: str) -> list[str]:
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if not any(names):
        raise DemoError(f"--class-names '{path}' holds no name.")
    return [name for name in names if name]


def build_box_source(chosen: argparse.Namespace, metadata: Metadata) -> BoxSource | None:
    """What ``--detector`` or ``--boxes`` ask for.

    Raises:
        ValueError, FileNotFoundError: the detector's config or checkpoint or the file is wrong.
    """
    if chosen.boxes:
        return BoxFile(chosen.boxes, chosen.box_threshold, category_ids(metadata))
    if not chosen.detector:
        return None
    cfg = load_config(find_config_file(chosen.detector))
    if chosen.detector_weights:
        cfg.MODEL.WEIGHTS = chosen.detector_weights
    if not cfg.MODEL.WEIGHTS:
        logger.warning("The detector's MODEL.WEIGHTS is empty: detecting with random weights.")
    names = list(class_metadata(cfg).get("thing_classes") or [])
    wanted = chosen.detector_classes
    if wanted is None:
        own = metadata.get("thing_classes") or []
        wanted = [name for name in names if name in own] or None
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise DemoError(
            f"The detector has no class {', '.join(map(repr, unknown))}; it has {names or 'no names'}."
        )
    ids = None if wanted is None else [names.index(name) for name in wanted]
    return Detector(BatchPredictor(cfg), chosen.box_threshold, ids)


def prepare(chosen: argparse.Namespace) -> Callable[[], list[str]]:
    """Do all that can find the command wrong; the rest is for the caller to run.

    Raises:
        ValueError, FileNotFoundError: the command, the config or the checkpoint is wrong.
    """
    options = Options(
        output=Path(chosen.output).expanduser(),
        threshold=chosen.confidence_threshold,
        batch_size=chosen.batch_size,
        max_drawn=chosen.max_drawn,
        max_frames=chosen.max_frames,
        pictures=not chosen.no_pictures,
        heatmaps=chosen.draw == "heatmaps" and not chosen.no_pictures,
    )
    names = read_class_names(chosen.class_names) if chosen.class_names else None
    # Wrong paths are found before the model is built, which takes long.
    if chosen.input:
        jobs = plan_images(chosen.input, options.output)
    else:
        source = chosen.video_input if chosen.webcam is None else chosen.webcam
        target = plan_video(source, options)
        reader = VideoReader(source)
    cfg = load_config(find_config_file(chosen.config_file), chosen.opts)
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = options.threshold
    cfg.freeze()
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: predicting with random weights.")
    predictor = BatchPredictor(cfg)
    if options.heatmaps and not isinstance(predictor.model, SeesHeatmaps):
        raise DemoError(
            f"--draw heatmaps: {cfg.MODEL.META_ARCHITECTURE} has no heat maps; CornerNet, CenterNet and "
            "others that find objects as points have."
        )
    metadata = class_metadata(cfg, names)
    boxes = build_box_source(chosen, metadata)
    if chosen.input:
        return lambda: run_on_images(predictor, jobs, metadata, options, boxes)
    return lambda: run_on_video(predictor, reader, target, metadata, options, boxes)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    chosen = parse_arguments(arguments)
    setup_logger(name="d2ext")
    setup_logger(name="fvcore")
    try:
        work = prepare(chosen)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        problems = work()
    except VideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to '{chosen.output}': {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} skipped, the rest is done.", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
