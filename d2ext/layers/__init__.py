"""Operators and blocks: nothing here knows a data set or a config."""

from d2ext.layers._extension import extension_info, has_cuda_extension, has_extension
from d2ext.layers.panoptic_fusion import (
    fuse_panoptic,
    fuse_panoptic_reference,
    prune_masks,
    prune_masks_reference,
)
from d2ext.layers.prototype_masks import (
    assemble_binary_masks,
    assemble_binary_masks_reference,
    assemble_masks,
    assemble_masks_reference,
)

__all__ = [
    "assemble_binary_masks",
    "assemble_binary_masks_reference",
    "assemble_masks",
    "assemble_masks_reference",
    "extension_info",
    "fuse_panoptic",
    "fuse_panoptic_reference",
    "has_cuda_extension",
    "has_extension",
    "prune_masks",
    "prune_masks_reference",
]
