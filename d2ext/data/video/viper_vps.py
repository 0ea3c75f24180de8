"""VIPER as VPSNet's authors prepared it for video panoptic segmentation (arXiv 2006.11339), below the
folder ``viper_vps``. They publish no conversion and give the data on request, so that part of the layout
is assumed, as the training part of Cityscapes-VPS has it:

- val: ``val_day/{img,panoptic_video}`` and ``viper_panoptic_val_day_video.json``, COCO's panoptic form;
- train: ``train/{img,labelmap}`` and ``instances_train_05_viper_coco.json``, whose instances have
  ``inst_id`` and the panoptic file's category ids; the classes are those of the val part's file. Or, if
  it is there, COCO's panoptic form again: ``viper_panoptic_train_day_video.json`` with
  ``train/{img,panoptic_video}``.

Classes are the file's own (published: 23, stuff 0 to 12, then things).
"""

import os
import re

from detectron2.utils.file_io import PathManager

from d2ext.data.panoptic import read_panoptic_json
from d2ext.data.video.cityscapes_vps import check_there
from d2ext.data.video.label_maps import read_label_map_clips
from d2ext.data.video.panoptic_video import read_panoptic_video
from d2ext.data.video.video_data import VideoData

# Published results leave this class out of the mean over classes (vpsnet/NOTES.md, "Data").
_LEFT_OUT = "mobilebarrier"
_VAL = "viper_panoptic_val_day_video.json"
_TRAIN = "viper_panoptic_train_day_video.json"
_ON_REQUEST = "given by VPSNet's authors on request"


def read_train(name: str, root: str) -> VideoData:
    """Records of the clips of the training part.

    Args:
        name: of the data set
        root: folder ``viper_vps``

    Raises:
        DatasetError: files that are missing or cannot be used
    """
    if PathManager.isfile(os.path.join(root, _TRAIN)):
        return _read_panoptic(name, root, _TRAIN, "train")
    files = ("instances_train_05_viper_coco.json", "train/img", "train/labelmap", _VAL)
    json_file, images, labels, classes = check_there(name, root, dict.fromkeys(files, _ON_REQUEST))
    categories = read_panoptic_json(classes)["categories"]
    return _left_out(read_label_map_clips(name, json_file, images, labels, categories))


def read_val(name: str, root: str) -> VideoData:
    """Records of the clips of the validation part; as :func:`read_train`."""
    return _read_panoptic(name, root, _VAL, "val_day")


def _read_panoptic(name: str, root: str, file: str, folder: str) -> VideoData:
    files = (file, f"{folder}/img", f"{folder}/panoptic_video")
    paths = check_there(name, root, dict.fromkeys(files, _ON_REQUEST))
    return _left_out(read_panoptic_video(name, *paths))


def _left_out(data: VideoData) -> VideoData:
    """``vpq_left_out``: names of classes that Video Panoptic Quality leaves out."""
    classes = [*data.metadata["stuff_classes"], *data.metadata["thing_classes"]]
    names = [c for c in classes if re.sub(r"[\W_]", "", c).lower() == _LEFT_OUT]
    return VideoData(data.videos, {**data.metadata, "vpq_left_out": names})
