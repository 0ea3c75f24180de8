"""Checkpoint files of strangers."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from d2ext.checkpoint.io import CheckpointError, load_untrusted

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}


class Exploit:
    """Pickles as a call of ``os.mkdir(path)``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_state_dicts(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": STATE, "iteration": 3}, path, _use_new_zipfile_serialization=new)
    loaded = load_untrusted(path)
    assert loaded["iteration"] == 3
    assert torch.equal(loaded["model"]["a.weight"], STATE["a.weight"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_model_zoo_pickles(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "R-50.pkl"
    weights = OrderedDict(w=np.arange(3, dtype=np.float32), n=np.float32(2.5), empty=np.empty(0))
    data = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    loaded = load_untrusted(path)
    assert loaded["__author__"] == "torchvision" and loaded["matching_heuristics"] is True
    np.testing.assert_array_equal(loaded["model"]["w"], weights["w"])
    assert loaded["model"]["n"] == 2.5 and loaded["model"]["empty"].shape == (0,)


def test_names_of_either_numpy(tmp_path: Path) -> None:
    """Files written under NumPy 1 name numpy.core, under NumPy 2 numpy._core."""
    path = tmp_path / "x.pkl"
    data = pickle.dumps({"w": np.arange(3)}, protocol=2)
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        for known in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
            data = data.replace(b"c" + known + b"\n", b"c" + module + b"\n")
        assert module in data
        path.write_bytes(data)
        np.testing.assert_array_equal(load_untrusted(path)["w"], np.arange(3))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_code_is_refused_and_not_run(tmp_path: Path, kind: str, suffix: str) -> None:
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "executed"
    data = {"model": STATE, "extra": Exploit(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": Exploit(mark)}))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=kind == "zip")
    module = sys.modules[os.mkdir.__module__].__name__  # posix
    with pytest.raises(CheckpointError, match=rf"'{module}\.mkdir'.*only the state dict"):
        load_untrusted(path)
    assert not mark.exists()


def test_codec_lookup_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    # _codecs.encode("a", "idna"), by hand: the codec's module would be imported.
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R.")
    with pytest.raises(CheckpointError, match=r"_codecs\.encode"):
        load_untrusted(path)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_cut_files(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "x.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"w": np.arange(1000)}))
    else:
        state = {"w": torch.rand(1000)}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_untrusted(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n<HTML>404", "web page"),
        (b"just text", "neither"),
        (b"\x80nonsense", "damaged"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_untrusted(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        load_untrusted(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError):
        load_untrusted(tmp_path)


def test_numpy_numbers_beside_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    weights = {"w": torch.arange(6.0).view(2, 3).t(), "half": torch.ones(2, dtype=torch.bfloat16)}
    best = {"ap": np.float64(0.25), "epochs": np.int64(7), "curve": np.arange(4.0)}
    torch.save({"model": weights, "shared": weights["w"], **best}, path)
    loaded = load_untrusted(path)
    torch.testing.assert_close(loaded["model"]["w"], weights["w"])
    torch.testing.assert_close(loaded["model"]["half"], weights["half"])
    assert (loaded["ap"], loaded["epochs"]) == (0.25, 7)
    np.testing.assert_array_equal(loaded["curve"], np.arange(4.0))


def test_numpy_numbers_open_no_door(tmp_path: Path) -> None:
    path, mark = tmp_path / "best.pth", tmp_path / "executed"
    torch.save({"model": STATE, "ap": np.float64(1), "more": Exploit(mark)}, path)
    with pytest.raises(CheckpointError, match="mkdir"):
        load_untrusted(path)
    assert not mark.exists()


def test_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(STATE, tmp_path / "model.bin")
    loaded = load_untrusted(tmp_path / "model.bin")
    assert torch.equal(loaded["a.weight"], STATE["a.weight"])


def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match="TorchScript") as error:
        load_untrusted(tmp_path / "x.pt")
    assert "weights_only" not in str(error.value)


def test_archives_that_unpack_to_more(tmp_path: Path) -> None:
    path, bomb = tmp_path / "x.pth", tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(20 << 20)}, path)
    assert load_untrusted(path)["w"].numel() == 20 << 20
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="would unpack to"):
        load_untrusted(bomb)


def test_tensors_that_show_more_than_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(CheckpointError, match="holds only 4 bytes"):
        load_untrusted(path)
    torch.save({"w": torch.zeros(1).expand(8)}, path)
    assert load_untrusted(path)["w"].shape == (8,)


def test_data_that_refers_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    own: dict = {}
    own["own"] = own
    bomb: list = [0]
    for _ in range(40):
        bomb = [bomb, bomb]
    for data, message in ((own, "contains itself"), ({"b": bomb}, "too often")):
        torch.save(data, path)
        with pytest.raises(CheckpointError, match=message):
            load_untrusted(path)
        path.write_bytes(pickle.dumps(data))
        with pytest.raises(CheckpointError, match=message):
            load_untrusted(path)


def test_pointers_from_the_file_are_not_followed(tmp_path: Path) -> None:
    """An object array over bytes of the file: NumPy's own reader crashes on it."""
    path = tmp_path / "x.pth"
    ours = pickle.dumps(np.arange(2), protocol=2)
    assert b"i8" in ours
    path.write_bytes(ours.replace(b"i8", b"O8"))
    with pytest.raises(CheckpointError, match="O8"):
        load_untrusted(path)
