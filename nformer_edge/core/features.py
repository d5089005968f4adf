"""Features with their labels: what the backbone hands to the head, the search and the evaluation."""

from __future__ import annotations

import hashlib
import os
import tokenize
import typing
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from nformer_edge.core.artifact import atomic_write, open_plain
from nformer_edge.core.errors import ArtifactError, DataError
from nformer_edge.core.filekind import file_kind
from nformer_edge.core.spec import Precision
from nformer_edge.core.values import Result

#: A label that nobody gave, of a person or a camera.
UNKNOWN = -1

_FORMAT = "nformer-edge-features-2"

#: What numpy and zipfile raise for a damaged ``.npz``; RuntimeError is an encrypted one or an unknown compression.
UNREADABLE = (
    *(ValueError, TypeError, KeyError, AttributeError, OSError, EOFError, RuntimeError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, SyntaxError, tokenize.TokenError),  # the last two: of NumPy's header
)

#: A row's largest number: the squares of what counts, and the sum of 10,000 such, stay in float32's range.
_SMALLEST, _LARGEST = 1e-12, 1e16

#: Arrays of a split, and those that may be missing.
_ARRAYS = ("features", "pids", "camids", "paths", "model")
_MORE = ("augmented", "sha256", "ids", "augmentation", "spec", "checkpoint", "precision")


def _unknown() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Features(Result):
    """N images' features and what is known of the images. Labels may be left out: they are then unknown.

    Args:
        features: float32 [N, D], as the backbone gave them (not normalized).
        pids: int64 [N], person identity; -1 is junk or unknown, 0 a distractor.
        camids: int64 [N], camera; unknown is -1.
        paths: N image paths, in the same order; "" for an image that came from memory.
        model: sha256 of the model file that made the features, or "".
        hashes: sha256 of each image file, in the same order; empty where nobody took them.
        augmented: float32 [V - 1, N, D], further views of the same images, each augmented otherwise; None for none.
        augmentation: JSON that says how the views were drawn, or "".
        spec: JSON of the `ModelSpec` that made the features, its head left out, or "": a head trained on the features
            alone goes into a checkpoint with it.
        ids: N names that the caller gave the images, several images a name where they show the same; empty for none.
        checkpoint: sha256 of the checkpoint that the model was made from, or "" where that is not known.
        precision: of the backbone that computed: ``fp32``, ``fp16`` or ``int8``; "" where that is not known.
    """

    kind: ClassVar[str] = "features"

    features: np.ndarray
    pids: np.ndarray = field(default_factory=_unknown)
    camids: np.ndarray = field(default_factory=_unknown)
    paths: tuple[str, ...] = ()
    model: str = ""
    hashes: tuple[str, ...] = ()
    augmented: np.ndarray | None = None
    augmentation: str = ""
    spec: str = ""
    ids: tuple[str, ...] = ()
    checkpoint: str = ""
    precision: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", _numbers("features", self.features))
        if self.features.ndim != 2 or not self.features.shape[1]:
            raise DataError("features", f"shape {self.features.shape}", "[N, D]", "Pass one row an image.")
        rows = len(self.features)
        for name in ("pids", "camids"):
            labels = labels_of(name, getattr(self, name))
            if labels.ndim != 1:
                raise DataError(name, f"shape {labels.shape}", f"[{rows}]", "Pass one number an image.")
            object.__setattr__(self, name, labels if len(labels) else np.full(rows, UNKNOWN, np.int64))
        object.__setattr__(self, "paths", self.paths or ("",) * rows)
        for name in ("pids", "camids", "paths", "hashes", "ids"):
            count = len(getattr(self, name))
            if count != rows and not (name in ("hashes", "ids") and count == 0):
                hint = f"Pass {name} of exactly these images, or leave them out."
                raise DataError(name, f"{count} entries", f"{rows}, one for each feature", hint)
        if self.precision not in ("", *typing.get_args(Precision)):
            raise DataError("precision", repr(self.precision), "fp32, fp16, int8 or nothing", "Embed again.")
        if self.augmented is not None:
            object.__setattr__(self, "augmented", _numbers("augmented", self.augmented))
        if self.augmented is not None and (self.augmented.ndim != 3 or self.augmented.shape[1:] != self.features.shape):
            expected = f"[V - 1, {rows}, {self.features.shape[1]}]"
            hint = "Pass each view's features of exactly these images."
            raise DataError("augmented", f"shape {self.augmented.shape}", expected, hint)

    def __len__(self) -> int:
        return len(self.features)

    def __str__(self) -> str:
        shown = f"{len(self):,} images, {self.features.shape[1]} numbers each"
        for name, values in (("people", self.pids), ("cameras", self.camids)):
            known = np.unique(values[values != UNKNOWN])
            shown += f", {len(known):,} {name}" if len(known) else ""
        views = f", {self.views} views" if self.views > 1 else ""
        return f"{shown}{views}" + (f", model {self.model[:12]}" if self.model else "")

    @property
    def names(self) -> tuple[str, ...]:
        """What each image is called: the id that was given, or else the person's number, the path, or ""."""
        known = (str(pid) if pid != UNKNOWN else path for pid, path in zip(self.pids, self.paths, strict=True))
        return self.ids or tuple(known)

    def take(self, rows: np.ndarray) -> Features:
        """The images at `rows` (indices or a boolean mask), in that order."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            features=self.features[rows],
            pids=self.pids[rows],
            camids=self.camids[rows],
            paths=tuple(self.paths[i] for i in rows),
            hashes=tuple(self.hashes[i] for i in rows) if self.hashes else (),
            ids=tuple(self.ids[i] for i in rows) if self.ids else (),
            augmented=None if self.augmented is None else self.augmented[:, rows],
        )

    def with_features(self, features: np.ndarray) -> Features:
        """The same images under other features, such as the head's output; augmented views are not kept."""
        return replace(self, features=features, augmented=None, augmentation="")

    def shares_model(self, model: str, checkpoint: str = "", precision: str = "") -> bool:
        """Whether a model made these features, or another of the same checkpoint and the same precision did.

        Args:
            model: its sha256.
            checkpoint: sha256 of its checkpoint, or "".
            precision: of its backbone; "" on either side is not compared.
        """
        same = "" in (precision, self.precision) or precision == self.precision
        return model == self.model != "" or (same and bool({self.model, self.checkpoint} & {model, checkpoint} - {""}))

    @property
    def views(self) -> int:
        """V: how many views of each image there are, the plain one among them."""
        return 1 if self.augmented is None else 1 + len(self.augmented)

    def view(self, number: int) -> Features:
        """One view alone: 0 is the plain one, 1 to `views` - 1 the augmented ones."""
        if not 0 <= number < self.views:
            raise DataError("view", number, f"0..{self.views - 1}", "Embed the images again with more --views.")
        return self.with_features(
            self.features if self.augmented is None or number == 0 else self.augmented[number - 1]
        )

    def save(self, path: str | os.PathLike[str], split: str = "gallery") -> None:
        """Writes a feature store with this one split; see `save_features`."""
        save_features(path, {split: self})

    @classmethod
    def load(cls, path: str | os.PathLike[str], split: str | None = None) -> Features:
        """One split of a feature store; if None the gallery, or where there is none the first split.

        Raises:
            ArtifactError: if the file is missing or damaged, or has no such split.
        """
        sets = load_features(path)
        name = split or ("gallery" if "gallery" in sets else next(iter(sets), "gallery"))
        if name not in sets:
            got = f"splits {', '.join(sets) or 'none'}"
            raise ArtifactError(str(path), got, f"a split {name}", "Choose one of these, or embed again.")
        return sets[name]


