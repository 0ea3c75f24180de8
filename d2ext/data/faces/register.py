"""Data sets of faces in Detectron2's catalogs: from files in any form, and WIDER FACE by name.

::

    register_faces("my_train", "train/label.txt", "train/images/")
    register_faces("my_val", "list_98pt_rect_attr_test.txt", "WFLW_images/", kind="faces_wflw")

Under ``DETECTRON2_DATASETS``, read when they are first used: ``wider_face_{train,val,test}``, in the
folder ``wider_face`` or ``widerface`` with ``WIDER_{train,val,test}/images`` and ``wider_face_split`` as
they come. The five points of the training set are in RetinaFace's ``label.txt``: put it at
``train/label.txt`` or ``WIDER_train/label.txt``. Those of the others were never published.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from d2ext.data.dataset_facts import Keypoints, keypoint_metadata
from d2ext.data.errors import DatasetError
from d2ext.data.faces.meshes import attach_meshes, mesh_metadata
from d2ext.data.faces.points import FACES, five_points
from d2ext.data.faces.wider import read_wider
from d2ext.data.landmarks.datasets import LANDMARK_DATASETS
from d2ext.data.landmarks.readers import READERS, detect_form, read_coco

logger = logging.getLogger(__name__)
Record = dict[str, Any]

# "faces": WIDER FACE's text, label.txt, or COCO-keypoint JSON with five points and meshes. The others:
# any form of the set of landmarks, of which five are made.
FACE_KINDS = ("faces", "faces_300w", "faces_wflw", "faces_cofw", "faces_aflw")
_KEPT = ("id", "bbox", "bbox_mode", "category_id", "iscrowd", "attributes", "track_id")


def load_faces(
    annotations: str, images: str, kind: str = "faces", origin: float | None = None
) -> list[Record]:
    """Faces as Detectron2's dicts: ``bbox``, ``category_id`` 0, and, where labelled, ``keypoints`` (15
    numbers: the five points) and ``mesh`` ((V, 3) float32).

    Boxes of 300-W, COFW and AFLW are made from all their landmarks and 10 % more on each side: they lack
    the forehead. 300-W, COFW and AFLW do not label every face of an image.

    Args:
        annotations: file, or folder of ``.pts`` files
        images: folder that names of images are relative to
        kind: one of :data:`FACE_KINDS`
        origin: index of the first pixel in the file; by default that of the form; the texts of
            WIDER FACE are taken as they are

    Raises:
        DatasetError: unknown kind, or files that cannot be used
    """
    if kind not in FACE_KINDS:
        raise DatasetError(f"There are no faces '{kind}'; known: {', '.join(FACE_KINDS)}.")
    if kind != "faces":
        dataset = LANDMARK_DATASETS[kind.removeprefix("faces_")]
        form = detect_form(dataset, annotations)
        records = READERS[form](dataset, annotations, images, origin)
    elif annotations.lower().endswith(".json"):
        records = read_coco(FACES, annotations, images, origin)
        flip = mesh_metadata(annotations).get("mesh_flip")
        attach_meshes(records, annotations, flip and len(flip), origin or 0.0)
    else:
        return read_wider(annotations, images)
    return [{**r, "annotations": [_face(a) for a in r["annotations"]]} for r in records]


def _face(annotation: Record) -> Record:
    points = five_points(np.reshape(annotation["keypoints"], (-1, 3)))
    result = {key: annotation[key] for key in (*_KEPT, "mesh") if key in annotation}
    labelled = int((points[:, 2] > 0).sum())
    if labelled:
        result.update(keypoints=points.ravel().tolist(), num_keypoints=labelled)
    return result


def register_faces(
    name: str,
    annotations: str,
    images: str,
    *,
    kind: str = "faces",
    origin: float | None = None,
) -> None:
    """Register faces; see :func:`load_faces`. Registering the same again is harmless.

    The metadata say whether any face has points (``keypoints_labelled``) and, if any has a mesh, name
    the topology.

    Raises:
        DatasetError: files that cannot be used, or a name that is taken
    """
    source = (kind, annotations, images, origin)
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).get("face_source") == source:
            return
        raise DatasetError(f"Data set '{name}' is already registered. Choose another name.")
    load = partial(load_faces, annotations, images, kind, origin)
    faces = [face for record in load() for face in record.get("annotations", ())]
    if not faces:  # errors belong here, not to the first epoch
        raise DatasetError(f"'{annotations}' has no face.")
    _warn_of_viewpoint(annotations, faces)
    metadata: dict[str, Any] = {"image_root": images, "face_source": source}
    # The names are there in any case: a set without points can train beside one that has some.
    metadata["keypoints_labelled"] = any("keypoints" in face for face in faces)
    if any("mesh" in face for face in faces):
        metadata.update(mesh_metadata(annotations))
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="faces", **face_metadata(), **metadata)


def _warn_of_viewpoint(annotations: str, faces: list[Record]) -> None:
    """COCO's left eye is the person's, which is on the right of the image."""
    points = np.array([f["keypoints"] for f in faces if "keypoints" in f]).reshape(-1, 5, 3)
    eyes = points[(points[:, :2, 2] > 0).all(axis=1), :2, 0]
    if len(eyes) and (eyes[:, 0] > eyes[:, 1]).mean() > 0.5:
        logger.warning(
            "In '%s' the left eye is to the right of the right eye in most faces: left and right are "
            "probably the person's. The five points are %s, as the image shows them.",
            *(annotations, ", ".join(FACES.keypoints)),
        )


def face_metadata() -> dict[str, Any]:
    """Detectron2's metadata of the class and of the five points."""
    keypoints = Keypoints(FACES.keypoints, FACES.flip_pairs, FACES.skeleton, FACES.sigmas)
    return {
        **keypoint_metadata(keypoints),
        "thing_classes": [FACES.category],
        "thing_dataset_id_to_contiguous_id": {1: 0},
    }


def register_builtin_faces() -> None:
    """Register WIDER FACE, in the folder that ``DETECTRON2_DATASETS`` names now."""
    base = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    folders = [os.path.join(base, folder) for folder in ("wider_face", "widerface")]
    root = next((folder for folder in folders if PathManager.isdir(folder)), folders[0])
    for split in ("train", "val", "test"):
        name = f"wider_face_{split}"
        images = os.path.join(root, f"WIDER_{split}", "images")
        DatasetCatalog.register(name, partial(_load_wider_face, name, root, split, images))
        MetadataCatalog.get(name).set(
            evaluator_type="wider_face", image_root=images, dataset_root=root, **face_metadata()
        )


def _load_wider_face(name: str, root: str, split: str, images: str) -> list[Record]:
    official = os.path.join(root, "wider_face_split", f"wider_face_{split}_bbx_gt.txt")
    if split == "test":
        official = os.path.join(root, "wider_face_split", "wider_face_test_filelist.txt")
    labels = [os.path.join(root, f, "label.txt") for f in (split, f"WIDER_{split}")]
    files = [*labels, official] if split == "train" else [official, *labels]
    file = next((f for f in files if PathManager.isfile(f)), None)
    if file is None or not PathManager.isdir(images):
        raise DatasetError(
            f"Data set '{name}' is not there: it needs the folder '{images}' and one of "
            f"{', '.join(files)}. The environment variable DETECTRON2_DATASETS names the folder above."
        )
    if split == "train" and file == official:
        logger.warning(
            "'%s' has no five points: they are in RetinaFace's label.txt, which belongs at '%s'.",
            *(name, labels[0]),
        )
    return read_wider(file, images)
