"""What tests of videos share."""

import copy
import uuid

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.shapes import THING_CLASSES


@pytest.fixture
def register():
    """Register dicts; returns the name. Unregistered after the test."""
    names = []

    def add(records, **metadata):
        name = f"test_videos_{uuid.uuid4().hex}"
        DatasetCatalog.register(name, lambda: copy.deepcopy(records))
        MetadataCatalog.get(name).set(thing_classes=list(THING_CLASSES), **metadata)
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
