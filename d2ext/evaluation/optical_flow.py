"""Errors of optical flow."""

import logging
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from d2ext.data.errors import AnnotationError
from d2ext.data.video.flow import read_flow

__all__ = ["WRONG", "OpticalFlowEvaluator", "end_point_errors"]

logger = logging.getLogger(__name__)

# Pixels that are off by more count as wrong, as in KITTI.
WRONG = 3.0


def end_point_errors(flow: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Distances of predicted and annotated end points.

    Args:
        flow: (2, H, W) predicted
        target: (H, W, 2), NaN where it is not known

    Returns:
        (N,) float64, pixels, of the known ones
    """
    errors = np.linalg.norm(flow.transpose(1, 2, 0).astype(np.float64) - target, axis=2)
    return errors[~np.isnan(target).any(axis=2)]


class OpticalFlowEvaluator(DatasetEvaluator):
    """End-point error over all known pixels of a data set of pairs (``flow_file_name``)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._sums = np.zeros(3)  # errors, wrong pixels, pixels

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: with ``flow_file_name``
            outputs: with ``flow`` (2, H, W), pixels

        Raises:
            AnnotationError: the annotated flow has another size
        """
        for x, output in zip(inputs, outputs, strict=True):
            flow, target = output["flow"].cpu().numpy(), read_flow(x["flow_file_name"])
            if flow.shape[1:] != target.shape[:2]:
                raise AnnotationError(
                    f"The optical flow '{x['flow_file_name']}' has height and width "
                    f"{target.shape[:2]}, the prediction {flow.shape[1:]}."
                )
            errors = end_point_errors(flow, target)
            self._sums += errors.sum(), (errors > WRONG).sum(), len(errors)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Gather and average.

        Returns:
            ``{"optical_flow": {"EPE", "wrong"}}``: mean end-point error, pixels, and the share of pixels
            that are off by more than 3 pixels, percent; None on other processes than the first
        """
        gathered = comm.gather(self._sums)
        if not comm.is_main_process():
            return None
        errors, wrong, count = np.sum(gathered, axis=0).tolist()
        if not count:
            return {}
        results = {"EPE": errors / count, "wrong": 100 * wrong / count}
        logger.info(
            f"Optical flow: end-point error {results['EPE']:.3f} px, "
            f"{results['wrong']:.2f} % of the pixels are off by more than {WRONG:g} px."
        )
        return {"optical_flow": results}
