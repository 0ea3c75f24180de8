"""Reading pickles of weights as data: a pickle is a program, and this interpreter calls nothing that it
names.

It supports the instructions for numbers, strings and containers, and the few calls with which NumPy and
PyTorch save arrays and tensors, which are built here from bytes of exactly the right size. Anything else
is refused by name.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import torch

# Booleans, integers, floating point and complex numbers of up to 16 bytes; no objects, no strings.
_NUMERIC = re.compile(r"[biufc](1|2|4|8|16)|[?bBhHiIlLqQefdgFDG]")
# Names of NumPy's modules in files of NumPy 1 and 2.
_NUMPY = re.compile(r"numpy\.(_core|core)\.(multiarray|numeric)")

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_TORCH_DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(("q", "bits"))
}

# Reads the content of a storage: key, type and number of elements → a tensor of all its bytes.
ReadStorage = Callable[[str, torch.dtype, int], torch.Tensor]

# Limits beyond any checkpoint: a small file could describe more nodes, or deeper ones, by referring to
# itself, and have the same bytes copied again and again.
_MOST_NODES, _DEEPEST = 3_000_000, 100
# What calls may copy: this many times the pickle's size, and this many bytes in any case.
_MOST_COPIED, _LEAST_LIMIT = 16, 64 << 20


class Refused(ValueError):
    """The pickle refers to something that is not data; ``args[0]`` is its name."""


class Global(NamedTuple):
    """A name that the pickle refers to; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Dtype:
    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise Refused(f"an array of type {code!r}")
        self.value = np.dtype(code)


class _Array:
    """An array under construction; ``value`` is None until its content was read."""

    value: np.ndarray | None = None


def read_pickle(content: bytes | IO[bytes], storage: ReadStorage | None = None) -> Any:
    """The object in a pickle.

    Args:
        content: the pickle, or a file at its beginning, which is left behind its end.
        storage: reads storages, for the pickle in a file of ``torch.save``.

    Raises:
        Refused: something that is not data.
        ValueError, IndexError, KeyError, TypeError, AttributeError: a damaged pickle.
    """
    if isinstance(content, bytes):
        content = io.BytesIO(content)
    begin = content.tell()
    size = content.seek(0, io.SEEK_END) - begin
    content.seek(begin)
    return _Machine(storage, max(_MOST_COPIED * size, _LEAST_LIMIT)).run(content)


