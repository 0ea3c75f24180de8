"""Which pictures make up a data set, and under which paths they lie."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from d2ext.data.shapes.bodies import BodyFrame
from d2ext.data.shapes.body_scene import draw_bodies
from d2ext.data.shapes.face_scene import draw_faces
from d2ext.data.shapes.faces import FaceFrame
from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.scene import draw_image
from d2ext.data.shapes.video import Clip, draw_clip

__all__ = ["PREFIX", "BodySet", "FaceSet", "ShapesSet", "VideoSet", "set_from_name"]

PREFIX = "shapes://"
_NAME = re.compile(
    r"(?P<split>\w+)-(?P<num>\d+)(x(?P<length>\d+))?"
    r"-(?P<height>\d+)x(?P<width>\d+)-seed(?P<seed>\d+)"
    r"(-every(?P<every>\d+)|-(?P<kind>faces|bodies))?"
)


@dataclass(frozen=True)
class ShapesSet:
    """A split of `shapes`: `num` unrelated images of one size.

    Everything below :attr:`root` is drawn when it is opened: ``images/<stem>.bmp``,
    ``panoptic/<stem>.png`` (RGB-coded segment ids), ``sem_seg/<stem>.png`` (0 things, then stuff),
    ``semantic/<stem>.png`` (all classes) and ``annotations/*.json`` in COCO's format.

    Attributes:
        split: any word; different splits share no scene.
        num: number of images; image ids are 0 to num - 1. A larger set begins with the smaller one.
        height, width: of every image, at least 32 pixels.
        seed: another seed gives other scenes.
    """

    split: str
    num: int
    height: int = 256
    width: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.split):
            raise ValueError(f"split must consist of letters, digits and _, got {self.split!r}")
        if self.num < 1:
            raise ValueError(f"a data set needs at least one image, got num={self.num}")
        if min(self.height, self.width) < 32:
            raise ValueError(f"images need at least 32 x 32 pixels: {self.height} x {self.width}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def name(self) -> str:
        """All that defines the set, as in ``val-200-256x256-seed0``."""
        return f"{self.split}-{self.num}-{self.height}x{self.width}-seed{self.seed}"

    @property
    def root(self) -> str:
        return PREFIX + self.name

    @property
    def num_frames(self) -> int:
        """Number of pictures."""
        return self.num

    def stem(self, index: int) -> str:
        """File name of picture `index` without its extension: 12 digits, as in COCO."""
        return f"{index:012d}"

    def is_annotated(self, index: int) -> bool:
        """Whether picture `index` counts as annotated."""
        return True

    def frame(self, index: int) -> Frame:
        """Picture `index`; the last few stay in memory, since several files are read from each."""
        if not 0 <= index < self.num_frames:
            raise IndexError(f"{self.name} has images 0 to {self.num_frames - 1}, not {index}")
        return self._frame(index)

    def frames(self) -> Iterator[Frame]:
        """All pictures in order; none stays in memory."""
        for index in range(self.num):
            yield draw_image(self.seed, self.split, index, self.height, self.width)

    def _frame(self, index: int) -> Frame:
        return _image(self.seed, self.split, index, self.height, self.width)


@dataclass(frozen=True)
class VideoSet(ShapesSet):
    """A split of `shapes` with `num` clips of `length` frames.

    A frame's image id is ``clip * length + time``, its stem ``<6 digits of clip>_<6 digits of
    time>``. Beside the folders of :class:`ShapesSet` there are, from every frame to every other of
    its clip, ``flow/<stem>_to_<6 digits of time>.flo`` (exact motion) and
    ``occlusion/<stem>_to_<6 digits of time>.png`` (0: seen in the other frame, 1: covered there, 2:
    outside), and ``annotations/tracks.json`` in YouTube-VIS' form. Segment ids are stable over a clip.

    Attributes:
        length: frames of a clip, at least 2.
        every: annotated is the last of this many frames, as in Cityscapes-VPS (5), whose clips begin
            with four frames that are not; 1: all.
    """

    length: int = 12
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise ValueError(f"a clip needs at least two frames, got length={self.length}")
        if not 1 <= self.every <= self.length:
            raise ValueError(f"of {self.length} frames, every {self.every}th cannot be annotated")

    @property
    def name(self) -> str:
        size = f"{self.height}x{self.width}"
        every = f"-every{self.every}" if self.every > 1 else ""
        return f"{self.split}-{self.num}x{self.length}-{size}-seed{self.seed}{every}"

    def is_annotated(self, index: int) -> bool:
        return (index % self.length + 1) % self.every == 0

    def pair_stem(self, index: int, target: int) -> str:
        """Name of flow and occlusion from picture `index` to time `target` of its clip."""
        return f"{self.stem(index)}_to_{target:06d}"

    @property
    def num_frames(self) -> int:
        return self.num * self.length

    def stem(self, index: int) -> str:
        return f"{index // self.length:06d}_{index % self.length:06d}"

    def clip(self, number: int) -> Clip:
        """Clip `number`; the last one stays in memory."""
        if not 0 <= number < self.num:
            raise IndexError(f"{self.name} has clips 0 to {self.num - 1}, not {number}")
        return _clip(self.seed, self.split, number, self.height, self.width, self.length)

    def frames(self) -> Iterator[Frame]:
        for number in range(self.num):
            clip = draw_clip(self.seed, self.split, number, self.height, self.width, self.length)
            yield from clip.frames

    def _frame(self, index: int) -> Frame:
        return self.clip(index // self.length).frames[index % self.length]


@dataclass(frozen=True)
class FaceSet(ShapesSet):
    """A split of `shapes` with heads: :mod:`.faces`.

    Below :attr:`root` there are ``images/<stem>.bmp``, ``annotations/faces.json`` (COCO's form, with
    meshes) and ``annotations/face.obj``, the mesh's topology.
    """

    @property
    def name(self) -> str:
        return super().name + "-faces"

    def frame(self, index: int) -> FaceFrame:
        frame = super().frame(index)
        assert isinstance(frame, FaceFrame)  # _frame
        return frame

    def frames(self) -> Iterator[FaceFrame]:
        for index in range(self.num):
            yield draw_faces(self.seed, self.split, index, self.height, self.width)

    def _frame(self, index: int) -> FaceFrame:
        return _faces(self.seed, self.split, index, self.height, self.width)


@dataclass(frozen=True)
class BodySet(ShapesSet):
    """A split of `shapes` with persons: :mod:`.bodies`.

    Below :attr:`root` there are ``images/<stem>.bmp``, ``annotations/densepose.json`` (DensePose-COCO's
    form) and, in the same folder, the files of the mesh (:mod:`.body_tables`).
    """

    @property
    def name(self) -> str:
        return super().name + "-bodies"

    def frame(self, index: int) -> BodyFrame:
        frame = super().frame(index)
        assert isinstance(frame, BodyFrame)  # _frame
        return frame

    def frames(self) -> Iterator[BodyFrame]:
        for index in range(self.num):
            yield draw_bodies(self.seed, self.split, index, self.height, self.width)

    def _frame(self, index: int) -> BodyFrame:
        return _bodies(self.seed, self.split, index, self.height, self.width)


@lru_cache(maxsize=4)
def _bodies(seed: int, split: str, index: int, height: int, width: int) -> BodyFrame:
    return draw_bodies(seed, split, index, height, width)


@lru_cache(maxsize=4)
def _faces(seed: int, split: str, index: int, height: int, width: int) -> FaceFrame:
    return draw_faces(seed, split, index, height, width)


@lru_cache(maxsize=4)
def _image(seed: int, split: str, index: int, height: int, width: int) -> Frame:
    return draw_image(seed, split, index, height, width)


@lru_cache(maxsize=1)
def _clip(seed: int, split: str, number: int, height: int, width: int, length: int) -> Clip:
    return draw_clip(seed, split, number, height, width, length)


def set_from_name(name: str) -> ShapesSet:
    """The set with this :attr:`ShapesSet.name`; ValueError if there is none."""
    match = _NAME.fullmatch(name)
    if match is None or (match["kind"] and match["length"]):
        raise ValueError(
            f"{name!r} is no name of a set: expected SPLIT-NUM-HEIGHTxWIDTH-seedSEED, as in "
            "val-200-256x256-seed0, SPLIT-NUMxLENGTH-HEIGHTxWIDTH-seedSEED for clips, or "
            "SPLIT-NUM-HEIGHTxWIDTH-seedSEED-faces or -bodies"
        )
    num, height, width, seed = (int(match[key]) for key in ("num", "height", "width", "seed"))
    if match["length"]:
        length, every = int(match["length"]), int(match["every"] or 1)
        return VideoSet(match["split"], num, height, width, seed, length, every)
    classes: dict[str | None, type[ShapesSet]] = {"faces": FaceSet, "bodies": BodySet}
    return classes.get(match["kind"], ShapesSet)(match["split"], num, height, width, seed)
