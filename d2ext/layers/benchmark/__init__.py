"""Operators beside plain PyTorch and beside the floor that memory sets; ``d2ext benchmark operators``
prints them.

The floor of a case is the bytes that it must move (inputs read once, outputs written once) over the
bandwidth of a large copy on the same device, measured in the same run.
"""

from d2ext.layers.benchmark.corner_pool import POOL_COLUMNS, benchmark_pooling
from d2ext.layers.benchmark.measure import copy_bandwidth, format_rows
from d2ext.layers.benchmark.prototype_masks import MASK_COLUMNS, benchmark_masks

__all__ = [
    "MASK_COLUMNS",
    "POOL_COLUMNS",
    "benchmark_masks",
    "benchmark_pooling",
    "copy_bandwidth",
    "format_rows",
]
