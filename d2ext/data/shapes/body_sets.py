"""Bodies of `shapes` in Detectron2's catalogs, in DensePose-COCO's form, and as files.

``shapes_train_bodies`` and ``shapes_val_bodies``: 2,000 and 200 pictures of 256 x 256 with 1 to 4
persons of :mod:`.bodies`, 50 to 230 pixels tall. Most have points and masks of parts, as
:mod:`.body_coco` says.
"""

import json
import pickle
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from d2ext.data.shapes.body_coco import BODY_MESH, bodies_json
from d2ext.data.shapes.export import export_items
from d2ext.data.shapes.files import BODY_FILES
from d2ext.data.shapes.sets import BodySet

__all__ = [
    "DEFAULT_BODY_SETS",
    "export_bodies",
    "load_shapes_bodies",
    "register_shapes_bodies",
]

DEFAULT_BODY_SETS = (BodySet("train", 2000), BodySet("val", 200))


@lru_cache(maxsize=4)
def _load(shapes: BodySet) -> bytes:
    # The cache of the path handler keeps the file: drawing takes half a minute for 2,000 pictures.
    path = PathManager.get_local_path(f"{shapes.root}/annotations/densepose.json")
    content = json.loads(Path(path).read_text())
    records = {
        image["id"]: {
            "file_name": f"{shapes.root}/images/{image['file_name']}",
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in content["images"]
    }
    for annotation in content["annotations"]:
        del annotation["area"]
        annotation.update(category_id=0, bbox_mode=BoxMode.XYWH_ABS)
        records[annotation.pop("image_id")]["annotations"].append(annotation)
    return pickle.dumps([*records.values()])


def load_shapes_bodies(shapes: BodySet) -> list[dict[str, Any]]:
    """The set in Detectron2's format. Computed once and kept in d2ext's cache; every call returns its
    own copy.

    Returns:
        A dict per picture. Annotations have ``bbox``, ``segmentation``, ``category_id`` 0 and, most
        of them, the fields ``dp_*`` and ``ref_model`` as in the file (:mod:`.body_coco`).
    """
    return pickle.loads(_load(shapes))


def register_shapes_bodies(shapes: BodySet, prefix: str = "shapes") -> str:
    """Register a set as ``<prefix>_<split>_bodies``; returns the name.

    Raises:
        AssertionError: from Detectron2's catalog, if the name is taken.
    """
    name = f"{prefix}_{shapes.split}_bodies"
    DatasetCatalog.register(name, partial(load_shapes_bodies, shapes))
    folder = f"{shapes.root}/annotations"
    mesh, geodesics, symmetry = BODY_FILES
    MetadataCatalog.get(name).set(
        evaluator_type="densepose",
        thing_classes=["person"],
        thing_colors=[(220, 20, 60)],
        thing_dataset_id_to_contiguous_id={1: 0},
        image_root=f"{shapes.root}/images",
        json_file=f"{folder}/densepose.json",
        densepose_mesh_name=BODY_MESH,
        densepose_mesh=f"{folder}/{mesh}",
        densepose_geodesics=f"{folder}/{geodesics}",
        densepose_uv_symmetry=f"{folder}/{symmetry}",
    )
    return name


def export_bodies(
    shapes: BodySet, out: Path, *, overwrite: bool = False, progress: bool = True
) -> list[str]:
    """Write pictures, ``annotations/densepose_<split>2017.json`` and the files of the mesh; see
    :func:`~d2ext.data.shapes.export.export_items`."""
    options = {"overwrite": overwrite, "progress": progress}
    return export_items(shapes, out, "densepose", bodies_json, BODY_FILES, **options)
