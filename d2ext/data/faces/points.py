"""The five points of a face, and how other schemes of facial landmarks give them.

Left and right are those of the image. Indices are 0-based.

====== ============================== ======================= ====== ==============
points data set                       eyes (left; right)      nose   mouth corners
====== ============================== ======================= ====== ==============
68     300-W, Multi-PIE               mean 36-41; mean 42-47  30     48, 54
98     WFLW (96, 97: the pupils)      96; 97                  54     76, 82
29     COFW (16, 17: the pupils)      16; 17                  20     22, 23
21     AFLW                           7; 10                   14     17, 19
19     AFLW without ears              7; 10                   13     15, 17
5      label.txt of RetinaFace        0; 1                    2      3, 4
====== ============================== ======================= ====== ==============
"""

from __future__ import annotations

import numpy as np

from d2ext.data.landmarks.datasets import LandmarkDataset

FACE_POINTS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
# Number of points of a scheme → indices whose mean is each of the five.
FIVE_OF: dict[int, tuple[tuple[int, ...], ...]] = {
    68: (tuple(range(36, 42)), tuple(range(42, 48)), (30,), (48,), (54,)),
    98: ((96,), (97,), (54,), (76,), (82,)),
    29: ((16,), (17,), (20,), (22,), (23,)),
    21: ((7,), (10,), (14,), (17,), (19,)),
    19: ((7,), (10,), (13,), (15,), (17,)),
    5: ((0,), (1,), (2,), (3,), (4,)),
}
FACES = LandmarkDataset(
    "faces",
    "face",
    FACE_POINTS,
    ((0, 1), (3, 4)),
    ((0, 2), (1, 2), (2, 3), (2, 4), (3, 4)),
    # For keypoint AP, should someone compute it: COCO's of eyes and nose; mouth corners as eyes.
    (0.025, 0.025, 0.026, 0.025, 0.025),
    occlusion=True,
)


def five_points(points: np.ndarray) -> np.ndarray:
    """The five points of faces in another scheme.

    Args:
        points: (..., K, 3) x, y, v; K one of :data:`FIVE_OF`.

    Returns:
        (..., 5, 3) float64. A point is labelled (v > 0) if all that it is made of are, and has the
        least v of them; others are 0, 0, 0.

    Raises:
        ValueError: another K.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.shape[-2] not in FIVE_OF:
        raise ValueError(
            f"No five points of a face are known for {points.shape[-2]} landmarks; known are schemes "
            f"of {', '.join(map(str, FIVE_OF))}."
        )
    groups = [points[..., list(indices), :] for indices in FIVE_OF[points.shape[-2]]]
    v = np.stack([group[..., 2].min(axis=-1) for group in groups], axis=-1)
    xy = np.stack([group[..., :2].mean(axis=-2) for group in groups], axis=-2)
    return np.where(v[..., None] > 0, np.concatenate([xy, v[..., None]], axis=-1), 0.0)
