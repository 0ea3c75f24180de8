"""How bodies of `shapes` stand: bones turned about their joints, and a view from somewhere."""

import math
from dataclasses import dataclass

import numpy as np

from d2ext.data.shapes.body_mesh import ARM_ANGLE, BONES, body_mesh

__all__ = ["BodyPose", "mirror_pose", "pose_vertices", "view"]

_PARENTS = (-1, 0, 1, 1, 1, 3, 4, 5, 6, 0, 0, 9, 10, 11, 12)
# -1 for bones on the right, whose angles mirror those on the left.
_SIDES = np.array([-1.0 if bone.startswith("right") else 1.0 for bone in BONES])
_SWAPPED = tuple(
    BONES.index(b.replace("left", "right") if b.startswith("left") else b.replace("right", "left"))
    for b in BONES
)
# Elbow and wrist bend about the axis across the stretched arm, all others about x.
_ARM = tuple(i for i, b in enumerate(BONES) if b.split("_", 1)[-1] in ("lower_arm", "hand"))
_UPPER_ARM = tuple(i for i, b in enumerate(BONES) if b.endswith("upper_arm"))


@dataclass(frozen=True)
class BodyPose:
    """What a person does, and how stout they are.

    Attributes:
        angles: (15, 3) radians by bone of :data:`~d2ext.data.shapes.body_mesh.BONES`, from the A
            pose: bent (what hangs down swings to the front, what stands up to the back), spread
            (away from the middle; trunk and head: what hangs down to the person's left), twisted
            (left ones about down).
        girth: (15,) by bone, of 1.
    """

    angles: np.ndarray
    girth: np.ndarray


def mirror_pose(pose: BodyPose) -> BodyPose:
    """The mirror image: what left did, right does."""
    angles = pose.angles[list(_SWAPPED)]
    angles[:3, 1:] *= -1
    return BodyPose(angles, pose.girth[list(_SWAPPED)])


def _turns(axis: int, angle: np.ndarray) -> np.ndarray:
    """(n, 3, 3) about x, y or z; at z from down to the right, at x from down to the front."""
    i, j = ((1, 2), (2, 0), (0, 1))[axis]
    result = np.zeros((len(angle), 3, 3))
    result[:, axis, axis] = 1
    result[:, i, i] = result[:, j, j] = np.cos(angle)
    result[:, i, j] = np.sin(angle)
    result[:, j, i] = -np.sin(angle)
    return result


def pose_vertices(pose: BodyPose) -> np.ndarray:
    """(V, 3) float64, metres, in the frame of the mesh; the pelvis stays where it is."""
    mesh = body_mesh()
    bent, spread, twisted = (pose.angles * np.stack([_SIDES**0, _SIDES, _SIDES], axis=1)).T
    swing = _turns(0, bent) @ _turns(2, spread)
    twist = _turns(1, twisted)
    # The arm's own frame: down is along the stretched arm.
    arm = _turns(2, ARM_ANGLE * _SIDES)
    for bone in (*_ARM, *_UPPER_ARM):
        twist[bone] = arm[bone] @ twist[bone] @ arm[bone].T
    for bone in _ARM:
        swing[bone] = arm[bone] @ swing[bone] @ arm[bone].T
    turns = swing @ twist
    places = mesh.joints.copy()
    for bone, parent in enumerate(_PARENTS):
        if parent >= 0:
            places[bone] = places[parent] + turns[parent] @ (
                mesh.joints[bone] - mesh.joints[parent]
            )
            turns[bone] = turns[parent] @ turns[bone]
    rest = mesh.middles + (mesh.weights @ pose.girth)[:, None] * mesh.offsets
    # Each bone's map is linear, so their weighted mean is one matrix for each vertex.
    shifts = places - np.einsum("bij,bj->bi", turns, mesh.joints)
    maps = mesh.weights @ np.concatenate([turns.reshape(-1, 9), shifts], axis=1)
    return np.einsum("vij,vj->vi", maps[:, :9].reshape(-1, 3, 3), rest) + maps[:, 9:]


def view(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) turn of a person before the camera, radians: yaw to the image's right (half a turn
    shows the back), pitch: the camera looks from above, roll clockwise."""
    angle = np.array([yaw])
    turn = _turns(0, np.array([-pitch])) @ _turns(1, angle)
    sin, cos = math.sin(roll), math.cos(roll)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ turn[0]
