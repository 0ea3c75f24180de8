"""Draw annotations: as annotated, or as training gets them, after augmentation.

    d2ext visualize-data --config-file yolact/yolact_R_50_550.yaml --num 16
    d2ext visualize-data --config-file CONFIG --source annotation --num 8
    d2ext visualize-data --config-file CONFIG --dataset fruits --train-json a.json \\
        --train-images images/ INPUT.AUGMENTATION.NAME none

With --source loader (default) the pictures are the first samples of the training stream, exactly as
a run with this config and SEED gets them, whatever its batch size. With --source annotation they are
the images of DATASETS.TRAIN in their order and size, of videos all frames.

A sample of two frames (INPUT.MAPPER ClipMapper or FlowPairMapper) is a strip: target, reference and,
with INPUT.VIDEO.FLOW, the reference warped onto the target by the optical flow, black where that is not
known.
Tracks have their number, and in both frames one colour.
Points on surfaces (INPUT.MAPPER DensePoseMapper) make a strip, too: coloured by their part, over the
mask of coarse parts, by U and by V (dark 0, bright 1), or by the number of their vertex.

Writes one PNG per sample, montage.png and, of own data, dataset_summary.json. Samples that cannot be
used are reported and skipped; the exit code is then 1.
"""

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog, detection_utils
from detectron2.structures import BitMasks, Instances
from detectron2.utils.colormap import colormap
from tqdm import tqdm

from d2ext.config import ConfigError, load_config, merge_options
from d2ext.data import (
    D2extDatasetMapper,
    DataError,
    DensePoseMapper,
    SampleError,
    build_train_loader,
)
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    register_from_arguments,
)
from d2ext.data.dataset_dicts import load_images
from d2ext.data.densepose.annotations import FRAME
from d2ext.data.panoptic import panoptic_classes
from d2ext.data.summary import report
from d2ext.model_zoo import find_config_file
from d2ext.tools.command_line import make_parser, positive
from d2ext.tools.face_files import mesh_triangles
from d2ext.utils.drawing import write_picture
from d2ext.utils.faces import draw_meshes
from d2ext.utils.surfaces import (
    draw_colored_points,
    overlay_part_mask,
    part_colors,
    value_colors,
)
from d2ext.utils.terminal import show_log
from d2ext.utils.visualizer import Visualizer

logger = logging.getLogger("d2ext.tools.visualize_data")

# Longest side of a picture in the montage, pixels.
CELL = 360
# Smaller samples are enlarged to this longest side, so that labels are legible, pixels.
SMALLEST = 400
CROWD_COLOR = (0.6, 0.6, 0.6)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="path or model-zoo name")
    add("--num", type=positive, default=16, help="number of samples (16)")
    add("--output-dir", default="output/visualize_data", metavar="DIR")
    add(
        "--source",
        choices=["loader", "annotation"],
        default="loader",
        help="loader: after augmentation; annotation: as annotated",
    )
    add_dataset_arguments(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config changes")
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The config, with the data that the command line names."""
    dataset = register_from_arguments(args)
    cfg = load_config(find_config_file(args.config_file))
    if dataset is not None:
        apply_dataset_to_config(cfg, dataset)
    merge_options(cfg, args.opts)
    # The stream does not depend on these; so few samples need no workers.
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.freeze()
    return cfg


class Samples:
    """Iterates over up to ``num`` samples. ``bad`` counts those that could not be used."""

    def __init__(self, cfg: CfgNode, source: str, num: int) -> None:
        self.bad = 0
        self.cfg = cfg
        self.num = num
        if source == "loader":
            self._loader: Any = build_train_loader(cfg)
        else:
            self._loader = None
            self._records = [r for name in cfg.DATASETS.TRAIN for r in load_images(name)]
            self.num = min(num, len(self._records))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._loader is None:
            yield from self._annotated()
            return
        for batch in itertools.islice(self._loader, self.num):
            yield from batch
        self.bad = len(self._loader.bad_samples)

    def _annotated(self) -> Iterator[dict[str, Any]]:
        """All that is annotated, whether the config's model uses it or not."""
        keypoints = MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).get("keypoint_names") or []
        surfaces = any("dp_x" in a for r in self._records for a in r.get("annotations", ()))
        build = partial(DensePoseMapper, meshes={}) if surfaces else D2extDatasetMapper
        mappers = {
            use_masks: build(
                True,
                augmentations=[],
                image_format=self.cfg.INPUT.FORMAT,
                use_instance_mask=use_masks,
                instance_mask_format="bitmask",
                use_keypoint=len(keypoints) > 0,
                keypoint_hflip_indices=np.arange(len(keypoints)),
            )
            for use_masks in (False, True)
        }
        for record in self._records[: self.num]:
            objects = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
            mapper = mappers[all(a.get("segmentation") for a in objects)]
            mapper.with_track_ids = "video_id" in record
            try:
                yield mapper(record)
            except SampleError as e:
                logger.error(f"Skipped: {e}")
                self.bad += 1


