"""d2ext: dense recognition systems for Detectron2 that predict parts and assemble them.

Importing the package registers its meta-architectures, backbones and data sets with Detectron2.
"""

from d2ext import data, engine, modeling, systems  # noqa: F401  (imported for registration)
from d2ext.config import add_d2ext_config, get_cfg
from d2ext.version import __version__

__all__ = ["__version__", "add_d2ext_config", "get_cfg"]
