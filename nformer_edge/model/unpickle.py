"""Tensors out of files that `torch.save` wrote. Nothing that such a file names is imported or called.

Two formats: the zip archive (torch 1.6 and later) and the row of pickles before it. Where a pickle names a class or a
function, the answer is a builder of this module for tensors and `Inert` for everything else. An `Inert` keeps what it
is given and does nothing, so NumPy scalars, configuration objects and whole pickled models are harmless.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Hashable, Mapping
from typing import IO, NamedTuple

import torch
from torch import Tensor

_MAGIC = 0x1950A86A20F9469CFC6C  # of the older format
_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}


class Unreadable(Exception):
    """What is wrong with the file, in plain words."""


class Inert(dict):  # type: ignore[type-arg]
    """Stands for an object of any class. It keeps arguments, items and state, and runs nothing."""

    state: object = None

    def __init__(self, *args: object, **_: object) -> None:
        super().__init__()
        self.args = args
        pairs = args[0] if args and isinstance(args[0], (list, tuple)) else ()  # OrderedDict as Python 2 pickles it
        for pair in pairs:
            if isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], Hashable):
                self[pair[0]] = pair[1]

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None:
        """A list's items are of no interest."""

    def extend(self, items: object) -> None:
        """As `append`."""

    def add(self, item: object) -> None:
        """As `append`."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class _Storage(NamedTuple):  # tuples: a pickle can set attributes of every other object that it has made
    key: str
    dtype: torch.dtype
    length: int


class View(NamedTuple):
    """A tensor whose bytes have not been read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: object, offset: object, shape: object, strides: object, *_: object) -> object:
    if not isinstance(storage, _Storage):
        return Inert()
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):  # a torch.Size is Inert here
        raise Unreadable("a tensor without a shape")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Unreadable("a tensor with a shape that is none")
    count, last = 1, int(str(offset))
    for n, step in zip(shape, strides, strict=True):
        count, last = count * n, last + (n - 1) * step
    if count and (count > storage.length or last >= storage.length):
        raise Unreadable("a tensor larger than its storage")
    return View(storage, int(str(offset)), shape, strides)


def _first(data: object, *_: object) -> object:
    """A parameter is its data."""
    return data


def _subclass(build: object, _kind: object, args: object, *_: object) -> object:
    """A tensor's subclass is the tensor under it."""
    known = (_TENSOR, _PARAMETER)
    return build(*args) if isinstance(build, _Builder) and build in known and isinstance(args, tuple) else Inert()


class _Builder:
    """A function that a pickle may call and not change."""

    __slots__ = ("build",)

    def __init__(self, build: Callable[..., object]) -> None:
        self.build = build

    def __call__(self, *args: object) -> object:
        return self.build(*args)

    def __setstate__(self, _: object) -> None:
        raise Unreadable("a pickle that changes a function")


