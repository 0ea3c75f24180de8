"""The systems, one room each. Importing this package registers all of them with Detectron2."""

from d2ext.systems import (  # noqa: F401
    centernet,
    centernet_triplets,
    cornernet,
    densepose,
    landmarks,
    retinaface,
    upsnet,
    vpsnet,
    yolact,
    yolact_edge,
)
