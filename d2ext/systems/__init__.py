"""The systems, one room each. Importing this package registers all of them with Detectron2."""

from d2ext.systems import centernet, centernet_triplets, cornernet, yolact  # noqa: F401
