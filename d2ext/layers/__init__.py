"""Operators and blocks: nothing here knows a data set or a config."""

from d2ext.layers._extension import extension_info, has_cuda_extension, has_extension
from d2ext.layers.affine_crops import affine_crops, truncated_crops
from d2ext.layers.corner_pool import (
    CornerPool,
    center_pool,
    corner_pool,
    corner_pool_pair,
    corner_pool_reference,
)
from d2ext.layers.correlation import correlation
from d2ext.layers.nms import nms, nms_reference, overlapped, overlapped_reference
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
from d2ext.layers.soft_nms import (
    SoftNMSRows,
    soft_nms,
    soft_nms_merge,
    soft_nms_rows,
    soft_nms_slots,
)
from d2ext.layers.warp import warp

__all__ = [
    "CornerPool",
    "SoftNMSRows",
    "affine_crops",
    "assemble_binary_masks",
    "assemble_binary_masks_reference",
    "assemble_masks",
    "assemble_masks_reference",
    "center_pool",
    "corner_pool",
    "corner_pool_pair",
    "corner_pool_reference",
    "correlation",
    "extension_info",
    "fuse_panoptic",
    "fuse_panoptic_reference",
    "has_cuda_extension",
    "has_extension",
    "nms",
    "nms_reference",
    "overlapped",
    "overlapped_reference",
    "prune_masks",
    "prune_masks_reference",
    "soft_nms",
    "soft_nms_merge",
    "soft_nms_rows",
    "soft_nms_slots",
    "truncated_crops",
    "warp",
]
