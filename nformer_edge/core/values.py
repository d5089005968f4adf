"""Values as JSON and back: one converter for specs, manifests and results, and the JSON schema that follows from it.

A value is a frozen dataclass. Its annotations are the schema; the lines under ``Args:`` in its docstring are the
descriptions. Paths, tuples and arrays become strings and lists. NaN and infinity become null, and null becomes NaN
again where a plain ``float`` is expected: JSON has no NaN.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, TypeVar

import numpy as np

from nformer_edge.core.errors import ArtifactError, Error, UsageError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Table: TypeAlias = dict[str, JSON]

T = TypeVar("T")
R = TypeVar("R", bound="Result")


def to_json(value: object) -> JSON:
    """A value, or what stands in one, as plain JSON data."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form here")


def to_table(value: object) -> Table:
    """`to_json` of a dataclass or mapping, typed as the object that it is."""
    return typing.cast(Table, to_json(value))


def digest_of(data: Mapping[str, object]) -> str:
    """The sha256 over every field but ``sha256``, whatever their order: JSON with sorted keys and no spaces."""
    fields = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def from_json(
    cls: type[T], data: object, where: str = "", *, error: type[Error] = UsageError, complete: bool = False
) -> T:
    """A value of `cls` from JSON or TOML data.

    Args:
        cls: a dataclass.
        data: a table.
        where: what errors name; the class if "".
        error: what is raised.
        complete: every field must be there, also those with defaults: for files that this package wrote.

    Raises:
        Error: an `error` that names an unknown key (with the nearest spelling), a missing one, or a value
            of the wrong type.
    """
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise error(where, type(data).__name__, "a table of keys and values", "Correct the file.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = get_close_matches(str(key), fields, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Choose one of these."
            raise error(f"{where} key", repr(key), " | ".join(fields), hint)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if (required or complete) and name not in data:
            raise error(where, f"no {name}", f"the keys {', '.join(fields)}", "Add it, or make the file again.")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{where}.{key}", error, complete) for key, value in data.items()}
    try:
        return cls(**values)
    except Error as e:
        if isinstance(e, error):
            raise
        raise error(f"{where}.{e.subject}", e.got, e.expected, e.hint) from e


def _convert(hint: object, value: object, where: str, error: type[Error], complete: bool) -> object:
    origin, args = typing.get_origin(hint), typing.get_args(hint)

    def wrong(expected: str) -> Error:
        return error(where, repr(value), expected, "Correct the value.")

    def inner(kind: object, item: object, name: object) -> object:
        return _convert(kind, item, f"{where}[{name}]", error, complete)

    if hint is object or hint == JSON or isinstance(hint, (str, typing.ForwardRef)):
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        for kind in kinds[:-1]:
            try:
                return _convert(kind, value, where, error, complete)
            except Error:
                continue
        return _convert(kinds[-1], value, where, error, complete)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[object]", hint), value, where, error=error, complete=complete)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            near = get_close_matches(str(value), [str(a) for a in args], n=1)
            expected = " | ".join(map(str, args))
            raise error(where, repr(value), expected, f"Did you mean {near[0]!r}?" if near else "Choose one of these.")
        return value
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        fixed = origin is tuple and args[-1] is not ...
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
            raise wrong(f"a list of {len(args)}" if fixed else "a list")
        made = [inner(args[i] if fixed else args[0], v, i) for i, v in enumerate(value)]
        return made if origin is list else tuple(made)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise wrong("a table of keys and values")
        if args[0] is int and not all(str(key).lstrip("-").isdecimal() for key in value):
            raise wrong("whole numbers as keys")
        return {int(key) if args[0] is int else key: inner(args[1], v, key) for key, v in value.items()}
    if hint is np.ndarray:
        try:
            return np.array(value)
        except ValueError:  # rows of unequal length
            raise wrong("rows of equal length") from None
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float:
        if value is None:
            return math.nan
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:
                raise wrong("a finite number")
            return float(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong(getattr(hint, "__name__", str(hint)))
    return value


@dataclass(frozen=True)
class Result:
    """Base of what commands and functions give back: a value with a kind, a JSON form and a table to print.

    Subclasses are frozen dataclasses that set `kind` and, once their fields change, `version`. What other commands
    take as input is `sealed`: its last field, ``sha256``, is over all others (`digest_of`); `from_json` verifies it.
    """

    kind: ClassVar[str] = ""
    version: ClassVar[int] = 1
    sealed: ClassVar[bool] = False

    def to_json(self) -> Table:
        """Plain JSON data, with ``kind`` and ``version`` first."""
        data = {"kind": self.kind, "version": self.version, **to_table(self)}
        return {**data, "sha256": digest_of(data)} if self.sealed else data

    @classmethod
    def from_json(cls: type[R], data: object, where: str = "") -> R:
        """The value that `to_json` gave.

        Raises:
            ArtifactError: for another kind or version, a digest that does not hold, or fields that do not fit, by name.
        """
        where = where or cls.kind
        if not isinstance(data, Mapping) or data.get("kind") != cls.kind or data.get("version") != cls.version:
            got = f"{data.get('kind')} {data.get('version')}" if isinstance(data, Mapping) else type(data).__name__
            hint = "Make it again with this version."
            raise ArtifactError(where, got, f"{cls.kind}, version {cls.version}", hint)
        if cls.sealed and data.get("sha256") != digest_of(data):
            got, hint = "contents that do not match their sha256", "It was changed: copy it again, or make it again."
            raise ArtifactError(where, got, "the file as written", hint)
        own = ("kind", "version", "sha256") if cls.sealed else ("kind", "version")
        fields = {key: value for key, value in data.items() if key not in own}
        return from_json(cls, fields, where, error=ArtifactError, complete=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON form to a file, whole or not at all."""
        from nformer_edge.core.artifact import atomic_write_json

        atomic_write_json(path, self.to_json())


@dataclass(frozen=True)
class Written(Result):
    """A file or folder that was written, where there is no more to say.

    Args:
        path: where.
    """

    kind: ClassVar[str] = "written"

    path: Path

    def __str__(self) -> str:
        return f"wrote {self.path}"


def descriptions(cls: type) -> dict[str, str]:
    """What the ``Args:`` section of the docstring says of each field, in one line; the bases' docstrings count too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= arguments(inspect.cleandoc(base.__doc__ or ""))
    return found


def arguments(doc: str) -> dict[str, str]:
    """What the ``Args:`` section of a docstring, as `inspect.cleandoc` leaves it, says of each name, in one line."""
    section = re.search(r"^Args:\n((?: {4}.*\n|\n)*)", doc + "\n", re.M)
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): ((?:.*\n)(?: {8}.*\n)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def schema(cls: type) -> Table:
    """The JSON schema (2020-12) of a dataclass, with those of the dataclasses in it under ``$defs``."""
    defs: Table = {}
    body = _object_schema(cls, defs)
    if issubclass(cls, Result):
        own, names = typing.cast(Table, body["properties"]), typing.cast("list[JSON]", body["required"])
        about = "over all other fields: JSON with sorted keys and no spaces"
        last: Table = {"sha256": {"type": "string", "description": about}} if cls.sealed else {}
        body["properties"] = {"kind": {"const": cls.kind}, "version": {"const": cls.version}, **own, **last}
        body["required"] = ["kind", "version", *names, *last]
    top: Table = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__, **body}
    return top | ({"$defs": {name: defs[name] for name in sorted(defs)}} if defs else {})


def _object_schema(cls: type, defs: Table) -> Table:
    hints, told = typing.get_type_hints(cls), descriptions(cls)
    properties: Table = {}
    for f in dataclasses.fields(cls):
        entry = _schema(hints[f.name], defs)
        properties[f.name] = entry | ({"description": told[f.name]} if f.name in told else {})
    first = (cls.__doc__ or "").strip().splitlines()
    about: Table = {"description": first[0]} if first else {}
    names: list[JSON] = [f.name for f in dataclasses.fields(cls)]
    return {"type": "object", **about, "properties": properties, "required": names, "additionalProperties": False}


def _schema(hint: object, defs: Table) -> Table:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(a, defs) for a in args]}
    if hint is type(None):
        return {"type": "null"}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in defs:
            defs[hint.__name__] = {}  # a type may hold itself
            defs[hint.__name__] = _object_schema(hint, defs)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple and args[-1] is not ...:
        items: list[JSON] = [_schema(a, defs) for a in args]
        return {"type": "array", "prefixItems": items, "minItems": len(args), "maxItems": len(args)}
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        return {"type": "array", "items": _schema(args[0], defs)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(args[1], defs)}
    plain: dict[object, Table] = {
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"type": ["number", "null"]},
        str: {"type": "string"},
        Path: {"type": "string"},
        np.ndarray: {"type": "array"},
    }
    return plain.get(hint, {})


def dumps(value: object) -> str:
    """JSON text of plain data, without NaN."""
    return json.dumps(value, indent=2, allow_nan=False)
