"""Data with points on the surface of persons or animals (DensePose)."""

from d2ext.data.densepose.annotations import (
    AnnotatedPoints,
    DensePoseAnnotations,
    SurfacePoints,
)
from d2ext.data.densepose.geodesics import GeodesicDistances, open_geodesics
from d2ext.data.densepose.parts import (
    MIRRORED_COARSE_PARTS,
    MIRRORED_PARTS,
    NUM_COARSE_PARTS,
    NUM_PARTS,
    SurfaceSymmetry,
    read_mirror_vertices,
    read_uv_symmetry,
)

__all__ = [
    "MIRRORED_COARSE_PARTS",
    "MIRRORED_PARTS",
    "NUM_COARSE_PARTS",
    "NUM_PARTS",
    "AnnotatedPoints",
    "DensePoseAnnotations",
    "GeodesicDistances",
    "SurfacePoints",
    "SurfaceSymmetry",
    "open_geodesics",
    "read_mirror_vertices",
    "read_uv_symmetry",
]
