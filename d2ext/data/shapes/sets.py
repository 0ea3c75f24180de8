"""Which pictures make up a data set, and under which paths they are found."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.scene import draw_image

__all__ = ["PREFIX", "ShapesSet"]

PREFIX = "shapes://"
_NAME = re.compile(r"(\w+)-(\d+)-(\d+)x(\d+)-seed(\d+)")


@dataclass(frozen=True)
class ShapesSet:
    """A split of `shapes`: `num` images of one size.

    Everything below :attr:`root` is drawn when it is opened:
    ``images/<12 digits>.bmp``, ``panoptic/<12 digits>.png`` (RGB-coded segment ids),
    ``sem_seg/<12 digits>.png`` (0 things, then stuff), ``semantic/<12 digits>.png`` (all classes) and
    ``annotations/{instances,keypoints,panoptic}.json`` in COCO's format.

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
        return f"{self.split}-{self.num}-{self.height}x{self.width}-seed{self.seed}"

    @property
    def root(self) -> str:
        return PREFIX + self.name

    @classmethod
    def from_name(cls, name: str) -> "ShapesSet":
        """The set with this :attr:`name`; ValueError if there is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} is no name of a set: expected SPLIT-NUM-HEIGHTxWIDTH-seedSEED, "
                "as in val-200-256x256-seed0"
            )
        split, *numbers = match.groups()
        return cls(split, *map(int, numbers))

    def frame(self, index: int) -> Frame:
        """Image number `index`; the last few are kept, as several files may be read from each."""
        if not 0 <= index < self.num:
            raise IndexError(f"{self.name} has images 0 to {self.num - 1}, not {index}")
        return _frame(self.seed, self.split, index, self.height, self.width)

    def frames(self) -> Iterator[Frame]:
        """All images in order; none is kept."""
        for index in range(self.num):
            yield draw_image(self.seed, self.split, index, self.height, self.width)


@lru_cache(maxsize=4)
def _frame(seed: int, split: str, index: int, height: int, width: int) -> Frame:
    return draw_image(seed, split, index, height, width)
