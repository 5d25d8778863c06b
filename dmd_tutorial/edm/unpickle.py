"""Reading the published EDM checkpoints, which are pickles, without running anything in them.

A pickle is a program. An ordinary unpickler runs it: it imports what the file names and calls it
with what the file holds; the published files even carry Python source that it would execute. Here
a file is first *scanned*: every instruction is looked at, none is carried out. Then it is read by
an unpickler that knows a dozen names, each standing for an inert substitute of our own, so that
nothing of the file is ever imported, called or executed. What is left are tensors and plain values.
"""

import io
import itertools
import math
import pickle
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

OPCODES = 1_000_000  # the published files have some hundred thousand
DEPTH = 64  # modules within modules
NAMES = 20_000  # parameters and buffers of a network
ELEMENTS = {  # what a storage may hold
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
MAGIC = 0x1950A86A20F9469CFC6C  # of torch files in the old form
NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_PythonUnpickler: Any = pickle._Unpickler


class Refused(ValueError):
    """A file does something that reading weights does not need."""


class Inert:
    """Stands for an object of the file: remembers what it was given, does nothing."""

    class_name: str  # what the file says it is
    state: dict  # the attributes that the file gives it

    def __new__(cls, *_: object) -> "Inert":
        made = super().__new__(cls)  # whatever it is called with, it begins empty
        made.class_name, made.state = "", {}
        return made

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state


def read_pickle(content: bytes) -> Any:
    """Read a pickle inertly: dictionaries, lists, plain values, tensors and `Inert` objects.

    `Refused` if it names anything beyond what weights need, declares more data than it has, or is
    too intricate; ValueError if it is truncated or no pickle.
    """
    scan(content)
    try:
        return _Unpickler(io.BytesIO(content), _network_names(len(content))).load()
    except Refused:
        raise
    except Exception as error:
        raise ValueError(f"the file is damaged: {shown(str(error))}") from error


def shown(text: str) -> str:
    """Text of a file as an error may show it: one short line without control characters."""
    return ascii(text)[1:-1][:120]


def scan(content: bytes) -> int:
    """Look at every instruction of a pickle without carrying any out; how many bytes it takes.

    Something may follow it. `Refused` are too many instructions, and some that no weights need.
    """
    position = 0
    no = {"EXT1", "EXT2", "EXT4", "PERSID", "INST", "NEXT_BUFFER", "READONLY_BUFFER", "FROZENSET"}
    try:
        for count, (opcode, value, at) in enumerate(pickletools.genops(io.BytesIO(content))):
            position = at or 0
            if opcode.name in no:
                raise Refused(f"the instruction {opcode.name} at byte {position} is not allowed")
            if "PUT" in opcode.name and int(value or 0) > OPCODES:  # a table of that size is made
                raise Refused(f"the file numbers an object {value}")
            if count > OPCODES:
                raise Refused(f"the file has more than {OPCODES} instructions")
    except Refused:
        raise
    except Exception as error:  # pickletools raises many kinds
        raise ValueError(f"the file is truncated or no pickle: {shown(str(error))}") from error
    return position + 1


class _Unpickler(_PythonUnpickler):
    """Knows only the names that it is given; in Python, so that instructions can be replaced."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: io.BytesIO, names: dict[str, Any]) -> None:
        super().__init__(file)
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        if (asked := f"{module}.{name}") not in self.names:
            raise Refused(f"the file asks for {shown(asked)}, which weights do not need")
        return self.names[asked]

    # An instruction that changes an object may only change the kind it is made for: no tensor (its
    # own `__setstate__` makes memory), no class, no function.
    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert | _NumberType):
            target.__setstate__(state)
        elif not isinstance(target, dict):  # attributes of a dictionary are dropped
            raise Refused("the file gives a state to what has none")

    dispatch[pickle.BUILD[0]] = _build


def _checked(change: Callable, kind: type, target: Callable, keys: Callable) -> Callable:
    """An instruction that changes a target, which must be of a kind; keys that it adds are plain.

    A tuple that holds itself twice, that one twice, and so on for fifty times has 2^50 parts.
    Nothing looks at them until it becomes the key of a dictionary.
    """

    def checked(unpickler: _Unpickler) -> None:
        changed = target(unpickler)
        if not isinstance(changed, kind):
            was = type(changed).__name__
            raise Refused(f"the file changes a {was} as if it were a {kind.__name__}")
        _check_keys(keys(unpickler))
        change(unpickler)

    return checked


for _instruction, *_what in (
    (pickle.APPEND, list, lambda u: u.stack[-2], lambda u: []),
    (pickle.APPENDS, list, lambda u: u.metastack[-1][-1], lambda u: []),
    (pickle.SETITEM, dict, lambda u: u.stack[-3], lambda u: [u.stack[-2]]),
    (pickle.SETITEMS, dict, lambda u: u.metastack[-1][-1], lambda u: u.stack[::2]),
    (pickle.DICT, object, lambda u: None, lambda u: u.stack[::2]),
    (pickle.ADDITEMS, set, lambda u: u.metastack[-1][-1], lambda u: u.stack),
):
    _change = _PythonUnpickler.dispatch[_instruction[0]]
    _Unpickler.dispatch[_instruction[0]] = _checked(_change, *_what)


def _check_keys(keys: list) -> None:
    if not all(key is None or isinstance(key, str | int | float) for key in keys):
        raise Refused("a key of a dictionary is neither text nor number")


@dataclass
class _Budget:
    """Bytes that may still be made: one copy of each byte of the file, however often it is used."""

    left: int

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Refused("the file would unpack to more than it holds")


def _network_names(size: int) -> dict[str, Any]:
    """Name in a file of that many bytes -> substitute; made anew for each file."""
    storages, texts = _Budget(size), _Budget(size)
    names: dict[str, Any] = {
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch.storage._load_from_bytes": partial(read_storage, budget=storages),
        "collections.OrderedDict": lambda: OrderedDict(),
        "builtins.set": _set,
        "__builtin__.set": _set,
        "_codecs.encode": partial(_encode, budget=texts),
        "numpy.dtype": lambda *given: _NumberType(*given),
        "numpy.core.multiarray.scalar": _scalar,
        "numpy._core.multiarray.scalar": _scalar,
    }
    inert = ["torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ModuleList",
             "torch.nn.modules.container.Sequential", "numpy.core.multiarray._reconstruct",
             "numpy._core.multiarray._reconstruct", "numpy.ndarray"]  # fmt: skip
    names |= dict.fromkeys(inert, Inert)
    # it begins empty: the entries come one by one, and their keys are checked
    names["dnnlib.util.EasyDict"] = type("EasyDict", (dict,), {"__init__": lambda *_: None})
    return names


def _persistent_object(meta: object) -> Inert:
    """An object of the published code: its source is dropped unread."""
    made = Inert()
    if isinstance(meta, dict) and isinstance(meta.get("state"), dict):
        made.state = meta["state"]
        made.class_name = name if isinstance(name := meta.get("class_name"), str) else ""
    return made


def _set(items: object = ()) -> set:
    if not isinstance(items, list | tuple) or len(items) > 1_000:
        raise Refused("a set is not made from a short list")
    _check_keys(list(items))
    return set(items)


def _encode(text: object, encoding: object, budget: _Budget) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("text is encoded in an unusual way")
    budget.take(len(text))
    return text.encode("latin1")


class _NumberType:
    """A numpy type by its name; a state that follows it is ignored but for the byte order."""

    def __init__(self, name: object, *_: object) -> None:
        if not isinstance(name, str) or name.lstrip("<>=|") not in NUMBERS:
            raise Refused("numbers of a numpy type that is none are not allowed")
        self.dtype = np.dtype(name.lstrip("<>=|")).newbyteorder("<")

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind: object, data: object = b"") -> int | float | bool:
    if not isinstance(kind, _NumberType) or not isinstance(data, bytes):
        raise Refused("a number of numpy is not described as numpy does")
    if len(data) != kind.dtype.itemsize:
        raise Refused(f"a number of numpy type {kind.dtype} has {len(data)} bytes")
    return np.frombuffer(data, kind.dtype)[0].item()


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
    """A tensor that is a view of its storage, checked before torch sees the numbers."""
    if not isinstance(storage, Tensor):
        raise Refused("a tensor is not made from a storage")
    if not _are_counts(size) or not _are_counts(stride) or not _are_counts((offset,)):
        raise Refused("a tensor's size, stride or offset is no row of counts")
    sizes, strides, start = list(size), list(stride), int(offset)  # type: ignore[call-overload]
    if len(sizes) != len(strides) or len(sizes) > 8:
        raise Refused(f"a tensor has {len(sizes)} sizes and {len(strides)} strides")
    count = math.prod(sizes)
    last = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if count and (count > len(storage) or last >= len(storage)):
        raise Refused(f"a tensor of shape {sizes} needs more than its {len(storage)} values")
    # A view: a thousand tensors of one storage take no more memory than one.
    return storage.as_strided(sizes, strides, start) if count else storage[:0].reshape(sizes)


def _are_counts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(type(n) is int and n >= 0 for n in values)


def read_storage(content: object, budget: _Budget) -> Tensor:
    """The values, not to be written to, of a storage: pickles, then the values, within the pickle.

    Torch has a newer form, a zip, but pickles a storage in this old one. `Refused` if it holds
    anything else or declares more values than it has.
    """
    if not isinstance(content, bytes):
        raise Refused("a storage is not given as bytes")
    budget.take(len(content))  # time, too: the same bytes read a million times are refused
    position, pickles, declared = 0, list[Any](), list[tuple]()
    for _ in range(5):  # magic number, protocol, system, the storage, the keys of all storages
        rest = content[position : position + 100_000]  # these are short; the values follow them
        length = scan(rest)
        pickles.append(_StorageUnpickler(io.BytesIO(rest[:length]), declared).load())
        position += length
    if pickles[0] != MAGIC or len(declared) != 1 or pickles[4] != [declared[0][2]]:
        raise Refused("bytes that should be one storage hold something else")
    dtype, count, size = declared[0][1], declared[0][4], len(content) - position - 8
    written = int.from_bytes(content[position : position + 8], "little")
    if written != count or size != count * dtype.itemsize:
        raise Refused(f"a storage declares {count} values, it has {size} bytes of them")
    if size == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes are not to be written to, and nobody does
        return torch.frombuffer(content, dtype=dtype, offset=position + 8)


class _StorageUnpickler(_Unpickler):
    """Reads the pickles in front of a storage's values."""

    def __init__(self, file: io.BytesIO, declared: list[tuple]) -> None:
        names = {f"torch.{name}": dtype for name, dtype in ELEMENTS.items()}
        names |= {f"torch.storage.{name}": dtype for name, dtype in ELEMENTS.items()}
        super().__init__(file, names)
        self.declared = declared

    def persistent_load(self, pid: Any) -> Any:
        """Note what the storage is said to be: ('storage', type, key, device, count, view)."""
        well_formed = (
            isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
            and isinstance(pid[1], torch.dtype) and isinstance(pid[2], str)
            and _are_counts(pid[4:5]) and all(view is None for view in pid[5:])
        )  # fmt: skip
        if not well_formed:
            raise Refused("a storage is not described as torch does")
        self.declared.append(pid)
        return Inert()


def state_dict_of(network: object) -> dict[str, Tensor]:
    """Parameters and persistent buffers of an `Inert` network, as its state dict would name them.

    `Refused` if it is nested too deeply or endlessly, or holds too many tensors.
    """
    found: dict[str, Tensor] = {}
    visits = itertools.count(1)

    def collect(module: object, prefix: str, depth: int) -> None:
        # a module may stand in many places, each in many others
        if depth == 0 or next(visits) > NAMES:
            raise Refused("the network is nested too deeply or too widely")
        if not isinstance(module, Inert):
            where = shown(prefix) or "the network"
            raise ValueError(f"{where} is no module but {type(module).__name__}")
        hidden = module.state.get("_non_persistent_buffers_set") or ()
        for kind, left in (("_parameters", ()), ("_buffers", hidden)):
            for name, tensor in _entries(module, kind, prefix):
                if isinstance(tensor, Tensor) and name not in left:
                    found[prefix + name] = tensor
        if len(found) > NAMES:
            raise Refused(f"the network has more than {NAMES} tensors")
        for name, child in _entries(module, "_modules", prefix):
            if child is not None:
                collect(child, f"{prefix}{name}.", depth - 1)

    collect(network, "", DEPTH)
    return found


def _entries(module: Inert, kind: str, prefix: str) -> list[tuple[str, Any]]:
    entries = module.state.get(kind, {})
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{kind} of {shown(prefix) or 'the network'} is no dictionary of names")
    return list(entries.items())
