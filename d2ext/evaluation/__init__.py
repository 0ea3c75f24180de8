"""Evaluators: Detectron2's and those that it lacks, chosen by data set."""

from d2ext.evaluation.build import build_evaluator
from d2ext.evaluation.coco import COCOEvaluator
from d2ext.evaluation.landmarks import LandmarkEvaluator

__all__ = ["COCOEvaluator", "LandmarkEvaluator", "build_evaluator"]
