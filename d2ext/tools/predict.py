"""Predict on images, folders, videos or a camera, with any system: pictures and COCO results.

    d2ext predict --config-file yolact/yolact_R_50_550.yaml --output out/ \\
        --input photo.jpg holiday/ "frames/*.png" --opts MODEL.WEIGHTS model_final.pth
    d2ext predict --run output/mine --input photos/ --output out/
    d2ext predict --config-file ... --video-input clip.mp4 --output clip_out.mp4
    d2ext predict --config-file ... --video-input clip.mp4 --output out/ --tracker NorfairTracker \\
        --video-results
    d2ext predict --config-file ... --webcam 0 --output camera.mp4
    d2ext predict --config-file centernet/centernet_dla34_512.yaml --draw heatmaps ...
    d2ext predict --exported mine.onnx --input photos/ --output out/
    d2ext predict --config-file ... --input map.tif --output out/ --tile 1024
    d2ext predict --config-file landmarks/hourglass_2stack_coco_256x192.yaml --input a.jpg \\
        --output out/ --detector faster_rcnn.yaml --detector-weights detector.pth --opts ...

A top-down model (landmarks) gets its boxes from --detector, any detector of d2ext or
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
- ytvis_results.json, with --video-results: a list of the video's tracks in YouTube-VIS's result form,
  with boxes (x, y, width, height) and the track's id;
- panoptic_video/, panoptic_video.json, with --video-results of a panoptic model: a PNG for each frame
  whose pixels hold the ids of segments (R + 256 G + 65536 B; an object has one in the whole video), and
  COCO's panoptic JSON, with score and track_id.

Each face gets a file of its own, called NAME_IMAGE_FACE (the image's name and id, and the place of the
face among the image's results, from 1), with --save-crops: an aligned picture of 112 x 112 pixels, as
recognition networks take it; and with --save-meshes: a Wavefront OBJ, in pixels, x right, y down, z away
from the camera. Meshes are then in coco_results.json, too; poses always are (yaw, pitch, roll; degrees).

Surfaces of persons (DensePose): --draw parts, u, v, isolines, or --texture, a picture of 6 rows and 4
columns of square tiles (those of parts 1 to 6 below each other, U to the right, V up). --save-surfaces
writes for each picture NAME_IMAGE_IUV.png, part, 255 U and 255 V in the order in which OpenCV reads
them, and NAME_IMAGE_INDS.png, the place of the person among the image's results, from 1; where persons
overlap, that of the higher score is on top. Each result in coco_results.json then has "densepose": shape
(3, h, w) and data, a PNG of the three planes in base64, in the person's box, cut to integers.
--save-points writes NAME_IMAGE_PERSON.npz: of the person's n pixels their x, y (pixels), parts, u, v,
points (n, 3) on the body, and the nearest vertices of its mesh.

A folder as --video-input is a video of 25 frames a second: its image files in the order of their
names, numbers in these by their value (frame_2 before frame_10).
With ids (a model with memory gives them, for others a --tracker does) an object has one colour in the
whole video, and the results name its track_id.

A file that cannot be read is reported and skipped. Exit status: 0; 1 if something was skipped or could
not be written; 2 if there is nothing to do or the command is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import tqdm
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata

from d2ext.config import ConfigError, add_options_argument, load_config, merge_options
from d2ext.data.errors import ImageReadError
from d2ext.data.image_io import read_image
from d2ext.data.saved_metadata import class_metadata
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.run_folder import load_run
from d2ext.engine.tiling import TiledPredictor
from d2ext.engine.top_down import BoxSource
from d2ext.engine.tracking import build_tracker, give_ids
from d2ext.engine.video_predictor import FramePredictor
from d2ext.export import ExportedFile
from d2ext.model_zoo import find_config_file
from d2ext.tools.command_line import CommandError, add_config_argument, make_parser, positive
from d2ext.tools.face_files import FaceWriter, add_face_arguments, mesh_triangles
from d2ext.tools.predict_boxes import add_box_arguments, build_box_source
from d2ext.tools.prediction_files import (
    FolderReader,
    Job,
    PanopticWriter,
    ResultWriter,
    TrackWriter,
    open_video,
    plan_images,
    plan_video,
)
from d2ext.tools.surface_files import (
    SurfaceReader,
    add_surface_arguments,
    surface_drawer,
    surface_writer,
)
from d2ext.utils.drawing import PictureDrawer, VideoDrawer, select, write_picture
from d2ext.utils.heatmaps import SeesHeatmaps
from d2ext.utils.memory import available_memory
from d2ext.utils.surfaces import STYLES
from d2ext.utils.terminal import show_log, silence_foreign
from d2ext.utils.video import CameraReader, VideoError, VideoReader, video_writer

logger = logging.getLogger("d2ext.tools.predict")

Item = TypeVar("Item")


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def predict(
    predictor: BatchPredictor | TiledPredictor,
    images: list[np.ndarray],
    args: argparse.Namespace,
    image_ids: Sequence[int] = (),
    boxes: BoxSource | None = None,
) -> list[dict[str, Any] | str]:
    """The output for each image, instances selected by score, or the reason why there is none.

    Args:
        boxes: gives the boxes to crop; needs ``image_ids``.
    """
    try:
        if isinstance(predictor, BatchPredictor):
            check_memory(predictor, images)
        given = None if boxes is None else boxes(image_ids, images)
        if isinstance(predictor, TiledPredictor):
            outputs = predictor(images)
        else:
            outputs = predictor(images, given)
        if args.heatmaps and images:
            assert isinstance(predictor, BatchPredictor)  # see prepare
            maps = predictor.model.heatmaps(predictor.upload(images, given))
            outputs = [o | {"heatmaps": m} for o, m in zip(outputs, maps, strict=True)]
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        if len(images) == 1:
            height, width = images[0].shape[:2]
            what = f" {error}" if isinstance(error, MemoryError) else ""
            hint = "raise --confidence-threshold" if args.tile else "predict in tiles (--tile 1024)"
            return [f"{width}x{height} pixels{what} do not fit into the memory: {hint}"]
        return [
            output
            for i, image in enumerate(images)
            for output in predict(predictor, [image], args, image_ids[i : i + 1], boxes)
        ]
    for output in outputs:
        if "instances" in output:
            output.update(args.surfaces(output["instances"], args.confidence_threshold))
            output["instances"] = select(output["instances"], args.confidence_threshold)
    return list(outputs)


def check_memory(predictor: BatchPredictor, images: Sequence[np.ndarray]) -> None:
    """Raise MemoryError where the masks of images would not fit; the system would end the process."""
    count = predictor.cfg.TEST.DETECTIONS_PER_IMAGE
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    on_cpu = predictor.device.type == "cpu" and predictor.cfg.MODEL.MASK_ON
    if on_cpu and 2 * count * pixels > available_memory():  # all, and those that are selected
        raise MemoryError(f"with up to {count} masks")


def run_on_images(
    predictor: BatchPredictor | TiledPredictor,
    jobs: Sequence[Job],
    metadata: Metadata,
    args: argparse.Namespace,
    boxes: BoxSource | None = None,
) -> list[str]:
    """Predict on images; returns the errors, a line each.

    Ctrl-C ends it; what was predicted until then is written.
    """
    problems: list[str] = []
    drawer = PictureDrawer(metadata, args.max_drawn, args.triangles, args.surface_drawer)
    faces = FaceWriter(args.save_crops, args.save_meshes, args.triangles)
    instances = predicted = 0
    with ExitStack() as stack:
        results = ResultWriter(
            stack,
            args.output,
            metadata,
            meshes=faces.saves_meshes,
            surfaces=args.surface_writer.saves_surfaces,
        )
        progress = stack.enter_context(tqdm.tqdm(total=len(jobs), unit="image"))
        try:
            for batch in batches(jobs, args.batch_size):
                read: list[tuple[Job, np.ndarray]] = []
                for job in batch:
                    try:
                        read.append((job, read_image(str(job.source), "BGR")))
                    except ImageReadError as error:
                        problems.append(str(error))
                images, ids = [image for _, image in read], [job.image_id for job, _ in read]
                outputs = predict(predictor, images, args, ids, boxes)
                for (job, image), output in zip(read, outputs, strict=True):
                    if isinstance(output, str):
                        problems.append(f"'{job.source}': {output}")
                        continue
                    instances += len(output.get("instances", ()))
                    if args.pictures:
                        write_picture(job.target, drawer(image, output))
                    faces.write(job.image_id, str(job.source), image, output)
                    args.surface_writer.write(job.image_id, str(job.source), output)
                    # last, for it shifts keypoints to COCO's convention in place
                    results.write(job.image_id, str(job.source), image.shape, output)
                    predicted += 1
                progress.update(len(batch))
        except KeyboardInterrupt:
            problems.append(f"{len(jobs) - progress.n} images, for it was interrupted")
    logger.info("%d instances in %d images.", instances, predicted)
    logger.info("Results in %s", args.output)
    return problems


def run_on_video(
    predictor: BatchPredictor | TiledPredictor,
    reader: VideoReader | CameraReader | FolderReader,
    target: Path,
    metadata: Metadata,
    args: argparse.Namespace,
    boxes: BoxSource | None = None,
    tracker: Any = None,
) -> list[str]:
    """Predict on a video, a stream or a camera; returns the errors, a line each.

    Ctrl-C ends the video; what was predicted until then is written.

    Raises:
        VideoError: no frame can be read.
        OSError: the video cannot be written.
    """
    problems: list[str] = []
    wanted = min(n for n in (args.max_frames, reader.length, sys.maxsize) if n is not None)
    number = 0
    faces = FaceWriter(args.save_crops, args.save_meshes, args.triangles)
    with ExitStack() as stack:
        stack.callback(reader.release)
        results = ResultWriter(
            stack,
            target,
            metadata,
            meshes=faces.saves_meshes,
            surfaces=args.surface_writer.saves_surfaces,
        )
        tracks = TrackWriter(target, metadata) if args.video_results else None
        panoptic = PanopticWriter(stack, target, metadata) if args.video_results else None
        show: Callable[[np.ndarray, float], None] | None = None
        if args.pictures:
            show = stack.enter_context(video_writer(target, reader.rate))
        drawer = VideoDrawer(metadata, args.max_drawn, args.triangles, args.surface_drawer)
        total = wanted if wanted < sys.maxsize else None
        progress = stack.enter_context(tqdm.tqdm(total=total, unit="frame"))
        try:
            for frames in batches(itertools.islice(reader, wanted), args.batch_size):
                ids = range(number + 1, number + 1 + len(frames))
                outputs = predict(predictor, [x.image for x in frames], args, ids, boxes)
                for (image, seconds, name), output in zip(frames, outputs, strict=True):
                    if isinstance(output, str):
                        raise VideoError(f"Cannot predict on {reader.name}: {output}.")
                    instances = output.get("instances")
                    if tracker is not None:
                        give_ids(output, tracker, number)
                    if instances is not None and tracks is not None:
                        tracks.add(number, instances)
                    number += 1
                    if show is not None:
                        show(drawer(image, output), seconds)
                    name = name or f"{reader.name}#{number}"
                    if panoptic is not None and "panoptic_seg" in output:
                        panoptic.add(number, name, output["panoptic_seg"])
                    faces.write(number, name, image, output)
                    args.surface_writer.write(number, name, output)
                    results.write(number, name, image.shape, output)
                    progress.update()
        except KeyboardInterrupt:
            logger.info("Interrupted: finishing what was predicted until now.")
        if number == 0:
            raise VideoError(f"No frame could be read from {reader.name}.")
        if tracks is not None:
            tracks.write(number)
    if reader.skipped > 0:
        problems.append(
            f"{reader.skipped} frames of {reader.name}, which are damaged or missing; {number} were "
            "predicted on."
        )
    logger.info("%d frames. Results in %s", number, target.parent)
    return problems


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_config_argument(parser, or_run=True, or_exported=True)
    add_input_arguments(parser)
    add_output_arguments(parser)
    add_face_arguments(parser)
    add_surface_arguments(parser)
    add_box_arguments(parser)
    add_options_argument(parser)
    return parser


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """What is predicted on, and how."""
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--input", nargs="+", metavar="PATH", help="images, folders (in depth), patterns")
    source(
        "--video-input",
        metavar="PATH",
        help="a video file, a folder of frames, or a stream's address (rtsp://, http://)",
    )
    help_text = "a camera (default 0), until Ctrl-C or --max-frames"
    source("--webcam", nargs="?", const=0, type=int, metavar="INDEX", help=help_text)
    add = parser.add_argument
    add("--max-frames", type=positive, metavar="N", help="stop a video after N frames")
    help_text = "images, frames, or tiles, per pass (default: 1)"
    add("--batch-size", type=positive, default=1, metavar="N", help=help_text)
    add(
        "--tile",
        type=positive,
        metavar="PIXELS",
        help="predict on overlapping tiles of this side and merge the instances: for large images with "
        "small objects",
    )
    add(
        "--tile-overlap",
        type=score,
        default=0.2,
        metavar="PART",
        help="of a tile that its neighbours share, at least (default: %(default)s); best when the usual "
        "object fits into it",
    )
    add(
        "--tracker",
        default="",
        metavar="NAME",
        help="gives the objects of a video ids, where the model does not: NorfairTracker",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drawn and written."""
    add = parser.add_argument
    add(
        "--output",
        required=True,
        type=lambda text: Path(text).expanduser(),
        metavar="PATH",
        help="a folder; or a file for one image or video",
    )
    add(
        "--confidence-threshold",
        type=score,
        default=0.5,
        metavar="SCORE",
        help="draw and write instances from this score on (default: %(default)s)",
    )
    help_text = (
        "draw only the best N instances of a picture; all are written (default: %(default)s)"
    )
    add("--max-drawn", type=positive, default=200, metavar="N", help=help_text)
    add(
        "--draw",
        choices=("results", "heatmaps", *STYLES),
        default="results",
        help="heatmaps: also the heat maps, corners and centres that CornerNet, CenterNet and their "
        "like read their results from; parts, u, v, isolines: of DensePose, only these",
    )
    add("--no-pictures", dest="pictures", action="store_false", help="write results only")
    help_text = "write a video's tracks as YouTube-VIS JSON, its panoptic maps as PNG and JSON"
    add("--video-results", action="store_true", help=help_text)
    help_text = "text file, one class name a line; default: those that the model was trained on"
    add("--class-names", metavar="FILE", help=help_text)


