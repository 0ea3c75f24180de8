"""A schedule that fits the size of own data, in place of that of a config for a large data set."""

from __future__ import annotations

import math
from collections.abc import Collection

from detectron2.config import CfgNode

from d2ext.data.dataset_facts import section_of

# A training of own data sees so many images, or each image so many times, whichever is more: 3,000
# iterations of 8, and about the epochs of COCO's schedules. Our choice.
_LEAST_IMAGES = 24_000
_EPOCHS = 50
# Warm-up takes at most this part of the iterations; checkpoints and evaluations are this far apart.
_PART = 10


def fit_schedule(
    cfg: CfgNode, length: int, images: int, *, epochs: int | None = None, keep: Collection[str] = ()
) -> str:
    """Make the schedule of ``cfg`` fit a number of training images, in place.

    - ``SOLVER.MAX_ITER``: ``epochs`` times the images; without ``epochs`` 24,000 images, or 50 epochs
      where that is more, but never longer than the config's own;
    - ``SOLVER.STEPS`` keep their places relative to it;
    - ``SOLVER.WARMUP_ITERS``: at most a tenth of it;
    - ``SOLVER.CHECKPOINT_PERIOD``, and ``TEST.EVAL_PERIOD`` unless 0: at most a tenth of it.

    Args:
        length: ``SOLVER.MAX_ITER`` of the config file, to which its ``SOLVER.STEPS`` belong
        images: of the training data, at least 1
        epochs: how often each is seen
        keep: keys, as above, that stay as they are; the others then fit a kept ``SOLVER.MAX_ITER``

    Returns:
        What was done, a line; "" if nothing.
    """
    solver, batch = cfg.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    if "SOLVER.MAX_ITER" in keep:
        iterations = solver.MAX_ITER
    elif epochs is not None:
        iterations = math.ceil(epochs * images / batch)
    else:
        iterations = min(length, math.ceil(max(_LEAST_IMAGES, _EPOCHS * images) / batch))
    part = math.ceil(iterations / _PART)
    steps = {round(step * iterations / length) for step in solver.STEPS}
    wanted = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": tuple(sorted(step for step in steps if 0 < step < iterations)),
        "SOLVER.WARMUP_ITERS": min(solver.WARMUP_ITERS, iterations // _PART),
        "SOLVER.CHECKPOINT_PERIOD": min(solver.CHECKPOINT_PERIOD, part),
        "TEST.EVAL_PERIOD": min(cfg.TEST.EVAL_PERIOD, part),
    }
    changes = []
    for key, value in wanted.items():
        node, leaf = section_of(cfg, key)
        old = node[leaf]
        if key not in keep and value != old:
            node[leaf] = value
            changes.append(f"{key} {value} (was {old})")
    if not changes:
        return ""
    return (
        f"The schedule fits {images} images, {iterations * batch / images:.0f} epochs of them: "
        f"{', '.join(changes)}. --epochs N chooses another length, KEY VALUE any of these."
    )