def metadata_of(cfg: CfgNode, source: str) -> Metadata:
    """Names and colours of the classes that samples have."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else "__none")
    if not (cfg.INPUT.SEM_SEG_WITH_THINGS and source == "loader"):
        return metadata
    classes = panoptic_classes(cfg.DATASETS.TRAIN[0])
    full: dict[str, Any] = {"stuff_classes": classes.full}
    if classes.full_colors:
        full["stuff_colors"] = classes.full_colors
    others = {k: v for k, v in metadata.as_dict().items() if not k.startswith(("stuff_", "name"))}
    return Metadata(name="full label maps", **others, **full)


def draw(
    sample: dict[str, Any],
    metadata: Metadata,
    image_format: str,
    triangles: np.ndarray | None = None,
) -> np.ndarray:
    """Draw everything that a training sample holds; returns an RGB image, uint8. A pair of frames is a
    strip. ``triangles``: see :func:`~d2ext.utils.faces.draw_meshes`."""
    if "reference" not in sample:
        return draw_image(sample, metadata, image_format, triangles)
    frames = [sample, sample["reference"]]
    if "flow" in sample:
        frames.append({"image": warp_reference(sample)})
    return np.hstack([draw_image(frame, metadata, image_format) for frame in frames])


def warp_reference(sample: dict[str, Any]) -> torch.Tensor:
    """(C, H, W) float32: the reference's colours where the flow leads from each pixel; 0: not known."""
    image = sample["reference"]["image"].permute(1, 2, 0).numpy().astype(np.float32)
    y, x = np.indices(image.shape[:2], dtype=np.float32)
    dx, dy = sample["flow"].numpy()
    warped = cv2.remap(image, x + dx, y + dy, cv2.INTER_LINEAR)
    return torch.from_numpy(warped).permute(2, 0, 1) * sample["flow_valid"]


def draw_image(
    sample: dict[str, Any],
    metadata: Metadata,
    image_format: str,
    triangles: np.ndarray | None = None,
) -> np.ndarray:
    """One image with its annotations, RGB, uint8."""
    image = sample["image"].permute(1, 2, 0).numpy()
    # Photometric distortion is not clipped.
    image = detection_utils.convert_image_to_rgb(image.clip(0, 255), image_format)
    if "instances" in sample and sample["instances"].has("gt_face_meshes"):
        instances = sample["instances"]
        meshes = instances.gt_face_meshes[instances.gt_mesh_valid]
        image = draw_meshes(image.astype(np.uint8), meshes, triangles)
    scale = max(1.0, SMALLEST / max(image.shape[:2]))
    visualizer = Visualizer(image.astype(np.uint8), metadata, scale=scale)
    if "sem_seg" in sample:
        draw_sem_seg(visualizer, sample["sem_seg"], metadata)
    if "instances" in sample:
        instances = sample["instances"]
        visualizer.overlay_instances(
            boxes=instances.gt_boxes,
            labels=labels(instances, metadata),
            masks=drawable_masks(instances),
            keypoints=instances.gt_keypoints if instances.has("gt_keypoints") else None,
            assigned_colors=colors(instances),
        )
    crowds = sample.get("crowd_instances")
    if crowds is not None and len(crowds):
        visualizer.overlay_instances(
            boxes=crowds.gt_boxes,
            labels=[f"{name} crowd" for name in class_names(crowds.gt_classes, metadata)],
            assigned_colors=[CROWD_COLOR] * len(crowds),
        )
    picture = visualizer.output.get_image()
    if "instances" in sample and sample["instances"].has("gt_densepose"):
        return draw_surfaces(picture, sample["instances"])
    return picture


