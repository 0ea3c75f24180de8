"""The field's landmark metrics, as functions of arrays.

Letters: N instances, K landmarks. ``errors`` is (N, K) float64: the distance in pixels; NaN where the
landmark is not labelled, which counts nowhere; infinite where it is labelled but was not predicted.
``norms`` (N,) are the pixels that count as 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distances(predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Errors of landmarks.

    Args:
        predicted: (N, K, 2) x, y; not finite: not predicted.
        targets: (N, K, 3) x, y, v; v = 0: not labelled.

    Returns:
        (N, K) ``errors``.
    """
    offset = np.asarray(predicted, dtype=np.float64) - targets[..., :2]
    errors = np.sqrt((offset**2).sum(axis=-1))
    errors = np.where(np.isfinite(errors), errors, np.inf)
    return np.where(targets[..., 2] > 0, errors, np.nan)


def point_distance(targets: np.ndarray, first: Sequence[int], second: Sequence[int]) -> np.ndarray:
    """Distance between the mean positions of two groups of landmarks.

    Args:
        targets: (N, K, 3).

    Returns:
        (N,); NaN where one of the landmarks is not labelled.
    """
    groups = [targets[:, list(group)] for group in (first, second)]
    a, b = (group[..., :2].mean(axis=1) for group in groups)
    labelled = np.all([(group[..., 2] > 0).all(axis=1) for group in groups], axis=0)
    return np.where(labelled, np.hypot(*(a - b).T), np.nan)


def pck_counts(
    errors: np.ndarray, norms: np.ndarray, threshold: float, *, strict: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks predicted within a distance, of each kind.

    Args:
        threshold: fraction of the norm.
        strict: the error must be below it; otherwise it may also be equal (MPII's own rule). The
            published stacked hourglass code is strict.

    Returns:
        hits, labelled: (K,) int64. Instances whose norm is not a positive number are left out.
    """
    usable = np.isfinite(norms) & (norms > 0)
    limits = threshold * np.asarray(norms, dtype=np.float64)[usable, None]
    errors = errors[usable]
    with np.errstate(invalid="ignore"):
        hits = errors < limits if strict else errors <= limits
    return hits.sum(axis=0), (~np.isnan(errors)).sum(axis=0)


def pck(
    errors: np.ndarray,
    norms: np.ndarray,
    threshold: float,
    *,
    strict: bool = False,
    landmarks: Sequence[int] | None = None,
) -> float:
    """Share of landmarks predicted within ``threshold`` of the norm; all labelled ones count alike.

    Args:
        landmarks: indices of those that count; by default all.

    Returns:
        0 to 1; NaN if nothing is labelled.
    """
    hits, labelled = pck_counts(errors, norms, threshold, strict=strict)
    if landmarks is not None:
        hits, labelled = hits[list(landmarks)], labelled[list(landmarks)]
    return float(hits.sum() / labelled.sum()) if labelled.sum() else float("nan")


def instance_nme(errors: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Normalised mean error of each instance: over its labelled landmarks, divided by its norm.

    A landmark that was not predicted counts as an error of the whole norm (100 %).

    Returns:
        (N,) fractions; NaN for instances without labelled landmark or without positive norm.
    """
    norms = np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)
    relative = errors / norms[:, None]
    relative[np.isinf(relative)] = 1.0
    labelled = ~np.isnan(relative)
    total = np.where(labelled, relative, 0.0).sum(axis=1)
    count = labelled.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def failure_rate(nmes: np.ndarray, threshold: float) -> float:
    """Share of instances whose NME is above ``threshold``; NaN values are left out."""
    nmes = nmes[~np.isnan(nmes)]
    return float((nmes > threshold).mean()) if len(nmes) else float("nan")


def area_under_curve(nmes: np.ndarray, threshold: float) -> float:
    """Area under the cumulative error distribution from 0 to ``threshold``, divided by it.

    It is computed exactly: the distribution is a staircase, so the area is the mean of
    max(0, 1 - NME / threshold). (Published evaluations sum over steps of about 0.0001.)
    """
    nmes = nmes[~np.isnan(nmes)]
    return float(np.maximum(0.0, 1.0 - nmes / threshold).mean()) if len(nmes) else float("nan")
