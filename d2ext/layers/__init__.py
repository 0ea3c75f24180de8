"""Operators and blocks: nothing here knows a data set or a config."""

from d2ext.layers._extension import extension_info, has_cuda_extension, has_extension
from d2ext.layers.affine_crops import affine_crops, truncated_crops
from d2ext.layers.prototype_masks import (
    assemble_binary_masks,
    assemble_binary_masks_reference,
    assemble_masks,
    assemble_masks_reference,
)

__all__ = [
    "affine_crops",
    "assemble_binary_masks",
    "assemble_binary_masks_reference",
    "assemble_masks",
    "assemble_masks_reference",
    "extension_info",
    "has_cuda_extension",
    "has_extension",
    "truncated_crops",
]
