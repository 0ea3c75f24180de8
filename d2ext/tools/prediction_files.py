"""Files that `d2ext predict` reads and writes: pictures, videos, COCO, YouTube-VIS, panoptic results."""

from __future__ import annotations

import glob
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from d2ext.codecs.densepose import stored_result
from d2ext.data.errors import ImageReadError
from d2ext.data.image_io import is_image, read_image
from d2ext.data.video.panoptic_results import PanopticVideoWriter, segment_places
from d2ext.data.video.video_data import natural_order
from d2ext.files import json_list
from d2ext.tools.command_line import CommandError
from d2ext.utils.drawing import name_classes
from d2ext.utils.video import (
    DEFAULT_RATE,
    VIDEO_SUFFIXES,
    CameraReader,
    VideoError,
    VideoFrame,
    VideoReader,
    check_video_path,
    is_stream,
)

logger = logging.getLogger("d2ext.tools.predict")

# Suffixes that name a file, not a folder.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
# Suffixes of pictures that are written under the same name.
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png"}
# Suffixes that do not name a folder, whether or not they can be written.
MOVIE_SUFFIXES = {*VIDEO_SUFFIXES, ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv"}
RESULTS, IMAGES, TRACKS = "coco_results.json", "coco_images.json", "ytvis_results.json"
# A JSON file, and the folder of its PNGs.
PANOPTIC = "panoptic_video"


class Job(NamedTuple):
    """One image to predict on."""

    source: Path
    target: Path
    """Where its picture goes."""
    image_id: int


def find_sources(inputs: Iterable[str]) -> list[tuple[Path, Path]]:
    """Files, folders and patterns → (file, name of its picture below the output folder).

    Of a folder, all files that are images by their content; the log names the others. Files that do not
    exist stay in the list, for the report; a file that is named twice appears once.
    """
    sources: dict[Path, Path] = {}
    for entry in inputs:
        path = Path(entry).expanduser()
        matches = [path] if path.exists() else [Path(m) for m in sorted(glob.glob(str(path)))]
        if not matches and not glob.has_magic(entry):
            matches = [path]
        for match in matches:
            if match.is_dir():
                files = sorted(f for f in match.rglob("*") if f.is_file())
                others = [file.name for file in files if not is_image(str(file))]
                if others:
                    shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
                    logger.info("%d files in %s are no images: %s", len(others), match, shown)
                for file in files:
                    if file.name not in others:
                        sources.setdefault(file, file.relative_to(match))
            else:
                sources.setdefault(match, Path(match.name))
    return list(sources.items())


def plan_images(inputs: Sequence[str], output: Path) -> list[Job]:
    """The images to predict on, with different targets and ids.

    Raises:
        CommandError: there is none, or a picture would overwrite an input.
    """
    sources = find_sources(inputs)
    if not any(source.exists() for source, _ in sources):
        raise CommandError(f"No image found in {' '.join(map(repr, inputs))}.")
    if is_file_name(output):
        if len(sources) > 1:
            raise CommandError(
                f"--output '{output}' is one file and there are {len(sources)} images: name a folder."
            )
        if output.suffix.lower() not in PICTURE_SUFFIXES:
            raise CommandError(f"--output '{output}': pictures are written as .jpg or .png.")
        targets = [output]
    else:
        targets = [output / name for name in unique_names([name for _, name in sources])]
    originals = {source.resolve() for source, _ in sources}
    for target in targets:
        if target.resolve() in originals:
            raise CommandError(f"'{target}' would overwrite an input: choose another --output.")
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


def plan_video(source: str | int, output: Path) -> Path:
    """Where the video goes; its results go beside it.

    Raises:
        VideoError: the output is no name of a video.
        CommandError: it would overwrite the input.
    """
    if isinstance(source, int):
        name = f"camera_{source}"
    else:
        name = Path(source).resolve().name if Path(source).is_dir() else Path(source).stem
    target = output if is_file_name(output) else output / f"{name}.mp4"
    check_video_path(target)
    if (
        not isinstance(source, int)
        and not is_stream(source)
        and target.resolve() == Path(source).resolve()
    ):
        raise CommandError(f"'{target}' would overwrite the input: choose another --output.")
    return target


class FolderReader:
    """A video whose frames are the image files of a folder, by name, numbers in it by their value;
    broken ones are left out.

    Attributes: as of :class:`~d2ext.utils.video.VideoReader`.

    Raises:
        VideoError: there is no image.
    """

    rate = DEFAULT_RATE

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.skipped = 0
        files = sorted(folder.iterdir(), key=lambda path: (natural_order(path.name), path.name))
        self._files = [x for x in files if x.is_file() and is_image(str(x))]
        self.length = len(self._files)
        if not self._files:
            raise VideoError(f"There is no image in the folder '{folder}'.")

    def __iter__(self) -> Iterator[VideoFrame]:
        for i, file in enumerate(self._files):
            try:
                yield VideoFrame(read_image(str(file), "BGR"), i / self.rate, str(file))
            except ImageReadError:
                self.skipped += 1

    def release(self) -> None:
        """Nothing is open."""


def open_video(source: str | int) -> VideoReader | CameraReader | FolderReader:
    """A file, a stream, a folder of frames, or a camera.

    Raises:
        VideoError: it cannot be read.
    """
    if isinstance(source, int):
        return CameraReader(source)
    return FolderReader(Path(source)) if Path(source).is_dir() else VideoReader(source)


def _dataset_ids(metadata: Metadata) -> dict[int, int]:
    """Contiguous class → the data set's own category id, where it has them."""
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return {contiguous: category for category, contiguous in ids.items()}


def _path(output: Path, name: str) -> Path:
    """Of a file beside the pictures or the video."""
    path = output.with_name(f"{output.stem}_{name}") if is_file_name(output) else output / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class TrackWriter:
    """Collects the tracks of one video, and writes them in YouTube-VIS's result form.

    In memory is of each detection the RLE of its mask and its box.

    Args:
        output, metadata: as of :class:`ResultWriter`.
    """

    def __init__(self, output: Path, metadata: Metadata) -> None:
        self._file = _path(output, TRACKS)
        self._category = _dataset_ids(metadata)
        # Id → of each detection its frame, class, score, mask (RLE or None) and box (x, y, w, h).
        self._tracks: dict[int, list[tuple[int, int, float, Any, list[float]]]] = {}

    def add(self, frame: int, instances: Instances) -> None:
        """Instances (on the CPU) of a frame, counted from 0; those without id are left out."""
        boxes = instances.pred_boxes.tensor
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
        for i, track in enumerate(instances.track_ids.tolist()):
            if track > 0:
                rle = None
                if masks is not None and masks[i].any():
                    rle = mask_util.encode(np.asfortranarray(masks[i], np.uint8))
                what = int(instances.pred_classes[i]), float(instances.scores[i])
                self._tracks.setdefault(track, []).append((frame, *what, rle, boxes[i]))

    def write(self, length: int) -> None:
        """Write the file: one entry a track, lists over all ``length`` frames.

        The score is the mean over the track's detections, the category that with the highest sum.
        """
        with json_list(self._file) as write:
            for track, detections in self._tracks.items():
                votes: dict[int, float] = {}
                masks: list[Any] = [None] * length
                boxes: list[Any] = [None] * length
                for frame, category, score, rle, box in detections:
                    votes[category] = votes.get(category, 0.0) + score
                    boxes[frame] = box
                    if rle is not None:
                        masks[frame] = {**rle, "counts": rle["counts"].decode("ascii")}
                best = max(votes, key=votes.__getitem__)
                write(
                    {
                        "video_id": 1,
                        "track_id": track,
                        "category_id": self._category.get(best, best),
                        "score": sum(votes.values()) / len(detections),
                        "segmentations": masks,
                        "bboxes": boxes,
                    }
                )


class PanopticWriter:
    """Writes the panoptic maps of one video as they come, in the form of
    :mod:`d2ext.data.video.panoptic_results`; nothing if there are none.

    Args:
        output, metadata: as of :class:`ResultWriter`.
    """

    def __init__(self, stack: ExitStack, output: Path, metadata: Metadata) -> None:
        self._stack, self._output = stack, output
        self._writer = PanopticVideoWriter(_path(output, PANOPTIC), metadata)
        self._write: Any = None
        self._others: dict[str, Any] = {}

    def add(
        self, number: int, file: str, panoptic: tuple[torch.Tensor, list[dict[str, Any]]]
    ) -> None:
        """Add a frame: its number from 1, which is its image id, and a model's ``panoptic_seg``."""
        if self._write is None:
            self._others.update(
                images=[],
                categories=self._writer.categories,
                label_divisor=self._writer.divisor,
            )
            path = _path(self._output, f"{PANOPTIC}.json")
            self._write = self._stack.enter_context(
                json_list(path, key="annotations", others=self._others)
            )
        ids = panoptic[0].cpu().numpy()
        places = segment_places(ids, panoptic[1], file)
        name = f"{1:06d}_{number - 1:06d}.png"  # clip and frame, as panoptic videos are named
        self._write(self._writer.write(name, number, places, panoptic[1]))
        size = {"height": ids.shape[0], "width": ids.shape[1]}
        self._others["images"].append({"id": number, "file_name": file, **size})


class ResultWriter:
    """Writes COCO results and the list of images as they come.

    Args:
        output: the output folder or file.
        metadata: class names, and the data set's own category ids where it has them.
        meshes: also write those of faces, ``mesh``: 3 V numbers x, y, z, of which x and y are counted as
            COCO's keypoints (pixel indices).
        surfaces: also write those of persons, ``densepose``, see
            :func:`~d2ext.codecs.densepose.stored_result`.

    The head pose of a face is ``pose``: yaw, pitch and roll, see
    :func:`~d2ext.codecs.face_alignment.face_poses`.
    """

    def __init__(
        self,
        stack: ExitStack,
        output: Path,
        metadata: Metadata,
        *,
        meshes: bool = False,
        surfaces: bool = False,
    ) -> None:
        self._meshes, self._surfaces = meshes, surfaces
        self._category = _dataset_ids(metadata)
        self._metadata = metadata
        self._others: dict[str, Any] = {}
        self._add_categories(torch.tensor([0]))
        self._result = stack.enter_context(json_list(_path(output, RESULTS)))
        self._image = stack.enter_context(
            json_list(_path(output, IMAGES), key="images", others=self._others)
        )

    def _add_categories(self, classes: torch.Tensor) -> None:
        self._metadata = name_classes(self._metadata, classes)
        self._others["categories"] = [
            {"id": self._category.get(i, i), "name": name}
            for i, name in enumerate(self._metadata.thing_classes)
        ]

    def write(
        self, image_id: int, file: str, shape: tuple[int, ...], output: dict[str, Any]
    ) -> None:
        """Add one image of ``shape`` (H, W, ...) and its instances."""
        height, width = shape[:2]
        self._image({"id": image_id, "file_name": file, "height": height, "width": width})
        if "instances" in output:
            instances = output["instances"]
            self._add_categories(instances.pred_classes)
            results = instances_to_coco_json(instances, image_id)
            ids = instances.track_ids.tolist() if instances.has("track_ids") else None
            for i, result in enumerate(results):
                category = result["category_id"]
                result["category_id"] = self._category.get(category, category)
                if ids is not None:
                    result["track_id"] = ids[i]
                if instances.has("pred_face_poses"):
                    result["pose"] = [round(x, 2) for x in instances.pred_face_poses[i].tolist()]
                if self._meshes and instances.has("pred_face_meshes"):
                    shifted = instances.pred_face_meshes[i].double().numpy() - (0.5, 0.5, 0)
                    result["mesh"] = np.round(shifted, 2).reshape(-1).tolist()
                if self._surfaces:
                    result["densepose"] = stored_result(output["surfaces"][i])
                self._result(result)
