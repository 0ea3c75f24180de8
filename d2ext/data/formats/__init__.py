"""Exports of annotation tools as data sets; see :mod:`d2ext.data.formats.export`."""

from d2ext.data.formats import json_exports, xml_exports, yolo  # noqa: F401  (they register readers)
from d2ext.data.formats.export import FORMATS, convert_to_coco

__all__ = ["FORMATS", "convert_to_coco"]
