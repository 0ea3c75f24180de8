"""Settings of the data path."""

from detectron2.config import CfgNode


def add_data_config(cfg: CfgNode) -> None:
    """Add the data keys to ``cfg``, in place."""
