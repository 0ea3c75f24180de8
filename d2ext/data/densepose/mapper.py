"""Samples of persons with points on their surface: ``gt_densepose``.

Annotations are relative to the person's box, each axis for itself (:mod:`.annotations`). Where a
transform moves a point otherwise than it moves the box (a crop cuts the box, a rotation takes the box
around the turned one), points and masks are taken to the frame of the new box.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from detectron2.utils.logger import log_first_n
from fvcore.transforms.transform import TransformList

from d2ext.data.dataset_mapper import MAPPER_REGISTRY, D2extDatasetMapper
from d2ext.data.densepose.annotations import FRAME, DensePoseAnnotations, SurfacePoints
from d2ext.data.densepose.fields import coarse_parts
from d2ext.data.densepose.parts import SurfaceSymmetry, read_mirror_vertices, read_uv_symmetry
from d2ext.data.densepose.surface_files import MissingSurfaceFile
from d2ext.data.errors import DatasetError, shorten

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Frames differ if a point moves by more than this, of 256.
_TOLERANCE = 0.01


@MAPPER_REGISTRY.register()
class DensePoseMapper(D2extDatasetMapper):
    """:class:`D2extDatasetMapper` that also gives ``gt_densepose``, a
    :class:`~d2ext.data.densepose.DensePoseAnnotations` of all instances, also where nobody has points.

    Images are also turned by an angle of ``INPUT.ROTATION_ANGLES``, and mirrored only if it is known
    what a mirror does to the surface: ``densepose_uv_symmetry`` of the training data's metadata for
    charts, ``CSE.EMBEDDERS.<mesh>.SYMMETRY`` or ``densepose_mesh`` of the metadata for embeddings.
    """

    @configurable
    def __init__(
        self,
        *args: Any,
        charts: bool = True,
        meshes: dict[str, int] | None = None,
        symmetry: SurfaceSymmetry | None = None,
        part_masks: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            args, kwargs: of :class:`D2extDatasetMapper`
            charts: give points on charts
            meshes: number of vertices by name, to give points on meshes; None: no such points
            symmetry: of the surface; None: images are not mirrored
            part_masks: the model tells the 14 coarse parts from each other
        """
        super().__init__(*args, **kwargs)
        self.charts = charts
        self.meshes = meshes
        self.symmetry = symmetry
        self.part_masks = part_masks

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Arguments of the constructor."""
        arguments = super().from_config(cfg, is_train)
        if not is_train:
            return arguments
        head, cse = cfg.MODEL.ROI_DENSEPOSE_HEAD, cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE
        embeds = head.PREDICTOR_NAME == "DensePoseEmbeddingPredictor"
        arguments["charts"] = not embeds
        if embeds:
            arguments["meshes"] = {name: m.NUM_VERTICES for name, m in cse.EMBEDDERS.items()}
        arguments["part_masks"] = (
            head.NUM_COARSE_SEGM_CHANNELS > 2 or (head.PART_MASK_WEIGHTS > 0 and not embeds)
        ) and not head.COARSE_SEGM_TRAINED_BY_MASKS
        if head.COARSE_SEGM_TRAINED_BY_MASKS or (embeds and cse.PIX_TO_SHAPE_CYCLE_LOSS.ENABLED):
            arguments["use_instance_mask"] = True
        augmentations = arguments["augmentations"]
        mirrors = [x for x in augmentations if isinstance(x, T.RandomFlip)]
        if mirrors:
            arguments["symmetry"] = _symmetry(cfg, arguments.get("meshes"))
            if arguments["symmetry"] is None:
                augmentations = [x for x in augmentations if x not in mirrors]
        if any(cfg.INPUT.ROTATION_ANGLES):
            turn = T.RandomRotation(
                list(cfg.INPUT.ROTATION_ANGLES), expand=False, sample_style="choice"
            )
            augmentations = [*augmentations, turn]
        arguments["augmentations"] = augmentations
        return arguments

    def samples(self, records: list[Record], dataset_names: Sequence[str]) -> list[Record]:
        """The records, after a look at whether the model can learn from their annotations.

        Raises:
            DatasetError: nobody has points of the kind that the model learns, a mesh that it does not
                have or with other vertices, or masks are missing
        """
        if not self.is_train:
            return records
        names = ", ".join(f"'{name}'" for name in dataset_names)
        if self.use_instance_mask:
            records = _with_masks(records, names)
        persons = [a for r in records for a in r.get("annotations", ()) if "dp_x" in a]
        kind = "dp_I" if self.meshes is None else "dp_vertex"
        usable = [a for a in persons if kind in a]
        if not usable:
            others = f" ({len(persons)} persons have others)" if persons else ""
            raise DatasetError(
                f"No person of {names} has points that the model learns, with dp_x, dp_y and "
                f"{'dp_I, dp_U, dp_V' if kind == 'dp_I' else 'dp_vertex, ref_model'}{others}. "
                "MODEL.ROI_DENSEPOSE_HEAD.PREDICTOR_NAME chooses between charts and vertices."
            )
        if self.part_masks and any(len(a.get("dp_masks", "14 or none")) == 1 for a in persons):
            raise DatasetError(
                f"Some 'dp_masks' of {names} are one mask of the whole person, but the model learns 14 "
                "coarse parts: set NUM_COARSE_SEGM_CHANNELS: 2 and PART_MASK_WEIGHTS: 0.0 in "
                "MODEL.ROI_DENSEPOSE_HEAD."
            )
        if self.meshes is not None:
            _check_vertices(usable, self.meshes, names)
        return records

    def _prepare_annotations(
        self, annotations: list[Record], file_name: str, image: np.ndarray
    ) -> list[Record]:
        result = super()._prepare_annotations(annotations, file_name, image)
        for annotation in result:
            annotation["surface_box"] = np.array(annotation["bbox"])
        return result

    def _add_fields(
        self,
        dataset_dict: Record,
        instances: Instances,
        annotations: list[Record],
        transforms: TransformList,
    ) -> None:
        super()._add_fields(dataset_dict, instances, annotations, transforms)
        matrix = _affine(transforms)
        persons = [
            _in_box(self._points(a), matrix, a["surface_box"], box)
            for a, box in zip(annotations, instances.gt_boxes.tensor.double().numpy(), strict=True)
        ]
        surface = DensePoseAnnotations(persons)
        if np.linalg.det(matrix[:, :2]) < 0 and self.symmetry is not None:
            surface = surface.mirrored(self.symmetry)
        instances.gt_densepose = surface

    def _points(self, annotation: Record) -> SurfacePoints | None:
        """What the model learns of an annotation; None: it has no such points."""
        charts = self.charts and "dp_I" in annotation
        on_mesh = self.meshes is not None and "dp_vertex" in annotation
        if "dp_x" not in annotation or not (charts or on_mesh):
            return None
        return SurfacePoints(
            x=np.asarray(annotation["dp_x"], np.float64),
            y=np.asarray(annotation["dp_y"], np.float64),
            parts=np.asarray(annotation["dp_I"]) if charts else None,
            u=np.asarray(annotation["dp_U"]) if charts else None,
            v=np.asarray(annotation["dp_V"]) if charts else None,
            vertices=np.asarray(annotation["dp_vertex"]) if on_mesh else None,
            mesh=annotation["ref_model"] if on_mesh else None,
            mask=coarse_parts(annotation.get("dp_masks")),
        )


def _affine(transforms: TransformList) -> np.ndarray:
    """(2, 3) float64, from the image to the transformed one; all transforms here are affine."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    origin, right, down = transforms.apply_coords(corners)
    return np.stack([right - origin, down - origin, origin], axis=1)


