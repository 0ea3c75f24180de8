"""Mutated checkpoint files: read, or refused with one line; no crash, no hang, no other error."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError, load_untrusted
from d2ext.tools.convert import read_state_dict

Random = np.random.Generator


def saved(data: object, *, new: bool) -> bytes:
    file = io.BytesIO()
    torch.save(data, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def valid_files() -> list[tuple[str, bytes]]:
    """Files of each kind, with the ending that they come with."""
    weights = {"weight": torch.rand(2, 3), "bias": torch.rand(2), "n": torch.tensor(3)}
    shared = {**weights, "tied": weights["weight"].t(), "half": torch.ones(2, dtype=torch.bfloat16)}
    whole = {"model": nn.Linear(3, 2).state_dict(), "iteration": 3, "best": np.float64(0.5)}
    arrays = {"model": OrderedDict(weight=np.random.rand(2, 3), bias=np.arange(2)), "ok": True}
    blobs = {"blobs": {"weight": np.float32([[1, 2, 3]]), "weight_momentum": np.zeros(1)}}
    files = [(".pkl", pickle.dumps(x, protocol=p)) for x in (arrays, blobs) for p in (2, 4, 5)]
    for data in (weights, whole, {"state_dict": shared, "epoch": 7}):
        files += [(".pth", saved(data, new=new)) for new in (True, False)]
    return [*files, (".safetensors", save(weights))]


# Pieces of pickles: containers, calls, memory, sizes beyond all bounds, and names.
PIECES = (
    *(b"]", b"}", b")", b"(", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"0", b"1", b"2", b"\x85"),
    *(
        b"R",
        b"b",
        b"Q",
        b"\x81",
        b"\x93",
        b"\x94",
        b".",
        b"N",
        b"\x88",
        b"K\x00",
        b"C\x00",
        b"U\x00",
    ),
    *(b"h\x00", b"h\x01", b"h\x02", b"q\x00", b"q\x01", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"G\x7f\xf8" + b"\x00" * 6, b"X\x01\x00\x00\x00a"),
    *(b"\x8e" + b"\xff" * 7 + b"\x7f", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"ctorch\nSize\n"),
    *(b"ctorch\nfloat32\n", b"ctorch\ndevice\n", b"ctorch\nFloatStorage\n", b"cposix\nsystem\n"),
    *(
        b"ccollections\nOrderedDict\n",
        b"c_codecs\nencode\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ),
    *(b"ctorch._utils\n_rebuild_tensor_v3\n", b"cnumpy._core.multiarray\nscalar\n"),
    *(b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy._core.numeric\n_frombuffer\n"),
)


def with_other_bytes(content: bytes, random: Random) -> bytes:
    """A few bytes changed, left out, doubled or put in."""
    data = bytearray(content)
    for _ in range(int(random.choice([1, 1, 2, 4]))):
        at = int(random.integers(0, len(data) + 1))
        length = int(random.integers(1, 9))
        piece = random.bytes(length)
        kind = random.integers(0, 4)
        if kind == 0:
            data[at : at + length] = piece
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length * 4]
        else:
            data[at:at] = piece
    return bytes(data)


def with_other_instructions(content: bytes, random: Random) -> bytes:
    """Instructions of the pickle at the beginning changed, left out, doubled or put in."""
    ends = [at for _, _, at in pickletools.genops(content)][1:]
    starts = [0, *ends]
    parts = [content[a:b] for a, b in zip(starts, [*ends, starts[-1] + 1], strict=True)]
    rest = content[starts[-1] + 1 :]
    for _ in range(int(random.choice([1, 1, 2, 4]))):
        at = int(random.integers(1, len(parts)))
        kind = random.integers(0, 4)
        other = parts[int(random.integers(0, len(parts)))]
        piece = PIECES[int(random.integers(0, len(PIECES)))]
        if kind == 0:
            parts[at] = piece
        elif kind == 1 and len(parts) > 2:
            del parts[at]
        elif kind == 2:
            parts.insert(at, other)
        else:
            parts[at:at] = [piece] * int(random.choice([1, 2, 200]))
    return b"".join(parts) + rest


def with_other_pickle(content: bytes, random: Random) -> bytes:
    """The archive with other instructions in its data.pkl, compressed now and then."""
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if random.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w", kind) as target:
        for name in source.namelist():
            entry = source.read(name)
            if name.endswith("data.pkl"):
                change = with_other_bytes if random.random() < 0.3 else with_other_instructions
                entry = change(entry, random)
            target.writestr(name, entry)
    return file.getvalue()


def mutated(content: bytes, random: Random) -> bytes:
    if content.startswith(b"PK"):
        return (with_other_bytes, with_other_pickle)[int(random.random() < 0.7)](content, random)
    if content.startswith(b"\x80") and random.random() < 0.6:
        if content[2:4] == b"\x8a\x0a":  # of torch before 1.6: the data are the fourth pickle
            file = io.BytesIO(content)
            for _ in range(3):
                pickle.load(file)
            return content[: file.tell()] + with_other_instructions(content[file.tell() :], random)
        return with_other_instructions(content, random)
    return with_other_bytes(content, random)


def attack(folder: Path, cases: int, seed: int) -> dict[str, int]:
    """How many mutated files were read, refused by the reader, and refused by who uses what was read."""
    random = np.random.default_rng(seed)
    files = valid_files()
    outcomes = {"loaded": 0, "converted": 0, "refused by the reader": 0, "refused by its users": 0}
    for case in range(cases):
        ending, content = files[case % len(files)]
        path = folder / f"x{ending}"
        path.write_bytes(mutated(content, random))
        try:
            load_untrusted(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes["refused by the reader"] += 1
            continue
        for use, done in ((load, "loaded"), (read_state_dict, "converted")):
            try:
                use(str(path))
                outcomes[done] += 1
            except ValueError:  # CheckpointError, ConversionError: what the tools report
                outcomes["refused by its users"] += 1
            except BaseException:
                os.replace(path, folder / f"failing{ending}")
                raise
    return outcomes


def load(path: str) -> None:
    try:
        Checkpointer(nn.Linear(3, 2), fit="any").load(path)
    except CheckpointError:
        raise
    except ValueError as error:
        raise AssertionError("an error of someone else") from error


@pytest.mark.timeout(120)
def test_some_mutated_files(tmp_path: Path) -> None:
    outcomes = attack(tmp_path, 1500, seed=0)
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.attack
@pytest.mark.timeout(3600)
def test_many_mutated_files(tmp_path: Path) -> None:
    outcomes = attack(tmp_path, 60_000, seed=1)
    print(outcomes)
    assert sum(outcomes.values()) >= 60_000 and min(outcomes.values()) > 0, outcomes


LEGACY = pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])


@LEGACY
def test_every_kind_of_tensor_is_read_as_torch_reads_it(tmp_path: Path, new: bool) -> None:
    dtypes = ("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool")
    dtypes += ("int64", "int32", "int16", "int8", "uint8")
    dtypes += ("uint16", "float8_e4m3fn") if new else ()  # torch writes these but cannot read them
    base = torch.arange(24).reshape(4, 6)
    data = {name: base.to(getattr(torch, name)) for name in dtypes}
    data |= {"part": base[1:, ::2].t(), "base": base, "none": torch.zeros(0, 3), "flags": base > 3}
    data |= {"parameter": nn.Parameter(torch.ones(2)), "number": torch.tensor(2.5)}
    path = tmp_path / "x.pth"
    path.write_bytes(saved(data, new=new))
    ours, theirs = load_untrusted(path), torch.load(path, weights_only=True)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].stride()) == (value.dtype, value.stride())
        assert torch.equal(ours[name].to(torch.complex128), value.to(torch.complex128)), name
    ours["base"].fill_(7)  # one storage serves both
    assert (ours["part"] == 7).all()


@LEGACY
def test_what_schedules_and_sizes_are_made_of(tmp_path: Path, new: bool) -> None:
    data = {"milestones": Counter({3: 1}), "on": torch.device("cuda", 1), "as": torch.float16}
    path = tmp_path / "x.pth"
    path.write_bytes(saved({**data, "size": torch.Size([2, 3])}, new=new))
    assert load_untrusted(path) == {**data, "size": (2, 3)}


@LEGACY
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(2).to_sparse(), "_get_layout"),
        (torch.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), "QInt8Storage"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        ({(1, 2): 3}, "a dict key of type tuple"),
        (1 << 3000, "LONG4"),
    ],
)
def test_what_is_no_plain_data_is_named(
    tmp_path: Path, new: bool, value: object, message: str
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"x": value}, new=new))
    with pytest.raises(CheckpointError, match=message):
        load_untrusted(path)


def claiming(content: bytes, old: bytes, new: bytes) -> bytes:
    """An archive or older file whose pickle has ``new`` in place of ``old``."""
    if not content.startswith(b"PK"):
        assert old in content
        return content.replace(old, new)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            entry = source.read(name)
            assert old in entry or not name.endswith("data.pkl")
            target.writestr(name, entry.replace(old, new))
    return file.getvalue()


@LEGACY
@pytest.mark.parametrize(
    ("old", "new_bytes", "message"),
    [
        (b"K\x07tq", b"J\x00\x00\x00\x40tq", r"elements of type|larger than the file"),  # storage
        (b"K\x07tq", b"J\xff\xff\xff\xfftq", "size of a storage"),
        (b"K\x07\x85", b"J\x00\x00\x00\x40\x85", "beyond its storage"),  # shape
        (b"QK\x00", b"QK\x01", "beyond its storage"),  # offset
        (b"QK\x00", b"QJ\xff\xff\xff\xff", "is not one"),
        (b"K\x01\x85", b"J\xff\xff\xff\xff\x85", "is not one"),  # stride
        (b"K\x01\x85", b"J\xff\xff\xff\x7f\x85", "beyond its storage"),
    ],
)
def test_no_tensor_reaches_beyond_the_file(
    tmp_path: Path, new: bool, old: bytes, new_bytes: bytes, message: str
) -> None:
    path = tmp_path / "x.pth"
    if not new:  # a None more
        old, new_bytes = (x.replace(b"tq", b"Ntq") for x in (old, new_bytes))
    path.write_bytes(claiming(saved({"w": torch.arange(7.0)}, new=new), old, new_bytes))
    with pytest.raises(CheckpointError, match=message):
        load_untrusted(path)


def test_contents_that_say_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    content = saved({"w": torch.arange(7.0)}, new=False)
    assert content[-36:-28] == (7).to_bytes(8, "little")  # before the 28 bytes of the numbers
    path.write_bytes(content[:-36] + (6).to_bytes(8, "little") + content[-28:])
    with pytest.raises(CheckpointError, match="is cut short"):
        load_untrusted(path)
    content = saved({"w": torch.arange(7.0)}, new=True)
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            entry = b"big" if name.endswith("/byteorder") else source.read(name)
            target.writestr(name, entry)
    with pytest.raises(CheckpointError, match="other byte order"):
        load_untrusted(path)


def test_small_files_that_copy_without_end(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    million = (1_000_000).to_bytes(4, "little")
    array = (
        b"cnumpy._core.numeric\n_frombuffer\n(h\x00h\x01J" + million + b"\x85X\x01\x00\x00\x00CtR"
    )
    kept = b"\x80\x04(%b\x94cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x94"
    for shared, use in (
        (b"B" + million + bytes(1_000_000), array),
        (b"X" + million + b"a" * 1_000_000, b"c_codecs\nencode\nh\x00\x85R"),
        (b"(" + b"N" * 1_000_000 + b"l", b"ctorch\nSize\nh\x00\x85R"),
    ):
        path.write_bytes(kept % shared + use * 100 + b"l.")
        with pytest.raises(CheckpointError, match="used too often"):
            load_untrusted(path)
        path.write_bytes(kept % shared + use * 9 + b"l.")
        with pytest.raises(CheckpointError, match="a type without an array"):  # only that is wrong
            load_untrusted(path)
    path.write_bytes(b"\x80\x04(" + b"N" * 4_000_000 + b"l.")
    with pytest.raises(CheckpointError, match="instructions"):
        load_untrusted(path)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        (
            "x.pth",
            {"model": {1: torch.ones(1), "b": torch.ones(1)}},
            "1 is not the name of a weight",
        ),
        ("x.pth", {"model": {None: torch.ones(1)}}, "None is not the name of a weight"),
        ("x.pth", {"model": {"w": {"x": 1}}}, "'w' is a dict, not a tensor"),
        ("x.pth", {"model": [1]}, "entry 'model' is a list, not a tensor"),
        ("x.pth", {"model_state": 3}, "holds no weights"),
        ("x.pth", {"state_dict": "text"}, "holds no weights"),
        ("x.pkl", {"blobs": 5}, "holds no weights"),
        ("x.pkl", {3: np.ones(1)}, "3 is not the name of a weight"),
        ("x.pkl", {"model": {"w": np.zeros(2, np.longdouble)}}, "float128, which PyTorch has not"),
        ("x.pth", [torch.ones(1)], "holds a list"),
    ],
)
def test_data_that_are_no_weights(tmp_path: Path, file: str, data: object, message: str) -> None:
    path = tmp_path / file
    path.write_bytes(pickle.dumps(data) if file == "x.pkl" else saved(data, new=True))
    with pytest.raises(CheckpointError, match=message):
        load(str(path))


def test_arrays_of_either_byte_order_and_numbers_are_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    weight, bias = np.arange(6.0).reshape(2, 3), np.arange(2.0)
    state = {"weight": weight.astype(">f4"), "bias": bias.astype("<f8"), "n": np.int64(3)}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "someone"}))
    model = nn.Linear(3, 2)
    Checkpointer(model, fit="any").load(str(path))
    np.testing.assert_array_equal(model.weight.detach().numpy(), weight)
    np.testing.assert_array_equal(model.bias.detach().numpy(), bias)
    assert read_state_dict(str(path))["n"] == 3
