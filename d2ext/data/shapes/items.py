"""Pictures in which something solid stands before a backdrop: what those of heads and bodies share."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import cv2
import numpy as np

from d2ext.data.shapes.face_paint import Light
from d2ext.data.shapes.frame import Frame, Layer, paint_layer
from d2ext.data.shapes.raster import Raster

__all__ = ["Cover", "ItemFrame"]

Solid = TypeVar("Solid")


@dataclass(frozen=True)
class Cover:
    """Something flat that stands among solid items: shoulders, a hand, a thing."""

    layer: Layer
    matrix: np.ndarray
    raster: Raster


class ItemFrame(Frame, Generic[Solid]):
    """A picture of solid items. What a :class:`Frame` annotates is here what lies behind them.

    Args:
        items: what is solid, and what stands among it, front to back.
        light: on what is solid.
        blur: deviation of the whole picture's blur in pixels.
        backdrop: what lies behind them; only its background, layers and noise are used.
    """

    def __init__(
        self, items: list[Solid | Cover], light: Light, blur: float, backdrop: Frame
    ) -> None:
        super().__init__(
            backdrop.height,
            backdrop.width,
            backdrop.layers,
            backdrop.matrices,
            backdrop.background,
            backdrop.camera,
            backdrop.noise_window,
            backdrop.rasters,
        )
        self.items, self.light, self.blur = items, light, blur

    @abstractmethod
    def _paint_solid(self, image: np.ndarray, item: Solid) -> None:
        """Blend an item over `image`, in place."""

    @cached_property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""
        image = self._paint()
        for item in reversed(self.items):
            if isinstance(item, Cover):
                paint_layer(image, item.layer, item.matrix, item.raster)
            else:
                self._paint_solid(image, item)
        if self.blur > 0:
            image = cv2.GaussianBlur(image, (0, 0), self.blur)
        return self._lit(image)
