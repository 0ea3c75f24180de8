"""Where `d2ext predict` takes the boxes of a top-down model from."""

from __future__ import annotations

import argparse
import logging

from detectron2.data.catalog import Metadata

from d2ext.config import load_config
from d2ext.data.coco_results import category_ids
from d2ext.data.saved_metadata import class_metadata
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.top_down import BoxFile, BoxSource, Detector, WithMargins
from d2ext.model_zoo import find_config_file
from d2ext.tools.command_line import CommandError

logger = logging.getLogger("d2ext.tools.predict")


def add_box_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the boxes of a top-down model come from."""
    source = parser.add_mutually_exclusive_group().add_argument
    help_text = "config of a detector for the boxes of a top-down model"
    source("--detector", metavar="CONFIG", help=help_text)
    help_text = "JSON list of detections (COCO's result form): the boxes"
    source("--boxes", metavar="FILE", help=help_text)
    add = parser.add_argument
    add("--detector-weights", metavar="FILE", help="the detector's checkpoint")
    add(
        "--detector-classes",
        nargs="+",
        metavar="NAME",
        help="the detector's classes whose boxes are used (default: the model's own class if the "
        "detector has it, otherwise all)",
    )
    add(
        "--box-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="use boxes with at least this score (default: %(default)s)",
    )
    add(
        "--box-margins",
        nargs=4,
        type=float,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="make the boxes larger by these parts of their width and height, or smaller by negative "
        "ones: 0 -0.22 0 0 makes a box of WIDER FACE, which begins at the hair, one of WFLW, which "
        "begins at the brows",
    )


def build_box_source(args: argparse.Namespace, metadata: Metadata) -> BoxSource | None:
    """The source of boxes named by ``--detector`` or ``--boxes``.

    Raises:
        ValueError, FileNotFoundError: the detector's config or checkpoint or the file is wrong.
    """
    source = _build_source(args, metadata)
    if source is not None and args.box_margins:
        return WithMargins(source, args.box_margins)
    return source


def _build_source(args: argparse.Namespace, metadata: Metadata) -> BoxSource | None:
    if args.boxes:
        return BoxFile(args.boxes, args.box_threshold, category_ids(metadata))
    if not args.detector:
        return None
    cfg = load_config(find_config_file(args.detector))
    if args.detector_weights:
        cfg.MODEL.WEIGHTS = args.detector_weights
    if not cfg.MODEL.WEIGHTS:
        logger.warning("The detector's MODEL.WEIGHTS is empty: detecting with random weights.")
    names = list(class_metadata(cfg).get("thing_classes") or [])
    wanted = args.detector_classes
    if wanted is None:
        own = metadata.get("thing_classes") or []
        wanted = [name for name in names if name in own] or None
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise CommandError(
            f"The detector has no class {', '.join(map(repr, unknown))}; it has {names or 'no names'}."
        )
    ids = None if wanted is None else [names.index(name) for name in wanted]
    return Detector(BatchPredictor(cfg), args.box_threshold, ids)