def _frame(box: np.ndarray) -> np.ndarray:
    """(3, 3): from a box's frame to the image."""
    x0, y0, x1, y1 = box
    return np.array([[(x1 - x0) / FRAME, 0, x0], [0, (y1 - y0) / FRAME, y0], [0, 0, 1]])


def _in_box(
    points: SurfacePoints | None, matrix: np.ndarray, before: np.ndarray, after: np.ndarray
) -> SurfacePoints | None:
    """A person's annotation in the frame of the box in the transformed image, not mirrored yet.

    Args:
        points: relative to ``before``
        matrix: (2, 3) of the transform
        before, after: (4,) XYXY boxes in the image and in the transformed one

    Returns:
        None: no point lies in the box
    """
    if points is None or (after[2:] <= after[:2]).any():
        return None
    step = np.linalg.inv(_frame(after)) @ np.vstack([matrix, [0, 0, 1]]) @ _frame(before)
    if np.linalg.det(step[:2, :2]) < 0:  # as if it had been mirrored in its box before
        step = np.array([[-1, 0, FRAME], [0, 1, 0], [0, 0, 1.0]]) @ step
    corners = np.array([[0, FRAME, 0], [0, 0, FRAME], [1, 1, 1.0]])
    if np.abs(step @ corners - corners).max() < _TOLERANCE:
        return points
    x, y, _ = step @ np.stack([points.x, points.y, np.ones_like(points.x)])
    keep = (x >= 0) & (x <= FRAME) & (y >= 0) & (y <= FRAME)
    if not keep.any():
        return None
    points = points._replace(x=x, y=y)
    columns = {
        key: value[keep]
        for key, value in points._asdict().items()
        if isinstance(value, np.ndarray) and key != "mask"
    }
    if points.mask is not None:
        # The value at each new pixel's centre.
        row, column = np.indices((FRAME, FRAME)) + 0.5
        source = np.linalg.inv(step)[:2] @ np.stack(
            [column.ravel(), row.ravel(), np.ones(FRAME * FRAME)]
        )
        column, row = np.floor(source).astype(np.int64)
        inside = (column >= 0) & (column < FRAME) & (row >= 0) & (row < FRAME)
        mask = np.where(inside, points.mask[row * inside, column * inside], 0)
        columns["mask"] = mask.reshape(FRAME, FRAME)
    return points._replace(**columns)


