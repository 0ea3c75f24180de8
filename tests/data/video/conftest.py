"""What tests of videos share."""

import copy
import uuid

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.shapes import THING_CLASSES
from d2ext.data.video.register import register_builtin_videos


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


@pytest.fixture
def builtin(tmp_path, monkeypatch):
    """The built-in names in a folder of the test's own."""
    before = set(DatasetCatalog.list())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    names = [
        n
        for n in before
        if n.startswith(("ytvis_", "flying_", "cityscapes_vps", "viper_vps")) or "_as_" in n
    ]
    assert len(names) == 9 + 2 + 3 + 2 + 2
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    register_builtin_videos()
    yield tmp_path
    monkeypatch.undo()
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    register_builtin_videos()  # with their metadata
    assert set(DatasetCatalog.list()) == before
