"""Labels of face meshes for one's own photos, made by mediapipe (Apache 2.0), in d2ext's form.

    pip install mediapipe
    python scripts/make_face_meshes.py photos/ faces.json --model face_landmarker.task --draw check/
    python scripts/make_face_meshes.py WIDER_train/images/ meshes.json --model face_landmarker.task \\
        --annotations train/label.txt

The model file is Google's "Face Landmarker"; mediapipe does not bring it, its documentation says where
it is. Beside the JSON comes its topology, an OBJ of the same name: 468 vertices, 852 triangles. Without
--annotations all faces that mediapipe finds in a photo are labelled with box, five points and mesh. It
misses small ones, and faces without label train as background: look at the pictures of --draw. With
--annotations the faces are known, in any form of `--landmarks faces`: they keep boxes and points, and
get a mesh where one is found in a crop around them.

What comes out is a fit by another network, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from d2ext.data.faces import FACE_POINTS, load_faces, obj_text
from d2ext.data.image_io import is_image, read_image
from d2ext.files import atomic_write

# RGB image -> (N, V, 3) x, y, z in pixels of each face.
Mesher = Callable[[np.ndarray], np.ndarray]
# Vertices whose mean is each of the five points: the outlines of the eyes (left in the image first), the
# tip of the nose, the mouth's corners.
FIVE = (
    (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246),
    (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466),
    (1,),
    (61,),
    (291,),
)
# Two vertices in the middle of the forehead that an edge connects.
MIDDLE = (10, 151)
# A mesh belongs to a known face if their boxes overlap so much (IoU).
SAME_FACE = 0.3


@contextmanager
def open_mesher(model: str, max_faces: int) -> Iterator[tuple[Mesher, np.ndarray]]:
    """mediapipe's Face Landmarker, and its triangles (F, 3). The iris, which belongs to no triangle, is
    left out."""
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as e:
        raise SystemExit(f"error: this needs mediapipe ({e}): pip install mediapipe") from e
    if not Path(model).is_file():
        raise SystemExit(
            f"error: '{model}' does not exist; it should be Face Landmarker's .task file."
        )
    # Three connections in a row are a triangle.
    edges = [c.start for c in vision.FaceLandmarksConnections.FACE_LANDMARKS_TESSELATION]
    triangles = np.array(edges).reshape(-1, 3)
    count = int(triangles.max()) + 1
    options = vision.FaceLandmarkerOptions(BaseOptions(model), num_faces=max_faces)

    def meshes(image: np.ndarray) -> np.ndarray:
        pixels = mediapipe.Image(mediapipe.ImageFormat.SRGB, np.ascontiguousarray(image))
        faces = landmarker.detect(pixels).face_landmarks
        result = np.array([[(p.x, p.y, p.z) for p in face[:count]] for face in faces])
        height, width = image.shape[:2]
        # Depth is in the unit of x, and of an origin that mediapipe does not promise to be the mean.
        result = result.reshape(-1, count, 3) * (width, height, width)
        result[..., 2] -= result[..., 2].mean(axis=1, keepdims=True)
        return result

    with vision.FaceLandmarker.create_from_options(options) as landmarker:
        yield meshes, triangles


def extents(meshes: np.ndarray) -> np.ndarray:
    """(N, 4) boxes XYXY of meshes (N, V, 3)."""
    return np.concatenate([meshes[..., :2].min(axis=1), meshes[..., :2].max(axis=1)], axis=1)


def find_faces(image: np.ndarray, mesher: Mesher) -> list[dict[str, Any]]:
    """All faces of an image: ``box`` XYXY, ``points`` (5, 3), ``mesh`` (V, 3), continuous pixels."""
    faces = []
    meshes = mesher(image)
    for mesh, box in zip(meshes, extents(meshes), strict=True):
        points = [[*mesh[list(vertices), :2].mean(axis=0), 2] for vertices in FIVE]
        faces.append({"box": box, "points": np.array(points), "mesh": mesh})
    return faces


def fit_face(image: np.ndarray, box: np.ndarray, mesher: Mesher) -> np.ndarray | None:
    """The mesh of a known face, (V, 3), from a crop of twice its box; None: none is found."""
    height, width = image.shape[:2]
    center, side = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max()
    low = np.maximum(np.floor(center - side), 0).astype(int)
    high = np.minimum(np.ceil(center + side), (width, height)).astype(int)
    if (high <= low).any():
        return None
    meshes = mesher(image[low[1] : high[1], low[0] : high[0]])
    meshes = meshes + (*low, 0)
    if len(meshes) == 0:
        return None
    overlaps = pairwise_iou(Boxes(box[None]), Boxes(extents(meshes)))[0].numpy()
    return meshes[overlaps.argmax()] if overlaps.max() >= SAME_FACE else None


def mirror_partners(triangles: np.ndarray, middle: tuple[int, int] = MIDDLE) -> list[int]:
    """For each vertex its partner, by walking over the mesh and its mirror image at once.

    Args:
        triangles: (F, 3), all turned alike
        middle: an edge between two vertices that are their own partners
    """
    third = {(a, b): c for t in triangles.tolist() for a, b, c in (t, t[1:] + t[:1], t[2:] + t[:2])}
    partner = {v: v for v in middle}
    seen = set()
    queue = deque((edge, edge) for edge in (middle, middle[::-1]))
    while queue:
        (a, b), (c, d) = queue.popleft()
        if (a, b) in seen or (a, b) not in third or (d, c) not in third:
            continue
        seen.add((a, b))
        x, y = third[a, b], third[d, c]
        # mediapipe's mesh is not quite symmetric beside the eyes: what was found first stays.
        if partner.setdefault(x, y) == y:
            queue += [((a, x), (c, y)), ((x, b), (y, d)), ((x, a), (y, c)), ((b, x), (d, y))]
    result = [partner.get(v, v) for v in range(int(triangles.max()) + 1)]
    left = [v for v, p in enumerate(result) if result[p] != v]
    if len(left) == 2:
        result[left[0]], result[left[1]] = left[1], left[0]
    elif left:
        raise ValueError(f"Vertices {left} of the mesh have no partners.")
    return result


def mean_face(meshes: Sequence[np.ndarray], partners: Sequence[int]) -> np.ndarray:
    """(V, 3) mean of meshes, of side 2, turned to the front and made symmetric in x."""
    total = np.zeros_like(meshes[0])
    for mesh in meshes:
        sides = extents(mesh[None])[0]
        mesh = 2 * (mesh - mesh.mean(axis=0)) / (sides[2:] - sides[:2]).max()
        # From each vertex to its partner it goes along x, if the face looks to the front.
        across = mesh[list(partners)] - mesh
        across = across[across[:, 0] > 0].sum(axis=0)
        total += mesh @ _rotation(across / np.linalg.norm(across), np.array([1.0, 0, 0])).T
    mean = total / len(meshes)
    return (mean + mean[list(partners)] * (-1, 1, 1)) / 2


def _rotation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(3, 3), the smallest rotation of one unit vector into another."""
    x, y, z = np.cross(a, b)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + a @ b)


