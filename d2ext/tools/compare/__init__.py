"""`d2ext compare`: several models, one budget. Importing a module here registers its comparison."""

from d2ext.tools.compare import landmark_heads, panoptic  # noqa: F401  (register themselves)
from d2ext.tools.compare.runner import run

__all__ = ["run"]
