"""What points and meshes bring to the detection of faces, and what they cost it (RetinaFace).

The same network learns class and box; these and five points; all of it and the mesh: the ablation of
arXiv 1905.00641, section 4.3, on other data. Errors are NME: the mean distance of a face's points, or
vertices, of the faces that are found, in percent of the square root of the box's area.
"""

from __future__ import annotations

import math

from d2ext.evaluation.faces import SIZES
from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison, Plot

_CONFIG = "retinaface/mobilenet025_shapes.yaml"
_NO_MESH = ("MODEL.RETINAFACE.MESH.NUM_VERTICES", "0")
# Geometric mean of the sizes of a group → its name. The open group is drawn as if it were closed.
_GROUPS = {
    round(math.sqrt(max(low, 8) * min(high, 256)), 1): name
    for name, (low, high) in SIZES.items()
    if name not in ("all", "from16")
}
_SIZE = "size of the face, pixels"


@COMPARISONS.register()
def retinaface_tasks() -> Comparison:
    """All on the faces of the built-in `shapes`, with the same backbone and budget."""
    return Comparison(
        summary="RetinaFace for boxes, with points, with meshes: AP by face size, NME",
        arms={
            "boxes": Arm("class and box", _CONFIG, ("MODEL.KEYPOINT_ON", "False", *_NO_MESH)),
            "points": Arm("+ points", _CONFIG, _NO_MESH),
            "mesh": Arm("+ points + mesh", _CONFIG),
        },
        columns={
            "bbox/AP": "box AP",
            "faces/AP50-all": "AP50",
            **{f"faces/AP50-{name}": f"AP50 {name}" for name in _GROUPS.values()},
            "points/NME-all": "points NME %",
            "points/failures-all": "points > 10 %",
            "mesh/NME-all": "mesh NME %",
        },
        curves={
            "sizes": {x: f"faces/AP50-{name}" for x, name in _GROUPS.items()},
            "points": {x: f"points/NME-{name}" for x, name in _GROUPS.items()},
            "mesh": {x: f"mesh/NME-{name}" for x, name in _GROUPS.items()},
        },
        plots={
            "sizes": Plot(_SIZE, "AP50"),
            "points": Plot(_SIZE, "NME of points, % of the box"),
            "mesh": Plot(_SIZE, "NME of meshes, % of the box"),
        },
    )