def draw_surfaces(picture: np.ndarray, instances: Instances) -> np.ndarray:
    """A strip of a picture with points on surfaces by part, U and V, or by vertex; the picture itself if
    there are none."""
    boxes, surface = instances.gt_boxes.tensor.double().numpy(), instances.gt_densepose
    scale = np.array(picture.shape[1::-1]) / instances.image_size[::-1]
    boxes = boxes * np.tile(scale, 2)
    points = surface.points()
    box = boxes[points.person.numpy()]
    frame = torch.stack([points.x, points.y], dim=1).double().numpy() / FRAME
    places = box[:, :2] + frame * (box[:, 2:] - box[:, :2])
    masked = picture
    for i in surface.has_masks.nonzero().flatten().tolist():
        masked = overlay_part_mask(masked, surface.masks[i].numpy(), boxes[i])
    if (points.parts >= 0).any():
        panels = [
            (masked, part_colors()[points.parts.clamp(min=0)]),
            (picture, value_colors(points.u.numpy())),
            (picture, value_colors(points.v.numpy())),
        ]
    elif len(places):
        highest = points.vertices.max().clamp(min=1)
        panels = [(masked, value_colors((points.vertices / highest).numpy()))]
    else:
        return picture
    return np.hstack([draw_colored_points(image, places, colors) for image, colors in panels])


def drawable_masks(instances: Instances) -> Any:
    """Masks as ``Visualizer`` takes them: bitmaps as RLE, since it refuses bitmaps 2 pixels wide."""
    if not instances.has("gt_masks"):
        return None
    masks = instances.gt_masks
    if isinstance(masks, BitMasks):
        return [mask_util.encode(np.asfortranarray(m.numpy(), np.uint8)) for m in masks.tensor]
    return masks


def draw_sem_seg(visualizer: Visualizer, sem_seg: torch.Tensor, metadata: Metadata) -> None:
    """Labels without a class (the ignore label above all) stay free."""
    classes = metadata.get("stuff_classes")
    if classes is None:
        return
    sem_seg = sem_seg.clone()
    sem_seg[(sem_seg < 0) | (sem_seg >= len(classes))] = len(classes)
    visualizer.draw_sem_seg(sem_seg, alpha=0.4)


def class_names(classes: torch.Tensor, metadata: Metadata) -> list[str]:
    names = metadata.get("thing_classes")
    return [names[c] if names else str(c) for c in classes.tolist()]


def labels(instances: Instances, metadata: Metadata) -> list[str]:
    """Class and, of tracks, number."""
    names = class_names(instances.gt_classes, metadata)
    if not instances.has("gt_ids"):
        return names
    return [f"{name} {i}" for name, i in zip(names, instances.gt_ids.tolist(), strict=True)]


def colors(instances: Instances) -> list[np.ndarray]:
    """RGB in [0, 1], the same in every run and for a track."""
    table = colormap(rgb=True, maximum=1)
    ids = instances.gt_ids.tolist() if instances.has("gt_ids") else range(len(instances))
    return [table[(7 * i) % len(table)] for i in ids]


def make_montage(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures on a grid that is about square, each fitted into a cell of ``CELL`` pixels."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    montage = np.full((rows * CELL, columns * CELL, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = CELL * (i // columns), CELL * (i % columns)
        h, w = picture.shape[:2]
        montage[y : y + h, x : x + w] = picture
    return montage


def shrink(picture: np.ndarray) -> np.ndarray:
    """Fit into a cell of the montage, with a margin."""
    h, w = picture.shape[:2]
    scale = min(1.0, (CELL - 6) / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    args = build_parser().parse_args(arguments)
    show_log("d2ext")
    folder = Path(args.output_dir)
    try:
        cfg = setup(args)
        report((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), str(folder))
        samples = Samples(cfg, args.source, args.num)
        metadata = metadata_of(cfg, args.source)
        triangles = mesh_triangles(cfg, metadata)
        cells = []
        for i, sample in enumerate(tqdm(samples, total=samples.num, unit="image")):
            picture = draw(sample, metadata, cfg.INPUT.FORMAT, triangles)
            name = f"{i:04d}_{Path(sample['file_name']).stem}.png"
            write_picture(folder / name, picture[:, :, ::-1])
            cells.append(shrink(picture))
        if cells:
            write_picture(folder / "montage.png", make_montage(cells)[:, :, ::-1])
    except (ConfigError, DataError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: cannot write to '{folder}': {e}", file=sys.stderr)
        return 1
    logger.info(f"{len(cells)} pictures and montage.png are in {folder}.")
    if samples.bad:
        logger.error(f"{samples.bad} samples could not be used; see above.")
    return 1 if samples.bad else 0