def label(
    records: list[dict[str, Any]], images: Path, mesher: Mesher, known: bool, min_size: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries of ``images`` and ``annotations`` of the JSON file."""
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        image = read_image(record["file_name"], "RGB")
        faces = [] if known else find_faces(image, mesher)
        for given in record.get("annotations", ()) if known else ():
            box = np.array(BoxMode.convert(given["bbox"], given["bbox_mode"], BoxMode.XYXY_ABS))
            face = {"box": box, "points": np.reshape(given.get("keypoints", np.zeros(15)), (5, 3))}
            if min(box[2:] - box[:2]) >= min_size and not given["iscrowd"]:
                face["mesh"] = fit_face(image, box, mesher)
            faces.append({**face, "iscrowd": given["iscrowd"]})
        listed.append(
            {
                "id": len(listed) + 1,
                "file_name": Path(record["file_name"]).relative_to(images).as_posix(),
                "height": image.shape[0],
                "width": image.shape[1],
            }
        )
        for face in faces:
            entry = {"id": len(annotations) + 1, "image_id": len(listed), **_entry(face)}
            annotations.append(entry)
    return listed, annotations


def _entry(face: dict[str, Any]) -> dict[str, Any]:
    """A COCO annotation; coordinates of points and vertices become pixel indices, 0.5 less."""
    x0, y0, x1, y1 = face["box"]
    points = np.where(face["points"][:, 2:] > 0, face["points"] - (0.5, 0.5, 0), 0)
    entry = {
        "category_id": 1,
        "iscrowd": face.get("iscrowd", 0),
        "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(float((x1 - x0) * (y1 - y0)), 2),
        "keypoints": points.round(2).ravel().tolist(),
        "num_keypoints": int((points[:, 2] > 0).sum()),
    }
    if face.get("mesh") is not None:
        entry["mesh"] = (face["mesh"] - (0.5, 0.5, 0)).round(2).ravel().tolist()
    return entry


def draw(image: dict[str, Any], faces: list[dict[str, Any]], folder: Path, out: Path) -> None:
    """Write an image with meshes as dots, boxes and points."""
    picture = read_image(str(folder / image["file_name"]), "BGR").copy()
    for face in faces:
        x, y, w, h = (round(v) for v in face["bbox"])
        size = max(1, h // 100)
        cv2.rectangle(picture, (x, y), (x + w, y + h), (255, 255, 255), size)
        mesh = np.reshape(face.get("mesh", ()), (-1, 3))
        for px, py in np.rint(mesh[:, :2]).astype(int).tolist():
            cv2.circle(picture, (px, py), size, (0, 255, 0), -1)
        for px, py, v in np.rint(np.reshape(face["keypoints"], (5, 3))).astype(int).tolist():
            if v:
                cv2.circle(picture, (px, py), 3 * size, (0, 0, 255), -1)
    target = out / f"{image['id']:06d}_{Path(image['file_name']).stem}.jpg"
    cv2.imwrite(str(target), picture)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder of photos, with its sub-folders")
    parser.add_argument("json", type=Path, help="file to write; its OBJ is written beside it")
    parser.add_argument("--model", required=True, help="Face Landmarker's .task file")
    parser.add_argument("--annotations", help="known faces: label.txt, WIDER FACE's text, or JSON")
    parser.add_argument("--max-faces", type=int, default=20, help="of a photo (20)")
    parser.add_argument(
        "--min-size",
        type=float,
        default=40,
        help="shorter side of known faces that get a mesh (40)",
    )
    parser.add_argument("--draw", type=Path, metavar="DIR", help="pictures to look at")
    args = parser.parse_args(arguments)

    if args.annotations:
        records = load_faces(args.annotations, str(args.images))
    else:
        files = sorted(path for path in args.images.rglob("*") if path.is_file())
        records = [{"file_name": str(f)} for f in files if is_image(str(f))]
    known = bool(args.annotations)
    with open_mesher(args.model, args.max_faces) as (mesher, triangles):
        images, annotations = label(records, args.images, mesher, known, args.min_size)
    meshes = [np.reshape(a["mesh"], (-1, 3)) for a in annotations if "mesh" in a]
    print(f"{len(images)} images, {len(annotations)} faces, {len(meshes)} meshes")
    if not meshes:
        sys.exit(f"error: no mesh was found in '{args.images}'.")
    partners = mirror_partners(triangles)
    mean = obj_text("mean face", mean_face(meshes, partners), triangles)
    topology = args.json.with_suffix(".obj")
    category = {
        **{"id": 1, "name": "face", "keypoints": list(FACE_POINTS)},
        **{"mesh_file": topology.name, "mesh_flip": partners},
    }
    content = {"images": images, "annotations": annotations, "categories": [category]}
    for path, text in ((topology, mean), (args.json, json.dumps(content))):
        with atomic_write(path, "w") as file:
            file.write(text)
    if args.draw:
        args.draw.mkdir(parents=True, exist_ok=True)
        for image in images:
            faces = [a for a in annotations if a["image_id"] == image["id"]]
            draw(image, faces, args.images, args.draw)


if __name__ == "__main__":
    main()