def _with_masks(records: list[Record], names: str) -> list[Record]:
    """Records without the persons that lack a mask."""
    lacking = [a for r in records for a in r.get("annotations", ()) if not a.get("segmentation")]
    if not lacking:
        return records
    count = sum(len(r.get("annotations", ())) for r in records)
    text = f"{len(lacking)} of {count} annotations of {names} have no segmentation, but "
    text += "COARSE_SEGM_TRAINED_BY_MASKS or PIX_TO_SHAPE_CYCLE_LOSS learns from it"
    if len(lacking) == count:
        raise DatasetError(f"{text}: switch these off, or annotate masks.")
    logger.warning("%s: they are left out.", text)
    kept = [[a for a in r.get("annotations", ()) if a.get("segmentation")] for r in records]
    return [
        {**r, "annotations": k} if "annotations" in r else r
        for r, k in zip(records, kept, strict=True)
    ]


def _check_vertices(persons: list[Record], meshes: dict[str, int], names: str) -> None:
    highest: dict[str, int] = {}
    for person in persons:
        mesh = person["ref_model"]
        highest[mesh] = max(highest.get(mesh, -1), int(np.max(person["dp_vertex"])))
    unknown = sorted(set(highest) - set(meshes))
    if unknown:
        raise DatasetError(
            f"Persons of {names} are annotated on the meshes {shorten(unknown)} ('ref_model'); the "
            f"model has {shorten(sorted(meshes))}. Add what lacks to "
            "MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS, or correct the name."
        )
    for mesh, vertex in highest.items():
        if vertex >= meshes[mesh]:
            raise DatasetError(
                f"A person of {names} is annotated with vertex {vertex} of {mesh}, which has "
                f"{meshes[mesh]} (MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS.{mesh}.NUM_VERTICES)."
            )


def _symmetry(cfg: CfgNode, meshes: dict[str, int] | None) -> SurfaceSymmetry | None:
    """What a mirror does to the surfaces that the model learns; None, said once: it is not known."""
    try:
        return _read_symmetry(cfg, meshes)
    except MissingSurfaceFile as error:
        text = f"Training goes on without mirrored images: {error}"
        log_first_n(logging.WARNING, text, name=__name__, key="message")
        return None


def _read_symmetry(cfg: CfgNode, meshes: dict[str, int] | None) -> SurfaceSymmetry:
    metadata = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    if meshes is None:
        files = [m.get("densepose_uv_symmetry") for m in metadata]
        path = next((file for file in files if file), None)
        if path is None:
            raise MissingSurfaceFile(
                "the training data name no `densepose_uv_symmetry` in their metadata, the tables of "
                "mirrored U and V (of SMPL: UV_symmetry_transforms.mat of the DensePose project)."
            )
        return SurfaceSymmetry(read_uv_symmetry(path))
    paths = {m.get("densepose_mesh_name"): m.get("densepose_mesh") for m in metadata}
    tables = {}
    for name, count in meshes.items():
        path = cfg.MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS[name].get("SYMMETRY") or paths.get(name)
        if not path:
            raise MissingSurfaceFile(
                f"the mirror vertices of the mesh {name} are not known; "
                f"MODEL.ROI_DENSEPOSE_HEAD.CSE.EMBEDDERS.{name}.SYMMETRY names their file."
            )
        tables[name] = read_mirror_vertices(path, count)
    return SurfaceSymmetry(vertices=tables)
