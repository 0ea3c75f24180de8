"""What follows from a data set: metadata, facts, and the keys of a config."""

import uuid

import pytest
from detectron2.data import MetadataCatalog

from d2ext.config import get_cfg
from d2ext.data import DatasetError
from d2ext.data.dataset_facts import (
    Keypoints,
    category_keypoints,
    category_metadata,
    check_config_against_data,
    dataset_facts,
    flip_indices,
    set_config_from_data,
)
from d2ext.data.landmarks import LANDMARK_DATASETS
from d2ext.data.saved_metadata import class_metadata, save_metadata

FACE = {
    "id": 4,
    "name": "face",
    "keypoints": ["nose", "left_eye", "right_eye"],
    "skeleton": [[1, 2], [1, 3]],
}


@pytest.fixture
def name():
    made = f"facts_{uuid.uuid4().hex}"
    yield made
    MetadataCatalog.pop(made, None)


def test_keypoints_of_a_category():
    assert category_keypoints(FACE) == Keypoints(
        ("nose", "left_eye", "right_eye"), ((1, 2),), ((0, 1), (0, 2))
    )
    own = {**FACE, "flip_pairs": [[0, 2]], "sigmas": [0.1, 0.2, 0.3]}
    assert category_keypoints(own).flip_pairs == ((0, 2),)
    assert category_keypoints(own).sigmas == (0.1, 0.2, 0.3)
    for change, message in (
        ({"flip_pairs": [[0, 3]]}, "do not fit its 3 keypoints"),
        ({"skeleton": [[0, 1]]}, "do not fit"),
        ({"sigmas": [0.1]}, "do not fit"),
        ({"keypoints": ["a", "a", "b"]}, "'face' occur repeatedly"),
        ({"flip_pairs": [[0, 1], [1, 2]]}, "left_eye with nose, right_eye.*one partner"),
        ({"flip_pairs": [0, 1]}, "lists of pairs of whole numbers"),
        ({"sigmas": [0.1, 0, 0.1]}, "above 0"),
    ):
        with pytest.raises(DatasetError, match=message):
            category_keypoints({**FACE, **change})


@pytest.mark.parametrize(
    ("names", "partners"),
    [
        (("L_Eye", "R_Eye", "Nose", "L_F_Paw", "R_F_Paw"), [1, 0, 2, 4, 3]),
        (("Left_Eye", "Right_Eye", "LEFT_EAR", "RIGHT_EAR"), [1, 0, 3, 2]),
        (
            ("left_eye_left", "left_eye_right", "nose", "right_eye_left", "right_eye_right"),
            [4, 3, 2, 1, 0],
        ),
        (("eye-right", "eye-left", "eye.L", "eye.R"), [1, 0, 3, 2]),
        (("LeftEye", "RightEye", "REar", "LEar", "pawR", "pawL"), [1, 0, 3, 2, 5, 4]),
        (("REAR_LEFT", "REAR_RIGHT", "bright", "l1", "r1"), [1, 0, 2, 4, 3]),
        (("nose", "left_eye", "Lip", "Rip", "tail", "hair"), [0, 1, 2, 3, 4, 5]),
        (("left", "LEFT", "right"), [0, 2, 1]),
    ],
)
def test_mirror_partners_by_name(name, names, partners):
    MetadataCatalog.get(name).set(**category_metadata([{"id": 1, "name": "x", "keypoints": names}]))
    assert dataset_facts(name).flip_indices == partners
    assert [partners[i] for i in partners] == list(range(len(names)))


def test_constants_of_similarity(name, caplog):
    """COCO's are of people's points alone, the data's own win."""
    coco = list(LANDMARK_DATASETS["coco"].sigmas)
    people = list(LANDMARK_DATASETS["coco"].keypoints)
    animals = [f"point_{i}" for i in range(17)]
    category = {"id": 1, "name": "x", "keypoints": people}
    for change, given, expected in (
        ({}, [], []),
        ({}, coco, coco),
        ({}, [0.1] * 3, []),
        ({"sigmas": [0.2] * 17}, coco, [0.2] * 17),
        ({"keypoints": animals}, [], [0.05] * 17),
        ({"keypoints": animals}, coco, [0.05] * 17),
        ({"keypoints": animals}, [0.3] * 17, [0.3] * 17),
    ):
        MetadataCatalog.pop(name, None)
        MetadataCatalog.get(name).set(**category_metadata([{**category, **change}]))
        cfg = get_cfg()
        cfg.TEST.KEYPOINT_OKS_SIGMAS = given
        set_config_from_data(cfg, name)
        assert expected == cfg.TEST.KEYPOINT_OKS_SIGMAS
    assert "no 'sigmas' of their 17 keypoints" in caplog.text


