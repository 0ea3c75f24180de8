"""Bodies of `shapes` in Detectron2's catalogs, in DensePose-COCO's form, and as files.

``shapes_train_bodies`` and ``shapes_val_bodies``: 2,000 and 200 pictures of 256 x 256 with 1 to 4
persons of :mod:`.bodies`, 40 to 230 pixels tall. Most have points and masks of parts, as
:mod:`.body_coco` says.
"""

import json
import pickle
import tempfile
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from tqdm import tqdm

from d2ext.data.shapes.bodies import BodyFrame
from d2ext.data.shapes.body_coco import BODY_MESH, bodies_json, body_annotations
from d2ext.data.shapes.export import check_free, encode_jpeg, publish
from d2ext.data.shapes.files import BODY_FILES
from d2ext.data.shapes.sets import BodySet

__all__ = [
    "DEFAULT_BODY_SETS",
    "export_bodies",
    "load_shapes_bodies",
    "register_shapes_bodies",
]

DEFAULT_BODY_SETS = (BodySet("train", 2000), BodySet("val", 200))


def _record(shapes: BodySet, index: int, frame: BodyFrame) -> dict[str, Any]:
    annotations = body_annotations(frame, index)
    for annotation in annotations:
        del annotation["image_id"], annotation["area"]
        annotation.update(category_id=0, bbox_mode=BoxMode.XYWH_ABS)
    return {
        "file_name": f"{shapes.root}/images/{shapes.stem(index)}.bmp",
        "image_id": index,
        "height": shapes.height,
        "width": shapes.width,
        "annotations": annotations,
    }


@lru_cache(maxsize=4)
def _load(shapes: BodySet) -> bytes:
    return pickle.dumps([_record(shapes, i, frame) for i, frame in enumerate(shapes.frames())])


def load_shapes_bodies(shapes: BodySet) -> list[dict[str, Any]]:
    """The set in Detectron2's format. Computed once per process; every call returns its own copy.

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
    """Write pictures, ``annotations/densepose_<split>2017.json`` and the files of the mesh;
    otherwise as :func:`~d2ext.data.shapes.export.export_images`."""
    folder = f"{shapes.split}2017"
    json_file = f"annotations/densepose_{folder}.json"
    check_free(out, [folder, json_file], overwrite)  # the mesh is the same for all
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=out) as name:
        temporary = Path(name)
        for sub in (folder, "annotations"):
            (temporary / sub).mkdir()

        def written() -> Iterable[tuple[int, str, BodyFrame]]:
            frames = tqdm(
                shapes.frames(), shapes.split, shapes.num, unit="image", disable=not progress
            )
            for index, frame in enumerate(frames):
                file_name = f"{shapes.stem(index)}.jpg"
                (temporary / folder / file_name).write_bytes(encode_jpeg(frame.image))
                yield index, file_name, frame

        (temporary / json_file).write_text(json.dumps(bodies_json(written())))
        targets = [folder, json_file]
        for file_name, content in BODY_FILES.items():
            targets.append(f"annotations/{file_name}")
            (temporary / targets[-1]).write_bytes(content())
        publish(temporary, out, targets)
    return targets
