"""The evaluator that fits a data set."""

import os
from collections import OrderedDict
from collections.abc import Container
from importlib.util import find_spec
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.evaluation import SemSegEvaluator as _SemSegEvaluator
from detectron2.utils import comm
from fvcore.common.registry import Registry

from d2ext.data.dataset_facts import dataset_facts, oks_sigmas
from d2ext.data.errors import DatasetError
from d2ext.data.image_io import read_label_map
from d2ext.evaluation.coco import COCOEvaluator
from d2ext.evaluation.densepose import DensePoseEvaluator
from d2ext.evaluation.faces import FaceEvaluator
from d2ext.evaluation.instance_analysis import check_hotcoco
from d2ext.evaluation.landmarks import LandmarkEvaluator
from d2ext.evaluation.optical_flow import OpticalFlowEvaluator
from d2ext.evaluation.panoptic import COCOPanopticEvaluator
from d2ext.evaluation.panoptic_analysis import PanopticAnalysis
from d2ext.evaluation.video_instances import VideoInstanceEvaluator
from d2ext.evaluation.video_panoptic import VideoPanopticEvaluator
from d2ext.evaluation.wider_face import WiderFaceEvaluator

__all__ = ["EVALUATOR_REGISTRY", "IfPredicted", "build_evaluator", "check_analysis"]


EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """Functions that build an evaluator, by ``evaluator_type``.

Each takes ``(cfg, dataset_name, output_folder)`` and has the name of the type that it is for.
"""


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """The evaluator for a data set, chosen by its metadata's ``evaluator_type``.

    ============================ ================================================================
    ``coco``                     boxes, masks, keypoints: whichever the model predicts
    ``coco_panoptic_seg``        those, semantic segmentation and panoptic quality, of these the
                                 ones for which the model has an output
    ``landmarks``                landmark metrics, by ``landmark_metrics`` of the metadata: NME, PCK,
                                 PCKh, the hourglass paper's PCK; "oks" adds COCO's keypoint
                                 AP
    ``faces``                    boxes, also by face size, NME of points and meshes
    ``densepose``                boxes, masks, GPS and GPSm of surfaces, and what the mean body gets
    ``wider_face``               WIDER FACE's AP: easy, medium, hard
    ``sem_seg``                  semantic segmentation
    ``cityscapes_instance``,     Cityscapes' own scripts (package ``cityscapesscripts``)
    ``cityscapes_sem_seg``
    ``cityscapes_panoptic_seg``  panoptic quality, and Cityscapes' own scripts for the rest
    ``lvis``, ``pascal_voc``     Detectron2's
    ``optical_flow``             end-point error of pairs of images
    ``ytvis``                    boxes, masks, keypoints of the annotated frames of videos; with track
    ``video_keypoints``          ids also YouTube-VIS's track AP (masks), IDF1 and HOTA
    ``video_panoptic_seg``       those, panoptic quality of the annotated frames, Video Panoptic Quality
                                 (VPQ) and, if segments have track ids, Segmentation and Tracking
                                 Quality (STQ)
    ============================ ================================================================

    ``EVALUATOR_REGISTRY`` holds them; register a function there for a type of your own.

    Args:
        cfg: ``TEST.DETECTIONS_PER_IMAGE`` does not limit the evaluation; COCO's limit of 100 does.
            ``TEST.KEYPOINT_OKS_SIGMAS`` is passed on; if empty, the data's are
            (:func:`~d2ext.data.dataset_facts.oks_sigmas`). ``TEST.KEYPOINT_OKS_NMS`` leaves out
            instances whose keypoints are those of a better one. ``TEST.PUBLISHED_ROUNDING`` rounds
            boxes and scores. ``TEST.FALSE_DISCOVERY`` adds the rate of false boxes,
            ``TEST.AP_AT`` AP at further overlaps; ``TEST.MIN_TARGET_SIDE`` leaves out small annotations.
            ``TEST.PANOPTIC_BACKEND`` computes panoptic quality; with ``TEST.ANALYZE`` the folder
            ``analysis`` says where it is lost. ``TEST.VPQ_WINDOWS`` are the windows of VPQ.
            ``DENSEPOSE_EVALUATION``: of surfaces.
        dataset_name: registered data set.
        output_folder: where results are written; made when needed.

    Raises:
        ValueError: unregistered data set, or one without an ``evaluator_type`` known here.
        DatasetError: ``TEST.ANALYZE`` for a data set that has no analysis, or without its package.
    """
    if dataset_name not in DatasetCatalog.list():
        raise ValueError(
            f"Data set {dataset_name!r} is not registered. Register it in DatasetCatalog, or pass "
            "its files to d2ext train (--dataset NAME --val-json ... --val-images ...)."
        )
    if cfg.TEST.ANALYZE:
        check_analysis(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind in EVALUATOR_REGISTRY:
        return EVALUATOR_REGISTRY.get(kind)(cfg, dataset_name, output_folder)
    state = f"has evaluator_type {kind!r}, which is not known" if kind else "has no evaluator_type"
    raise ValueError(
        f"Data set {dataset_name!r} {state}. Set it when registering, for example "
        f"MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco'; known are "
        f"{', '.join(name for name, _ in EVALUATOR_REGISTRY)}."
    )


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Boxes, masks, keypoints, and with ``TEST.ANALYZE`` where AP is lost."""
    # What is panoptic has an analysis without hotcoco.
    analyze = cfg.TEST.ANALYZE and find_spec("hotcoco") is not None
    analysis = os.path.join(folder, "analysis") if analyze else None
    return COCOEvaluator(name, output_dir=folder, analysis_dir=analysis, **_coco_options(cfg, name))


@EVALUATOR_REGISTRY.register()
def ytvis(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Those of the annotated frames of videos, track AP, IDF1 and HOTA."""
    evaluator = VideoInstanceEvaluator(name, output_dir=folder, **_coco_options(cfg, name))
    return IfPredicted("instances", evaluator)


@EVALUATOR_REGISTRY.register()
def video_keypoints(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """The same: ids are compared by what the model predicts."""
    return ytvis(cfg, name, folder)


@EVALUATOR_REGISTRY.register()
def video_panoptic_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """VPQ, STQ, panoptic quality of annotated frames, and the tracks of things that the data has."""
    frames = [frame for video in DatasetCatalog.get(name) for frame in video["frames"]]
    video = VideoPanopticEvaluator(
        name,
        folder,
        windows=cfg.TEST.VPQ_WINDOWS,
        analysis_dir=os.path.join(folder, "analysis") if cfg.TEST.ANALYZE else None,
    )
    evaluators: list[DatasetEvaluator] = [IfPredicted("panoptic_seg", video)]
    if any("annotations" in frame for frame in frames):
        evaluators.append(ytvis(cfg, name, folder))
    if MetadataCatalog.get(name).get("panoptic_json") is not None:
        annotated = {f["image_id"] for f in frames if "pan_seg_file_name" in f}
        evaluators += _panoptic_quality(cfg, name, folder, annotated)
    return DatasetEvaluators(evaluators)


def _coco_options(cfg: CfgNode, name: str) -> dict[str, Any]:
    height, width = cfg.MODEL.LANDMARKS.INPUT_SIZE
    top_down = cfg.INPUT.MAPPER == "build_top_down_mapper"
    return {
        "use_fast_impl": False,  # the official implementation; the fast one needs detectron2._C
        "kpt_oks_sigmas": tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS or oks_sigmas(dataset_facts(name))),
        "min_target_side": cfg.TEST.MIN_TARGET_SIDE,
        "ap_at": tuple(cfg.TEST.AP_AT),
        "false_discovery": cfg.TEST.FALSE_DISCOVERY,
        "published_rounding": cfg.TEST.PUBLISHED_ROUNDING,
        "oks_nms_threshold": cfg.TEST.KEYPOINT_OKS_NMS,
        "oks_nms_crop": ((height, width), cfg.MODEL.LANDMARKS.CROP.PADDING) if top_down else None,
    }


@EVALUATOR_REGISTRY.register()
def sem_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Semantic segmentation."""
    return SemSegEvaluator(name, output_dir=folder, sem_seg_loading_fn=_load_labels)


@EVALUATOR_REGISTRY.register()
def coco_panoptic_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Panoptic quality, and the instances and semantic maps that the data set also has."""
    # Loading a data set may be what names its files.
    records = DatasetCatalog.get(name)
    evaluators = [IfPredicted("instances", coco(cfg, name, folder))]
    if all("sem_seg_file_name" in record for record in records):
        evaluators.append(IfPredicted("sem_seg", sem_seg(cfg, name, folder)))
    return DatasetEvaluators([*evaluators, *_panoptic_quality(cfg, name, folder)])


@EVALUATOR_REGISTRY.register()
def landmarks(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Errors of landmarks, and COCO's keypoint AP where the data set asks for it."""
    errors = LandmarkEvaluator(name, output_dir=folder)
    if "oks" not in (MetadataCatalog.get(name).get("landmark_metrics") or ()):
        return errors
    # COCO's is the last: it shifts the predicted keypoints in place.
    return DatasetEvaluators([errors, coco(cfg, name, folder)])


@EVALUATOR_REGISTRY.register()
def faces(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Boxes, points, meshes."""
    return FaceEvaluator(name, folder)


@EVALUATOR_REGISTRY.register()
def densepose(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Boxes, masks, surfaces."""
    options = cfg.DENSEPOSE_EVALUATION
    threshold = options.MIN_IOU_THRESHOLD
    return DensePoseEvaluator(name, folder, first_threshold=threshold, k=options.GPS_K)


@EVALUATOR_REGISTRY.register()
def wider_face(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """WIDER FACE's protocol."""
    return WiderFaceEvaluator(name, folder)


@EVALUATOR_REGISTRY.register()
def optical_flow(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """End-point error."""
    return IfPredicted("flow", OpticalFlowEvaluator())


@EVALUATOR_REGISTRY.register()
def cityscapes_instance(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Cityscapes' own script."""
    return CityscapesInstanceEvaluator(name)


@EVALUATOR_REGISTRY.register()
def cityscapes_sem_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Cityscapes' own script."""
    return CityscapesSemSegEvaluator(name)


@EVALUATOR_REGISTRY.register()
def cityscapes_panoptic_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Panoptic quality, and Cityscapes' own scripts."""
    return DatasetEvaluators(
        [
            IfPredicted("sem_seg", CityscapesSemSegEvaluator(name)),
            IfPredicted("instances", CityscapesInstanceEvaluator(name)),
            *_panoptic_quality(cfg, name, folder),
        ]
    )


@EVALUATOR_REGISTRY.register()
def lvis(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Detectron2's."""
    return LVISEvaluator(name, output_dir=folder)


@EVALUATOR_REGISTRY.register()
def pascal_voc(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """Detectron2's."""
    return PascalVOCDetectionEvaluator(name)


def _panoptic_quality(
    cfg: CfgNode, name: str, folder: str, images: Container[Any] | None = None
) -> list[DatasetEvaluator]:
    evaluators: list[DatasetEvaluator] = [
        COCOPanopticEvaluator(name, folder, backend=cfg.TEST.PANOPTIC_BACKEND)
    ]
    if cfg.TEST.ANALYZE:
        evaluators.append(PanopticAnalysis(name, os.path.join(folder, "analysis")))
    return [IfPredicted("panoptic_seg", evaluator, images) for evaluator in evaluators]


def check_analysis(dataset_name: str) -> None:
    """Raise :class:`DatasetError` unless ``TEST.ANALYZE`` has something to say on a data set."""
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind == "coco" or (
        kind == "landmarks" and "oks" in (metadata.get("landmark_metrics") or ())
    ):
        check_hotcoco()
    elif kind not in ("coco_panoptic_seg", "cityscapes_panoptic_seg", "video_panoptic_seg"):
        raise DatasetError(
            f"There is no analysis of data set '{dataset_name}': --analyze (TEST.ANALYZE) is for boxes, "
            f"masks and keypoints in COCO's format and for panoptic data, this one is of type {kind!r}. "
            "Leave it out."
        )


class SemSegEvaluator(_SemSegEvaluator):
    """Detectron2's, which would count classes of a model with too few or too many as others."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for output in outputs:
            if len(output["sem_seg"]) != self._num_classes:
                raise ValueError(
                    f"The model's sem_seg has {len(output['sem_seg'])} channels, data set "
                    f"'{self._dataset_name}' has {self._num_classes} semantic classes "
                    f"({', '.join(self._class_names[:3])}, ...). The class counts of the config "
                    "must be those of the data set."
                )
        super().process(inputs, outputs)


def _load_labels(file_name: str, dtype: type = int) -> np.ndarray:
    """H×W labels; Detectron2's own loader asks NumPy for what NumPy 2 refuses."""
    return read_label_map(file_name).astype(dtype)


class IfPredicted(DatasetEvaluator):
    """Runs an evaluator only if the model predicts what it evaluates.

    A panoptic data set has annotations for several tasks, and a model for one of them is evaluated
    for this one.
    """

    def __init__(
        self, key: str, evaluator: DatasetEvaluator, images: Container[Any] | None = None
    ) -> None:
        """``key``: of the model's output dicts; ``images``: ids of those to pass on, None: all."""
        self._key = key
        self._images = images
        self._evaluator = evaluator
        self._seen = False

    def reset(self) -> None:
        """Forget all predictions."""
        self._seen = False
        self._evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Pass on the images whose output has the key."""
        pairs = [(x, y) for x, y in zip(inputs, outputs, strict=True) if self._key in y]
        if self._images is not None:
            pairs = [(x, y) for x, y in pairs if x["image_id"] in self._images]
        if pairs:
            self._seen = True
            self._evaluator.process([x for x, _ in pairs], [y for _, y in pairs])

    def evaluate(self) -> dict[str, Any]:
        """Results of the evaluator; empty if no process saw the key."""
        # A process may have had no image at all, so they must agree: evaluators gather.
        if not any(comm.all_gather(self._seen)):
            return OrderedDict()
        return self._evaluator.evaluate() or OrderedDict()