def _numbers(subject: str, values: np.ndarray) -> np.ndarray:
    """As float32, or DataError for anything but real numbers in this machine's byte order."""
    given = np.asarray(values)
    _check_numbers(subject, given)
    with np.errstate(over="ignore"):  # infinity is refused by `check_features`
        return given.astype(np.float32, copy=False)


def _check_numbers(subject: str, given: np.ndarray) -> None:
    if given.dtype.kind not in "fiu" or not given.dtype.isnative:
        raise DataError(subject, f"type {given.dtype}", "float32", "Pass real numbers, one row an image.")


def labels_of(subject: str, values: object) -> np.ndarray:
    """People or cameras as int64, or DataError for anything but whole numbers of -1 (unknown) or more."""
    given = np.asarray(values)
    whole = given.dtype.kind in "iu" or (given.dtype.kind == "f" and bool((given == np.rint(given)).all()))
    if given.size and not (whole and given.dtype.isnative):
        raise DataError(subject, f"type {given.dtype}", "whole numbers", "Number people and cameras.")
    if given.size and not (given.min() >= UNKNOWN and given.max() < 2**63):
        got = f"{given.min()}..{given.max()}"
        raise DataError(subject, got, f"{UNKNOWN} (unknown) or more", "Number people and cameras.")
    return given.astype(np.int64, copy=False)


def check_features(features: np.ndarray, subject: str = "features", dim: int | None = None) -> None:
    """The door: finite, non-zero rows of the right length.

    Raises:
        DataError: naming the first bad row; for complex numbers, objects and another byte order.
    """
    _check_numbers(subject, features)
    if features.ndim != 2 or (dim is not None and features.shape[1] != dim):
        hint = "Embed the images with the model that this head was trained on."
        raise DataError(subject, f"shape {features.shape}", f"[N, {dim if dim is not None else 'D'}]", hint)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        got = f"NaN or infinity in row {int(bad.argmax())} ({int(bad.sum())} such rows)"
        raise DataError(subject, got, "finite numbers", "Embed these images again and look at what they show.")
    zero = ~features.any(axis=1)
    if zero.any():
        got = f"all zeros in row {int(zero.argmax())} ({int(zero.sum())} such rows)"
        raise DataError(subject, got, "a direction in every row", "Embed these images again.")


