"""Tensors out of a file of torch.save, without torch and without trusting the file.

Such a file is a pickle, and loading a pickle runs what its author put in. Nothing is
run here. The pickle is only disassembled, by the standard library's `pickletools`, and
`read_pickle` follows the few instructions that a table of tensors is made of on a stack
of its own. The names in the file remain strings: no module is imported, no function is
looked up or called, no object of a class of the file's choice is made. Any other
instruction or name ends in a ValueError.

Format: torch/serialization.py, `_legacy_save`, of PyTorch before 1.6.
"""

import math
import pickletools
import struct
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
DTYPES = {"torch FloatStorage": np.dtype("<f4")}
TABLE, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class Tensor(NamedTuple):
    """Where a tensor's numbers will be: they follow the pickles in the file."""

    storage: tuple  # ("storage", type, key, device, numbers, None)
    offset: int
    shape: tuple
    strides: tuple  # in numbers
    requires_grad: bool
    hooks: dict


def load(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a state dict by name; views of the file's bytes, read-only."""
    data = Path(path).read_bytes()
    stream = BytesIO(data)
    try:
        if read_pickle(stream) != MAGIC or read_pickle(stream) != VERSION:
            raise ValueError("no legacy file of torch.save")
        if not read_pickle(stream)["little_endian"]:
            raise ValueError("written on a big-endian machine")
        table, keys = read_pickle(stream), read_pickle(stream)
        dtypes = {x.storage[2]: DTYPES[x.storage[1]] for x in table.values()}
        storages, position = {}, stream.tell()
        for key in keys:
            (count,) = struct.unpack_from("<q", data, position)
            storages[key] = np.frombuffer(data, dtypes[key], count, position + 8)
            position += 8 + storages[key].nbytes
        return {name: view(storages[x.storage[2]], x) for name, x in table.items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is damaged or no file of tensors: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def view(storage: np.ndarray, x: Tensor) -> np.ndarray:
    """The part of a storage that a tensor is; its numbers must lie in C order."""
    in_order = [math.prod(x.shape[axis + 1 :]) for axis in range(len(x.shape))]
    if list(x.strides) != in_order or x.offset < 0 or min(x.shape, default=0) < 0:
        raise ValueError(f"a tensor of shape {x.shape} has strides {x.strides}")
    return storage[x.offset : x.offset + math.prod(x.shape)].reshape(x.shape)


def read_pickle(stream):
    """The plain data that one pickle describes, up to its end."""
    stack, marks, memo = [], [], {}

    def after_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for instruction, argument, position in pickletools.genops(stream):
        match instruction.name:
            case "PROTO" | "BINPERSID":  # a reference to a storage stays the tuple it is
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "GLOBAL" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
                stack.append(CONSTANTS[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" as name:
                stack.append(EMPTY[name]())
            case "TUPLE":
                stack.append(tuple(after_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPENDS":
                items = after_mark()
                stack[-1].extend(items)
            case "SETITEM":
                *_, table, key, value = stack
                table[key] = value
                del stack[-2:]
            case "SETITEMS":
                items = after_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "REDUCE" if stack[-2] == TABLE and stack[-1] == ():
                stack[-2:] = [{}]
            case "REDUCE" if stack[-2] == TENSOR:
                stack[-2:] = [Tensor(*stack[-1])]
            case "BUILD":  # attributes of the table, which nobody needs
                stack.pop()
            case name:
                raise ValueError(f"instruction {name} {argument or ''} at {position} is refused")
    raise ValueError("the file ends early")