class _Machine:
    def __init__(self, storage: ReadStorage | None, most_copied: int) -> None:
        self.storage = storage
        self.copyable = most_copied
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: IO[bytes]) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > _MOST_NODES:
                raise ValueError(f"the pickle has more than {_MOST_NODES} instructions")
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self.stack.append(argument)
            else:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise Refused(f"the pickle instruction {name}")
                step(argument)
        raise ValueError("the pickle has no end")

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"it claims to be a pickle of protocol {version}")

    def _frame(self, _: Any) -> None: ...

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # Containers

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append({})
        self._fill(items)

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Refused("an object that is filled like a list")
        self.stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _setitems(self, _: Any) -> None:
        self._fill(self._since_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise Refused("an object that is filled like a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes | int | float | None):
                raise Refused(f"a dict key of type {type(key).__name__}")
            target[key] = value

    # Memory

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # Names and calls

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        dtype = _TORCH_DTYPES.get(name) if module == "torch" else None
        self.stack.append(dtype or Global(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(f"{module} {name}")

    def _newobj(self, _: Any) -> None:
        self._reduce(None)

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Refused("a call of something that has no name")
        self.stack.append(self._call(function, arguments))

    def _copied(self, content: Any) -> Any:
        """``content``, which a call is about to copy: often, perhaps, but not endlessly."""
        self.copyable -= len(content)
        if self.copyable < 0:
            raise ValueError("its parts are used too often")
        return content

    def _call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        module, name = function
        if (module, name) in (("collections", "OrderedDict"), ("collections", "Counter")):
            content = self._copied(arguments[0]) if arguments else []
            return self._mapping(content.items() if isinstance(content, dict) else content)
        if (module, name) in (("__builtin__", "bytes"), ("builtins", "bytes")) and not arguments:
            return b""  # stands for b"" in protocol 2
        if (module, name) == ("_codecs", "encode") and arguments[1:] in ((), ("latin1",)):
            return str(self._copied(arguments[0])).encode("latin1")  # bytes in protocol 2
        if (module, name) == ("numpy", "dtype"):
            return _Dtype(arguments[0])
        if _NUMPY.fullmatch(module):
            return self._numpy_call(function, arguments)
        if (module, name) == ("torch", "Size"):
            return tuple(self._copied(arguments[0]))
        if (module, name) == ("torch", "device"):
            return torch.device(*arguments)
        if self.storage is not None and module == "torch._utils":
            return _torch_call(function, arguments)
        raise Refused(str(function))

    def _mapping(self, pairs: Any) -> dict[Any, Any]:
        self.stack.append({})
        for key, value in pairs:
            self._fill([key, value])
        return self.stack.pop()

    def _numpy_call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        if function.name == "_reconstruct" and arguments[0] == Global("numpy", "ndarray"):
            return _Array()
        if function.name == "scalar":
            return _array(self._copied(arguments[1]), arguments[0], (), "C")[()]
        if function.name == "_frombuffer":  # protocol 5
            content, dtype, shape, order = arguments
            return _array(self._copied(content), dtype, shape, "F" if order == "F" else "C")
        raise Refused(str(function))

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if (
            isinstance(target, _Dtype)
            and isinstance(state, tuple)
            and state[1] in ("<", ">", "|", "=")
        ):
            target.value = target.value.newbyteorder(state[1])
        elif isinstance(target, _Array) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, content = state
            order = "F" if fortran else "C"
            target.value = _array(self._copied(content), dtype, shape, order)
        elif not (isinstance(target, dict) and isinstance(state, dict)):
            # OrderedDicts of torch carry `_metadata`, which is of no use here.
            raise Refused(f"a state for a {type(target).__name__}")

    def _binpersid(self, _: Any) -> None:
        pid = self.stack.pop()
        if self.storage is None or not isinstance(pid, tuple) or pid[:1] != ("storage",):
            module = isinstance(pid, tuple) and pid[:1] == ("module",)  # before PyTorch 1.6
            raise Refused(str(pid[1]) if module else "a persistent object")
        _, kind, key, _, count, *view = pid
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or view not in ([], [None]):
            raise Refused(f"a storage of type {kind}")
        if not isinstance(count, int) or count < 0:
            raise ValueError("the size of a storage is not one")
        self.stack.append(self.storage(str(key), dtype, count).view(dtype))


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Not LONG4: an integer of more than 255 bytes is none of a checkpoint, and slow to compare.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}


def _array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if isinstance(content, str):  # bytes of Python 2, which pickletools decodes
        content = content.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
        raise Refused("an array of objects")
    if not isinstance(shape, tuple) or not all(isinstance(x, int) and x >= 0 for x in shape):
        raise ValueError("the shape of an array is not one")
    if len(content) != math.prod(shape) * dtype.value.itemsize:
        raise ValueError(f"an array of shape {shape} comes with {len(content)} bytes")
    flat = np.frombuffer(content, dtype.value)
    return flat.reshape(shape, order="F" if order == "F" else "C").copy()


def _torch_call(function: Global, arguments: tuple[Any, ...]) -> Any:
    if not arguments or not isinstance(arguments[0], torch.Tensor):
        raise Refused(f"{function} of something that is no tensor")
    if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return arguments[0]
    if function.name == "_rebuild_tensor_v2":
        return _view(*arguments[:4])
    if function.name == "_rebuild_tensor_v3":  # of types newer than typed storages
        storage, offset, size, stride, _, _, dtype = arguments[:7]
        return _view(storage.view(torch.uint8).view(dtype), offset, size, stride)
    raise Refused(str(function))


def _view(storage: torch.Tensor, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    numbers = [offset, *size, *stride]
    if not all(type(x) is int and 0 <= x < 1 << 62 for x in numbers) or len(size) != len(stride):
        raise ValueError("the shape of a tensor is not one")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel():
        raise ValueError(f"a tensor of shape {size} goes beyond its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped_storage(), offset, size, stride)


def checked(data: Any) -> Any:
    """Data that is safe to traverse: arrays are finished, nothing contains itself, shared parts don't
    multiply, and no tensor has much more elements than its storage.

    Args:
        data: of :func:`read_pickle`.

    Raises:
        ValueError: otherwise.
    """
    done: dict[int, tuple[Any, int]] = {}

    def visit(value: Any, depth: int) -> tuple[Any, int]:
        """The finished value, and how many nodes a walk through it meets."""
        if isinstance(value, _Array):
            if value.value is None:
                raise ValueError("an array has no content")
            return value.value, 1
        if isinstance(value, _Dtype | Global):
            raise Refused(str(value) if isinstance(value, Global) else "a type without an array")
        if isinstance(value, torch.Tensor):
            shown, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
            if shown > 16 * held + (64 << 20):
                raise ValueError(f"a tensor of shape {tuple(value.shape)} holds only {held} bytes")
        if not isinstance(value, dict | list | tuple):
            return value, 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} times, or contains itself")
        if id(value) not in done:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            parts = {key: visit(item, depth + 1) for key, item in items}
            count = 1 + sum(n for _, n in parts.values())
            if count > _MOST_NODES:
                raise ValueError("its parts refer to each other too often")
            if isinstance(value, tuple):
                if any(
                    part is not item for (part, _), item in zip(parts.values(), value, strict=True)
                ):
                    value = tuple(part for part, _ in parts.values())
            else:
                for key, (part, _) in parts.items():
                    value[key] = part
            done[id(value)] = value, count
            return value, count
        return done[id(value)]

    return visit(data, 0)[0]