def test_names_go_into_the_config(name):
    """A saved config names what it predicts without the data."""
    MetadataCatalog.get(name).set(**category_metadata([{"id": 1, "name": "hat"}, FACE]))
    cfg = get_cfg()
    set_config_from_data(cfg, name)
    save_metadata(cfg, name)
    cfg.DATASETS.TEST = ("coco_2017_val",)  # not what the model was trained on
    metadata = class_metadata(type(cfg).load_cfg(cfg.dump()))
    assert metadata.thing_classes == ["hat", "face"] and metadata.get("stuff_classes") is None
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, FACE["id"]: 1}
    assert metadata.keypoint_names == FACE["keypoints"]
    assert flip_indices(metadata) == [0, 2, 1]
    assert metadata.keypoint_connection_rules[0][:2] == ["nose", "left_eye"]


def test_metadata_and_facts_of_categories(name):
    MetadataCatalog.get(name).set(**category_metadata([{"id": 1, "name": "hat"}, FACE]))
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["hat", "face"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 4: 1}
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    colors = [color for *_, color in metadata.keypoint_connection_rules]
    assert colors[0] != colors[1]  # left and right
    facts = dataset_facts(name)
    assert facts.things == ["hat", "face"] and facts.keypoints == FACE["keypoints"]
    assert facts.flip_indices == flip_indices(name) == [0, 2, 1] and facts.flip_pairs == [[1, 2]]
    assert facts.sigmas is facts.semantic is facts.stuff is facts.full is None
    assert "keypoint_names" not in category_metadata([{"id": 1, "name": "hat"}])


@pytest.mark.parametrize(
    ("kind", "sigmas"), [("coco", list(LANDMARK_DATASETS["coco"].sigmas)), ("wflw", [0.05] * 98)]
)
def test_keys_that_follow_from_keypoints(name, kind, sigmas):
    landmarks = LANDMARK_DATASETS[kind]
    MetadataCatalog.get(name).set(
        thing_classes=["it"],
        keypoint_names=landmarks.keypoints,
        keypoint_flip_map=[
            (landmarks.keypoints[a], landmarks.keypoints[b]) for a, b in landmarks.flip_pairs
        ],
        keypoint_oks_sigmas=landmarks.sigmas,
    )
    count = len(landmarks.keypoints)
    for architecture in ("CenterNet", "LandmarkNet"):
        cfg = get_cfg()
        cfg.MODEL.META_ARCHITECTURE = architecture
        cfg.MODEL.KEYPOINT_ON = True
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 8  # of other data
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = cfg.MODEL.LANDMARKS.NUM_KEYPOINTS = 5
        key = "LANDMARKS" if architecture == "LandmarkNet" else "ROI_KEYPOINT_HEAD"
        with pytest.raises(
            DatasetError, match=rf"MODEL\.{key}\.NUM_KEYPOINTS to {count}|NUM_CLASSES"
        ):
            check_config_against_data(cfg)
        set_config_from_data(cfg, name)
        check_config_against_data(cfg)
        assert count == cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        assert list(cfg.TEST.KEYPOINT_OKS_SIGMAS) == sigmas
        pairs = {frozenset(pair) for pair in landmarks.flip_pairs}
        if architecture == "CenterNet":
            assert {frozenset(pair) for pair in cfg.MODEL.CENTERNET.POSE.FLIP_PAIRS} == pairs
            assert cfg.MODEL.CENTERNET.NUM_CLASSES == 1
        else:
            assert count == cfg.MODEL.LANDMARKS.NUM_KEYPOINTS
            indices = cfg.MODEL.LANDMARKS.FLIP_INDICES
            assert {frozenset((i, j)) for i, j in enumerate(indices) if i != j} == pairs


def test_constants_that_fit_stay(name):
    MetadataCatalog.get(name).set(thing_classes=["it"], keypoint_names=["a", "b"])
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "CenterNet"
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.2, 0.3]
    set_config_from_data(cfg, name)
    assert cfg.TEST.KEYPOINT_OKS_SIGMAS == [0.2, 0.3]
    assert cfg.MODEL.CENTERNET.POSE.FLIP_PAIRS == []  # those of the config are of other points
    with pytest.raises(DatasetError, match="a with a, b"):
        MetadataCatalog.get(name).set(keypoint_flip_map=[("a", "b"), ("a", "a")])
        flip_indices(name)
    MetadataCatalog.get(name).__dict__.pop("keypoint_flip_map")
    with pytest.raises(DatasetError, match="unknown names"):
        MetadataCatalog.get(name).set(keypoint_flip_map=[("a", "c")])
        flip_indices(name)


def test_built_in_configs_have_what_follows_from_their_data():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "CenterNet"
    published = list(cfg.MODEL.CENTERNET.POSE.FLIP_PAIRS)
    cfg.MODEL.CENTERNET.POSE.FLIP_PAIRS = []
    set_config_from_data(cfg, "keypoints_coco_2017_val")
    assert published == cfg.MODEL.CENTERNET.POSE.FLIP_PAIRS
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 17 and cfg.TEST.KEYPOINT_OKS_SIGMAS == []
