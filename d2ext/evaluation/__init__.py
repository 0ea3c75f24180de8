"""Evaluators: Detectron2's and those that it lacks, chosen by data set."""

from d2ext.evaluation.build import EVALUATOR_REGISTRY, build_evaluator, check_analysis
from d2ext.evaluation.coco import COCOEvaluator
from d2ext.evaluation.densepose import DensePoseEvaluator
from d2ext.evaluation.faces import FaceEvaluator
from d2ext.evaluation.landmarks import LandmarkEvaluator
from d2ext.evaluation.panoptic import COCOPanopticEvaluator
from d2ext.evaluation.panoptic_analysis import PanopticAnalysis
from d2ext.evaluation.video_instances import VideoInstanceEvaluator
from d2ext.evaluation.video_panoptic import VideoPanopticEvaluator
from d2ext.evaluation.wider_face import WiderFaceEvaluator

__all__ = [
    "EVALUATOR_REGISTRY",
    "COCOEvaluator",
    "COCOPanopticEvaluator",
    "DensePoseEvaluator",
    "FaceEvaluator",
    "LandmarkEvaluator",
    "PanopticAnalysis",
    "VideoInstanceEvaluator",
    "VideoPanopticEvaluator",
    "WiderFaceEvaluator",
    "build_evaluator",
    "check_analysis",
]