_TENSOR, _PARAMETER = _Builder(_view), _Builder(_first)
_BUILDERS = {
    ("torch._utils", "_rebuild_tensor"): _TENSOR,
    ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
    ("torch._tensor", "_rebuild_from_type_v2"): _Builder(_subclass),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) in _BUILDERS:
            return _BUILDERS[module, name]
        dtype = _DTYPES.get(name.removesuffix("Storage")) if module in ("torch", "torch.storage") else None
        return type("Inert", (Inert,), {"dtype": dtype})  # a new class each time: no file can change it for another

    def persistent_load(self, pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # a class with its source text
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or any(pid[5:]):
            raise Unreadable("a storage that is none")
        _, kind, key, _, count = pid[:5]
        dtype = getattr(kind, "dtype", None)
        if dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
            return Inert()  # quantized, complex or of a later version; of no use where it is no weight
        return self.storages.setdefault(key, _Storage(key, dtype, count))


def _load(file: IO[bytes], size: int) -> tuple[object, dict[str, _Storage]]:
    start = file.tell()
    for opcode, arg, _ in pickletools.genops(file):
        if opcode.name.startswith("EXT") or (opcode.name in ("PUT", "LONG_BINPUT") and (arg or 0) > size):
            raise Unreadable("a pickle that torch.save does not write")
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages


class Saved:
    """A file's objects, with `View` for each tensor; `tensor` reads one.

    Raises:
        Unreadable: with what is wrong.
    """

    def __init__(self, data: bytes) -> None:
        self._tensors: dict[str, Tensor] = {}
        try:
            self.root = self._read_zip(data) if data[:4] == b"PK\x03\x04" else self._read_row(data)
        except Unreadable:
            raise
        except zipfile.BadZipFile as e:
            raise Unreadable("a truncated or damaged archive") from e
        except EOFError as e:
            raise Unreadable("a truncated file") from e
        except (
            Exception
        ) as e:  # a hostile pickle can make the unpickler raise anything; it ran no code of ours or others
            raise Unreadable(f"a damaged pickle ({type(e).__name__})") from e

    def _read_zip(self, data: bytes) -> object:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {i.filename: i for i in archive.infolist()}
            name = next(n for n in entries if n.endswith("/data.pkl") or n == "data.pkl")
            folder = name.removesuffix("data.pkl")
            order = entries.get(f"{folder}byteorder")
            if any(i.compress_type != zipfile.ZIP_STORED or i.file_size > len(data) for i in entries.values()):
                raise Unreadable("an archive with compressed entries")
            if order is not None and archive.read(order) != b"little":
                raise Unreadable("tensors of big-endian byte order")
            pickled = archive.read(name)
            root, storages = _load(io.BytesIO(pickled), len(pickled))
            for key, storage in storages.items():
                entry = entries.get(f"{folder}data/{key}")
                if entry is None or entry.file_size != storage.length * storage.dtype.itemsize:
                    raise Unreadable(f"a storage of another size than its {storage.length} numbers")
                self._keep(storage, archive.read(entry))
        return root

    def _read_row(self, data: bytes) -> object:
        file = io.BytesIO(data)
        first, _ = _load(file, len(data))
        if first != _MAGIC:  # no row: one pickle, perhaps of something else
            return first
        for _ in range(2):  # protocol and facts about the machine
            _load(file, len(data))
        root, storages = _load(file, len(data))
        keys, _ = _load(file, len(data))
        for key in keys if isinstance(keys, list) else ():
            count = int.from_bytes(file.read(8), "little")
            storage = storages.get(key)
            if storage is None or storage.length != count:
                raise Unreadable("a storage of another size than its tensors say")
            if count * storage.dtype.itemsize > len(data) - file.tell():
                raise Unreadable("a truncated file")
            self._keep(storage, file.read(count * storage.dtype.itemsize))
        return root

    def _keep(self, storage: _Storage, data: bytes) -> None:
        if len(data) != storage.length * storage.dtype.itemsize:  # an entry may hold less than its list says
            raise Unreadable("a storage that is cut short")
        numbers = torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0)
        self._tensors[storage.key] = numbers

    def tensor(self, view: View) -> Tensor:
        """The tensor itself."""
        if view.storage.key not in self._tensors:
            raise Unreadable("a tensor whose numbers are missing")
        return self._tensors[view.storage.key].as_strided(view.shape, view.strides, view.offset)


def mappings(root: object) -> dict[str, dict[str, View]]:
    """Every mapping from names to tensors (`View`) in an object, by the path of keys that leads to it.

    A whole pickled model counts as the mapping that its ``state_dict()`` would give.
    """
    found: dict[str, dict[str, View]] = {}
    seen: set[int] = set()
    open_: list[tuple[str, object]] = [("", root)]
    while open_:
        path, node = open_.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Inert) and isinstance(node.state, Mapping):
            module = _module_tensors(node)
            if module:
                found[path] = module
                continue
            open_.append((path, node.state))
        if isinstance(node, Mapping):
            tensors: dict[str, View] = {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, View)}
            if tensors:
                found[path] = tensors
            below = [(k, v) for k, v in node.items() if isinstance(k, (str, int))]
            open_.extend((f"{path}.{k}" if path else str(k), v) for k, v in reversed(below))
        elif isinstance(node, (list, tuple)):
            open_.extend((f"{path}.{i}" if path else str(i), v) for i, v in reversed(list(enumerate(node))))
    return found


def _module_tensors(module: Inert) -> dict[str, View]:
    tensors: dict[str, View] = {}
    open_: list[tuple[str, object, int]] = [("", module, 0)]
    while open_:
        prefix, node, depth = open_.pop()
        state = node.state if isinstance(node, Inert) else None
        if not isinstance(state, Mapping) or depth > 50:
            continue
        temporary = state.get("_non_persistent_buffers_set")
        if isinstance(temporary, Inert):  # set([...]), as protocol 2 writes it
            temporary = temporary.args[0] if temporary.args else None
        for group in ("_parameters", "_buffers"):
            members = state.get(group)
            for name, value in members.items() if isinstance(members, Mapping) else ():
                if isinstance(value, View) and not (isinstance(temporary, (set, list)) and name in temporary):
                    tensors[f"{prefix}{name}"] = value
        children = state.get("_modules")
        for name, child in reversed(list(children.items())) if isinstance(children, Mapping) else ():
            open_.append((f"{prefix}{name}.", child, depth + 1))
    return tensors
