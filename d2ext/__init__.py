"""d2ext: dense recognition systems for Detectron2 that predict parts and assemble them.

Importing the package registers its meta-architectures, backbones and data sets with Detectron2.
"""

import os
import warnings

# Threads that wait for each other sleep instead of spinning: on a CPU, data loading and the model want
# the same cores, and a training step then takes a tenth of the time. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

with warnings.catch_warnings():  # of Detectron2 and fvcore, with PyTorch 2.14
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    from d2ext import data, engine, modeling, systems  # noqa: F401  (imported for registration)
    from d2ext.config import add_d2ext_config, get_cfg
    from d2ext.engine.predictor import Predictor
    from d2ext.engine.video_predictor import VideoPredictor
    from d2ext.version import __version__

__all__ = ["Predictor", "VideoPredictor", "__version__", "add_d2ext_config", "get_cfg"]