def score(text: str) -> float:
    """A number in 0..1, for ``add_argument(type=...)``."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no score in 0..1")
    return float(text)


def read_class_names(path: str) -> list[str]:
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if not any(names):
        raise CommandError(f"--class-names '{path}' holds no name.")
    return [name for name in names if name]


def prepare(args: argparse.Namespace) -> Callable[[], list[str]]:
    """Do everything that can show an error in the command; returns the rest, for the caller to run.

    Raises:
        ValueError, FileNotFoundError: the command, the config or the checkpoint is wrong.
    """
    names = read_class_names(args.class_names) if args.class_names else None
    # Check paths before building the model, which takes long.
    if args.input:
        jobs = plan_images(args.input, args.output)
    else:
        source = args.video_input if args.webcam is None else args.webcam
        target = plan_video(source, args.output)
        reader = open_video(source)
    exported = ExportedFile(args.exported) if args.exported else None
    if exported is not None:
        cfg = exported.cfg
    else:
        cfg = load_run(args.run) if args.run else load_config(find_config_file(args.config_file))
    merge_options(cfg, args.opts)
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = args.confidence_threshold
    cfg.freeze()
    metadata = class_metadata(cfg, names)
    if not cfg.MODEL.WEIGHTS and exported is None:
        logger.warning("MODEL.WEIGHTS is empty: predicting with random weights.")
    tracker = build_tracker(args.tracker, cfg) if args.tracker else None
    model = None if exported is None else exported.model(cfg)
    predictor = BatchPredictor(cfg, model) if args.input else FramePredictor(cfg, model)
    if isinstance(predictor, FramePredictor):
        check_video_options(args, predictor, cfg.MODEL.META_ARCHITECTURE)
    complete(args, cfg, metadata)
    if args.heatmaps and not isinstance(predictor.model, SeesHeatmaps):
        raise CommandError(
            f"--draw heatmaps: {cfg.MODEL.META_ARCHITECTURE} has no heat maps; CornerNet, CenterNet and "
            "others that predict objects as points have."
        )
    boxes = build_box_source(args, metadata)
    used: BatchPredictor | TiledPredictor = predictor
    if args.tile:
        used = TiledPredictor(
            predictor,
            args.tile,
            args.tile_overlap,
            batch_size=args.batch_size,
            threshold=args.confidence_threshold,
        )
    if args.input:
        return lambda: run_on_images(used, jobs, metadata, args, boxes)
    return lambda: run_on_video(used, reader, target, metadata, args, boxes, tracker)


def complete(args: argparse.Namespace, cfg: CfgNode, metadata: Metadata) -> None:
    """Add to a command's arguments what the functions above need to know of its model."""
    args.heatmaps = args.draw == "heatmaps" and args.pictures
    args.triangles = mesh_triangles(cfg, metadata)
    args.surface_drawer = surface_drawer(args)
    args.surface_writer = surface_writer(args, metadata)
    args.surfaces = SurfaceReader(
        metadata, args.surface_drawer.alone or args.save_surfaces or args.save_points
    )


