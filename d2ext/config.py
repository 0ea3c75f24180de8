"""d2ext's configuration: Detectron2's defaults plus those of every part that has settings of its own."""

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from d2ext.data.config import add_data_config
from d2ext.engine.config import add_engine_config
from d2ext.modeling.cornernet_hourglass import add_cornernet_hourglass_config
from d2ext.modeling.inference import add_inference_config
from d2ext.systems.centernet.config import add_centernet_config
from d2ext.systems.centernet_triplets.config import add_centernet_triplets_config
from d2ext.systems.cornernet.config import add_cornernet_config
from d2ext.systems.landmarks.config import add_landmarks_config
from d2ext.systems.upsnet.config import add_upsnet_config
from d2ext.systems.yolact.config import add_yolact_config


def add_d2ext_config(cfg: CfgNode) -> None:
    """Add the keys of every d2ext system to ``cfg``, in place. Existing keys keep their values."""
    add_data_config(cfg)
    add_engine_config(cfg)
    add_inference_config(cfg)
    add_cornernet_hourglass_config(cfg)
    add_centernet_config(cfg)
    add_yolact_config(cfg)
    add_cornernet_config(cfg)
    add_centernet_triplets_config(cfg)
    add_upsnet_config(cfg)
    add_landmarks_config(cfg)


def get_cfg() -> CfgNode:
    """Detectron2's default config with d2ext's keys.

    ``MODEL.DEVICE`` is ``"cuda"`` where PyTorch sees a GPU and ``"cpu"`` elsewhere, so that every
    tool and ``DefaultPredictor`` runs unchanged on a machine without one.
    """
    cfg = get_detectron2_cfg()
    add_d2ext_config(cfg)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg
