"""`shapes`: the built-in data set, textured scenes drawn from (seed, index).

Importing this package registers ``shapes_train`` and ``shapes_val`` for every task (:mod:`.catalog`
lists the names) and the ``shapes://`` paths under which their images lie. To have others::

    from d2ext.data.shapes import ShapesSet, register_shapes
    register_shapes(ShapesSet("val", num=50, height=320, width=480, seed=7), prefix="wide")
"""

from d2ext.data.shapes.bodies import BodyFrame
from d2ext.data.shapes.body_coco import BODY_MESH
from d2ext.data.shapes.body_scene import draw_bodies, draw_body_clip
from d2ext.data.shapes.body_sets import (
    DEFAULT_BODY_SETS,
    load_shapes_bodies,
    register_shapes_bodies,
)
from d2ext.data.shapes.catalog import (
    DEFAULT_SETS,
    TASKS,
    load_shapes,
    register_shapes,
    shapes_metadata,
)
from d2ext.data.shapes.classes import KEYPOINT_OKS_SIGMAS, STUFF_CLASSES, THING_CLASSES
from d2ext.data.shapes.clips import (
    DEFAULT_PANOPTIC_VIDEO_SETS,
    DEFAULT_VIDEO_SETS,
    load_shapes_flow,
    load_shapes_video,
    register_shapes_video,
)
from d2ext.data.shapes.face_mesh import face_topology, mirror_vertices
from d2ext.data.shapes.face_scene import draw_faces
from d2ext.data.shapes.face_sets import (
    DEFAULT_FACE_SETS,
    load_shapes_faces,
    register_shapes_faces,
)
from d2ext.data.shapes.faces import FaceFrame
from d2ext.data.shapes.files import register_path_handler
from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.scene import draw_image
from d2ext.data.shapes.sets import BodySet, FaceSet, ShapesSet, VideoSet
from d2ext.data.shapes.video import Clip, draw_clip

__all__ = [
    "BODY_MESH",
    "DEFAULT_BODY_SETS",
    "DEFAULT_FACE_SETS",
    "DEFAULT_PANOPTIC_VIDEO_SETS",
    "DEFAULT_SETS",
    "DEFAULT_VIDEO_SETS",
    "KEYPOINT_OKS_SIGMAS",
    "STUFF_CLASSES",
    "TASKS",
    "THING_CLASSES",
    "BodyFrame",
    "BodySet",
    "Clip",
    "FaceFrame",
    "FaceSet",
    "Frame",
    "ShapesSet",
    "VideoSet",
    "draw_bodies",
    "draw_body_clip",
    "draw_clip",
    "draw_faces",
    "draw_image",
    "face_topology",
    "load_shapes",
    "load_shapes_bodies",
    "load_shapes_faces",
    "load_shapes_flow",
    "load_shapes_video",
    "mirror_vertices",
    "register_shapes",
    "register_shapes_bodies",
    "register_shapes_faces",
    "register_shapes_video",
    "shapes_metadata",
]

register_path_handler()
for _shapes in DEFAULT_SETS:
    register_shapes(_shapes)
for _clips in DEFAULT_VIDEO_SETS:
    register_shapes_video(_clips)
for _clips in DEFAULT_PANOPTIC_VIDEO_SETS:
    register_shapes_video(_clips, tasks=("panoptic",))
for _faces in DEFAULT_FACE_SETS:
    register_shapes_faces(_faces)
for _bodies in DEFAULT_BODY_SETS:
    register_shapes_bodies(_bodies)
