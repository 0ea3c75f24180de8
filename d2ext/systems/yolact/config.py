"""Settings of YOLACT."""

from detectron2.config import CfgNode


def add_yolact_config(cfg: CfgNode) -> None:
    """Add YOLACT's keys to ``cfg``, in place."""
