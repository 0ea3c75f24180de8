"""Base class of models that resize test images themselves, by their short side, as published."""

from __future__ import annotations

from torch import Tensor

from d2ext.codecs.image_scale import Size, axis_scales, scaled_size, short_side_scale
from d2ext.layers.opencv_resample import resize_float_like_opencv
from d2ext.modeling.meta_arch import MetaArch


class ShortSideMetaArch(MetaArch):
    """A subclass sets ``min_size`` and ``max_size``: pixels of the short side, and most pixels of the
    long one; 0: images as they are."""

    min_size: int
    max_size: int

    def network_scale(self, size: Size) -> float:
        """The factor by which an image of ``size`` (height, width) is resized for the network."""
        # Training images come from the data mapper in the network's size.
        return 1.0 if self.training else short_side_scale(size, self.min_size, self.max_size)

    def network_size(self, size: Size) -> Size:
        """(height, width) of an image → those of the network's input without padding."""
        return scaled_size(size, self.network_scale(size))


def scaled(image: Tensor, scale: float) -> Tensor:
    """An image (C, H, W) → float32, resized by a factor with OpenCV's arithmetic."""
    size = (image.shape[-2], image.shape[-1])
    sizes = scaled_size(size, scale), axis_scales(size, scale)
    return resize_float_like_opencv(image[None], *sizes)[0]
