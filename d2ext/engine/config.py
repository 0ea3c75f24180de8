"""Settings of the training engine."""

from detectron2.config import CfgNode


def add_engine_config(cfg: CfgNode) -> None:
    """Add the solver keys to ``cfg``, in place."""
