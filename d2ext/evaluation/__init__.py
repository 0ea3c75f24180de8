"""Evaluators: Detectron2's and those that it lacks, chosen by data set."""

from d2ext.evaluation.build import build_evaluator
from d2ext.evaluation.coco import COCOEvaluator

__all__ = ["COCOEvaluator", "build_evaluator"]
