"""`d2ext compare`: several models, one budget. Importing a module here registers its comparison."""

from d2ext.tools.compare import (  # noqa: F401  (register themselves)
    key_frames,
    landmark_heads,
    panoptic,
    retinaface_tasks,
    tasks,
    video_panoptic,
)
from d2ext.tools.compare.runner import run

__all__ = ["run"]
