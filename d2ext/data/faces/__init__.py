"""Data sets of faces: boxes, five points, meshes.

::

    from d2ext.data.faces import register_faces
    register_faces("my_train", "train/label.txt", "train/images/")
"""

from d2ext.data.faces.mapper import FaceMapper
from d2ext.data.faces.meshes import (
    mirror_permutation,
    obj_text,
    read_topology,
    topology_of,
    transform_meshes,
)
from d2ext.data.faces.points import FACE_POINTS, five_points
from d2ext.data.faces.register import (
    FACE_KINDS,
    face_metadata,
    load_faces,
    register_builtin_faces,
    register_faces,
)

__all__ = [
    "FACE_KINDS",
    "FACE_POINTS",
    "FaceMapper",
    "face_metadata",
    "five_points",
    "load_faces",
    "mirror_permutation",
    "obj_text",
    "read_topology",
    "register_builtin_faces",
    "register_faces",
    "topology_of",
    "transform_meshes",
]