def check_video_options(args: argparse.Namespace, predictor: FramePredictor, name: str) -> None:
    """Raise CommandError for options that do not suit a video's model."""
    gives_ids = getattr(predictor.model, "gives_ids", False)
    if predictor.has_memory and (args.tile or args.batch_size > 1):
        raise CommandError(
            f"{name} remembers the frames before: leave out --tile and --batch-size."
        )
    if gives_ids and args.tracker:
        raise CommandError(f"{name} gives ids itself: leave out --tracker.")
    if args.video_results and not (gives_ids or args.tracker):
        raise CommandError(f"--video-results: {name} gives no ids; add --tracker NorfairTracker.")


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if (args.detector_weights or args.detector_classes) and not args.detector:
        parser.error("--detector-weights and --detector-classes belong to --detector.")
    if args.box_margins and not (args.detector or args.boxes):
        parser.error("--box-margins belongs to --detector or --boxes.")
    if args.tile and (args.detector or args.boxes or args.draw == "heatmaps"):
        parser.error("--tile goes neither with --detector or --boxes nor with --draw heatmaps.")
    if args.exported and args.draw == "heatmaps":
        parser.error("--draw heatmaps needs the model itself: an exported file has none.")
    if args.input and (args.tracker or args.video_results):
        parser.error("--tracker and --video-results are for videos.")
    silence_foreign()
    show_log("d2ext", "fvcore")
    try:
        work = prepare(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        problems = work()
    except (VideoError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to '{args.output}': {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} skipped, the rest is done.", file=sys.stderr)
    return 1 if problems else 0