def check_range(features: np.ndarray, subject: str = "features") -> None:
    """Raises DataError for the first row of [N, D] whose squares over- or underflow in float32: a model squares them.

    What ranks features scales them first (`metrics.distance.unit_rows`).
    """
    if not len(features):
        return
    largest = np.maximum(features.max(axis=1), -features.min(axis=1))
    far = (largest < _SMALLEST) | (largest > _LARGEST)
    if far.any():
        got = f"a largest number of {largest[far.argmax()]:.3g} in row {int(far.argmax())} ({int(far.sum())} such rows)"
        hint = "Embed these images again; scale features of your own to a norm near 1."
        raise DataError(subject, got, f"{_SMALLEST:g} to {_LARGEST:g}: squares stay in float32's range", hint)


def save_features(path: str | os.PathLike[str], sets: Mapping[str, Features]) -> None:
    """Writes a feature store, one `.npz` without pickles, atomically. Keys are split names such as ``query``."""
    arrays: dict[str, np.ndarray] = {"format": np.array(_FORMAT), "splits": np.array(list(sets))}
    for split, s in sets.items():
        found = {name: getattr(s, name) for name in ("features", "pids", "camids", "augmented")}
        found |= {"paths": np.array(s.paths, np.str_), "model": np.array(s.model)}
        for name, values in (("sha256", s.hashes), ("ids", s.ids)):
            found[name] = np.array(values, np.str_) if values else None
        for name in ("augmentation", "spec", "checkpoint", "precision"):
            found[name] = np.array(getattr(s, name)) if getattr(s, name) else None
        arrays |= {f"{split}/{name}": array for name, array in found.items() if array is not None}
    arrays["sha256"] = np.array(_digest(arrays))
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Sha256 over name, type, shape and numbers of every array but ``sha256``."""
    digest = hashlib.sha256()
    for name in sorted(set(arrays) - {"sha256"}):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def load_features(path: str | os.PathLike[str]) -> dict[str, Features]:
    """Reads a feature store that `save_features` wrote, and verifies it whole.

    Raises:
        ArtifactError: if the file is missing, damaged, changed, of an earlier version or something else.
    """
    where, again = str(path), "Make it again with `nformer-edge embed`."
    try:
        with open_plain(path, "a feature store") as file, np.load(file, allow_pickle=False) as z:
            _refuse_bombs(z.zip)
            arrays = {name: z[name] for name in z.files}
    except UNREADABLE as e:
        got = f"an unreadable file ({e})" if zipfile.is_zipfile(path) else file_kind(path).name
        raise ArtifactError(where, got, "a feature store", again) from e
    found = str(arrays.get("format", "another kind of .npz"))
    if found != _FORMAT:
        raise ArtifactError(where, found, _FORMAT, again)
    if str(arrays.get("sha256")) != _digest(arrays):
        raise ArtifactError(where, "contents that do not match their sha256", "the file as written", again)
    splits = [str(split) for split in np.atleast_1d(arrays.get("splits", ()))]
    own = {"format", "sha256", "splits"}
    required = own | {f"{split}/{name}" for split in splits for name in _ARRAYS}
    known = required | {f"{split}/{name}" for split in splits for name in _MORE}
    for what, names in (("no", required - set(arrays)), ("an unknown", set(arrays) - known)):
        if names:
            raise ArtifactError(where, f"{what} array {min(names)}", "the arrays of this version", again)
    return {split: _read_split(arrays, split, where) for split in splits}


def _refuse_bombs(archive: zipfile.ZipFile) -> None:
    """`save_features` compresses nothing: whatever is larger unpacked is not its work."""
    for entry in archive.infolist():
        if entry.file_size > entry.compress_size:
            raise ValueError(f"{entry.filename} is compressed")


def _read_split(arrays: Mapping[str, np.ndarray], split: str, where: str) -> Features:
    def texts(name: str) -> tuple[str, ...]:
        return tuple(str(text) for text in np.atleast_1d(arrays.get(f"{split}/{name}", ())))

    def text(name: str) -> str:
        return str(arrays.get(f"{split}/{name}", ""))

    fields: dict[str, Any] = {name: arrays[f"{split}/{name}"] for name in ("features", "pids", "camids")}
    fields |= {"paths": texts("paths"), "hashes": texts("sha256"), "ids": texts("ids")}
    fields |= {name: text(name) for name in ("model", "augmentation", "spec", "checkpoint", "precision")}
    try:
        return Features(**fields, augmented=arrays.get(f"{split}/augmented"))
    except DataError as e:
        raise ArtifactError(f"{where}: {split}/{e.subject}", e.got, e.expected, e.hint) from e
